// SPDX-License-Identifier: Apache-2.0
// Goal: the dtypes of a group in the client library: what the daemon is told of them, and how the low-latency window is
// used. Method: the stand-in daemon, which refuses nothing.
#include <gtest/gtest.h>

#include <cstddef>
#include <cstring>

#include "tests/unit/client_session_fixture.h"

namespace expertd::test {
namespace {

class ClientDtypes : public ClientSession {
 protected:
  expertd_group_t* join_with(uint32_t dispatch_dtypes, size_t struct_size = sizeof(expertd_group_options_t)) {
    expertd_group_options_t options = group_options();
    options.dispatch_dtypes = dispatch_dtypes;
    options.struct_size = struct_size;
    expertd_group_t* group = nullptr;
    EXPECT_EQ(0, expertd_group_join(session_, &options, &group).reason) << message();
    return group;
  }
  expertd_ll_dispatch_args_t args(uint32_t flags) {
    expertd_ll_dispatch_args_t made = EXPERTD_INIT(expertd_ll_dispatch_args_t);
    made.x = tensors_.x.data();
    made.dtype = EXPERTD_BF16;
    made.topk_idx = tensors_.idx.data();
    made.idx_type = EXPERTD_I64;
    made.tokens = 3;
    made.flags = flags;
    return made;
  }
  /// The slot of an ll_dispatch whose outputs are left to the library.
  expertd_slot issued(expertd_group_t* group, const expertd_ll_dispatch_args_t& wanted) {
    expertd_event_t event{};
    EXPECT_EQ(0, expertd_ll_dispatch(group, &wanted, nullptr, &handle_, &event).reason) << message();
    EXPECT_EQ(0, expertd_event_wait(event, 0, nullptr).reason) << message();
    return daemon_.seen().back();
  }

  DispatchTensors tensors_;
  expertd_handle_t handle_{};
};

TEST_F(ClientDtypes, AreToldToTheDaemon) {
  ASSERT_NE(nullptr, join_with(EXPERTD_DISPATCH_BF16 | EXPERTD_DISPATCH_FP8));
  EXPECT_EQ(5u, daemon_.config().dispatch_dtypes());
}

TEST_F(ClientDtypes, AreAnyForACallerThatDoesNotKnowThem) {
  constexpr size_t kFirstVersion = offsetof(expertd_group_options_t, dispatch_dtypes);
  ASSERT_NE(nullptr, join_with(EXPERTD_DISPATCH_BF16, kFirstVersion));
  EXPECT_EQ(0u, daemon_.config().dispatch_dtypes());
  expertd_group_options_t options = group_options();
  options.struct_size = kFirstVersion - 1;
  expertd_group_t* group = nullptr;
  EXPECT_EQ(EXPERTD_REASON_ARGUMENT_RANGE, expertd_group_join(session_, &options, &group).reason);
}

TEST_F(ClientSession, TheCommunicationOfAGroupIsTheDefaultUnlessItIsGiven) {
  expertd_group_options_t options = group_options();
  expertd_group_t* group = nullptr;
  ASSERT_EQ(0, expertd_group_join(session_, &options, &group).reason) << message();
  EXPECT_FALSE(daemon_.config().communication().has_use_nvlink());
  EXPECT_FALSE(daemon_.config().communication().has_use_rdma());
  options.name = "given";
  options.communication = {EXPERTD_USE_NO, EXPERTD_USE_YES, 1, 3};
  ASSERT_EQ(0, expertd_group_join(session_, &options, &group).reason) << message();
  EXPECT_TRUE(daemon_.config().communication().has_use_nvlink());
  EXPECT_FALSE(daemon_.config().communication().use_nvlink());
  EXPECT_TRUE(daemon_.config().communication().use_rdma());
  EXPECT_EQ(1u, daemon_.config().communication().virtual_lanes());
  EXPECT_EQ(3u, daemon_.config().communication().bandwidth_ratio());
  // A caller of before has something else behind its struct.
  options.name = "before";
  options.struct_size = offsetof(expertd_group_options_t, communication);
  ASSERT_EQ(0, expertd_group_join(session_, &options, &group).reason) << message();
  EXPECT_EQ(0u, daemon_.config().communication().bandwidth_ratio());
  options.struct_size = sizeof(options);
  options.name = "neither";
  options.communication.use_rdma = 3;
  EXPECT_EQ(EXPERTD_REASON_ARGUMENT_RANGE, expertd_group_join(session_, &options, &group).reason);
  EXPECT_NE(message().find("use_rdma"), std::string::npos) << message();
}

TEST_F(ClientDtypes, LeaveNoRoomForScalesBesideBf16) {
  expertd_group_t* group = join_with(EXPERTD_DISPATCH_BF16);
  ASSERT_NE(nullptr, group);
  const expertd_slot slot = issued(group, args(0));
  EXPECT_NE(0u, slot.tensors[EXPERTD_OUT_X].buffer);
  expertd_ll_outputs_t outputs = EXPERTD_INIT(expertd_ll_outputs_t);
  ASSERT_EQ(0, expertd_ll_handle_outputs(group, handle_, &outputs).reason) << message();
  EXPECT_EQ(nullptr, outputs.recv_scales);
  EXPECT_EQ(4 * kMaxTokens * 2 * kHidden, static_cast<char*>(outputs.combine_x) - static_cast<char*>(outputs.recv_x));
}

TEST_F(ClientDtypes, HalveTheRowsOfFp8Alone) {
  expertd_group_t* group = join_with(EXPERTD_DISPATCH_FP8);
  ASSERT_NE(nullptr, group);
  const expertd_slot slot = issued(group, args(EXPERTD_USE_FP8));
  EXPECT_NE(0u, slot.tensors[EXPERTD_OUT_SIDE].buffer);
  expertd_ll_outputs_t outputs = EXPERTD_INIT(expertd_ll_outputs_t);
  ASSERT_EQ(0, expertd_ll_handle_outputs(group, handle_, &outputs).reason) << message();
  EXPECT_EQ(4 * kMaxTokens * kHidden, static_cast<char*>(outputs.recv_scales) - static_cast<char*>(outputs.recv_x));
}

// The daemon refuses it by name; one that knows no dtypes misses the output and writes nothing over its neighbours.
TEST_F(ClientDtypes, GiveWhatTheGroupDoesNotCarryNoPlaceInTheWindow) {
  expertd_group_t* quantised = join_with(EXPERTD_DISPATCH_FP8);
  ASSERT_NE(nullptr, quantised);
  expertd_slot slot = issued(quantised, args(0));
  EXPECT_EQ(static_cast<uint32_t>(EXPERTD_OP_LL_DISPATCH), slot.op);
  EXPECT_EQ(0u, slot.tensors[EXPERTD_OUT_X].buffer);
  EXPECT_EQ(0u, slot.flags) << "it is not refused here";
  ASSERT_EQ(0, expertd_group_leave(quantised).reason) << message();
  expertd_group_t* plain = join_with(EXPERTD_DISPATCH_BF16);
  ASSERT_NE(nullptr, plain);
  slot = issued(plain, args(EXPERTD_USE_FP8));
  EXPECT_EQ(0u, slot.tensors[EXPERTD_OUT_X].buffer);
  EXPECT_EQ(0u, slot.tensors[EXPERTD_OUT_SIDE].buffer);
}

}  // namespace
}  // namespace expertd::test
