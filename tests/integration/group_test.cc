// SPDX-License-Identifier: Apache-2.0
// Joining, leaving and planning groups: two ranks are two threads with a session each.
#include <gtest/gtest.h>

#include <thread>

#include "tests/integration/pending_join.h"
#include "tests/support/daemon_process.h"
#include "tests/support/rank_threads.h"

namespace expertd::support {
namespace {

using std::chrono::seconds;

class Group : public ::testing::Test {
 protected:
  void SetUp() override { ASSERT_TRUE(daemon_.start()); }
  ClientSession attach(const std::string& device) { return ClientSession(daemon_.attach_socket(), device); }

  DaemonProcess daemon_{3, {"--session-max-groups=4"}};
};

TEST_F(Group, FormsWhenEveryRankHasJoined) {
  RankGroup group(daemon_.attach_socket(), "pair", 2);
  ASSERT_TRUE(group.ok()) << group.failure();
  group.run([](Rank& rank) { EXPECT_TRUE(barrier(rank.group).outcome.ok()) << expertd_last_message(); });
}

TEST_F(Group, OfOneRankFormsAtOnce) {
  RankGroup group(daemon_.attach_socket(), "lone", 1);
  ASSERT_TRUE(group.ok()) << group.failure();
  EXPECT_TRUE(barrier(group.rank(0).group).outcome.ok());
}

TEST_F(Group, JoinTimesOutNamingTheMissingRanks) {
  const ClientSession session = attach("host:0");
  expertd_group_options_t options = small_group("waiting", 1, 3);
  options.join_timeout_ns = 200'000'000;
  expertd_group_t* group = nullptr;
  const uint64_t begin = monotonic_ns();
  const Outcome outcome = outcome_of(expertd_group_join(session.get(), &options, &group));
  EXPECT_EQ(outcome.status.reason, EXPERTD_REASON_JOIN_TIMEOUT) << describe(outcome);
  EXPECT_NE(outcome.message.find("0, 2"), std::string::npos) << outcome.message;
  EXPECT_GE(elapsed_ms(begin), 200);
  EXPECT_LT(elapsed_ms(begin), worst_bound_ms(1000));
  EXPECT_EQ(group, nullptr);
}

TEST_F(Group, ADuplicateRankIsRefusedWhileTheFirstStillWaits) {
  const ClientSession first = attach("host:0");
  const ClientSession second = attach("host:1");
  PendingJoin waiting(first, small_group("twice", 0, 2));
  Outcome outcome;
  ASSERT_TRUE(wait_until(
      [&] {
        // Until the first has arrived the second would be taken for it and wait.
        expertd_group_options_t options = small_group("twice", 0, 2);
        options.join_timeout_ns = 30'000'000;
        expertd_group_t* group = nullptr;
        outcome = outcome_of(expertd_group_join(second.get(), &options, &group));
        return outcome.status.reason == EXPERTD_REASON_DUPLICATE_RANK;
      },
      seconds(5)))
      << describe(outcome);
  EXPECT_NE(outcome.message.find("rank 0"), std::string::npos) << outcome.message;
  PendingJoin completes(second, small_group("twice", 1, 2));
  EXPECT_TRUE(completes.outcome().ok()) << describe(completes.outcome());
  EXPECT_TRUE(waiting.outcome().ok()) << describe(waiting.outcome());
}

TEST_F(Group, ACompleteGroupTakesNobodyElse) {
  RankGroup group(daemon_.attach_socket(), "full", 2);
  ASSERT_TRUE(group.ok()) << group.failure();
  const ClientSession other = attach("host:2");
  const expertd_group_options_t options = small_group("full", 0, 2);
  expertd_group_t* joined = nullptr;
  const Outcome outcome = outcome_of(expertd_group_join(other.get(), &options, &joined));
  EXPECT_EQ(outcome.status.reason, EXPERTD_REASON_DUPLICATE_RANK) << describe(outcome);
}

TEST_F(Group, TwoRanksOnOneDeviceAreRefused) {
  const ClientSession first = attach("host:0");
  const ClientSession second = attach("host:0");
  expertd_group_options_t options = small_group("crowded", 0, 2);
  options.join_timeout_ns = 2'000'000'000;
  PendingJoin waiting(first, options);
  Outcome outcome;
  EXPECT_TRUE(wait_until(
      [&] {
        expertd_group_options_t other = small_group("crowded", 1, 2);
        other.join_timeout_ns = 30'000'000;
        expertd_group_t* group = nullptr;
        outcome = outcome_of(expertd_group_join(second.get(), &other, &group));
        return outcome.status.reason == EXPERTD_REASON_DEVICE_TAKEN;
      },
      seconds(2)))
      << describe(outcome);
  EXPECT_EQ(waiting.outcome().status.reason, EXPERTD_REASON_JOIN_TIMEOUT);
}

struct Mismatch {
  const char* field;
  const char* first;
  const char* second;
  void (*change)(expertd_group_options_t* options);
};

const Mismatch kMismatches[] = {
    {"expert_parallel_size", "2", "3",
     [](expertd_group_options_t* o) {
       o->expert_parallel_size = 3;
       o->num_experts = 6;
     }},
    {"num_experts", "4", "8", [](expertd_group_options_t* o) { o->num_experts = 8; }},
    {"hidden", "128", "256", [](expertd_group_options_t* o) { o->hidden = 256; }},
    {"top_k", "2", "3", [](expertd_group_options_t* o) { o->top_k = 3; }},
    {"max_tokens", "16", "17", [](expertd_group_options_t* o) { o->max_tokens = 17; }},
    {"mode", "3", "1", [](expertd_group_options_t* o) { o->mode = EXPERTD_MODE_NORMAL; }},
    {"on_rank_loss", "1", "2", [](expertd_group_options_t* o) { o->on_rank_loss = EXPERTD_RANK_LOSS_MASK; }},
    {"op_timeout_ns", "0", "77", [](expertd_group_options_t* o) { o->op_timeout_ns = 77; }},
    {"first_op_timeout_ns", "0", "78", [](expertd_group_options_t* o) { o->first_op_timeout_ns = 78; }},
    {"dispatch_dtypes", "0", "5",
     [](expertd_group_options_t* o) { o->dispatch_dtypes = EXPERTD_DISPATCH_BF16 | EXPERTD_DISPATCH_FP8; }},
    {"capture_lanes", "0", "1", [](expertd_group_options_t* o) { o->capture_lanes = 1; }},
    {"executor", "0", "1", [](expertd_group_options_t* o) { o->executor = EXPERTD_GROUP_EXECUTOR_SM; }},
};

class GroupMismatch : public Group, public ::testing::WithParamInterface<Mismatch> {};

TEST_P(GroupMismatch, NamesTheFieldAndBothValues) {
  const Mismatch& mismatch = GetParam();
  const ClientSession first = attach("host:0");
  const ClientSession second = attach("host:1");
  expertd_group_options_t options = small_group("differing", 0, 2);
  options.join_timeout_ns = 5'000'000'000;
  PendingJoin waiting(first, options);
  Outcome outcome;
  ASSERT_TRUE(wait_until(
      [&] {
        expertd_group_options_t other = small_group("differing", 1, 2);
        other.join_timeout_ns = 30'000'000;
        mismatch.change(&other);
        expertd_group_t* group = nullptr;
        outcome = outcome_of(expertd_group_join(second.get(), &other, &group));
        return outcome.status.reason == EXPERTD_REASON_CONFIG_MISMATCH;
      },
      seconds(4)))
      << describe(outcome);
  for (const char* part : {mismatch.field, mismatch.first, mismatch.second}) {
    EXPECT_NE(outcome.message.find(part), std::string::npos) << part << " is not in: " << outcome.message;
  }
  // The mismatch costs the first rank nothing: the right configuration still completes the group.
  PendingJoin completes(second, small_group("differing", 1, 2));
  EXPECT_TRUE(completes.outcome().ok()) << describe(completes.outcome());
  EXPECT_TRUE(waiting.outcome().ok()) << describe(waiting.outcome());
}

INSTANTIATE_TEST_SUITE_P(Fields, GroupMismatch, ::testing::ValuesIn(kMismatches),
                         [](const auto& test) { return std::string(test.param.field); });

struct BadOption {
  const char* field;
  void (*change)(expertd_group_options_t* options);
};

const BadOption kBadOptions[] = {
    {"expert_parallel_size", [](expertd_group_options_t* o) { o->expert_parallel_size = 0; }},
    {"rank", [](expertd_group_options_t* o) { o->rank = 2; }},
    {"num_experts", [](expertd_group_options_t* o) { o->num_experts = 5; }},
    {"hidden", [](expertd_group_options_t* o) { o->hidden = 100; }},
    {"top_k", [](expertd_group_options_t* o) { o->top_k = 33; }},
    {"max_tokens", [](expertd_group_options_t* o) { o->max_tokens = 5000; }},
    {"dispatch_dtypes", [](expertd_group_options_t* o) { o->dispatch_dtypes = 8; }},
    {"capture_lanes", [](expertd_group_options_t* o) { o->capture_lanes = 3; }},
    {"executor", [](expertd_group_options_t* o) { o->executor = 3; }},
};

class GroupRange : public Group, public ::testing::WithParamInterface<BadOption> {};

TEST_P(GroupRange, NamesTheFieldThatIsOutOfRange) {
  const ClientSession session = attach("host:0");
  expertd_group_options_t options = small_group("ranges", 0, 2);
  GetParam().change(&options);
  expertd_group_t* group = nullptr;
  const Outcome outcome = outcome_of(expertd_group_join(session.get(), &options, &group));
  EXPECT_EQ(outcome.status.reason, EXPERTD_REASON_ARGUMENT_RANGE) << describe(outcome);
  EXPECT_NE(outcome.message.find(GetParam().field), std::string::npos) << outcome.message;
}

INSTANTIATE_TEST_SUITE_P(Fields, GroupRange, ::testing::ValuesIn(kBadOptions),
                         [](const auto& test) { return std::string(test.param.field); });

TEST_F(Group, CopyEnginesAreRefusedByNameOnHostDevices) {
  RankGroup group(daemon_.attach_socket(), "copies", 2,
                  [](expertd_group_options_t* options) { options->executor = EXPERTD_GROUP_EXECUTOR_COPY_ENGINE; });
  ASSERT_FALSE(group.ok());
  for (uint32_t rank = 0; rank < 2; ++rank) {
    const Outcome& joined = group.rank(rank).joined;
    EXPECT_EQ(joined.status.reason, EXPERTD_REASON_UNSUPPORTED) << describe(joined);
    EXPECT_NE(joined.message.find("rank 0 is on a host device"), std::string::npos) << joined.message;
  }
}

TEST_F(Group, CaptureLanesAreRefusedByNameOnHostDevices) {
  RankGroup group(daemon_.attach_socket(), "graphs", 2,
                  [](expertd_group_options_t* options) { options->capture_lanes = 1; });
  ASSERT_FALSE(group.ok());
  for (uint32_t rank = 0; rank < 2; ++rank) {
    const Outcome& joined = group.rank(rank).joined;
    EXPECT_EQ(joined.status.reason, EXPERTD_REASON_UNSUPPORTED) << describe(joined);
    EXPECT_NE(joined.message.find("capture_lanes = 1"), std::string::npos) << joined.message;
    EXPECT_NE(joined.message.find("host devices"), std::string::npos) << joined.message;
  }
}

TEST_F(Group, CanBeLeftAndJoinedAnew) {
  RankGroup group(daemon_.attach_socket(), "again", 2);
  ASSERT_TRUE(group.ok()) << group.failure();
  for (int round = 0; round < 5; ++round) {
    group.run([](Rank& rank) {
      EXPECT_TRUE(barrier(rank.group).outcome.ok());
      EXPECT_TRUE(outcome_of(expertd_group_leave(rank.group)).ok()) << expertd_last_message();
      const expertd_group_options_t options = small_group("again", rank.rank, 2);
      rank.joined = outcome_of(expertd_group_join(rank.session.get(), &options, &rank.group));
    });
    ASSERT_TRUE(group.ok()) << group.failure();
  }
  group.run([](Rank& rank) { EXPECT_TRUE(barrier(rank.group).outcome.ok()); });
}

TEST_F(Group, LeavingGivesItsWindowBack) {
  const std::string used = "expertd_pool_bytes{gpu=\"host\",state=\"used\"}";
  RankGroup group(daemon_.attach_socket(), "windows", 2);
  ASSERT_TRUE(group.ok()) << group.failure();
  EXPECT_GT(daemon_.metric(used), 0);
  group.run([](Rank& rank) { EXPECT_TRUE(outcome_of(expertd_group_leave(rank.group)).ok()); });
  EXPECT_EQ(daemon_.metric(used), 0);
}

TEST_F(Group, ThatARankLeftEndsTheOthersOperationNamingIt) {
  RankGroup group(daemon_.attach_socket(), "left", 3);
  ASSERT_TRUE(group.ok()) << group.failure();
  group.run([](Rank& rank) {
    EXPECT_TRUE(barrier(rank.group).outcome.ok());
    if (rank.rank == 1) {
      EXPECT_TRUE(outcome_of(expertd_group_leave(rank.group)).ok());
      return;
    }
    const OpEnd end = barrier(rank.group, 5'000'000'000);
    EXPECT_EQ(end.outcome.status.reason, EXPERTD_REASON_PEER_LOST) << describe(end.outcome);
    EXPECT_EQ(end.result.rank, 1);
  });
}

TEST_F(Group, LeavingTwiceIsRefused) {
  RankGroup group(daemon_.attach_socket(), "once", 1);
  ASSERT_TRUE(group.ok()) << group.failure();
  EXPECT_TRUE(outcome_of(expertd_group_leave(group.rank(0).group)).ok());
}

TEST_F(Group, TheNumberOfGroupsIsLimitedAndSeveralWorkSideBySide) {
  const ClientSession session = attach("host:0");
  std::vector<expertd_group_t*> groups;
  Outcome last;
  for (int i = 0; i < 5 && last.ok(); ++i) {
    const std::string name = "many-" + std::to_string(i);
    const expertd_group_options_t options = small_group(name.c_str(), 0, 1);
    expertd_group_t* group = nullptr;
    last = outcome_of(expertd_group_join(session.get(), &options, &group));
    if (last.ok()) {
      groups.push_back(group);
    }
  }
  EXPECT_EQ(groups.size(), 4u);
  EXPECT_EQ(last.status.reason, EXPERTD_REASON_GROUP_LIMIT) << describe(last);
  EXPECT_NE(last.message.find("session.max_groups"), std::string::npos) << last.message;
  for (int round = 0; round < 10; ++round) {
    for (expertd_group_t* group : groups) {
      ASSERT_TRUE(barrier(group).outcome.ok()) << expertd_last_message();
    }
  }
}

TEST_F(Group, PlanSaysWhatAJoinTakes) {
  const std::string used = "expertd_pool_bytes{gpu=\"host\",state=\"used\"}";
  const ClientSession session = attach("host:0");
  const expertd_group_options_t options = small_group("planned", 0, 1);
  expertd_group_plan_t plan = EXPERTD_INIT(expertd_group_plan_t);
  ASSERT_TRUE(outcome_of(expertd_group_plan(session.get(), &options, &plan)).ok()) << expertd_last_message();
  EXPECT_EQ(plan.worst_rows, 16u);
  EXPECT_GT(plan.table_bytes, 0u);
  EXPECT_EQ(plan.handles, session.info().handles_max);
  EXPECT_EQ(plan.pinned_bytes, 0u);
  EXPECT_EQ(daemon_.metric(used), 0) << "a plan takes nothing";
  expertd_group_t* group = nullptr;
  ASSERT_TRUE(outcome_of(expertd_group_join(session.get(), &options, &group)).ok());
  EXPECT_EQ(daemon_.metric(used), static_cast<double>(plan.window_bytes + plan.handle_bytes));
}

TEST_F(Group, PlanSaysHowManyHandlesALargeGroupHas) {
  const std::string used = "expertd_pool_bytes{gpu=\"host\",state=\"used\"}";
  const ClientSession session = attach("host:0");
  expertd_group_options_t options = small_group("large", 0, 1);
  options.mode = EXPERTD_MODE_NORMAL;
  options.num_experts = 64;
  options.top_k = 32;
  options.max_tokens = 65536;
  expertd_group_plan_t plan = EXPERTD_INIT(expertd_group_plan_t);
  ASSERT_TRUE(outcome_of(expertd_group_plan(session.get(), &options, &plan)).ok()) << expertd_last_message();
  EXPECT_EQ(plan.window_bytes, 0u);
  EXPECT_GE(plan.handles, 1u);
  EXPECT_LT(plan.handles, session.info().handles_max);
  EXPECT_LE(plan.handle_bytes, 256u << 20);
  expertd_group_t* group = nullptr;
  ASSERT_TRUE(outcome_of(expertd_group_join(session.get(), &options, &group)).ok()) << expertd_last_message();
  EXPECT_EQ(daemon_.metric(used), static_cast<double>(plan.handle_bytes));
  for (uint64_t number = 0; number <= plan.handles; ++number) {
    expertd_dispatch_args_t args = EXPERTD_INIT(expertd_dispatch_args_t);
    args.dtype = EXPERTD_BF16;
    args.idx_type = EXPERTD_I64;
    expertd_handle_t handle{};
    expertd_event_t event{};
    ASSERT_TRUE(outcome_of(expertd_dispatch(group, &args, nullptr, &handle, &event)).ok()) << expertd_last_message();
    EXPECT_EQ(finish(event).outcome.status.reason, number < plan.handles ? 0 : EXPERTD_REASON_HANDLE_LIMIT) << number;
  }
}

TEST_F(Group, PlanRefusesWhatAJoinRefuses) {
  const ClientSession session = attach("host:0");
  expertd_group_options_t options = small_group("wrong", 0, 1);
  options.hidden = 100;
  expertd_group_plan_t plan = EXPERTD_INIT(expertd_group_plan_t);
  const Outcome outcome = outcome_of(expertd_group_plan(session.get(), &options, &plan));
  EXPECT_EQ(outcome.status.reason, EXPERTD_REASON_ARGUMENT_RANGE) << describe(outcome);
  EXPECT_NE(outcome.message.find("hidden"), std::string::npos) << outcome.message;
}

TEST_F(Group, LowLatencyOperationsNeedAGroupOfThatMode) {
  RankGroup group(daemon_.attach_socket(), "normal", 1,
                  [](expertd_group_options_t* options) { options->mode = EXPERTD_MODE_NORMAL; });
  ASSERT_TRUE(group.ok()) << group.failure();
  expertd_ll_dispatch_args_t args = EXPERTD_INIT(expertd_ll_dispatch_args_t);
  args.dtype = EXPERTD_BF16;
  args.idx_type = EXPERTD_I64;
  expertd_handle_t handle{};
  expertd_event_t event{};
  const Outcome outcome = outcome_of(expertd_ll_dispatch(group.rank(0).group, &args, nullptr, &handle, &event));
  EXPECT_EQ(outcome.status.reason, EXPERTD_REASON_MODE_MISMATCH) << describe(outcome);
}

TEST_F(Group, TheMaskOfAFailGroupCanOnlyBeAsked) {
  RankGroup group(daemon_.attach_socket(), "mask", 2);
  ASSERT_TRUE(group.ok()) << group.failure();
  uint64_t lost = 1;
  uint64_t excluded = 1;
  uint64_t epoch = 0;
  EXPECT_TRUE(outcome_of(expertd_group_mask(group.rank(0).group, 0, 0, &lost, &excluded, &epoch)).ok());
  EXPECT_EQ(lost, 0u);
  EXPECT_EQ(excluded, 0u);
  EXPECT_EQ(expertd_group_mask(group.rank(0).group, 2, 0, nullptr, nullptr, nullptr).reason, EXPERTD_REASON_BAD_STATE);
}

}  // namespace
}  // namespace expertd::support
