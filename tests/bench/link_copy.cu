// SPDX-License-Identifier: Apache-2.0
#include "tests/bench/cuda_check.h"
#include "tests/bench/link_copy.h"

namespace expertd::bench {

namespace {

constexpr uint32_t kThreads = 1024;
constexpr uint64_t kGranuleBytes = 512;
constexpr int kPoison = 0xab;
constexpr uint32_t kPlainBlocks = 264;
constexpr uint32_t kPlainThreads = 256;

__device__ uint64_t word_of(uint64_t index, uint64_t seed) {
  return (index + seed) * 0x9e3779b97f4a7c15ull;
}

__global__ void fill(uint64_t* words, uint64_t count, uint64_t seed) {
  for (uint64_t i = blockIdx.x * uint64_t{blockDim.x} + threadIdx.x; i < count; i += uint64_t{gridDim.x} * blockDim.x) {
    words[i] = word_of(i, seed);
  }
}

__global__ void compare(const uint64_t* words, uint64_t count, uint64_t seed, uint32_t* wrong) {
  for (uint64_t i = blockIdx.x * uint64_t{blockDim.x} + threadIdx.x; i < count; i += uint64_t{gridDim.x} * blockDim.x) {
    if (words[i] != word_of(i, seed)) {
      atomicAdd(wrong, 1u);
    }
  }
}

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

// Makes a device current for a scope.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
    check_cuda(cudaSetDevice(device), "cudaSetDevice");
  }
  ~OnDevice() { (void)cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
};

void enable_peer_access(int peer) {
  const cudaError_t error = cudaDeviceEnablePeerAccess(peer, 0);
  if (error != cudaErrorPeerAccessAlreadyEnabled) {
    check_cuda(error, "cudaDeviceEnablePeerAccess");
  }
  (void)cudaGetLastError();  // an earlier copy enabled it, which is no failure
}

}  // namespace

LinkCopy::LinkCopy(int from, int to, uint64_t bytes)
    : from_(from), to_(to), bytes_(bytes / kGranuleBytes * kGranuleBytes) {
  if (bytes_ == 0) {
    throw std::runtime_error("a copy has at least " + std::to_string(kGranuleBytes) + " bytes");
  }
  {
    const OnDevice on(to_);
    check_cuda(cudaMalloc(&target_, bytes_), "cudaMalloc of the target of a copy");
    check_cuda(cudaMalloc(reinterpret_cast<void**>(&wrong_), sizeof(*wrong_)), "cudaMalloc");
  }
  const OnDevice on(from_);
  enable_peer_access(to_);
  check_cuda(cudaMalloc(&source_, bytes_), "cudaMalloc of the source of a copy");
}

LinkCopy::~LinkCopy() {
  // Nothing could be done about a failure: the context is lost, and the memory with it.
  (void)cudaFree(source_);
  (void)cudaFree(target_);
  (void)cudaFree(wrong_);
}

void LinkCopy::enqueue_copy_engine(cudaStream_t stream) const {
  check_cuda(cudaMemcpyPeerAsync(target_, to_, source_, from_, bytes_, stream), "cudaMemcpyPeerAsync");
}

void LinkCopy::enqueue_range(cudaStream_t stream, uint64_t first_byte, uint64_t bytes) const {
  check_cuda(cudaMemcpyAsync(static_cast<char*>(target_) + first_byte, static_cast<const char*>(source_) + first_byte,
                             bytes, cudaMemcpyDefault, stream),
             "cudaMemcpyAsync");
}

void LinkCopy::enqueue_kernel(cudaStream_t stream, uint32_t blocks) const {
  push<<<blocks, kThreads, 0, stream>>>(static_cast<const uint4*>(source_), static_cast<uint4*>(target_), bytes_ / 16);
  check_cuda(cudaGetLastError(), "launch of the copying kernel");
}

void LinkCopy::prepare(uint64_t seed) const {
  {
    const OnDevice on(to_);
    check_cuda(cudaMemset(target_, kPoison, bytes_), "cudaMemset");
    check_cuda(cudaMemset(wrong_, 0, sizeof(*wrong_)), "cudaMemset");
    check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }
  const OnDevice on(from_);
  fill<<<kPlainBlocks, kPlainThreads>>>(static_cast<uint64_t*>(source_), bytes_ / 8, seed);
  check_cuda(cudaGetLastError(), "fill");
  check_cuda(cudaStreamSynchronize(nullptr), "fill");
}

uint64_t LinkCopy::wrong_words(uint64_t seed) const {
  const OnDevice on(to_);
  compare<<<kPlainBlocks, kPlainThreads>>>(static_cast<const uint64_t*>(target_), bytes_ / 8, seed, wrong_);
  check_cuda(cudaGetLastError(), "compare");
  uint32_t found = 0;
  check_cuda(cudaMemcpy(&found, wrong_, sizeof(found), cudaMemcpyDeviceToHost), "compare");
  return found;
}

}  // namespace expertd::bench
