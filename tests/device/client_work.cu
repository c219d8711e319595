// SPDX-License-Identifier: Apache-2.0
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "tests/device/client_work.h"

namespace expertd::device_test {
namespace {

constexpr uint32_t kThreads = 256;
constexpr uint32_t kBlocks = 64;

// A grid that strides, so that its size is free.
__global__ void scale(const __nv_bfloat16* source, __nv_bfloat16* target, uint64_t elements, float factor) {
  const uint64_t step = uint64_t{gridDim.x} * blockDim.x;
  for (uint64_t i = blockIdx.x * uint64_t{blockDim.x} + threadIdx.x; i < elements; i += step) {
    target[i] = __float2bfloat16(factor * __bfloat162float(source[i]));
  }
}

// One thread.
__global__ void delay(uint64_t ns) {
  uint64_t begin = 0;
  uint64_t now = 0;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin)::"memory");
  do {
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  } while (now - begin < ns);
}

std::string failed(const char* call, cudaError_t error) {
  return error == cudaSuccess ? std::string() : std::string(call) + ": " + cudaGetErrorName(error);
}

}  // namespace

std::string make_stream(void** stream) {
  cudaStream_t made = nullptr;
  const cudaError_t error = cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking);
  *stream = made;
  return failed("cudaStreamCreate", error);
}

std::string enqueue_scale(const uint16_t* source, uint16_t* target, uint64_t elements, float factor, void* stream) {
  scale<<<kBlocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      reinterpret_cast<const __nv_bfloat16*>(source), reinterpret_cast<__nv_bfloat16*>(target), elements, factor);
  return failed("launch of a scaling", cudaGetLastError());
}

std::string enqueue_delay(uint64_t ns, void* stream) {
  delay<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>(ns);
  return failed("launch of a delay", cudaGetLastError());
}

std::string load_work(void* stream) {
  std::string problem = enqueue_scale(nullptr, nullptr, 0, 1, stream);
  problem = problem.empty() ? enqueue_delay(0, stream) : problem;
  return problem.empty() ? failed("cudaStreamSynchronize", cudaStreamSynchronize(static_cast<cudaStream_t>(stream)))
                         : problem;
}

}  // namespace expertd::device_test
