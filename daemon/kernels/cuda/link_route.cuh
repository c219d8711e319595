// SPDX-License-Identifier: Apache-2.0
// Routing inside a link kernel, by every cluster of blocks for itself: numbers this rank's rows at every rank in token
// order. What the others must know to place their rows (rows per rank, errors) is handed over at once; the rows per
// expert, which only tables and reports want, are counted by the clerks while rows move. Device code only, for sm_90;
// included by the kernel's .cu file; no state. Definitions: daemon/kernels/README.md.
//
// Shared memory of other blocks is written twice, and exists only while its block runs. The barrier of the cluster says
// when, in three phases, each of which all threads of its blocks enter. (1) Every cluster: from the kernel's first
// instructions to tell_cluster(), so that every block has started; each has routed meanwhile, so nobody waits. (2)
// Every cluster: behind tell_cluster(), for what it told. (3) The first cluster, past the first exchange: clerks arrive
// when they have added to the first block, the other threads at once, because they reach into no block; all wait before
// they end. Nothing is written into another block behind that. The kernel behind the stream's wait has no (1), and for
// (2) meets in the first cluster alone, so that all counts are cleared. One with the routing of a handle has none.
#pragma once

#include <cooperative_groups.h>

#include "daemon/kernels/cuda/link_rows.cuh"
#include "proto/abi/expertd_reason.h"

namespace expertd::kernels::cuda {

inline constexpr uint32_t kMostClusterBlocks = 8;  // the most that every sm_90 runs together
inline constexpr uint32_t kLeastClusterBlocks = 4;
inline constexpr uint32_t kMostSpanTokens = base::kMaxTokens / kLeastClusterBlocks;
/// Warps that a block's tokens fill, in rounds of one token per thread.
inline constexpr uint32_t kMostTokenWarps = kMostSpanTokens / 32 + 32;
inline constexpr uint32_t kNoError = 0xffffffffu;
inline constexpr uint32_t kIdsAtOnce = 8;

/// A block's routing in shared memory, which the rows that move take over afterwards: loads of rows that began before
/// would hold up the ids by 2 us.
struct TokenRouting {
  uint16_t before[kMostTokenWarps][base::kMaxGpuRanks];  // rows of the warp at the rank; then of those before it
  uint16_t bits[kMostTokenWarps * 32];                   // ranks that the token goes to
};
static_assert(base::kMaxGpuRanks <= 16 && kMostSpanTokens <= 0xffff, "ranks and rows of a block fit 16 bits");
static_assert(sizeof(TokenRouting) <= kBulkSharedBytes);

/// What the blocks of a cluster tell each other, beside the rows that move.
struct ClusterShared {
  int32_t block_rows[kMostClusterBlocks][base::kMaxGpuRanks];  // of every block at every rank
  uint32_t block_errors[kMostClusterBlocks];                   // first bad (token, lane) of every block
  uint32_t error;                                              // of this block
  uint32_t gated;                                              // this block found the part aborted before it began
  int32_t experts[base::kMaxExperts];  // rows per expert: of this block, in the first one of all
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

/// The tokens of one block of a cluster, in rounds of one token per thread.
struct TokenSpan {
  uint32_t first;
  uint32_t tokens;
  uint32_t rounds;
};

__device__ inline TokenSpan span_of(const OpShape& shape, uint32_t block, uint32_t blocks) {
  const uint32_t per_block = (shape.tokens + blocks - 1) / blocks;
  const uint32_t first = min(block * per_block, shape.tokens);
  const uint32_t tokens = min(per_block, shape.tokens - first);
  return {first, tokens, (tokens + blockDim.x - 1) / blockDim.x};
}

/// The id of a lane; -1 behind the token's top-k and without ids.
__device__ inline int64_t id_of(const PartParams& p, uint32_t token, uint32_t k) {
  const bool given = k < p.op.shape.top_k && p.op.in.topk_idx != nullptr;
  return given ? load_id(p.op.in.topk_idx, p.op.shape.topk_idx_bytes, uint64_t{token} * p.op.shape.top_k + k) : -1;
}

/// The next ids of a token, several at once so that their latencies overlap; -1 behind its top-k.
__device__ inline void load_ids(const PartParams& p, uint32_t token, uint32_t first, int64_t* ids) {
  const OpShape& shape = p.op.shape;
  const auto* row = static_cast<const char*>(p.op.in.topk_idx) + uint64_t{token} * shape.top_k * shape.topk_idx_bytes;
  if (shape.top_k == kIdsAtOnce && shape.topk_idx_bytes == 8 && reinterpret_cast<uintptr_t>(row) % 16 == 0 &&
      p.op.in.topk_idx != nullptr) {
#pragma unroll
    for (uint32_t i = 0; i < kIdsAtOnce / 2; ++i) {
      const auto pair = reinterpret_cast<const longlong2*>(row)[i];
      ids[2 * i] = pair.x;
      ids[2 * i + 1] = pair.y;
    }
    return;
  }
#pragma unroll
  for (uint32_t i = 0; i < kIdsAtOnce; ++i) {
    ids[i] = id_of(p, token, first + i);
  }
}

/// The ranks of a token as bits.
__device__ inline uint32_t take_token(const PartParams& p, uint32_t token, ClusterShared* s) {
  const OpShape& shape = p.op.shape;
  uint32_t bits = 0;
  for (uint32_t first = 0; first < shape.top_k; first += kIdsAtOnce) {
    int64_t ids[kIdsAtOnce];
    load_ids(p, token, first, ids);
#pragma unroll
    for (uint32_t i = 0; i < kIdsAtOnce; ++i) {
      if (ids[i] >= 0 && ids[i] < static_cast<int64_t>(shape.experts)) {
        bits |= 1u << (static_cast<uint32_t>(ids[i]) / shape.local_experts);
      } else if (ids[i] != -1) {
        atomicMin(&s->error, token * shape.top_k + first + i);
      }
    }
  }
  if (p.op.in.token_rank_mask != nullptr) {
    bits = 0;
    for (uint32_t j = 0; j < shape.ranks; ++j) {
      bits |= p.op.in.token_rank_mask[uint64_t{token} * shape.ranks + j] != 0 ? 1u << j : 0u;
    }
  }
  return bits & static_cast<uint32_t>(active_bits(shape));
}

/// First pass: every token's ranks, every warp's rows at each rank. Whole block.
__device__ inline void count_block(const PartParams& p, const TokenSpan& span, TokenRouting* s, ClusterShared* shared) {
  const uint32_t warps = blockDim.x / 32;
  for (uint32_t round = 0; round < span.rounds; ++round) {
    const uint32_t i = round * blockDim.x + threadIdx.x;
    const uint32_t bits = i < span.tokens ? take_token(p, span.first + i, shared) : 0;
    s->bits[i] = static_cast<uint16_t>(bits);
    for (uint32_t j = 0; j < p.op.shape.ranks; ++j) {
      const uint32_t ballot = __ballot_sync(kFullWarp, (bits >> j) & 1u);
      if ((threadIdx.x & 31) == 0) {
        s->before[round * warps + threadIdx.x / 32][j] = static_cast<uint16_t>(__popc(ballot));
      }
    }
  }
}

/// Turns the warps' rows at one rank into those of the warps before them; returns the block's rows there. Whole warp.
__device__ inline int32_t scan_warps(uint32_t entries, uint32_t rank, TokenRouting* s) {
  const uint32_t lane = threadIdx.x & 31;
  int32_t running = 0;
  for (uint32_t first = 0; first < entries; first += 32) {
    const int32_t rows = first + lane < entries ? s->before[first + lane][rank] : 0;
    int32_t inclusive = rows;
    for (uint32_t step = 1; step < 32; step *= 2) {
      const int32_t other = __shfl_up_sync(kFullWarp, inclusive, step);
      inclusive += lane >= step ? other : 0;
    }
    if (first + lane < entries) {
      s->before[first + lane][rank] = static_cast<uint16_t>(running + inclusive - rows);
    }
    running += __shfl_sync(kFullWarp, inclusive, 31);
  }
  return running;
}

/// Tells every block of the cluster this block's rows at each rank and its error: a warp per rank, a lane per block.
/// All of them have started.
__device__ inline void tell_cluster(const PartParams& p, const TokenSpan& span, TokenRouting* s,
                                    ClusterShared* shared) {
  const auto cluster = cooperative_groups::this_cluster();
  const uint32_t lane = threadIdx.x & 31;
  const uint32_t warps = blockDim.x / 32;
  for (uint32_t j = threadIdx.x / 32; j < p.op.shape.ranks; j += warps) {
    const int32_t rows = scan_warps(span.rounds * warps, j, s);
    if (lane < cluster.num_blocks()) {
      cluster.map_shared_rank(shared, lane)->block_rows[cluster.block_rank()][j] = rows;
    }
  }
  if (threadIdx.x < cluster.num_blocks()) {
    cluster.map_shared_rank(shared, threadIdx.x)->block_errors[cluster.block_rank()] = shared->error;
  }
}

/// Second pass: the row of each token at each rank, relative to this rank's first one there. Whole block.
__device__ inline void number_block(const PartParams& p, const TokenSpan& span, uint32_t block, const TokenRouting& s,
                                    const ClusterShared& shared) {
  const OpShape& shape = p.op.shape;
  const uint32_t warps = blockDim.x / 32;
  for (uint32_t j = 0; j < shape.ranks; ++j) {
    int32_t base = 0;
    for (uint32_t b = 0; b < block; ++b) {
      base += shared.block_rows[b][j];
    }
    for (uint32_t round = 0; round < span.rounds; ++round) {
      const uint32_t i = round * blockDim.x + threadIdx.x;
      const uint32_t goes = (s.bits[i] >> j) & 1u;
      const uint32_t ballot = __ballot_sync(kFullWarp, goes);
      const int32_t row = base + s.before[round * warps + threadIdx.x / 32][j] + __popc(ballot & lanes_below());
      if (i < span.tokens) {
        p.scratch.rows[uint64_t{span.first + i} * shape.ranks + j] = goes != 0 ? row : -1;
      }
    }
  }
}

/// The error integers of this rank's count row.
struct CountError {
  uint32_t reason;
  uint64_t value;
};

__device__ inline CountError count_error(const PartParams& p, uint32_t blocks, const ClusterShared& shared) {
  uint32_t first = kNoError;
  for (uint32_t b = 0; b < blocks; ++b) {
    first = min(first, shared.block_errors[b]);
  }
  if (p.refused_reason != 0 || first == kNoError) {
    return {p.refused_reason, 0};
  }
  const int64_t id = load_id(p.op.in.topk_idx, p.op.shape.topk_idx_bytes, first);
  return {EXPERTD_REASON_EXPERT_OUT_OF_RANGE, static_cast<uint64_t>(id)};
}

/// This rank's rows at rank j.
__device__ inline int32_t own_rows(uint32_t j, uint32_t blocks, const ClusterShared& shared) {
  int32_t rows = 0;
  for (uint32_t b = 0; b < blocks; ++b) {
    rows += shared.block_rows[b][j];
  }
  return rows;
}

/// Rows per rank as words of their own (link_rows.cuh) to the lane's rank. One whole warp.
__device__ inline void hand_over_rows(const PartParams& p, uint32_t blocks, const ClusterShared& shared) {
  const OpShape& shape = p.op.shape;
  const uint32_t lane = threadIdx.x & 31;
  bool rejects = p.refused_reason != 0;
  for (uint32_t b = 0; b < blocks; ++b) {
    rejects = rejects || shared.block_errors[b] != kNoError;
  }
  const auto rows = static_cast<uint32_t>(lane < shape.ranks ? own_rows(lane, blocks, shared) : 0);
  for (uint32_t j = 0; j < shape.ranks; ++j) {
    const uint32_t there = __shfl_sync(kFullWarp, rows, static_cast<int>(j));
    if (lane < shape.ranks && rank_active(shape, lane)) {
      st_relaxed_sys(&p.peers.pages[lane]->rows[shape.rank][j], row_word(p, there, rejects));
    }
  }
}

/// Rows per rank and error into the lane's rank's matrix, and `routed` behind them. One whole warp of the first block,
/// behind route_cluster().
__device__ inline void hand_over_matrix(const PartParams& p, uint32_t blocks, const ClusterShared& shared) {
  const OpShape& shape = p.op.shape;
  const uint32_t lane = threadIdx.x & 31;
  const uint32_t row = matrix_row_ints(shape);
  if (lane >= shape.ranks) {
    return;
  }
  if (!rank_active(shape, lane)) {
    for (uint32_t column = 0; column < row; ++column) {
      p.op.counts[uint64_t{lane} * row + column] = 0;
    }
    return;
  }
  int32_t* counts = p.peers.views[lane].counts + uint64_t{shape.rank} * row;
  for (uint32_t j = 0; j < shape.ranks; ++j) {
    counts[j] = own_rows(j, blocks, shared);
  }
  const CountError error = count_error(p, blocks, shared);
  counts += count_columns(shape);
  counts[0] = static_cast<int32_t>(error.reason);
  counts[1] = static_cast<int32_t>(error.value);
  counts[2] = static_cast<int32_t>(error.value >> 32);
  counts[3] = 0;
  announce_to_lane(p, SignalStep::kRouted);
}

/// Routes the tokens of this cluster's blocks, which are all of the rank's; one warp of the first block of all hands
/// the rows over. Afterwards the block's own rows stand in scratch and its shared memory is free for rows. The gate is
/// read beside the first ids; whether it was closed. Whole block, which has arrived at the cluster's barrier; a gated
/// one meets the others all the same, because they may have looked before the part was aborted.
__device__ inline bool route_cluster(const PartParams& p, const TokenSpan& whole, TokenRouting* s,
                                     ClusterShared* shared) {
  const auto cluster = cooperative_groups::this_cluster();
  TokenSpan span = whole;
  if (p.refused_reason != 0) {
    span.tokens = span.rounds = 0;
  }
  uint64_t begin_ns = 0;
  uint64_t aborted = 0;
  if (threadIdx.x == 0) {
    begin_ns = global_timer_ns();
    aborted = ld_relaxed_sys(&p.words.state->aborted_part);
    shared->error = kNoError;
  }
  __syncthreads();
  count_block(p, span, s, shared);
  if (threadIdx.x == 0) {
    shared->gated = aborted == p.words.part ? 1 : 0;
    if (blockIdx.x == 0 && aborted != p.words.part) {
      mark_start_at(p, begin_ns);
    }
  }
  __syncthreads();
  const bool gated = shared->gated != 0;
  if (threadIdx.x < 32) {
    stamp(Stamp::kIdsCounted);
  }
  cluster_wait();  // their shared memory is there; they began when this block did, so they came long ago
  tell_cluster(p, span, s, shared);
  cluster.sync();
  if (threadIdx.x < 32) {
    stamp(Stamp::kClusterMet);
  }
  if (blockIdx.x == 0 && threadIdx.x < 32 && !gated) {
    hand_over_rows(p, cluster.num_blocks(), *shared);
    stamp(Stamp::kHandedOver);
  }
  number_block(p, span, cluster.block_rank(), *s, *shared);
  fence_copy_unit();
  __syncthreads();
  if (threadIdx.x < 32) {
    stamp(Stamp::kRouted);
  }
  return gated;
}

/// The clerks' share of routing, in the blocks of the first cluster while rows move: the ids into the handle and the
/// rows per expert, which the first block's clerk hands over, announces as `counted` and waits for from the others.
/// There kRegular when the whole matrix is there, kAborted when the part was aborted meanwhile; kNot in the other
/// blocks. One whole warp per block, which clear_experts() has made ready; the block's other warps arrive at the
/// cluster's barrier themselves.
__device__ inline Passage count_experts(const PartParams& p, const TokenSpan& span, bool works, ClusterShared* shared) {
  const auto cluster = cooperative_groups::this_cluster();
  const OpShape& shape = p.op.shape;
  const uint32_t lane = threadIdx.x & 31;
  const uint32_t lanes = p.refused_reason != 0 ? 0 : span.tokens * p.table_top_k;
  for (uint32_t first = lane; first < lanes; first += 32 * kIdsAtOnce) {
    int64_t ids[kIdsAtOnce];
#pragma unroll
    for (uint32_t i = 0; i < kIdsAtOnce; ++i) {
      const uint32_t at = first + i * 32;
      ids[i] = at < lanes ? id_of(p, span.first + at / p.table_top_k, at % p.table_top_k) : -1;
    }
#pragma unroll
    for (uint32_t i = 0; i < kIdsAtOnce; ++i) {
      const uint32_t at = first + i * 32;
      const bool valid = ids[i] >= 0 && ids[i] < static_cast<int64_t>(shape.experts);
      if (at < lanes) {
        p.op.routing.topk[uint64_t{span.first} * p.table_top_k + at] = valid ? static_cast<int32_t>(ids[i]) : -1;
        p.op.routing.token_expert[uint64_t{span.first} * p.table_top_k + at] = -1;
      }
      if (valid && rank_active(shape, static_cast<uint32_t>(ids[i]) / shape.local_experts)) {
        atomicAdd(&shared->experts[ids[i]], 1);
      }
    }
  }
  __syncwarp();
  ClusterShared* all = cluster.map_shared_rank(shared, 0);
  for (uint32_t e = lane; cluster.block_rank() != 0 && e < shape.experts; e += 32) {
    if (shared->experts[e] != 0) {
      atomicAdd(&all->experts[e], shared->experts[e]);
    }
  }
  cluster_arrive();
  cluster_wait();  // all clerks have added
  if (cluster.block_rank() != 0) {
    return Passage::kNot;
  }
  if (!works) {
    return Passage::kAborted;
  }
  const uint32_t row = matrix_row_ints(shape);
  for (uint32_t j = 0; j < shape.ranks; ++j) {
    for (uint32_t e = lane; rank_active(shape, j) && e < shape.experts; e += 32) {
      p.peers.views[j].counts[uint64_t{shape.rank} * row + shape.ranks + e] = shared->experts[e];
    }
  }
  __syncwarp();
  if (lane < shape.ranks && rank_active(shape, lane)) {
    st_release_sys(&p.peers.pages[lane]->counted[shape.rank], p.words.group_op);
  }
  // Unbounded but for an abort: who announced `routed` counts without waiting for anybody.
  return await_words(p, p.peers.pages[shape.rank]->counted, INT64_MAX);
}

/// Makes a block of the first cluster ready for its clerk. Whole block, before the cluster meets.
__device__ inline void clear_experts(const OpShape& shape, ClusterShared* shared) {
  for (uint32_t e = threadIdx.x; e < shape.experts; e += blockDim.x) {
    shared->experts[e] = 0;
  }
}

#endif

}  // namespace expertd::kernels::cuda
