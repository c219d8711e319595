// SPDX-License-Identifier: Apache-2.0
// Client and daemon must mean the same executor, and with copy engines the same buffer.
#include <gtest/gtest.h>

#include "proto/abi/exchange_ht_v1.h"
#include "tests/support/fake_admission.h"

namespace expertd::test {
namespace {

class AdmitExecutor : public testing::TestWithParam<uint32_t> {
 protected:
  engine::Request admitted(const expertd_slot& slot) {
    (void)world_.admit(slot);
    return world_.request;
  }
  expertd_slot slot() const {
    expertd_slot made = AdmissionWorld::slot(GetParam());
    made.flags |= EXPERTD_SLOT_COPY_ENGINE;
    made.exchange_buffer = 1;  // of the first operation
    return made;
  }
  AdmissionWorld world_;
};

TEST_P(AdmitExecutor, TheFlagNeedsAGroupForIt) {
  const engine::Request request = admitted(slot());
  EXPECT_EQ(request.rejected_reason, EXPERTD_REASON_UNSUPPORTED);
  EXPECT_EQ(request.rejected_argument, EXPERTD_ARGUMENT_FLAGS);
}

TEST_P(AdmitExecutor, TheGroupNeedsTheFlag) {
  world_.shared.set_copy_engine(EXPERTD_EXCHANGE_BUFFERS, {EXPERTD_COPIES_ALL, 0});
  expertd_slot without = slot();
  without.flags &= ~EXPERTD_SLOT_COPY_ENGINE;
  without.exchange_buffer = 0;
  EXPECT_EQ(admitted(without).rejected_reason, EXPERTD_REASON_UNSUPPORTED);
}

TEST_P(AdmitExecutor, TheBufferIsThatOfTheOperation) {
  world_.shared.set_copy_engine(EXPERTD_EXCHANGE_BUFFERS, {EXPERTD_COPIES_ALL, 0});
  for (uint64_t number = 1; number < 10; ++number) {
    world_.tables.groups[0].rank.next_number = number;
    for (uint32_t buffer = 0; buffer < EXPERTD_EXCHANGE_BUFFERS + 1; ++buffer) {
      expertd_slot made = slot();
      made.exchange_buffer = buffer;
      const engine::Request request = admitted(made);
      const bool right = buffer == number % EXPERTD_EXCHANGE_BUFFERS;
      EXPECT_EQ(request.rejected_reason, right ? EXPERTD_REASON_NONE : EXPERTD_REASON_BAD_STATE) << number;
      EXPECT_EQ(request.rejected_argument, right ? EXPERTD_ARGUMENT_NONE : EXPERTD_ARGUMENT_EXCHANGE_BUFFER);
    }
  }
}

struct RuleWorld : AdmissionWorld {
  explicit RuleWorld(uint32_t copies, uint32_t lanes = 0) : AdmissionWorld(with(lanes)) {
    shared.set_copy_engine(EXPERTD_EXCHANGE_BUFFERS, {copies, 16});
  }
  static engine::GroupSettings with(uint32_t lanes) {
    engine::GroupSettings made = settings();
    made.shape.capture_lanes = lanes;
    return made;
  }
  /// Reason and argument with which an operation of such flags ends.
  std::pair<uint32_t, uint32_t> end_of(uint32_t op, uint32_t flags, uint32_t bound = 0) {
    expertd_slot made = slot(op);
    made.flags = flags;
    made.token_bound = bound;
    made.exchange_buffer = (flags & EXPERTD_SLOT_COPY_ENGINE) != 0 ? 1 : 0;
    (void)admit(made);
    return {request.rejected_reason, request.rejected_argument};
  }
};

using End = std::pair<uint32_t, uint32_t>;
constexpr uint32_t kCopy = EXPERTD_SLOT_COPY_ENGINE;
constexpr uint32_t kSplit = EXPERTD_SLOT_SPLIT;
const End kGood{0, 0};
const End kOther{EXPERTD_REASON_UNSUPPORTED, EXPERTD_ARGUMENT_FLAGS};
const End kStale{EXPERTD_REASON_STALE_HANDLE, EXPERTD_ARGUMENT_FLAGS};

TEST(AdmitExecutorRule, SaysWhichDispatchesHaveTheFlag) {
  const struct {
    uint32_t copies;
    uint32_t op;
    uint32_t bound;
    bool together;
    bool split;
  } rows[] = {
      {EXPERTD_COPIES_LL, EXPERTD_OP_LL_DISPATCH, 0, true, true},
      {EXPERTD_COPIES_LL_SPLIT, EXPERTD_OP_LL_DISPATCH, 0, false, true},
      {EXPERTD_COPIES_LL_TOGETHER, EXPERTD_OP_LL_DISPATCH, 0, true, false},
      {EXPERTD_COPIES_LL, EXPERTD_OP_DISPATCH, 0, false, false},
      {EXPERTD_COPIES_HT_SPLIT, EXPERTD_OP_DISPATCH, 64, false, true},
      {EXPERTD_COPIES_HT, EXPERTD_OP_DISPATCH, 0, true, true},
      {0, EXPERTD_OP_LL_DISPATCH, 0, false, false},
  };
  for (const auto& row : rows) {
    for (const bool split : {false, true}) {
      RuleWorld world(row.copies);
      const uint32_t flags = split ? kSplit : 0;
      const bool copies = split ? row.split : row.together;
      EXPECT_EQ(world.end_of(row.op, flags | (copies ? kCopy : 0), row.bound), kGood) << row.copies << " " << row.op;
      EXPECT_EQ(world.request.copies, copies);
      EXPECT_EQ(world.end_of(row.op, flags | (copies ? 0 : kCopy), row.bound), kOther) << row.copies << " " << row.op;
    }
  }
}

TEST(AdmitExecutorRule, ACombineGoesTheWayOfItsDispatch) {
  RuleWorld world(EXPERTD_COPIES_LL_SPLIT, 1);
  ASSERT_EQ(world.end_of(EXPERTD_OP_LL_DISPATCH, kSplit | kCopy), kGood);
  EXPECT_EQ(world.end_of(EXPERTD_OP_LL_COMBINE, 0), kStale);
  EXPECT_EQ(world.end_of(EXPERTD_OP_LL_COMBINE, EXPERTD_SLOT_CAPTURED), kStale);
  EXPECT_EQ(world.end_of(EXPERTD_OP_LL_COMBINE, EXPERTD_SLOT_CAPTURED | kCopy), kOther);
  EXPECT_EQ(world.end_of(EXPERTD_OP_LL_COMBINE, kCopy), kGood);
  EXPECT_TRUE(world.request.copies);
  ASSERT_EQ(world.end_of(EXPERTD_OP_LL_DISPATCH, 0), kGood);
  EXPECT_EQ(world.end_of(EXPERTD_OP_LL_COMBINE, kCopy), kStale);
  EXPECT_EQ(world.end_of(EXPERTD_OP_LL_COMBINE, 0), kGood);
  EXPECT_FALSE(world.request.copies);
  EXPECT_EQ(world.end_of(EXPERTD_OP_LL_COMBINE, EXPERTD_SLOT_CAPTURED), kGood);
}

TEST(AdmitExecutorRule, AHandleOfARefusedDispatchLeadsToNoCopies) {
  RuleWorld world(0);
  ASSERT_EQ(world.end_of(EXPERTD_OP_LL_DISPATCH, kCopy), kOther);
  EXPECT_EQ(world.end_of(EXPERTD_OP_LL_COMBINE, kCopy), kOther);
  EXPECT_FALSE(world.request.copies);
}

TEST(AdmitExecutorRule, SplitIsOfDispatchesAlone) {
  for (const uint32_t op : {EXPERTD_OP_BARRIER, EXPERTD_OP_LAYOUT, EXPERTD_OP_COMBINE, EXPERTD_OP_LL_COMBINE}) {
    RuleWorld world(EXPERTD_COPIES_ALL);
    world.tables.handles[0] = {.generation = 1,
                               .group = base::GroupId{AdmissionWorld::kGroup},
                               .low_latency = op == EXPERTD_OP_LL_COMBINE,
                               .tokens = 64,
                               .top_k = 4};
    ASSERT_EQ(world.end_of(op, 0), kGood) << op;
    EXPECT_EQ(world.end_of(op, kSplit), kOther) << op;
  }
}

/// High throughput that copy engines do not serve is the daemon's kernels', in the same group.
TEST(AdmitExecutorRule, FormsThatCopyEnginesDoNotServeAreTheKernels) {
  RuleWorld world(EXPERTD_COPIES_ALL);
  expertd_slot expanded = AdmissionWorld::slot(EXPERTD_OP_DISPATCH);
  expanded.flags |= EXPERTD_SLOT_EXPANDED;
  expertd_slot wide = AdmissionWorld::slot_of_bytes(EXPERTD_OP_DISPATCH);
  wide.row_bytes = 2048;  // of 1024 in the window
  for (const expertd_slot& slot : {expanded, wide}) {
    EXPECT_TRUE(world.admits(slot));
    EXPECT_FALSE(world.request.copies);
    expertd_slot flagged = slot;
    flagged.flags |= kCopy;
    flagged.exchange_buffer = 1;
    EXPECT_FALSE(world.admits(flagged));
    EXPECT_EQ(world.request.rejected_reason, EXPERTD_REASON_UNSUPPORTED);
  }
  EXPECT_EQ(world.end_of(EXPERTD_OP_DISPATCH, kCopy), kGood);
  EXPECT_TRUE(world.request.copies);
}

TEST(AdmitExecutorRule, WhatUsesAHandleOfHighThroughputFollowsIt) {
  RuleWorld world(EXPERTD_COPIES_ALL);
  constexpr uint32_t kExpanded = EXPERTD_SLOT_EXPANDED;
  constexpr uint32_t kCached = EXPERTD_SLOT_CACHED;
  ASSERT_EQ(world.end_of(EXPERTD_OP_DISPATCH, kExpanded), kGood);
  EXPECT_EQ(world.end_of(EXPERTD_OP_COMBINE, kCopy), kStale);
  EXPECT_EQ(world.end_of(EXPERTD_OP_COMBINE, kExpanded | kCopy), kStale);
  EXPECT_EQ(world.end_of(EXPERTD_OP_COMBINE, kExpanded), kGood);
  EXPECT_FALSE(world.request.copies);
  ASSERT_EQ(world.end_of(EXPERTD_OP_DISPATCH, kCopy), kGood);
  EXPECT_EQ(world.end_of(EXPERTD_OP_COMBINE, 0), kStale);
  EXPECT_EQ(world.end_of(EXPERTD_OP_DISPATCH, kCached), kStale);
  EXPECT_EQ(world.end_of(EXPERTD_OP_DISPATCH, kCached | kCopy | kSplit), kGood);
  EXPECT_TRUE(world.request.copies);
  EXPECT_EQ(world.end_of(EXPERTD_OP_COMBINE, kCopy), kGood);
  EXPECT_TRUE(world.request.copies);
  expertd_slot wide = AdmissionWorld::slot_of_bytes(EXPERTD_OP_DISPATCH);
  wide.row_bytes = 2048;
  wide.flags |= kCached | kCopy;
  wide.exchange_buffer = 1;
  EXPECT_FALSE(world.admits(wide)) << "no executor has both its rows and its routing";
  EXPECT_EQ(world.request.rejected_reason, EXPERTD_REASON_UNSUPPORTED);
}

INSTANTIATE_TEST_SUITE_P(Operations, AdmitExecutor, testing::Values(EXPERTD_OP_LL_DISPATCH, EXPERTD_OP_DISPATCH));

}  // namespace
}  // namespace expertd::test
