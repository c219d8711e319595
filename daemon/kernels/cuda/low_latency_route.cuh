// SPDX-License-Identifier: Apache-2.0
// What the first blocks of a low latency dispatch do beside the blocks that move rows: before the exchange they number
// this rank's rows and hand over numbers and counts, behind it the first one writes the plan and the caller's tables.
// Device code only, included by link_ll_dispatch.cu; no state. Definitions: daemon/kernels/README.md.
#pragma once

#include "daemon/kernels/cuda/low_latency_steps.cuh"
#include "daemon/kernels/cuda/plan.cuh"

namespace expertd::kernels::cuda {

inline constexpr uint32_t kNoPosition = 0xffffffffu;
/// Experts that one thread counts.
inline constexpr uint32_t kColumnsPerThread = base::kMaxExperts / kLowLatencyThreads;
static_assert(kColumnsPerThread * kLowLatencyThreads == base::kMaxExperts);

/// Blocks that number rows, and the positions that a further one is worth: each reads the ids of all positions before
/// its own, which is cheaper than to wait for another block's counts.
inline constexpr uint32_t kMostRouteBlocks = 8;
inline constexpr uint32_t kRouteBlockPositions = 256;
/// Ids of earlier positions that a thread has under way together.
inline constexpr uint32_t kIdsAhead = 2;

/// In the block's dynamic shared memory.
struct RouteShared {
  uint16_t* warp_rows;  // [warps, E]: rows of the warp for the expert in this round; then of the warps before it
  int32_t* next;        // [E]: rows of earlier positions, up to the round before
  uint32_t* error;      // first bad (token, lane)
};

__host__ __device__ constexpr uint32_t route_shared_bytes(uint32_t experts) {
  return experts * (kLowLatencyWarps * 2 + 4) + 16;
}

__device__ inline RouteShared route_shared(void* memory, uint32_t experts) {
  auto* rows = static_cast<uint16_t*>(memory);
  auto* next = reinterpret_cast<int32_t*>(rows + uint64_t{kLowLatencyWarps} * experts);
  return {rows, next, reinterpret_cast<uint32_t*>(next + experts)};
}

/// Turns the rows of the first `warps` in one round into those of the warps before them, and adds the round before to
/// `next`. Every thread has its experts; `pending` holds their rows of this round.
__device__ inline void scan_round(uint32_t experts, uint32_t warps, int32_t* pending, const RouteShared& s) {
#pragma unroll
  for (uint32_t c = 0; c < kColumnsPerThread; ++c) {
    const uint32_t e = c * kLowLatencyThreads + threadIdx.x;
    if (e >= experts) {
      break;
    }
    s.next[e] += pending[c];
    uint32_t running = 0;
#pragma unroll 1
    for (uint32_t first = 0; first < warps; first += 8) {
      uint32_t rows[8];
#pragma unroll
      for (uint32_t i = 0; i < 8; ++i) {
        rows[i] = s.warp_rows[(first + i) * experts + e];
      }
#pragma unroll
      for (uint32_t i = 0; i < 8; ++i) {
        s.warp_rows[(first + i) * experts + e] = static_cast<uint16_t>(running);
        running += rows[i];
      }
    }
    pending[c] = static_cast<int32_t>(running);
  }
}

/// The id of a (token, lane); -1 behind the operation's top-k and without ids.
__device__ inline int64_t id_at(const PartParams& p, uint32_t token, uint32_t k) {
  const bool given = k < p.op.shape.top_k && p.op.in.topk_idx != nullptr;
  return given ? load_id(p.op.in.topk_idx, p.op.shape.topk_idx_bytes, uint64_t{token} * p.op.shape.top_k + k) : -1;
}

/// (token, lane) positions to number, K of the group per token.
__host__ __device__ inline uint32_t route_positions(const PartParams& p) {
  return p.refused_reason == 0 ? p.op.shape.tokens * p.table_top_k : 0;
}

/// The first blocks of the grid, at most half of it.
__host__ __device__ inline uint32_t route_blocks(const PartParams& p, uint32_t grid) {
  const uint32_t most = grid / 2 < kMostRouteBlocks ? grid / 2 : kMostRouteBlocks;
  const uint32_t wanted = route_positions(p) / kRouteBlockPositions;
  const uint32_t blocks = wanted < most ? wanted : most;
  return blocks == 0 ? 1 : blocks;
}

/// The id of a position before `end`, -1 for the others.
__device__ __forceinline__ int64_t id_at_position(const PartParams& p, uint32_t position, uint32_t end) {
  if (position >= end) {
    return -1;
  }
  if (p.table_top_k != p.op.shape.top_k) {
    return id_at(p, position / p.table_top_k, position % p.table_top_k);
  }
  return p.op.in.topk_idx == nullptr ? -1 : load_id(p.op.in.topk_idx, p.op.shape.topk_idx_bytes, position);
}

/// What the id of a position says. `counted`: it gets a row.
struct RouteId {
  uint32_t expert;
  bool valid;
  bool counted;
};

/// Keeps the first bad position, in the caller's count. Not inlined, because it is rare.
__device__ __noinline__ inline void keep_error(uint32_t* error, uint32_t position, uint32_t table_top_k,
                                               uint32_t top_k) {
  atomicMin(error, position / table_top_k * top_k + position % table_top_k);
}

/// Keeps a bad one on the way.
__device__ __forceinline__ RouteId check_id(const PartParams& p, uint32_t position, int64_t id, const RouteShared& s) {
  const OpShape& shape = p.op.shape;
  const bool valid = id >= 0 && id < static_cast<int64_t>(shape.experts);
  if (!valid && id != -1) {
    keep_error(s.error, position, p.table_top_k, shape.top_k);
  }
  const auto expert = static_cast<uint32_t>(id);
  return {expert, valid, valid && rank_active(shape, expert / shape.local_experts)};
}

__device__ inline void clear_round(uint32_t experts, const RouteShared& s) {
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < experts * kLowLatencyWarps / 8; i += kLowLatencyThreads) {
    reinterpret_cast<uint4*>(s.warp_rows)[i] = uint4{};
  }
}

/// Keeps one numbered lane in the handle and sends it to every active rank.
__device__ inline void hand_over_lane(const PartParams& p, uint32_t position, RoutedLane lane) {
  const OpShape& shape = p.op.shape;
  p.op.routing.topk[position] = lane.expert;
  p.op.routing.token_expert[position] = lane.row;
  const uint64_t at = uint64_t{shape.rank} * shape.max_tokens * p.table_top_k + position;
#pragma unroll 1
  for (uint32_t j = 0; j < shape.ranks; ++j) {
    if (rank_active(shape, j)) {
      char* lanes = p.low_latency.staging[j] + p.low_latency.layout.dispatch_lanes;
      reinterpret_cast<int2*>(lanes)[at] = int2{lane.expert, lane.row};
    }
  }
}

/// The ids of positions from `first` on, one warp's next to each other.
__device__ __forceinline__ void read_ahead(const PartParams& p, uint32_t first, uint32_t end, int64_t* ids) {
#pragma unroll
  for (uint32_t i = 0; i < kIdsAhead; ++i) {
    ids[i] = id_at_position(p, first + i * kLowLatencyThreads + threadIdx.x, end);
  }
}

/// Counts the rows of all positions before `end` in `next`; `ids` are the first ones. Whole block.
__device__ __forceinline__ void count_earlier(const PartParams& p, uint32_t end, int64_t* ids, const RouteShared& s) {
#pragma unroll 1
  for (uint32_t first = 0; first < end; first += kIdsAhead * kLowLatencyThreads) {
#pragma unroll
    for (uint32_t i = 0; i < kIdsAhead; ++i) {
      const RouteId id = check_id(p, first + i * kLowLatencyThreads + threadIdx.x, ids[i], s);
      if (id.counted) {
        atomicAdd(&s.next[id.expert], 1);
      }
    }
    read_ahead(p, first + kIdsAhead * kLowLatencyThreads, end, ids);
  }
}

/// A range of positions.
struct RouteRange {
  uint32_t begin;
  uint32_t end;
};

/// Numbers the positions of a range in order, one per thread and round. A round: every warp counts its experts, a
/// prefix over the warps, every position takes its number. `id` is that of the first round's position, the ids of the
/// others are read a round ahead; `pending` as in scan_round(). Whole block, with the first round cleared.
__device__ inline void number_lanes(const PartParams& p, RouteRange range, int64_t id, int32_t* pending,
                                    const RouteShared& s) {
  const uint32_t experts = p.op.shape.experts;
#pragma unroll 1
  for (uint32_t first = range.begin; first < range.end; first += kLowLatencyThreads) {
    const uint32_t i = first + threadIdx.x;
    const int64_t next_id = id_at_position(p, i + kLowLatencyThreads, range.end);
    const RouteId routed = check_id(p, i, id, s);
    const uint32_t same =
        __match_any_sync(kFullWarp, routed.counted ? routed.expert : 0x80000000u | (threadIdx.x & 31));
    const uint32_t at = threadIdx.x / 32 * experts + (routed.counted ? routed.expert : 0);
    if (routed.counted && (same & lanes_below()) == 0) {
      s.warp_rows[at] = static_cast<uint16_t>(__popc(same));
    }
    __syncthreads();
    const uint32_t left = range.end - first;
    scan_round(experts, left < kLowLatencyThreads ? (left + 31) / 32 : kLowLatencyWarps, pending, s);
    __syncthreads();
    if (i < range.end) {
      const int32_t row = routed.counted ? s.next[routed.expert] + s.warp_rows[at] + __popc(same & lanes_below()) : -1;
      hand_over_lane(p, i, {routed.valid ? static_cast<int32_t>(routed.expert) : -1, row});
    }
    if (first + kLowLatencyThreads < range.end) {
      __syncthreads();
      clear_round(experts, s);
      __syncthreads();
    }
    id = next_id;
  }
}

/// One integer of this rank's row of the count matrix, to every active rank.
__device__ inline void hand_over_count(const PartParams& p, uint32_t column, int32_t value) {
  const OpShape& shape = p.op.shape;
  const uint64_t at = uint64_t{shape.rank} * matrix_row_ints(shape) + column;
#pragma unroll 1
  for (uint32_t j = 0; j < shape.ranks; ++j) {
    if (rank_active(shape, j)) {
      p.peers.views[j].counts[at] = value;
    }
  }
}

/// The four error integers; one thread each.
__device__ inline int32_t error_entry(const PartParams& p, uint32_t word, uint32_t position) {
  uint32_t reason = p.refused_reason;
  int64_t value = 0;
  if (reason == 0 && position != kNoPosition) {
    reason = EXPERTD_REASON_EXPERT_OUT_OF_RANGE;
    value = load_id(p.op.in.topk_idx, p.op.shape.topk_idx_bytes, position);
  }
  const auto bits = static_cast<uint64_t>(value);
  const uint32_t low = word == 1 ? static_cast<uint32_t>(bits) : 0;
  const uint32_t high = word == 2 ? static_cast<uint32_t>(bits >> 32) : 0;
  return static_cast<int32_t>(word == 0 ? reason : low | high);
}

/// This rank's row of the count matrix and the rows of ranks that do not take part. Rows per rank are not counted: rows
/// of low latency are per expert. The last of the routing blocks, which has seen all positions.
__device__ inline void hand_over_counts(const PartParams& p, const int32_t* pending, const RouteShared& s) {
  const OpShape& shape = p.op.shape;
  __syncthreads();  // its own range may have been empty
#pragma unroll
  for (uint32_t c = 0; c < kColumnsPerThread; ++c) {
    const uint32_t e = c * kLowLatencyThreads + threadIdx.x;
    if (e < shape.experts) {
      hand_over_count(p, shape.ranks + e, s.next[e] + pending[c]);
    }
  }
  if (threadIdx.x < shape.ranks) {
    hand_over_count(p, threadIdx.x, 0);
  }
  if (threadIdx.x < kCountRowErrorInts) {
    hand_over_count(p, count_columns(shape) + threadIdx.x, error_entry(p, threadIdx.x, *s.error));
  }
  const uint32_t row = matrix_row_ints(shape);
#pragma unroll 1
  for (uint32_t j = 0; j < shape.ranks; ++j) {
#pragma unroll 1
    for (uint32_t i = threadIdx.x; !rank_active(shape, j) && i < row; i += kLowLatencyThreads) {
      p.op.counts[uint64_t{j} * row + i] = 0;
    }
  }
}

/// The share that one of `blocks` blocks has of routing, up to the fence; false when the part was aborted. The gate is
/// read beside the first ids. Whole block.
__device__ inline bool route_tokens(const PartParams& p, uint32_t blocks, const RouteShared& s) {
  const OpShape& shape = p.op.shape;
  const uint32_t positions = route_positions(p);
  const uint32_t each = (positions + blocks - 1) / blocks;
  const uint32_t begin = blockIdx.x * each < positions ? blockIdx.x * each : positions;
  const RouteRange range{begin, begin + each < positions ? begin + each : positions};
  const uint64_t aborted = ld_relaxed_sys(&p.words.state->aborted_part);
  const int64_t id = id_at_position(p, range.begin + threadIdx.x, range.end);
  int64_t earlier[kIdsAhead];
  read_ahead(p, 0, range.begin, earlier);
#pragma unroll 1
  for (uint32_t e = threadIdx.x; e < shape.experts; e += kLowLatencyThreads) {
    s.next[e] = 0;
  }
  clear_round(shape.experts, s);
  if (threadIdx.x == 0) {
    *s.error = kNoPosition;
  }
  if (__syncthreads_or(aborted == p.words.part ? 1 : 0) != 0) {
    return false;
  }
  if (threadIdx.x < 32) {
    stamp(Stamp::kIdsCounted);
  }
  int32_t pending[kColumnsPerThread] = {};
  count_earlier(p, range.begin, earlier, s);
  number_lanes(p, range, id, pending, s);
  if (blockIdx.x == blocks - 1) {
    hand_over_counts(p, pending, s);
  }
  return true;
}

/// Sums of the plan.
struct PlanSums {
  uint32_t over;  // the first expert with more rows than slots
  uint32_t received;
  uint32_t sent_local;
  uint32_t sent_remote;
};

__device__ inline void add_warp(uint32_t* sum, uint32_t value) {
  const uint32_t all = __reduce_add_sync(kFullWarp, value);
  if ((threadIdx.x & 31) == 0 && all != 0) {
    atomicAdd(sum, all);
  }
}

/// The columns of the matrix, one expert per thread. Whole block.
__device__ inline void sum_experts(const PartParams& p, PlanSums* sums) {
  const OpShape& shape = p.op.shape;
  const uint32_t row = matrix_row_ints(shape);
#pragma unroll 1
  for (uint32_t first = 0; first < shape.experts; first += kLowLatencyThreads) {
    const uint32_t e = first + threadIdx.x;
    uint32_t total = 0;
    uint32_t own = 0;
    for (uint32_t s = 0; e < shape.experts && s < shape.ranks; ++s) {
      const auto rows = static_cast<uint32_t>(p.op.counts[uint64_t{s} * row + shape.ranks + e]);
      total += rows;
      own = s == shape.rank ? rows : own;
    }
    const uint32_t owner = e / shape.local_experts;
    const bool local = e < shape.experts && owner == shape.rank;
    if (e < shape.experts && rank_active(shape, owner) && total > shape.slots_per_expert) {
      atomicMin(&sums->over, e);
    }
    if (local) {
      p.scratch.plan->local_rounded[e % shape.local_experts] = static_cast<int32_t>(total);
    }
    add_warp(&sums->received, local ? total : 0);
    add_warp(&sums->sent_local, local ? own : 0);
    add_warp(&sums->sent_remote, local ? 0 : own);
  }
}

/// Why the operation fails, as plan.cuh words it. One thread; the slow way and not inlined, because it is rare.
__device__ __noinline__ inline void decide_failure(const PartParams& p, uint32_t over) {
  const OpShape& shape = p.op.shape;
  PlanWork* work = p.scratch.plan_work;
#pragma unroll 1
  for (uint32_t j = 0; j < shape.ranks; ++j) {
    work->first_over_slots[j] = -1;
  }
  if (over != kNoPosition) {
    int32_t rows = 0;
    for (uint32_t s = 0; s < shape.ranks; ++s) {
      rows += p.op.counts[uint64_t{s} * matrix_row_ints(shape) + shape.ranks + over];
    }
    work->first_over_slots[over / shape.local_experts] = static_cast<int32_t>(over);
    work->expert_count[over] = rows;
  }
  decide(p, p.op.counts, *work, p.scratch.plan);
}

/// The plan as far as the end of the part reads it, and the caller's counts, ranges and statistics when the operation
/// runs; whether it does. Whole block, behind the exchange.
__device__ inline bool plan_low_latency(const PartParams& p) {
  __shared__ PlanSums sums;
  const OpShape& shape = p.op.shape;
  Plan* plan = p.scratch.plan;
  if (threadIdx.x == 0) {
    sums = {kNoPosition, 0, 0, 0};
  }
  __syncthreads();
  const bool rejects = threadIdx.x < shape.ranks && rank_active(shape, threadIdx.x) &&
                       p.op.counts[uint64_t{threadIdx.x} * matrix_row_ints(shape) + count_columns(shape)] != 0;
  sum_experts(p, &sums);
  const bool rejected = __syncthreads_or(rejects ? 1 : 0) != 0;
  const bool fails = rejected || sums.over != kNoPosition;
  if (threadIdx.x == 0) {
    plan->reason = EXPERTD_REASON_NONE;
    plan->recv_rows = sums.received;
    plan->sent_local_rows = sums.sent_local;
    plan->sent_remote_rows = sums.sent_remote;
    if (fails) {
      decide_failure(p, sums.over);
    }
  }
  if (!fails) {
    store_tables(p, {threadIdx.x, kLowLatencyThreads});
  }
  return !fails;
}

/// Has the caller's statistics, which are added to, in the second-level cache behind the exchange. Whole block.
__device__ inline void fetch_stats(const PartParams& p) {
  constexpr uint32_t kLine = 128 / sizeof(int32_t);
  const uint32_t e = threadIdx.x * kLine;
  if (p.op.out.stats != nullptr && e < p.op.shape.local_experts) {
    prefetch(p.op.out.stats + e);
  }
}

/// The handle's matrix. No other block needs it, nor does the caller. Whole block, behind the exchange.
__device__ inline void keep_matrix(const PartParams& p) {
  const OpShape& shape = p.op.shape;
  const uint32_t ints = p.refused_reason == 0 ? shape.ranks * matrix_row_ints(shape) : 0;
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < ints; i += kLowLatencyThreads) {
    p.op.routing.counts[i] =
        i == handle_alignment_at(shape) ? static_cast<int32_t>(shape.expert_alignment) : p.op.counts[i];
  }
}

}  // namespace expertd::kernels::cuda
