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

/// Holds all gates back at once, or none.
bool hold_all(std::span<LaunchGate> gates) {
  for (size_t i = 0; i < gates.size(); ++i) {
    if (!gates[i].hold_when_idle(kHoldNs)) {
      for (size_t held = 0; held < i; ++held) {
        gates[held].release();
      }
      return false;
    }
  }
  return true;
}

}  // namespace

bool LaunchGate::hold_when_idle(uint64_t limit_ns) {
  const uint64_t until_ns = base::now_ns() + limit_ns;
  held_.store(true, std::memory_order_seq_cst);
  while (in_flight_.load(std::memory_order_seq_cst) != 0) {
    if (base::now_ns() >= until_ns) {
      release();
      return false;
    }
    std::this_thread::yield();
  }
  return true;
}

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
      for (LaunchGate& gate : item.gates) {
        gate.release();
      }
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
