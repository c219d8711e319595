// SPDX-License-Identifier: Apache-2.0
// Routing inside a link kernel, by every cluster of blocks for itself: numbers this rank's rows at every rank in token
// order and counts what the count matrix wants. Device code only, for sm_90; included by the kernel's .cu file; no
// state. Definitions: daemon/kernels/README.md.
#pragma once

#include <cooperative_groups.h>

#include "daemon/kernels/cuda/exchange_steps.cuh"
#include "proto/abi/expertd_reason.h"

namespace expertd::kernels::cuda {

inline constexpr uint32_t kMostClusterBlocks = 8;  // the most that every sm_90 runs together
inline constexpr uint32_t kLeastClusterBlocks = 4;
inline constexpr uint32_t kMostSpanTokens = base::kMaxTokens / kLeastClusterBlocks;
/// Warps that a block's tokens fill, in rounds of one token per thread.
inline constexpr uint32_t kMostTokenWarps = kMostSpanTokens / 32 + 32;
inline constexpr uint32_t kNoError = 0xffffffffu;

/// A block's routing in shared memory, which the rows that move take over afterwards.
struct RouteShared {
  int32_t experts[base::kMaxExperts];                          // rows per expert; in the first block those of all
  int32_t block_rows[kMostClusterBlocks][base::kMaxGpuRanks];  // of every block at every rank
  uint32_t block_errors[kMostClusterBlocks];                   // of every block
  uint16_t before[kMostTokenWarps][base::kMaxGpuRanks];        // rows of the warp at the rank; then of those before it
  uint16_t bits[kMostTokenWarps * 32];                         // ranks that the token goes to
  uint32_t error;                                              // first bad (token, lane)
};
static_assert(base::kMaxGpuRanks <= 16 && kMostSpanTokens <= 0xffff, "ranks and rows of a block fit 16 bits");
static_assert(sizeof(RouteShared) <= kBulkSharedBytes);

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

inline constexpr uint32_t kIdsAtOnce = 8;

/// The id of a lane; -1 behind the token's top-k and without ids.
__device__ inline int64_t id_of(const PartParams& p, uint32_t token, uint32_t k) {
  const bool given = k < p.op.shape.top_k && p.op.in.topk_idx != nullptr;
  return given ? load_id(p.op.in.topk_idx, p.op.shape.topk_idx_bytes, uint64_t{token} * p.op.shape.top_k + k) : -1;
}

/// Counts the expert of one lane and returns the bit of its rank, 0 for none. `keeps`: its id goes into the handle.
__device__ inline uint32_t take_id(const PartParams& p, uint32_t token, uint32_t k, int64_t id, bool keeps,
                                   RouteShared* s) {
  const OpShape& shape = p.op.shape;
  const bool valid = id >= 0 && id < static_cast<int64_t>(shape.experts);
  if (!valid && id != -1) {
    atomicMin(&s->error, token * shape.top_k + k);
  }
  if (keeps) {
    const uint64_t at = uint64_t{token} * p.table_top_k + k;
    p.op.routing.topk[at] = valid ? static_cast<int32_t>(id) : -1;
    p.op.routing.token_expert[at] = -1;
  }
  const uint32_t owner = valid ? static_cast<uint32_t>(id) / shape.local_experts : 0;
  if (!valid || !rank_active(shape, owner)) {
    return 0;
  }
  atomicAdd(&s->experts[id], 1);
  return 1u << owner;
}

/// The ranks of a token as bits. Ids are loaded several at a time, so that their latencies overlap.
__device__ inline uint32_t take_token(const PartParams& p, uint32_t token, bool keeps, RouteShared* s) {
  const OpShape& shape = p.op.shape;
  uint32_t bits = 0;
  for (uint32_t first = 0; first < p.table_top_k; first += kIdsAtOnce) {
    int64_t ids[kIdsAtOnce];
#pragma unroll
    for (uint32_t i = 0; i < kIdsAtOnce; ++i) {
      ids[i] = id_of(p, token, first + i);
    }
#pragma unroll
    for (uint32_t i = 0; i < kIdsAtOnce; ++i) {
      bits |= first + i < p.table_top_k ? take_id(p, token, first + i, ids[i], keeps, s) : 0u;
    }
  }
  if (p.op.in.token_rank_mask != nullptr) {
    bits = 0;
    for (uint32_t j = 0; j < shape.ranks; ++j) {
      bits |= p.op.in.token_rank_mask[uint64_t{token} * shape.ranks + j] != 0 ? 1u << j : 0u;
    }
    bits &= static_cast<uint32_t>(shape.active_ranks);
  }
  return bits;
}

/// First pass: every token's ranks, every warp's rows at each rank. Whole block.
__device__ inline void count_block(const PartParams& p, const TokenSpan& span, bool keeps, RouteShared* s) {
  const OpShape& shape = p.op.shape;
  const uint32_t warp = threadIdx.x / 32;
  for (uint32_t round = 0; round < span.rounds; ++round) {
    const uint32_t i = round * blockDim.x + threadIdx.x;
    const uint32_t bits = i < span.tokens ? take_token(p, span.first + i, keeps, s) : 0;
    s->bits[i] = static_cast<uint16_t>(bits);
    for (uint32_t j = 0; j < shape.ranks; ++j) {
      const uint32_t ballot = __ballot_sync(kFullWarp, (bits >> j) & 1u);
      if ((threadIdx.x & 31) == 0) {
        s->before[round * (blockDim.x / 32) + warp][j] = static_cast<uint16_t>(__popc(ballot));
      }
    }
  }
}

/// Turns the warps' rows into those of the warps before them; thread j takes rank j. Returns the block's rows there.
__device__ inline int32_t scan_warps(const TokenSpan& span, uint32_t rank, RouteShared* s) {
  int32_t running = 0;
  for (uint32_t i = 0; i < span.rounds * (blockDim.x / 32); ++i) {
    const int32_t rows = s->before[i][rank];
    s->before[i][rank] = static_cast<uint16_t>(running);
    running += rows;
  }
  return running;
}

/// Second pass: the row of each token at each rank, relative to this rank's first one there. Whole block.
__device__ inline void number_block(const PartParams& p, const TokenSpan& span, uint32_t block, const RouteShared& s) {
  const OpShape& shape = p.op.shape;
  const uint32_t warp = threadIdx.x / 32;
  for (uint32_t j = 0; j < shape.ranks; ++j) {
    int32_t base = 0;
    for (uint32_t b = 0; b < block; ++b) {
      base += s.block_rows[b][j];
    }
    for (uint32_t round = 0; round < span.rounds; ++round) {
      const uint32_t i = round * blockDim.x + threadIdx.x;
      const uint32_t goes = (s.bits[i] >> j) & 1u;
      const uint32_t ballot = __ballot_sync(kFullWarp, goes);
      const int32_t row = base + s.before[round * (blockDim.x / 32) + warp][j] + __popc(ballot & lanes_below());
      if (i < span.tokens) {
        p.scratch.rows[uint64_t{span.first + i} * shape.ranks + j] = goes != 0 ? row : -1;
      }
    }
  }
}

/// One integer of this rank's row of the count matrix: rows per rank, rows per expert, the error.
__device__ inline int32_t count_entry(const PartParams& p, uint32_t column, const RouteShared& s) {
  const OpShape& shape = p.op.shape;
  if (column < shape.ranks) {
    int32_t rows = 0;
    for (uint32_t b = 0; b < kMostClusterBlocks; ++b) {
      rows += s.block_rows[b][column];  // zero for blocks that the cluster does not have
    }
    return rows;
  }
  if (column < count_columns(shape)) {
    return s.experts[column - shape.ranks];
  }
  uint32_t reason = p.refused_reason;
  int64_t value = 0;
  uint32_t error = kNoError;
  for (uint32_t b = 0; b < kMostClusterBlocks; ++b) {
    error = min(error, s.block_errors[b]);
  }
  if (reason == 0 && error != kNoError) {
    reason = EXPERTD_REASON_EXPERT_OUT_OF_RANGE;
    value = load_id(p.op.in.topk_idx, shape.topk_idx_bytes, error);
  }
  const uint32_t word = column - count_columns(shape);
  const auto bits = static_cast<uint64_t>(value);
  return static_cast<int32_t>(
      word == 0 ? reason
                : (word == 1 ? static_cast<uint32_t>(bits) : (word == 2 ? static_cast<uint32_t>(bits >> 32) : 0u)));
}

/// This rank's row of the matrix into every active rank's copy, and zeroes for inactive ranks in the own one. One
/// block.
__device__ inline void hand_over_counts(const PartParams& p, const RouteShared& s) {
  const OpShape& shape = p.op.shape;
  const uint32_t row = matrix_row_ints(shape);
  for (uint32_t column = threadIdx.x; column < row; column += blockDim.x) {
    const int32_t value = count_entry(p, column, s);
    for (uint32_t j = 0; j < shape.ranks; ++j) {
      if (rank_active(shape, j)) {
        p.peers.views[j].counts[uint64_t{shape.rank} * row + column] = value;
      } else {
        p.op.counts[uint64_t{j} * row + column] = 0;
      }
    }
  }
}

__device__ inline void clear_counts(const OpShape& shape, RouteShared* s) {
  for (uint32_t e = threadIdx.x; e < shape.experts; e += blockDim.x) {
    s->experts[e] = 0;
  }
  for (uint32_t i = threadIdx.x; i < kMostClusterBlocks * base::kMaxGpuRanks; i += blockDim.x) {
    s->block_rows[i / base::kMaxGpuRanks][i % base::kMaxGpuRanks] = 0;
  }
  if (threadIdx.x < kMostClusterBlocks) {
    s->block_errors[threadIdx.x] = kNoError;
  }
  if (threadIdx.x == 0) {
    s->error = kNoError;
  }
}

/// Routes the tokens of this cluster's blocks, which are all of the rank's; the first cluster also keeps the ids and
/// hands the count row over. Afterwards the block's own rows stand in scratch and its shared memory is its own again.
/// Whole block; a gated one meets the others all the same, because they may have looked before the part was aborted.
__device__ inline void route_cluster(const PartParams& p, const TokenSpan& whole, bool gated, RouteShared* s) {
  const auto cluster = cooperative_groups::this_cluster();
  const OpShape& shape = p.op.shape;
  const uint32_t block = cluster.block_rank();
  const bool keeps = blockIdx.x < cluster.num_blocks();
  TokenSpan span = whole;
  if (gated || p.refused_reason != 0) {
    span.tokens = span.rounds = 0;
  }
  clear_counts(shape, s);
  __syncthreads();
  count_block(p, span, keeps, s);
  __syncthreads();
  cluster.sync();  // every block has cleared what others write
  if (threadIdx.x < shape.ranks) {
    const int32_t rows = scan_warps(span, threadIdx.x, s);
    for (uint32_t b = 0; b < cluster.num_blocks(); ++b) {
      cluster.map_shared_rank(s, b)->block_rows[block][threadIdx.x] = rows;
    }
  } else if (threadIdx.x == 32) {
    cluster.map_shared_rank(s, 0)->block_errors[block] = s->error;
  }
  if (keeps && block != 0) {
    RouteShared* first = cluster.map_shared_rank(s, 0);
    for (uint32_t e = threadIdx.x; e < shape.experts; e += blockDim.x) {
      if (s->experts[e] != 0) {
        atomicAdd(&first->experts[e], s->experts[e]);
      }
    }
  }
  cluster.sync();
  if (keeps && block == 0 && !gated) {
    hand_over_counts(p, *s);
    __syncthreads();
    if (threadIdx.x < 32) {
      announce(p, SignalStep::kRouted);
    }
  }
  number_block(p, span, block, *s);
  fence_copy_unit();
  __syncthreads();
}

#endif

}  // namespace expertd::kernels::cuda
