// SPDX-License-Identifier: Apache-2.0
// Slots that say that the client refused an operation itself: what is taken over, what such a claim may not be.
#include <gtest/gtest.h>

#include <limits>
#include <string>

#include "daemon/base/status.h"
#include "tests/support/fake_admission.h"

namespace expertd::test {
namespace {

constexpr int64_t kLow = std::numeric_limits<int64_t>::min();
constexpr int64_t kHigh = std::numeric_limits<int64_t>::max();

/// A claim of OUT_OF_BOUNDS about x, with nothing but what such a slot needs.
expertd_slot claim(uint32_t op) {
  expertd_slot slot{};
  slot.seq = 1;
  slot.op = op;
  slot.flags = EXPERTD_SLOT_REFUSED;
  slot.group = AdmissionWorld::kGroup;
  slot.refused_reason = EXPERTD_REASON_OUT_OF_BOUNDS;
  slot.refused_argument = EXPERTD_ARGUMENT_IN_X;
  slot.refused_value = kHigh;
  slot.refused_minimum = kLow;
  slot.refused_maximum = -1;
  return slot;
}

void expect_rejected(const engine::Request& request, uint32_t reason, uint32_t argument, int64_t value, int64_t minimum,
                     int64_t maximum) {
  EXPECT_EQ(request.rejected_reason, reason);
  EXPECT_EQ(request.rejected_argument, argument);
  EXPECT_EQ(request.rejected_value, value);
  EXPECT_EQ(request.rejected_minimum, minimum);
  EXPECT_EQ(request.rejected_maximum, maximum);
}

TEST(ClientRefusal, IsTakenOverForEveryOperationOfAGroup) {
  for (const uint32_t op :
       {EXPERTD_OP_BARRIER, EXPERTD_OP_DISPATCH, EXPERTD_OP_COMBINE, EXPERTD_OP_LL_DISPATCH, EXPERTD_OP_LL_COMBINE}) {
    AdmissionWorld world;
    EXPECT_EQ(world.admit(claim(op)), &world.tables.groups[0].rank) << op;
    expect_rejected(world.request, EXPERTD_REASON_OUT_OF_BOUNDS, EXPERTD_ARGUMENT_IN_X, kHigh, kLow, -1);
    EXPECT_EQ(static_cast<uint32_t>(world.request.shape.kind), op);
    EXPECT_TRUE(world.request.without_words);
    EXPECT_EQ(world.request.deadline_ns, AdmissionWorld::kNow + 90);
  }
}

TEST(ClientRefusal, MayBeAnyReasonButNone) {
  AdmissionWorld world;
  expertd_slot slot = claim(EXPERTD_OP_DISPATCH);
  uint32_t taken = 0;
  for (uint32_t reason = 0; reason < 1'000; ++reason) {
    slot.refused_reason = reason;
    EXPECT_FALSE(world.admits(slot));
    if (reason != 0 && base::reason_known(static_cast<int>(reason))) {
      EXPECT_EQ(world.request.rejected_reason, reason);
      ++taken;
    } else {
      expect_rejected(world.request, EXPERTD_REASON_DESCRIPTOR_MALFORMED, EXPERTD_ARGUMENT_REFUSED_REASON, reason,
                      EXPERTD_REASON_INTERNAL, EXPERTD_REASON_BAD_STATE);
    }
  }
  EXPECT_GT(taken, 50U);
  for (const uint32_t reason : {0x80000000U, 0xffffffffU, 0x10000U + EXPERTD_REASON_TIMEOUT}) {
    slot.refused_reason = reason;
    (void)world.admit(slot);
    EXPECT_EQ(world.request.rejected_argument, static_cast<uint32_t>(EXPERTD_ARGUMENT_REFUSED_REASON)) << reason;
    EXPECT_EQ(world.request.rejected_value, reason);
  }
}

TEST(ClientRefusal, MayBeAboutAnyArgumentOfTheList) {
  AdmissionWorld world;
  expertd_slot slot = claim(EXPERTD_OP_COMBINE);
  for (const uint32_t argument :
       {EXPERTD_ARGUMENT_NONE, EXPERTD_ARGUMENT_FLAGS, EXPERTD_ARGUMENT_OUT_TOKEN_RANK_MASK}) {
    slot.refused_argument = argument;
    (void)world.admit(slot);
    EXPECT_EQ(world.request.rejected_reason, static_cast<uint32_t>(EXPERTD_REASON_OUT_OF_BOUNDS));
    EXPECT_EQ(world.request.rejected_argument, argument);
  }
  for (const uint32_t argument : {30U, 31U, EXPERTD_ARGUMENT_OUT_TOKEN_RANK_MASK + 1U, 0xffffffffU}) {
    slot.refused_argument = argument;
    (void)world.admit(slot);
    expect_rejected(world.request, EXPERTD_REASON_DESCRIPTOR_MALFORMED, EXPERTD_ARGUMENT_REFUSED_ARGUMENT, argument, 0,
                    EXPERTD_ARGUMENT_OUT_TOKEN_RANK_MASK);
  }
}

TEST(ClientRefusal, CountsForTheGroupAlsoWhenItsClaimIsNone) {
  AdmissionWorld world;
  expertd_slot slot = claim(EXPERTD_OP_DISPATCH);
  slot.refused_reason = 0;
  EXPECT_EQ(world.admit(slot), &world.tables.groups[0].rank);
  EXPECT_TRUE(world.request.without_words);
}

TEST(ClientRefusal, StandsAlone) {
  AdmissionWorld world;
  expertd_slot slot = claim(EXPERTD_OP_DISPATCH);
  slot.flags |= EXPERTD_SLOT_RUNG;
  EXPECT_EQ(world.admit(slot), &world.tables.groups[0].rank);
  expect_rejected(world.request, EXPERTD_REASON_DESCRIPTOR_MALFORMED, EXPERTD_ARGUMENT_FLAGS, 768, 512, 512);
}

TEST(ClientRefusal, IsNoneOfALocalOperation) {
  AdmissionWorld world;
  EXPECT_EQ(world.admit(claim(EXPERTD_OP_LAYOUT)), nullptr);
  expect_rejected(world.request, EXPERTD_REASON_DESCRIPTOR_MALFORMED, EXPERTD_ARGUMENT_FLAGS, 512, 0, 7679);
}

TEST(ClientRefusal, NeedsAGroupOfTheSession) {
  AdmissionWorld world;
  expertd_slot slot = claim(EXPERTD_OP_BARRIER);
  slot.group = AdmissionWorld::kGroup + 1;
  EXPECT_EQ(world.admit(slot), nullptr);
  EXPECT_EQ(world.request.rejected_reason, static_cast<uint32_t>(EXPERTD_REASON_NO_SUCH_GROUP));
}

TEST(ClientRefusal, UsesBytesThatAreReservedInEveryOtherSlot) {
  void (*const uses[])(expertd_slot & slot) = {
      [](expertd_slot& slot) { slot.refused_reason = 1; },     [](expertd_slot& slot) { slot.refused_argument = 1; },
      [](expertd_slot& slot) { slot.refused_value = 1; },      [](expertd_slot& slot) { slot.refused_minimum = -1; },
      [](expertd_slot& slot) { slot.refused_maximum = kLow; },
  };
  for (const auto use : uses) {
    AdmissionWorld world;
    expertd_slot slot = AdmissionWorld::slot(EXPERTD_OP_DISPATCH);
    ASSERT_TRUE(world.admits(slot));
    use(slot);
    (void)world.admit(slot);
    expect_rejected(world.request, EXPERTD_REASON_DESCRIPTOR_MALFORMED, EXPERTD_ARGUMENT_RESERVED, 1, 0, 0);
  }
}

TEST(ClientRefusal, LeavesTheReservedBytesOfItsSlotZero) {
  AdmissionWorld world;
  expertd_slot slot = claim(EXPERTD_OP_DISPATCH);
  slot.reserved[5] = 1;
  EXPECT_EQ(world.admit(slot), &world.tables.groups[0].rank) << "malformed, but the rank's operation";
  EXPECT_EQ(world.request.rejected_argument, static_cast<uint32_t>(EXPERTD_ARGUMENT_RESERVED));
}

TEST(ClientRefusal, ResolvesNoTensorAndLeavesNoHandle) {
  AdmissionWorld world;
  expertd_slot slot = AdmissionWorld::slot(EXPERTD_OP_DISPATCH);
  slot.flags = EXPERTD_SLOT_REFUSED;
  slot.refused_reason = EXPERTD_REASON_WRONG_DTYPE;
  EXPECT_FALSE(world.admits(slot));
  for (const engine::TensorView& tensor : world.request.tensors) {
    EXPECT_EQ(tensor.mapping, nullptr);
  }
  EXPECT_EQ(world.tables.handles[0].generation, 0U);
  EXPECT_EQ(world.request.shape.tokens, 0U);
}

TEST(ClientRefusal, IsForgottenByTheNextRequestOfItsSlot) {
  AdmissionWorld world;
  (void)world.admit(claim(EXPERTD_OP_DISPATCH));
  const expertd_slot slot = AdmissionWorld::slot(EXPERTD_OP_DISPATCH);
  (void)transport::admit(slot, {3, 1, AdmissionWorld::kNow, 700}, &world.tables, &world.request);
  EXPECT_EQ(world.request.rejected_reason, 0U);
  EXPECT_FALSE(world.request.without_words);
}

}  // namespace
}  // namespace expertd::test
