// SPDX-License-Identifier: Apache-2.0
// Goal: what a GPU session registers by itself, how it ends and what it rings. Method: the stand-in daemon and a
// stand-in GPU side, which takes the place of the one over libcuda when this binary is linked.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <string>
#include <vector>

#include "tests/unit/client_fake_gpu.h"
#include "tests/unit/client_session_fixture.h"

namespace expertd::client {

Status create_cuda_side(const std::string&, std::unique_ptr<DeviceSide>* side) {
  *side = std::make_unique<test::FakeGpuSide>(test::FakeGpu::current());
  return {};
}

}  // namespace expertd::client

namespace expertd::test {
namespace {

class ClientGpu : public ClientSession {
 protected:
  static constexpr uint64_t kBytes = 64 << 10;

  void SetUp() override {
    device_ = "cuda:0";
    ClientSession::SetUp();
    group_ = join();
    ASSERT_NE(nullptr, group_);
    inputs_ = gpu_.allocate(kBytes);
  }
  // A dispatch with the payload at x; the routing lies in memory that every one of them uses.
  expertd_status_t dispatch(const char* x, expertd_event_t* event) {
    expertd_ll_dispatch_args_t args = EXPERTD_INIT(expertd_ll_dispatch_args_t);
    args.x = x;
    args.dtype = EXPERTD_BF16;
    args.topk_idx = inputs_;
    args.idx_type = EXPERTD_I64;
    args.tokens = 1;
    expertd_handle_t handle{};
    return expertd_ll_dispatch(group_, &args, nullptr, &handle, event);
  }
  void dispatch_and_wait(const char* x) {
    expertd_event_t event{};
    ASSERT_EQ(0, dispatch(x, &event).reason) << message();
    ASSERT_EQ(0, expertd_event_wait(event, kPatienceNs, nullptr).reason) << message();
  }
  expertd_tensor_ref payload() { return daemon_.seen().back().tensors[EXPERTD_IN_X]; }
  void crash() {
    expertd_event_t event{};
    daemon_.hold(true);
    ASSERT_EQ(0, expertd_barrier(group_, nullptr, 0, 0, &event).reason) << message();
    daemon_.crash();
    ASSERT_EQ(EXPERTD_REASON_UNAVAILABLE, expertd_event_wait(event, kPatienceNs, nullptr).reason);
    daemon_.hold(false);
  }

  FakeGpu gpu_;
  expertd_group_t* group_ = nullptr;
  char* inputs_ = nullptr;
};

TEST_F(ClientGpu, RegistersAnewWhatWasAllocatedAtAFreedAddress) {
  char* x = gpu_.allocate(kBytes);
  dispatch_and_wait(x + 256);
  const expertd_tensor_ref before = payload();
  EXPECT_EQ(256u, before.offset);
  gpu_.release(x);
  gpu_.allocate_at(x, 2 * kBytes);
  dispatch_and_wait(x + 256);
  EXPECT_NE(before.buffer, payload().buffer);
  dispatch_and_wait(x + kBytes + 512);
  EXPECT_EQ(kBytes + 512, payload().offset) << "all of the new allocation is known";
}

TEST_F(ClientGpu, RegistersAllOfAnAllocationWhosePartTheCallerRegistered) {
  char* x = gpu_.allocate(kBytes);
  expertd_buffer_t* part = nullptr;
  ASSERT_EQ(0, expertd_register(session_, x, 4096, &part).reason) << message();
  dispatch_and_wait(x);
  const expertd_tensor_ref in_part = payload();
  dispatch_and_wait(x + 8192);
  const expertd_tensor_ref behind = payload();
  EXPECT_NE(in_part.buffer, behind.buffer);
  EXPECT_EQ(8192u, behind.offset);
  dispatch_and_wait(x + 16384);
  EXPECT_EQ(behind.buffer, payload().buffer) << "registered once";
  ASSERT_EQ(0, expertd_buffer_release(part).reason) << message();
  dispatch_and_wait(x);
  EXPECT_EQ(behind.buffer, payload().buffer) << "the part was released and nothing else";
  gpu_.release(x);
  gpu_.allocate_at(x, kBytes);
  dispatch_and_wait(x);
}

TEST_F(ClientGpu, RenewsEveryRegistrationOfAnAddressThatIsUsedAgain) {
  char* x = gpu_.allocate(kBytes);
  expertd_buffer_t* part = nullptr;
  ASSERT_EQ(0, expertd_register(session_, x, 4096, &part).reason) << message();
  dispatch_and_wait(x + 8192);
  gpu_.release(x);
  gpu_.allocate_at(x, kBytes);
  dispatch_and_wait(x);
  dispatch_and_wait(x + 8192);
  EXPECT_EQ(0, expertd_buffer_release(part).reason) << message();
}

TEST_F(ClientGpu, DropsTheLongestUnusedRegistrationsAtTheLimit) {
  constexpr int kAllocations = 1100;  // more than a session may have buffers
  std::vector<char*> allocations;
  for (int i = 0; i < kAllocations; ++i) {
    allocations.push_back(gpu_.allocate(4096));
    expertd_event_t event{};
    ASSERT_EQ(0, dispatch(allocations.back(), &event).reason) << i << ": " << message();
  }
  EXPECT_EQ(kAllocations + 1u, gpu_.exports()) << "what every operation uses stays registered";
  EXPECT_GT(1024u, daemon_.buffer_count());
  expertd_buffer_t* window = nullptr;
  ASSERT_EQ(0, expertd_window_create(session_, 4096, &window).reason) << "room for the caller: " << message();
  dispatch_and_wait(allocations.back());
  EXPECT_EQ(kAllocations + 1u, gpu_.exports());
  dispatch_and_wait(allocations.front());
  EXPECT_EQ(kAllocations + 2u, gpu_.exports());
}

TEST_F(ClientGpu, KeepsRegistrationsThatOperationsInFlightUse) {
  char* x = gpu_.allocate(kBytes);
  char* y = gpu_.allocate(kBytes);
  dispatch_and_wait(x);
  expertd_buffer_t* window = nullptr;
  while (expertd_window_create(session_, 4096, &window).reason == 0) {
  }
  EXPECT_EQ(0u, message().find("BUFFER_LIMIT: ")) << message();
  daemon_.hold(true);
  expertd_event_t in_flight{};
  ASSERT_EQ(0, dispatch(x, &in_flight).reason) << message();
  expertd_event_t event{};
  EXPECT_EQ(EXPERTD_REASON_BUFFER_LIMIT, dispatch(y, &event).reason);
  daemon_.hold(false);
  ASSERT_EQ(0, expertd_event_wait(in_flight, kPatienceNs, nullptr).reason) << message();
  dispatch_and_wait(y);
  EXPECT_EQ(0u, payload().offset);
}

TEST_F(ClientGpu, ReattachesAlthoughMemoryThatItRegisteredWasFreed) {
  char* x = gpu_.allocate(kBytes);
  char* kept = gpu_.allocate(kBytes);
  expertd_buffer_t* registered = nullptr;
  ASSERT_EQ(0, expertd_register(session_, kept, kBytes, &registered).reason) << message();
  dispatch_and_wait(x);
  gpu_.release(x);
  crash();
  ASSERT_EQ(0, expertd_reattach(session_, kPatienceNs).reason) << message();
  EXPECT_EQ(1u, daemon_.buffer_count()) << "the caller's registration";
  ASSERT_EQ(0, expertd_group_leave(group_).reason) << message();
  group_ = join();
  dispatch_and_wait(kept);
  EXPECT_EQ(0, expertd_buffer_release(registered).reason) << message();
}

TEST_F(ClientGpu, ReattachesOnlyAfterTheWaitersOfTheEndedAttachmentWereReleased) {
  // A new attachment that does not wait begins meanwhile.
  gpu_.on_release([this] { static_cast<void>(gpu_.wait_for_entries(2, std::chrono::milliseconds(200))); });
  crash();
  ASSERT_EQ(0, expertd_reattach(session_, kPatienceNs).reason) << message();
  EXPECT_EQ((std::vector<std::string>{"begin", "released", "begin"}), gpu_.log());
  gpu_.on_release(nullptr);
}

TEST_F(ClientGpu, DoesNotRingWhereAnotherStreamMayStillRing) {
  int streams[2] = {};
  const expertd_stream_t slow = &streams[0];
  const expertd_stream_t fast = &streams[1];
  constexpr uint64_t kSlots = FakeDaemon::kSlots;
  // The daemon refuses the first operation at once, however far the stream is that is to ring for it.
  daemon_.set_script([](const expertd_slot& slot, expertd_completion* completion) {
    completion->reason = slot.seq == 1 ? EXPERTD_REASON_TOKENS_EXCEED_MAX : 0;
  });
  const auto issue = [&](expertd_stream_t stream) {
    expertd_event_t event{};
    ASSERT_EQ(0, expertd_barrier(group_, stream, EXPERTD_ASYNC, 0, &event).reason) << message();
    static_cast<void>(expertd_event_wait(event, kPatienceNs, nullptr));
  };
  issue(slow);
  for (uint64_t seq = 2; seq <= 4 * kSlots; ++seq) {
    // The slow stream comes back to the slot of the refused operation at its third use, behind its late write.
    issue(seq == 1 + 2 * kSlots || seq == 2 ? slow : fast);
  }
  const std::vector<expertd_slot> seen = daemon_.seen();
  ASSERT_EQ(4 * kSlots, seen.size());
  for (const expertd_slot& slot : seen) {
    EXPECT_EQ(slot.seq == 1 + kSlots, (slot.flags & EXPERTD_SLOT_RUNG) != 0) << slot.seq;
  }
  EXPECT_EQ(std::vector<expertd_stream_t>{fast}, gpu_.synchronized());
  std::vector<uint64_t> rung;
  for (const Rung& it : gpu_.rung()) {
    rung.push_back(it.seq);
  }
  EXPECT_EQ(seen.size() - 1, rung.size());
  EXPECT_EQ(0, std::count(rung.begin(), rung.end(), 1 + kSlots));
}

}  // namespace
}  // namespace expertd::test
