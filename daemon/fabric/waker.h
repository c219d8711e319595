// SPDX-License-Identifier: Apache-2.0
// Waker: lets any thread wake a lane's thread, and costs a system call only while that one sleeps. Owned by the
// ProgressThread.
#pragma once

#include <sys/eventfd.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>

#include "daemon/base/fd.h"

namespace expertd::fabric {

class Waker {
 public:
  Waker() : event_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}

  bool valid() const { return event_.valid(); }
  int fd() const { return event_.get(); }

  /// Any thread, after it published what the lane's thread shall find.
  void wake() {
    // Pairs with the fence in sleep_begins(): either the thread sees what was published or this sees it sleeping.
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst)) {
      const uint64_t one = 1;
      (void)!::write(event_.get(), &one, sizeof(one));
    }
  }

  /// The lane's thread: between these it looks once more for work and then waits on fd().
  void sleep_begins() {
    sleeping_.store(true, std::memory_order_seq_cst);
    std::atomic_thread_fence(std::memory_order_seq_cst);
  }
  void sleep_ends() { sleeping_.store(false, std::memory_order_seq_cst); }
  void drain() {
    uint64_t count = 0;
    (void)!::read(event_.get(), &count, sizeof(count));
  }

 private:
  base::ScopedFd event_;
  alignas(128) std::atomic<bool> sleeping_{false};
};

}  // namespace expertd::fabric
