// SPDX-License-Identifier: Apache-2.0
#include <cuda_bf16.h>
#include <mma.h>

#include <utility>

#include "tests/bench/cuda_check.h"
#include "tests/bench/table/cublas.h"
#include "tests/bench/table/exchange.h"
#include "tests/bench/table/gemm.h"

namespace expertd::bench {

namespace {

constexpr uint32_t kFillBlocks = 264;
constexpr uint32_t kFillThreads = 256;

// Small values of either sign: what a GEMM of zeros takes in power, and so in clocks, says little.
__global__ void fill(__nv_bfloat16* values, uint64_t count) {
  for (uint64_t i = blockIdx.x * uint64_t{blockDim.x} + threadIdx.x; i < count; i += uint64_t{gridDim.x} * blockDim.x) {
    const uint32_t bits = static_cast<uint32_t>((i * 0x9e3779b97f4a7c15ull) >> 48);
    values[i] = __float2bfloat16((static_cast<float>(bits) - 32768.0f) * 0x1p-15f);
  }
}

class CublasGemm final : public Gemm {
 public:
  explicit CublasGemm(std::unique_ptr<Cublas> cublas) : cublas_(std::move(cublas)) {
    const uint64_t count = uint64_t{kSize} * kSize;
    for (DeviceBuffer* buffer : {&a_, &b_, &c_}) {
      *buffer = DeviceBuffer(count * sizeof(__nv_bfloat16));
      fill<<<kFillBlocks, kFillThreads>>>(buffer->as<__nv_bfloat16>(), count);
    }
    check_cuda(cudaGetLastError(), "filling the matrices");
    check_cuda(cudaDeviceSynchronize(), "filling the matrices");
  }

  const char* kind() const override { return "cuBLAS"; }
  void enqueue(cudaStream_t stream) override {
    cublas_->multiply({.rows = kSize,
                       .columns = kSize,
                       .inner = kSize,
                       .left = a_.as<void>(),
                       .right = b_.as<void>(),
                       .product = c_.as<void>()},
                      stream);
  }

 private:
  const std::unique_ptr<Cublas> cublas_;
  DeviceBuffer a_, b_, c_;
};

// Every thread slot of a multiprocessor is taken, by two blocks.
constexpr uint32_t kWarps = 32;
constexpr uint32_t kBlocksPerMultiprocessor = 2;
// About a millisecond: 64 warps of 8192 products each a round, at a good half of 4.5e12 per second and multiprocessor.
constexpr uint32_t kRounds = 6000;

__global__ __launch_bounds__(kWarps * 32) void multiply(float* sink) {
  namespace wmma = nvcuda::wmma;
  wmma::fragment<wmma::matrix_a, 16, 16, 16, __nv_bfloat16, wmma::row_major> a;
  wmma::fragment<wmma::matrix_b, 16, 16, 16, __nv_bfloat16, wmma::col_major> b;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum;
  wmma::fill_fragment(a, __float2bfloat16(0x1p-4f));
  wmma::fill_fragment(b, __float2bfloat16(0x1p-4f));
  wmma::fill_fragment(sum, 0.0f);
  for (uint32_t round = 0; round < kRounds; ++round) {
    wmma::mma_sync(sum, a, b, sum);
  }
  // Never true, but the compiler does not know.
  if (sum.x[0] < 0) {
    sink[threadIdx.x] = sum.x[0];
  }
}

class KernelGemm final : public Gemm {
 public:
  KernelGemm() : sink_(uint64_t{kWarps} * 32 * sizeof(float)) {
    int device = 0;
    int multiprocessors = 0;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
               "cudaDeviceGetAttribute");
    blocks_ = static_cast<uint32_t>(multiprocessors) * kBlocksPerMultiprocessor;
  }

  const char* kind() const override { return "kernel"; }
  void enqueue(cudaStream_t stream) override {
    multiply<<<blocks_, kWarps * 32, 0, stream>>>(sink_.as<float>());
    check_cuda(cudaGetLastError(), "launch of the tensor-core kernel");
  }

 private:
  DeviceBuffer sink_;
  uint32_t blocks_ = 0;
};

}  // namespace

std::unique_ptr<Gemm> Gemm::create() {
  if (std::unique_ptr<Cublas> cublas = Cublas::open(); cublas != nullptr) {
    return std::make_unique<CublasGemm>(std::move(cublas));
  }
  return std::make_unique<KernelGemm>();
}

}  // namespace expertd::bench
