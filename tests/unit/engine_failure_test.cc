// SPDX-License-Identifier: Apache-2.0
// Operations that fail: refusals, disagreements, deadlines, lost and masked ranks.
#include <gtest/gtest.h>

#include <string>

#include "daemon/engine/late_ranks.h"
#include "tests/support/fake_engine_group.h"

namespace expertd::test {
namespace {

engine::Request refused(uint32_t reason) {
  engine::Request request = plain_request();
  request.rejected_reason = reason;
  request.rejected_argument = EXPERTD_ARGUMENT_TOKENS;
  request.rejected_value = 70;
  request.rejected_minimum = 0;
  request.rejected_maximum = 64;
  return request;
}

TEST(EngineFailure, ReportsARefusalToItselfAndPeerRejectedToTheOthers) {
  FakeGroup group(3);
  group[0].submit();
  group[1].submit(refused(EXPERTD_REASON_TOKENS_EXCEED_MAX));
  group[2].submit();
  ASSERT_TRUE(group.settle(1));
  EXPECT_TRUE(group[0].port.parts().empty());
  const expertd_completion& own = group[1].completion(1);
  EXPECT_EQ(own.reason, EXPERTD_REASON_TOKENS_EXCEED_MAX);
  EXPECT_EQ(own.argument, EXPERTD_ARGUMENT_TOKENS);
  EXPECT_EQ(own.value, 70);
  EXPECT_EQ(own.minimum, 0);
  EXPECT_EQ(own.maximum, 64);
  for (const uint32_t rank : {0U, 2U}) {
    const expertd_completion& other = group[rank].completion(1);
    EXPECT_EQ(other.reason, EXPERTD_REASON_PEER_REJECTED);
    EXPECT_EQ(other.peer_reason, EXPERTD_REASON_TOKENS_EXCEED_MAX);
    EXPECT_EQ(other.rank, 1);
  }
}

TEST(EngineFailure, PairsTheNextOperationAfterARefusal) {
  FakeGroup group(2);
  group[0].submit();
  group[1].submit(refused(EXPERTD_REASON_NO_SUCH_BUFFER));
  group.submit_all();
  ASSERT_TRUE(group.settle(1));
  group.finish_all();
  ASSERT_TRUE(group.settle(2));
  EXPECT_EQ(group[0].reason(2), 0U);
  EXPECT_EQ(group[1].reason(2), 0U);
}

TEST(EngineFailure, ReleasesTheWordsOfAnOperationThatNeverLaunched) {
  FakeGroup group(1);
  group[0].submit(refused(EXPERTD_REASON_NO_SUCH_BUFFER));
  ASSERT_TRUE(group.settle(1));
  ASSERT_EQ(group[0].port.released.size(), 1U);
  EXPECT_EQ(group[0].port.released[0].first, 1U);
  EXPECT_EQ(group[0].port.released[0].second, static_cast<uint32_t>(EXPERTD_REASON_NO_SUCH_BUFFER));
}

engine::Request refused_by_client() {
  engine::Request request = refused(EXPERTD_REASON_WRONG_DTYPE);
  request.without_words = true;
  return request;
}

TEST(EngineFailure, WritesNoWordsForWhatTheClientRefused) {
  FakeGroup group(2);
  group[0].submit(refused_by_client());
  group[1].submit();
  ASSERT_TRUE(group.settle(1));
  EXPECT_EQ(group[0].reason(1), static_cast<uint32_t>(EXPERTD_REASON_WRONG_DTYPE));
  EXPECT_TRUE(group[0].port.released.empty());
  EXPECT_EQ(group[1].reason(1), static_cast<uint32_t>(EXPERTD_REASON_PEER_REJECTED));
  EXPECT_EQ(group[1].port.released.size(), 1U) << "the peer's stream waits";
}

TEST(EngineFailure, LaunchesBehindWhatTheClientRefusedBeforeThePeersHaveIssuedIt) {
  FakeGroup group(2);
  group[0].submit(refused_by_client());
  const uint64_t local = group[0].submit_local();
  const uint64_t behind = group[0].submit_local();
  ASSERT_TRUE(group.settle(1));
  ASSERT_EQ(group[0].port.parts().size(), 2U);
  EXPECT_EQ(group[0].port.parts()[0].words.seq, local);
  EXPECT_EQ(group[0].port.parts()[1].words.seq, behind);
  group.finish_all();
  ASSERT_TRUE(group.settle(2));
  EXPECT_EQ(group[0].reason(local), 0U);
  EXPECT_FALSE(group[0].completed(1)) << "it still counts";
  group[1].submit();
  ASSERT_TRUE(group.settle(3));
  EXPECT_EQ(group[0].reason(1), static_cast<uint32_t>(EXPERTD_REASON_WRONG_DTYPE));
  EXPECT_EQ(group[1].reason(1), static_cast<uint32_t>(EXPERTD_REASON_PEER_REJECTED));
}

TEST(EngineFailure, EndsARefusedLocalOperationAtOnce) {
  FakeGroup group(2);
  group[0].submit();
  const uint64_t seq = group[0].submit_local(refused(EXPERTD_REASON_NO_SUCH_GROUP));
  ASSERT_TRUE(group.settle(1));
  EXPECT_EQ(group[0].reason(seq), static_cast<uint32_t>(EXPERTD_REASON_NO_SUCH_GROUP));
  EXPECT_FALSE(group[0].completed(1));
}

struct Disagreement {
  const char* name;
  uint32_t argument;
  void (*change)(engine::Request& request);
};

class EngineMismatch : public testing::TestWithParam<Disagreement> {};

TEST_P(EngineMismatch, NamesTheArgumentAndTheRank) {
  FakeGroup group(3);
  engine::Request other = plain_request();
  GetParam().change(other);
  group[0].submit();
  group[1].submit();
  group[2].submit(other);
  ASSERT_TRUE(group.settle(1));
  for (uint32_t rank = 0; rank < 3; ++rank) {
    const expertd_completion& completion = group[rank].completion(1);
    EXPECT_EQ(completion.reason, EXPERTD_REASON_OP_MISMATCH);
    EXPECT_EQ(completion.argument, GetParam().argument);
    EXPECT_EQ(completion.rank, 2);
    EXPECT_NE(completion.value, completion.minimum);
    EXPECT_EQ(completion.minimum, completion.maximum);
    EXPECT_TRUE(group[rank].port.parts().empty());
  }
}

INSTANTIATE_TEST_SUITE_P(
    EveryAgreedArgument, EngineMismatch,
    testing::Values(
        Disagreement{"op", EXPERTD_ARGUMENT_OP, [](auto& r) { r.shape.kind = kernels::OpKind::kLlDispatch; }},
        Disagreement{"token_bound", EXPERTD_ARGUMENT_TOKEN_BOUND, [](auto& r) { r.token_bound = 32; }},
        Disagreement{"captured", EXPERTD_ARGUMENT_CAPTURE_LANE, [](auto& r) { r.captured = true; }},
        Disagreement{"executor", EXPERTD_ARGUMENT_EXECUTOR, [](auto& r) { r.copies = true; }},
        Disagreement{"dtype", EXPERTD_ARGUMENT_DTYPE, [](auto& r) { r.shape.payload = kernels::Payload::kBytes; }},
        Disagreement{"cached", EXPERTD_ARGUMENT_FLAGS, [](auto& r) { r.shape.cached = 1; }},
        Disagreement{"expanded", EXPERTD_ARGUMENT_FLAGS, [](auto& r) { r.shape.expanded = 1; }},
        Disagreement{"scale", EXPERTD_ARGUMENT_FLAGS, [](auto& r) { r.shape.scale = kernels::ScaleForm::kUe8m0; }},
        Disagreement{"weights", EXPERTD_ARGUMENT_IN_TOPK_WEIGHTS, [](auto& r) { r.with_weights = true; }},
        Disagreement{"row_bytes", EXPERTD_ARGUMENT_ROW_BYTES, [](auto& r) { r.shape.row_bytes = 512; }},
        Disagreement{"top_k", EXPERTD_ARGUMENT_TOP_K, [](auto& r) { r.shape.top_k = 2; }},
        Disagreement{"topk_idx_bytes", EXPERTD_ARGUMENT_TOPK_IDX_BYTES, [](auto& r) { r.shape.topk_idx_bytes = 4; }},
        Disagreement{"side", EXPERTD_ARGUMENT_SIDE_ELEMENTS, [](auto& r) { r.shape.side_elements = 2; }},
        Disagreement{"side_bytes", EXPERTD_ARGUMENT_SIDE_ELEMENT_BYTES,
                     [](auto& r) { r.shape.side_element_bytes = 2; }},
        Disagreement{"alignment", EXPERTD_ARGUMENT_EXPERT_ALIGNMENT, [](auto& r) { r.shape.expert_alignment = 8; }}),
    [](const auto& row) { return std::string(row.param.name); });

TEST(EngineFailure, LetsARankWithoutRowsLeaveOptionalTensorsOut) {
  FakeGroup group(2);
  engine::Request full = plain_request();
  full.with_weights = true;
  full.shape.side_elements = 8;
  full.shape.side_element_bytes = 4;
  engine::Request empty = plain_request();
  empty.shape.tokens = 0;
  group[0].submit(full);
  group[1].submit(empty);
  ASSERT_TRUE(group.settle(1));
  EXPECT_EQ(group[0].port.parts().size(), 1U);
}

// A peer writes rows of its own side_elements into this rank's output, which was checked against this rank's own.
TEST(EngineFailure, HoldsARankWithoutRowsToTheSideRowsThatOthersWriteIntoIt) {
  FakeGroup group(2);
  engine::Request full = plain_request();
  full.shape.side_elements = 64;
  full.shape.side_element_bytes = 4;
  engine::Request small = plain_request();
  small.shape.tokens = 0;
  small.shape.side_elements = 1;
  small.shape.side_element_bytes = 1;
  group[0].submit(full);
  group[1].submit(small);
  ASSERT_TRUE(group.settle(1));
  EXPECT_TRUE(group[0].port.parts().empty());
  ASSERT_TRUE(group[0].completed(1));
  EXPECT_EQ(group[0].reason(1), static_cast<uint32_t>(EXPERTD_REASON_OP_MISMATCH));
  EXPECT_EQ(group[0].completion(1).argument, static_cast<uint32_t>(EXPERTD_ARGUMENT_SIDE_ELEMENTS));
}

TEST(EngineFailure, HoldsARankWithoutRowsThatGaveASideOutputToItsSize) {
  FakeGroup group(2);
  engine::Mapping mapping;
  engine::Request full = plain_request();
  full.shape.side_elements = 64;
  full.shape.side_element_bytes = 4;
  engine::Request empty = plain_request();
  empty.shape.tokens = 0;
  empty.tensors[EXPERTD_OUT_SIDE] = {&mapping, 0};
  group[0].submit(full);
  group[1].submit(empty);
  ASSERT_TRUE(group.settle(1));
  ASSERT_TRUE(group[0].completed(1));
  EXPECT_EQ(group[0].reason(1), static_cast<uint32_t>(EXPERTD_REASON_OP_MISMATCH));
}

TEST(EngineFailure, NamesTheRankThatDidNotSubmitBeforeTheDeadline) {
  FakeGroup group(4);
  group[0].submit();
  group[1].submit();
  group[3].submit();
  ASSERT_TRUE(group.settle(kDeadlineNs - 1));
  EXPECT_FALSE(group[0].completed(1));
  ASSERT_TRUE(group.settle(kDeadlineNs));
  for (const uint32_t rank : {0U, 1U, 3U}) {
    const expertd_completion& completion = group[rank].completion(1);
    EXPECT_EQ(completion.reason, EXPERTD_REASON_TIMEOUT);
    EXPECT_EQ(completion.missing, EXPERTD_MISSING_SUBMISSION);
    EXPECT_EQ(completion.rank, 2);
  }
}

TEST(EngineFailure, GivesTheLateRankTheTimeoutAndPairsTheNextOperations) {
  FakeGroup group(2);
  group[0].submit();
  ASSERT_TRUE(group.settle(kDeadlineNs));
  engine::Request later = plain_request();
  later.deadline_ns = 3 * kDeadlineNs;
  group[1].submit(later);
  ASSERT_TRUE(group.settle(kDeadlineNs + 1));
  EXPECT_EQ(group[1].reason(1), static_cast<uint32_t>(EXPERTD_REASON_TIMEOUT));
  EXPECT_EQ(group[1].completion(1).rank, 1);
  group.submit_all(later);
  ASSERT_TRUE(group.settle(kDeadlineNs + 2));
  group.finish_all();
  ASSERT_TRUE(group.settle(kDeadlineNs + 3));
  EXPECT_EQ(group[0].reason(2), 0U);
  EXPECT_EQ(group[1].reason(2), 0U);
}

TEST(EngineFailure, GivesARankThatIsAWholeWrapLateItsTimeouts) {
  FakeGroup group(2);
  constexpr uint64_t kOps = engine::GroupShared::kEntries + 10;
  for (uint64_t i = 1; i <= kOps; ++i) {
    group[0].submit();
    ASSERT_TRUE(group.settle(kDeadlineNs));
    ASSERT_EQ(group[0].reason(i), static_cast<uint32_t>(EXPERTD_REASON_TIMEOUT));
  }
  for (uint64_t i = 1; i <= kOps; ++i) {
    group[1].submit();
    ASSERT_TRUE(group.settle(1));
    ASSERT_EQ(group[1].reason(i), static_cast<uint32_t>(EXPERTD_REASON_TIMEOUT));
    ASSERT_EQ(group[1].completion(i).rank, 1);
  }
  group.submit_all();
  ASSERT_TRUE(group.settle(1));
  EXPECT_EQ(group[0].port.parts().size(), 1U);
  EXPECT_EQ(group[1].port.parts().size(), 1U);
}

class EngineRunningTimeout : public testing::TestWithParam<uint32_t> {};

TEST_P(EngineRunningTimeout, SaysWhatTheDeviceWaitedForAndFromWhom) {
  FakeGroup group(3);
  for (uint32_t rank = 0; rank < 3; ++rank) {
    group[rank].port.missing_what = GetParam();
    group[rank].port.missing_ranks = base::RankSet(4);
  }
  group.submit_all();
  ASSERT_TRUE(group.settle(1));
  ASSERT_TRUE(group.settle(kDeadlineNs));
  for (uint32_t rank = 0; rank < 3; ++rank) {
    const expertd_completion& completion = group[rank].completion(1);
    EXPECT_EQ(completion.reason, EXPERTD_REASON_TIMEOUT);
    EXPECT_EQ(completion.missing, GetParam());
    EXPECT_EQ(completion.rank, 2);
    EXPECT_EQ(completion.recv_rows, 0U);
    EXPECT_EQ(group[rank].port.parts()[0].abort_reason, static_cast<uint32_t>(EXPERTD_REASON_TIMEOUT));
  }
}

INSTANTIATE_TEST_SUITE_P(EveryKind, EngineRunningTimeout,
                         testing::Values(EXPERTD_MISSING_DOORBELL, EXPERTD_MISSING_COUNTS, EXPERTD_MISSING_ROWS));

TEST(EngineFailure, NamesItselfWhenItsOwnQueueKeptTheOperationFromLaunching) {
  FakeGroup group(2);
  group[1].port.full = true;
  group.submit_all();
  ASSERT_TRUE(group.settle(1));
  (void)group[1].run(kDeadlineNs);
  ASSERT_TRUE(group.settle(kDeadlineNs));
  for (uint32_t rank = 0; rank < 2; ++rank) {
    EXPECT_EQ(group[rank].reason(1), static_cast<uint32_t>(EXPERTD_REASON_TIMEOUT));
    EXPECT_EQ(group[rank].completion(1).missing, static_cast<uint32_t>(EXPERTD_MISSING_DOORBELL));
    EXPECT_EQ(group[rank].completion(1).rank, 1);
  }
}

TEST(EngineFailure, AbortsARunningLocalOperationAtItsDeadline) {
  FakeGroup group(1);
  const uint64_t seq = group[0].submit_local();
  ASSERT_TRUE(group.settle(1));
  ASSERT_TRUE(group.settle(kDeadlineNs));
  EXPECT_EQ(group[0].reason(seq), static_cast<uint32_t>(EXPERTD_REASON_TIMEOUT));
  EXPECT_EQ(group[0].completion(seq).missing, static_cast<uint32_t>(EXPERTD_MISSING_DOORBELL));
}

TEST(EngineFailure, EndsALocalOperationAtItsDeadlineWhenTheQueueStaysFull) {
  FakeGroup group(1);
  group[0].port.full = true;
  const uint64_t seq = group[0].submit_local();
  ASSERT_TRUE(group.settle(kDeadlineNs));
  ASSERT_TRUE(group[0].completed(seq));
  EXPECT_EQ(group[0].reason(seq), static_cast<uint32_t>(EXPERTD_REASON_TIMEOUT));
}

TEST(EngineFailure, CompletesAnAbortedOperationOnlyWhenEveryPartEnded) {
  FakeGroup group(2);
  group[1].port.ends_on_abort = false;
  group.submit_all();
  ASSERT_TRUE(group.settle(1));
  ASSERT_TRUE(group.settle(kDeadlineNs));
  EXPECT_NE(group[1].port.parts()[0].abort_reason, 0U);
  EXPECT_TRUE(group[0].port.parts()[0].polled);
  EXPECT_FALSE(group[0].completed(1)) << "the other part may still read this rank's request";
  group.wake.woken.clear();
  kernels::OpReport report;
  report.reason = EXPERTD_REASON_TIMEOUT;
  group[1].port.finish(1, report);
  (void)group[1].run(kDeadlineNs);
  EXPECT_GE(group.wake.woken[0], 1U);
  ASSERT_TRUE(group.settle(kDeadlineNs));
  EXPECT_TRUE(group[0].completed(1));
  EXPECT_TRUE(group[1].completed(1));
}

TEST(EngineFailure, WakesAnAbortedRankWhenTheLastPartEndedInSuccess) {
  FakeGroup group(2);
  group.submit_all();
  ASSERT_TRUE(group.settle(1));
  (void)group[0].run(kDeadlineNs);
  (void)group[0].run(kDeadlineNs);
  ASSERT_FALSE(group[0].completed(1));
  group[1].port.finish(1);
  group.wake.woken.clear();
  (void)group[1].run(2);
  EXPECT_EQ(group[1].reason(1), 0U);
  EXPECT_GE(group.wake.woken[0], 1U);
}

TEST(EngineFailure, KeepsTheResultOfAPartThatFinishedBeforeItsAbort) {
  FakeGroup group(1);
  group[0].port.ends_on_abort = false;
  group.submit_all();
  ASSERT_TRUE(group.settle(1));
  ASSERT_TRUE(group.settle(kDeadlineNs));
  group[0].port.finish(1);
  ASSERT_TRUE(group.settle(kDeadlineNs));
  EXPECT_EQ(group[0].reason(1), 0U);
}

TEST(EngineFailure, ReportsWhatThePartItselfFound) {
  FakeGroup group(1);
  group.submit_all();
  ASSERT_TRUE(group.settle(1));
  kernels::OpReport report;
  report.reason = EXPERTD_REASON_CAPACITY_EXCEEDED;
  report.argument = EXPERTD_ARGUMENT_RECV_ROWS;
  report.value = 20;
  report.maximum = 10;
  report.rank = 0;
  group[0].port.finish(1, report);
  ASSERT_TRUE(group.settle(2));
  EXPECT_EQ(group[0].reason(1), static_cast<uint32_t>(EXPERTD_REASON_CAPACITY_EXCEEDED));
  EXPECT_EQ(group[0].completion(1).argument, static_cast<uint32_t>(EXPERTD_ARGUMENT_RECV_ROWS));
  EXPECT_EQ(group[0].completion(1).value, 20);
  EXPECT_EQ(group[0].completion(1).maximum, 10);
}

// Peers may still write the outputs of an aborted part, so its caller's stream goes on only when theirs have ended.
TEST(EngineFailure, LetsTheCallersStreamGoOnlyWhenEveryPartHasEnded) {
  FakeGroup group(2);
  group[1].port.ends_on_abort = false;
  group.submit_all();
  ASSERT_TRUE(group.settle(1));
  ASSERT_TRUE(group.settle(kDeadlineNs));
  EXPECT_TRUE(group[0].port.parts()[0].polled);
  EXPECT_TRUE(group[0].port.settled.empty());
  group[1].port.finish_all();
  ASSERT_TRUE(group.settle(kDeadlineNs + 1));
  EXPECT_FALSE(group[0].port.settled.empty());
  EXPECT_EQ(group[0].reason(1), EXPERTD_REASON_TIMEOUT);
}

TEST(EngineFailure, CompletesOnlyWhenThePartIsSettled) {
  FakeGroup group(1);
  group[0].port.settles = false;
  group.submit_all();
  ASSERT_TRUE(group.settle(1));
  ASSERT_TRUE(group.settle(kDeadlineNs));
  EXPECT_FALSE(group[0].completed(1));
  group[0].port.settles = true;
  ASSERT_TRUE(group.settle(kDeadlineNs + 1));
  EXPECT_EQ(group[0].reason(1), EXPERTD_REASON_TIMEOUT);
}

// Ranks behind a relay: see GroupSettings::exchange_pages.
TEST(EngineFailure, LaunchesOneOperationAtATimeWithOnePage) {
  FakeGroup group(2, false, 1);
  group.submit_all();
  group.submit_all();
  ASSERT_TRUE(group.settle(1));
  EXPECT_EQ(group[0].port.parts().size(), 1U);
  group[0].port.finish_all();
  ASSERT_TRUE(group.settle(2));
  EXPECT_EQ(group[0].port.parts().size(), 1U) << "the peer's part still runs";
  group[1].port.finish_all();
  ASSERT_TRUE(group.settle(3));
  EXPECT_EQ(group[0].port.parts().size(), 2U);
  EXPECT_EQ(group[1].port.parts().size(), 2U);
}

// Two ranks on the own node 0, three on node 1, one on node 2.
TEST(EngineLateRanks, NobodyIsNamedWhoMayHaveWaitedForAnother) {
  engine::Placement placement;
  placement.ranks_of = {{0, 1}, {2, 3, 5}, {4}};
  placement.node_of = {0, 0, 1, 1, 2, 1};
  const auto late = [&placement](uint64_t active, uint64_t ranks) {
    return engine::late_failure(&placement, base::RankSet(active), EXPERTD_MISSING_COUNTS, base::RankSet(ranks));
  };
  const engine::Failure whole = late(0b111111, 0b101100);
  EXPECT_EQ(whole.reason, EXPERTD_REASON_TIMEOUT);
  EXPECT_EQ(whole.missing, static_cast<uint32_t>(EXPERTD_MISSING_COUNTS));
  EXPECT_EQ(whole.rank, -1);
  EXPECT_EQ(whole.minimum, 2);
  EXPECT_EQ(whole.maximum, 5);
  EXPECT_EQ(late(0b111111, 0b100000).rank, 5) << "counts of its node came, so all ranks there have submitted";
  EXPECT_EQ(late(0b111111, 0b111100).rank, 4) << "alone on its node";
  EXPECT_EQ(late(0b111111, 0b101110).rank, 1) << "on the own node";
  EXPECT_EQ(late(0b010111, 0b000100).rank, 2) << "the others of its node take no part";
  EXPECT_EQ(
      engine::late_failure(&placement, base::RankSet(0b111111), EXPERTD_MISSING_ROWS, base::RankSet(0b101100)).rank, 2)
      << "all have begun";
  EXPECT_EQ(
      engine::late_failure(nullptr, base::RankSet(0b111111), EXPERTD_MISSING_COUNTS, base::RankSet(0b101100)).rank, 2)
      << "one node";
  EXPECT_EQ(late(0b111111, 0).rank, -1);
}

}  // namespace
}  // namespace expertd::test
