// SPDX-License-Identifier: Apache-2.0
// A hostile or broken client on the ring: every descriptor ends with a completion that says why, nothing else suffers.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <memory>
#include <thread>
#include <vector>

#include "tests/integration/raw_rpc.h"
#include "tests/support/daemon_process.h"
#include "tests/support/random_case.h"
#include "tests/support/rank_threads.h"

namespace expertd::support {
namespace {

using std::chrono::seconds;

constexpr uint64_t kBufferBytes = 1 << 20;
constexpr uint32_t kTokens = 8;

/// A raw client with one registered buffer, alone in a group (R 1, E 4, H 128, K 2, M 16).
class BadDescriptor : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(daemon_.start());
    ASSERT_TRUE(client_.attach(daemon_.attach_socket(), "host:0"));
    rpc_ = std::make_unique<RawRpc>(&client_);
    ASSERT_TRUE(rpc_->open("raw").ok);
    buffer_ = rpc_->register_memfd(kBufferBytes);
    ASSERT_NE(buffer_, 0u);
    v1::JoinGroupResponse joined;
    const RpcEnd end = rpc_->join(lone_group("raw"), &joined);
    ASSERT_TRUE(end.ok) << end.message;
    group_ = joined.group_id();
  }

  expertd_tensor_ref at(uint64_t offset) const { return {buffer_, 0, offset}; }

  /// A dispatch that is right in everything; its ids are zeros, so that all tokens go to expert 0.
  expertd_slot good_dispatch(uint32_t generation = 1) const {
    expertd_slot slot{};
    slot.op = EXPERTD_OP_DISPATCH;
    slot.group = group_;
    slot.tokens = kTokens;
    slot.top_k = 2;
    slot.hidden = 128;
    slot.dtype = EXPERTD_DTYPE_BF16;
    slot.row_bytes = 256;
    slot.topk_idx_bytes = 8;
    slot.capacity_rows = 16;
    slot.handle_index = 3;
    slot.handle_generation = generation;
    slot.tensors[EXPERTD_IN_X] = at(0);
    slot.tensors[EXPERTD_IN_TOPK_IDX] = at(65536);
    slot.tensors[EXPERTD_OUT_X] = at(131072);
    slot.tensors[EXPERTD_OUT_TOPK_IDX] = at(262144);
    return slot;
  }

  expertd_completion run(const expertd_slot& slot) {
    const auto completion = client_.wait(client_.submit(slot));
    EXPECT_TRUE(completion.has_value()) << "no completion came";
    return completion.value_or(expertd_completion{});
  }

  /// Refused with this Reason about this argument; the next operation works.
  void expect_refused(const expertd_slot& slot, uint32_t reason, uint32_t argument) {
    const expertd_completion completion = run(slot);
    EXPECT_EQ(completion.reason, reason) << expertd_reason_name(static_cast<int32_t>(completion.reason));
    EXPECT_EQ(completion.argument, argument);
    EXPECT_EQ(completion.recv_rows, 0u);
    EXPECT_EQ(run(good_dispatch(++generation_)).reason, 0u) << "the next operation must work";
  }

  DaemonProcess daemon_{2, {"--engine-op-deadline=2s", "--engine-first-op-deadline=2s"}};
  RawClient client_;
  std::unique_ptr<RawRpc> rpc_;
  uint32_t buffer_ = 0;
  uint64_t group_ = 0;
  uint32_t generation_ = 100;
};

TEST_F(BadDescriptor, AGoodOneRuns) {
  const expertd_completion completion = run(good_dispatch());
  EXPECT_EQ(completion.reason, 0u);
  EXPECT_EQ(completion.recv_rows, kTokens);
  EXPECT_EQ(completion.rank_mask, 1u);
  EXPECT_GE(completion.complete_ns, completion.admit_ns);
}

TEST_F(BadDescriptor, RandomBytesEndWithAReasonAndTheDaemonGoesOn) {
  constexpr int kDescriptors = 12'000;
  const ClientSession other(daemon_.attach_socket(), "host:1");
  Random random(21);
  int refused = 0;
  for (int i = 0; i < kDescriptors; ++i) {
    expertd_slot slot{};
    if (i % 2 == 0) {  // nothing but noise
      auto* bytes = reinterpret_cast<uint8_t*>(&slot);
      for (size_t at_byte = 0; at_byte < sizeof(slot); ++at_byte) {
        bytes[at_byte] = static_cast<uint8_t>(random.next());
      }
    } else {  // a good one with some bytes changed
      slot = good_dispatch(static_cast<uint32_t>(i));
      slot.op = random.between(1, 6);
      for (uint32_t change = random.between(1, 6); change > 0; --change) {
        reinterpret_cast<uint8_t*>(&slot)[random.below(sizeof(slot))] = static_cast<uint8_t>(random.next());
      }
      slot.timeout_ns = 50'000'000;
    }
    const auto completion = client_.wait(client_.submit(slot));
    ASSERT_TRUE(completion.has_value()) << "descriptor " << i << " got no completion";
    ASSERT_STRNE(expertd_reason_name(static_cast<int32_t>(completion->reason)), "UNKNOWN") << i;
    ASSERT_TRUE(completion->reason != 0 || i % 2 == 1) << "noise was accepted";
    refused += completion->reason != 0 ? 1 : 0;
  }
  std::printf("%d of %d descriptors were refused\n", refused, kDescriptors);
  EXPECT_GT(refused, kDescriptors / 2);
  EXPECT_TRUE(daemon_.running());
  EXPECT_EQ(expertd_session_state(other.get()).reason, EXPERTD_REASON_NONE);
  EXPECT_EQ(run(good_dispatch(1u << 20)).reason, 0u);
}

TEST_F(BadDescriptor, AnUnknownOperation) {
  expertd_slot slot = good_dispatch();
  slot.op = 77;
  expect_refused(slot, EXPERTD_REASON_DESCRIPTOR_MALFORMED, EXPERTD_ARGUMENT_OP);
}

TEST_F(BadDescriptor, AnUnknownFlag) {
  expertd_slot slot = good_dispatch();
  slot.flags = 1u << 20;
  expect_refused(slot, EXPERTD_REASON_DESCRIPTOR_MALFORMED, EXPERTD_ARGUMENT_FLAGS);
}

TEST_F(BadDescriptor, ReservedBytesThatAreNotZero) {
  expertd_slot slot = good_dispatch();
  slot.reserved[sizeof(slot.reserved) - 1] = 1;
  expect_refused(slot, EXPERTD_REASON_DESCRIPTOR_MALFORMED, EXPERTD_ARGUMENT_RESERVED);
}

TEST_F(BadDescriptor, ASequenceThatIsNotItsPlace) {
  expertd_slot slot = good_dispatch();
  slot.seq = 4711;
  const auto completion = client_.wait(client_.submit(slot, true));
  ASSERT_TRUE(completion.has_value());
  EXPECT_EQ(completion->reason, static_cast<uint32_t>(EXPERTD_REASON_DESCRIPTOR_MALFORMED));
  EXPECT_EQ(completion->argument, static_cast<uint32_t>(EXPERTD_ARGUMENT_SEQ));
}

TEST_F(BadDescriptor, ATensorPastTheEndOfItsBuffer) {
  for (const uint64_t offset : {kBufferBytes, kBufferBytes - 16, UINT64_MAX - 15, uint64_t{1} << 63}) {
    expertd_slot slot = good_dispatch();
    slot.tensors[EXPERTD_OUT_X].offset = offset;
    expect_refused(slot, EXPERTD_REASON_OUT_OF_BOUNDS, EXPERTD_ARGUMENT_OUT_X);
  }
}

TEST_F(BadDescriptor, AnOffsetThatIsNotAligned) {
  expertd_slot slot = good_dispatch();
  slot.tensors[EXPERTD_IN_X].offset = 8;
  expect_refused(slot, EXPERTD_REASON_UNALIGNED, EXPERTD_ARGUMENT_IN_X);
}

TEST_F(BadDescriptor, ABufferThatIsNotThere) {
  expertd_slot slot = good_dispatch();
  slot.tensors[EXPERTD_IN_X].buffer = 200;
  expect_refused(slot, EXPERTD_REASON_NO_SUCH_BUFFER, EXPERTD_ARGUMENT_IN_X);
  slot.tensors[EXPERTD_IN_X].buffer = UINT32_MAX;
  expect_refused(slot, EXPERTD_REASON_NO_SUCH_BUFFER, EXPERTD_ARGUMENT_IN_X);
}

TEST_F(BadDescriptor, AMissingInput) {
  expertd_slot slot = good_dispatch();
  slot.tensors[EXPERTD_IN_X] = {};
  expect_refused(slot, EXPERTD_REASON_MISSING_ARGUMENT, EXPERTD_ARGUMENT_IN_X);
}

TEST_F(BadDescriptor, AGroupOfSomebodyElse) {
  RawClient other;
  ASSERT_TRUE(other.attach(daemon_.attach_socket(), "host:1"));
  expertd_slot slot{};
  slot.op = EXPERTD_OP_BARRIER;
  slot.group = group_;
  const auto completion = other.wait(other.submit(slot));
  ASSERT_TRUE(completion.has_value());
  EXPECT_EQ(completion->reason, static_cast<uint32_t>(EXPERTD_REASON_NO_SUCH_GROUP));
  EXPECT_EQ(completion->argument, static_cast<uint32_t>(EXPERTD_ARGUMENT_GROUP));
}

TEST_F(BadDescriptor, AStaleHandle) {
  ASSERT_EQ(run(good_dispatch(9)).reason, 0u);
  expertd_slot slot = good_dispatch(8);
  slot.op = EXPERTD_OP_COMBINE;
  slot.handle_generation = 8;
  expect_refused(slot, EXPERTD_REASON_STALE_HANDLE, EXPERTD_ARGUMENT_HANDLE);
  slot = good_dispatch(9);
  slot.flags = EXPERTD_SLOT_CACHED;
  slot.handle_index = 17;  // never used
  expect_refused(slot, EXPERTD_REASON_STALE_HANDLE, EXPERTD_ARGUMENT_HANDLE);
  slot.handle_index = 100'000;
  expect_refused(slot, EXPERTD_REASON_HANDLE_LIMIT, EXPERTD_ARGUMENT_HANDLE);
}

TEST_F(BadDescriptor, AWrongDtype) {
  expertd_slot slot = good_dispatch();
  slot.dtype = EXPERTD_DTYPE_F32;
  expect_refused(slot, EXPERTD_REASON_WRONG_DTYPE, EXPERTD_ARGUMENT_DTYPE);
  slot = good_dispatch();
  slot.topk_idx_bytes = 2;
  expect_refused(slot, EXPERTD_REASON_WRONG_DTYPE, EXPERTD_ARGUMENT_TOPK_IDX_BYTES);
}

TEST_F(BadDescriptor, MoreTokensThanTheGroupHas) {
  expertd_slot slot = good_dispatch();
  slot.tokens = 17;
  const expertd_completion completion = run(slot);
  EXPECT_EQ(completion.reason, static_cast<uint32_t>(EXPERTD_REASON_TOKENS_EXCEED_MAX));
  EXPECT_EQ(completion.value, 17);
  EXPECT_EQ(completion.maximum, 16);
  slot.tokens = UINT32_MAX;
  expect_refused(slot, EXPERTD_REASON_TOKENS_EXCEED_MAX, EXPERTD_ARGUMENT_TOKENS);
}

TEST_F(BadDescriptor, TopKOutOfRange) {
  for (const uint32_t top_k : {0u, 3u, UINT32_MAX}) {
    expertd_slot slot = good_dispatch();
    slot.top_k = top_k;
    expect_refused(slot, EXPERTD_REASON_ARGUMENT_RANGE, EXPERTD_ARGUMENT_TOP_K);
  }
}

TEST_F(BadDescriptor, ARowSizeThatIsNotAMultipleOfSixteen) {
  expertd_slot slot = good_dispatch();
  slot.dtype = EXPERTD_DTYPE_BYTES;
  slot.row_bytes = 24;
  expect_refused(slot, EXPERTD_REASON_UNALIGNED, EXPERTD_ARGUMENT_ROW_BYTES);
}

TEST_F(BadDescriptor, TooFewRowsForWhatArrives) {
  expertd_slot slot = good_dispatch();
  slot.capacity_rows = kTokens - 1;
  const expertd_completion completion = run(slot);
  EXPECT_EQ(completion.reason, static_cast<uint32_t>(EXPERTD_REASON_CAPACITY_EXCEEDED));
  EXPECT_EQ(completion.rank, 0);
  EXPECT_EQ(run(good_dispatch(7)).reason, 0u);
}

// Its tables were filled before it failed, and nobody may write by them: least of all into outputs that are not there.
TEST_F(BadDescriptor, TheHandleOfADispatchThatFailed) {
  expertd_slot slot = good_dispatch(5);
  slot.capacity_rows = 1;
  EXPECT_EQ(run(slot).reason, static_cast<uint32_t>(EXPERTD_REASON_CAPACITY_EXCEEDED));
  slot.flags = EXPERTD_SLOT_CACHED;
  slot.capacity_rows = 0;
  slot.tensors[EXPERTD_OUT_X] = {};
  const expertd_completion cached = run(slot);
  EXPECT_EQ(cached.reason, static_cast<uint32_t>(EXPERTD_REASON_STALE_HANDLE));
  EXPECT_EQ(cached.value, 5);
  slot = good_dispatch(5);
  slot.op = EXPERTD_OP_COMBINE;
  expect_refused(slot, EXPERTD_REASON_STALE_HANDLE, EXPERTD_ARGUMENT_HANDLE);
}

TEST_F(BadDescriptor, AnAlignmentThatIsNotTheHandles) {
  expertd_slot slot = good_dispatch(6);
  slot.flags = EXPERTD_SLOT_EXPANDED;
  slot.expert_alignment = 1024;
  slot.capacity_rows = 1024;
  EXPECT_EQ(run(slot).recv_rows, 1024u);
  slot.flags |= EXPERTD_SLOT_CACHED;
  slot.expert_alignment = 1;  // none: the handle's, whose rows do not fit
  slot.capacity_rows = 2 * kTokens;
  const expertd_completion completion = run(slot);
  EXPECT_EQ(completion.reason, static_cast<uint32_t>(EXPERTD_REASON_CAPACITY_EXCEEDED));
  EXPECT_EQ(completion.value, 1024);
  slot.expert_alignment = 2;
  expect_refused(slot, EXPERTD_REASON_ARGUMENT_RANGE, EXPERTD_ARGUMENT_EXPERT_ALIGNMENT);
}

// All in the ring at once: a combine goes by the dispatch before it, not by the one behind it.
TEST_F(BadDescriptor, ManyDispatchesOnOneHandleRunInTheirOrder) {
  std::vector<uint64_t> seqs;
  for (uint32_t i = 0; i < 48; ++i) {
    expertd_slot slot = good_dispatch(10 + i / 2);
    slot.tokens = 1 + i / 2 % kTokens;
    if (i % 2 == 1) {
      slot.op = EXPERTD_OP_COMBINE;
      slot.tensors[EXPERTD_OUT_X] = at(524288);
    }
    seqs.push_back(client_.submit(slot));
  }
  for (const uint64_t seq : seqs) {
    const auto completion = client_.wait(seq);
    ASSERT_TRUE(completion.has_value()) << seq;
    EXPECT_EQ(completion->reason, 0u) << seq;
  }
}

TEST_F(BadDescriptor, MoreThanTheRingHoldsEndsOnlyThatSession) {
  const ClientSession other(daemon_.attach_socket(), "host:0");
  client_.set_tail(client_.header()->slot_count + 1);
  EXPECT_TRUE(client_.closed_by_peer(seconds(5)));
  // The session's loop sets the flag, another thread closes the connection: either may come first.
  EXPECT_TRUE(wait_until([&] { return (client_.header()->session_flags & EXPERTD_SESSION_CLOSED) != 0; }, seconds(5)));
  EXPECT_EQ(expertd_session_state(other.get()).reason, EXPERTD_REASON_NONE);
  EXPECT_EQ(daemon_.metric("expertd_op_rejected_total{gpu=\"host\",reason=\"RING_OVERFLOW\"}"), 1);
  EXPECT_TRUE(wait_until([&] { return daemon_.log().find("reason=RING_OVERFLOW") != std::string::npos; }, seconds(5)));
  EXPECT_TRUE(wait_until([&] { return daemon_.metric("expertd_sessions") == 1; }, seconds(5)));
  EXPECT_NE(daemon_.log().find("reason=RING_OVERFLOW"), std::string::npos);
  EXPECT_EQ(daemon_.metric("expertd_sessions_closed_total{cause=\"kicked\"}"), 1);
}

TEST_F(BadDescriptor, ATailThatGoesBackEndsOnlyThatSession) {
  ASSERT_EQ(run(good_dispatch()).reason, 0u);
  client_.set_tail(0);
  EXPECT_TRUE(client_.closed_by_peer(seconds(5)));
  EXPECT_TRUE(ClientSession(daemon_.attach_socket(), "host:0").ok());
}

TEST_F(BadDescriptor, NoiseInTheHeaderHurtsNobodyElse) {
  const ClientSession other(daemon_.attach_socket(), "host:0");
  Random random(22);
  auto* bytes = reinterpret_cast<uint8_t*>(client_.header());
  for (int round = 0; round < 100; ++round) {
    for (size_t i = 0; i < EXPERTD_RING_HEADER_BYTES; ++i) {
      bytes[i] = static_cast<uint8_t>(random.next());
    }
  }
  client_.close();
  EXPECT_TRUE(wait_until([&] { return daemon_.metric("expertd_sessions") == 1; }, seconds(5)));
  EXPECT_EQ(expertd_session_state(other.get()).reason, EXPERTD_REASON_NONE);
  EXPECT_TRUE(ClientSession(daemon_.attach_socket(), "host:0").ok());
}

/// Through the client library: an expert id that does not exist, in a group of three.
TEST(BadExpertId, IsNamedToItsRankAndThePeersHearWhose) {
  DaemonProcess daemon(3);
  ASSERT_TRUE(daemon.start());
  RankGroup group(daemon.attach_socket(), "ids", 3);
  ASSERT_TRUE(group.ok()) << group.failure();
  for (const bool wrong : {false, true, false}) {
    group.run([wrong](Rank& rank) {
      std::vector<uint16_t> x(4 * 128);
      std::vector<int64_t> ids(4 * 2, 3);
      std::vector<uint16_t> received(3 * 4 * 128);
      ids[5] = wrong && rank.rank == 1 ? 6 : 2;
      expertd_dispatch_args_t args = EXPERTD_INIT(expertd_dispatch_args_t);
      args.x = x.data();
      args.dtype = EXPERTD_BF16;
      args.topk_idx = ids.data();
      args.idx_type = EXPERTD_I64;
      args.tokens = 4;
      args.capacity_rows = 12;
      args.recv_x = received.data();
      expertd_handle_t handle{};
      expertd_event_t event{};
      ASSERT_TRUE(outcome_of(expertd_dispatch(rank.group, &args, nullptr, &handle, &event)).ok());
      const OpEnd end = finish(event);
      if (!wrong) {
        EXPECT_TRUE(end.outcome.ok()) << describe(end.outcome);
      } else if (rank.rank == 1) {
        EXPECT_EQ(end.outcome.status.reason, EXPERTD_REASON_EXPERT_OUT_OF_RANGE) << describe(end.outcome);
        EXPECT_NE(end.outcome.message.find("6"), std::string::npos) << end.outcome.message;
      } else {
        EXPECT_EQ(end.outcome.status.reason, EXPERTD_REASON_PEER_REJECTED) << describe(end.outcome);
        EXPECT_EQ(end.result.rank, 1);
      }
    });
  }
}

/// A descriptor refused at admission still takes its place among the group's operations.
TEST(RefusedDescriptor, IsHeardOfByThePeersAndTheNextOperationWorks) {
  DaemonProcess daemon(2);
  ASSERT_TRUE(daemon.start());
  RankGroup group(daemon.attach_socket(), "refused", 2);
  ASSERT_TRUE(group.ok()) << group.failure();
  group.run([](Rank& rank) {
    std::vector<uint16_t> x(16 * 128);
    std::vector<int64_t> ids(16 * 2, 0);
    std::vector<uint16_t> received(32 * 128);
    expertd_dispatch_args_t args = EXPERTD_INIT(expertd_dispatch_args_t);
    args.x = x.data();
    args.dtype = EXPERTD_BF16;
    args.topk_idx = ids.data();
    args.idx_type = EXPERTD_I64;
    args.tokens = rank.rank == 0 ? 17 : 16;
    args.capacity_rows = 32;
    args.recv_x = received.data();
    expertd_handle_t handle{};
    expertd_event_t event{};
    ASSERT_TRUE(outcome_of(expertd_dispatch(rank.group, &args, nullptr, &handle, &event)).ok());
    const OpEnd end = finish(event);
    if (rank.rank == 0) {
      EXPECT_EQ(end.outcome.status.reason, EXPERTD_REASON_TOKENS_EXCEED_MAX) << describe(end.outcome);
    } else {
      EXPECT_EQ(end.outcome.status.reason, EXPERTD_REASON_PEER_REJECTED) << describe(end.outcome);
      EXPECT_EQ(end.result.rank, 0);
    }
    EXPECT_TRUE(barrier(rank.group).outcome.ok());
  });
}

/// The same of a descriptor whose frame is wrong, which only a client without the library can send.
TEST(RefusedFrame, IsHeardOfByThePeersAndTheNextOperationWorks) {
  DaemonProcess daemon(2);
  ASSERT_TRUE(daemon.start());
  std::array<RawClient, 2> clients;
  std::array<std::unique_ptr<RawRpc>, 2> rpcs;
  std::array<uint64_t, 2> groups{};
  std::vector<std::thread> threads;
  for (uint32_t rank = 0; rank < 2; ++rank) {
    ASSERT_TRUE(clients[rank].attach(daemon.attach_socket(), "host:" + std::to_string(rank)));
    rpcs[rank] = std::make_unique<RawRpc>(&clients[rank]);
    ASSERT_TRUE(rpcs[rank]->open("raw").ok);
    threads.emplace_back([&, rank] {  // a join returns when both have joined
      v1::JoinGroupRequest request = lone_group("frames");
      request.set_rank(rank);
      request.mutable_config()->set_expert_parallel_size(2);
      v1::JoinGroupResponse joined;
      const RpcEnd end = rpcs[rank]->join(request, &joined);
      EXPECT_TRUE(end.ok) << end.message;
      groups[rank] = joined.group_id();
    });
  }
  std::for_each(threads.begin(), threads.end(), [](std::thread& thread) { thread.join(); });
  expertd_slot barrier{};
  barrier.op = EXPERTD_OP_BARRIER;
  barrier.group = groups[0];
  expertd_slot broken = barrier;
  broken.flags = 1U << 20;
  const std::array<uint64_t, 2> first{clients[0].submit(broken), clients[1].submit(barrier)};
  const std::array<uint64_t, 2> second{clients[0].submit(barrier), clients[1].submit(barrier)};
  const auto refused = clients[0].wait(first[0]);
  const auto told = clients[1].wait(first[1]);
  ASSERT_TRUE(refused.has_value() && told.has_value());
  EXPECT_EQ(refused->reason, static_cast<uint32_t>(EXPERTD_REASON_DESCRIPTOR_MALFORMED));
  EXPECT_EQ(told->reason, static_cast<uint32_t>(EXPERTD_REASON_PEER_REJECTED));
  EXPECT_EQ(told->peer_reason, static_cast<uint32_t>(EXPERTD_REASON_DESCRIPTOR_MALFORMED));
  EXPECT_EQ(told->rank, 0);
  for (uint32_t rank = 0; rank < 2; ++rank) {
    const auto completion = clients[rank].wait(second[rank]);
    ASSERT_TRUE(completion.has_value());
    EXPECT_EQ(completion->reason, 0u);
    EXPECT_EQ(completion->group_op, 2u);
  }
}

TEST(DifferentOperations, EndWithOpMismatchOnEveryRank) {
  DaemonProcess daemon(2);
  ASSERT_TRUE(daemon.start());
  RankGroup group(daemon.attach_socket(), "mismatch", 2);
  ASSERT_TRUE(group.ok()) << group.failure();
  group.run([](Rank& rank) {
    expertd_ll_dispatch_args_t args = EXPERTD_INIT(expertd_ll_dispatch_args_t);
    args.dtype = EXPERTD_BF16;
    args.idx_type = EXPERTD_I64;
    expertd_handle_t handle{};
    expertd_event_t event{};
    OpEnd end;
    if (rank.rank == 0) {
      end = barrier(rank.group);
    } else {
      ASSERT_TRUE(outcome_of(expertd_ll_dispatch(rank.group, &args, nullptr, &handle, &event)).ok());
      end = finish(event);
    }
    EXPECT_EQ(end.outcome.status.reason, EXPERTD_REASON_OP_MISMATCH) << describe(end.outcome);
    EXPECT_TRUE(barrier(rank.group).outcome.ok());
  });
}

}  // namespace
}  // namespace expertd::support
