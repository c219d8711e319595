// SPDX-License-Identifier: Apache-2.0
#include "tests/bench/cuda_check.h"
#include "tests/bench/table/fixed_work.h"

namespace expertd::bench {

namespace {

constexpr uint32_t kThreads = 1024;
constexpr uint32_t kChains = 4;  // independent, so that the units are kept busy

// A grid of blocks that depend on nothing.
__global__ __launch_bounds__(kThreads) void multiply_adds(uint32_t rounds, float* sink) {
  float values[kChains];
  for (uint32_t chain = 0; chain < kChains; ++chain) {
    values[chain] = static_cast<float>(threadIdx.x + chain);
  }
  for (uint32_t round = 0; round < rounds; ++round) {
#pragma unroll
    for (uint32_t chain = 0; chain < kChains; ++chain) {
      values[chain] = values[chain] * 0.999f + 0.5f;
    }
  }
  // Never true, but the compiler does not know.
  if (values[0] + values[1] + values[2] + values[3] < 0) {
    sink[threadIdx.x] = values[0];
  }
}

// One thread.
__global__ void pass_time(uint64_t ns) {
  uint64_t begin = 0;
  uint64_t now = 0;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin)::"memory");
  do {
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  } while (now - begin < ns);
}

}  // namespace

void enqueue_multiply_adds(cudaStream_t stream, uint32_t blocks, uint32_t rounds, float* sink) {
  multiply_adds<<<blocks, kThreads, 0, stream>>>(rounds, sink);
  check_cuda(cudaGetLastError(), "launch of the computation");
}

void enqueue_passing_time(cudaStream_t stream, uint64_t ns) {
  pass_time<<<1, 1, 0, stream>>>(ns);
  check_cuda(cudaGetLastError(), "launch of a delay");
}

}  // namespace expertd::bench
