// SPDX-License-Identifier: Apache-2.0
// Mailbox: values that threads leave for one other. It locks and allocates, so only what is rare goes through it, such
// as the end of a connection; to look whether there is anything costs a load. What is put is bounded by its kind
// (crossing.h), and whoever puts wakes the other thread afterwards. Owned by Fabric.
#pragma once

#include <atomic>
#include <mutex>
#include <utility>
#include <vector>

namespace expertd::fabric {

template <typename T>
class Mailbox {
 public:
  /// Any thread.
  void put(T value) {
    const std::lock_guard<std::mutex> lock(mutex_);
    values_.push_back(std::move(value));
    there_.store(true, std::memory_order_seq_cst);
  }

  /// Its thread, from here on. Sequentially consistent, so that a thread that announces its sleep and then looks (the
  /// Waker's protocol) does not sleep over a value.
  bool empty() const { return !there_.load(std::memory_order_seq_cst); }
  /// All of them, in the order in which they were put.
  std::vector<T> take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    there_.store(false, std::memory_order_seq_cst);
    return std::exchange(values_, {});
  }

 private:
  std::atomic<bool> there_{false};
  std::mutex mutex_;
  std::vector<T> values_;
};

}  // namespace expertd::fabric
