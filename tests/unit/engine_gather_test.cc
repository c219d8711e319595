// SPDX-License-Identifier: Apache-2.0
// Gathering, launching and completing operations whose ranks all behave.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <numeric>

#include "tests/support/fake_engine_group.h"

namespace expertd::test {
namespace {

using engine::kExchangePages;

TEST(EngineGather, LaunchesNothingUntilTheLastRankSubmitted) {
  FakeGroup group(3);
  group[0].submit();
  group[2].submit();
  ASSERT_TRUE(group.settle(1));
  EXPECT_TRUE(group[0].port.parts().empty());
  group[1].submit();
  ASSERT_TRUE(group.settle(2));
  for (uint32_t rank = 0; rank < 3; ++rank) {
    EXPECT_EQ(group[rank].port.parts().size(), 1U);
  }
}

TEST(EngineGather, LaunchesInWhateverOrderTheRanksSubmit) {
  std::array<uint32_t, 4> order{};
  std::iota(order.begin(), order.end(), 0U);
  do {
    FakeGroup group(4);
    for (const uint32_t rank : order) {
      group[rank].submit();
      (void)group[rank].run(1);
    }
    ASSERT_TRUE(group.settle(1));
    group.finish_all();
    ASSERT_TRUE(group.settle(2));
    for (uint32_t rank = 0; rank < 4; ++rank) {
      EXPECT_EQ(group[rank].reason(1), 0U);
    }
  } while (std::next_permutation(order.begin(), order.end()));
}

TEST(EngineGather, TellsTheDeviceWhoTakesPart) {
  FakeGroup group(2);
  group.submit_all();
  ASSERT_TRUE(group.settle(1));
  const engine::LaunchSpec& spec = group[1].port.parts()[0].spec;
  EXPECT_EQ(spec.group.value, 7U);
  EXPECT_EQ(spec.group_op, 1U);
  EXPECT_EQ(spec.ranks, 2U);
  EXPECT_EQ(spec.rank, 1U);
  EXPECT_EQ(spec.active_ranks, base::RankSet(3));
  EXPECT_EQ(spec.own, &group[1].session().request(0));
  EXPECT_EQ(spec.requests[0], &group[0].session().request(0));
  EXPECT_EQ(spec.requests[1], &group[1].session().request(0));
  EXPECT_EQ(spec.flags, &group.shared.entry(1).flags);
}

TEST(EngineGather, TellsWhoSubmittedLastAndForHowLongTheOthersWaited) {
  FakeGroup group(3);
  engine::Request request = plain_request();
  group[0].submit(request);
  group[2].submit(request);
  ASSERT_TRUE(group.settle(1));
  request.admit_ns = 50;
  group[1].submit(request);
  ASSERT_TRUE(group.settle(90));  // the loops' own delay is no waiting for others
  group.finish_all();
  ASSERT_TRUE(group.settle(100));
  for (uint32_t rank = 0; rank < 3; ++rank) {
    const engine::HeldUp& held = group[rank].observer.last_held_up;
    EXPECT_EQ(held.group.value, 7U);
    EXPECT_EQ(held.rank, rank);
    EXPECT_EQ(held.last_rank, 1);
    EXPECT_EQ(held.waited_ns, rank == 1 ? 0U : 50U);
    EXPECT_FALSE(held.counts) << "the device tells nothing of them";
  }
}

TEST(EngineGather, LaunchesTheOperationsOfASessionInOrderOfSubmission) {
  FakeGroup group(2);
  for (uint32_t i = 0; i < 5; ++i) {
    group.submit_all();
  }
  ASSERT_TRUE(group.settle(1));
  ASSERT_EQ(group[0].port.parts().size(), 5U);
  for (uint32_t i = 0; i < 5; ++i) {
    EXPECT_EQ(group[0].port.parts()[i].spec.group_op, i + 1);
    EXPECT_EQ(group[0].port.parts()[i].words.seq, i + 1);
  }
}

TEST(EngineGather, KeepsALaterLocalOperationBehindOneThatStillGathers) {
  FakeGroup group(2);
  group[0].submit();
  group[0].submit_local();
  ASSERT_TRUE(group.settle(1));
  EXPECT_TRUE(group[0].port.parts().empty());
  group[1].submit();
  ASSERT_TRUE(group.settle(1));
  ASSERT_EQ(group[0].port.parts().size(), 2U);
  EXPECT_EQ(group[0].port.parts()[0].words.seq, 1U);
  EXPECT_EQ(group[0].port.parts()[1].words.seq, 2U);
}

TEST(EngineGather, LaunchesALocalOperationWithoutAGroup) {
  FakeGroup group(2);
  const uint64_t seq = group[0].submit_local();
  ASSERT_TRUE(group.settle(1));
  ASSERT_EQ(group[0].port.parts().size(), 1U);
  EXPECT_EQ(group[0].port.parts()[0].spec.group.value, 0U);
  group.finish_all();
  ASSERT_TRUE(group.settle(2));
  EXPECT_EQ(group[0].reason(seq), 0U);
  EXPECT_EQ(group[0].completion(seq).group_op, 0U);
}

TEST(EngineGather, CompletesEveryOperationOnce) {
  FakeGroup group(2);
  for (uint32_t i = 0; i < 6; ++i) {
    group.submit_all();
  }
  ASSERT_TRUE(group.settle(1));
  group.finish_all();
  ASSERT_TRUE(group.settle(2));
  ASSERT_TRUE(group.settle(3));
  for (uint64_t seq = 1; seq <= 6; ++seq) {
    EXPECT_EQ(group[0].completions.count[seq], 1U);
    EXPECT_EQ(group[1].completions.count[seq], 1U);
  }
  EXPECT_EQ(group[0].observer.completions, 6U);
  EXPECT_TRUE(group[0].engine().idle());
  EXPECT_EQ(group[0].session().outstanding(), 0U);
}

TEST(EngineGather, CopiesTheReportOfThePartIntoTheCompletion) {
  FakeGroup group(1);
  const uint64_t seq = group.submit_all();
  ASSERT_TRUE(group.settle(5));
  kernels::OpReport report;
  report.recv_rows = 9;
  report.local_bytes = 100;
  report.remote_bytes = 200;
  report.expert_count_entries = 2;
  report.expert_counts[0] = 3;
  report.expert_counts[1] = 6;
  group[0].port.finish(1, report);
  engine::Outcome& outcome = group[0].port.at(1).outcome;
  outcome.executor = EXPERTD_COMPLETION_EXECUTOR_SM;
  outcome.sms = 24;
  outcome.start_ns = 6;
  outcome.end_ns = 7;
  ASSERT_TRUE(group.settle(8));
  const expertd_completion& completion = group[0].completion(seq);
  EXPECT_EQ(completion.seq, seq);
  EXPECT_EQ(completion.recv_rows, 9U);
  EXPECT_EQ(completion.local_bytes, 100U);
  EXPECT_EQ(completion.remote_bytes, 200U);
  EXPECT_EQ(completion.expert_count_entries, 2U);
  EXPECT_EQ(completion.expert_counts[1], 6U);
  EXPECT_EQ(completion.rank, -1);
  EXPECT_EQ(completion.rank_mask, 1U);
  EXPECT_EQ(completion.flags, 0U);
  EXPECT_EQ(completion.launch_ns, 5U);
  EXPECT_EQ(completion.complete_ns, 8U);
  EXPECT_EQ(completion.executor, static_cast<uint32_t>(EXPERTD_COMPLETION_EXECUTOR_SM));
  EXPECT_EQ(completion.sms, 24U);
}

TEST(EngineGather, AnEndThatADeviceSawDuringTheTurnIsNotBehindTheCompletion) {
  FakeGroup group(1);
  const uint64_t seq = group.submit_all();
  ASSERT_TRUE(group.settle(5));
  group[0].port.finish(1);
  group[0].port.at(1).outcome.end_ns = 11;
  ASSERT_TRUE(group.settle(8));
  EXPECT_EQ(group[0].completion(seq).complete_ns, 11U);
}

TEST(EngineGather, NeverReportsMoreExpertCountsThanACompletionHolds) {
  FakeGroup group(1);
  const uint64_t seq = group.submit_all();
  ASSERT_TRUE(group.settle(1));
  kernels::OpReport report;
  report.expert_count_entries = 5000;
  group[0].port.finish(1, report);
  ASSERT_TRUE(group.settle(2));
  EXPECT_EQ(group[0].completion(seq).expert_count_entries, EXPERTD_COMPLETION_EXPERTS);
}

TEST(EngineGather, CompletesInTheOrderInWhichPartsEnd) {
  FakeGroup group(1);
  group.submit_all();
  group.submit_all();
  ASSERT_TRUE(group.settle(1));
  group[0].port.finish(2);
  ASSERT_TRUE(group.settle(2));
  EXPECT_TRUE(group[0].completed(2));
  EXPECT_FALSE(group[0].completed(1));
  EXPECT_FALSE(group[0].session().slot_free(0));
  EXPECT_TRUE(group[0].session().slot_free(1));
}

TEST(EngineGather, TriesAgainWhenTheQueueOfTheDeviceIsFull) {
  FakeGroup group(1);
  group[0].port.full = true;
  const uint64_t seq = group.submit_all();
  ASSERT_TRUE(group.settle(1));
  EXPECT_GE(group[0].port.refused, 1U);
  EXPECT_FALSE(group[0].completed(seq));
  group[0].port.full = false;
  ASSERT_TRUE(group.settle(2));
  EXPECT_EQ(group[0].port.parts().size(), 1U);
}

TEST(EngineGather, LaunchesNothingPastAnOperationThatFoundTheQueueFull) {
  FakeGroup group(1);
  group[0].port.full = true;
  group.submit_all();
  group.submit_all();
  ASSERT_TRUE(group.settle(1));
  group[0].port.full = false;
  ASSERT_TRUE(group.settle(2));
  ASSERT_EQ(group[0].port.parts().size(), 2U);
  EXPECT_EQ(group[0].port.parts()[0].spec.group_op, 1U);
}

TEST(EngineGather, WaitsForTheExchangePageOfEightOperationsBefore) {
  FakeGroup group(2);
  for (uint32_t i = 0; i < kExchangePages + 1; ++i) {
    group.submit_all();
  }
  ASSERT_TRUE(group.settle(1));
  EXPECT_EQ(group[0].port.parts().size(), kExchangePages);
  group[0].port.finish(1);
  ASSERT_TRUE(group.settle(2));
  EXPECT_EQ(group[0].port.parts().size(), kExchangePages) << "the other rank still uses the page";
  group[1].port.finish(1);
  ASSERT_TRUE(group.settle(3));
  ASSERT_EQ(group[0].port.parts().size(), kExchangePages + 1);
  EXPECT_EQ(group[0].port.parts()[kExchangePages].spec.page, group[0].port.parts()[0].spec.page);
}

TEST(EngineGather, WaitsForThePageEvenWhenTheOperationBetweenNeverLaunched) {
  FakeGroup group(2);
  engine::Request refused = plain_request();
  refused.rejected_reason = EXPERTD_REASON_NO_SUCH_BUFFER;
  for (uint32_t i = 1; i <= 2 * kExchangePages + 1; ++i) {
    group.submit_all(i == kExchangePages + 1 ? refused : plain_request());
  }
  ASSERT_TRUE(group.settle(1));
  for (uint32_t part = 2; part <= group[0].port.parts().size(); ++part) {
    group[0].port.finish(part);
    group[1].port.finish(part);
  }
  ASSERT_TRUE(group.settle(2));
  for (const FakeDevicePort::Part& part : group[0].port.parts()) {
    EXPECT_NE(part.spec.group_op, 2 * kExchangePages + 1) << "operation 1 still uses the page";
  }
}

TEST(EngineGather, WaitsForThePageOfAnOperationThatIsBeingDecided) {
  FakeGroup group(1);
  group[0].submit();
  group.shared.entry(1).verdict = 1 << 2 | 1;
  bool changed = false;
  EXPECT_FALSE(group.shared.page_free(1 + kExchangePages, &changed));
  group.shared.entry(1).verdict = 0;
  EXPECT_FALSE(group.shared.page_free(1 + kExchangePages, &changed)) << "it is launched, and its part not ended";
  EXPECT_TRUE(changed);
  group.shared.part_finished(1);
  EXPECT_TRUE(group.shared.page_free(1 + kExchangePages, &changed));
  EXPECT_FALSE(changed);
}

TEST(EngineGather, PairsOperationsPastTheWrapOfItsEntries) {
  FakeGroup group(3);
  for (uint64_t seq = 1; seq <= 3 * engine::GroupShared::kEntries; ++seq) {
    group.submit_all();
    ASSERT_TRUE(group.settle(seq));
    group.finish_all();
    ASSERT_TRUE(group.settle(seq));
    for (uint32_t rank = 0; rank < 3; ++rank) {
      ASSERT_TRUE(group[rank].completed(seq));
      ASSERT_EQ(group[rank].completion(seq).group_op, seq);
      ASSERT_EQ(group[rank].reason(seq), 0U);
    }
    if (seq % EXPERTD_RING_SLOTS_MAX == 0) {
      ASSERT_EQ(group[0].engine().next_deadline_ns(), ~0ULL);
    }
  }
  EXPECT_EQ(group.shared.launched_ops(), 3U * engine::GroupShared::kEntries);
}

TEST(EngineGather, WakesTheOtherDevicesWhenItDecided) {
  FakeGroup group(3);
  group.submit_all();
  (void)group[1].run(1);
  EXPECT_GE(group.wake.woken[0], 1U);
  EXPECT_GE(group.wake.woken[2], 1U);
  EXPECT_EQ(group.wake.woken[1], 0U);
}

TEST(EngineGather, WakesTheOtherDevicesWhenTheLastPartFreesAPageOneWaitsFor) {
  FakeGroup group(2);
  for (uint32_t i = 0; i < kExchangePages + 1; ++i) {
    group.submit_all();
  }
  ASSERT_TRUE(group.settle(1));
  group[0].port.finish(1);
  ASSERT_TRUE(group.settle(2));
  group.wake.woken.clear();
  group[1].port.finish(1);
  (void)group[1].run(3);
  EXPECT_GE(group.wake.woken[0], 1U);
}

TEST(EngineGather, NamesTheEarliestDeadlineOfWhatIsOutstanding) {
  FakeGroup group(2);
  engine::Request request = plain_request();
  request.deadline_ns = 500;
  group[0].submit(request);
  request.deadline_ns = 300;
  group[0].submit(request);
  (void)group[0].run(1);
  EXPECT_EQ(group[0].engine().next_deadline_ns(), 300U);
}

TEST(EngineGather, KnowsWhichMappingsItsOperationsUse) {
  FakeGroup group(1);
  engine::Mapping mapping;
  engine::Mapping other;
  engine::Request request = plain_request();
  request.tensors[EXPERTD_IN_X] = {&mapping, 0};
  group[0].submit(request);
  EXPECT_TRUE(group[0].session().uses(&mapping));
  EXPECT_FALSE(group[0].session().uses(&other));
  EXPECT_TRUE(group[0].session().uses(group[0].state()));
  ASSERT_TRUE(group.settle(1));
  group.finish_all();
  ASSERT_TRUE(group.settle(2));
  EXPECT_FALSE(group[0].session().uses(&mapping));
  EXPECT_FALSE(group[0].session().uses(group[0].state()));
}

}  // namespace
}  // namespace expertd::test
