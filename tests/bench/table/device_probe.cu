// SPDX-License-Identifier: Apache-2.0
#include "tests/bench/cuda_check.h"
#include "tests/bench/table/device_probe.h"

namespace expertd::bench {

namespace {

constexpr uint32_t kBlocks = 264;
constexpr uint32_t kThreads = 256;

__global__ void find_other(const uint4* data, uint64_t count, uint32_t wanted, uint32_t* differ) {
  for (uint64_t i = blockIdx.x * uint64_t{blockDim.x} + threadIdx.x; i < count; i += uint64_t{gridDim.x} * blockDim.x) {
    const uint4 found = data[i];
    if (found.x != wanted || found.y != wanted || found.z != wanted || found.w != wanted) {
      *differ = 1;  // by whoever finds it, always the same
    }
  }
}

}  // namespace

DeviceProbe::DeviceProbe() : differ_(sizeof(uint4)) {
  // The first launch, which loads the kernel, is better not beside others.
  (void)holds_only(differ_.as<uint32_t>(), 0, sizeof(uint4), nullptr);
}

bool DeviceProbe::holds_only(const void* data, uint8_t value, uint64_t bytes, cudaStream_t stream) const {
  constexpr uint64_t kStep = sizeof(uint4);
  if (bytes % kStep != 0 || reinterpret_cast<uintptr_t>(data) % kStep != 0) {
    return false;
  }
  uint32_t differ = 0;
  check_cuda(cudaMemsetAsync(differ_.as<uint32_t>(), 0, sizeof(differ), stream), "cudaMemsetAsync");
  find_other<<<kBlocks, kThreads, 0, stream>>>(static_cast<const uint4*>(data), bytes / kStep, value * 0x01010101u,
                                               differ_.as<uint32_t>());
  check_cuda(cudaGetLastError(), "search of an output");
  check_cuda(cudaMemcpyAsync(&differ, differ_.as<uint32_t>(), sizeof(differ), cudaMemcpyDeviceToHost, stream),
             "search of an output");
  check_cuda(cudaStreamSynchronize(stream), "search of an output");
  return differ == 0;
}

}  // namespace expertd::bench
