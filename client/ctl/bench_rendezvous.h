// SPDX-License-Identifier: Apache-2.0
// Where the ranks' threads wait for each other, until one of them fails. Shared by all ranks.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

namespace expertd::ctl {

/// Thrown on the ranks that did not fail themselves.
struct BenchAborted {};

class BenchRendezvous {
 public:
  explicit BenchRendezvous(uint32_t parties)
      : parties_(parties), polls_(parties <= std::thread::hardware_concurrency() ? kPolls : 0) {}

  /// Returns on all ranks at about the same time: a short wait polls, because a wake-up of the kernel would be
  /// measured. More ranks than processors only take these from each other by polling, and from daemons beside them.
  void meet() {
    const uint32_t round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == parties_) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.fetch_add(1, std::memory_order_acq_rel);
      round_.notify_all();
    }
    // A round that an abort ends was loaded above before the abort, or the abort is seen here.
    if (aborted_.load(std::memory_order_acquire)) {
      throw BenchAborted{};
    }
    for (uint32_t poll = 0; poll < polls_ && round_.load(std::memory_order_acquire) == round; ++poll) {
      std::this_thread::yield();
    }
    round_.wait(round, std::memory_order_acquire);
    if (aborted_.load(std::memory_order_acquire)) {
      throw BenchAborted{};
    }
  }

  void abort() {
    aborted_.store(true, std::memory_order_release);
    round_.fetch_add(1, std::memory_order_acq_rel);
    round_.notify_all();
  }

 private:
  static constexpr uint32_t kPolls = 20000;

  const uint32_t parties_;
  const uint32_t polls_;
  std::atomic<uint32_t> arrived_ = 0;
  std::atomic<uint32_t> round_ = 0;
  std::atomic<bool> aborted_ = false;
};

}  // namespace expertd::ctl
