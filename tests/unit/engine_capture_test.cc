// SPDX-License-Identifier: Apache-2.0
// Captured operations at the engine: kept once by every rank, then only seen as replays that the device reports.
#include <gtest/gtest.h>

#include "tests/support/fake_engine_group.h"

namespace expertd::test {
namespace {

engine::Request captured_request(uint32_t lane = 0) {
  engine::Request request = plain_request();
  request.shape.kind = kernels::OpKind::kLlDispatch;
  request.captured = true;
  request.capture_lane = lane;
  return request;
}

TEST(EngineCapture, CompletesWithTheEntryAndItsWords) {
  FakeGroup group(2);
  const uint64_t seq = group.submit_all(captured_request(1));
  ASSERT_TRUE(group.settle(1));
  for (uint32_t rank = 0; rank < 2; ++rank) {
    ASSERT_EQ(group[rank].port.parts().size(), 1U);
    engine::Outcome& outcome = group[rank].port.at(1).outcome;
    outcome.capture_entry = 7 + rank;
    outcome.capture_words = 3;
    group[rank].port.at(1).ended = true;
  }
  ASSERT_TRUE(group.settle(2));
  for (uint32_t rank = 0; rank < 2; ++rank) {
    EXPECT_EQ(group[rank].reason(seq), 0U);
    EXPECT_EQ(group[rank].completion(seq).capture_entry, 7 + rank);
    EXPECT_EQ(group[rank].completion(seq).capture_words, 3U);
  }
}

TEST(EngineCapture, AnEagerOperationHasNoEntry) {
  FakeGroup group(1);
  const uint64_t seq = group.submit_all();
  ASSERT_TRUE(group.settle(1));
  group[0].port.at(1).outcome.capture_entry = 7;
  group[0].port.at(1).ended = true;
  ASSERT_TRUE(group.settle(2));
  EXPECT_EQ(group[0].completion(seq).capture_entry, 0U);
}

TEST(EngineCapture, RanksOnDifferentLanesDisagree) {
  FakeGroup group(2);
  group[0].submit(captured_request(0));
  group[1].submit(captured_request(1));
  ASSERT_TRUE(group.settle(1));
  for (uint32_t rank = 0; rank < 2; ++rank) {
    EXPECT_EQ(group[rank].reason(1), static_cast<uint32_t>(EXPERTD_REASON_OP_MISMATCH));
    EXPECT_EQ(group[rank].completion(1).argument, static_cast<uint32_t>(EXPERTD_ARGUMENT_CAPTURE_LANE));
    EXPECT_TRUE(group[rank].port.parts().empty());
    EXPECT_TRUE(group[rank].port.released.empty()) << "nothing waits for the words of a captured operation's slot";
  }
}

TEST(EngineCapture, AnEagerOperationOfAPeerIsNamedAndItsStreamReleased) {
  FakeGroup group(2);
  engine::Request eager = captured_request();
  eager.captured = false;
  group[0].submit(captured_request());
  group[1].submit(eager);
  ASSERT_TRUE(group.settle(1));
  EXPECT_EQ(group[0].completion(1).argument, static_cast<uint32_t>(EXPERTD_ARGUMENT_CAPTURE_LANE));
  EXPECT_EQ(group[0].completion(1).rank, 1);
  EXPECT_EQ(group[0].completion(1).value, -1);
  EXPECT_EQ(group[0].completion(1).minimum, 0);
  EXPECT_TRUE(group[0].port.released.empty());
  EXPECT_EQ(group[1].port.released.size(), 1U);
}

TEST(EngineCapture, TellsTheObserverOfEveryReplay) {
  FakeGroup group(1);
  engine::Outcome outcome;
  outcome.report.recv_rows = 12;
  outcome.report.local_bytes = 100;
  outcome.report.remote_bytes = 200;
  outcome.launch_ns = 10;
  outcome.start_ns = 20;
  outcome.end_ns = 30;
  outcome.executor = EXPERTD_COMPLETION_EXECUTOR_SM;
  outcome.sms = 5;
  group[0].port.replays.emplace_back(captured_request(1), outcome);
  outcome.report.reason = EXPERTD_REASON_TIMEOUT;
  group[0].port.replays.emplace_back(captured_request(), outcome);
  const auto& observer = group[0].observer;
  EXPECT_TRUE(group[0].run(40));
  EXPECT_EQ(observer.completions, 2U);
  EXPECT_EQ(observer.last_completion.reason, static_cast<uint32_t>(EXPERTD_REASON_TIMEOUT));
  EXPECT_EQ(observer.last_completion.recv_rows, 12U);
  EXPECT_EQ(observer.last_completion.local_bytes, 100U);
  EXPECT_EQ(observer.last_completion.remote_bytes, 200U);
  EXPECT_EQ(observer.last_completion.start_ns, 20U);
  EXPECT_EQ(observer.last_completion.end_ns, 30U);
  EXPECT_EQ(observer.last_completion.complete_ns, 40U);
  EXPECT_EQ(observer.last_completion.executor, static_cast<uint32_t>(EXPERTD_COMPLETION_EXECUTOR_SM));
  EXPECT_EQ(observer.last_completion.sms, 5U);
  EXPECT_EQ(observer.last_request.submit_ns, 10U) << "a replay begins anew";
  EXPECT_TRUE(observer.last_request.captured);
  EXPECT_TRUE(group[0].completions.order.empty()) << "no slot completes";
  EXPECT_FALSE(group[0].run(41));
}

TEST(EngineCapture, ATurnEndsHoweverManyReplaysThereAre) {
  FakeGroup group(1);
  for (int i = 0; i < 1'000; ++i) {
    group[0].port.replays.emplace_back(captured_request(), engine::Outcome{});
  }
  EXPECT_TRUE(group[0].run(1));
  EXPECT_GT(group[0].observer.completions, 0U);
  EXPECT_LT(group[0].observer.completions, 1'000U);
  ASSERT_TRUE(group.settle(2));
  EXPECT_EQ(group[0].observer.completions, 1'000U);
}

TEST(EngineCapture, ASessionIsForgottenWhenItsCapturesHaveEnded) {
  FakeGroup group(1);
  group[0].port.captures_end = false;
  group.end_session(0, 1);
  EXPECT_FALSE(group[0].drained());
  EXPECT_FALSE(group[0].drained());
  EXPECT_EQ(group[0].port.captures_ended_of.back(), std::pair(uint64_t{1}, uint64_t{0})) << "of all groups";
  group[0].port.captures_end = true;
  EXPECT_TRUE(group[0].drained());
}

}  // namespace
}  // namespace expertd::test
