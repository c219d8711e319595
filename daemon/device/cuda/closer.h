// SPDX-License-Identifier: Apache-2.0
// Closer: closes IPC mappings and frees pinned memory when no stream that it could hang behind is parked. Measured
// (tests/device/facts.cu): while a stream waits for a word, cudaFree, cuMemFreeHost and cuIpcCloseMemHandle wait for
// it, and neither launches of other threads nor the copy that would release the stream get through. So a close first
// holds back launches on the device (pinned memory: on all devices), waits until no part is in flight, closes, and lets
// launches go on. A thread of its own, because that may take as long as a parked part's deadline; shared by the devices
// of the process.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <span>
#include <thread>

#include "daemon/device/cuda/driver.h"

namespace expertd::device::cuda {

/// Keeps launches and closes of one device apart. enter/leave: loop thread, never blocks.
class LaunchGate {
 public:
  /// False while a close holds launches back. A part entered counts as in flight until leave().
  bool try_enter() {
    in_flight_.fetch_add(1, std::memory_order_seq_cst);  // pairs with hold() and idle(): one of the two sees the other
    if (held_.load(std::memory_order_seq_cst)) {
      in_flight_.fetch_sub(1, std::memory_order_seq_cst);
      return false;
    }
    return true;
  }
  void leave() { in_flight_.fetch_sub(1, std::memory_order_seq_cst); }

  bool held() const { return held_.load(std::memory_order_seq_cst); }

  void hold() { held_.store(true, std::memory_order_seq_cst); }
  bool idle() const { return in_flight_.load(std::memory_order_seq_cst) == 0; }
  void release() { held_.store(false, std::memory_order_seq_cst); }

 private:
  std::atomic<uint32_t> in_flight_{0};
  std::atomic<bool> held_{false};
};

class Closer {
 public:
  /// `gates` are those of every device and live as long as the closer.
  Closer(const Driver& driver, std::span<LaunchGate> gates);
  /// Closes what is left without waiting: the process ends.
  ~Closer();
  Closer(const Closer&) = delete;
  Closer& operator=(const Closer&) = delete;

  /// Takes over a mapping of `context`; any control thread. `gate` lives as long as the process.
  void close_later(CUcontext context, CUdeviceptr address, LaunchGate* gate);
  /// Takes over pinned memory that any device may map; any control thread.
  void free_host_later(CUcontext context, void* host);

 private:
  struct Item {
    CUcontext context = nullptr;
    CUdeviceptr address = 0;
    void* host = nullptr;  // else an IPC mapping
    std::span<LaunchGate> gates;
  };
  void add(const Item& item);
  void thread_main();
  void close(const Item& item);

  const Driver& driver_;
  std::span<LaunchGate> gates_;
  std::mutex mutex_;
  std::condition_variable signal_;
  std::deque<Item> items_;  // bounded by the buffers and groups that sessions may hold
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace expertd::device::cuda
