// SPDX-License-Identifier: Apache-2.0
// Expanding: what arrived in the exchange window to the caller's outputs. A lane of a warp has a lane of the token: its
// slot is the source's number behind the counts of lower sources. Device code only, of expertd_exchange_dispatch.
#pragma once

#include "client/src/local_kernels/exchange.cuh"

namespace expertd::client::exchange {
namespace {

/// Where the lane's (token, k) goes. `wanted`: it has a slot here.
struct Target {
  bool wanted = false;
  uint32_t local = 0;  // expert
  uint32_t row = 0;    // inside the expert's slots
  uint64_t slot = 0;
};

/// Numbers come from another process: whatever they say, the slot is one of the output's.
__device__ Target target_of(const ExchangeParams& p, uint64_t active, uint32_t source, int2 routed) {
  Target target;
  const auto expert = static_cast<uint32_t>(routed.x);
  if (expert >= p.experts || routed.y < 0 || expert / p.local_experts != p.rank) {
    return target;
  }
  uint32_t row = static_cast<uint32_t>(routed.y);
#pragma unroll 1
  for (uint32_t s = 0; s < source; ++s) {
    row += has_bit(active, s) ? count_of(p, block_of(p, s), expert) : 0;
  }
  target.wanted = row < slots_per_expert(p);
  target.local = expert % p.local_experts;
  target.row = row;
  target.slot = uint64_t{target.local} * slots_per_expert(p) + row;
  return target;
}

/// Scales of this part's groups to a slot's column: [L, groups, N]. Whole warp.
__device__ void store_scales(const ExchangeParams& p, const char* row, uint32_t part, uint32_t local, uint32_t at) {
  const bool packed = p.payload == ExchangePayload::kUe8m0;
  const uint32_t words = p.hidden / (packed ? 512 : 128);
  const uint32_t each = packed ? 2 : 8;  // of 1024 codes
  const uint32_t word = part * each + lane_id();
  if (lane_id() < each && word < words) {
    static_cast<uint32_t*>(p.out_side)[(uint64_t{local} * words + word) * slots_per_expert(p) + at] =
        reinterpret_cast<const uint32_t*>(row + p.out_row_bytes)[word];
  }
}

/// One part of a token to all its slots. Whole warp.
__device__ void store_part(const ExchangeParams& p, const char* row, uint32_t part, const uint4* v,
                           const Target& target) {
  const uint32_t pieces = p.out_row_bytes / 16;
  const uint32_t piece = part * (kExchangePartBytes / 16) + lane_id();
#pragma unroll 1
  for (uint32_t left = __ballot_sync(kFullWarp, target.wanted); left != 0; left &= left - 1) {
    const int from = __ffs(static_cast<int>(left)) - 1;
    const uint64_t slot = __shfl_sync(kFullWarp, target.slot, from);
    const uint32_t local = __shfl_sync(kFullWarp, target.local, from);
    const uint32_t at = __shfl_sync(kFullWarp, target.row, from);
    auto* out = reinterpret_cast<uint4*>(static_cast<char*>(p.out_x) + slot * p.out_row_bytes);
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
      if (piece + i * 32 < pieces) {
        out[piece + i * 32] = v[i];
      }
    }
    if (p.out_side == nullptr) {
      continue;
    }
    if (p.payload != ExchangePayload::kPlain) {
      store_scales(p, row, part, local, at);
    } else if (part == 0) {
      char* side = static_cast<char*>(p.out_side) + slot * p.side_elements * p.side_element_bytes;
#pragma unroll 1
      for (uint32_t i = lane_id(); i < p.side_elements; i += 32) {
        copy_element(side + i * p.side_element_bytes, row + p.out_row_bytes + i * p.side_element_bytes,
                     p.side_element_bytes);
      }
    }
  }
}

/// This warp's parts of the rows of all sources.
__device__ void expand_rows(const ExchangeParams& p, uint64_t active, Warps warps) {
  uint32_t most = 0;
#pragma unroll 1
  for (uint32_t s = 0; s < p.ranks; ++s) {
    most = has_bit(active, s) ? max(most, tokens_of(p, block_of(p, s))) : most;
  }
  const uint32_t parts = exchange_parts(p.out_row_bytes, kExchangePartBytes);
  const uint32_t pieces = p.out_row_bytes / 16;
  auto* slots = reinterpret_cast<int32_t*>(p.handle + p.layout.handle_slots);
  auto* own = reinterpret_cast<int32_t*>(p.handle + p.layout.handle_lanes);
#pragma unroll 1
  for (uint32_t unit = warps.first; unit < p.ranks * most * parts; unit += warps.step) {
    const uint32_t part = unit % parts;
    const uint32_t source = unit / parts % p.ranks;
    const uint32_t token = unit / parts / p.ranks;
    const char* block = block_of(p, source);
    if (!has_bit(active, source) || token >= tokens_of(p, block)) {
      continue;
    }
    const char* row = block + p.layout.rows + token * p.row_stride;
    uint4 v[2];
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
      const uint32_t piece = part * (kExchangePartBytes / 16) + i * 32 + lane_id();
      v[i] = piece < pieces ? reinterpret_cast<const uint4*>(row)[piece] : uint4{};
    }
    int2 routed = {-1, -1};
    const uint64_t at = uint64_t{token} * p.table_top_k + lane_id();
    if (lane_id() < p.table_top_k) {
      routed = reinterpret_cast<const int2*>(block + p.layout.lanes)[at];
    }
    const Target target = target_of(p, active, source, routed);
    if (part == 0 && lane_id() < p.table_top_k) {
      slots[uint64_t{source} * p.max_tokens * p.table_top_k + at] = target.wanted ? static_cast<int>(target.slot) : -1;
      if (source == p.rank) {
        own[at] = routed.x;
      }
      if (target.wanted && p.src_info != nullptr) {
        p.src_info[target.slot] = static_cast<int32_t>(token);
      }
    }
    store_part(p, row, part, v, target);
  }
}

/// In shared memory of the block that writes the tables.
struct Sums {
  uint32_t over;  // the first expert with more rows than slots
  uint32_t received;
  uint32_t local;
  uint32_t remote;
};

/// The lowest active rank whose routing has an error, -1 for none.
__device__ int32_t rejecting_rank(const ExchangeParams& p, uint64_t active) {
#pragma unroll 1
  for (uint32_t s = 0; s < p.ranks; ++s) {
    if (has_bit(active, s) && header_of(block_of(p, s)).error != 0) {
      return static_cast<int32_t>(s);
    }
  }
  return -1;
}

/// Why the operation has no outcome, told to the daemon and behind the completion word. One thread.
__device__ void report_failure(const ExchangeParams& p, uint64_t active, uint32_t over) {
  expertd_exchange_report* report = report_of(p);
  const expertd_exchange_header& own = header_of(block_of(p, p.rank));
  report->rank = rejecting_rank(p, active);
  report->value = own.error_value;
  report->reason = own.error != 0 ? own.error : static_cast<uint32_t>(EXPERTD_REASON_PEER_REJECTED);
  if (report->rank < 0) {
    uint32_t total = 0;
#pragma unroll 1
    for (uint32_t s = 0; s < p.ranks; ++s) {
      total += has_bit(active, s) ? count_of(p, block_of(p, s), over) : 0;
    }
    report->reason = EXPERTD_REASON_CAPACITY_EXCEEDED;
    report->rank = static_cast<int32_t>(over / p.local_experts);
    report->value = total;
  }
  *p.result = report->reason;
}

__device__ void clear_tables(const ExchangeParams& p) {
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < p.local_experts * p.ranks; i += blockDim.x) {
    if (i < p.local_experts && p.expert_counts != nullptr) {
      p.expert_counts[i] = 0;
    }
    if (p.layout_range != nullptr) {
      p.layout_range[i] = 0;
    }
  }
}

/// Counts of all experts, over all active sources.
__device__ void sum_counts(const ExchangeParams& p, uint64_t active, Sums* sums) {
#pragma unroll 1
  for (uint32_t e = threadIdx.x; e < p.experts; e += blockDim.x) {
    const uint32_t owner = e / p.local_experts;
    uint32_t total = 0;
#pragma unroll 1
    for (uint32_t s = 0; s < p.ranks; ++s) {
      total += has_bit(active, s) ? count_of(p, block_of(p, s), e) : 0;
    }
    if (!has_bit(active, owner)) {
      continue;
    }
    if (total > slots_per_expert(p)) {
      atomicMin(&sums->over, e);
    }
    atomicAdd(owner == p.rank ? &sums->local : &sums->remote, count_of(p, block_of(p, p.rank), e));
    if (owner == p.rank) {
      atomicAdd(&sums->received, total);
    }
  }
}

__device__ void store_tables(const ExchangeParams& p, uint64_t active) {
#pragma unroll 1
  for (uint32_t e = threadIdx.x; e < p.local_experts; e += blockDim.x) {
    uint64_t begin = 0;
#pragma unroll 1
    for (uint32_t s = 0; s < p.ranks; ++s) {
      const uint64_t count = has_bit(active, s) ? count_of(p, block_of(p, s), p.rank * p.local_experts + e) : 0;
      if (p.layout_range != nullptr) {
        p.layout_range[uint64_t{e} * p.ranks + s] = static_cast<int64_t>(begin << 32 | count);
      }
      begin += count;
    }
    if (p.expert_counts != nullptr) {
      p.expert_counts[e] = static_cast<int32_t>(begin);
    }
    if (p.stats != nullptr) {
      p.stats[e] += static_cast<int32_t>(begin);
    }
    report_of(p)->expert_counts[e] = static_cast<uint32_t>(begin);
  }
}

/// The caller's counts and ranges, the handle's head and the report. Whole block.
__device__ void write_tables(const ExchangeParams& p, uint64_t active) {
  __shared__ Sums sums;
  if (threadIdx.x == 0) {
    sums = {~0u, 0, 0, 0};
  }
  __syncthreads();
  sum_counts(p, active, &sums);
  __syncthreads();
  const bool fails = sums.over != ~0u || rejecting_rank(p, active) >= 0;
  auto* handle = reinterpret_cast<expertd_exchange_handle*>(p.handle);
  if (threadIdx.x < p.ranks) {
    handle->tokens[threadIdx.x] = fails ? 0 : tokens_of(p, block_of(p, threadIdx.x));
  }
  if (threadIdx.x == 0) {
    handle->active = fails ? 0 : active;
    expertd_exchange_report* report = report_of(p);
    report->reason = EXPERTD_REASON_NONE;
    report->rank = -1;
    report->recv_rows = sums.received;
    report->local_rows = sums.local;
    report->remote_rows = sums.remote;
    report->expert_count_entries = p.local_experts;
    if (fails) {
      report_failure(p, active, sums.over);
    } else {
      *p.result = EXPERTD_REASON_NONE;
    }
  }
  if (fails) {
    clear_tables(p);
  } else {
    store_tables(p, active);
  }
}

}  // namespace
}  // namespace expertd::client::exchange
