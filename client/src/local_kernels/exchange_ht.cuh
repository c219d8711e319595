// SPDX-License-Identifier: Apache-2.0
// What the kernels of high throughput by copy engines share. Device code only, no state.
#pragma once

#include "client/src/local_kernels/exchange.cuh"
#include "client/src/local_kernels/exchange_ht_params.h"

namespace expertd::client::exchange_ht {

using exchange::bf16_at;
using exchange::copy_element;
using exchange::has_bit;
using exchange::kFullWarp;
using exchange::lane_id;

__device__ inline uint64_t step_word(const HtParams& p, uint32_t offset) {
  return load_acquire_sys(p.steps + offset / 8);
}

/// Whether the operation has ended before its time: its completion word, which is written before the words that the
/// stream waited for, or another rank's abort. Whole block.
__device__ inline bool was_aborted(const HtParams& p) {
  int aborted = 0;
  if (threadIdx.x == 0) {
    aborted = load_acquire_sys(p.completion) >= p.seq || step_word(p, EXPERTD_HT_STEP_VOIDED) == p.seq ? 1 : 0;
  }
  return __syncthreads_or(aborted) != 0;
}

/// As expertd_exchange_ht_slice().
__device__ inline uint32_t slice_begin(const HtParams& p, uint32_t slice) {
  return p.tokens * slice / EXPERTD_HT_SLICES;
}

__device__ inline int64_t load_id(const HtParams& p, uint64_t position) {
  return p.idx_bytes == 8 ? static_cast<const long long*>(p.topk_idx)[position]
                          : static_cast<const int*>(p.topk_idx)[position];
}
__device__ inline void store_id(const HtParams& p, void* to, uint64_t position, int32_t id) {
  if (p.idx_bytes == 8) {
    static_cast<long long*>(to)[position] = id;
  } else {
    static_cast<int*>(to)[position] = id;
  }
}

__device__ inline int32_t* numbers_of(const HtParams& p) {
  return reinterpret_cast<int32_t*>(p.handle + p.layout.handle_numbers);
}
__device__ inline uint8_t* owners_of(const HtParams& p) {
  return reinterpret_cast<uint8_t*>(p.handle + p.layout.handle_owners);
}
__device__ inline expertd_exchange_ht_handle& handle_of(const HtParams& p) {
  return *reinterpret_cast<expertd_exchange_ht_handle*>(p.handle);
}

/// Rows in front of each slice, by rank.
using Bases = int32_t[EXPERTD_HT_SLICES][EXPERTD_EXCHANGE_RANKS_MAX];
__device__ inline void load_bases(const HtParams& p, Bases& bases) {
  if (threadIdx.x < EXPERTD_EXCHANGE_RANKS_MAX) {
    int32_t sum = 0;
#pragma unroll
    for (uint32_t slice = 0; slice < EXPERTD_HT_SLICES; ++slice) {
      bases[slice][threadIdx.x] = sum;
      sum += handle_of(p).rows[slice][threadIdx.x];
    }
  }
  __syncthreads();
}

/// Of the rank of this lane: the token's row among this source's rows for it, or -1.
__device__ inline int32_t row_of(const HtParams& p, const Bases& bases, uint32_t token) {
  int32_t row = -1;
  if (lane_id() < p.ranks) {
    const uint32_t slice = (token * EXPERTD_HT_SLICES + EXPERTD_HT_SLICES - 1) / p.tokens;
    const int32_t number = numbers_of(p)[uint64_t{token} * p.ranks + lane_id()];
    row = number < 0 ? -1 : bases[slice][lane_id()] + number;
  }
  return row;
}

__device__ inline uint32_t place_of(const HtParams& p, uint32_t rank) {
  return rank < p.rank ? rank : rank - 1;
}

}  // namespace expertd::client::exchange_ht
