// SPDX-License-Identifier: Apache-2.0
// What the kernels of operations by copy engines share: blocks of the exchange window, the ids, the abort, the warp's
// share of the work. Device code only, no state.
#pragma once

#include "client/src/local_kernels/exchange_params.h"
#include "client/src/local_kernels/ptx.cuh"
#include "proto/abi/expertd_reason.h"

namespace expertd::client::exchange {

inline constexpr uint32_t kFullWarp = 0xffffffffu;

__device__ inline uint32_t lane_id() {
  return threadIdx.x & 31;
}

/// The warp among those of all units of a step, and how many there are.
struct Warps {
  uint32_t first;
  uint32_t step;
};
__device__ inline Warps warps_of(uint32_t unit, uint32_t units) {
  return {unit * kExchangeWarps + threadIdx.x / 32, units * kExchangeWarps};
}

__device__ inline bool has_bit(uint64_t mask, uint32_t bit) {
  return (mask >> bit & 1) != 0;
}

/// Ranks that take part, as the daemon wrote them before the own rank's arrived word.
__device__ inline uint64_t active_ranks(const ExchangeParams& p) {
  return load_acquire_sys(p.steps + 2 * EXPERTD_STEP_RANKS) & ((uint64_t{1} << p.ranks) - 1);
}

/// Whether the operation is over: a word that was waited for has the abort value, or that of a later operation; or
/// it has the right one, but the operation had ended before (the completion word is written first, also by a block of
/// this one), or another rank was aborted before it copied (`voided` is written before its arrived word).
/// Whole block; one warp reads. `steps`: how many were waited for.
__device__ inline bool was_aborted(const ExchangeParams& p, uint32_t steps) {
  int aborted = 0;
  if (threadIdx.x < 32) {
#pragma unroll 1
    for (uint32_t step = 0; step < steps; ++step) {
      // The own rank has no word of the second step.
      if (lane_id() < p.ranks && (step == 0 || lane_id() != p.rank)) {
        aborted |= load_acquire_sys(p.steps + step * EXPERTD_STEP_RANKS + lane_id()) > p.seq ? 1 : 0;
      }
    }
    __syncwarp();
    aborted |= load_acquire_sys(p.steps + 2 * EXPERTD_STEP_RANKS + 1) == p.seq ? 1 : 0;  // voided, behind the arrivals
    aborted |= load_acquire_sys(p.completion) >= p.seq ? 1 : 0;
  }
  return __syncthreads_or(aborted) != 0;
}

__device__ inline expertd_exchange_report* report_of(const ExchangeParams& p) {
  return reinterpret_cast<expertd_exchange_report*>(p.buffer);
}

/// What a source dispatched: the own block is where it was packed.
__device__ inline const char* block_of(const ExchangeParams& p, uint32_t source) {
  return p.buffer + (source == p.rank ? p.layout.out_block : p.layout.in_blocks + source * p.layout.block_bytes);
}
__device__ inline const char* weights_of(const ExchangeParams& p, uint32_t origin) {
  return p.buffer + (origin == p.rank ? p.layout.out_weights : p.layout.in_weights + origin * p.layout.weights_bytes);
}
__device__ inline const expertd_exchange_header& header_of(const char* block) {
  return *reinterpret_cast<const expertd_exchange_header*>(block);
}
__device__ inline const int32_t* counts_of(const char* block) {
  return reinterpret_cast<const int32_t*>(block + sizeof(expertd_exchange_header));
}
__device__ inline uint32_t tokens_of(const ExchangeParams& p, const char* block) {
  return min(header_of(block).tokens, p.max_tokens);
}
__device__ inline uint32_t slots_per_expert(const ExchangeParams& p) {
  return p.ranks * p.max_tokens;
}
/// A count that another process wrote: no more than its tokens have lanes.
__device__ inline uint32_t count_of(const ExchangeParams& p, const char* block, uint32_t expert) {
  return min(static_cast<uint32_t>(max(counts_of(block)[expert], 0)), p.max_tokens * p.table_top_k);
}

__device__ inline int64_t load_id(const ExchangeParams& p, uint32_t position) {
  return p.idx_bytes == 8 ? static_cast<const long long*>(p.topk_idx)[position]
                          : static_cast<const int*>(p.topk_idx)[position];
}
__device__ inline int64_t id_at(const ExchangeParams& p, uint32_t token, uint32_t k) {
  return k < p.top_k ? load_id(p, token * p.top_k + k) : -1;
}

__device__ inline float bf16_at(const uint4& v, uint32_t i) {
  const uint32_t word = reinterpret_cast<const uint32_t*>(&v)[i / 2];
  return __uint_as_float(i % 2 == 0 ? word << 16 : word & 0xffff0000u);
}
__device__ inline uint4 rounded(const float* sums) {
  return {to_bf16_pair(sums[0], sums[1]), to_bf16_pair(sums[2], sums[3]), to_bf16_pair(sums[4], sums[5]),
          to_bf16_pair(sums[6], sums[7])};
}

/// Copies elements of 1, 2 or 4 bytes.
__device__ inline void copy_element(char* to, const char* from, uint32_t bytes) {
  if (bytes == 4) {
    *reinterpret_cast<uint32_t*>(to) = *reinterpret_cast<const uint32_t*>(from);
  } else if (bytes == 2) {
    *reinterpret_cast<uint16_t*>(to) = *reinterpret_cast<const uint16_t*>(from);
  } else {
    *to = *from;
  }
}

}  // namespace expertd::client::exchange
