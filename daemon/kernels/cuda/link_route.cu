// SPDX-License-Identifier: Apache-2.0
// The route step of HT dispatch on sm_90, in one kernel: numbers this rank's rows at every rank in token order, hands
// the count row to every active rank and announces both. Definitions: daemon/kernels/README.md.
#include <cooperative_groups.h>

#include "daemon/kernels/cuda/exchange_steps.cuh"
#include "proto/abi/expertd_reason.h"

namespace expertd::kernels::cuda {
namespace {

constexpr uint32_t kRouteBlocks = 8;  // of one cluster: the most that every sm_90 runs together
constexpr uint32_t kRouteThreads = 512;
constexpr uint32_t kRouteWarps = kRouteThreads / 32;
constexpr uint32_t kMostRounds = base::kMaxTokens / (kRouteBlocks * kRouteThreads);
constexpr uint32_t kNoError = 0xffffffffu;
static_assert(kMostRounds * kRouteBlocks * kRouteThreads == base::kMaxTokens);

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

namespace cg = cooperative_groups;

struct RouteShared {
  int32_t experts[base::kMaxExperts];                    // rows per expert; in the first block those of all
  int32_t block_rows[kRouteBlocks][base::kMaxGpuRanks];  // of every block at every rank
  int32_t before[kMostRounds * kRouteWarps]
                [base::kMaxGpuRanks];          // rows of the warp at the rank; then of those before it
  uint16_t bits[kMostRounds * kRouteThreads];  // ranks that the token goes to
  uint32_t error;                              // first bad (token, lane); in the first block that of all
};
static_assert(base::kMaxGpuRanks <= 16, "a token's ranks fit 16 bits");

/// The tokens of one block, in rounds of one token per thread.
struct RouteSpan {
  uint32_t first;
  uint32_t tokens;
  uint32_t rounds;
};

__device__ RouteSpan span_of(const OpShape& shape, uint32_t block) {
  const uint32_t per_block = (shape.tokens + kRouteBlocks - 1) / kRouteBlocks;
  const uint32_t first = min(block * per_block, shape.tokens);
  const uint32_t tokens = min(per_block, shape.tokens - first);
  return {first, tokens, (tokens + kRouteThreads - 1) / kRouteThreads};
}

constexpr uint32_t kIdsAtOnce = 8;

/// The id of a lane; -1 behind the token's top-k and without ids.
__device__ int64_t id_of(const PartParams& p, uint32_t token, uint32_t k) {
  const bool given = k < p.op.shape.top_k && p.op.in.topk_idx != nullptr;
  return given ? load_id(p.op.in.topk_idx, p.op.shape.topk_idx_bytes, uint64_t{token} * p.op.shape.top_k + k) : -1;
}

/// Counts the expert of one lane, keeps its id in the handle and returns the bit of its rank, 0 for none.
__device__ uint32_t take_id(const PartParams& p, uint32_t token, uint32_t k, int64_t id, RouteShared* s) {
  const OpShape& shape = p.op.shape;
  const bool valid = id >= 0 && id < static_cast<int64_t>(shape.experts);
  if (!valid && id != -1) {
    atomicMin(&s->error, token * shape.top_k + k);
  }
  const uint64_t at = uint64_t{token} * p.table_top_k + k;
  p.op.routing.topk[at] = valid ? static_cast<int32_t>(id) : -1;
  p.op.routing.token_expert[at] = -1;
  const uint32_t owner = valid ? static_cast<uint32_t>(id) / shape.local_experts : 0;
  if (!valid || !rank_active(shape, owner)) {
    return 0;
  }
  atomicAdd(&s->experts[id], 1);
  return 1u << owner;
}

/// The ranks of a token as bits. Ids are loaded several at a time, so that their latencies overlap.
__device__ uint32_t take_token(const PartParams& p, uint32_t token, RouteShared* s) {
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
      bits |= first + i < p.table_top_k ? take_id(p, token, first + i, ids[i], s) : 0u;
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
__device__ void count_block(const PartParams& p, const RouteSpan& span, RouteShared* s) {
  const OpShape& shape = p.op.shape;
  const uint32_t warp = threadIdx.x / 32;
  for (uint32_t round = 0; round < span.rounds; ++round) {
    const uint32_t i = round * kRouteThreads + threadIdx.x;
    const uint32_t bits = i < span.tokens ? take_token(p, span.first + i, s) : 0;
    s->bits[i] = static_cast<uint16_t>(bits);
    for (uint32_t j = 0; j < shape.ranks; ++j) {
      const uint32_t ballot = __ballot_sync(kFullWarp, (bits >> j) & 1u);
      if ((threadIdx.x & 31) == 0) {
        s->before[round * kRouteWarps + warp][j] = __popc(ballot);
      }
    }
  }
}

/// Turns the warps' rows into those of the warps before them; thread j takes rank j. Returns the block's rows there.
__device__ int32_t scan_warps(const RouteSpan& span, uint32_t rank, RouteShared* s) {
  int32_t running = 0;
  for (uint32_t i = 0; i < span.rounds * kRouteWarps; ++i) {
    const int32_t rows = s->before[i][rank];
    s->before[i][rank] = running;
    running += rows;
  }
  return running;
}

/// Second pass: the row of each token at each rank, relative to this rank's first one there. Whole block.
__device__ void number_block(const PartParams& p, const RouteSpan& span, uint32_t block, const RouteShared& s) {
  const OpShape& shape = p.op.shape;
  const uint32_t warp = threadIdx.x / 32;
  for (uint32_t j = 0; j < shape.ranks; ++j) {
    int32_t base = 0;
    for (uint32_t b = 0; b < block; ++b) {
      base += s.block_rows[b][j];
    }
    for (uint32_t round = 0; round < span.rounds; ++round) {
      const uint32_t i = round * kRouteThreads + threadIdx.x;
      const uint32_t goes = (s.bits[i] >> j) & 1u;
      const uint32_t ballot = __ballot_sync(kFullWarp, goes);
      const int32_t row = base + s.before[round * kRouteWarps + warp][j] + __popc(ballot & lanes_below());
      if (i < span.tokens) {
        p.scratch.rows[uint64_t{span.first + i} * shape.ranks + j] = goes != 0 ? row : -1;
      }
    }
  }
}

/// One integer of this rank's row of the count matrix: rows per rank, rows per expert, the error.
__device__ int32_t count_entry(const PartParams& p, uint32_t column, const RouteShared& s) {
  const OpShape& shape = p.op.shape;
  if (column < shape.ranks) {
    int32_t rows = 0;
    for (uint32_t b = 0; b < kRouteBlocks; ++b) {
      rows += s.block_rows[b][column];
    }
    return rows;
  }
  if (column < count_columns(shape)) {
    return s.experts[column - shape.ranks];
  }
  uint32_t reason = p.refused_reason;
  int64_t value = 0;
  if (reason == 0 && s.error != kNoError) {
    reason = EXPERTD_REASON_EXPERT_OUT_OF_RANGE;
    value = load_id(p.op.in.topk_idx, shape.topk_idx_bytes, s.error);
  }
  const uint32_t word = column - count_columns(shape);
  const auto bits = static_cast<uint64_t>(value);
  return static_cast<int32_t>(
      word == 0 ? reason
                : (word == 1 ? static_cast<uint32_t>(bits) : (word == 2 ? static_cast<uint32_t>(bits >> 32) : 0u)));
}

/// This rank's row of the matrix into every active rank's copy, and zeroes for inactive ranks in the own one. One
/// block.
__device__ void hand_over_counts(const PartParams& p, const RouteShared& s) {
  const OpShape& shape = p.op.shape;
  const uint32_t row = matrix_row_ints(shape);
  for (uint32_t column = threadIdx.x; column < row; column += kRouteThreads) {
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

#endif

// link_route. Grid: one cluster of 8 blocks of 512 threads, each an eighth of the tokens in order, one token per
// thread. Every thread reads its token's ids once (K * 4 or 8 bytes), adds to the histogram of experts in shared memory
// and keeps the token's ranks as bits; ballots give the warp's rows per rank. Through distributed shared memory every
// block learns the rows of all blocks and the first block the sums of experts; then every thread writes its token's R
// row numbers, and the first block the count row of R + E + 4 integers to every active rank. First kernel of the part:
// stamps its start. Reads no flag; announces `routed` last. Bound: latency, about three passes over memory and three
// cluster barriers.
__global__ __cluster_dims__(kRouteBlocks, 1, 1)
    __launch_bounds__(kRouteThreads) void link_route(const __grid_constant__ PartParams p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  __shared__ RouteShared s;
  if (p.null_operation != 0) {
    return;
  }
  // A block that is gated still meets the others, which may have looked before the part was aborted.
  const bool gated = block_is_gated(p);
  const OpShape& shape = p.op.shape;
  const cg::cluster_group cluster = cg::this_cluster();
  const uint32_t block = cluster.block_rank();
  if (!gated) {
    mark_start(p);
  }
  for (uint32_t e = threadIdx.x; e < shape.experts; e += kRouteThreads) {
    s.experts[e] = 0;
  }
  if (threadIdx.x == 0) {
    s.error = kNoError;
  }
  __syncthreads();
  RouteSpan span = span_of(shape, block);
  if (gated || p.refused_reason != 0) {
    span.tokens = span.rounds = 0;
  }
  count_block(p, span, &s);
  __syncthreads();
  if (threadIdx.x < shape.ranks) {
    const int32_t rows = scan_warps(span, threadIdx.x, &s);
    for (uint32_t b = 0; b < kRouteBlocks; ++b) {
      cluster.map_shared_rank(&s, b)->block_rows[block][threadIdx.x] = rows;
    }
  }
  cluster.sync();
  RouteShared* first = cluster.map_shared_rank(&s, 0);
  for (uint32_t e = threadIdx.x; block != 0 && e < shape.experts; e += kRouteThreads) {
    if (s.experts[e] != 0) {
      atomicAdd(&first->experts[e], s.experts[e]);
    }
  }
  if (block != 0 && threadIdx.x == 0 && s.error != kNoError) {
    atomicMin(&first->error, s.error);
  }
  number_block(p, span, block, s);
  cluster.sync();
  if (block == 0 && !gated) {
    hand_over_counts(p, s);
  }
  fence_sys();
  cluster.sync();
  if (block == 0 && !gated && threadIdx.x < 32) {
    announce(p, SignalStep::kRouted);
  }
#endif
}

}  // namespace

cudaError_t launch_link_route(const PartParams& params, cudaStream_t stream) {
  link_route<<<kRouteBlocks, kRouteThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace expertd::kernels::cuda
