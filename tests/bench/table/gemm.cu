// SPDX-License-Identifier: Apache-2.0
#include <cuda_bf16.h>
#include <dlfcn.h>
#include <mma.h>

#include <cstdlib>

#include "tests/bench/cuda_check.h"
#include "tests/bench/table/exchange.h"
#include "tests/bench/table/gemm.h"

namespace expertd::bench {

namespace {

// Of cublas_api.h, by value.
constexpr int kComputeFloat = 68;  // CUBLAS_COMPUTE_32F
constexpr int kDefaultAlgorithm = -1;
constexpr int kNotTransposed = 0;

using CublasCreate = int (*)(void**);
using CublasDestroy = int (*)(void*);
using CublasSetStream = int (*)(void*, cudaStream_t);
using CublasGemmEx = int (*)(void*, int, int, int, int, int, const void*, const void*, cudaDataType, int, const void*,
                             cudaDataType, int, const void*, void*, cudaDataType, int, int, int);

constexpr uint32_t kFillBlocks = 264;
constexpr uint32_t kFillThreads = 256;

// Small values of either sign: what a GEMM of zeros takes in power, and so in clocks, says little.
__global__ void fill(__nv_bfloat16* values, uint64_t count) {
  for (uint64_t i = blockIdx.x * uint64_t{blockDim.x} + threadIdx.x; i < count; i += uint64_t{gridDim.x} * blockDim.x) {
    const uint32_t bits = static_cast<uint32_t>((i * 0x9e3779b97f4a7c15ull) >> 48);
    values[i] = __float2bfloat16((static_cast<float>(bits) - 32768.0f) * 0x1p-15f);
  }
}

void check_cublas(int status, const char* what) {
  if (status != 0) {
    throw std::runtime_error(std::string(what) + ": status " + std::to_string(status));
  }
}

void* open_cublas() {
  if (const char* const given = std::getenv("EXPERTD_CUBLAS_LIBRARY"); given != nullptr) {
    return dlopen(given, RTLD_NOW | RTLD_LOCAL);
  }
  void* const newer = dlopen("libcublas.so.13", RTLD_NOW | RTLD_LOCAL);
  return newer != nullptr ? newer : dlopen("libcublas.so.12", RTLD_NOW | RTLD_LOCAL);
}

class CublasGemm final : public Gemm {
 public:
  static std::unique_ptr<Gemm> open() {
    void* const library = open_cublas();  // stays loaded: it keeps exit handlers of its own
    if (library == nullptr) {
      return nullptr;
    }
    std::unique_ptr<CublasGemm> gemm(new CublasGemm());
    const auto create = reinterpret_cast<CublasCreate>(dlsym(library, "cublasCreate_v2"));
    gemm->destroy_ = reinterpret_cast<CublasDestroy>(dlsym(library, "cublasDestroy_v2"));
    gemm->set_stream_ = reinterpret_cast<CublasSetStream>(dlsym(library, "cublasSetStream_v2"));
    gemm->gemm_ = reinterpret_cast<CublasGemmEx>(dlsym(library, "cublasGemmEx"));
    if (create == nullptr || gemm->destroy_ == nullptr || gemm->set_stream_ == nullptr || gemm->gemm_ == nullptr ||
        create(&gemm->handle_) != 0) {
      return nullptr;
    }
    gemm->allocate();
    return gemm;
  }
  ~CublasGemm() override {
    if (handle_ != nullptr) {
      (void)destroy_(handle_);  // at the end of the program
    }
  }

  const char* kind() const override { return "cuBLAS"; }
  void enqueue(cudaStream_t stream) override {
    const float one = 1.0f;
    const float zero = 0.0f;
    check_cublas(set_stream_(handle_, stream), "cublasSetStream");
    check_cublas(gemm_(handle_, kNotTransposed, kNotTransposed, kSize, kSize, kSize, &one, a_.as<void>(), CUDA_R_16BF,
                       kSize, b_.as<void>(), CUDA_R_16BF, kSize, &zero, c_.as<void>(), CUDA_R_16BF, kSize,
                       kComputeFloat, kDefaultAlgorithm),
                 "cublasGemmEx");
  }

 private:
  CublasGemm() = default;
  void allocate() {
    const uint64_t count = uint64_t{kSize} * kSize;
    for (DeviceBuffer* buffer : {&a_, &b_, &c_}) {
      *buffer = DeviceBuffer(count * sizeof(__nv_bfloat16));
      fill<<<kFillBlocks, kFillThreads>>>(buffer->as<__nv_bfloat16>(), count);
    }
    check_cuda(cudaGetLastError(), "filling the matrices");
    check_cuda(cudaDeviceSynchronize(), "filling the matrices");
  }

  void* handle_ = nullptr;
  CublasDestroy destroy_ = nullptr;
  CublasSetStream set_stream_ = nullptr;
  CublasGemmEx gemm_ = nullptr;
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
  std::unique_ptr<Gemm> gemm = CublasGemm::open();
  if (gemm == nullptr) {
    gemm = std::make_unique<KernelGemm>();
  }
  return gemm;
}

}  // namespace expertd::bench
