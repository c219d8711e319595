// SPDX-License-Identifier: Apache-2.0
// A word of pinned host memory that streams of all GPUs wait for, so that what ranks enqueued starts at one host store.
// park() by each rank's thread, open() by one of them. Nothing that allocates, frees or loads a kernel for the first
// time may be called while a stream is parked: it would not come back.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>

namespace expertd::bench {

class Gate {
 public:
  /// A CUDA device is current. Throws std::runtime_error.
  Gate();
  ~Gate();
  Gate(const Gate&) = delete;
  Gate& operator=(const Gate&) = delete;

  /// `stream`, of the current device, goes on when round `round` is open.
  void park(cudaStream_t stream, uint32_t round) const;
  /// The word itself as the current device sees it, for a kernel that waits.
  uint32_t* device_word() const;
  /// `place`, as the device sees it, takes `value` when the stream got there.
  void write(cudaStream_t stream, uint32_t* place, uint32_t value) const;
  void open(uint32_t round);
  /// When the last open() was about to store, by the clock of now_ns().
  uint64_t opened_ns() const { return opened_ns_.load(std::memory_order_acquire); }
  /// Opens all rounds that ranks may have parked for, and says from which round on they are closed again.
  void open_all();
  uint32_t first_round() const { return first_round_.load(std::memory_order_acquire); }

 private:
  /// More than the rounds between two calls of open_all(), fewer than half of what 32 bits count.
  static constexpr uint32_t kRoundsMax = 1u << 20;

  uint32_t* word_ = nullptr;
  std::atomic<uint32_t> first_round_{1};
  std::atomic<uint64_t> opened_ns_{0};
  void* wait_value_ = nullptr;   // cuStreamWaitValue32
  void* write_value_ = nullptr;  // cuStreamWriteValue32
};

}  // namespace expertd::bench
