// SPDX-License-Identifier: Apache-2.0
// The queue between a rank's loop and the fabric thread, and the flag by which one wakes the other. Also run under
// ThreadSanitizer.
#include "daemon/fabric/spsc_queue.h"

#include <gtest/gtest.h>
#include <poll.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "daemon/fabric/waker.h"

namespace expertd::fabric {
namespace {

TEST(FabricSpscQueue, GivesBackInOrderAndRefusesWhenFull) {
  SpscQueue<uint32_t> queue(3);
  ASSERT_EQ(queue.capacity(), 4U);
  uint32_t element = 0;
  EXPECT_TRUE(queue.empty());
  EXPECT_FALSE(queue.pop(&element));
  for (uint32_t round = 0; round < 10; ++round) {
    for (uint32_t i = 0; i < 4; ++i) {
      EXPECT_TRUE(queue.push(round * 4 + i));
    }
    EXPECT_FALSE(queue.push(99));
    EXPECT_FALSE(queue.empty());
    for (uint32_t i = 0; i < 4; ++i) {
      ASSERT_TRUE(queue.pop(&element));
      EXPECT_EQ(element, round * 4 + i);
    }
    EXPECT_FALSE(queue.pop(&element));
  }
}

TEST(FabricSpscQueue, OneElementIsRoomEnough) {
  SpscQueue<uint32_t> queue(0);
  uint32_t element = 0;
  for (uint32_t i = 0; i < 5; ++i) {
    EXPECT_TRUE(queue.push(i));
    EXPECT_FALSE(queue.push(i));
    ASSERT_TRUE(queue.pop(&element));
    EXPECT_EQ(element, i);
  }
}

// What is written before the push is seen after the pop, in both directions: a buffer goes round between two threads.
TEST(FabricSpscQueue, HandsMemoryOverBetweenThreads) {
  constexpr uint32_t kBuffers = 4;
  constexpr uint64_t kMessages = 20'000;
  SpscQueue<uint32_t> forth(kBuffers);
  SpscQueue<uint32_t> back(kBuffers);
  uint64_t memory[kBuffers] = {};
  for (uint32_t i = 0; i < kBuffers; ++i) {
    ASSERT_TRUE(back.push(i));
  }
  std::atomic<bool> give_up{false};
  std::thread producer([&] {
    for (uint64_t i = 1; i <= kMessages && !give_up.load(std::memory_order_relaxed);) {
      uint32_t id = 0;
      if (back.pop(&id)) {
        memory[id] = i++;
        EXPECT_TRUE(forth.push(id));
      } else {
        std::this_thread::yield();
      }
    }
  });
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  uint64_t seen = 0;
  while (seen < kMessages && std::chrono::steady_clock::now() < deadline) {
    uint32_t id = 0;
    if (!forth.pop(&id)) {
      std::this_thread::yield();
      continue;
    }
    ASSERT_EQ(memory[id], ++seen);
    EXPECT_TRUE(back.push(id));
  }
  give_up = true;
  producer.join();
  EXPECT_EQ(seen, kMessages);
}

// The consumer sleeps whenever it finds nothing; were one wake-up lost, it would sleep until its poll times out.
TEST(FabricWaker, LosesNoWakeUp) {
  constexpr uint32_t kMessages = 5'000;
  SpscQueue<uint32_t> queue(2);
  Waker waker;
  ASSERT_TRUE(waker.valid());
  std::atomic<uint32_t> taken{0};
  std::atomic<bool> give_up{false};
  std::thread producer([&] {
    for (uint32_t i = 0; i < kMessages && !give_up.load(std::memory_order_relaxed); ++i) {
      while (taken.load(std::memory_order_acquire) < i && !give_up.load(std::memory_order_relaxed)) {
        std::this_thread::yield();
      }
      EXPECT_TRUE(queue.push(i));
      waker.wake();
    }
  });
  uint32_t timeouts = 0;
  while (taken.load(std::memory_order_relaxed) < kMessages && timeouts == 0) {
    uint32_t element = 0;
    if (queue.pop(&element)) {
      taken.fetch_add(1, std::memory_order_release);
      continue;
    }
    waker.sleep_begins();
    if (queue.empty()) {
      pollfd event{waker.fd(), POLLIN, 0};
      timeouts += ::poll(&event, 1, 20'000) == 0 ? 1 : 0;
      waker.drain();
    }
    waker.sleep_ends();
  }
  give_up = true;
  producer.join();
  EXPECT_EQ(timeouts, 0U);
  EXPECT_EQ(taken.load(), kMessages);
}

}  // namespace
}  // namespace expertd::fabric
