// SPDX-License-Identifier: Apache-2.0
// A group that goes over to its successor while its ranks submit: which operation is the last, what follows in the
// successor, and that nothing fails on the way.
#include <gtest/gtest.h>

#include <memory>

#include "tests/support/fake_engine_group.h"

namespace expertd::test {
namespace {

constexpr uint64_t kNow = 1;

engine::Request beginning(bool begins = true) {
  engine::Request request = plain_request();
  request.begins = begins;
  return request;
}

engine::GroupSettings successor_settings(uint32_t ranks) {
  engine::GroupSettings settings = group_settings(ranks, true);
  settings.shape.id = base::GroupId{8};
  settings.epoch_base = uint64_t{1} << 32;
  return settings;
}

/// Of three ranks the last one is lost, and comes back to the successor.
class EngineSuccessor : public ::testing::Test {
 protected:
  EngineSuccessor() : group_(3, true), next_(std::make_shared<engine::GroupShared>(successor_settings(3))) {
    group_.end_session(2, kNow);
    EXPECT_TRUE(group_.settle(kNow));
    back_ = std::make_unique<FakeRank>(next_.get(), 2, &group_.wake);
  }

  uint64_t submit(const engine::Request& request) {
    group_[0].submit(request);
    return group_[1].submit(request);
  }
  void settle() {
    for (int turn = 0; turn < 20; ++turn) {
      (void)group_[0].run(kNow);
      (void)group_[1].run(kNow);
      (void)back_->run(kNow);
    }
  }
  void finish() {
    group_[0].port.finish_all();
    group_[1].port.finish_all();
    back_->port.finish_all();
    settle();
  }

  FakeGroup group_;
  std::shared_ptr<engine::GroupShared> next_;
  std::unique_ptr<FakeRank> back_;
};

TEST_F(EngineSuccessor, TheFirstOperationThatBeginsIsTheSuccessorsFirst) {
  const uint64_t dispatch = submit(beginning());
  settle();
  group_.shared.go_over_to(next_);
  const uint64_t combine = submit(beginning(false));
  settle();
  finish();
  EXPECT_EQ(group_[0].completion(combine).rank_mask, 0b011U) << "between a dispatch and its combine nobody comes in";
  EXPECT_EQ(group_.shared.moved_from(), 0U);
  const uint64_t first = submit(beginning());
  const uint64_t second = submit(beginning(false));
  settle();
  EXPECT_EQ(group_.shared.moved_from(), 3U);
  EXPECT_FALSE(group_[0].completed(first)) << "it waits for the rank that comes back";
  const uint64_t own = back_->submit(beginning());
  back_->submit(beginning(false));
  settle();
  finish();
  finish();
  for (const uint64_t seq : {dispatch, combine, first, second}) {
    EXPECT_EQ(group_[0].reason(seq), EXPERTD_REASON_NONE);
    EXPECT_EQ(group_[1].reason(seq), EXPERTD_REASON_NONE);
  }
  EXPECT_EQ(group_[0].completion(first).rank_mask, 0b111U);
  EXPECT_EQ(group_[0].completion(first).flags & EXPERTD_COMPLETION_DEGRADED, 0U);
  EXPECT_EQ(group_[0].completion(first).group_op, 1U);
  EXPECT_EQ(group_[1].completion(second).group_op, 2U);
  EXPECT_GT(group_[0].completion(first).epoch, group_[0].completion(combine).epoch);
  EXPECT_EQ(back_->completion(own).rank_mask, 0b111U);
  EXPECT_TRUE(group_.shared.has_gone_over(0) && group_.shared.has_gone_over(1));
  EXPECT_TRUE(group_.shared.quiet(0) && group_.shared.quiet(1));
}

TEST_F(EngineSuccessor, WhatIsSubmittedLaterGoesToTheSuccessorAtOnce) {
  group_.shared.go_over_to(next_);
  const uint64_t first = submit(beginning());
  settle();
  EXPECT_EQ(group_[0].state()->group, next_.get());
  EXPECT_EQ(group_[0].state()->next_number, 2U);
  EXPECT_EQ(group_[0].state()->before.value, 7U);
  EXPECT_EQ(group_[0].state()->before_from, 1U);
  const uint64_t second = submit(beginning(false));
  back_->submit(beginning());
  back_->submit(beginning(false));
  settle();
  finish();
  finish();
  EXPECT_EQ(group_[0].completion(first).rank_mask, 0b111U);
  EXPECT_EQ(group_[0].completion(second).rank_mask, 0b111U);
}

TEST_F(EngineSuccessor, OneRankThatBeginsNothingKeepsAllWhereTheyAre) {
  group_.shared.go_over_to(next_);
  group_[0].submit(beginning());
  const uint64_t seq = group_[1].submit(beginning(false));
  settle();
  finish();
  EXPECT_EQ(group_[1].completion(seq).rank_mask, 0b011U);
  EXPECT_EQ(group_.shared.moved_from(), 0U);
}

TEST_F(EngineSuccessor, NobodyGoesOverWhileARankIsExcluded) {
  group_.shared.change_excluded(base::RankSet(0b100), {});
  group_.shared.go_over_to(next_);
  const uint64_t seq = submit(beginning());
  settle();
  finish();
  EXPECT_EQ(group_[0].completion(seq).rank_mask, 0b011U);
  group_.shared.change_excluded({}, base::RankSet(0b100));
  submit(beginning());
  settle();
  EXPECT_EQ(group_.shared.moved_from(), 2U);
}

TEST_F(EngineSuccessor, AHandleThatStaysBehindIsRefusedByName) {
  submit(beginning());
  settle();
  finish();
  group_.shared.go_over_to(next_);
  submit(beginning());
  engine::Request cached = beginning(false);
  cached.handle_made = 1;
  const uint64_t stale = submit(cached);
  cached.handle_made = 2;
  const uint64_t fresh = submit(cached);
  settle();
  for (int i = 0; i < 3; ++i) {
    back_->submit(beginning(i == 0));
  }
  for (int i = 0; i < 3; ++i) {
    settle();
    finish();
  }
  EXPECT_EQ(group_[0].reason(stale), EXPERTD_REASON_STALE_HANDLE);
  EXPECT_EQ(group_[0].reason(fresh), EXPERTD_REASON_NONE);
}

TEST_F(EngineSuccessor, WhoStaysGoesOnAsBefore) {
  group_.shared.go_over_to(next_);
  group_.shared.stay();
  const uint64_t seq = submit(beginning());
  settle();
  finish();
  EXPECT_EQ(group_[0].completion(seq).rank_mask, 0b011U);
}

TEST_F(EngineSuccessor, ARankThatIsLostThereIsLeftOutThere) {
  group_.shared.go_over_to(next_);
  const uint64_t first = submit(beginning());
  settle();
  group_.shared.set_lost(1);
  next_->set_lost(1);
  group_[1].close(kNow);
  back_->submit(beginning());
  settle();
  finish();
  EXPECT_EQ(group_[0].reason(first), EXPERTD_REASON_NONE);
  EXPECT_EQ(group_[0].completion(first).rank_mask, 0b101U);
}

/// Ranks 0 and 1 of four are here, 2 and 3 on another node: where to go over is agreed on.
TEST(EngineSuccessorViews, HoldsWhereItCouldGoOverUntilTheViewIsThere) {
  engine::GroupSettings settings = group_settings(4, true);
  auto placement = std::make_shared<engine::Placement>();
  placement->ranks_of = {{0, 1}, {2, 3}};
  placement->node_of = {0, 0, 1, 1};
  placement->index_of = {0, 1, 0, 1};
  settings.placement = placement;
  engine::GroupShared shared(settings);
  engine::GroupSettings after = settings;
  after.shape.id = base::GroupId{8};
  const auto next = std::make_shared<engine::GroupShared>(after);
  FakeWakePort wake;
  FakeRank zero(&shared, 0, &wake);
  FakeRank one(&shared, 1, &wake);
  const auto settle = [&] {
    for (int turn = 0; turn < 20; ++turn) {
      (void)zero.run(kNow);
      (void)one.run(kNow);
    }
  };
  const auto submit = [&](bool begins) {
    one.submit(beginning(begins));
    return zero.submit(beginning(begins));
  };
  shared.go_over_to(next);
  submit(false);
  submit(true);
  submit(false);
  settle();
  EXPECT_EQ(shared.held_at(), 2U);
  EXPECT_EQ(shared.last_decided(), 1U);
  EXPECT_EQ(zero.port.parts().size(), 1U);
  // Another node had passed it: an ordinary view, and the next place is behind that.
  EXPECT_EQ(shared.hold(), 1U);
  shared.install({.epoch = 2, .from = 4}, false);
  settle();
  EXPECT_EQ(shared.held_at(), 0U);
  EXPECT_EQ(zero.port.parts().size(), 3U);
  submit(true);
  settle();
  EXPECT_EQ(shared.held_at(), 4U);
  shared.move_over(4);
  settle();
  EXPECT_EQ(zero.state()->group, next.get());
  EXPECT_EQ(next->last_decided(), 1U);
}

}  // namespace
}  // namespace expertd::test
