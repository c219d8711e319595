// SPDX-License-Identifier: Apache-2.0
// HT dispatch on sm_90 in one kernel: routes, meets the other ranks, stores every row straight into its final places
// and ends the part. Definitions: daemon/kernels/README.md.
#include <algorithm>

#include "daemon/kernels/cuda/finish_part.cuh"
#include "daemon/kernels/cuda/launch_config.h"
#include "daemon/kernels/cuda/link_move.cuh"
#include "daemon/kernels/cuda/plan.cuh"

namespace expertd::kernels::cuda {
namespace {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

/// The rows of a block's tokens in the handle, absolute from now on; by its clerk, because other blocks may still be
/// numbering theirs.
__device__ void keep_rows(const PartParams& p, const TokenSpan& span, const RowCounts& rows) {
  const OpShape& shape = p.op.shape;
  for (uint32_t j = 0; j < shape.ranks; ++j) {
    int32_t base = 0;
    for (uint32_t s = 0; s < shape.rank; ++s) {
      base += rows_of(p, rows, s, j);
    }
    for (uint32_t t = threadIdx.x & 31; t < span.tokens; t += 32) {
      const uint64_t at = uint64_t{span.first + t} * shape.ranks + j;
      const int32_t relative = p.scratch.rows[at];
      p.op.routing.token_rank[at] = relative < 0 ? -1 : relative + base;
    }
  }
}

/// A block's shared memory beside the rows.
struct BlockShared {
  ClusterShared cluster;
  RowCounts rows;
  uint64_t loaded[kMostMovers];
  uint32_t aborted;  // the clerk found the part aborted, so the block has not done its work
};

/// The clerks' work beside the movers: the handle and what only this rank can know (no other rank writes those rows and
/// tables); in the first cluster the rows per expert, in the first block the plan.
__device__ void keep_books(const PartParams& p, const TokenSpan& span, bool works, BlockShared* shared) {
  const OpShape& shape = p.op.shape;
  const uint32_t lane = threadIdx.x & 31;
  const bool counts = shape.cached == 0 && blockIdx.x < cooperative_groups::this_cluster().num_blocks();
  if (counts && works && p.refused_reason == 0) {
    keep_rows(p, span, shared->rows);
  }
  const Passage counted = counts ? count_experts(p, span, works, &shared->cluster) : Passage::kNot;
  if (!works || counted == Passage::kAborted) {
    shared->aborted = 1;
    return;
  }
  const MoverPlan plan = plan_of_warp(p, shared->rows);
  if (shape.cached == 0 && shape.worst_tokens != 0 && plan.moves) {
    const uint32_t received = __shfl_sync(kFullWarp, plan.total, static_cast<int>(shape.rank));
    clear_rows(p, received, shape.capacity_rows, {blockIdx.x * 32 + lane, gridDim.x * 32});
  }
  if (blockIdx.x == 0) {
    plan_dispatch(p, p.scratch.plan_work, {lane, 32}, [] { __syncwarp(); });
    if (plan.moves) {
      store_tables(p, {lane, 32});
    }
  }
}

/// Begins the part as the kernel that waits: routes, or announces at once where the handle has the routing. Whether
/// the part was aborted before. Whole block.
__device__ bool open_dispatch(const PartParams& p, const TokenSpan& span, TokenRouting* routing,
                              ClusterShared* shared) {
  if (p.op.shape.cached != 0) {
    const bool gated = look_at_gate(p);
    open_part(p, gated);
    return gated;
  }
  const auto cluster = cooperative_groups::this_cluster();
  const bool gated = route_cluster(p, span, routing, shared);
  if (blockIdx.x == 0 && threadIdx.x / 32 == kBlockWarps - 1 && !gated) {
    hand_over_matrix(p, cluster.num_blocks(), *shared);
  }
  return gated;
}

/// Past the first exchange, with the rows of all ranks where the handle does not have them. Whole block.
__device__ Passage enters_dispatch(const PartParams& p, Entry entry, bool gated, BlockShared* shared) {
  return p.op.shape.cached != 0 ? enters(p, SignalStep::kRouted, entry, gated)
                                : enters_with_rows(p, entry, gated, &shared->rows);
}

/// Waits for the others' rows and ends the part. The last block, when it has announced those of this rank; `complete`:
/// all blocks did their work.
__device__ void end_dispatch(const PartParams& p, bool complete) {
  const uint32_t reason = complete ? found_reason(p) : 0;
  const Passage moved = passes(p, SignalStep::kMoved, SignalStep::kMoved, false, Decider::kOneBlock);
  if (moved == Passage::kNot) {
    return;
  }
  if (threadIdx.x < 32) {
    stamp(Stamp::kPassedMoved);
  }
  finish_part(p, complete && moved == Passage::kRegular, reason, true);
}

#endif

// link_dispatch. Grid: about link_sms blocks, one per multiprocessor, in clusters of up to 8 blocks, whose barrier says
// when they may write each other's shared memory (link_route.cuh); as many mover warps as rows fit into a block's
// shared memory, and a clerk. As the kernel that waits: every cluster routes all tokens for itself (link_route.cuh: K *
// 4 or 8 bytes read per token), the first one hands over the counts, which also tell that this rank's outputs may be
// written, and behind them the matrix and `routed`; then all wait for the others' counts (link_rows.cuh). Behind the
// stream's wait the routing stands in scratch. A mover takes one token after the other: the copy unit loads row and
// side row while the lanes read ids and weights of the next, then stores both to the token's row at every rank. The
// clerks write the plan and the handle. The last block announces `moved` (this rank's rows are there), waits for the
// others' and ends the part. Bytes per token: row + side read; row + side + K * (id + 4) + 4 written per rank. Bound:
// the links, at the rate of writes.
__global__ __launch_bounds__(kBlockThreads, 1) void link_dispatch(const __grid_constant__ PartParams p, Entry entry) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char places[];
  __shared__ BlockShared shared;
  if (p.null_operation != 0) {
    return;
  }
  if (entry == Entry::kWaits && p.op.shape.cached == 0) {
    cluster_arrive_relaxed();  // this block has started
  }
  if (threadIdx.x < 32 && entry == Entry::kWaits) {
    stamp(Stamp::kStarted);
  }
  if (threadIdx.x == 0) {
    shared.aborted = 0;
  }
  const auto cluster = cooperative_groups::this_cluster();
  const TokenSpan span = span_of(p.op.shape, cluster.block_rank(), cluster.num_blocks());
  const bool counts = p.op.shape.cached == 0 && blockIdx.x < cluster.num_blocks();
  if (counts) {
    clear_experts(p.op.shape, &shared.cluster);
  }
  const uint32_t warp = threadIdx.x / 32;
  const bool moves = warp < movers_of(p.op.shape);  // other warps only help to route
  const bool clerk = warp == kBlockWarps - 1;
  const bool gated =
      entry == Entry::kWaits && open_dispatch(p, span, reinterpret_cast<TokenRouting*>(places), &shared.cluster);
  Mover mover{};
  mover.place.token = kNoToken;
  if (moves && (entry == Entry::kWaits || was_left(p, SignalStep::kRouted))) {
    mover = prepare_mover(p, span, cluster.num_blocks(), places, shared.loaded);
    stamp(Stamp::kPrefetching);
  }
  mover.row = moves ? row_number(p, mover.work, mover.work.first) : -1;
  const Passage passage = enters_dispatch(p, entry, gated, &shared);
  if (passage == Passage::kNot) {
    drop_place(mover.place);
    return;
  }
  if (warp == 0) {
    stamp(Stamp::kPassedRouted);
  }
  if (counts && entry == Entry::kBehindWait) {
    cluster.sync();  // no clerk adds to a block that has not cleared its counts
  }
  if (counts && !clerk) {
    cluster_arrive_relaxed();  // only clerks write into other blocks from here on
  }
  const bool works = passage == Passage::kRegular;
  if (works && moves) {
    move_tokens(p, mover, shared.rows);
  } else {
    drop_place(mover.place);
  }
  if (clerk) {
    keep_books(p, span, works, &shared);
    stamp(Stamp::kBooksKept);
  } else if (counts) {
    cluster_wait();  // all clerks have added, so none needs this block any more
  }
  __syncthreads();  // the clerk is through
  const LastBlock end = end_moving(p, works && shared.aborted == 0);
  if (warp == 0) {
    stamp(Stamp::kCountedIn);
  }
  if (end.last) {
    end_dispatch(p, end.complete);
  }
#endif
}

uint32_t most_blocks(const PartParams& params) {
  return std::min(params.link_sms, params.multiprocessors);
}

uint32_t blocks_per_cluster(const PartParams& params) {
  return most_blocks(params) >= 2 * kMostClusterBlocks ? kMostClusterBlocks : kLeastClusterBlocks;
}

}  // namespace

bool serves_link(const PartParams& params) {
  const OpShape& shape = params.op.shape;
  if (params.bulk_copies == 0 || params.link_sms == 0 || shape.expanded != 0) {
    return false;
  }
  if (shape.kind == OpKind::kDispatch) {
    return shape.payload != Payload::kFp8 && shape.row_bytes != 0 && place_bytes(shape) <= kBulkSharedBytes;
  }
  return shape.kind == OpKind::kCombine && shape.order_last_lane == 0 && shape.hidden != 0;
}

uint32_t link_dispatch_blocks(const PartParams& params) {
  const uint32_t cluster = blocks_per_cluster(params);
  return std::max(most_blocks(params) / cluster, 1u) * cluster;
}

cudaError_t take_link_dispatch_timeline(Timeline* timeline) {
  return take_timeline(timeline);
}

cudaError_t launch_link_dispatch(const PartParams& params, Entry entry, cudaStream_t stream) {
  if (params.null_operation != 0) {
    const cudaError_t allowed =
        cudaFuncSetAttribute(link_dispatch, cudaFuncAttributeMaxDynamicSharedMemorySize, kBulkSharedBytes);
    if (allowed != cudaSuccess) {
      return allowed;
    }
  }
  const uint32_t rows = params.null_operation != 0 ? 0 : movers_of(params.op.shape) * place_bytes(params.op.shape);
  LaunchConfig config(link_dispatch_blocks(params), kBlockThreads, std::max<size_t>(rows, sizeof(TokenRouting)),
                      stream);
  config.cluster(blocks_per_cluster(params));
  config.starts_early(params.after_doorbell != 0 && entry == Entry::kWaits);
  return cudaLaunchKernelEx(config.get(), link_dispatch, params, entry);
}

}  // namespace expertd::kernels::cuda
