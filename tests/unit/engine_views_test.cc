// SPDX-License-Identifier: Apache-2.0
// A node of a group over several nodes whose masks are agreed on: which operations are held, which fail, and with what
// mask the others start.
#include <gtest/gtest.h>

#include <vector>

#include "daemon/engine/view_change.h"
#include "tests/support/fake_engine_group.h"

namespace expertd::test {
namespace {

using engine::View;

constexpr uint64_t kNow = 1;

/// Ranks 0 and 1 are here, 2 and 3 on another node.
class EngineViews : public ::testing::Test {
 protected:
  static engine::GroupSettings settings() {
    engine::GroupSettings settings = group_settings(4, true);
    auto placement = std::make_shared<engine::Placement>();
    placement->ranks_of = {{0, 1}, {2, 3}};
    placement->node_of = {0, 0, 1, 1};
    placement->index_of = {0, 1, 0, 1};
    settings.placement = placement;
    return settings;
  }

  EngineViews() : shared_(settings()), zero_(&shared_, 0, &wake_), one_(&shared_, 1, &wake_) {}

  uint64_t submit() {
    one_.submit();
    return zero_.submit();
  }
  void settle(uint64_t now_ns = kNow) {
    for (int turn = 0; turn < 20; ++turn) {
      (void)zero_.run(now_ns);
      (void)one_.run(now_ns);
    }
  }
  void finish() {
    zero_.port.finish_all();
    one_.port.finish_all();
    settle();
  }

  engine::GroupShared shared_;
  FakeWakePort wake_;
  FakeRank zero_;
  FakeRank one_;
};

TEST_F(EngineViews, HeldOperationsStartWithTheNextMask) {
  const uint64_t first = submit();
  settle();
  finish();
  EXPECT_EQ(zero_.completion(first).rank_mask, 0b1111U);
  EXPECT_EQ(shared_.hold(), 1U);
  const uint64_t second = submit();
  settle();
  EXPECT_EQ(zero_.port.parts().size(), 1U) << "nothing starts while they agree";
  shared_.install({.epoch = 2, .from = 2, .lost = base::RankSet(0b1000)}, false);
  settle();
  finish();
  ASSERT_TRUE(zero_.completed(second) && one_.completed(second));
  EXPECT_EQ(one_.completion(second).rank_mask, 0b0111U);
  EXPECT_EQ(one_.completion(second).epoch, 2U);
  EXPECT_NE(one_.completion(second).flags & EXPERTD_COMPLETION_DEGRADED, 0U);
}

TEST_F(EngineViews, AnOperationBeforeTheViewKeepsTheOlderMask) {
  (void)shared_.hold();
  shared_.install({.epoch = 2, .from = 2, .lost = {}, .excluded = base::RankSet(0b0100)}, false);
  const uint64_t first = submit();
  const uint64_t second = submit();
  settle();
  finish();
  finish();
  EXPECT_EQ(zero_.completion(first).rank_mask, 0b1111U);
  EXPECT_EQ(zero_.completion(first).epoch, 1U);
  EXPECT_EQ(zero_.completion(second).rank_mask, 0b1011U);
}

TEST_F(EngineViews, OneThatNeedsALostRankFailsAtOnce) {
  const uint64_t first = submit();
  shared_.set_lost(2);
  settle();
  EXPECT_FALSE(zero_.completed(first)) << "the next view may leave the rank out";
  // Another node had started operation 1 already.
  shared_.install({.epoch = 2, .from = 2, .lost = base::RankSet(0b0100)}, false);
  settle();
  ASSERT_TRUE(zero_.completed(first) && one_.completed(first));
  EXPECT_EQ(zero_.reason(first), uint32_t{EXPERTD_REASON_PEER_LOST});
  EXPECT_EQ(zero_.completion(first).rank, 2);
}

TEST_F(EngineViews, OneThatTheLostRankWasThroughWithRuns) {
  const uint64_t first = submit();
  shared_.set_lost(2, 1);
  shared_.install({.epoch = 2, .from = 2, .lost = base::RankSet(0b0100)}, false);
  settle();
  finish();
  ASSERT_TRUE(zero_.completed(first));
  EXPECT_EQ(zero_.reason(first), 0U);
  EXPECT_EQ(zero_.completion(first).rank_mask, 0b1111U);
}

TEST_F(EngineViews, ARunningOneIsAborted) {
  const uint64_t first = submit();
  settle();
  shared_.set_lost(3);
  settle();
  finish();
  ASSERT_TRUE(zero_.completed(first));
  EXPECT_EQ(zero_.reason(first), uint32_t{EXPERTD_REASON_PEER_LOST});
  EXPECT_EQ(zero_.completion(first).rank, 3);
}

TEST_F(EngineViews, OneThatWasDecidedAndNotLaunchedIsNotLaunchedAnyMore) {
  zero_.port.full = true;
  one_.port.full = true;
  const uint64_t first = submit();
  settle();
  EXPECT_EQ(shared_.hold(), 1U) << "decided";
  shared_.set_lost(3);
  zero_.port.full = false;
  one_.port.full = false;
  settle();
  EXPECT_TRUE(zero_.port.parts().empty());
  EXPECT_EQ(zero_.reason(first), uint32_t{EXPERTD_REASON_PEER_LOST});
  EXPECT_EQ(zero_.completion(first).rank, 3);
}

TEST_F(EngineViews, ALossBehindTheViewHoldsAgain) {
  shared_.set_lost(3);
  shared_.set_lost(2);
  shared_.install({.epoch = 2, .from = 1, .lost = base::RankSet(0b1000)}, false);
  const uint64_t first = submit();
  settle();
  EXPECT_FALSE(zero_.completed(first));
  shared_.install({.epoch = 3, .from = 1, .lost = base::RankSet(0b1100)}, false);
  settle();
  finish();
  EXPECT_EQ(zero_.completion(first).rank_mask, 0b0011U);
  EXPECT_EQ(zero_.completion(first).epoch, 3U);
}

TEST_F(EngineViews, ALostRankOfThisNodeIsLeftOutFromTheViewOn) {
  shared_.set_lost(1);
  const uint64_t first = zero_.submit();
  settle();
  EXPECT_FALSE(zero_.completed(first));
  shared_.install({.epoch = 2, .from = 1, .lost = base::RankSet(0b0010)}, false);
  settle();
  finish();
  EXPECT_EQ(zero_.completion(first).rank_mask, 0b1101U);
}

TEST_F(EngineViews, TheDeadlineEndsWhatIsHeld) {
  const uint64_t first = submit();
  (void)shared_.hold();
  settle(kDeadlineNs);
  EXPECT_EQ(zero_.reason(first), uint32_t{EXPERTD_REASON_TIMEOUT});
}

TEST_F(EngineViews, WithoutTheOthersEverythingEnds) {
  const uint64_t first = submit();
  shared_.end_views();
  settle();
  EXPECT_EQ(zero_.reason(first), uint32_t{EXPERTD_REASON_PEER_LOST});
  EXPECT_EQ(zero_.completion(first).rank, 2);
  const uint64_t second = submit();
  settle();
  EXPECT_EQ(one_.reason(second), uint32_t{EXPERTD_REASON_PEER_LOST});
}

TEST_F(EngineViews, WhoseRanksAreAllExcludedHasNobodyToWaitFor) {
  (void)shared_.hold();
  shared_.install({.epoch = 2, .from = 1, .lost = {}, .excluded = base::RankSet(0b0011)}, false);
  const uint64_t first = submit();
  settle();
  EXPECT_EQ(zero_.reason(first), uint32_t{EXPERTD_REASON_BAD_STATE});
  EXPECT_EQ(shared_.hold(), 1U) << "readmitted, they begin behind it";
}

TEST_F(EngineViews, ViewsThatAreNotKeptHaveNobody) {
  for (uint64_t epoch = 2; epoch < 100; ++epoch) {
    shared_.install({.epoch = epoch, .from = epoch, .lost = {}, .excluded = {}}, false);
  }
  EXPECT_EQ(shared_.view_of(99).epoch, 99U);
  EXPECT_EQ(shared_.view_of(40).epoch, 40U);
  EXPECT_EQ(shared_.view_of(3).lost, base::RankSet(0b1111));
  const uint64_t first = submit();
  settle();
  EXPECT_EQ(zero_.reason(first), uint32_t{EXPERTD_REASON_PEER_LOST});
}

}  // namespace
}  // namespace expertd::test
