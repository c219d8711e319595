// SPDX-License-Identifier: Apache-2.0
// Groups with on_rank_loss = mask: what the ranks that are left compute, bit for bit, and masks by request.
#include <gtest/gtest.h>

#include "tests/integration/moe_case.h"
#include "tests/support/daemon_process.h"

namespace expertd::support {
namespace {

using kernels::OpKind;

class Masked : public ::testing::Test {
 protected:
  void SetUp() override { ASSERT_TRUE(daemon_.start()); }

  /// A group of the case in which these ranks have ended.
  std::string run_without(RandomCase random_case, uint64_t lost_ranks, Place place) {
    RankGroup group(daemon_.attach_socket(), "masked", random_case.shape.ranks, [&](expertd_group_options_t* options) {
      configure(random_case, options);
      options->on_rank_loss = EXPERTD_RANK_LOSS_MASK;
    });
    if (!group.ok()) {
      return group.failure();
    }
    const bool high = random_case.shape.kind == OpKind::kDispatch;
    const std::string whole =
        high ? run_high_throughput(&group, random_case, place) : run_low_latency(&group, random_case, place);
    if (!whole.empty()) {
      return "before the loss: " + whole;
    }
    for (uint32_t rank = 0; rank < random_case.shape.ranks; ++rank) {
      if ((lost_ranks >> rank & 1) != 0) {
        group.drop(rank);
      }
    }
    random_case.shape.active_ranks -= base::RankSet(lost_ranks);
    random_case.later_active = random_case.shape.active_ranks;
    return high ? run_high_throughput(&group, random_case, place) : run_low_latency(&group, random_case, place, 3);
  }

  DaemonProcess daemon_{8, {"--engine-op-deadline=5s"}};
};

TEST_F(Masked, HighThroughputLeavesALostRankOut) {
  EXPECT_EQ(run_without(make_case(OpKind::kDispatch, {.ranks = 3}), 0b010, Place::kRegistered), "");
  EXPECT_EQ(run_without(make_case(OpKind::kDispatch, {.ranks = 3, .expanded = true}), 0b001, Place::kStaged), "");
}

TEST_F(Masked, HighThroughputWithSeveralLostRanks) {
  EXPECT_EQ(run_without(make_case(OpKind::kDispatch, {.ranks = 8, .top_k = 4}), 0b10010110, Place::kRegistered), "");
}

TEST_F(Masked, TheLastRankWorksAlone) {
  EXPECT_EQ(run_without(make_case(OpKind::kDispatch, {.ranks = 3}), 0b011, Place::kRegistered), "");
}

TEST_F(Masked, LowLatencyLeavesALostRankOut) {
  EXPECT_EQ(run_without(make_case(OpKind::kLlDispatch, {.ranks = 3}), 0b100, Place::kRegistered), "");
  EXPECT_EQ(run_without(make_case(OpKind::kLlDispatch, {.ranks = 4}), 0b0101, Place::kWindow), "");
}

TEST_F(Masked, ARankIsExcludedByRequestAndReadmitted) {
  RankGroup group(daemon_.attach_socket(), "excluded", 3,
                  [](expertd_group_options_t* options) { options->on_rank_loss = EXPERTD_RANK_LOSS_MASK; });
  ASSERT_TRUE(group.ok()) << group.failure();
  group.run([](Rank& rank) { EXPECT_TRUE(barrier(rank.group).outcome.ok()); });
  uint64_t excluded = 0;
  uint64_t before = 0;
  uint64_t after = 0;
  expertd_group_t* first = group.rank(0).group;
  ASSERT_TRUE(outcome_of(expertd_group_mask(first, 0, 0, nullptr, nullptr, &before)).ok());
  ASSERT_TRUE(outcome_of(expertd_group_mask(first, 0b010, 0, nullptr, &excluded, &after)).ok());
  EXPECT_EQ(excluded, 0b010u);
  EXPECT_GT(after, before) << "a mask belongs to an epoch";
  group.run([&](Rank& rank) {
    const OpEnd end = barrier(rank.group);
    if (rank.rank == 1) {
      EXPECT_EQ(end.outcome.status.reason, EXPERTD_REASON_BAD_STATE) << describe(end.outcome);
      return;
    }
    EXPECT_TRUE(end.outcome.ok()) << describe(end.outcome);
    EXPECT_EQ(end.result.degraded, 1);
    EXPECT_EQ(end.result.rank_mask, 0b101u);
    EXPECT_EQ(end.result.epoch, after);
  });
  ASSERT_TRUE(outcome_of(expertd_group_mask(first, 0, 0b010, nullptr, &excluded, nullptr)).ok());
  EXPECT_EQ(excluded, 0u);
  group.run([](Rank& rank) {
    const OpEnd end = barrier(rank.group);
    EXPECT_TRUE(end.outcome.ok()) << describe(end.outcome);
    EXPECT_EQ(end.result.degraded, 0);
  });
}

TEST_F(Masked, AMaskBeyondTheGroupIsRefused) {
  RankGroup group(daemon_.attach_socket(), "beyond", 2,
                  [](expertd_group_options_t* options) { options->on_rank_loss = EXPERTD_RANK_LOSS_MASK; });
  ASSERT_TRUE(group.ok()) << group.failure();
  EXPECT_EQ(expertd_group_mask(group.rank(0).group, 0b100, 0, nullptr, nullptr, nullptr).reason,
            EXPERTD_REASON_ARGUMENT_RANGE);
}

TEST_F(Masked, TheLostRankIsNamedInTheMask) {
  RankGroup group(daemon_.attach_socket(), "named", 3,
                  [](expertd_group_options_t* options) { options->on_rank_loss = EXPERTD_RANK_LOSS_MASK; });
  ASSERT_TRUE(group.ok()) << group.failure();
  group.drop(2);
  uint64_t lost = 0;
  EXPECT_TRUE(wait_until(
      [&] {
        return expertd_group_mask(group.rank(0).group, 0, 0, &lost, nullptr, nullptr).reason == 0 && lost == 0b100;
      },
      std::chrono::seconds(5)));
}

}  // namespace
}  // namespace expertd::support
