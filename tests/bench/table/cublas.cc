// SPDX-License-Identifier: Apache-2.0
#include "tests/bench/table/cublas.h"

#include <dlfcn.h>
#include <library_types.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "tests/bench/cuda_check.h"

namespace expertd::bench {

namespace {

// Of cublas_api.h, by value.
constexpr int kComputeFloat = 68;  // CUBLAS_COMPUTE_32F
constexpr int kDefaultAlgorithm = -1;
constexpr int kNotTransposed = 0;
constexpr int kTransposed = 1;

/// What cuBLAS takes by itself on compute capability 9.
constexpr size_t kWorkspaceBytes = 32 << 20;

void check(int status, const char* what) {
  if (status != 0) {
    throw std::runtime_error(std::string(what) + ": status " + std::to_string(status));
  }
}

void* open_library() {
  if (const char* const given = std::getenv("EXPERTD_CUBLAS_LIBRARY"); given != nullptr) {
    return dlopen(given, RTLD_NOW | RTLD_LOCAL);
  }
  void* const newer = dlopen("libcublas.so.13", RTLD_NOW | RTLD_LOCAL);
  return newer != nullptr ? newer : dlopen("libcublas.so.12", RTLD_NOW | RTLD_LOCAL);
}

int as_int(uint64_t value) {
  return static_cast<int>(value);
}

long long as_stride(uint64_t value) {
  return static_cast<long long>(value);
}

}  // namespace

struct Cublas::Functions {
  int (*create)(void**) = nullptr;
  int (*destroy)(void*) = nullptr;
  int (*set_stream)(void*, cudaStream_t) = nullptr;
  int (*set_workspace)(void*, void*, size_t) = nullptr;
  int (*gemm)(void*, int, int, int, int, int, const void*, const void*, cudaDataType, int, const void*, cudaDataType,
              int, const void*, void*, cudaDataType, int, int, int) = nullptr;
  int (*gemm_batch)(void*, int, int, int, int, int, const void*, const void*, cudaDataType, int, long long, const void*,
                    cudaDataType, int, long long, const void*, void*, cudaDataType, int, long long, int, int,
                    int) = nullptr;
};

Cublas::Cublas() : functions_(std::make_unique<Functions>()) {}

std::unique_ptr<Cublas> Cublas::open() {
  void* const library = open_library();  // stays loaded: it keeps exit handlers of its own
  if (library == nullptr) {
    return nullptr;
  }
  std::unique_ptr<Cublas> cublas(new Cublas());
  Functions& f = *cublas->functions_;
  const auto find = [&](auto* function, const char* name) {
    using Function = std::remove_pointer_t<decltype(function)>;
    *function = reinterpret_cast<Function>(dlsym(library, name));
    return *function != nullptr;
  };
  const bool complete = find(&f.create, "cublasCreate_v2") && find(&f.destroy, "cublasDestroy_v2") &&
                        find(&f.set_stream, "cublasSetStream_v2") && find(&f.set_workspace, "cublasSetWorkspace_v2") &&
                        find(&f.gemm, "cublasGemmEx") && find(&f.gemm_batch, "cublasGemmStridedBatchedEx");
  if (!complete) {
    return nullptr;
  }
  check(f.create(&cublas->handle_), "cublasCreate");
  return cublas;
}

Cublas::~Cublas() {
  if (handle_ != nullptr) {
    static_cast<void>(functions_->destroy(handle_));  // nothing could be done about a failure
  }
  static_cast<void>(cudaFree(workspace_));
}

void Cublas::keep_workspace() {
  if (workspace_ == nullptr) {
    check_cuda(cudaMalloc(&workspace_, kWorkspaceBytes), "cudaMalloc");
  }
}

// The change of a stream takes the workspace away.
void Cublas::use_stream(cudaStream_t stream) const {
  check(functions_->set_stream(handle_, stream), "cublasSetStream");
  if (workspace_ != nullptr) {
    check(functions_->set_workspace(handle_, workspace_, kWorkspaceBytes), "cublasSetWorkspace");
  }
}

// Column-major, as cuBLAS is, a row-major matrix is its transpose: what is computed is the product's transpose.
void Cublas::multiply(const Product& it, cudaStream_t stream) const {
  const float one = 1.0f;
  const float zero = 0.0f;
  use_stream(stream);
  check(functions_->gemm(handle_, kTransposed, kNotTransposed, as_int(it.columns), as_int(it.rows), as_int(it.inner),
                         &one, it.right, CUDA_R_16BF, as_int(it.inner), it.left, CUDA_R_16BF, as_int(it.inner), &zero,
                         it.product, CUDA_R_16BF, as_int(it.columns), kComputeFloat, kDefaultAlgorithm),
        "cublasGemmEx");
}

void Cublas::multiply_batch(const Product& first, const BatchStrides& strides, uint32_t count,
                            cudaStream_t stream) const {
  const float one = 1.0f;
  const float zero = 0.0f;
  use_stream(stream);
  check(functions_->gemm_batch(handle_, kTransposed, kNotTransposed, as_int(first.columns), as_int(first.rows),
                               as_int(first.inner), &one, first.right, CUDA_R_16BF, as_int(first.inner),
                               as_stride(strides.right), first.left, CUDA_R_16BF, as_int(first.inner),
                               as_stride(strides.left), &zero, first.product, CUDA_R_16BF, as_int(first.columns),
                               as_stride(strides.product), as_int(count), kComputeFloat, kDefaultAlgorithm),
        "cublasGemmStridedBatchedEx");
}

}  // namespace expertd::bench
