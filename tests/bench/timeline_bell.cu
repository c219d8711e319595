// SPDX-License-Identifier: Apache-2.0
#include "daemon/kernels/cuda/ptx.cuh"
#include "tests/bench/timeline_bell.h"

namespace expertd::bench {
namespace {

constexpr uint64_t kPatienceNs = 1'000'000'000;

// pull_bell. One thread; waits for the gate, at most kPatienceNs.
__global__ void pull_bell(BellRope rope) {
  const uint64_t begin = kernels::cuda::global_timer_ns();
  while (kernels::cuda::ld_acquire_sys(rope.gate) < rope.value) {
    if (kernels::cuda::global_timer_ns() - begin > kPatienceNs) {
      return;
    }
  }
  kernels::cuda::st_release_sys(rope.doorbell, rope.value);
}

}  // namespace

cudaError_t hang_bell(const BellRope& rope, cudaStream_t stream) {
  pull_bell<<<1, 1, 0, stream>>>(rope);
  return cudaGetLastError();
}

}  // namespace expertd::bench
