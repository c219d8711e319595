// SPDX-License-Identifier: Apache-2.0
// Waits and writes of words in a chain of copies, in order, collected for one submission. Loop thread; owns nothing.
#pragma once

#include <cuda.h>

#include <array>
#include <cstdint>

#include "daemon/base/limits.h"
#include "daemon/device/cuda/driver.h"

namespace expertd::device::cuda {

inline CUdeviceptr address_of(const void* word) {
  return reinterpret_cast<CUdeviceptr>(word);
}

class ChainWords {
 public:
  void wait(CUdeviceptr address, uint64_t value) {
    CUstreamBatchMemOpParams& entry = entries_[count_++];
    entry.waitValue.operation = CU_STREAM_MEM_OP_WAIT_VALUE_64;
    entry.waitValue.address = address;
    entry.waitValue.value64 = value;
    entry.waitValue.flags = CU_STREAM_WAIT_VALUE_GEQ;
  }
  void write(CUdeviceptr address, uint64_t value) {
    CUstreamBatchMemOpParams& entry = entries_[count_++];
    entry.writeValue.operation = CU_STREAM_MEM_OP_WRITE_VALUE_64;
    entry.writeValue.address = address;
    entry.writeValue.value64 = value;
    entry.writeValue.flags = CU_STREAM_WRITE_VALUE_DEFAULT;  // behind everything before it
  }
  bool send(const Driver& driver, CUstream stream) {
    return count_ == 0 || driver.cuStreamBatchMemOp(stream, count_, entries_.data(), 0) == CUDA_SUCCESS;
  }

 private:
  std::array<CUstreamBatchMemOpParams, 2 * base::kMaxGpuRanks + 8> entries_{};
  uint32_t count_ = 0;
};

}  // namespace expertd::device::cuda
