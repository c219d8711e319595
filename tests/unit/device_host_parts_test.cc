// SPDX-License-Identifier: Apache-2.0
// Parts of host devices: the order of a session, what becomes of handles, rows that do not fit, work in slices.
#include <gtest/gtest.h>

#include "tests/support/host_parts.h"

namespace expertd::test {
namespace {

constexpr uint32_t kTokens = 8;

class HostParts : public ::testing::Test {
 protected:
  void SetUp() override { ASSERT_TRUE(world_.created); }

  HostPartsWorld world_;
};

base::RankSet routed(const PartOp& op) {
  return op.flags.routed.load(std::memory_order_acquire);
}

bool holds(const PartOp& op, uint32_t rank, uint32_t row, uint8_t fill) {
  const uint8_t* bytes = op.ranks[rank].memory[EXPERTD_OUT_X].as<uint8_t>() + size_t{row} * kPartRowBytes;
  return std::all_of(bytes, bytes + kPartRowBytes, [fill](uint8_t byte) { return byte == fill; });
}

TEST_F(HostParts, ADispatchMovesTheRowsOfBothRanks) {
  auto op = world_.dispatch(kTokens, {2, 2}, 2 * kTokens, 1, 5);
  ASSERT_TRUE(world_.run(op.get()));
  EXPECT_EQ(op->reason(0), 0U);
  EXPECT_EQ(op->outcomes[1].report.recv_rows, 2 * kTokens);
  EXPECT_TRUE(holds(*op, 1, 0, 5));
  EXPECT_TRUE(holds(*op, 1, kTokens, 6));
}

// The rows of a handle were numbered for other outputs than those of a cached dispatch: what does not fit is left out.
TEST_F(HostParts, RowsOfAHandleBeyondTheOutputsAreNotWritten) {
  auto wide = world_.dispatch(kTokens, {0, 1}, 128, 1, 5);  // expert 1 has its rows from 64 on
  for (PartRequest& own : wide->ranks) {
    own.request.shape.expanded = 1;
    own.request.shape.expert_alignment = 64;
  }
  ASSERT_TRUE(world_.run(wide.get()));
  ASSERT_EQ(wide->reason(0), 0U);
  ASSERT_TRUE(holds(*wide, 0, 64, 5));
  auto narrow = world_.cached(kTokens, 64, 1, 7);
  for (PartRequest& own : narrow->ranks) {
    own.request.shape.expanded = 1;
  }
  ASSERT_TRUE(world_.run(narrow.get()));
  EXPECT_TRUE(holds(*narrow, 0, 0, 7));
  EXPECT_TRUE(narrow->ranks[0].guards_intact());
  EXPECT_TRUE(narrow->ranks[1].guards_intact());
}

TEST_F(HostParts, TheHandleOfADispatchThatDidNotFitIsRefused) {
  auto failed = world_.dispatch(kTokens, {0, 2}, 1, 1);
  ASSERT_TRUE(world_.run(failed.get()));
  ASSERT_EQ(failed->reason(0), static_cast<uint32_t>(EXPERTD_REASON_CAPACITY_EXCEEDED));
  auto again = world_.cached(kTokens, 0, 1);
  ASSERT_TRUE(world_.run(again.get()));
  EXPECT_EQ(again->reason(0), static_cast<uint32_t>(EXPERTD_REASON_STALE_HANDLE));
  EXPECT_EQ(again->outcomes[0].report.argument, static_cast<uint32_t>(EXPERTD_ARGUMENT_HANDLE));
  EXPECT_EQ(again->outcomes[0].report.value, 1);
  auto combine = world_.combine(kTokens, kTokens, 1);
  ASSERT_TRUE(world_.run(combine.get()));
  EXPECT_EQ(combine->reason(1), static_cast<uint32_t>(EXPERTD_REASON_STALE_HANDLE));
  EXPECT_TRUE(combine->ranks[1].memory[EXPERTD_OUT_X].untouched());
}

TEST_F(HostParts, AHandleServesOnlyTheDispatchThatLeftIt) {
  auto op = world_.dispatch(kTokens, {0, 2}, 2 * kTokens, 1);
  ASSERT_TRUE(world_.run(op.get()));
  // Admission took a dispatch of generation 2 that the group never launched.
  auto combine = world_.combine(kTokens, 2 * kTokens, 2);
  ASSERT_TRUE(world_.run(combine.get()));
  EXPECT_EQ(combine->reason(0), static_cast<uint32_t>(EXPERTD_REASON_STALE_HANDLE));
  auto right = world_.combine(kTokens, 2 * kTokens, 1);
  ASSERT_TRUE(world_.run(right.get()));
  EXPECT_EQ(right->reason(0), 0U);
  EXPECT_EQ(right->outcomes[0].executor, static_cast<uint32_t>(EXPERTD_COMPLETION_EXECUTOR_HOST));
  EXPECT_EQ(right->outcomes[0].sms, 0U);
  auto more_tokens = world_.combine(2 * kTokens, 2 * kTokens, 1);
  ASSERT_TRUE(world_.run(more_tokens.get()));
  EXPECT_EQ(more_tokens->reason(0), static_cast<uint32_t>(EXPERTD_REASON_STALE_HANDLE));
}

TEST_F(HostParts, AHandleThatOneRankLacksEndsTheOperationOnAll) {
  auto op = world_.dispatch(kTokens, {0, 2}, 2 * kTokens, 1);
  ASSERT_TRUE(world_.launch(op.get(), 0) && world_.launch(op.get(), 1));
  for (int turn = 0; turn < 50 && !world_.poll(op.get(), 0); ++turn) {
    if (op->flags.moved.load() != 3) {
      (void)world_.poll(op.get(), 1);
    }
  }
  ASSERT_TRUE(op->ended[0]);
  ASSERT_FALSE(op->ended[1]);
  world_.device(1).abort(op->parts[1], EXPERTD_REASON_TIMEOUT);
  ASSERT_TRUE(world_.finish({op.get()}));
  EXPECT_EQ(op->reason(1), static_cast<uint32_t>(EXPERTD_REASON_TIMEOUT));
  auto combine = world_.combine(kTokens, 2 * kTokens, 1);
  ASSERT_TRUE(world_.run(combine.get()));
  EXPECT_EQ(combine->reason(0), static_cast<uint32_t>(EXPERTD_REASON_PEER_REJECTED));
  EXPECT_EQ(combine->outcomes[0].report.rank, 1);
  EXPECT_EQ(combine->reason(1), static_cast<uint32_t>(EXPERTD_REASON_STALE_HANDLE));
}

// Two dispatches on one handle, the second launched while the first waits for its peer: the first keeps its routing.
TEST_F(HostParts, ThePartsOfASessionRunOneAfterTheOther) {
  auto first = world_.dispatch(kTokens, {2, -1}, 2 * kTokens, 1, 10);
  auto second = world_.dispatch(kTokens, {0, -1}, 2 * kTokens, 2, 20);
  ASSERT_TRUE(world_.launch(first.get(), 0) && world_.launch(second.get(), 0));
  for (int turn = 0; turn < 5; ++turn) {
    EXPECT_FALSE(world_.poll(first.get(), 0));
    EXPECT_FALSE(world_.poll(second.get(), 0));
  }
  EXPECT_EQ(routed(*first), base::RankSet(1));
  EXPECT_EQ(routed(*second), base::RankSet());
  EXPECT_FALSE(world_.device(0).busy()) << "only the peer can go on";
  ASSERT_TRUE(world_.launch(first.get(), 1) && world_.launch(second.get(), 1));
  ASSERT_TRUE(world_.finish({first.get(), second.get()}));
  EXPECT_EQ(first->outcomes[1].report.recv_rows, 2 * kTokens);
  EXPECT_EQ(first->outcomes[0].report.recv_rows, 0U);
  EXPECT_TRUE(holds(*first, 1, 0, 10));
  EXPECT_TRUE(holds(*first, 1, 2 * kTokens - 1, 11));
  EXPECT_EQ(second->outcomes[0].report.recv_rows, 2 * kTokens);
  EXPECT_TRUE(holds(*second, 0, 0, 20));
  EXPECT_FALSE(world_.device(0).busy());
}

TEST_F(HostParts, AnAbortedPartLetsNobodyOvertake) {
  auto first = world_.dispatch(kTokens, {2, -1}, 2 * kTokens, 1);
  auto aborted = world_.dispatch(kTokens, {2, -1}, 2 * kTokens, 2);
  auto last = world_.dispatch(kTokens, {2, -1}, 2 * kTokens, 3);
  for (PartOp* op : {first.get(), aborted.get(), last.get()}) {
    ASSERT_TRUE(world_.launch(op, 0));
  }
  world_.device(0).abort(aborted->parts[0], EXPERTD_REASON_TIMEOUT);
  for (int turn = 0; turn < 5; ++turn) {
    for (PartOp* op : {first.get(), aborted.get(), last.get()}) {
      (void)world_.poll(op, 0);
    }
  }
  EXPECT_TRUE(aborted->ended[0]);
  EXPECT_EQ(routed(*last), base::RankSet());
  ASSERT_TRUE(world_.launch(first.get(), 1) && world_.launch(last.get(), 1));
  ASSERT_TRUE(world_.finish({first.get(), last.get()}));
  EXPECT_EQ(last->reason(0), 0U);
}

TEST_F(HostParts, AnotherSessionOfTheDeviceDoesNotWait) {
  auto waiting = world_.dispatch(kTokens, {2, -1}, 2 * kTokens, 1);
  auto mine = world_.layout(4, 2, 2);
  auto other = world_.layout(4, 2, 2);
  other->ranks[0].request.session = base::SessionId{9};
  for (PartOp* op : {waiting.get(), mine.get(), other.get()}) {
    ASSERT_TRUE(world_.launch(op, 0));
  }
  for (int turn = 0; turn < 5; ++turn) {
    for (PartOp* op : {waiting.get(), mine.get(), other.get()}) {
      (void)world_.poll(op, 0);
    }
  }
  EXPECT_TRUE(other->ended[0]);
  EXPECT_FALSE(mine->ended[0]) << "a layout may fill the mask of a dispatch behind it, so it keeps its place as well";
}

TEST_F(HostParts, ALayoutRunsInSlices) {
  auto large = world_.layout(65536, 32, 512);
  auto small = world_.layout(4, 2, 2);
  small->ranks[0].request.session = base::SessionId{9};
  ASSERT_TRUE(world_.launch(large.get(), 0) && world_.launch(small.get(), 0));
  uint32_t polls = 1;
  for (; !world_.poll(large.get(), 0); ++polls) {
    ASSERT_TRUE(world_.device(0).busy());
    EXPECT_TRUE(world_.poll(small.get(), 0));
  }
  EXPECT_GT(polls, 100U);
  EXPECT_EQ(large->ranks[0].memory[EXPERTD_OUT_EXPERT_COUNTS].as<int32_t>()[0], 65536 * 32);
}

// The first rank's loop does not look between the counts of both, as one that sleeps.
TEST_F(HostParts, WhoCameLastIsKnownByWhenItCame) {
  auto op = world_.dispatch(kTokens, {0, 2}, 2 * kTokens, 1);
  ASSERT_TRUE(world_.launch(op.get(), 0));
  for (uint32_t rank = 0; rank < kPartRanks; ++rank) {
    if (rank != 0) {
      ASSERT_TRUE(world_.launch(op.get(), rank));
    }
    for (int turn = 0; !routed(*op).contains(rank); ++turn) {
      ASSERT_LT(turn, 1000);
      (void)world_.poll(op.get(), rank);
    }
  }
  ASSERT_TRUE(world_.finish({op.get()}));
  for (uint32_t rank = 0; rank < kPartRanks; ++rank) {
    const engine::Exchanged& exchanged = op->outcomes[rank].exchanged;
    EXPECT_EQ(exchanged.last_rank, static_cast<int32_t>(kPartRanks - 1));
    EXPECT_EQ(exchanged.waited_ns == 0, rank == kPartRanks - 1);
  }
}

TEST_F(HostParts, WaitTimesAreAddedToWhateverTheClientLeftThere) {
  auto op = world_.dispatch(kTokens, {0, 2}, 2 * kTokens, 1);
  auto* waits = static_cast<int64_t*>(op->ranks[0].give(EXPERTD_OUT_WAIT_STATS, kPartRanks * 8));
  std::fill_n(waits, kPartRanks, INT64_MAX);
  ASSERT_TRUE(world_.run(op.get()));
  EXPECT_EQ(op->reason(0), 0U);
}

TEST(HostPartsOfManyTokens, RouteInSlices) {
  HostPartsWorld world(65536);
  ASSERT_TRUE(world.created);
  auto op = world.dispatch(65536, {0, 2}, 2 * 65536, 1);
  ASSERT_TRUE(world.launch(op.get(), 0) && world.launch(op.get(), 1));
  EXPECT_FALSE(world.poll(op.get(), 0));
  EXPECT_EQ(routed(*op), base::RankSet());
  EXPECT_TRUE(world.device(0).busy());
  ASSERT_TRUE(world.finish({op.get()}));
  EXPECT_EQ(op->reason(0), 0U);
  EXPECT_EQ(op->outcomes[1].report.recv_rows, 2 * 65536U);
}

TEST(HostPartsOfManyTokens, MarkTheRowsOfAnAbortedDispatchInSlices) {
  HostPartsWorld world;
  constexpr uint32_t kRows = 1U << 20;
  auto op = world.dispatch(kTokens, {0, 2}, kRows, 1);
  ASSERT_TRUE(world.launch(op.get(), 0));
  EXPECT_FALSE(world.poll(op.get(), 0));
  world.device(0).abort(op->parts[0], EXPERTD_REASON_TIMEOUT);
  EXPECT_FALSE(world.poll(op.get(), 0));
  EXPECT_TRUE(world.device(0).busy());
  ASSERT_TRUE(world.finish({op.get()}));
  EXPECT_EQ(op->reason(0), static_cast<uint32_t>(EXPERTD_REASON_TIMEOUT));
  const auto* ids = op->ranks[0].memory[EXPERTD_OUT_TOPK_IDX].as<int64_t>();
  EXPECT_TRUE(std::all_of(ids, ids + size_t{kRows} * kPartTopK, [](int64_t id) { return id == -1; }));
}

}  // namespace
}  // namespace expertd::test
