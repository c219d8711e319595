// SPDX-License-Identifier: Apache-2.0
// An operation done by gathering, NCCL and scattering or adding, as its plan says. Belongs to a rank's thread, whose
// device is current; all ranks enqueue together. Failures are thrown as std::runtime_error.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "tests/bench/table/exchange_plan.h"
#include "tests/bench/table/nccl.h"

namespace expertd::bench {

/// Memory of the current device.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  explicit DeviceBuffer(uint64_t bytes);
  ~DeviceBuffer();
  DeviceBuffer(DeviceBuffer&& other) noexcept;
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept;

  template <typename T>
  static DeviceBuffer of(const std::vector<T>& values) {
    DeviceBuffer buffer(values.size() * sizeof(T));
    buffer.write(values.data(), values.size() * sizeof(T));
    return buffer;
  }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  uint8_t* at(uint64_t bytes) const { return static_cast<uint8_t*>(data_) + bytes; }

 private:
  void write(const void* data, uint64_t bytes);

  void* data_ = nullptr;
};

class Exchange {
 public:
  Exchange(const Nccl& nccl, uint32_t rank, ExchangePlan plan);

  void enqueue(cudaStream_t stream) const;
  /// Fills the input with what check() expects and poisons the rest. Blocks.
  void prepare() const;
  /// Output rows that are not what they must be, after enqueue() ended. Blocks.
  uint64_t wrong_rows() const;

 private:
  const Nccl& nccl_;
  const uint32_t rank_;
  const ExchangePlan plan_;
  DeviceBuffer input_, exchange_, output_, pack_, unpack_, terms_, weights_, origins_, wrong_;
};

}  // namespace expertd::bench
