// SPDX-License-Identifier: Apache-2.0
// The last kernel of every part but of those of the low latency kernels. Definitions: daemon/kernels/README.md.
#include "daemon/kernels/cuda/finish_part.cuh"
#include "daemon/kernels/cuda/launch.h"

namespace expertd::kernels::cuda {
namespace {

constexpr uint32_t kFinishThreads = 256;
constexpr uint32_t kMostFinishBlocks = 64;

/// Go or aborted, decided once per part by the first block that asks; the same answer for every block. Whole block.
__device__ bool decide_go(const PartParams& p) {
  __shared__ uint64_t verdict;
  if (threadIdx.x == 0) {
    uint64_t* word = &p.words.state->verdict;
    const uint64_t seen = ld_relaxed_gpu(word);
    const bool aborted = ld_acquire_sys(&p.words.state->aborted_part) == p.words.part;
    verdict = first_decision(word, p.words.part, aborted ? kVerdictAborted : kVerdictGo, seen);
  }
  __syncthreads();
  return verdict == kVerdictGo;
}

// finish. Grid: up to 64 blocks of 256 threads by the size of the tails. Every block asks for the verdict (an aborted
// part becomes a failure here and nowhere later), all threads write tails, counts, prefix, ranges and statistics, or
// the outputs of a failure; the last block to end writes the report, then result and completion word, then `done`.
// Where the kernel before has ended the part itself, only `done` is left to write. Runs after the wait for every moved
// flag; reads no flag. Bytes: 4 or 8 per index of a tail row.
__global__ __launch_bounds__(kFinishThreads) void finish(const __grid_constant__ PartParams p) {
  __shared__ bool last;
  if (p.null_operation != 0) {
    return;
  }
  if (has_passed(p, SignalStep::kMoved)) {
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      tell_done(p);
    }
    return;
  }
  const bool go = decide_go(p);
  const uint32_t reason = go ? found_reason(p) : 0;
  write_outputs(p, go, reason, {blockIdx.x * kFinishThreads + threadIdx.x, gridDim.x * kFinishThreads});
  fence_sys();
  __syncthreads();
  if (threadIdx.x == 0) {
    // Wraps to 0 with the last block, ready for the next part. Pairs with the fences of the other blocks.
    last = atomicInc(&p.words.state->finish_blocks, gridDim.x - 1) == gridDim.x - 1;
    fence_gpu();
  }
  __syncthreads();
  if (!last) {
    return;
  }
  if (threadIdx.x == 0) {
    release_caller(p, go, reason);
  }
  write_facts(p, go, reason);
  fence_sys();
  __syncthreads();
  if (threadIdx.x == 0) {
    st_release_sys(&p.words.facts->done, p.words.part);
  }
}

}  // namespace

uint32_t finish_blocks(const PartParams& params) {
  const OpShape& shape = params.op.shape;
  if (shape.kind != OpKind::kDispatch) {
    return 1;
  }
  const uint64_t width = shape.expanded != 0 ? 1 : shape.top_k;
  const uint64_t blocks = (shape.capacity_rows * width + kFinishThreads * 16 - 1) / (kFinishThreads * 16);
  return static_cast<uint32_t>(blocks < 1 ? 1 : (blocks > kMostFinishBlocks ? kMostFinishBlocks : blocks));
}

cudaError_t launch_finish(const PartParams& params, cudaStream_t stream) {
  finish<<<finish_blocks(params), kFinishThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace expertd::kernels::cuda
