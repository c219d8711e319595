// SPDX-License-Identifier: Apache-2.0
// Lost ranks, masks and the end of sessions, in every stage of an operation.
#include <gtest/gtest.h>

#include "tests/support/fake_engine_group.h"

namespace expertd::test {
namespace {

TEST(EngineLoss, EndsAGatheringOperationOfAFailGroupNamingTheRank) {
  FakeGroup group(3);
  group[0].submit();
  group[1].submit();
  ASSERT_TRUE(group.settle(1));
  group.end_session(2, 2);
  ASSERT_TRUE(group.settle(2));
  for (const uint32_t rank : {0U, 1U}) {
    EXPECT_EQ(group[rank].reason(1), static_cast<uint32_t>(EXPERTD_REASON_PEER_LOST));
    EXPECT_EQ(group[rank].completion(1).rank, 2);
    EXPECT_TRUE(group[rank].port.parts().empty());
  }
}

TEST(EngineLoss, RefusesLaterOperationsOfAFailGroup) {
  FakeGroup group(2);
  group.end_session(1, 1);
  group[0].submit();
  ASSERT_TRUE(group.settle(2));
  EXPECT_EQ(group[0].reason(1), static_cast<uint32_t>(EXPERTD_REASON_PEER_LOST));
}

TEST(EngineLoss, NeverLaunchesAFailGroupWithoutTheLostRank) {
  engine::GroupShared shared(group_settings(2, false));
  const engine::Request request = plain_request();
  shared.post(1, 0, &request);
  shared.set_lost(1);
  bool decided = false;
  EXPECT_EQ(shared.try_decide(1, &decided), engine::Verdict::kFailed);
  EXPECT_EQ(shared.entry(1).failure.reason, static_cast<uint32_t>(EXPERTD_REASON_PEER_LOST));
  EXPECT_EQ(shared.entry(1).failure.rank, 1);
}

TEST(EngineLoss, AbortsARunningOperationInBothModes) {
  for (const bool mask : {false, true}) {
    FakeGroup group(3, mask);
    group.submit_all();
    ASSERT_TRUE(group.settle(1));
    group.end_session(1, 2);
    ASSERT_TRUE(group.settle(2));
    for (const uint32_t rank : {0U, 2U}) {
      EXPECT_EQ(group[rank].reason(1), static_cast<uint32_t>(EXPERTD_REASON_PEER_LOST));
      EXPECT_EQ(group[rank].completion(1).rank, 1);
    }
    EXPECT_TRUE(group[1].completions.order.empty()) << "a closed session gets no completion";
  }
}

// A rank that looked while another was ending the operation saw it neither open nor ended, and sleeps since.
TEST(EngineLoss, WakesTheOthersWhenItEndsAGatheringOperation) {
  FakeGroup group(3);
  group.submit_all();
  group.shared.set_lost(2);
  group.wake.woken.clear();
  (void)group[0].run(1);
  EXPECT_EQ(group[0].reason(1), static_cast<uint32_t>(EXPERTD_REASON_PEER_LOST));
  EXPECT_GE(group.wake.woken[1], 1U);
}

TEST(EngineLoss, WakesTheOthersWhenItAbortsARunningOperation) {
  FakeGroup group(3);
  group.submit_all();
  ASSERT_TRUE(group.settle(1));
  group.shared.set_lost(2);
  group[0].port.ends_on_abort = false;
  group.wake.woken.clear();
  (void)group[0].run(2);
  EXPECT_NE(group[0].port.parts()[0].abort_reason, 0U);
  EXPECT_GE(group.wake.woken[1], 1U);
}

TEST(EngineLoss, LetsAnOperationEndWellWhenTheLostRankWasThroughWithIt) {
  FakeGroup group(2, true);
  group.submit_all();
  ASSERT_TRUE(group.settle(1));
  group[1].port.finish(1);
  ASSERT_TRUE(group.settle(2));
  ASSERT_TRUE(group[1].completed(1));
  group.end_session(1, 3);
  ASSERT_TRUE(group.settle(3));
  EXPECT_FALSE(group[0].completed(1));
  group[0].port.finish(1);
  ASSERT_TRUE(group.settle(4));
  EXPECT_EQ(group[0].reason(1), 0U);
}

TEST(EngineLoss, GoesOnWithoutTheLostRankUnderAMask) {
  FakeGroup group(3, true);
  group[0].submit();
  group[2].submit();
  ASSERT_TRUE(group.settle(1));
  const uint64_t epoch = group.shared.epoch();
  group.end_session(1, 2);
  ASSERT_TRUE(group.settle(2));
  ASSERT_EQ(group[0].port.parts().size(), 1U);
  EXPECT_EQ(group[0].port.parts()[0].spec.active_ranks, base::RankSet(5));
  EXPECT_EQ(group[0].port.parts()[0].spec.requests[1], nullptr);
  group.finish_all();
  ASSERT_TRUE(group.settle(3));
  for (const uint32_t rank : {0U, 2U}) {
    EXPECT_EQ(group[rank].reason(1), 0U);
    EXPECT_EQ(group[rank].completion(1).flags, static_cast<uint32_t>(EXPERTD_COMPLETION_DEGRADED));
    EXPECT_EQ(group[rank].completion(1).rank_mask, 5U);
    EXPECT_EQ(group[rank].completion(1).epoch, epoch + 1);
  }
}

TEST(EngineLoss, LeavesOutARankThatSubmittedAndWasLostBeforeTheDecision) {
  FakeGroup group(3, true);
  group[1].submit();
  group[0].submit();
  (void)group[1].run(1);
  group.end_session(1, 2);
  EXPECT_TRUE(group[1].drained());
  group[2].submit();
  ASSERT_TRUE(group.settle(3));
  ASSERT_EQ(group[2].port.parts().size(), 1U);
  EXPECT_EQ(group[2].port.parts()[0].spec.active_ranks, base::RankSet(5));
}

TEST(EngineLoss, TellsAnExcludedRankThatItsOperationRanWithoutIt) {
  FakeGroup group(2, true);
  group.shared.change_excluded(base::RankSet(2), {});
  group.submit_all();
  ASSERT_TRUE(group.settle(1));
  group.finish_all();
  ASSERT_TRUE(group.settle(2));
  EXPECT_EQ(group[0].reason(1), 0U);
  EXPECT_EQ(group[0].completion(1).rank_mask, 1U);
  EXPECT_EQ(group[1].reason(1), static_cast<uint32_t>(EXPERTD_REASON_BAD_STATE));
  EXPECT_TRUE(group[1].port.parts().empty());
}

TEST(EngineLoss, TakesAReadmittedRankBackWithANewEpoch) {
  FakeGroup group(2, true);
  group.shared.change_excluded(base::RankSet(2), {});
  const uint64_t masked_epoch = group.shared.epoch();
  group.submit_all();
  ASSERT_TRUE(group.settle(1));
  group.finish_all();
  group.shared.change_excluded({}, base::RankSet(~0ULL));
  group.submit_all();
  ASSERT_TRUE(group.settle(2));
  group.finish_all();
  ASSERT_TRUE(group.settle(3));
  EXPECT_EQ(group[1].reason(2), 0U);
  EXPECT_EQ(group[1].completion(2).rank_mask, 3U);
  EXPECT_EQ(group[1].completion(2).epoch, masked_epoch + 1);
}

TEST(EngineLoss, NeverReportsSuccessWhenEveryRankIsExcluded) {
  FakeGroup group(2, true);
  group.shared.change_excluded(base::RankSet(3), {});
  group.submit_all();
  ASSERT_TRUE(group.settle(1));
  for (uint32_t rank = 0; rank < 2; ++rank) {
    ASSERT_TRUE(group[rank].completed(1));
    EXPECT_EQ(group[rank].reason(1), static_cast<uint32_t>(EXPERTD_REASON_BAD_STATE));
    EXPECT_TRUE(group[rank].port.parts().empty());
  }
}

TEST(EngineLoss, EndsTheGatheringOperationsOfARankThatLeavesAMaskGroup) {
  FakeGroup group(2, true);
  group[1].submit();
  ASSERT_TRUE(group.settle(1));
  group.shared.set_lost(1);
  ASSERT_TRUE(group.settle(2));
  ASSERT_TRUE(group[1].completed(1));
  EXPECT_EQ(group[1].reason(1), static_cast<uint32_t>(EXPERTD_REASON_PEER_LOST));
  group[0].submit();
  ASSERT_TRUE(group.settle(3));
  ASSERT_EQ(group[0].port.parts().size(), 1U);
  EXPECT_EQ(group[0].port.parts()[0].spec.active_ranks, base::RankSet(1));
}

TEST(EngineLoss, NamesTheLostRankWhenNoRankIsLeft) {
  FakeGroup group(1, true);
  group.shared.set_lost(0);
  group[0].submit();
  ASSERT_TRUE(group.settle(1));
  ASSERT_TRUE(group[0].completed(1));
  EXPECT_EQ(group[0].reason(1), static_cast<uint32_t>(EXPERTD_REASON_PEER_LOST));
}

TEST(EngineClose, DrainsAtOnceWhenNothingIsOutstanding) {
  FakeGroup group(1);
  group.end_session(0, 1);
  EXPECT_TRUE(group[0].drained());
}

TEST(EngineClose, DrainsASessionWhoseOperationGathers) {
  FakeGroup group(2);
  group[0].submit();
  ASSERT_TRUE(group.settle(1));
  EXPECT_FALSE(group[0].drained());
  group.end_session(0, 2);
  EXPECT_TRUE(group[0].drained());
  EXPECT_TRUE(group[0].completions.order.empty());
}

TEST(EngineClose, DrainsASessionThatHasNotLaunchedWhatWasAgreed) {
  FakeGroup group(2);
  group[0].port.full = true;
  group.submit_all();
  ASSERT_TRUE(group.settle(1));
  ASSERT_EQ(group[1].port.parts().size(), 1U);
  group[0].port.full = false;
  group.end_session(0, 2);
  ASSERT_TRUE(group.settle(2));
  EXPECT_TRUE(group[0].port.parts().empty()) << "nothing is launched for a closed session";
  EXPECT_TRUE(group[0].drained());
  EXPECT_EQ(group[1].reason(1), static_cast<uint32_t>(EXPERTD_REASON_PEER_LOST));
  EXPECT_EQ(group[1].completion(1).rank, 0);
}

TEST(EngineClose, DrainsASessionOnlyAfterTheLastPartThatReadsItsRequest) {
  FakeGroup group(2);
  group[1].port.ends_on_abort = false;
  group.submit_all();
  ASSERT_TRUE(group.settle(1));
  group.end_session(0, 2);
  ASSERT_TRUE(group.settle(2));
  EXPECT_FALSE(group[0].drained());
  kernels::OpReport report;
  report.reason = EXPERTD_REASON_PEER_LOST;
  group[1].port.finish(1, report);
  ASSERT_TRUE(group.settle(3));
  EXPECT_TRUE(group[0].drained());
}

TEST(EngineClose, DrainsASessionWhoseAbortedOperationEnds) {
  FakeGroup group(2);
  group[1].port.ends_on_abort = false;
  group.submit_all();
  ASSERT_TRUE(group.settle(1));
  ASSERT_TRUE(group.settle(kDeadlineNs));
  group.end_session(0, kDeadlineNs + 1);
  EXPECT_FALSE(group[0].drained());
  group[1].port.finish(1);
  ASSERT_TRUE(group.settle(kDeadlineNs + 2));
  EXPECT_TRUE(group[0].drained());
  EXPECT_TRUE(group[0].completions.order.empty());
}

TEST(EngineClose, DrainsLocalOperationsThatWaitOrRun) {
  FakeGroup group(1);
  group[0].submit_local();
  ASSERT_TRUE(group.settle(1));
  group[0].port.full = true;
  group[0].submit_local();
  ASSERT_TRUE(group.settle(1));
  group.end_session(0, 2);
  ASSERT_TRUE(group.settle(2));
  EXPECT_TRUE(group[0].drained());
  EXPECT_EQ(group[0].port.parts()[0].abort_reason, static_cast<uint32_t>(EXPERTD_REASON_CANCELLED));
}

TEST(EngineClose, TouchesNoWordsAndTellsNobodyAfterwards) {
  FakeGroup group(2);
  group[0].submit();
  group[0].submit_local();
  group.end_session(0, 1);
  ASSERT_TRUE(group.settle(2));
  EXPECT_TRUE(group[0].port.released.empty());
  EXPECT_EQ(group[0].observer.completions, 0U);
}

TEST(EngineClose, LeavesOtherSessionsOfTheDeviceAlone) {
  FakeGroup group(1);
  FakeCompletionPort completions;
  engine::EngineSession other(base::SessionId{9}, &completions, nullptr);
  group[0].engine().add_session(&other);
  other.request(0) = plain_request();
  other.request(0).seq = 1;
  group[0].engine().submit(&other, 0, nullptr);
  group[0].submit();
  group.end_session(0, 1);
  ASSERT_TRUE(group.settle(2));
  EXPECT_TRUE(group[0].drained());
  group.finish_all();
  ASSERT_TRUE(group.settle(3));
  EXPECT_EQ(completions.count[1], 1U);
}

TEST(EngineClose, FreesThePagesOfWhatItAborted) {
  FakeGroup group(2, true);
  for (uint32_t i = 0; i < engine::kExchangePages + 2; ++i) {
    group.submit_all();
  }
  ASSERT_TRUE(group.settle(1));
  group.end_session(1, 2);
  ASSERT_TRUE(group.settle(2));
  EXPECT_TRUE(group[1].drained());
  EXPECT_TRUE(group.shared.quiet(1));
  EXPECT_EQ(group[0].session().outstanding(), 0U);
  group[0].submit();
  ASSERT_TRUE(group.settle(3));
  EXPECT_EQ(group[0].port.parts().back().spec.active_ranks, base::RankSet(1));
}

TEST(EngineLoss, OfAGpuIsToldBeforeTheOthersEnd) {
  FakeGroup group(2);
  group[1].port.ends_on_abort = false;  // its loop does not come back from the driver
  group.submit_all();
  ASSERT_TRUE(group.settle(1));
  kernels::OpReport report;
  report.reason = EXPERTD_REASON_GPU_LOST;
  group[0].port.finish(1, report);
  ASSERT_TRUE(group.settle(2));
  EXPECT_EQ(group[0].reason(1), static_cast<uint32_t>(EXPERTD_REASON_GPU_LOST));
  EXPECT_FALSE(group[1].completed(1));
}

}  // namespace
}  // namespace expertd::test
