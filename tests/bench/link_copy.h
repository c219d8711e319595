// SPDX-License-Identifier: Apache-2.0
// What one GPU copies to another, by its copy engines or by a kernel: the floor that operations are held against.
// Enqueued by one thread at a time whose current device is `from`; every copy can be verified. Failures are thrown as
// std::runtime_error.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace expertd::bench {

class LinkCopy {
 public:
  /// Ordinals of two GPUs that reach each other. Rounds `bytes` down to what the kernels copy.
  LinkCopy(int from, int to, uint64_t bytes);
  ~LinkCopy();
  LinkCopy(const LinkCopy&) = delete;
  LinkCopy& operator=(const LinkCopy&) = delete;

  uint64_t bytes() const { return bytes_; }

  void enqueue_copy_engine(cudaStream_t stream) const;
  /// A part of it, as the daemon copies.
  void enqueue_range(cudaStream_t stream, uint64_t first_byte, uint64_t bytes) const;
  /// Four independent loads of 16 bytes in flight per thread, then their stores over the link.
  void enqueue_kernel(cudaStream_t stream, uint32_t blocks) const;

  /// The two ends of a byte.
  CUdeviceptr source(uint64_t byte) const { return reinterpret_cast<CUdeviceptr>(source_) + byte; }
  CUdeviceptr target(uint64_t byte) const { return reinterpret_cast<CUdeviceptr>(target_) + byte; }

  /// Fills the source and poisons the target. Blocks.
  void prepare(uint64_t seed) const;
  /// Of the target, after a copy of what prepare(seed) wrote ended. Blocks.
  uint64_t wrong_words(uint64_t seed) const;

 private:
  const int from_;
  const int to_;
  const uint64_t bytes_;
  void* source_ = nullptr;     // on `from`
  void* target_ = nullptr;     // on `to`
  uint32_t* wrong_ = nullptr;  // on `to`
};

}  // namespace expertd::bench
