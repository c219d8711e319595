// SPDX-License-Identifier: Apache-2.0
// An allocation of exactly so many bytes on the current GPU, so that an access behind it is one that compute-sanitizer
// sees. Device tests only, one thread.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace expertd::device_test {

/// Memory of the GPU, all zero.
class Memory {
 public:
  explicit Memory(size_t bytes) {
    EXPECT_EQ(cudaSuccess, cudaMalloc(&data_, bytes));
    EXPECT_EQ(cudaSuccess, cudaMemset(data_, 0, bytes));
  }
  ~Memory() { cudaFree(data_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  template <typename T = char>
  T* at(uint64_t offset = 0) const {
    return reinterpret_cast<T*>(static_cast<char*>(data_) + offset);
  }
  template <typename T>
  void put(const std::vector<T>& values) {
    EXPECT_EQ(cudaSuccess, cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  template <typename T>
  std::vector<T> get(size_t count, uint64_t offset = 0) const {
    std::vector<T> values(count);
    EXPECT_EQ(cudaSuccess, cudaMemcpy(values.data(), at(offset), count * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  void* data_ = nullptr;
};

}  // namespace expertd::device_test
