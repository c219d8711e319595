// SPDX-License-Identifier: Apache-2.0
// cuBLAS as far as the table needs it, and GEMMs of one size that need no library. Belongs to one thread at a time,
// whose device is current. Failures are thrown as std::runtime_error.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>

namespace expertd::bench {

class Gemm {
 public:
  static constexpr int kSize = 8192;

  /// cuBLAS when it can be loaded, else the kernel.
  static std::unique_ptr<Gemm> create();
  virtual ~Gemm() = default;
  virtual const char* kind() const = 0;
  virtual void enqueue(cudaStream_t stream) = 0;
};

}  // namespace expertd::bench
