// SPDX-License-Identifier: Apache-2.0
// The daemon's end of a ring, against a client that keeps the protocol and one that does not.
#include <gtest/gtest.h>

#include <cstring>

#include "daemon/transport/ring_server.h"
#include "tests/support/fake_admission.h"

namespace expertd::test {
namespace {

constexpr uint32_t kSlots = 8;

class RingServerTest : public testing::Test {
 protected:
  RingServerTest()
      : ring_(std::move(session::RingMemory::create(base::SessionId{5}, 11, kSlots)).value()),
        server_(&world_.tables, ring_.get(), nullptr, 1'000),
        engine_(base::DeviceIndex{0}, &port_, &wake_, &observer_) {
    engine_.add_session(&server_.engine_session());
  }

  /// A layout at the next place; the tail is left alone.
  void write_slot(uint64_t seq) {
    expertd_slot slot = AdmissionWorld::slot(EXPERTD_OP_LAYOUT);
    slot.seq = seq;
    ring_->slots()[(seq - 1) % kSlots] = slot;
  }
  bool submit_up_to(uint64_t tail) {
    ring_->header()->submit_tail = tail;
    return server_.poll(engine_, 1);
  }
  void finish_all() {
    (void)engine_.run_once(1);
    port_.finish_all();
    (void)engine_.run_once(2);
  }
  const expertd_completion& completion(uint64_t seq) const { return ring_->completions()[(seq - 1) % kSlots]; }

  AdmissionWorld world_;
  std::unique_ptr<session::RingMemory> ring_;
  FakeDevicePort port_;
  FakeWakePort wake_;
  FakeObserver observer_;
  transport::RingServer server_;
  engine::Engine engine_;
};

TEST_F(RingServerTest, TakesWhatWasSubmittedAndWritesItsCompletion) {
  write_slot(1);
  EXPECT_TRUE(submit_up_to(1));
  EXPECT_EQ(ring_->header()->submit_head, 1U);
  EXPECT_EQ(completion(1).seq, 0U);
  finish_all();
  EXPECT_EQ(completion(1).seq, 1U);
  EXPECT_EQ(completion(1).reason, 0U);
  EXPECT_EQ(ring_->header()->completion_futex, 1U);
  EXPECT_EQ(world_.tables.stats.completed.load(), 1U);
}

TEST_F(RingServerTest, LeavesNoHandleOfADispatchThatFailed) {
  expertd_slot slot = AdmissionWorld::slot(EXPERTD_OP_DISPATCH);
  slot.seq = 1;
  ring_->slots()[0] = slot;
  ASSERT_TRUE(submit_up_to(1));
  ASSERT_EQ(world_.tables.handles[slot.handle_index].generation, slot.handle_generation);
  (void)engine_.run_once(~uint64_t{0} >> 1);  // far past its deadline
  (void)engine_.run_once(~uint64_t{0} >> 1);
  ASSERT_EQ(completion(1).seq, 1U);
  EXPECT_NE(completion(1).reason, 0U);
  EXPECT_EQ(world_.tables.handles[slot.handle_index].generation, 0U);
}

TEST_F(RingServerTest, TakesNothingTwice) {
  write_slot(1);
  EXPECT_TRUE(submit_up_to(1));
  EXPECT_FALSE(server_.poll(engine_, 2));
  EXPECT_FALSE(server_.has_submissions());
}

TEST_F(RingServerTest, TakesAFullRingAndGoesRound) {
  for (uint64_t round = 0; round < 5; ++round) {
    for (uint64_t i = 1; i <= kSlots; ++i) {
      write_slot(round * kSlots + i);
    }
    ASSERT_TRUE(submit_up_to((round + 1) * kSlots));
    ASSERT_FALSE(server_.faulted());
    finish_all();
    ASSERT_EQ(completion((round + 1) * kSlots).seq, (round + 1) * kSlots);
  }
}

TEST_F(RingServerTest, FaultsWhenTheTailRunsPastTheRing) {
  EXPECT_TRUE(submit_up_to(kSlots + 1));
  EXPECT_TRUE(server_.faulted());
  EXPECT_EQ(server_.slots_used(), 0U);
}

TEST_F(RingServerTest, FaultsWhenTheTailGoesBackwards) {
  write_slot(1);
  write_slot(2);
  EXPECT_TRUE(submit_up_to(2));
  finish_all();
  EXPECT_TRUE(submit_up_to(1));
  EXPECT_TRUE(server_.faulted());
}

TEST_F(RingServerTest, FaultsWhenASlotIsUsedAgainBeforeItsCompletion) {
  for (uint64_t seq = 1; seq <= kSlots; ++seq) {
    write_slot(seq);
  }
  EXPECT_TRUE(submit_up_to(kSlots));
  write_slot(kSlots + 1);
  EXPECT_TRUE(submit_up_to(kSlots + 1));
  EXPECT_TRUE(server_.faulted());
}

TEST_F(RingServerTest, TakesNothingMoreAfterAFault) {
  EXPECT_TRUE(submit_up_to(~0ULL));
  ASSERT_TRUE(server_.faulted());
  write_slot(1);
  EXPECT_FALSE(submit_up_to(1));
  EXPECT_FALSE(server_.has_submissions());
  EXPECT_EQ(server_.slots_used(), 0U);
}

TEST_F(RingServerTest, RefusesASlotWhoseSequenceIsNotItsPlace) {
  write_slot(1);
  ring_->slots()[0].seq = 2;
  EXPECT_TRUE(submit_up_to(1));
  finish_all();
  EXPECT_EQ(completion(1).seq, 1U);
  EXPECT_EQ(completion(1).reason, static_cast<uint32_t>(EXPERTD_REASON_DESCRIPTOR_MALFORMED));
  EXPECT_EQ(completion(1).argument, static_cast<uint32_t>(EXPERTD_ARGUMENT_SEQ));
  EXPECT_EQ(world_.tables.stats.rejected.load(), 1U);
}

TEST_F(RingServerTest, UsesItsOwnCopyOfASlot) {
  write_slot(1);
  EXPECT_TRUE(submit_up_to(1));
  std::memset(ring_->slots(), 0xff, sizeof(expertd_slot));
  finish_all();
  EXPECT_EQ(completion(1).reason, 0U);
  EXPECT_EQ(port_.parts()[0].spec.own->shape.tokens, 64U);
}

TEST_F(RingServerTest, NeverReadsTheGeometryBackFromTheHeader) {
  ring_->header()->slot_count = 1U << 30;
  ring_->header()->slots_offset = ~0ULL;
  ring_->header()->completions_offset = ~0ULL;
  write_slot(1);
  EXPECT_TRUE(submit_up_to(1));
  finish_all();
  EXPECT_EQ(completion(1).seq, 1U);
}

TEST_F(RingServerTest, LeavesTheCountsBehindTheLastEntryAlone) {
  ring_->completions()[0].expert_counts[2] = 77;
  write_slot(1);
  EXPECT_TRUE(submit_up_to(1));
  (void)engine_.run_once(1);
  kernels::OpReport report;
  report.expert_count_entries = 2;
  report.expert_counts[1] = 6;
  port_.finish(1, report);
  (void)engine_.run_once(2);
  EXPECT_EQ(completion(1).expert_counts[1], 6U);
  EXPECT_EQ(completion(1).expert_counts[2], 77U);
}

TEST_F(RingServerTest, RefusesNewOperationsWhileItDrains) {
  write_slot(1);
  EXPECT_TRUE(submit_up_to(1));
  server_.set_flags(EXPERTD_SESSION_DRAINING);
  ring_->header()->session_flags = 0;  // what the client makes of the word changes nothing
  write_slot(2);
  EXPECT_TRUE(submit_up_to(2));
  finish_all();
  EXPECT_EQ(completion(1).reason, 0U) << "it was admitted before";
  EXPECT_EQ(completion(2).reason, static_cast<uint32_t>(EXPERTD_REASON_DRAINING));
}

TEST_F(RingServerTest, TakesWhatAnotherRankWaitsForWhileItDrains) {
  expertd_slot barrier = AdmissionWorld::slot(EXPERTD_OP_BARRIER);
  barrier.timeout_ns = 1'000'000;
  (void)world_.admit(barrier);
  const engine::Request other = world_.request;
  world_.shared.post(1, 0, &other);
  server_.set_flags(EXPERTD_SESSION_DRAINING);
  for (const uint64_t seq : {1, 2}) {
    barrier.seq = seq;
    ring_->slots()[(seq - 1) % kSlots] = barrier;
  }
  EXPECT_TRUE(submit_up_to(2));
  (void)engine_.run_once(1);
  ASSERT_EQ(port_.parts().size(), 1U) << "the first was submitted by the other rank, the second by nobody";
  EXPECT_EQ(port_.parts()[0].spec.group_op, 1U);
  world_.shared.post(2, 0, &other);
  finish_all();
  EXPECT_EQ(completion(1).reason, 0U);
  EXPECT_EQ(completion(2).reason, static_cast<uint32_t>(EXPERTD_REASON_DRAINING));
}

TEST_F(RingServerTest, WhatTheClientRefusedCountsForItsRankWhileItDrains) {
  expertd_slot refused{};
  refused.seq = 1;
  refused.op = EXPERTD_OP_BARRIER;
  refused.flags = EXPERTD_SLOT_REFUSED;
  refused.group = AdmissionWorld::kGroup;
  refused.refused_reason = EXPERTD_REASON_WRONG_DTYPE;
  server_.set_flags(EXPERTD_SESSION_DRAINING);
  ring_->slots()[0] = refused;
  EXPECT_TRUE(submit_up_to(1));
  EXPECT_EQ(world_.shared.not_posted(1), base::RankSet(1)) << "the other rank alone has not submitted";
  engine::Request other;
  other.shape.kind = kernels::OpKind::kBarrier;
  world_.shared.post(1, 0, &other);
  (void)engine_.run_once(1);
  EXPECT_EQ(completion(1).reason, static_cast<uint32_t>(EXPERTD_REASON_WRONG_DTYPE)) << "not DRAINING";
}

TEST_F(RingServerTest, SaysWhenItSleepsAndRaisesFlags) {
  server_.set_sleeping(true);
  EXPECT_EQ(ring_->header()->daemon_sleeping, 1U);
  server_.set_sleeping(false);
  EXPECT_EQ(ring_->header()->daemon_sleeping, 0U);
  server_.set_flags(EXPERTD_SESSION_DRAINING);
  server_.set_flags(EXPERTD_SESSION_CLOSED);
  EXPECT_EQ(ring_->header()->session_flags, 3U);
  EXPECT_EQ(ring_->header()->completion_futex, 2U);
}

}  // namespace
}  // namespace expertd::test
