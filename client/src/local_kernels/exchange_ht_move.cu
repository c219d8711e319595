// SPDX-License-Identifier: Apache-2.0
#include "client/src/local_kernels/exchange_ht.cuh"

namespace expertd::client::exchange_ht {
namespace {

constexpr uint32_t kAccesses = kHtPartBytes / 512;  // of a lane, under way together

/// Where the rows for one rank go: its place in the window, or the own outputs.
struct Target {
  char* x;
  char* side;
  char* idx;
  float* weights;
  int32_t* tokens;
};

__device__ Target target_of(const HtParams& p, uint32_t rank) {
  if (rank == p.rank) {
    return {static_cast<char*>(p.out_x), static_cast<char*>(p.out_side), static_cast<char*>(p.out_topk_idx),
            p.out_topk_weights, p.src_info};
  }
  const uint64_t place = place_of(p, rank);
  return {p.buffer + p.layout.rows + place * p.layout.rows_bytes,
          p.buffer + p.layout.side + place * p.layout.side_bytes, p.buffer + p.layout.idx + place * p.layout.idx_bytes,
          reinterpret_cast<float*>(p.buffer + p.layout.weights + place * p.layout.weights_bytes),
          reinterpret_cast<int32_t*>(p.buffer + p.layout.tokens + place * p.layout.tokens_bytes)};
}

/// What travels beside a token's row. Whole warp.
__device__ void store_beside(const HtParams& p, const Target& to, uint32_t token, uint32_t rank, uint64_t row) {
  if (p.side != nullptr && to.side != nullptr) {
    const char* side = static_cast<const char*>(p.side) + int64_t{token} * p.side_row_stride;
    char* out = to.side + row * p.side_elements * p.side_element_bytes;
#pragma unroll 1
    for (uint32_t i = lane_id(); i < p.side_elements; i += 32) {
      copy_element(out + i * p.side_element_bytes, side + int64_t{i} * p.side_element_stride, p.side_element_bytes);
    }
  }
  if (p.cached) {
    return;
  }
  if (lane_id() < p.top_k) {
    const uint64_t at = uint64_t{token} * p.top_k + lane_id();
    const int64_t local = p.topk_idx == nullptr ? -1 : load_id(p, at) - int64_t{rank} * p.local_experts;
    const bool owned = local >= 0 && local < int64_t{p.local_experts};
    if (to.idx != nullptr) {
      store_id(p, to.idx, row * p.top_k + lane_id(), owned ? static_cast<int32_t>(local) : -1);
    }
    if (p.topk_weights != nullptr && to.weights != nullptr) {
      to.weights[row * p.top_k + lane_id()] = !owned && p.zero_foreign ? 0.0f : p.topk_weights[at];
    }
  }
  if (lane_id() == 0 && to.tokens != nullptr) {
    to.tokens[row] = static_cast<int32_t>(token);
  }
}

/// One part of a token to its rows at the ranks of `wanted`; `row` is that of the lane's rank. Whole warp.
__device__ void move_part(const HtParams& p, uint32_t token, uint32_t part, uint32_t wanted, uint32_t row) {
  const uint32_t pieces = p.row_bytes / 16;
  const uint32_t base = part * (kHtPartBytes / 16) + lane_id();
  const auto* x = reinterpret_cast<const uint4*>(static_cast<const char*>(p.x) + uint64_t{token} * p.row_bytes);
  uint4 v[kAccesses];
#pragma unroll
  for (uint32_t i = 0; i < kAccesses; ++i) {
    v[i] = base + i * 32 < pieces ? x[base + i * 32] : uint4{};
  }
#pragma unroll 1
  for (; wanted != 0; wanted &= wanted - 1) {
    const int rank = __ffs(static_cast<int>(wanted)) - 1;
    const uint64_t at = __shfl_sync(kFullWarp, row, rank);
    const Target to = target_of(p, static_cast<uint32_t>(rank));
    auto* out = reinterpret_cast<uint4*>(to.x + at * p.row_bytes);
#pragma unroll
    for (uint32_t i = 0; i < kAccesses; ++i) {
      if (base + i * 32 < pieces) {
        out[base + i * 32] = v[i];
      }
    }
    if (part == 0) {
      store_beside(p, to, token, static_cast<uint32_t>(rank), at);
    }
  }
}

/// Counts, prefix and the result. One block.
__device__ void store_tables(const HtParams& p, bool aborted, uint32_t verdict) {
  const auto& plan = *reinterpret_cast<const expertd_exchange_ht_plan*>(p.buffer + p.layout.plan);
  const bool fails = aborted || verdict != 0;
  if (threadIdx.x == 0 && !aborted) {
    *p.result = verdict;
  }
  for (uint32_t e = threadIdx.x; p.expert_counts != nullptr && e < p.local_experts; e += kHtThreads) {
    p.expert_counts[e] = fails ? 0 : static_cast<int32_t>(plan.expert_counts[e]);
  }
  for (uint32_t i = threadIdx.x; p.rank_prefix != nullptr && !fails && i < p.ranks * p.ranks; i += kHtThreads) {
    p.rank_prefix[i] = plan.rank_prefix[i];
  }
}

/// This block's share of the rows behind the last; of an operation that failed no row has an expert.
__device__ void clear_rows(const HtParams& p, bool fails) {
  const auto& plan = *reinterpret_cast<const expertd_exchange_ht_plan*>(p.buffer + p.layout.plan);
  if (p.cached || !(fails || p.worst_tokens)) {
    return;
  }
  const uint64_t lanes = uint64_t{p.capacity_rows} * p.top_k;
  for (uint64_t i = (fails ? 0 : uint64_t{plan.recv_rows} * p.top_k) + blockIdx.x * kHtThreads + threadIdx.x; i < lanes;
       i += gridDim.x * kHtThreads) {
    if (p.out_topk_idx != nullptr) {
      store_id(p, p.out_topk_idx, i, -1);
    }
    if (p.out_topk_weights != nullptr && !fails) {
      p.out_topk_weights[i] = 0.0f;
    }
  }
}

}  // namespace
}  // namespace expertd::client::exchange_ht

// exchange_ht_move. Grid: a warp per part of 2048 bytes of a token. Pieces: the rows of their slices for other ranks go
// to the window in the order of the tokens, with what travels beside them; the stream writes `packed` behind each.
// Place: behind the stream's wait for `plan`, the rows that stay go to the caller's outputs, and one block more writes
// counts, prefix and the result word. Every block does nothing (of a place: makes the outputs those of a failure) when
// the operation has ended before. Rows are clamped: numbers are the caller's own, the plan's are the daemon's. Bytes
// per token and rank: a row read, one written. Bound: HBM.
extern "C" __global__ void __launch_bounds__(expertd::client::kHtThreads)
    expertd_exchange_ht_move(const __grid_constant__ expertd::client::HtParams p) {
  using namespace expertd::client;
  using namespace expertd::client::exchange_ht;
  __shared__ Bases bases;
  if (p.steps == nullptr) {
    return;
  }
  const bool aborted = was_aborted(p);
  const bool places = p.step == kHtPlace;
  const auto verdict = places ? static_cast<uint32_t>(step_word(p, EXPERTD_HT_STEP_VERDICT)) : 0;
  if (places) {
    clear_rows(p, aborted || verdict != 0);
    if (blockIdx.x == gridDim.x - 1) {
      store_tables(p, aborted, verdict);
      return;
    }
  }
  if (aborted || verdict != 0) {
    return;
  }
  load_bases(p, bases);
  const auto& plan = *reinterpret_cast<const expertd_exchange_ht_plan*>(p.buffer + p.layout.plan);
  const uint32_t own_base = places ? plan.own_base : 0;
  const uint32_t limit = places ? p.capacity_rows : p.max_tokens;
  const uint32_t parts = (p.row_bytes + kHtPartBytes - 1) / kHtPartBytes;
  const uint32_t step = (gridDim.x - (places ? 1 : 0)) * kHtWarps;
#pragma unroll 1
  for (uint32_t unit = blockIdx.x * kHtWarps + threadIdx.x / 32; unit < p.step_tokens * parts; unit += step) {
    const uint32_t token = p.first_token + unit / parts;
    const int32_t number = row_of(p, bases, token);
    const uint32_t row = own_base + static_cast<uint32_t>(number);
    const bool goes = number >= 0 && row < limit && (lane_id() == p.rank) == places;
    move_part(p, token, unit % parts, __ballot_sync(kFullWarp, goes), row);
  }
}
