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
  world_.shared.set_copy_engine(EXPERTD_EXCHANGE_BUFFERS);
  expertd_slot without = slot();
  without.flags &= ~EXPERTD_SLOT_COPY_ENGINE;
  without.exchange_buffer = 0;
  EXPECT_EQ(admitted(without).rejected_reason, EXPERTD_REASON_UNSUPPORTED);
}

TEST_P(AdmitExecutor, TheBufferIsThatOfTheOperation) {
  world_.shared.set_copy_engine(EXPERTD_EXCHANGE_BUFFERS);
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

INSTANTIATE_TEST_SUITE_P(Operations, AdmitExecutor, testing::Values(EXPERTD_OP_LL_DISPATCH, EXPERTD_OP_DISPATCH));

/// High throughput that copy engines do not serve is the daemon's kernels', in the same group.
TEST(AdmitExecutorHt, WhatDoesNotGoByCopiesGoesByKernels) {
  AdmissionWorld world;
  world.shared.set_copy_engine(EXPERTD_HT_BUFFERS);
  expertd_slot plain = AdmissionWorld::slot(EXPERTD_OP_DISPATCH);
  expertd_slot expanded = plain;
  expanded.flags |= EXPERTD_SLOT_EXPANDED;
  expertd_slot wide = AdmissionWorld::slot_of_bytes(EXPERTD_OP_DISPATCH);
  wide.row_bytes = 2048;  // of 1024 in the window
  for (const expertd_slot& slot : {expanded, wide}) {
    EXPECT_TRUE(world.admits(slot));
    EXPECT_FALSE(world.request.by_copies);
    expertd_slot flagged = slot;
    flagged.flags |= EXPERTD_SLOT_COPY_ENGINE;
    flagged.exchange_buffer = 1;
    EXPECT_FALSE(world.admits(flagged));
  }
  plain.flags |= EXPERTD_SLOT_COPY_ENGINE;
  plain.exchange_buffer = 1;
  EXPECT_TRUE(world.admits(plain));
  EXPECT_TRUE(world.request.by_copies);
}

TEST(AdmitExecutorHt, ACombineGoesTheWayOfItsDispatch) {
  AdmissionWorld world;
  world.shared.set_copy_engine(EXPERTD_HT_BUFFERS);
  expertd_slot dispatch = AdmissionWorld::slot(EXPERTD_OP_DISPATCH);
  dispatch.flags |= EXPERTD_SLOT_EXPANDED;
  ASSERT_TRUE(world.admits(dispatch));
  expertd_slot combine = AdmissionWorld::slot(EXPERTD_OP_COMBINE);
  combine.flags |= EXPERTD_SLOT_COPY_ENGINE;
  combine.exchange_buffer = 1;
  EXPECT_FALSE(world.admits(combine));
  EXPECT_EQ(world.request.rejected_reason, EXPERTD_REASON_STALE_HANDLE);
  combine.flags = EXPERTD_SLOT_EXPANDED;
  combine.exchange_buffer = 0;
  EXPECT_TRUE(world.admits(combine));
}

}  // namespace
}  // namespace expertd::test
