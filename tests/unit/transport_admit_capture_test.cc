// SPDX-License-Identifier: Apache-2.0
// Captured operations at admission: which ones there are, and that they name a lane of their group.
#include <gtest/gtest.h>

#include <string>

#include "proto/abi/exchange_v1.h"
#include "tests/support/fake_admission.h"

namespace expertd::test {
namespace {

struct LaneWorld : AdmissionWorld {
  explicit LaneWorld(uint32_t lanes) : AdmissionWorld(with(lanes)) {}
  static engine::GroupSettings with(uint32_t lanes) {
    engine::GroupSettings made = settings();
    made.shape.capture_lanes = lanes;
    return made;
  }
  void expect_refused(const expertd_slot& slot, uint32_t reason, uint32_t argument) {
    EXPECT_FALSE(admits(slot));
    EXPECT_EQ(request.rejected_reason, reason);
    EXPECT_EQ(request.rejected_argument, argument);
  }
};

expertd_slot captured(uint32_t op, uint32_t lane = 0) {
  expertd_slot slot = AdmissionWorld::slot(op);
  slot.flags |= EXPERTD_SLOT_CAPTURED;
  slot.capture_lane = lane;
  return slot;
}

TEST(AdmitCapture, LowLatencyOperationsAreAdmittedOnEveryLaneOfTheGroup) {
  LaneWorld world(2);
  world.leave_handle(true);
  for (const uint32_t op : {EXPERTD_OP_LL_DISPATCH, EXPERTD_OP_LL_COMBINE}) {
    for (const uint32_t lane : {0U, 1U}) {
      SCOPED_TRACE("op " + std::to_string(op) + " lane " + std::to_string(lane));
      EXPECT_TRUE(world.admits(captured(op, lane))) << world.request.rejected_argument;
      EXPECT_TRUE(world.request.captured);
      EXPECT_EQ(world.request.capture_lane, lane);
    }
  }
}

TEST(AdmitCapture, OtherOperationsAreRefused) {
  LaneWorld world(2);
  world.leave_handle(false);
  for (const uint32_t op : {EXPERTD_OP_DISPATCH, EXPERTD_OP_COMBINE, EXPERTD_OP_BARRIER, EXPERTD_OP_LAYOUT}) {
    SCOPED_TRACE("op " + std::to_string(op));
    world.expect_refused(captured(op), EXPERTD_REASON_UNSUPPORTED, EXPERTD_ARGUMENT_FLAGS);
    EXPECT_TRUE(world.request.captured) << "no stream waits for its slot's words";
  }
}

TEST(AdmitCapture, ALaneThatTheGroupDoesNotHaveIsRefusedByName) {
  for (const uint32_t lanes : {0U, 1U, 2U}) {
    for (const uint32_t lane : {0U, 1U, 2U, 3U, ~0U}) {
      if (lane < lanes) {
        continue;
      }
      SCOPED_TRACE("lane " + std::to_string(lane) + " of " + std::to_string(lanes));
      LaneWorld world(lanes);
      world.expect_refused(captured(EXPERTD_OP_LL_DISPATCH, lane), EXPERTD_REASON_UNSUPPORTED,
                           EXPERTD_ARGUMENT_CAPTURE_LANE);
      EXPECT_EQ(world.request.rejected_value, int64_t{lane});
      EXPECT_EQ(world.request.rejected_minimum, 0);
      EXPECT_EQ(world.request.rejected_maximum, int64_t{lanes} - 1);
    }
  }
}

TEST(AdmitCapture, ALaneWithoutTheFlagIsMalformed) {
  LaneWorld world(2);
  for (const uint32_t op : {EXPERTD_OP_LL_DISPATCH, EXPERTD_OP_BARRIER, EXPERTD_OP_LAYOUT}) {
    expertd_slot slot = AdmissionWorld::slot(op);
    slot.capture_lane = 1;
    world.expect_refused(slot, EXPERTD_REASON_DESCRIPTOR_MALFORMED, EXPERTD_ARGUMENT_CAPTURE_LANE);
    EXPECT_FALSE(world.request.captured);
  }
}

TEST(AdmitCapture, InAGroupOfCopyEnginesItIsWithoutTheirFlag) {
  LaneWorld world(1);
  world.shared.set_copy_engine(4);
  EXPECT_TRUE(world.admits(captured(EXPERTD_OP_LL_DISPATCH)));
  expertd_slot slot = captured(EXPERTD_OP_LL_DISPATCH);
  slot.flags |= EXPERTD_SLOT_COPY_ENGINE;
  world.expect_refused(slot, EXPERTD_REASON_UNSUPPORTED, EXPERTD_ARGUMENT_FLAGS);
}

TEST(AdmitCapture, NeedsTheHandleOfACapturedDispatchWhereEagerOnesGoByCopies) {
  LaneWorld world(1);
  world.shared.set_copy_engine(EXPERTD_EXCHANGE_BUFFERS);
  expertd_slot eager = AdmissionWorld::slot(EXPERTD_OP_LL_DISPATCH);
  eager.flags |= EXPERTD_SLOT_COPY_ENGINE;
  eager.exchange_buffer = 1;
  (void)world.admit(eager);
  ASSERT_EQ(world.request.rejected_reason, EXPERTD_REASON_NONE);
  expertd_slot combine = AdmissionWorld::slot(EXPERTD_OP_LL_COMBINE);
  combine.flags |= EXPERTD_SLOT_CAPTURED;
  world.expect_refused(combine, EXPERTD_REASON_STALE_HANDLE, EXPERTD_ARGUMENT_FLAGS);
  expertd_slot captured = AdmissionWorld::slot(EXPERTD_OP_LL_DISPATCH);
  captured.flags |= EXPERTD_SLOT_CAPTURED;
  (void)world.admit(captured);
  ASSERT_EQ(world.request.rejected_reason, EXPERTD_REASON_NONE);
  (void)world.admit(combine);
  EXPECT_EQ(world.request.rejected_reason, EXPERTD_REASON_NONE);
}

}  // namespace
}  // namespace expertd::test
