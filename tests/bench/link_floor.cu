// SPDX-License-Identifier: Apache-2.0
// What the links between the GPUs give at best, without the daemon: every GPU copies to the next one at the same time,
// by its copy engines and by a kernel, and the slowest is reported. The floor that figures of the same run stand
// beside. Every copy is verified. Usage: link_floor [MEGABYTES ITERATIONS]
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "tests/bench/cuda_check.h"
#include "tests/bench/link_copy.h"

namespace {

using expertd::bench::check_cuda;
using expertd::bench::LinkCopy;

constexpr uint32_t kWarmup = 5;

struct Gpu {
  std::unique_ptr<LinkCopy> copy;
  cudaStream_t stream = nullptr;
  cudaEvent_t begin = nullptr;
  cudaEvent_t end = nullptr;
};

std::vector<Gpu> open(int count, uint64_t bytes) {
  std::vector<Gpu> gpus(static_cast<size_t>(count));
  for (int g = 0; g < count; ++g) {
    Gpu& gpu = gpus[static_cast<size_t>(g)];
    check_cuda(cudaSetDevice(g), "cudaSetDevice");
    gpu.copy = std::make_unique<LinkCopy>(g, (g + 1) % count, bytes);
    check_cuda(cudaStreamCreateWithFlags(&gpu.stream, cudaStreamNonBlocking), "cudaStreamCreate");
    check_cuda(cudaEventCreate(&gpu.begin), "cudaEventCreate");
    check_cuda(cudaEventCreate(&gpu.end), "cudaEventCreate");
  }
  return gpus;
}

/// Microseconds of the slowest GPU; `blocks` 0: by copy engine.
float copy_once(const std::vector<Gpu>& gpus, uint32_t blocks) {
  for (size_t g = 0; g < gpus.size(); ++g) {
    const Gpu& gpu = gpus[g];
    check_cuda(cudaSetDevice(static_cast<int>(g)), "cudaSetDevice");
    check_cuda(cudaEventRecord(gpu.begin, gpu.stream), "cudaEventRecord");
    blocks == 0 ? gpu.copy->enqueue_copy_engine(gpu.stream) : gpu.copy->enqueue_kernel(gpu.stream, blocks);
    check_cuda(cudaEventRecord(gpu.end, gpu.stream), "cudaEventRecord");
  }
  float slowest = 0;
  for (const Gpu& gpu : gpus) {
    check_cuda(cudaEventSynchronize(gpu.end), "cudaEventSynchronize");
    float ms = 0;
    check_cuda(cudaEventElapsedTime(&ms, gpu.begin, gpu.end), "cudaEventElapsedTime");
    slowest = std::max(slowest, ms * 1e3f);
  }
  return slowest;
}

/// The words that differ.
uint64_t measure(const std::vector<Gpu>& gpus, uint32_t blocks, uint32_t iterations) {
  const uint64_t bytes = gpus.front().copy->bytes();
  for (size_t g = 0; g < gpus.size(); ++g) {
    gpus[g].copy->prepare(blocks + g);
  }
  std::vector<float> times;
  for (uint32_t i = 0; i < kWarmup + iterations; ++i) {
    const float us = copy_once(gpus, blocks);
    if (i >= kWarmup) {
      times.push_back(us);
    }
  }
  uint64_t wrong = 0;
  for (size_t g = 0; g < gpus.size(); ++g) {
    wrong += gpus[g].copy->wrong_words(blocks + g);
  }
  std::sort(times.begin(), times.end());
  const float p50 = times[times.size() / 2];
  const float p99 = times[std::min(times.size() - 1, times.size() * 99 / 100)];
  char name[32];
  std::snprintf(name, sizeof(name), blocks == 0 ? "copy engine" : "kernel, %u blocks", blocks);
  std::printf("%-18s %12llu %9.1f %9.1f %8.0f\n", name, static_cast<unsigned long long>(bytes), p50, p99,
              static_cast<double>(bytes) / p50 * 1e-3);
  return wrong;
}

int run(int argc, char** argv) {
  int count = 0;
  check_cuda(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
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
  const std::vector<Gpu> gpus = open(count, bytes);
  std::printf("%-18s %12s %9s %9s %8s  %d GPUs, each to the next at once\n", "copy", "bytes", "p50 us", "p99 us",
              "GB/s", count);
  uint64_t wrong = 0;
  for (const uint32_t blocks : {0u, 12u, 24u, 132u}) {
    wrong += measure(gpus, blocks, iterations);
  }
  if (wrong != 0) {
    std::printf("link_floor: %llu words differ\n", static_cast<unsigned long long>(wrong));
    return 1;
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "link_floor: %s\n", error.what());
    return 69;
  }
}
