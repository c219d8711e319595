// SPDX-License-Identifier: Apache-2.0
#include "daemon/metrics/counters.h"

#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "daemon/metrics/wait_log.h"

#include <set>
#include <string>

#include "daemon/metrics/catalog.h"

namespace expertd::metrics {
namespace {

OpRecord ok_dispatch(uint64_t total_ns) {
  OpRecord op;
  op.op = EXPERTD_OP_DISPATCH;
  op.phases[Phase::kTotal] = total_ns;
  op.tokens = 10;
  op.local_bytes = 100;
  op.remote_bytes = 1000;
  return op;
}

TEST(MetricsReasons, CompactIndexIsOneToOneForOperations) {
  std::set<std::string_view> names;
  for (size_t i = 0; i < kReasonCount; ++i) {
    EXPECT_FALSE(kReasons.name[i].empty());
    EXPECT_TRUE(names.insert(kReasons.name[i]).second);
  }
#define EXPERTD_CHECK_REASON(reason, number, code, retryable, sentence) \
  EXPECT_EQ(kReasons.name[reason_index(number)], (number) == 0 || is_op_reason(number) ? #reason : "OTHER");
  EXPERTD_REASONS(EXPERTD_CHECK_REASON)
#undef EXPERTD_CHECK_REASON
  EXPECT_EQ(kReasons.name[reason_index(UINT32_MAX)], "OTHER");
  EXPECT_EQ(kReasons.name[reason_index(127)], "OTHER");
}

TEST(MetricsOpCounters, SuccessCountsVolumeAndDurations) {
  OpCounters counters;
  counters.record(ok_dispatch(5'000));
  counters.record(ok_dispatch(5'001));
  counters.record(ok_dispatch(200'000'000));
  const OpTotals totals = counters.totals(EXPERTD_OP_DISPATCH);
  EXPECT_EQ(totals.ok, 3U);
  EXPECT_EQ(totals.failed, 0U);
  EXPECT_EQ(totals.tokens, 30U);
  EXPECT_EQ(totals.local_bytes, 300U);
  EXPECT_EQ(totals.remote_bytes, 3000U);
  EXPECT_EQ(totals.duration_ns, 200'010'001U);
  const auto& total = counters.block(EXPERTD_OP_DISPATCH).phases[static_cast<size_t>(Phase::kTotal)];
  EXPECT_EQ(read(total.buckets[0]), 1U);  // a bound belongs to its bucket
  EXPECT_EQ(read(total.buckets[1]), 1U);
  EXPECT_EQ(read(total.buckets[kOpBoundsNs.size()]), 1U);
  const auto& fabric = counters.block(EXPERTD_OP_DISPATCH).phases[static_cast<size_t>(Phase::kFabric)];
  EXPECT_EQ(read(fabric.sum_ns), 0U);  // absent phases leave no trace
  EXPECT_EQ(counters.totals(EXPERTD_OP_COMBINE).ok, 0U);
}

TEST(MetricsOpCounters, SuccessCountsItsExecutorAndTheTimeOnMultiprocessors) {
  OpCounters counters;
  OpRecord op = ok_dispatch(1);
  op.executor = EXPERTD_COMPLETION_EXECUTOR_SM;
  op.sms = 24;
  counters.record(op);  // without a kernel phase
  op.phases[Phase::kKernel] = 1'000;
  counters.record(op);
  op.executor = EXPERTD_COMPLETION_EXECUTOR_HOST;
  op.sms = 0;
  counters.record(op);
  op.executor = 99;  // out of the list: counted as none
  counters.record(op);
  op.reason = EXPERTD_REASON_TIMEOUT;
  op.sms = 24;
  counters.record(op);
  const OpBlock& block = counters.block(EXPERTD_OP_DISPATCH);
  EXPECT_EQ(read(block.executed[EXPERTD_COMPLETION_EXECUTOR_SM]), 2U);
  EXPECT_EQ(read(block.executed[EXPERTD_COMPLETION_EXECUTOR_HOST]), 1U);
  EXPECT_EQ(read(block.executed[EXPERTD_COMPLETION_EXECUTOR_NONE]), 1U);
  EXPECT_EQ(read(block.sm_ns), 24'000U);
}

TEST(MetricsOpCounters, FailureCountsItsReasonOnly) {
  OpCounters counters;
  OpRecord op = ok_dispatch(1);
  op.reason = EXPERTD_REASON_TIMEOUT;
  op.missing = EXPERTD_MISSING_ROWS;
  counters.record(op);
  op.missing = 99;  // out of the list: counted as none
  counters.record(op);
  op.reason = EXPERTD_REASON_PEER_LOST;
  counters.record(op);
  op.reason = 12345;
  counters.record(op);
  const OpTotals totals = counters.totals(EXPERTD_OP_DISPATCH);
  EXPECT_EQ(totals.ok, 0U);
  EXPECT_EQ(totals.failed, 4U);
  EXPECT_EQ(totals.tokens, 0U);
  EXPECT_EQ(totals.duration_ns, 0U);
  const OpBlock& block = counters.block(EXPERTD_OP_DISPATCH);
  EXPECT_EQ(read(block.deadline_exceeded[EXPERTD_MISSING_ROWS]), 1U);
  EXPECT_EQ(read(block.deadline_exceeded[EXPERTD_MISSING_NONE]), 1U);
  EXPECT_EQ(read(block.ended[reason_index(EXPERTD_REASON_PEER_LOST)]), 1U);
  EXPECT_EQ(read(block.ended[kReasonCount - 1]), 1U);
}

TEST(MetricsOpCounters, UnknownKindsAreIgnored) {
  OpCounters counters;
  OpRecord op = ok_dispatch(1);
  for (const uint32_t kind : {0U, 7U, UINT32_MAX}) {
    op.op = kind;
    counters.record(op);
  }
  for (uint32_t kind = 0; kind < EXPERTD_OP_COUNT; ++kind) {
    EXPECT_EQ(counters.totals(kind).ok, 0U);
  }
  EXPECT_EQ(counters.totals(UINT32_MAX).ok, 0U);
}

TEST(MetricsOpCounters, MaximaStartAnewWhenTaken) {
  OpCounters counters;
  counters.ring_used(3);
  counters.ring_used(7);
  counters.ring_used(5);
  EXPECT_EQ(counters.take_ring_used_max(), 7U);
  EXPECT_EQ(counters.take_ring_used_max(), 0U);
  ThreadCounters thread;
  thread.lag(10);
  thread.lag(4);
  EXPECT_EQ(thread.take_lag_max_ns(), 10U);
  EXPECT_EQ(thread.take_lag_max_ns(), 0U);
}

TEST(MetricsPhases, TimesComeFromTheCompletion) {
  expertd_completion completion{};
  completion.start_ns = 110;
  completion.end_ns = 150;
  completion.complete_ns = 155;
  PhaseTimes times = phase_times(completion, 100);
  EXPECT_EQ(times[Phase::kQueue], 10U);
  EXPECT_EQ(times[Phase::kKernel], 40U);
  EXPECT_EQ(times[Phase::kFabric], kPhaseAbsent);
  EXPECT_EQ(times[Phase::kComplete], 5U);
  EXPECT_EQ(times[Phase::kTotal], 55U);
  // A client may claim any submit time.
  EXPECT_EQ(phase_times(completion, 0)[Phase::kTotal], kPhaseAbsent);
  EXPECT_EQ(phase_times(completion, UINT64_MAX)[Phase::kQueue], kPhaseAbsent);
  completion.complete_ns = UINT64_MAX - 1;
  EXPECT_EQ(phase_times(completion, 1)[Phase::kTotal], kDurationMaxNs);
  completion.start_ns = 0;
  EXPECT_EQ(phase_times(completion, 100)[Phase::kQueue], kPhaseAbsent);
}

TEST(MetricsBlocks, LinesAreNotShared) {
  EXPECT_EQ(alignof(OpCounters), kLineBytes);
  EXPECT_EQ(sizeof(OpCounters) % kLineBytes, 0U);
  EXPECT_EQ(sizeof(ThreadCounters) % kLineBytes, 0U);
}

TEST(MetricsWaitLog, KeepsTheLastRecords) {
  WaitLog log;
  EXPECT_TRUE(log.last(5).empty());
  for (uint64_t i = 1; i <= WaitLog::kRecords + 10; ++i) {
    log.add({.group = 1, .number = i, .op = 6, .rank = 63, .last_rank = 62, .waited_ns = i * 2, .counts = i % 2 == 0});
  }
  const std::vector<WaitRecord> all = log.last(WaitLog::kRecords * 2);
  ASSERT_EQ(all.size(), WaitLog::kRecords);
  EXPECT_EQ(all.front().number, 11U);
  EXPECT_EQ(all.back().number, WaitLog::kRecords + 10);
  EXPECT_EQ(all.back().waited_ns, (WaitLog::kRecords + 10) * 2);
  EXPECT_EQ(all.back().op, 6U);
  EXPECT_EQ(all.back().rank, 63U);
  EXPECT_EQ(all.back().last_rank, 62U);
  EXPECT_TRUE(all.back().counts);
  EXPECT_FALSE(all.front().counts);
  ASSERT_EQ(log.last(3).size(), 3U);
  EXPECT_EQ(log.last(3).front().number, WaitLog::kRecords + 8);
}

TEST(MetricsWaitLog, ShowsNoRecordThatIsHalfAnother) {
  WaitLog log;
  std::atomic<uint64_t> written{0};
  std::atomic<bool> stop{false};
  std::thread writer([&] {
    for (uint64_t i = 1; !stop.load(std::memory_order_relaxed); ++i) {
      log.add({.group = i, .number = i, .op = 3, .rank = 1, .last_rank = 2, .waited_ns = i});
      written.store(i, std::memory_order_relaxed);
    }
  });
  // Until the writer has gone around often while it was read.
  uint64_t torn = 0;
  while (written.load(std::memory_order_relaxed) < 100 * WaitLog::kRecords) {
    for (const WaitRecord& record : log.last(WaitLog::kRecords)) {
      torn += record.group != record.number || record.waited_ns != record.number ? 1 : 0;
    }
  }
  stop.store(true, std::memory_order_relaxed);
  writer.join();
  EXPECT_EQ(torn, 0U);
}

}  // namespace
}  // namespace expertd::metrics
