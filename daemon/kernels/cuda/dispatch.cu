// SPDX-License-Identifier: Apache-2.0
// The move step of dispatch and ll_dispatch: pushes this rank's rows to their final places in the outputs of every
// destination that its GPU reaches, its own included, and moves the rows that the others published in the relay.
// Definitions: daemon/kernels/README.md.
#include "daemon/kernels/cuda/dispatch_rows.cuh"
#include "daemon/kernels/cuda/launch.h"

namespace expertd::kernels::cuda {
namespace {

constexpr uint32_t kBlocksPerMultiprocessor = 4;

/// Rows of sources below `rank` in column `column` of the count matrix; 0 for a cached dispatch, whose numbers are
/// final.
__device__ int32_t rows_below(const PartParams& p, uint32_t rank, uint32_t column) {
  int32_t rows = 0;
  for (uint32_t s = 0; p.op.shape.cached == 0 && s < rank; ++s) {
    rows += p.op.counts[uint64_t{s} * matrix_row_ints(p.op.shape) + column];
  }
  return rows;
}

/// The targets at this rank of a token that `rank` published: warp 0 only. The numbers are checked like the own ones,
/// because the memory they lie in is the daemon's but their bounds are this rank's.
__device__ void collect_relayed(const PartParams& p, uint32_t rank, uint32_t token, MoveShared* s) {
  const OpShape& shape = p.op.shape;
  const RelayPeer& peer = p.relay.peers[rank];
  const RelayLayout& layout = p.relay.layout;
  const uint32_t lane = threadIdx.x;
  const auto* topk = reinterpret_cast<const int32_t*>(peer.base + layout.topk) + uint64_t{token} * p.table_top_k;
  const int32_t expert = lane < p.table_top_k ? topk[lane] : -1;
  s->experts[lane] = expert;
  Target target{};
  bool wanted = false;
  if (!per_expert_rows(shape)) {
    const auto* rows = reinterpret_cast<const int32_t*>(peer.base + layout.token_rank) + uint64_t{token} * shape.ranks;
    const int32_t row = lane == 0 ? rows[shape.rank] : -1;
    wanted = row >= 0;
    target = {static_cast<uint64_t>(row) + (wanted ? rows_below(p, rank, shape.rank) : 0), shape.rank, 0, 0, 0};
    wanted = wanted && target.row < p.peers.views[shape.rank].capacity_rows;
  } else if (expert >= 0 && static_cast<uint32_t>(expert) / shape.local_experts == shape.rank) {
    const auto* rows =
        reinterpret_cast<const int32_t*>(peer.base + layout.token_expert) + uint64_t{token} * p.table_top_k;
    const uint32_t local = static_cast<uint32_t>(expert) % shape.local_experts;
    const bool low_latency = shape.kind == OpKind::kLlDispatch;
    const int32_t start = shape.cached == 0 && !low_latency ? p.scratch.plan->local_start[local] : 0;
    const int32_t relative = rows[lane];
    const auto row =
        static_cast<uint32_t>(start + relative + rows_below(p, rank, shape.ranks + static_cast<uint32_t>(expert)));
    target = {low_latency ? uint64_t{local} * shape.slots_per_expert + row : uint64_t{row}, shape.rank, lane, local,
              row};
    wanted = relative >= 0 && row < (low_latency ? shape.slots_per_expert : p.peers.views[shape.rank].capacity_rows);
  }
  wanted = wanted && p.peers.views[shape.rank].out_x != nullptr;
  const uint32_t ballot = __ballot_sync(kFullWarp, wanted);
  if (wanted) {
    s->targets[__popc(ballot & lanes_below())] = target;
  }
  if (lane == 0) {
    s->count = __popc(ballot);
  }
}

// relay_move. Grid as dispatch_move, the published tokens of every rank behind the relay strided over blocks: reads
// each token that has a row here once over PCIe and stores it to its rows of this rank's outputs. Runs after the routed
// flags of the publishers and before this rank's moved flag, which lets them publish again. Reads no flag. Bound: PCIe.
__global__ __launch_bounds__(kMoveThreads) void relay_move(const __grid_constant__ PartParams p) {
  __shared__ MoveShared s;
  if (block_is_gated(p) || p.scratch.plan->reason != 0) {
    return;
  }
  for (uint32_t rank = 0; rank < p.op.shape.ranks; ++rank) {
    for (uint32_t token = blockIdx.x; relayed(p, rank) && token < p.relay.peers[rank].tokens; token += gridDim.x) {
      if (threadIdx.x < 32) {
        collect_relayed(p, rank, token, &s);
      }
      __syncthreads();
      if (s.count != 0) {
        push_token(p, relayed_token(p, rank, token), token, s);
      }
      __syncthreads();
    }
  }
  fence_sys();
}

// dispatch_move. Grid: blocks of 256 threads, at most 4 per multiprocessor, tokens strided over blocks. Warp 0 collects
// the token's targets (one lane per rank or top-k lane), turns relative rows into final ones and stores them in the
// handle; then all warps read the row once (16 bytes per access) and store it to every target, then side, indices,
// weights and source token. Reads the plan, no flag; does nothing when the plan carries a Reason. Every thread fences
// at system scope at the end; signal(moved) follows in the stream. Bytes per token: row read + (row + side) per target.
// Bound: the link (one copy per destination rank), HBM for local rows.
__global__ __launch_bounds__(kMoveThreads) void dispatch_move(const __grid_constant__ PartParams p) {
  __shared__ MoveShared s;
  if (block_is_gated(p) || p.op.in.x == nullptr || p.scratch.plan->reason != 0) {
    return;
  }
  for (uint32_t token = blockIdx.x; token < p.op.shape.tokens; token += gridDim.x) {
    if (threadIdx.x < 32) {
      collect_targets(p, token, &s);
    }
    __syncthreads();
    push_token(p, own_token(p, token), token, s);
    __syncthreads();
  }
  fence_sys();
}

}  // namespace

uint32_t relay_move_blocks(const PartParams& params) {
  return params.multiprocessors * kBlocksPerMultiprocessor;
}

cudaError_t launch_relay_move(const PartParams& params, cudaStream_t stream) {
  relay_move<<<relay_move_blocks(params), kMoveThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

uint32_t dispatch_move_blocks(const PartParams& params) {
  const uint32_t most = params.multiprocessors * kBlocksPerMultiprocessor;
  const uint32_t tokens = params.op.shape.tokens == 0 ? 1 : params.op.shape.tokens;
  return tokens > most ? most : tokens;
}

cudaError_t launch_dispatch_move(const PartParams& params, cudaStream_t stream) {
  dispatch_move<<<dispatch_move_blocks(params), kMoveThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace expertd::kernels::cuda
