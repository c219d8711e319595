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
  group.shared.change_excluded(base::RankSet(2), {});
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

engine::Request due_at(uint64_t deadline_ns) {
  engine::Request request = plain_request();
  request.deadline_ns = deadline_ns;
  return request;
}

/// Ranks 0 and 2 go on as usual: what they submitted is launched with `active` ranks and ends well.
void expect_to_end_well(FakeGroup& group, uint64_t seq, uint64_t now_ns, uint64_t active) {
  ASSERT_TRUE(group.settle(now_ns));
  group.finish_all();
  ASSERT_TRUE(group.settle(now_ns));
  for (const uint32_t rank : {0U, 2U}) {
    ASSERT_TRUE(group[rank].completed(seq)) << "rank " << rank;
    EXPECT_EQ(group[rank].reason(seq), 0U) << "rank " << rank;
    EXPECT_EQ(group[rank].completion(seq).rank_mask, active) << "rank " << rank;
  }
}

void expect_to_be_left_out(FakeRank& rank, uint64_t seq, int32_t index) {
  ASSERT_TRUE(rank.completed(seq));
  EXPECT_EQ(rank.reason(seq), static_cast<uint32_t>(EXPERTD_REASON_BAD_STATE));
  EXPECT_EQ(rank.completion(seq).rank, index);
  EXPECT_TRUE(rank.port.parts().empty());
}

TEST(EngineExclusion, EndsOnlyTheOperationOfAnExcludedRankAtItsDeadline) {
  FakeGroup group(3, true);
  group.shared.change_excluded(base::RankSet(2), {});
  group[1].submit(due_at(100));
  group[0].submit(due_at(1'000));
  ASSERT_TRUE(group.settle(99));
  EXPECT_FALSE(group[1].completed(1));
  ASSERT_TRUE(group.settle(100));
  expect_to_be_left_out(group[1], 1, 1);
  EXPECT_FALSE(group[0].completed(1));
  group[2].submit(due_at(1'000));
  expect_to_end_well(group, 1, 200, 5);
  EXPECT_EQ(group[1].completions.count[1], 1U);
}

TEST(EngineExclusion, EndsOnlyTheOperationOfARankExcludedAfterItSubmitted) {
  FakeGroup group(3, true);
  group[1].submit(due_at(100));
  group[0].submit(due_at(1'000));
  ASSERT_TRUE(group.settle(50));
  group.shared.change_excluded(base::RankSet(2), {});
  ASSERT_TRUE(group.settle(100));
  expect_to_be_left_out(group[1], 1, 1);
  group[2].submit(due_at(1'000));
  expect_to_end_well(group, 1, 200, 5);
}

TEST(EngineExclusion, EndsTheOperationOfAllAtTheDeadlineOfARankReadmittedBefore) {
  FakeGroup group(3, true);
  group.shared.change_excluded(base::RankSet(2), {});
  group[1].submit(due_at(100));
  group[0].submit(due_at(1'000));
  ASSERT_TRUE(group.settle(50));
  group.shared.change_excluded({}, base::RankSet(~0ULL));
  ASSERT_TRUE(group.settle(100));
  for (const uint32_t rank : {0U, 1U}) {
    ASSERT_TRUE(group[rank].completed(1));
    EXPECT_EQ(group[rank].reason(1), static_cast<uint32_t>(EXPERTD_REASON_TIMEOUT));
    EXPECT_EQ(group[rank].completion(1).rank, 2);
  }
}

// The rank's request is gone by then, so nobody may count on it again.
TEST(EngineExclusion, LeavesARankReadmittedAfterItsDeadlineOutOfThatOperationAlone) {
  FakeGroup group(3, true);
  group.shared.change_excluded(base::RankSet(2), {});
  group[1].submit(due_at(100));
  ASSERT_TRUE(group.settle(100));
  expect_to_be_left_out(group[1], 1, 1);
  group.shared.change_excluded({}, base::RankSet(~0ULL));
  group[0].submit(due_at(1'000));
  group[2].submit(due_at(1'000));
  expect_to_end_well(group, 1, 200, 5);
  EXPECT_EQ(group[0].completion(1).flags, static_cast<uint32_t>(EXPERTD_COMPLETION_DEGRADED));
  group.submit_all(due_at(1'000));
  expect_to_end_well(group, 2, 300, 7);
  EXPECT_EQ(group[1].reason(2), 0U);
}

TEST(EngineExclusion, LetsTheOthersEndAnOperationThatARankWithdrewFrom) {
  FakeGroup group(3, true);
  group.shared.change_excluded(base::RankSet(2), {});
  group[1].submit(due_at(100));
  ASSERT_TRUE(group.settle(100));
  group.shared.change_excluded({}, base::RankSet(~0ULL));
  group[0].submit(due_at(500));
  ASSERT_TRUE(group.settle(500));
  EXPECT_EQ(group[0].reason(1), static_cast<uint32_t>(EXPERTD_REASON_TIMEOUT));
  EXPECT_EQ(group[0].completion(1).rank, 2);
  EXPECT_EQ(group[1].completions.count[1], 1U);
}

TEST(EngineExclusion, EndsAnExcludedRanksRefusedOperationWithTheRefusal) {
  FakeGroup group(3, true);
  group.shared.change_excluded(base::RankSet(2), {});
  engine::Request refused = due_at(100);
  refused.rejected_reason = EXPERTD_REASON_NO_SUCH_BUFFER;
  group[1].submit(refused);
  ASSERT_TRUE(group.settle(100));
  EXPECT_EQ(group[1].reason(1), static_cast<uint32_t>(EXPERTD_REASON_NO_SUCH_BUFFER));
  group[0].submit(due_at(1'000));
  group[2].submit(due_at(1'000));
  expect_to_end_well(group, 1, 200, 5);
}

// The rank looks while another stands between its claim of the operation and the verdict, and gives the entry back.
TEST(EngineExclusion, StaysOutOfWhatItWithdrewFromWhileItWasBeingDecided) {
  FakeGroup group(3, true);
  group.shared.change_excluded(base::RankSet(2), {});
  group[1].submit(due_at(100));
  group.shared.entry(1).verdict = 1 << 2 | 1;
  ASSERT_TRUE(group.settle(100));
  EXPECT_FALSE(group[1].completed(1));
  group.shared.entry(1).verdict = 0;
  group.shared.change_excluded({}, base::RankSet(2));
  ASSERT_TRUE(group.settle(101));
  expect_to_be_left_out(group[1], 1, 1);
  group[0].submit(due_at(1'000));
  group[2].submit(due_at(1'000));
  expect_to_end_well(group, 1, 200, 5);
}

// Nobody has the operations that the rank withdrew from any more, yet their exchange pages and entries are used again.
TEST(EngineExclusion, GoesOnAloneAfterAllThatItLeftTheOthersToDecideAreLost) {
  FakeGroup group(2, true);
  group.shared.change_excluded(base::RankSet(2), {});
  constexpr uint64_t kWithdrawn = 5;
  for (uint64_t seq = 1; seq <= kWithdrawn; ++seq) {
    group[1].submit(due_at(100));
    ASSERT_TRUE(group.settle(100));
    ASSERT_EQ(group[1].reason(seq), static_cast<uint32_t>(EXPERTD_REASON_BAD_STATE));
  }
  group.shared.change_excluded({}, base::RankSet(~0ULL));
  group.end_session(0, 101);
  for (uint64_t seq = kWithdrawn + 1; seq <= 2 * GroupShared::kEntries; ++seq) {
    group[1].submit(due_at(1'000));
    ASSERT_TRUE(group.settle(200));
    group[1].port.finish_all();
    ASSERT_TRUE(group.settle(200));
    ASSERT_TRUE(group[1].completed(seq)) << "operation " << seq;
    ASSERT_EQ(group[1].reason(seq), 0U) << "operation " << seq;
  }
}

TEST(EngineExclusion, HarmsNobodyWhenItRanAheadByMoreOperationsThanThereAreEntries) {
  FakeGroup group(3, true);
  group.shared.change_excluded(base::RankSet(2), {});
  for (uint64_t seq = 1; seq <= GroupShared::kEntries + 10; ++seq) {
    group[1].submit(due_at(100));
    ASSERT_TRUE(group.settle(100));
    ASSERT_EQ(group[1].reason(seq), static_cast<uint32_t>(EXPERTD_REASON_BAD_STATE));
  }
  group.shared.change_excluded({}, base::RankSet(~0ULL));
  group[1].submit(due_at(110));
  ASSERT_TRUE(group.settle(109));
  EXPECT_FALSE(group[1].completed(GroupShared::kEntries + 11));
  ASSERT_TRUE(group.settle(110));
  EXPECT_EQ(group[1].reason(GroupShared::kEntries + 11), static_cast<uint32_t>(EXPERTD_REASON_TIMEOUT));
  EXPECT_EQ(group[1].completion(GroupShared::kEntries + 11).rank, 0);
  for (uint64_t seq = 1; seq <= GroupShared::kEntries + 11; ++seq) {
    group[0].submit(due_at(1'000));
    group[2].submit(due_at(1'000));
    expect_to_end_well(group, seq, 200, 5);
    ASSERT_FALSE(HasFailure()) << "operation " << seq;
  }
  group.submit_all(due_at(1'000));
  expect_to_end_well(group, GroupShared::kEntries + 12, 300, 7);
}

}  // namespace
}  // namespace expertd::test
