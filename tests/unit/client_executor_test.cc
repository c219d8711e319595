// SPDX-License-Identifier: Apache-2.0
// Goal: which operations the library gives to copy engines, and what it tells the daemon of that. Method: the stand-in
// daemon, which grants a rule, and stand-ins for the GPU and for the kernels of the library.
#include <gtest/gtest.h>

#include "proto/abi/exchange_ht_v1.h"
#include "proto/abi/exchange_v1.h"
#include "proto/abi/executor_v1.h"
#include "tests/unit/client_fake_gpu.h"
#include "tests/unit/client_fake_kernels.h"
#include "tests/unit/client_session_fixture.h"

namespace expertd::test {
namespace {

constexpr uint32_t kCopy = EXPERTD_SLOT_COPY_ENGINE;
constexpr uint32_t kSplit = EXPERTD_SLOT_SPLIT;

class ClientExecutor : public ClientSession {
 protected:
  void SetUp() override {
    device_ = "cuda:0";
    kernels_.have_exchanges();
    gpu_.set_kernels(&kernels_);
    ClientSession::SetUp();
    memory_ = gpu_.allocate(64 << 10);
  }
  /// What a daemon with rules grants, and one without.
  void grant_rule(uint32_t copies, uint32_t split_tokens = 0) {
    v1::JoinGroupResponse granted;
    granted.mutable_rule()->set_copies(copies);
    granted.set_exchange_size(((copies & EXPERTD_COPIES_LL) != 0 ? exchange_bytes() : 0) +
                              ((copies & EXPERTD_COPIES_HT) != 0 ? ht_bytes() : 0));
    granted.mutable_rule()->set_ht_split_tokens(split_tokens);
    daemon_.grant(granted);
  }
  void grant_executor(v1::GroupExecutor executor) {
    v1::JoinGroupResponse granted;
    granted.set_executor(executor);
    granted.set_exchange_size(executor == v1::GROUP_EXECUTOR_COPY_ENGINE ? exchange_bytes() : 0);
    daemon_.grant(granted);
  }
  static uint64_t exchange_bytes() {
    const expertd_exchange_shape shape = {1, 4, kHidden, kMaxTokens, kTopK};
    return expertd_exchange_layout_of(&shape).total_bytes;
  }
  static uint64_t ht_bytes(uint32_t ranks = 1) {
    const expertd_exchange_ht_shape shape = {ranks, 4, kHidden, kMaxTokens, kTopK};
    return expertd_exchange_ht_layout_of(&shape).total_bytes;
  }
  expertd_status_t join(uint32_t executor = EXPERTD_GROUP_EXECUTOR_AUTO, uint32_t lanes = 0) {
    expertd_group_options_t options = group_options();
    options.executor = executor;
    options.capture_lanes = lanes;
    return expertd_group_join(session_, &options, &group_);
  }
  /// Flags of the descriptor that the daemon sees, of those that are about executors.
  uint32_t dispatch(uint32_t flags, expertd_handle_t* handle) {
    expertd_ll_dispatch_args_t args = EXPERTD_INIT(expertd_ll_dispatch_args_t);
    args.x = memory_;
    args.dtype = EXPERTD_BF16;
    args.topk_idx = memory_ + 8192;
    args.idx_type = EXPERTD_I64;
    args.tokens = 1;
    args.flags = flags;
    expertd_event_t event{};
    EXPECT_EQ(0, expertd_ll_dispatch(group_, &args, nullptr, handle, &event).reason) << message();
    return seen(event);
  }
  uint32_t combine(uint32_t flags, expertd_handle_t handle) {
    expertd_ll_combine_args_t args = EXPERTD_INIT(expertd_ll_combine_args_t);
    args.topk_idx = memory_ + 8192;
    args.idx_type = EXPERTD_I64;
    args.topk_weights = reinterpret_cast<float*>(memory_ + 16384);
    args.handle = handle;
    args.tokens = 1;
    args.combined_x = memory_ + 32768;
    args.flags = flags;
    expertd_event_t event{};
    EXPECT_EQ(0, expertd_ll_combine(group_, &args, nullptr, &event).reason) << message();
    return seen(event);
  }
  /// High throughput; `cached` of generation 0: with a routing of its own.
  uint32_t ht_dispatch(uint32_t flags, expertd_handle_t* handle, expertd_handle_t cached = {}, uint32_t bound = 0) {
    expertd_dispatch_args_t args = EXPERTD_INIT(expertd_dispatch_args_t);
    args.x = memory_;
    args.dtype = EXPERTD_BF16;
    args.topk_idx = cached.generation == 0 ? memory_ + 8192 : nullptr;
    args.idx_type = EXPERTD_I64;
    args.tokens = 1;
    args.token_bound = bound;
    args.recv_x = memory_ + 32768;
    args.capacity_rows = 1;
    args.cached = cached;
    args.flags = flags;
    expertd_event_t event{};
    EXPECT_EQ(0, expertd_dispatch(group_, &args, nullptr, handle, &event).reason) << message();
    return seen(event);
  }
  uint32_t ht_combine(uint32_t flags, expertd_handle_t handle) {
    expertd_combine_args_t args = EXPERTD_INIT(expertd_combine_args_t);
    args.x = memory_;
    args.rows = 1;
    args.handle = handle;
    args.tokens = 1;
    args.combined_x = memory_ + 32768;
    args.flags = flags;
    expertd_event_t event{};
    EXPECT_EQ(0, expertd_combine(group_, &args, nullptr, &event).reason) << message();
    return seen(event);
  }
  uint32_t seen(expertd_event_t event) {
    if (!gpu_.capturing) {
      EXPECT_EQ(0, expertd_event_wait(event, kPatienceNs, nullptr).reason) << message();
    }
    const expertd_slot slot = daemon_.seen().back();
    const bool copies = (slot.flags & kCopy) != 0;
    EXPECT_EQ(copies ? (daemon_.seen().size() - before_) % EXPERTD_EXCHANGE_BUFFERS : 0, slot.exchange_buffer);
    return slot.flags & (kCopy | kSplit);
  }

  FakeGpu gpu_;
  FakeKernels kernels_;
  expertd_group_t* group_ = nullptr;
  size_t waits_seen_ = 0;
  size_t before_ = 0;  // operations that the daemon saw before the group
  char* memory_ = nullptr;
};

TEST_F(ClientExecutor, DispatchesGoByTheRuleAndCombinesBehindThem) {
  const struct {
    uint32_t copies;
    bool together;
    bool split;
  } rows[] = {{0, false, false},
              {EXPERTD_COPIES_LL, true, true},
              {EXPERTD_COPIES_LL_SPLIT, false, true},
              {EXPERTD_COPIES_LL_TOGETHER, true, false}};
  for (const auto& row : rows) {
    SCOPED_TRACE(row.copies);
    grant_rule(row.copies);
    ASSERT_EQ(0, join().reason) << message();
    EXPECT_EQ(daemon_.config().copies(), uint32_t{EXPERTD_COPIES_BUILT});
    EXPECT_TRUE(daemon_.config().copy_kernels());
    before_ = daemon_.seen().size();
    expertd_handle_t together{};
    expertd_handle_t split{};
    EXPECT_EQ(row.together ? kCopy : 0, dispatch(0, &together));
    EXPECT_EQ((row.split ? kCopy : 0) | kSplit, dispatch(EXPERTD_ASYNC, &split));
    // A combine may be split or not, whatever its dispatch was.
    EXPECT_EQ(row.together ? kCopy : 0, combine(EXPERTD_ASYNC, together));
    EXPECT_EQ(row.split ? kCopy : 0, combine(0, split));
    EXPECT_EQ(row.together ? kCopy : 0, combine(0, together));
    ASSERT_EQ(0, expertd_group_leave(group_).reason) << message();
  }
}

TEST_F(ClientExecutor, HighThroughputGoesByTheRuleAndFollowsItsHandle) {
  const struct {
    uint32_t copies;
    bool together;
    bool split;
  } rows[] = {{EXPERTD_COPIES_LL, false, false},
              {EXPERTD_COPIES_ALL, true, true},
              {EXPERTD_COPIES_HT, true, true},
              {EXPERTD_COPIES_LL_SPLIT | EXPERTD_COPIES_HT_SPLIT, false, true}};
  for (const auto& row : rows) {
    SCOPED_TRACE(row.copies);
    grant_rule(row.copies, 8);
    ASSERT_EQ(0, join().reason) << message();
    before_ = daemon_.seen().size();
    expertd_handle_t together{};
    expertd_handle_t split{};
    expertd_handle_t small{};
    expertd_handle_t expanded{};
    EXPECT_EQ(row.together ? kCopy : 0, ht_dispatch(0, &together));
    EXPECT_EQ((row.split ? kCopy : 0) | kSplit, ht_dispatch(EXPERTD_ASYNC, &split));
    EXPECT_EQ(kSplit, ht_dispatch(EXPERTD_ASYNC, &small, {}, 7)) << "below the threshold";
    EXPECT_EQ(kSplit, ht_dispatch(EXPERTD_ASYNC | EXPERTD_EXPANDED, &expanded)) << "a form that copies do not serve";
    EXPECT_EQ(row.together ? kCopy : 0, ht_combine(EXPERTD_ASYNC, together));
    EXPECT_EQ(row.split ? kCopy : 0, ht_combine(0, split));
    EXPECT_EQ(0u, ht_combine(0, small));
    EXPECT_EQ(0u, ht_combine(EXPERTD_EXPANDED, expanded));
    EXPECT_EQ(row.split ? kCopy : 0, ht_dispatch(0, nullptr, split));
    EXPECT_EQ(kSplit, ht_dispatch(EXPERTD_ASYNC, nullptr, small));
    EXPECT_EQ((row.together ? kCopy : 0) | kSplit, ht_dispatch(EXPERTD_ASYNC, nullptr, together));
    ASSERT_EQ(0, expertd_group_leave(group_).reason) << message();
  }
}

/// What its stream waits for of the other rank, as steps of the operation's sequence, in order.
TEST_F(ClientExecutor, HighThroughputWaitsForRecordsBeforeItPlacesRowsAndForEveryChunk) {
  v1::JoinGroupResponse granted;
  granted.mutable_rule()->set_copies(EXPERTD_COPIES_HT);
  granted.set_exchange_size(ht_bytes(2));
  daemon_.grant(granted);
  expertd_group_options_t options = group_options();
  options.expert_parallel_size = 2;
  ASSERT_EQ(0, expertd_group_join(session_, &options, &group_).reason) << message();
  before_ = daemon_.seen().size();
  const auto steps = [this] {
    std::vector<uint64_t> waited;
    const uint64_t seq = daemon_.seen().back().seq;
    const auto waits = gpu_.waits();
    for (size_t i = waits_seen_; i < waits.size(); ++i) {
      if (waits[i].value / EXPERTD_HT_PROGRESS(1, 0) == seq) {
        waited.push_back(waits[i].value % EXPERTD_HT_PROGRESS(1, 0));
      }
    }
    waits_seen_ = waits.size();
    return waited;
  };
  expertd_handle_t handle{};
  using Steps = std::vector<uint64_t>;
  EXPECT_EQ(kCopy, ht_dispatch(0, &handle));
  EXPECT_EQ(steps(), (Steps{EXPERTD_HT_BESIDE, EXPERTD_HT_ALL, EXPERTD_HT_ALL}));
  EXPECT_EQ(kCopy, ht_combine(0, handle));
  EXPECT_EQ(steps(), (Steps{1, 2, EXPERTD_HT_CHUNKS, EXPERTD_HT_ALL}));
  EXPECT_EQ(kCopy, ht_dispatch(0, nullptr, handle));
  EXPECT_EQ(steps(), (Steps{EXPERTD_HT_ALL, EXPERTD_HT_ALL})) << "nothing travels beside the rows";
}

TEST_F(ClientExecutor, ThePlaceOfAHandleKeepsNothingOfItsEarlierDispatch) {
  grant_rule(EXPERTD_COPIES_LL_SPLIT);
  ASSERT_EQ(0, join().reason) << message();
  for (int i = 0; i < 9; ++i) {  // through all four places, each by both executors
    expertd_handle_t handle{};
    const bool split = i % 3 == 1;
    EXPECT_EQ(split ? kCopy | kSplit : 0, dispatch(split ? EXPERTD_ASYNC : 0, &handle)) << i;
    EXPECT_EQ(split ? kCopy : 0, combine(0, handle)) << i;
  }
}

TEST_F(ClientExecutor, CapturedOperationsAreTheDaemons) {
  grant_rule(EXPERTD_COPIES_LL);
  ASSERT_EQ(0, join(EXPERTD_GROUP_EXECUTOR_AUTO, 1).reason) << message();
  gpu_.capturing = true;
  expertd_handle_t handle{};
  EXPECT_EQ(0u, dispatch(EXPERTD_ASYNC, &handle));
  EXPECT_EQ(0u, combine(0, handle));
  gpu_.capturing = false;
  EXPECT_EQ(0u, combine(0, handle)) << "its routing is where the captured dispatch left it";
}

TEST_F(ClientExecutor, ADaemonWithoutRulesHasOneExecutorForTheGroup) {
  expertd_handle_t handle{};
  grant_executor(v1::GROUP_EXECUTOR_COPY_ENGINE);
  ASSERT_EQ(0, join(EXPERTD_GROUP_EXECUTOR_COPY_ENGINE).reason) << message();
  EXPECT_EQ(kCopy, dispatch(EXPERTD_ASYNC, &handle)) << "it does not know the flag of split ones";
  EXPECT_EQ(kCopy, dispatch(0, &handle));
  EXPECT_EQ(kCopy, combine(EXPERTD_ASYNC, handle));
  ASSERT_EQ(0, expertd_group_leave(group_).reason) << message();
  grant_executor(v1::GROUP_EXECUTOR_SM);
  ASSERT_EQ(0, join().reason) << message();
  EXPECT_EQ(0u, dispatch(EXPERTD_ASYNC, &handle));
}

TEST_F(ClientExecutor, WhatIsAskedForIsHeldAgainstTheAnswer) {
  grant_executor(v1::GROUP_EXECUTOR_SM);
  EXPECT_EQ(EXPERTD_REASON_UNSUPPORTED, join(EXPERTD_GROUP_EXECUTOR_COPY_ENGINE).reason);
  grant_rule(EXPERTD_COPIES_ALL + 1);
  EXPECT_EQ(EXPERTD_REASON_BAD_MESSAGE, join().reason);
}

}  // namespace
}  // namespace expertd::test
