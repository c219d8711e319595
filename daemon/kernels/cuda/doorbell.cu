// SPDX-License-Identifier: Apache-2.0
// The stream's waits as kernels, where clients and daemon share a GPU at the same time (MPS): for a doorbell, and for
// the flags of ranks that are late.
#include "daemon/kernels/cuda/await_word.cuh"
#include "daemon/kernels/cuda/launch.h"
#include "daemon/kernels/cuda/launch_config.h"

namespace expertd::kernels::cuda {
namespace {

// await_doorbell. Grid: one thread. It may be there before the kernel in front has ended, which it waits for first.
// Reads the doorbell, which the client's stream writes; then lets the next kernel of the stream start, which is
// launched for that and so is there about 2 us sooner than behind a stream's wait. It has no place but that of one
// warp, for as long as the client takes. Bytes: 8.
__global__ void await_doorbell(const uint64_t* word, uint64_t value) {
  wait_for_previous();
  if (word != nullptr) {
    await_word(word, value);
    let_next_start();
  }
}

// await_flags. Grid: one warp; lane s reads the flag of rank s, which that rank writes. The same otherwise. Bytes: 8
// per rank.
__global__ void await_flags(const __grid_constant__ FlagWait p) {
  wait_for_previous();
  if (((p.ranks >> threadIdx.x) & 1) != 0) {
    await_word(p.flags + threadIdx.x, p.value);
  }
  __syncwarp();
  let_next_start();
}

}  // namespace

cudaError_t launch_await_doorbell(const uint64_t* word, uint64_t value, cudaStream_t stream) {
  LaunchConfig config(1, 1, 0, stream);
  config.starts_early(true);
  return cudaLaunchKernelEx(config.get(), await_doorbell, word, value);
}

cudaError_t launch_await_flags(const FlagWait& params, cudaStream_t stream) {
  LaunchConfig config(1, base::kMaxGpuRanks, 0, stream);
  config.starts_early(true);
  return cudaLaunchKernelEx(config.get(), await_flags, params);
}

}  // namespace expertd::kernels::cuda
