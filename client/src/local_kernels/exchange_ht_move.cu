// SPDX-License-Identifier: Apache-2.0
#include "client/src/local_kernels/exchange_ht.cuh"

namespace expertd::client::exchange_ht {
namespace {

constexpr uint32_t kAccesses = kHtPartBytes / 512;  // of a lane, under way together

/// Where payloads for one rank go: its place in the window, or the own output.
__device__ char* rows_of(const HtParams& p, uint32_t rank) {
  return rank == p.rank ? static_cast<char*>(p.out_x)
                        : p.buffer + p.layout.rows + place_of(p, rank) * p.layout.rows_bytes;
}

/// Of a record, where its routing begins.
__device__ int32_t* routing_of(const HtParams& p, char* record) {
  return reinterpret_cast<int32_t*>(record + ((p.side_elements * p.side_element_bytes + 3) & ~3u));
}

__device__ void store_side(const HtParams& p, char* to, uint32_t token) {
  const char* side = static_cast<const char*>(p.side) + int64_t{token} * p.side_row_stride;
#pragma unroll 1
  for (uint32_t i = lane_id(); i < p.side_elements; i += 32) {
    copy_element(to + i * p.side_element_bytes, side + int64_t{i} * p.side_element_stride, p.side_element_bytes);
  }
}

/// Of this lane of the token: the expert's number at the rank, or -1, and the weight that it gets there.
struct Routing {
  int32_t expert;
  float weight;
};
__device__ Routing routing_at(const HtParams& p, uint32_t token, uint32_t rank) {
  const uint64_t at = uint64_t{token} * p.top_k + lane_id();
  const int64_t local = p.topk_idx == nullptr ? -1 : load_id(p, at) - int64_t{rank} * p.local_experts;
  const bool owned = local >= 0 && local < int64_t{p.local_experts};
  const bool weighted = p.topk_weights != nullptr && (owned || !p.zero_foreign);
  return {owned ? static_cast<int32_t>(local) : -1, weighted ? p.topk_weights[at] : 0.0f};
}

/// What travels beside a token's row for another rank. Whole warp.
__device__ void store_record(const HtParams& p, uint32_t token, uint32_t rank, uint64_t row) {
  char* record =
      p.buffer + p.layout.beside + place_of(p, rank) * p.layout.beside_bytes + row * uint64_t{p.record_bytes};
  if (p.side != nullptr) {
    store_side(p, record, token);
  }
  if (p.cached) {
    return;
  }
  int32_t* routing = routing_of(p, record);
  if (lane_id() < p.top_k) {
    const Routing at = routing_at(p, token, rank);
    routing[lane_id()] = at.expert;
    reinterpret_cast<float*>(routing + p.top_k)[lane_id()] = at.weight;
  }
  if (lane_id() == 0) {
    routing[2 * p.top_k] = static_cast<int32_t>(token | (p.topk_weights != nullptr ? EXPERTD_HT_TOKEN_WEIGHTED : 0u));
  }
}

/// To the caller's outputs, what the lane has of a row's routing. Whole warp.
__device__ void store_routing(const HtParams& p, uint64_t row, const Routing& routing, bool weighted, uint32_t token) {
  const uint64_t at = row * p.top_k + lane_id();
  if (lane_id() < p.top_k && p.out_topk_idx != nullptr) {
    store_id(p, p.out_topk_idx, at, routing.expert);
  }
  if (lane_id() < p.top_k && weighted && p.out_topk_weights != nullptr) {
    p.out_topk_weights[at] = routing.weight;
  }
  if (lane_id() == 0 && p.src_info != nullptr) {
    p.src_info[row] = static_cast<int32_t>(token);
  }
}

/// The same of a row that stays. Whole warp.
__device__ void store_beside(const HtParams& p, uint32_t token, uint64_t row) {
  if (p.side != nullptr && p.out_side != nullptr) {
    store_side(p, static_cast<char*>(p.out_side) + row * p.side_elements * p.side_element_bytes, token);
  }
  if (!p.cached) {
    const Routing routing = lane_id() < p.top_k ? routing_at(p, token, p.rank) : Routing{};
    store_routing(p, row, routing, p.topk_weights != nullptr, token);
  }
}

/// The same of a row that came from another rank. Whole warp.
__device__ void spread_record(const HtParams& p, char* record, uint64_t row) {
  if (p.out_side != nullptr) {
    char* out = static_cast<char*>(p.out_side) + row * p.side_elements * p.side_element_bytes;
#pragma unroll 1
    for (uint32_t i = lane_id(); i < p.side_elements; i += 32) {
      copy_element(out + i * p.side_element_bytes, record + i * p.side_element_bytes, p.side_element_bytes);
    }
  }
  if (p.cached) {
    return;
  }
  const int32_t* routing = routing_of(p, record);
  Routing own{};
  if (lane_id() < p.top_k) {
    own = {routing[lane_id()], reinterpret_cast<const float*>(routing + p.top_k)[lane_id()]};
  }
  const auto token = static_cast<uint32_t>(routing[2 * p.top_k]);
  store_routing(p, row, own, (token & EXPERTD_HT_TOKEN_WEIGHTED) != 0, token & ~EXPERTD_HT_TOKEN_WEIGHTED);
}

/// Every warp's share of the records of the others, which begin at `warp` and are `warps` apart.
__device__ void spread_records(const HtParams& p, const expertd_exchange_ht_plan& plan, uint32_t warp, uint32_t warps) {
  const uint32_t end = lane_id() < p.ranks ? static_cast<uint32_t>(plan.rank_prefix[lane_id() * p.ranks + p.rank]) : 0;
  const uint32_t rows = min(plan.recv_rows, p.capacity_rows);
#pragma unroll 1
  for (uint32_t row = p.record_bytes != 0 ? warp : rows; row < rows; row += warps) {
    const uint32_t source = __popc(__ballot_sync(kFullWarp, lane_id() < p.ranks && end <= row));
    const uint32_t before = __shfl_sync(kFullWarp, end, source == 0 ? 0 : source - 1);
    const uint32_t number = row - (source == 0 ? 0 : before);
    if (source < p.ranks && source != p.rank && number < p.max_tokens) {
      char* record = p.buffer + p.layout.beside_in + place_of(p, source) * p.layout.beside_bytes;
      spread_record(p, record + number * uint64_t{p.record_bytes}, row);
    }
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
    auto* out = reinterpret_cast<uint4*>(rows_of(p, static_cast<uint32_t>(rank)) + at * p.row_bytes);
#pragma unroll
    for (uint32_t i = 0; i < kAccesses; ++i) {
      if (base + i * 32 < pieces) {
        out[base + i * 32] = v[i];
      }
    }
    if (part != 0) {
      continue;
    }
    if (static_cast<uint32_t>(rank) == p.rank) {
      store_beside(p, token, at);
    } else {
      store_record(p, token, static_cast<uint32_t>(rank), at);
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
// to the window in the order of the tokens, with a record of what travels beside each; the stream writes `packed`
// behind each. Place: behind the stream's wait for `plan` and the others' records, which go with the rows that stay to
// the caller's outputs, while the other rows are still on their way; one block more writes counts, prefix and the
// result word. Every block does nothing (of a place: makes the outputs those of a failure) when the operation has ended
// before. Rows are clamped: numbers are the caller's own, the plan's are the daemon's. Bytes per token and rank: a row
// read, one written. Bound: HBM.
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
  const uint32_t warp = blockIdx.x * kHtWarps + threadIdx.x / 32;
  if (places) {
    spread_records(p, plan, warp, step);
  }
#pragma unroll 1
  for (uint32_t unit = warp; unit < p.step_tokens * parts; unit += step) {
    const uint32_t token = p.first_token + unit / parts;
    const int32_t number = row_of(p, bases, token);
    const uint32_t row = own_base + static_cast<uint32_t>(number);
    const bool goes = number >= 0 && row < limit && (lane_id() == p.rank) == places;
    move_part(p, token, unit % parts, __ballot_sync(kFullWarp, goes), row);
  }
}
