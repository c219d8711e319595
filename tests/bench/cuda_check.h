// SPDX-License-Identifier: Apache-2.0
// Failures of CUDA calls as exceptions, for measurements. Any thread.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace expertd::bench {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + " (" + cudaGetErrorString(error) +
                             ")");
  }
}

}  // namespace expertd::bench
