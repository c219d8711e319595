// SPDX-License-Identifier: Apache-2.0
// cuBLAS as far as the table needs it, loaded at run time because it may not be there: $EXPERTD_CUBLAS_LIBRARY, else
// libcublas.so.13 or .12. For the device that is current when it is opened, by one thread at a time. Failures are
// thrown as std::runtime_error.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <vector>

namespace expertd::bench {

/// product [rows, columns] = left [rows, inner] * right [columns, inner] transposed; all BF16 and row-major, sums in
/// float32.
struct Product {
  uint32_t rows = 0;
  uint32_t columns = 0;
  uint32_t inner = 0;
  const void* left = nullptr;
  const void* right = nullptr;
  void* product = nullptr;
};

/// Elements from one product of a batch to the next.
struct BatchStrides {
  uint64_t left = 0;
  uint64_t right = 0;
  uint64_t product = 0;
};

class Cublas {
 public:
  /// Null when there is no library.
  static std::unique_ptr<Cublas> open();
  ~Cublas();
  Cublas(const Cublas&) = delete;
  Cublas& operator=(const Cublas&) = delete;

  /// Gives it memory of its own, so that products can be captured: else each of them would allocate within the graph.
  void keep_workspace();

  void multiply(const Product& it, cudaStream_t stream) const;
  /// `count` products of one size.
  void multiply_batch(const Product& first, const BatchStrides& strides, uint32_t count, cudaStream_t stream) const;

 private:
  struct Functions;

  Cublas();

  void use_stream(cudaStream_t stream) const;

  std::unique_ptr<Functions> functions_;
  void* workspace_ = nullptr;
  void* handle_ = nullptr;
};

}  // namespace expertd::bench
