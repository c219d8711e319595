// SPDX-License-Identifier: Apache-2.0
// Ranks excluded by request: what they do, and do late, is their own affair.
#include <gtest/gtest.h>

#include "tests/support/fake_engine_group.h"

namespace expertd::test {
namespace {

using engine::GroupShared;

// An excluded rank may come to an operation that the others ended kEntries operations ago and hold its entry.
TEST(EngineExclusion, WakesTheRanksThatWaitForAnEntryItHolds) {
  FakeGroup group(2, true);
  group.shared.set_excluded(2);
  for (uint64_t seq = 1; seq <= GroupShared::kEntries; ++seq) {
    group[0].submit();
    ASSERT_TRUE(group.settle(1));
    group[0].port.finish_all();
    ASSERT_TRUE(group.settle(1));
  }
  group[1].submit();
  group[0].submit();
  (void)group[0].run(1);
  ASSERT_EQ(group[0].port.parts().size(), GroupShared::kEntries) << "the entry is still read";
  group.wake.woken.clear();
  (void)group[1].run(1);
  ASSERT_EQ(group[1].reason(1), static_cast<uint32_t>(EXPERTD_REASON_BAD_STATE));
  EXPECT_GE(group.wake.woken[0], 1U);
  ASSERT_TRUE(group.settle(1));
  EXPECT_EQ(group[0].port.parts().size(), GroupShared::kEntries + 1);
}

}  // namespace
}  // namespace expertd::test
