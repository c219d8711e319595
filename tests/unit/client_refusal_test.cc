// SPDX-License-Identifier: Apache-2.0
// Goal: what the library refuses of a group's operations reaches the daemon, once, and changes nothing else for the
// caller. Method: a stand-in daemon in this process that keeps the slots it was given.
#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

#include "expertd.h"
#include "tests/unit/client_fake_daemon.h"

namespace expertd::test {
namespace {

constexpr uint32_t kHidden = 128;
constexpr uint32_t kMaxTokens = 16;
constexpr uint64_t kPatienceNs = 20'000'000'000;
constexpr uint64_t kAskedNs = 3'000'000'000;
constexpr uint32_t kUnknownFlag = 1u << 30;

std::string message() {
  return expertd_last_message();
}

bool is_refusal(const expertd_slot& slot) {
  return slot.flags == EXPERTD_SLOT_REFUSED;
}

class ClientRefusal : public ::testing::Test {
 protected:
  void SetUp() override { attach(); }
  void TearDown() override { detach(); }

  void attach() {
    expertd_attach_options_t options = EXPERTD_INIT(expertd_attach_options_t);
    options.socket_path = daemon_.path().c_str();
    options.device = "host:0";
    options.name = "test";
    options.traceparent = "00-0102030405060708090a0b0c0d0e0f10-0102030405060708-01";
    options.timeout_ns = kPatienceNs;
    ASSERT_EQ(0, expertd_attach(&options, &session_).reason) << message();
    join();
  }
  void join() {
    expertd_group_options_t options = EXPERTD_INIT(expertd_group_options_t);
    options.name = "g";
    options.expert_parallel_size = 1;
    options.num_experts = 4;
    options.hidden = kHidden;
    options.top_k = 2;
    options.max_tokens = kMaxTokens;
    options.join_timeout_ns = kPatienceNs;
    ASSERT_EQ(0, expertd_group_join(session_, &options, &group_).reason) << message();
  }
  void detach() { EXPECT_EQ(0, expertd_detach(session_).reason) << message(); }

  int32_t barrier(expertd_event_t* event, uint32_t flags = 0, uint64_t timeout_ns = kAskedNs) {
    return expertd_barrier(group_, nullptr, flags, timeout_ns, event).reason;
  }
  int32_t refused_barrier() {
    expertd_event_t event{};
    const int32_t reason = barrier(&event, kUnknownFlag);
    EXPECT_EQ(nullptr, event.session) << "no event is handed out";
    EXPECT_EQ(0u, event.seq);
    return reason;
  }
  /// What the daemon was given, after an operation that works.
  std::vector<expertd_slot> seen() {
    expertd_event_t event{};
    EXPECT_EQ(0, barrier(&event)) << message();
    EXPECT_EQ(0, expertd_event_wait(event, kPatienceNs, nullptr).reason) << message();
    std::vector<expertd_slot> slots = daemon_.seen();
    slots.pop_back();
    return slots;
  }
  /// The call was refused with this sentence, and that is all the daemon was given since the last time.
  void expect_told(uint32_t op, const char* sentence, uint32_t reason, uint32_t argument, int64_t value,
                   int64_t minimum, int64_t maximum) {
    EXPECT_EQ(sentence, message());
    const std::vector<expertd_slot> slots = seen();
    ASSERT_EQ(told_ + 1, slots.size());
    told_ = slots.size() + 1;
    const expertd_slot& slot = slots.back();
    EXPECT_EQ(op, slot.op);
    EXPECT_EQ(static_cast<uint32_t>(EXPERTD_SLOT_REFUSED), slot.flags);
    EXPECT_NE(0u, slot.group);
    EXPECT_EQ(kAskedNs, slot.timeout_ns);
    EXPECT_NE(0u, slot.submit_ns);
    EXPECT_EQ(1, slot.trace_id[0]);
    EXPECT_EQ(reason, slot.refused_reason);
    EXPECT_EQ(argument, slot.refused_argument);
    EXPECT_EQ(value, slot.refused_value);
    EXPECT_EQ(minimum, slot.refused_minimum);
    EXPECT_EQ(maximum, slot.refused_maximum);
    expertd_slot rest{};
    for (uint32_t i = 0; i < EXPERTD_TENSOR_COUNT; ++i) {
      EXPECT_EQ(rest.tensors[i].buffer, slot.tensors[i].buffer);
    }
    EXPECT_EQ(0u, slot.handle_generation);
  }

  FakeDaemon daemon_;
  expertd_session_t* session_ = nullptr;
  expertd_group_t* group_ = nullptr;
  expertd_handle_t handle_{};
  expertd_event_t event_{};
  size_t told_ = 0;
};

expertd_dispatch_args_t dispatch_args() {
  expertd_dispatch_args_t args = EXPERTD_INIT(expertd_dispatch_args_t);
  args.dtype = EXPERTD_BF16;
  args.idx_type = EXPERTD_I64;
  args.timeout_ns = kAskedNs;
  return args;
}

TEST_F(ClientRefusal, OfADispatchIsTold) {
  expertd_dispatch_args_t args = dispatch_args();
  args.dtype = EXPERTD_F32;
  EXPECT_EQ(EXPERTD_REASON_WRONG_DTYPE, expertd_dispatch(group_, &args, nullptr, &handle_, &event_).reason);
  expect_told(EXPERTD_OP_DISPATCH, "WRONG_DTYPE: dtype = 4, allowed EXPERTD_BF16 (1), EXPERTD_BYTES (2)",
              EXPERTD_REASON_WRONG_DTYPE, EXPERTD_ARGUMENT_DTYPE, EXPERTD_F32, EXPERTD_BF16, EXPERTD_BYTES);
  EXPECT_EQ(0u, handle_.generation);
  args = dispatch_args();
  args.cached = {9, 4};
  EXPECT_EQ(EXPERTD_REASON_STALE_HANDLE, expertd_dispatch(group_, &args, nullptr, nullptr, &event_).reason);
  expect_told(EXPERTD_OP_DISPATCH, "STALE_HANDLE: handle 9 was freed or belongs to another group",
              EXPERTD_REASON_STALE_HANDLE, EXPERTD_ARGUMENT_HANDLE, 4, 0, 0);
}

TEST_F(ClientRefusal, OfATensorOutOfItsBufferIsTold) {
  void* data = nullptr;
  ASSERT_EQ(0, expertd_alloc(session_, 4096, &data).reason);
  expertd_dispatch_args_t args = dispatch_args();
  args.tokens = kMaxTokens;
  args.x = static_cast<char*>(data) + 256;
  EXPECT_EQ(EXPERTD_REASON_OUT_OF_BOUNDS, expertd_dispatch(group_, &args, nullptr, &handle_, &event_).reason);
  expect_told(EXPERTD_OP_DISPATCH, "OUT_OF_BOUNDS: x = 4096 bytes at offset 256, allowed 0..4096 bytes of its buffer",
              EXPERTD_REASON_OUT_OF_BOUNDS, EXPERTD_ARGUMENT_IN_X, 4352, 0, 4096);
  for (int i = 0; i < 40; ++i) {  // more than the session has handles
    EXPECT_EQ(EXPERTD_REASON_OUT_OF_BOUNDS, expertd_dispatch(group_, &args, nullptr, &handle_, &event_).reason);
  }
}

TEST_F(ClientRefusal, OfABarrierIsTold) {
  EXPECT_EQ(EXPERTD_REASON_ARGUMENT_RANGE, refused_barrier());
  expect_told(EXPERTD_OP_BARRIER, "ARGUMENT_RANGE: flags = 1073741824, allowed 0..255", EXPERTD_REASON_ARGUMENT_RANGE,
              EXPERTD_ARGUMENT_FLAGS, kUnknownFlag, 0, 255);
}

TEST_F(ClientRefusal, OfACombineIsTold) {
  expertd_combine_args_t args = EXPERTD_INIT(expertd_combine_args_t);
  args.timeout_ns = kAskedNs;
  EXPECT_EQ(EXPERTD_REASON_MISSING_ARGUMENT, expertd_combine(group_, &args, nullptr, &event_).reason);
  expect_told(EXPERTD_OP_COMBINE, "MISSING_ARGUMENT: handle was not given", EXPERTD_REASON_MISSING_ARGUMENT,
              EXPERTD_ARGUMENT_HANDLE, 0, 0, 0);
}

TEST_F(ClientRefusal, OfLowLatencyOperationsIsTold) {
  expertd_ll_dispatch_args_t args = EXPERTD_INIT(expertd_ll_dispatch_args_t);
  args.dtype = EXPERTD_BYTES;
  args.row_bytes = 512;
  args.idx_type = EXPERTD_I64;
  args.timeout_ns = kAskedNs;
  EXPECT_EQ(EXPERTD_REASON_ARGUMENT_RANGE, expertd_ll_dispatch(group_, &args, nullptr, &handle_, &event_).reason);
  expect_told(EXPERTD_OP_LL_DISPATCH, "ARGUMENT_RANGE: row_bytes = 512, allowed 16..256", EXPERTD_REASON_ARGUMENT_RANGE,
              EXPERTD_ARGUMENT_ROW_BYTES, 512, 16, 256);
  expertd_ll_combine_args_t combine = EXPERTD_INIT(expertd_ll_combine_args_t);
  combine.idx_type = EXPERTD_I64;
  combine.handle = {77, 1};
  combine.timeout_ns = kAskedNs;
  EXPECT_EQ(EXPERTD_REASON_STALE_HANDLE, expertd_ll_combine(group_, &combine, nullptr, &event_).reason);
  expect_told(EXPERTD_OP_LL_COMBINE, "STALE_HANDLE: handle.index = 77, allowed 0..31", EXPERTD_REASON_STALE_HANDLE,
              EXPERTD_ARGUMENT_HANDLE, 77, 0, 31);
}

TEST_F(ClientRefusal, OfAMissingPointerIsToldToo) {
  EXPECT_EQ(EXPERTD_REASON_MISSING_ARGUMENT, barrier(nullptr));
  expect_told(EXPERTD_OP_BARRIER, "MISSING_ARGUMENT: event was not given", EXPERTD_REASON_MISSING_ARGUMENT,
              EXPERTD_ARGUMENT_NONE, 0, 0, 0);
  expertd_dispatch_args_t args = dispatch_args();
  EXPECT_EQ(EXPERTD_REASON_MISSING_ARGUMENT, expertd_dispatch(group_, &args, nullptr, nullptr, &event_).reason);
  expect_told(EXPERTD_OP_DISPATCH, "MISSING_ARGUMENT: handle was not given", EXPERTD_REASON_MISSING_ARGUMENT,
              EXPERTD_ARGUMENT_HANDLE, 0, 0, 0);
  args.struct_size = 8;
  EXPECT_EQ(EXPERTD_REASON_ARGUMENT_RANGE, expertd_dispatch(group_, &args, nullptr, &handle_, &event_).reason);
  EXPECT_EQ(EXPERTD_REASON_MISSING_ARGUMENT, expertd_dispatch(group_, nullptr, nullptr, &handle_, &event_).reason);
  const std::vector<expertd_slot> slots = seen();
  ASSERT_EQ(told_ + 2, slots.size());
  EXPECT_EQ(0u, slots.back().timeout_ns) << "what cannot be read is the group's own";
}

TEST_F(ClientRefusal, OfALayoutIsNobodysBusiness) {
  expertd_layout_args_t args = EXPERTD_INIT(expertd_layout_args_t);
  args.idx_type = EXPERTD_F32;
  EXPECT_EQ(EXPERTD_REASON_WRONG_DTYPE, expertd_layout(session_, &args, nullptr, &event_).reason);
  EXPECT_TRUE(seen().empty());
}

TEST_F(ClientRefusal, GivesItsSlotBackByItself) {
  std::vector<expertd_event_t> events(FakeDaemon::kSlots * 3);
  for (expertd_event_t& event : events) {
    for (int i = 0; i < 3; ++i) {
      ASSERT_EQ(EXPERTD_REASON_ARGUMENT_RANGE, refused_barrier()) << message();
    }
    ASSERT_EQ(0, barrier(&event)) << message();
  }
  for (const expertd_event_t& event : events) {
    expertd_op_result_t result = EXPERTD_INIT(expertd_op_result_t);
    EXPECT_EQ(0, expertd_event_wait(event, kPatienceNs, &result).reason) << message();
  }
  const std::vector<expertd_slot> slots = seen();
  ASSERT_EQ(events.size() * 4, slots.size());
  for (size_t i = 0; i < slots.size(); ++i) {
    EXPECT_EQ(i % 4 != 3, is_refusal(slots[i])) << i;
  }
}

TEST_F(ClientRefusal, TakesATokenBoundForWhatAnOlderDaemonCannotKnow) {
  detach();
  daemon_.set_abi_minor(2);
  attach();
  auto args = EXPERTD_INIT(expertd_ll_dispatch_args_t);
  args.dtype = EXPERTD_BF16;
  args.token_bound = 4;
  expertd_handle_t handle{};
  EXPECT_EQ(EXPERTD_REASON_UNSUPPORTED, expertd_ll_dispatch(group_, &args, nullptr, &handle, &event_).reason);
  EXPECT_EQ("UNSUPPORTED: token_bound = 4: the daemon's ring is older than 1.3, allowed 0", message());
  args.struct_size = offsetof(expertd_ll_dispatch_args_t, token_bound);
  EXPECT_EQ(0, expertd_ll_dispatch(group_, &args, nullptr, &handle, &event_).reason) << message();
}

TEST_F(ClientRefusal, IsNotCountedWithoutASlotAndSaysSo) {
  daemon_.hold(true);
  std::vector<expertd_event_t> events(FakeDaemon::kSlots);
  for (expertd_event_t& event : events) {
    ASSERT_EQ(0, barrier(&event)) << message();
  }
  EXPECT_EQ(EXPERTD_REASON_RING_OVERFLOW, barrier(&event_, kUnknownFlag, 10'000'000));
  EXPECT_EQ(
      "RING_OVERFLOW: operations in flight = 9, allowed 0..8; what was issued would have been refused with "
      "ARGUMENT_RANGE: flags = 1073741824, allowed 0..255",
      message());
  daemon_.hold(false);
  EXPECT_EQ(0, expertd_event_wait(events.back(), kPatienceNs, nullptr).reason) << message();
  EXPECT_EQ(events.size(), seen().size());
}

TEST_F(ClientRefusal, KeepsNobodyWaitingForTheSession) {
  daemon_.hold(true);
  ASSERT_EQ(EXPERTD_REASON_ARGUMENT_RANGE, refused_barrier());
  EXPECT_EQ(0, expertd_stream_synchronize(session_, nullptr, 10'000'000).reason) << message();
  ASSERT_EQ(0, barrier(&event_)) << message();
  EXPECT_EQ(EXPERTD_REASON_TIMEOUT, expertd_stream_synchronize(session_, nullptr, 10'000'000).reason);
  daemon_.hold(false);
  EXPECT_EQ(0, expertd_stream_synchronize(session_, nullptr, kPatienceNs).reason) << message();
}

TEST_F(ClientRefusal, IsKeptFromADaemonThatWouldNotUnderstandIt) {
  detach();
  daemon_.set_abi_minor(0);
  attach();
  EXPECT_EQ(EXPERTD_REASON_ARGUMENT_RANGE, refused_barrier());
  EXPECT_EQ("ARGUMENT_RANGE: flags = 1073741824, allowed 0..255", message());
  EXPECT_TRUE(seen().empty());
}

TEST_F(ClientRefusal, IsNotCountedWithoutADaemonOrAGroup) {
  ASSERT_EQ(0, barrier(&event_)) << message();
  ASSERT_EQ(0, expertd_event_wait(event_, kPatienceNs, nullptr).reason) << message();
  daemon_.hold(true);
  ASSERT_EQ(0, barrier(&event_)) << message();
  daemon_.crash();
  ASSERT_EQ(EXPERTD_REASON_UNAVAILABLE, expertd_event_wait(event_, kPatienceNs, nullptr).reason);
  EXPECT_EQ(EXPERTD_REASON_UNAVAILABLE, refused_barrier()) << "what is wrong with the call is not the news";
  daemon_.hold(false);
  ASSERT_EQ(0, expertd_reattach(session_, kPatienceNs).reason) << message();
  EXPECT_EQ(EXPERTD_REASON_NO_SUCH_GROUP, refused_barrier());
  EXPECT_EQ(EXPERTD_REASON_MISSING_ARGUMENT, expertd_barrier(nullptr, nullptr, 0, 0, &event_).reason);
  ASSERT_EQ(0, expertd_group_leave(group_).reason) << message();
  join();
  EXPECT_TRUE(seen().empty());
}

}  // namespace
}  // namespace expertd::test
