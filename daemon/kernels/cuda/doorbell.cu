// SPDX-License-Identifier: Apache-2.0
// The wait for a doorbell as a kernel, where clients and daemon share a GPU at the same time (MPS).
#include "daemon/kernels/cuda/launch.h"
#include "daemon/kernels/cuda/ptx.cuh"

namespace expertd::kernels::cuda {
namespace {

/// Polls in a row before the thread sleeps between them: about 100 us.
constexpr uint32_t kEagerPolls = 200;
constexpr uint32_t kSleepNs = 200;

// await_doorbell. Grid: one thread. Reads the doorbell, which the client's stream writes, until it is at least `value`
// as a stream's wait compares them; then lets the next kernel of the stream start, which is launched for that and so is
// there about 2 us sooner than behind a stream's wait. It has no place but that of one warp, for as long as the client
// takes. An abort writes the doorbell as it does for a stream's wait. Bytes: 8.
__global__ void await_doorbell(const uint64_t* word, uint64_t value) {
  if (word == nullptr) {
    return;
  }
#pragma unroll 1
  for (uint32_t polls = 0; static_cast<int64_t>(ld_acquire_sys(word) - value) < 0; ++polls) {
    if (polls >= kEagerPolls) {
      __nanosleep(kSleepNs);
    }
  }
  let_next_start();
}

}  // namespace

cudaError_t launch_await_doorbell(const uint64_t* word, uint64_t value, cudaStream_t stream) {
  await_doorbell<<<1, 1, 0, stream>>>(word, value);
  return cudaGetLastError();
}

}  // namespace expertd::kernels::cuda
