// SPDX-License-Identifier: Apache-2.0
// Goal: what becomes of the local work of a GPU session: which of it the library launches and which the daemon gets,
// how its events end, and what waits for it. Method: the stand-in daemon and GPU, and stand-in kernels that end when
// they are told.
#include <gtest/gtest.h>

#include <string>
#include <thread>
#include <vector>

#include "tests/unit/client_fake_gpu.h"
#include "tests/unit/client_fake_kernels.h"
#include "tests/unit/client_session_fixture.h"

namespace expertd::test {
namespace {

constexpr uint64_t kShortNs = 30'000'000;

class ClientLocal : public ClientSession {
 protected:
  void SetUp() override {
    device_ = "cuda:0";
    gpu_.set_kernels(&kernels_);
    kernels_.set_reach([this](const client::Extent& bytes, client::Extent* known) {
      ++asked_;
      const FakeGpu::Allocation found = gpu_.find(reinterpret_cast<const void*>(bytes.begin));
      *known = {found.base, found.base + found.bytes};
      return known->contains(bytes);
    });
    ClientSession::SetUp();
    memory_ = gpu_.allocate(64 << 10);
    args_.topk_idx = memory_;
    args_.idx_type = EXPERTD_I64;
    args_.tokens = 16;
    args_.top_k = 2;
    args_.num_experts = 8;
    args_.num_ranks = 4;
    args_.tokens_per_rank = reinterpret_cast<int32_t*>(memory_ + 4096);
    args_.tokens_per_node = reinterpret_cast<int32_t*>(memory_ + 8192);
    args_.tokens_per_expert = reinterpret_cast<int32_t*>(memory_ + 12288);
    args_.token_rank_mask = reinterpret_cast<uint8_t*>(memory_ + 16384);
  }
  void TearDown() override {
    kernels_.hold(false);
    for (size_t i = 0; i < kernels_.launches().size(); ++i) {
      // In order, so that the last user of a slot stays.
      kernels_.end(i);
    }
    ClientSession::TearDown();
  }

  expertd_status_t issue(expertd_event_t* event, expertd_stream_t stream = nullptr) {
    return expertd_layout(session_, &args_, stream, event);
  }
  int done(expertd_event_t event) {
    int is_done = -1;
    EXPECT_EQ(0, expertd_event_query(event, &is_done).reason) << message();
    return is_done;
  }
  size_t submitted() { return daemon_.seen().size(); }

  FakeGpu gpu_;
  FakeKernels kernels_;
  int asked_ = 0;
  char* memory_ = nullptr;
  expertd_layout_args_t args_ = EXPERTD_INIT(expertd_layout_args_t);
};

TEST_F(ClientLocal, LaunchesALayoutAndTellsTheDaemonNothing) {
  int stream = 0;
  expertd_event_t event{};
  ASSERT_EQ(0, issue(&event, &stream).reason) << message();
  expertd_op_result_t result = EXPERTD_INIT(expertd_op_result_t);
  result.rank = 7;
  EXPECT_EQ(0, expertd_event_wait(event, 0, &result).reason) << message();
  EXPECT_EQ(-1, result.rank);
  EXPECT_EQ(1, done(event));
  EXPECT_EQ(0u, submitted());
  EXPECT_EQ(0u, gpu_.exports()) << "nothing is registered";
  EXPECT_EQ(1, asked_) << "all tensors lie in one allocation";
  ASSERT_EQ(1u, kernels_.launches().size());
  const FakeKernels::Launch launch = kernels_.launches()[0];
  EXPECT_EQ(&stream, launch.stream);
  EXPECT_EQ(memory_, launch.params.topk_idx);
  EXPECT_EQ(args_.tokens_per_rank, launch.params.tokens_per_rank);
  EXPECT_EQ(args_.tokens_per_node, launch.params.tokens_per_node);
  EXPECT_EQ(args_.tokens_per_expert, launch.params.tokens_per_expert);
  EXPECT_EQ(args_.token_rank_mask, launch.params.token_rank_mask);
  EXPECT_EQ(8u, launch.params.idx_bytes);
  EXPECT_EQ(16u, launch.params.tokens);
  EXPECT_EQ(2u, launch.params.top_k);
  EXPECT_EQ(8u, launch.params.experts);
  EXPECT_EQ(4u, launch.params.ranks);
  EXPECT_EQ(4u, launch.params.ranks_per_node);
}

TEST_F(ClientLocal, NamesTheIdThatIsOutOfRange) {
  kernels_.refuse(-9);
  expertd_event_t event{};
  ASSERT_EQ(0, issue(&event).reason) << message();
  expertd_op_result_t result = EXPERTD_INIT(expertd_op_result_t);
  EXPECT_EQ(EXPERTD_REASON_EXPERT_OUT_OF_RANGE, expertd_event_wait(event, 0, &result).reason);
  EXPECT_EQ(EXPERTD_REASON_EXPERT_OUT_OF_RANGE, result.status.reason);
  EXPECT_NE(std::string::npos, message().find("-9, allowed -1..7")) << message();
  kernels_.refuse(0);
  for (uint32_t i = 0; i <= client::kLocalSlots; ++i) {
    expertd_event_t next{};
    ASSERT_EQ(0, issue(&next).reason) << message();
    EXPECT_EQ(0, expertd_event_wait(next, 0, nullptr).reason) << "the slot remembers nothing: " << message();
  }
  EXPECT_EQ(EXPERTD_REASON_EXPERT_OUT_OF_RANGE, expertd_event_wait(event, 0, nullptr).reason) << "it is kept";
}

TEST_F(ClientLocal, LeavesToTheDaemonWhatTheKernelDoesNotTake) {
  const auto expect_submitted = [&](const expertd_layout_args_t& args, size_t count) {
    const expertd_layout_args_t before = std::exchange(args_, args);
    expertd_event_t event{};
    EXPECT_EQ(0, issue(&event).reason) << message();
    EXPECT_EQ(0, expertd_event_wait(event, kPatienceNs, nullptr).reason) << message();
    EXPECT_EQ(count, submitted());
    args_ = before;
  };
  expertd_layout_args_t args = args_;
  args.num_experts = 7;
  expect_submitted(args, 1);
  args = args_;
  args.top_k = 0;
  expect_submitted(args, 2);
  args = args_;
  args.tokens_per_rank += 1;
  expect_submitted(args, 3);
  args = args_;
  args.topk_idx = nullptr;
  expect_submitted(args, 4);
  args = args_;
  args.flags = EXPERTD_EXPANDED;
  expect_submitted(args, 5);
  EXPECT_EQ(0u, kernels_.launches().size());
  args.flags = EXPERTD_ASYNC;
  expect_submitted(args, 5);
  EXPECT_EQ(1u, kernels_.launches().size());
  int nobodys = 0;
  args_.tokens_per_node = &nobodys;
  expertd_event_t event{};
  EXPECT_NE(0, issue(&event).reason) << "memory of the host, aligned or not, never gets to the kernel";
  EXPECT_EQ(1u, kernels_.launches().size());
}

TEST_F(ClientLocal, WithoutKernelsTheDaemonGetsIt) {
  ASSERT_EQ(0, expertd_detach(session_).reason) << message();
  gpu_.set_kernels(nullptr);
  ClientSession::SetUp();
  expertd_event_t event{};
  ASSERT_EQ(0, issue(&event).reason) << message();
  EXPECT_EQ(0, expertd_event_wait(event, kPatienceNs, nullptr).reason) << message();
  EXPECT_EQ(1u, submitted());
}

TEST_F(ClientLocal, ReportsTheTimeoutOfWhatItsStreamDoesNotReach) {
  kernels_.hold(true);
  args_.timeout_ns = kPatienceNs;
  expertd_event_t patient{};
  ASSERT_EQ(0, issue(&patient).reason) << message();
  EXPECT_EQ(EXPERTD_REASON_TIMEOUT, expertd_event_wait(patient, kShortNs, nullptr).reason);
  EXPECT_EQ(0, done(patient)) << "only the wait has timed out";
  args_.timeout_ns = kShortNs;
  expertd_event_t event{};
  ASSERT_EQ(0, issue(&event).reason) << message();
  expertd_op_result_t result = EXPERTD_INIT(expertd_op_result_t);
  EXPECT_EQ(EXPERTD_REASON_TIMEOUT, expertd_event_wait(event, 0, &result).reason);
  EXPECT_EQ(EXPERTD_REASON_TIMEOUT, result.status.reason) << "the operation has timed out";
  EXPECT_EQ(1, done(event));
  kernels_.end(1);
  EXPECT_EQ(0, expertd_event_wait(event, 0, nullptr).reason) << "it came after all: " << message();
}

TEST_F(ClientLocal, HasAsManyOutstandingAsSlots) {
  kernels_.hold(true);
  std::vector<expertd_event_t> events(client::kLocalSlots);
  for (expertd_event_t& event : events) {
    ASSERT_EQ(0, issue(&event).reason) << message();
  }
  args_.timeout_ns = kShortNs;
  expertd_event_t next{};
  EXPECT_EQ(EXPERTD_REASON_RING_OVERFLOW, issue(&next).reason);
  args_.timeout_ns = kPatienceNs;
  std::thread later([&] { kernels_.end(0); });
  EXPECT_EQ(0, issue(&next).reason) << message();
  later.join();
  EXPECT_EQ(1, done(events[0]));
  EXPECT_EQ(0, done(events[1]));
  EXPECT_EQ(0, done(next));
  kernels_.end(client::kLocalSlots);
  EXPECT_EQ(0, expertd_event_wait(next, 0, nullptr).reason) << message();
}

TEST_F(ClientLocal, AnotherStreamWaitsForTheWordUnlessItIsThere) {
  int stream = 0;
  kernels_.hold(true);
  expertd_event_t event{};
  ASSERT_EQ(0, issue(&event).reason) << message();
  ASSERT_EQ(0, expertd_event_stream_wait(event, &stream).reason) << message();
  const std::vector<WordWait> waits = gpu_.waits();
  ASSERT_EQ(1u, waits.size());
  EXPECT_EQ(kernels_.word(kernels_.launches()[0].slot), waits[0].word);
  EXPECT_EQ(kernels_.launches()[0].params.seq, waits[0].value);
  EXPECT_EQ(&stream, waits[0].stream);
  kernels_.end(0);
  ASSERT_EQ(0, expertd_event_stream_wait(event, &stream).reason) << message();
  EXPECT_EQ(1u, gpu_.waits().size());
}

TEST_F(ClientLocal, ALaunchThatFailsLeavesNoEventAndNoGap) {
  kernels_.fail_launches(true);
  expertd_event_t event{};
  EXPECT_EQ(EXPERTD_REASON_CUDA, issue(&event).reason);
  EXPECT_EQ(nullptr, event.session);
  kernels_.fail_launches(false);
  ASSERT_EQ(0, issue(&event).reason) << message();
  EXPECT_EQ(0, expertd_event_wait(event, 0, nullptr).reason) << message();
  event.seq += 1;
  EXPECT_EQ(EXPERTD_REASON_BAD_STATE, expertd_event_wait(event, 0, nullptr).reason) << "it was not issued";
}

TEST_F(ClientLocal, ALostContextEndsTheWait) {
  kernels_.hold(true);
  expertd_event_t event{};
  ASSERT_EQ(0, issue(&event).reason) << message();
  kernels_.lose();
  EXPECT_EQ(EXPERTD_REASON_CUDA, expertd_event_wait(event, 0, nullptr).reason);
}

TEST_F(ClientLocal, OutlivesTheDaemon) {
  kernels_.hold(true);
  expertd_event_t event{};
  ASSERT_EQ(0, issue(&event).reason) << message();
  expertd_event_t ended{};
  kernels_.hold(false);
  ASSERT_EQ(0, issue(&ended).reason) << message();
  daemon_.crash();
  EXPECT_EQ(0, expertd_event_wait(ended, 0, nullptr).reason) << message();
  EXPECT_EQ(0, done(event));
  kernels_.end(0);
  EXPECT_EQ(0, expertd_event_wait(event, 0, nullptr).reason) << message();
}

TEST_F(ClientLocal, AWindowIsReleasedOnlyAfterwards) {
  expertd_buffer_t* window = nullptr;
  ASSERT_EQ(0, expertd_window_create(session_, 4096, &window).reason) << message();
  args_.token_rank_mask = static_cast<uint8_t*>(expertd_buffer_data(window));
  kernels_.hold(true);
  expertd_event_t event{};
  ASSERT_EQ(0, issue(&event).reason) << message();
  EXPECT_EQ(0u, submitted()) << "a window needs no asking";
  std::atomic<bool> ended{false};
  std::thread later([&] {
    std::this_thread::sleep_for(std::chrono::nanoseconds(kShortNs));
    ended = true;
    kernels_.end(0);
  });
  EXPECT_EQ(0, expertd_buffer_release(window).reason) << message();
  EXPECT_TRUE(ended);
  later.join();
}

TEST(LocalLayout, BlocksFollowTheTokens) {
  EXPECT_EQ(1u, client::layout_blocks(0));
  EXPECT_EQ(1u, client::layout_blocks(64));
  EXPECT_EQ(2u, client::layout_blocks(65));
  EXPECT_EQ(64u, client::layout_blocks(4096));
  EXPECT_EQ(client::kLayoutBlocksMax, client::layout_blocks(client::kLayoutTokensMax));
}

}  // namespace
}  // namespace expertd::test
