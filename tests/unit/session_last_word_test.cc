// SPDX-License-Identifier: Apache-2.0
// Why the process ends, as the rings of its sessions tell their clients.
#include <gtest/gtest.h>

#include <memory>
#include <thread>
#include <vector>

#include "daemon/session/last_word.h"

namespace expertd::session {
namespace {

std::shared_ptr<RingMemory> make_ring(uint64_t session) {
  return std::move(RingMemory::create(base::SessionId{session}, 1, 8)).value();
}

TEST(LastWord, IsInEveryRingAndClosesItsSession) {
  LastWord word;
  const auto first = make_ring(1);
  const auto second = make_ring(2);
  word.add(base::SessionId{1}, first);
  word.add(base::SessionId{2}, second);
  EXPECT_EQ(first->header()->end_reason, 0U);
  const uint32_t futex = first->header()->completion_futex;
  word.say(EXPERTD_REASON_GPU_LOST);
  for (const auto& ring : {first, second}) {
    EXPECT_EQ(ring->header()->end_reason, static_cast<uint32_t>(EXPERTD_REASON_GPU_LOST));
    EXPECT_EQ(ring->header()->session_flags, static_cast<uint32_t>(EXPERTD_SESSION_CLOSED));
  }
  EXPECT_NE(first->header()->completion_futex, futex) << "a waiter that read the old word would sleep on";
  EXPECT_EQ(word.said(), EXPERTD_REASON_GPU_LOST);
}

TEST(LastWord, IsSaidOnce) {
  LastWord word;
  const auto ring = make_ring(1);
  word.add(base::SessionId{1}, ring);
  word.say(EXPERTD_REASON_GPU_LOST);
  word.say(EXPERTD_REASON_INTERNAL);
  EXPECT_EQ(ring->header()->end_reason, static_cast<uint32_t>(EXPERTD_REASON_GPU_LOST));
  EXPECT_EQ(word.said(), EXPERTD_REASON_GPU_LOST);
}

TEST(LastWord, ReachesASessionThatComesAfterIt) {
  LastWord word;
  word.say(EXPERTD_REASON_GPU_LOST);
  const auto late = make_ring(3);
  word.add(base::SessionId{3}, late);
  EXPECT_EQ(late->header()->end_reason, static_cast<uint32_t>(EXPERTD_REASON_GPU_LOST));
}

TEST(LastWord, LeavesARingAloneThatItsSessionHasGivenBack) {
  LastWord word;
  auto ring = make_ring(1);
  word.add(base::SessionId{1}, ring);
  const std::weak_ptr<RingMemory> held = ring;
  ring.reset();
  EXPECT_TRUE(held.expired()) << "the word keeps no memory of a session that ended";
  word.say(EXPERTD_REASON_GPU_LOST);
}

TEST(LastWord, MissesNoSessionThatBeginsMeanwhile) {
  for (int round = 0; round < 200; ++round) {
    LastWord word;
    std::vector<std::shared_ptr<RingMemory>> rings;
    for (uint64_t i = 1; i <= 4; ++i) {
      rings.push_back(make_ring(i));
    }
    std::thread speaker([&] { word.say(EXPERTD_REASON_GPU_LOST); });
    for (uint64_t i = 1; i <= 4; ++i) {
      word.add(base::SessionId{i}, rings[i - 1]);
    }
    speaker.join();
    for (const auto& ring : rings) {
      ASSERT_EQ(ring->header()->end_reason, static_cast<uint32_t>(EXPERTD_REASON_GPU_LOST)) << "round " << round;
    }
  }
}

}  // namespace
}  // namespace expertd::session
