// SPDX-License-Identifier: Apache-2.0
// What the links between the GPUs give at best, without the daemon: every GPU copies to the next one at the same time,
// by its copy engines and by a kernel, and the slowest is reported. The floor that figures of the same run stand
// beside. Every copy is verified. Usage: link_floor [MEGABYTES ITERATIONS]
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

constexpr uint32_t kThreads = 1024;
constexpr uint32_t kWarmup = 5;

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    std::fprintf(stderr, "link_floor: %s: %s\n", what, cudaGetErrorString(error));
    std::exit(69);
  }
}

struct Gpu {
  cudaStream_t stream = nullptr;
  cudaEvent_t begin = nullptr;
  cudaEvent_t end = nullptr;
  uint64_t* source = nullptr;  // on this GPU
  uint64_t* target = nullptr;  // on the next GPU
  uint32_t* wrong = nullptr;   // on the next GPU
};

__global__ void fill(uint64_t* words, uint64_t count, uint64_t seed) {
  for (uint64_t i = blockIdx.x * uint64_t{blockDim.x} + threadIdx.x; i < count; i += uint64_t{gridDim.x} * blockDim.x) {
    words[i] = (i + seed) * 0x9e3779b97f4a7c15ull;
  }
}

__global__ void compare(const uint64_t* words, uint64_t count, uint64_t seed, uint32_t* wrong) {
  for (uint64_t i = blockIdx.x * uint64_t{blockDim.x} + threadIdx.x; i < count; i += uint64_t{gridDim.x} * blockDim.x) {
    if (words[i] != (i + seed) * 0x9e3779b97f4a7c15ull) {
      atomicAdd(wrong, 1u);
    }
  }
}

// Four independent 16-byte loads in flight per thread, then their stores over the link.
__global__ __launch_bounds__(kThreads) void push(const uint4* from, uint4* to, uint64_t count) {
  const uint64_t step = uint64_t{gridDim.x} * kThreads;
  for (uint64_t first = blockIdx.x * uint64_t{kThreads} + threadIdx.x; first < count; first += 4 * step) {
    uint4 v[4];
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      v[i] = first + i * step < count ? from[first + i * step] : uint4{};
    }
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      if (first + i * step < count) {
        to[first + i * step] = v[i];
      }
    }
  }
}

void open(std::vector<Gpu>* gpus, uint64_t bytes) {
  const int count = static_cast<int>(gpus->size());
  for (int g = 0; g < count; ++g) {
    Gpu& gpu = (*gpus)[static_cast<size_t>(g)];
    const int next = (g + 1) % count;
    check(cudaSetDevice(next), "cudaSetDevice");
    check(cudaMalloc(&gpu.target, bytes), "cudaMalloc");
    check(cudaMalloc(&gpu.wrong, sizeof(uint32_t)), "cudaMalloc");
    check(cudaSetDevice(g), "cudaSetDevice");
    const cudaError_t peer = cudaDeviceEnablePeerAccess(next, 0);
    if (peer != cudaErrorPeerAccessAlreadyEnabled) {
      check(peer, "cudaDeviceEnablePeerAccess");
    }
    (void)cudaGetLastError();
    check(cudaMalloc(&gpu.source, bytes), "cudaMalloc");
    check(cudaStreamCreateWithFlags(&gpu.stream, cudaStreamNonBlocking), "cudaStreamCreate");
    check(cudaEventCreate(&gpu.begin), "cudaEventCreate");
    check(cudaEventCreate(&gpu.end), "cudaEventCreate");
  }
}

/// Microseconds of the slowest GPU; `blocks` 0: by copy engine.
float copy_once(const std::vector<Gpu>& gpus, uint64_t bytes, uint32_t blocks) {
  const int count = static_cast<int>(gpus.size());
  for (int g = 0; g < count; ++g) {
    const Gpu& gpu = gpus[static_cast<size_t>(g)];
    check(cudaSetDevice(g), "cudaSetDevice");
    check(cudaEventRecord(gpu.begin, gpu.stream), "cudaEventRecord");
    if (blocks == 0) {
      check(cudaMemcpyPeerAsync(gpu.target, (g + 1) % count, gpu.source, g, bytes, gpu.stream), "cudaMemcpyPeerAsync");
    } else {
      push<<<blocks, kThreads, 0, gpu.stream>>>(reinterpret_cast<const uint4*>(gpu.source),
                                                reinterpret_cast<uint4*>(gpu.target), bytes / 16);
      check(cudaGetLastError(), "push");
    }
    check(cudaEventRecord(gpu.end, gpu.stream), "cudaEventRecord");
  }
  float slowest = 0;
  for (int g = 0; g < count; ++g) {
    const Gpu& gpu = gpus[static_cast<size_t>(g)];
    check(cudaEventSynchronize(gpu.end), "cudaEventSynchronize");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, gpu.begin, gpu.end), "cudaEventElapsedTime");
    slowest = std::max(slowest, ms * 1e3f);
  }
  return slowest;
}

void prepare(const std::vector<Gpu>& gpus, uint64_t bytes, uint64_t seed) {
  const int count = static_cast<int>(gpus.size());
  for (int g = 0; g < count; ++g) {
    const Gpu& gpu = gpus[static_cast<size_t>(g)];
    check(cudaSetDevice((g + 1) % count), "cudaSetDevice");
    check(cudaMemset(gpu.target, 0xab, bytes), "cudaMemset");
    check(cudaMemset(gpu.wrong, 0, sizeof(uint32_t)), "cudaMemset");
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    check(cudaSetDevice(g), "cudaSetDevice");
    fill<<<264, 256, 0, gpu.stream>>>(gpu.source, bytes / 8, seed + static_cast<uint64_t>(g));
    check(cudaStreamSynchronize(gpu.stream), "fill");
  }
}

uint64_t wrong_words(const std::vector<Gpu>& gpus, uint64_t bytes, uint64_t seed) {
  const int count = static_cast<int>(gpus.size());
  uint64_t wrong = 0;
  for (int g = 0; g < count; ++g) {
    const Gpu& gpu = gpus[static_cast<size_t>(g)];
    check(cudaSetDevice((g + 1) % count), "cudaSetDevice");
    compare<<<264, 256>>>(gpu.target, bytes / 8, seed + static_cast<uint64_t>(g), gpu.wrong);
    uint32_t found = 0;
    check(cudaMemcpy(&found, gpu.wrong, sizeof(found), cudaMemcpyDeviceToHost), "compare");
    wrong += found;
  }
  return wrong;
}

}  // namespace

int main(int argc, char** argv) {
  int count = 0;
  check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  if (count < 2) {
    std::fprintf(stderr, "link_floor: %d GPU here, two are needed\n", count);
    return 69;
  }
  const double megabytes = argc > 1 ? std::atof(argv[1]) : 58.5;
  const uint32_t iterations = argc > 2 ? static_cast<uint32_t>(std::atoi(argv[2])) : 100;
  const uint64_t bytes = static_cast<uint64_t>(megabytes * 1e6) / 512 * 512;
  if (bytes == 0 || iterations == 0) {
    std::fprintf(stderr, "usage: link_floor [MEGABYTES ITERATIONS]\n");
    return 64;
  }
  std::vector<Gpu> gpus(static_cast<size_t>(count));
  open(&gpus, bytes);
  uint64_t seed = 1;
  uint64_t failed = 0;
  std::printf("%-18s %12s %9s %9s %8s  %d GPUs, each to the next at once\n", "copy", "bytes", "p50 us", "p99 us",
              "GB/s", count);
  for (const uint32_t blocks : {0u, 12u, 24u, 132u}) {
    std::vector<float> times;
    prepare(gpus, bytes, ++seed);
    for (uint32_t i = 0; i < kWarmup + iterations; ++i) {
      const float us = copy_once(gpus, bytes, blocks);
      if (i >= kWarmup) {
        times.push_back(us);
      }
    }
    failed += wrong_words(gpus, bytes, seed);
    std::sort(times.begin(), times.end());
    const float p50 = times[times.size() / 2];
    const float p99 = times[std::min(times.size() - 1, times.size() * 99 / 100)];
    char name[32];
    std::snprintf(name, sizeof(name), blocks == 0 ? "copy engine" : "kernel, %u blocks", blocks);
    std::printf("%-18s %12llu %9.1f %9.1f %8.0f\n", name, static_cast<unsigned long long>(bytes), p50, p99,
                static_cast<double>(bytes) / p50 * 1e-3);
  }
  if (failed != 0) {
    std::printf("link_floor: %llu words differ\n", static_cast<unsigned long long>(failed));
    return 1;
  }
  return 0;
}
