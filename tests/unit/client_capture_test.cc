// SPDX-License-Identifier: Apache-2.0
// Goal: what operations on a stream under capture give the daemon and put into the graph, and what is refused there.
// Method: the stand-in daemon, which answers with an entry, and the stand-in GPU side, all of whose streams are
// captured when it is told so.
#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

#include "tests/unit/client_fake_gpu.h"
#include "tests/unit/client_session_fixture.h"

namespace expertd::test {
namespace {

using Words = std::vector<std::pair<uint32_t, uint64_t>>;  // words of a lane and entry; 0 is the wait

constexpr uint32_t kLane0 = FakeDaemon::kCaptureWords;
constexpr uint32_t kLane1 = kLane0 + 1;

class ClientCapture : public ClientSession {
 protected:
  void SetUp() override {
    device_ = "cuda:0";
    ClientSession::SetUp();
    memory_ = gpu_.allocate(64 << 10);
  }
  expertd_group_t* join_with(uint32_t lanes) {
    expertd_group_options_t options = group_options();
    options.capture_lanes = lanes;
    expertd_group_t* group = nullptr;
    EXPECT_EQ(0, expertd_group_join(session_, &options, &group).reason) << message();
    return group;
  }
  expertd_status_t dispatch(expertd_group_t* group, uint32_t flags = 0) {
    expertd_ll_dispatch_args_t args = EXPERTD_INIT(expertd_ll_dispatch_args_t);
    args.x = memory_;
    args.dtype = EXPERTD_BF16;
    args.topk_idx = memory_ + 8192;
    args.idx_type = EXPERTD_I64;
    args.tokens = 1;
    args.flags = flags;
    return expertd_ll_dispatch(group, &args, stream(), &handle_, &event_);
  }
  expertd_status_t combine(expertd_group_t* group, uint32_t flags = 0) {
    expertd_ll_combine_args_t args = EXPERTD_INIT(expertd_ll_combine_args_t);
    args.topk_idx = memory_ + 8192;
    args.idx_type = EXPERTD_I64;
    args.topk_weights = reinterpret_cast<float*>(memory_ + 16384);
    args.handle = handle_;
    args.tokens = 1;
    args.combined_x = memory_ + 32768;
    args.flags = flags;
    return expertd_ll_combine(group, &args, stream(), &event_);
  }
  expertd_stream_t stream() { return &stream_; }
  void expect_unsupported(expertd_status_t status, const std::string& part) {
    EXPECT_EQ(EXPERTD_REASON_UNSUPPORTED, status.reason) << message();
    EXPECT_NE(std::string::npos, message().find(part)) << message();
  }
  void expect_untouched() {
    EXPECT_TRUE(gpu_.captured.empty());
    EXPECT_TRUE(gpu_.rung().empty());
    EXPECT_TRUE(daemon_.seen().empty()) << "it does not count";
  }

  FakeGpu gpu_;
  char* memory_ = nullptr;
  int stream_ = 0;
  expertd_handle_t handle_{};
  expertd_event_t event_{};
};

TEST_F(ClientCapture, KeepsThePairAtTheDaemonAndPutsDoorbellAndWaitIntoTheGraph) {
  expertd_group_t* group = join_with(1);
  gpu_.capturing = true;
  ASSERT_EQ(0, dispatch(group).reason) << message();
  EXPECT_EQ((Words{{kLane0, 1}, {kLane0, 0}}), gpu_.captured);
  ASSERT_EQ(0, combine(group).reason) << message();
  EXPECT_EQ((Words{{kLane0, 1}, {kLane0, 0}, {kLane0, 2}, {kLane0, 0}}), gpu_.captured);
  const std::vector<expertd_slot> seen = daemon_.seen();
  ASSERT_EQ(2u, seen.size());
  EXPECT_EQ(static_cast<uint32_t>(EXPERTD_OP_LL_DISPATCH), seen[0].op);
  EXPECT_EQ(static_cast<uint32_t>(EXPERTD_OP_LL_COMBINE), seen[1].op);
  for (const expertd_slot& slot : seen) {
    EXPECT_NE(0u, slot.flags & EXPERTD_SLOT_CAPTURED);
    EXPECT_EQ(0u, slot.flags & EXPERTD_SLOT_COPY_ENGINE);
    EXPECT_EQ(0u, slot.capture_lane);
  }
  EXPECT_EQ(seen[0].handle_generation, seen[1].handle_generation);
  EXPECT_TRUE(gpu_.rung().empty()) << "the slot has no words";
}

TEST_F(ClientCapture, TakesLanesInTurn) {
  expertd_group_t* group = join_with(2);
  gpu_.capturing = true;
  for (uint32_t i = 0; i < 5; ++i) {
    ASSERT_EQ(0, dispatch(group).reason) << message();
    EXPECT_EQ(i % 2, daemon_.seen().back().capture_lane) << i;
  }
  EXPECT_EQ((Words{{kLane0, 1}, {kLane0, 0}, {kLane1, 2}, {kLane1, 0}}),
            Words(gpu_.captured.begin(), gpu_.captured.begin() + 4));
}

TEST_F(ClientCapture, OperationsInBetweenAreEagerAndTakeNoTurn) {
  expertd_group_t* group = join_with(2);
  for (const bool capturing : {true, false, true}) {
    gpu_.capturing = capturing;
    ASSERT_EQ(0, dispatch(group).reason) << message();
  }
  const std::vector<expertd_slot> seen = daemon_.seen();
  EXPECT_NE(0u, seen[0].flags & EXPERTD_SLOT_CAPTURED);
  EXPECT_EQ(0u, seen[1].flags & EXPERTD_SLOT_CAPTURED);
  EXPECT_EQ(0u, seen[1].capture_lane);
  EXPECT_EQ(1u, seen[2].capture_lane);
  EXPECT_EQ(1u, gpu_.rung().size());
}

TEST_F(ClientCapture, AsyncOnesWaitWhereTheCallerSays) {
  expertd_group_t* group = join_with(2);
  gpu_.capturing = true;
  ASSERT_EQ(0, dispatch(group, EXPERTD_ASYNC).reason) << message();
  const expertd_event_t first = event_;
  ASSERT_EQ(0, dispatch(group, EXPERTD_ASYNC).reason) << message();
  EXPECT_EQ((Words{{kLane0, 1}, {kLane1, 2}}), gpu_.captured);
  ASSERT_EQ(0, expertd_event_stream_wait(event_, stream()).reason) << message();
  ASSERT_EQ(0, expertd_event_stream_wait(first, stream()).reason) << message();
  EXPECT_EQ((Words{{kLane0, 1}, {kLane1, 2}, {kLane1, 0}, {kLane0, 0}}), gpu_.captured);
}

TEST_F(ClientCapture, EventsStandForEveryReplaySoThatNobodyWaitsOnTheHost) {
  expertd_group_t* group = join_with(1);
  gpu_.capturing = true;
  for (const uint32_t flags : {0u, static_cast<uint32_t>(EXPERTD_ASYNC)}) {
    ASSERT_EQ(0, dispatch(group, flags).reason) << message();
    int done = 0;
    expect_unsupported(expertd_event_wait(event_, kPatienceNs, nullptr), "the stream that its graph was launched on");
    expect_unsupported(expertd_event_query(event_, &done), "the stream that its graph was launched on");
  }
}

TEST_F(ClientCapture, OtherOperationsAreRefusedAndDoNotCount) {
  expertd_group_t* group = join_with(2);
  gpu_.capturing = true;
  expertd_dispatch_args_t dispatch_args = EXPERTD_INIT(expertd_dispatch_args_t);
  expertd_combine_args_t combine_args = EXPERTD_INIT(expertd_combine_args_t);
  expertd_layout_args_t layout_args = EXPERTD_INIT(expertd_layout_args_t);
  const std::string what = "only ll_dispatch and ll_combine";
  expect_unsupported(expertd_dispatch(group, &dispatch_args, stream(), &handle_, &event_), what);
  expect_unsupported(expertd_combine(group, &combine_args, stream(), &event_), what);
  expect_unsupported(expertd_barrier(group, stream(), 0, 0, &event_), what);
  expect_unsupported(expertd_layout(session_, &layout_args, stream(), &event_), "before the capture begins");
  expect_untouched();
}

TEST_F(ClientCapture, AGroupWithoutLanesSaysWhatToDo) {
  expertd_group_t* group = join_with(0);
  gpu_.capturing = true;
  expect_unsupported(dispatch(group), "join the group with capture_lanes = 1 or 2");
  expect_untouched();
}

TEST_F(ClientCapture, ADaemonOfRingVersion12IsToldNothing) {
  FakeDaemon older;
  older.set_abi_minor(2);
  const expertd_attach_options_t options = options_for(older, device_);
  expertd_session_t* session = nullptr;
  ASSERT_EQ(0, expertd_attach(&options, &session).reason) << message();
  expertd_group_options_t of_group = group_options();
  of_group.capture_lanes = 1;
  expertd_group_t* group = nullptr;
  ASSERT_EQ(0, expertd_group_join(session, &of_group, &group).reason) << message();
  gpu_.capturing = true;
  expect_unsupported(dispatch(group), "older than ring version 1.3");
  EXPECT_TRUE(older.seen().empty());
  EXPECT_EQ(0, expertd_detach(session).reason) << message();
}

TEST_F(ClientCapture, WhatTheDaemonRefusesIsNotInTheGraphAndLeavesTheLanesInStep) {
  expertd_group_t* group = join_with(2);
  gpu_.capturing = true;
  daemon_.set_script([](const expertd_slot& slot, expertd_completion* completion) {
    completion->reason = slot.seq == 1 ? EXPERTD_REASON_OP_MISMATCH : 0;
    completion->argument = slot.seq == 1 ? EXPERTD_ARGUMENT_CAPTURE_LANE : 0;
    completion->rank = slot.seq == 1 ? 1 : -1;
  });
  EXPECT_EQ(EXPERTD_REASON_OP_MISMATCH, dispatch(group).reason);
  EXPECT_NE(std::string::npos, message().find("capture_lane")) << message();
  EXPECT_TRUE(gpu_.captured.empty());
  ASSERT_EQ(0, dispatch(group).reason) << message();
  EXPECT_EQ(0u, daemon_.seen().back().capture_lane);
}

TEST_F(ClientCapture, RegistrationsOfCapturedMemoryStayUntilTheGroupIsLeft) {
  constexpr int kAllocations = 1100;  // more than a session may have buffers
  expertd_group_t* group = join_with(1);
  gpu_.capturing = true;
  ASSERT_EQ(0, dispatch(group).reason) << message();
  gpu_.capturing = false;
  char* const captured = memory_;
  memory_ = gpu_.allocate(64 << 10);
  const auto use_many = [&] {
    for (int i = 0; i < kAllocations; ++i) {
      memory_ = gpu_.allocate(64 << 10);
      ASSERT_EQ(0, dispatch(group).reason) << i << ": " << message();
    }
  };
  use_many();
  const uint64_t before = gpu_.exports();
  memory_ = captured;
  ASSERT_EQ(0, dispatch(group).reason) << message();
  EXPECT_EQ(before, gpu_.exports()) << "still registered";
  ASSERT_EQ(0, expertd_group_leave(group).reason) << message();
  group = join_with(0);
  use_many();
  const uint64_t after = gpu_.exports();
  memory_ = captured;
  ASSERT_EQ(0, dispatch(group).reason) << message();
  EXPECT_EQ(after + 1, gpu_.exports());
}

TEST_F(ClientCapture, AnEntryThatNoDoorbellTakesIsRefused) {
  expertd_group_t* group = join_with(1);
  gpu_.capturing = true;
  daemon_.set_captured(EXPERTD_CAPTURE_RUNG_MAX);
  EXPECT_EQ(EXPERTD_REASON_BAD_MESSAGE, dispatch(group).reason) << message();
  EXPECT_TRUE(gpu_.captured.empty());
}

}  // namespace
}  // namespace expertd::test
