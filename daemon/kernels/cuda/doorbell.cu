// SPDX-License-Identifier: Apache-2.0
// The stream's waits as kernels, where clients and daemon share a GPU at the same time (MPS): for a doorbell, and for
// the flags of ranks that are late.
#include "daemon/kernels/cuda/await_word.cuh"
#include "daemon/kernels/cuda/launch.h"
#include "daemon/kernels/cuda/launch_config.h"
#include "daemon/kernels/cuda/ptx.cuh"
#include "proto/abi/ring_v1.h"

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

// take_doorbell. One thread, behind a stream's wait for the doorbell of a capture lane, which it takes back to 0; tells
// the host what it held, cut to 32 bits, and for which arm. Bytes: 16.
__global__ void take_doorbell(uint64_t* doorbell, uint64_t* taken, uint64_t arm) {
  if (doorbell == nullptr) {
    return;
  }
  const uint64_t value = atomicExch(reinterpret_cast<unsigned long long*>(doorbell), 0ULL);
  const uint64_t told = value == EXPERTD_CAPTURE_CANCEL ? kTakenCancel : value < kTakenCancel ? value : 0;
  st_release_sys(taken, arm << 32 | told);
}

}  // namespace

cudaError_t launch_take_doorbell(uint64_t* doorbell, uint64_t* taken, uint64_t arm, cudaStream_t stream) {
  take_doorbell<<<1, 1, 0, stream>>>(doorbell, taken, arm);
  return cudaGetLastError();
}

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
