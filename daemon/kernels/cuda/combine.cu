// SPDX-License-Identifier: Apache-2.0
// The move step of combine and ll_combine: pulls the rows that belong to this rank's tokens out of every rank's input
// and sums them in float32 in the order that the definitions name. Definitions: daemon/kernels/README.md.
#include "daemon/kernels/cuda/combine_rows.cuh"
#include "daemon/kernels/cuda/launch.h"

namespace expertd::kernels::cuda {
namespace {

constexpr uint32_t kPullThreads = 256;
constexpr uint32_t kBlocksPerMultiprocessor = 4;

// combine_pull. Grid: blocks of 256 threads, at most 4 per multiprocessor, tokens strided over blocks. Warp 0 collects
// the token's rows (one lane per rank or top-k lane) in the order of addition; then every thread takes 16-byte pieces:
// loads from all rows, sums in float32, one rounding, one store. Reads the handle's tables and the peers' inputs (after
// their routed flags), no flag itself; writes only this rank's outputs. Bytes per token: H * 2 per row pulled + H * 2.
// Bound: the link, pulled once per remote row.
__global__ __launch_bounds__(kPullThreads) void combine_pull(const __grid_constant__ PartParams p) {
  __shared__ PullShared s;
  if (block_is_gated(p)) {
    return;
  }
  const OpShape& shape = p.op.shape;
  if (threadIdx.x == 0) {
    s.local_rows = 0;
    s.remote_rows = 0;
  }
  __syncwarp();
  const bool weighted = shape.kind == OpKind::kLlCombine;
  const uint32_t pieces = shape.hidden / 8;
  for (uint32_t token = blockIdx.x; token < shape.tokens; token += gridDim.x) {
    if (threadIdx.x < 32) {
      collect_sources(p, token, &s);
    }
    __syncthreads();
    for (uint32_t piece = threadIdx.x; piece < pieces && p.op.out.x != nullptr; piece += kPullThreads) {
      const uint64_t at = uint64_t{token} * pieces + piece;
      float sum[8] = {};
      start_sum(p, at, sum);
      sum_piece(s, piece, weighted, sum);
      static_cast<uint4*>(p.op.out.x)[at] = rounded(sum);
    }
    pull_weights(p, token, threadIdx.x, s);
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    atomicAdd(&p.scratch.plan->pulled_local_rows, s.local_rows);
    atomicAdd(&p.scratch.plan->pulled_remote_rows, s.remote_rows);
  }
  fence_sys();
}

}  // namespace

uint32_t combine_pull_blocks(const PartParams& params) {
  const uint32_t most = params.multiprocessors * kBlocksPerMultiprocessor;
  const uint32_t tokens = params.op.shape.tokens == 0 ? 1 : params.op.shape.tokens;
  return tokens > most ? most : tokens;
}

cudaError_t launch_combine_pull(const PartParams& params, cudaStream_t stream) {
  combine_pull<<<combine_pull_blocks(params), kPullThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace expertd::kernels::cuda
