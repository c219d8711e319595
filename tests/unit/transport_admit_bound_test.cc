// SPDX-License-Identifier: Apache-2.0
// The bound of all ranks' tokens at admission: its range, who needs it, and the traffic that it makes an operation.
#include <gtest/gtest.h>

#include <string>

#include "tests/support/fake_admission.h"

namespace expertd::test {
namespace {

using engine::Traffic;

constexpr uint32_t kOps[] = {EXPERTD_OP_DISPATCH, EXPERTD_OP_LL_DISPATCH};

/// A world whose group is dynamic; its max_tokens are 64 and the slots have as many tokens.
struct DynamicWorld : AdmissionWorld {
  explicit DynamicWorld(uint32_t ll_tokens) : AdmissionWorld(with(ll_tokens)) {}
  static engine::GroupSettings with(uint32_t ll_tokens) {
    engine::GroupSettings made = settings();
    made.dynamic_ll_tokens = ll_tokens;
    return made;
  }
};

expertd_slot bounded(uint32_t op, uint32_t tokens, uint32_t bound) {
  expertd_slot slot = AdmissionWorld::slot(op);
  slot.tokens = tokens;
  slot.token_bound = bound;
  return slot;
}

TEST(AdmitBound, IsNeededInADynamicGroupAndHasARange) {
  struct Case {
    uint32_t dynamic, tokens, bound;
    bool admitted;
  };
  constexpr Case kCases[] = {{0, 8, 0, true},   {0, 8, 8, true},   {0, 8, 64, true}, {0, 8, 7, false},
                             {0, 8, 65, false}, {16, 8, 0, false}, {16, 8, 8, true}, {16, 8, 64, true},
                             {16, 8, 7, false}, {16, 0, 0, false}, {16, 0, 1, true}, {16, 8, 65, false}};
  for (const Case& it : kCases) {
    for (const uint32_t op : kOps) {
      SCOPED_TRACE("dynamic " + std::to_string(it.dynamic) + " tokens " + std::to_string(it.tokens) + " bound " +
                   std::to_string(it.bound));
      DynamicWorld world(it.dynamic);
      EXPECT_EQ(world.admits(bounded(op, it.tokens, it.bound)), it.admitted);
      if (!it.admitted) {
        EXPECT_EQ(world.request.rejected_reason, static_cast<uint32_t>(EXPERTD_REASON_ARGUMENT_RANGE));
        EXPECT_EQ(world.request.rejected_argument, static_cast<uint32_t>(EXPERTD_ARGUMENT_TOKEN_BOUND));
        EXPECT_EQ(world.request.rejected_value, it.bound);
        EXPECT_EQ(world.request.rejected_minimum, it.tokens == 0 ? 1 : it.tokens);
        EXPECT_EQ(world.request.rejected_maximum, 64);
      } else {
        EXPECT_EQ(world.request.token_bound, it.bound);
      }
    }
  }
}

TEST(AdmitBound, MakesTheTrafficOfADynamicGroupAndTheKindThatOfOthers) {
  for (const uint32_t op : kOps) {
    const Traffic of_kind = op == EXPERTD_OP_LL_DISPATCH ? Traffic::kLatency : Traffic::kThroughput;
    for (const uint32_t bound : {8U, 16U, 17U, 64U}) {
      DynamicWorld plain(0);
      ASSERT_TRUE(plain.admits(bounded(op, 8, bound)));
      EXPECT_EQ(plain.request.traffic, of_kind);
      DynamicWorld dynamic(16);
      ASSERT_TRUE(dynamic.admits(bounded(op, 8, bound)));
      EXPECT_EQ(dynamic.request.traffic, bound <= 16 ? Traffic::kLatency : Traffic::kThroughput);
    }
  }
}

TEST(AdmitBound, ABarrierIsLowLatencyAndNeedsNone) {
  DynamicWorld world(16);
  ASSERT_TRUE(world.admits(bounded(EXPERTD_OP_BARRIER, 0, 0)));
  EXPECT_EQ(world.request.traffic, Traffic::kLatency);
}

}  // namespace
}  // namespace expertd::test
