// SPDX-License-Identifier: Apache-2.0
// SpscQueue: a bounded queue between one producer thread and one consumer thread; neither blocks, allocates or locks.
// Storage is taken once, by create(), before either thread uses it. Owned by a GroupChannel.
#pragma once

#include <atomic>
#include <bit>
#include <cstdint>
#include <vector>

namespace expertd::fabric {

template <typename T>
class SpscQueue {
 public:
  /// Room for at least `capacity` elements.
  explicit SpscQueue(uint32_t capacity)
      : elements_(std::bit_ceil(capacity == 0 ? 1U : capacity)), mask_(elements_.size() - 1) {}
  SpscQueue(const SpscQueue&) = delete;
  SpscQueue& operator=(const SpscQueue&) = delete;

  /// Producer. False when it is full.
  bool push(const T& element) {
    const uint64_t tail = tail_.load(std::memory_order_relaxed);
    if (tail - head_seen_ == elements_.size()) {
      // Pairs with the store in pop(): the consumer has read the element before its place is written again.
      head_seen_ = head_.load(std::memory_order_acquire);
      if (tail - head_seen_ == elements_.size()) {
        return false;
      }
    }
    elements_[tail & mask_] = element;
    tail_.store(tail + 1, std::memory_order_release);  // publishes the element to pop()
    return true;
  }

  /// Consumer. False when there is nothing.
  bool pop(T* element) {
    const uint64_t head = head_.load(std::memory_order_relaxed);
    if (head == tail_seen_) {
      // Pairs with the store in push().
      tail_seen_ = tail_.load(std::memory_order_acquire);
      if (head == tail_seen_) {
        return false;
      }
    }
    *element = elements_[head & mask_];
    head_.store(head + 1, std::memory_order_release);  // gives the place back to push()
    return true;
  }

  /// Consumer: what pop() would give; null: nothing. Valid until that.
  const T* front() {
    const uint64_t head = head_.load(std::memory_order_relaxed);
    if (head == tail_seen_) {
      tail_seen_ = tail_.load(std::memory_order_acquire);  // pairs with the store in push()
    }
    return head == tail_seen_ ? nullptr : &elements_[head & mask_];
  }

  /// Consumer: whether pop() would give something.
  bool empty() const {
    return head_.load(std::memory_order_relaxed) == tail_.load(std::memory_order_seq_cst);  // with the sleepers' fence
  }

  uint32_t capacity() const { return static_cast<uint32_t>(elements_.size()); }

 private:
  static constexpr size_t kLineBytes = 128;  // two lines: the adjacent-line prefetcher couples them

  std::vector<T> elements_;
  uint64_t mask_;
  alignas(kLineBytes) std::atomic<uint64_t> tail_{0};  // of the producer
  uint64_t head_seen_ = 0;
  alignas(kLineBytes) std::atomic<uint64_t> head_{0};  // of the consumer
  uint64_t tail_seen_ = 0;
};

}  // namespace expertd::fabric
