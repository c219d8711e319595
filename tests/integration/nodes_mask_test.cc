// SPDX-License-Identifier: Apache-2.0
// Groups over several daemons with on_rank_loss = mask: what the ranks that are left compute, bit for bit, and masks by
// request, which all nodes have from the same operation on.
#include <gtest/gtest.h>

#include <array>

#include "tests/integration/moe_case.h"
#include "tests/support/daemon_cluster.h"

namespace expertd::support {
namespace {

using kernels::OpKind;
using std::chrono::seconds;

struct Mask {
  uint64_t lost = 0;
  uint64_t excluded = 0;
  uint64_t epoch = 0;
  friend bool operator==(const Mask&, const Mask&) = default;
};

Mask mask_of(Rank& rank) {
  Mask mask;
  EXPECT_TRUE(outcome_of(expertd_group_mask(rank.group, 0, 0, &mask.lost, &mask.excluded, &mask.epoch)).ok());
  return mask;
}

class NodesMasked : public ::testing::Test {
 protected:
  void SetUp() override { ASSERT_TRUE(cluster_.start()); }

  static void mask_losses(expertd_group_options_t* options) {
    options->on_rank_loss = EXPERTD_RANK_LOSS_MASK;
    options->join_timeout_ns = 30'000'000'000;  // three daemons start on a machine that may be busy
  }

  /// Runs the case, ends the session of `lost`, and runs it again.
  std::string run_without(RandomCase random_case, uint32_t lost) {
    RankGroup group(cluster_.seats(2), "masked", [&](expertd_group_options_t* options) {
      configure(random_case, options);
      mask_losses(options);
    });
    if (!group.ok()) {
      return group.failure();
    }
    const bool high = random_case.shape.kind == OpKind::kDispatch;
    const auto run = [&] {
      return high ? run_high_throughput(&group, random_case, Place::kRegistered)
                  : run_low_latency(&group, random_case, Place::kWindow, 3);
    };
    if (const std::string whole = run(); !whole.empty()) {
      return "before the loss: " + whole;
    }
    group.drop(lost);
    for (uint32_t rank = 0; rank < random_case.shape.ranks; ++rank) {
      if (rank != lost &&
          !wait_until([&] { return mask_of(group.rank(rank)).lost == uint64_t{1} << lost; }, seconds(5))) {
        return "rank " + std::to_string(rank) + " does not hear of the loss";
      }
    }
    random_case.shape.active_ranks.remove(lost);
    random_case.later_active = random_case.shape.active_ranks;
    return run();
  }

  DaemonCluster cluster_{3, 2, {"--engine-op-deadline=5s"}};
};

TEST_F(NodesMasked, WhoIsLeftComputesTheReference) {
  EXPECT_EQ(run_without(make_case(OpKind::kDispatch, {.ranks = 6}), 3), "");
  EXPECT_EQ(run_without(make_case(OpKind::kLlDispatch, {.ranks = 6}), 0), "");
}

TEST_F(NodesMasked, AMaskByRequestHoldsOnAllNodesAtOnce) {
  RankGroup group(cluster_.seats(2), "excluded", mask_losses);
  ASSERT_TRUE(group.ok()) << group.failure();
  group.run([](Rank& rank) { EXPECT_TRUE(barrier(rank.group).outcome.ok()); });
  Mask after;
  ASSERT_TRUE(
      outcome_of(expertd_group_mask(group.rank(4).group, 0b10, 0, &after.lost, &after.excluded, &after.epoch)).ok());
  EXPECT_EQ(after, (Mask{.excluded = 0b10, .epoch = 2}));
  std::array<uint64_t, 6> first{};
  // Other nodes may run an operation or two of the older view yet; from then on all have the newer one.
  group.run([&](Rank& rank) {
    for (uint64_t op = 0; op < 3; ++op) {
      const OpEnd end = barrier(rank.group);
      if (rank.rank == 1) {
        EXPECT_TRUE(end.outcome.ok() || end.outcome.status.reason == EXPERTD_REASON_BAD_STATE) << describe(end.outcome);
        continue;
      }
      EXPECT_TRUE(end.outcome.ok()) << describe(end.outcome);
      EXPECT_EQ(end.result.rank_mask, end.result.epoch == 2 ? 0b111101U : 0b111111U);
      first[rank.rank] += end.result.epoch == 2 ? 0 : 1;
    }
  });
  for (const uint32_t rank : {2U, 3U, 4U, 5U}) {
    EXPECT_EQ(first[rank], first[0]) << "rank " << rank << " has another first operation";
  }
  EXPECT_EQ(first[0], 0U) << "the call returned after its view was there, and nothing had begun";
  for (uint32_t rank = 0; rank < 6; ++rank) {
    EXPECT_TRUE(wait_until([&] { return mask_of(group.rank(rank)) == after; }, seconds(5))) << "rank " << rank;
  }
  ASSERT_TRUE(
      outcome_of(expertd_group_mask(group.rank(0).group, 0, 0b10, nullptr, &after.excluded, &after.epoch)).ok());
  EXPECT_EQ(after, (Mask{.epoch = 3}));
  group.run([](Rank& rank) {
    const OpEnd end = barrier(rank.group);
    EXPECT_TRUE(end.outcome.ok()) << describe(end.outcome);
    EXPECT_EQ(end.result.degraded, 0);
  });
}

TEST_F(NodesMasked, WishesOfAllNodesAtOnceAreAllGranted) {
  RankGroup group(cluster_.seats(2), "wishes", mask_losses);
  ASSERT_TRUE(group.ok()) << group.failure();
  group.run([](Rank& rank) {
    if (rank.rank % 2 == 1) {
      EXPECT_TRUE(
          outcome_of(expertd_group_mask(rank.group, uint64_t{1} << rank.rank, 0, nullptr, nullptr, nullptr)).ok());
    }
  });
  for (uint32_t rank = 0; rank < 6; ++rank) {
    EXPECT_TRUE(wait_until([&] { return mask_of(group.rank(rank)).excluded == 0b101010; }, seconds(5))) << rank;
  }
}

TEST_F(NodesMasked, WhoLeavesIsLeftOutAndTheLastMayLeave) {
  RankGroup group(cluster_.seats(2), "leaving", mask_losses);
  ASSERT_TRUE(group.ok()) << group.failure();
  ASSERT_TRUE(outcome_of(expertd_group_leave(group.rank(2).group)).ok());
  EXPECT_TRUE(wait_until([&] { return mask_of(group.rank(5)).lost == 0b100; }, seconds(5)));
  group.run([](Rank& rank) {
    if (rank.rank != 2) {
      EXPECT_TRUE(outcome_of(expertd_group_leave(rank.group)).ok());
    }
  });
  RankGroup again(cluster_.seats(2), "leaving", mask_losses);
  ASSERT_TRUE(again.ok()) << again.failure();
  again.run([](Rank& rank) { EXPECT_TRUE(barrier(rank.group).outcome.ok()); });
}

}  // namespace
}  // namespace expertd::support
