// SPDX-License-Identifier: Apache-2.0
// What a group was joined to carry is what its dispatches may carry: every operation against every set of payloads.
#include <gtest/gtest.h>

#include <string>

#include "tests/support/fake_admission.h"

namespace expertd::test {
namespace {

struct Kind {
  uint32_t op;
  uint32_t payload;
};
constexpr Kind kKinds[] = {
    {EXPERTD_OP_DISPATCH, EXPERTD_PAYLOAD_BF16},    {EXPERTD_OP_DISPATCH, EXPERTD_PAYLOAD_BYTES},
    {EXPERTD_OP_LL_DISPATCH, EXPERTD_PAYLOAD_BF16}, {EXPERTD_OP_LL_DISPATCH, EXPERTD_PAYLOAD_BYTES},
    {EXPERTD_OP_LL_DISPATCH, EXPERTD_PAYLOAD_FP8},
};

expertd_slot slot_of(const Kind& kind) {
  expertd_slot slot =
      kind.payload == EXPERTD_PAYLOAD_BYTES ? AdmissionWorld::slot_of_bytes(kind.op) : AdmissionWorld::slot(kind.op);
  if (kind.payload == EXPERTD_PAYLOAD_FP8) {
    slot.flags |= EXPERTD_SLOT_QUANTISE_FP8;
    slot.tensors[EXPERTD_OUT_SIDE].buffer = AdmissionWorld::kBuffer;
  }
  return slot;
}

TEST(AdmitPayload, RefusesWhatTheGroupDoesNotCarryNamingItAndTheSet) {
  for (uint32_t payloads = 0; payloads <= EXPERTD_PAYLOADS_ALL; ++payloads) {
    for (const Kind& kind : kKinds) {
      SCOPED_TRACE("set " + std::to_string(payloads) + " op " + std::to_string(kind.op) + " payload " +
                   std::to_string(kind.payload));
      AdmissionWorld world(payloads);
      const engine::RankState* const rank = world.admit(slot_of(kind));
      EXPECT_EQ(rank, &world.tables.groups[0].rank) << "refused or not, it is the rank's operation";
      const engine::Request& request = world.request;
      if (payloads == 0 || (payloads & kind.payload) != 0) {
        EXPECT_EQ(request.rejected_reason, 0U) << "about " << request.rejected_argument;
        continue;
      }
      EXPECT_EQ(request.rejected_reason, static_cast<uint32_t>(EXPERTD_REASON_WRONG_DTYPE));
      EXPECT_EQ(request.rejected_argument, static_cast<uint32_t>(EXPERTD_ARGUMENT_DISPATCH_DTYPE));
      EXPECT_EQ(request.rejected_value, kind.payload);
      EXPECT_EQ(request.rejected_minimum, 0);
      EXPECT_EQ(request.rejected_maximum, payloads);
      EXPECT_EQ(world.tables.handles[0].generation, 0U) << "and leaves no handle";
    }
  }
}

TEST(AdmitPayload, HoldsACachedDispatchToTheSetAsWell) {
  AdmissionWorld world(EXPERTD_PAYLOAD_BF16);
  world.leave_handle(false);
  expertd_slot slot = AdmissionWorld::slot_of_bytes(EXPERTD_OP_DISPATCH);
  slot.flags = EXPERTD_SLOT_CACHED;
  EXPECT_FALSE(world.admits(slot));
  EXPECT_EQ(world.request.rejected_argument, static_cast<uint32_t>(EXPERTD_ARGUMENT_DISPATCH_DTYPE));
}

TEST(AdmitPayload, LeavesCombinesAsTheyAre) {
  for (const bool low_latency : {false, true}) {
    AdmissionWorld world(EXPERTD_PAYLOAD_BYTES);
    const expertd_slot dispatch =
        AdmissionWorld::slot_of_bytes(low_latency ? EXPERTD_OP_LL_DISPATCH : EXPERTD_OP_DISPATCH);
    ASSERT_TRUE(world.admits(dispatch)) << world.request.rejected_reason << " " << world.request.rejected_argument;
    EXPECT_TRUE(world.admits(AdmissionWorld::slot(low_latency ? EXPERTD_OP_LL_COMBINE : EXPERTD_OP_COMBINE)))
        << "rows come back as bf16: " << world.request.rejected_reason << " " << world.request.rejected_argument;
  }
}

}  // namespace
}  // namespace expertd::test
