// SPDX-License-Identifier: Apache-2.0
#include "daemon/device/cuda/closer.h"

#include <chrono>

#include "daemon/base/clock.h"
#include "daemon/device/cuda/memory.h"

namespace expertd::device::cuda {
namespace {

// Launches are held back this long at most; a device that does not fall idle meanwhile is left alone for a while.
constexpr uint64_t kHoldNs = 2'000'000;
constexpr std::chrono::milliseconds kRetry(5);

void release_all(std::span<LaunchGate> gates) {
  for (LaunchGate& gate : gates) {
    gate.release();
  }
}

/// Holds launches back on all gates at once, because parts of one GPU wait for those of another, and waits until
/// nothing is in flight; false when that takes too long, and then nothing is held.
bool hold_all(std::span<LaunchGate> gates) {
  const uint64_t until_ns = base::now_ns() + kHoldNs;
  for (LaunchGate& gate : gates) {
    gate.hold();
  }
  for (const LaunchGate& gate : gates) {
    while (!gate.idle()) {
      if (base::now_ns() >= until_ns) {
        release_all(gates);
        return false;
      }
      std::this_thread::yield();
    }
  }
  return true;
}

}  // namespace

Closer::Closer(const Driver& driver, std::span<LaunchGate> gates)
    : driver_(driver), gates_(gates), thread_([this] { thread_main(); }) {}

Closer::~Closer() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  signal_.notify_all();
  thread_.join();
}

void Closer::add(const Item& item) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    items_.push_back(item);
  }
  signal_.notify_all();
}

void Closer::close_later(CUcontext context, CUdeviceptr address, LaunchGate* gate) {
  add({.context = context, .address = address, .gates = {gate, 1}});
}

void Closer::free_host_later(CUcontext context, void* host) {
  add({.context = context, .host = host, .gates = gates_});
}

void Closer::close(const Item& item) {
  const ScopedContext context(driver_, item.context);
  if (item.host != nullptr) {
    driver_.cuMemFreeHost(item.host);
  } else {
    driver_.cuIpcCloseMemHandle(item.address);
  }
}

void Closer::thread_main() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!stop_) {
    if (items_.empty()) {
      signal_.wait(lock);
      continue;
    }
    const Item item = items_.front();
    items_.pop_front();
    lock.unlock();
    const bool idle = hold_all(item.gates);
    if (idle) {
      close(item);
      release_all(item.gates);
    }
    lock.lock();
    if (!idle) {
      items_.push_back(item);
      signal_.wait_for(lock, kRetry, [this] { return stop_; });
    }
  }
  for (const Item& item : items_) {
    close(item);
  }
}

}  // namespace expertd::device::cuda
