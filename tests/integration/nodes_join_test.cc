// SPDX-License-Identifier: Apache-2.0
// Groups that form over two real daemons, live side by side, end and form again; and joins that are refused, by name.
#include <gtest/gtest.h>

#include <cstdio>
#include <thread>

#include "tests/integration/moe_case.h"
#include "tests/integration/pending_join.h"
#include "tests/support/daemon_cluster.h"

namespace expertd::support {
namespace {

using kernels::OpKind;
using std::chrono::seconds;

class NodesJoin : public ::testing::Test {
 protected:
  void SetUp() override { ASSERT_TRUE(cluster_.start()); }
  ClientSession attach(uint32_t node, uint32_t device) {
    return ClientSession(cluster_.node(node).attach_socket(), "host:" + std::to_string(device));
  }
  /// Joins again and again for a moment until the answer is `reason`: before the other rank has come this one waits.
  Outcome join_until(const ClientSession& session, expertd_group_options_t options, int32_t reason) {
    options.join_timeout_ns = 100'000'000;
    Outcome outcome;
    EXPECT_TRUE(wait_until(
        [&] {
          expertd_group_t* group = nullptr;
          outcome = outcome_of(expertd_group_join(session.get(), &options, &group));
          return outcome.status.reason == reason;
        },
        seconds(10)))
        << describe(outcome);
    std::printf("%s\n", describe(outcome).c_str());
    return outcome;
  }
  static void expect_words(const Outcome& outcome, const std::vector<std::string>& words) {
    for (const std::string& word : words) {
      EXPECT_NE(outcome.message.find(word), std::string::npos) << word << " is not in: " << outcome.message;
    }
  }

  DaemonCluster cluster_{2, 4};
};

/// A group of the case's shape that runs it some times.
std::string run_rounds(const std::vector<Seat>& seats, const std::string& name, OpKind kind, uint32_t rounds) {
  const RandomCase random_case = make_case(kind, {.ranks = static_cast<uint32_t>(seats.size()), .hidden = 256});
  RankGroup group(seats, name, [&](expertd_group_options_t* options) { configure(random_case, options); });
  if (!group.ok()) {
    return name + ": " + group.failure();
  }
  std::string found;
  for (uint32_t round = 0; round < rounds && found.empty(); ++round) {
    found = kind == OpKind::kLlDispatch ? run_low_latency(&group, random_case, Place::kWindow)
                                        : run_high_throughput(&group, random_case, Place::kRegistered);
  }
  return found.empty() ? found : name + ": " + found;
}

TEST_F(NodesJoin, GroupsOverBothNodesAndOfOneRunSideBySide) {
  struct Side {
    std::vector<Seat> seats;
    OpKind kind;
  };
  const std::string first = cluster_.node(0).attach_socket();
  const Side sides[] = {
      {cluster_.seats(2), OpKind::kDispatch},
      {cluster_.seats(1, 2, 2), OpKind::kLlDispatch},
      {cluster_.seats(2), OpKind::kLlDispatch},  // more sessions on the devices of the first
      {{{first, "host:2"}, {first, "host:3"}}, OpKind::kDispatch},
  };
  std::string found[std::size(sides)];
  const uint64_t begin = monotonic_ns();
  on_threads(std::size(sides), [&](uint32_t index) {
    found[index] = run_rounds(sides[index].seats, "side" + std::to_string(index), sides[index].kind, 10);
  });
  for (const std::string& one : found) {
    EXPECT_EQ(one, "");
  }
  std::printf("10 rounds of four groups at once: %.0f ms\n", elapsed_ms(begin));
}

TEST_F(NodesJoin, RanksThatLeaveJoinAgainUnderTheSameName) {
  constexpr uint32_t kTimes = 8;
  double worst_ms = 0;
  for (uint32_t time = 0; time < kTimes; ++time) {
    // Other seats each time: nobody holds on to where a rank was.
    const std::vector<Seat> seats = cluster_.seats(1 + time % 2, 2, time % 3);
    const uint64_t begin = monotonic_ns();
    RankGroup group(seats, "again");
    worst_ms = std::max(worst_ms, elapsed_ms(begin));
    ASSERT_TRUE(group.ok()) << "time " << time << ": " << group.failure();
    group.run([&](Rank& rank) {
      for (int round = 0; round < 5; ++round) {
        const OpEnd end = barrier(rank.group);
        ASSERT_TRUE(end.outcome.ok()) << "time " << time << ", round " << round << ": " << describe(end.outcome);
      }
    });
    if (time % 2 == 0) {
      // Else their sessions just end.
      group.run([](Rank& rank) {
        const Outcome left = outcome_of(expertd_group_leave(rank.group));
        EXPECT_TRUE(left.ok()) << describe(left);
      });
    }
  }
  std::printf("attaching and joining: at most %.1f ms\n", worst_ms);
}

/// A rank that is through with its operations may leave before the others have seen their ends.
TEST_F(NodesJoin, ARankThatLeavesTakesNothingOfWhatItFinishedAway) {
  for (uint32_t time = 0; time < 40; ++time) {
    RankGroup group(cluster_.seats(2), "leavers");
    ASSERT_TRUE(group.ok()) << "time " << time << ": " << group.failure();
    group.run([&](Rank& rank) {
      const OpEnd end = barrier(rank.group);
      EXPECT_TRUE(end.outcome.ok()) << "time " << time << ", rank " << rank.rank << ": " << describe(end.outcome);
      EXPECT_TRUE(rank.session.detach().ok());
    });
  }
}

TEST_F(NodesJoin, ARankThatAnotherNodeHasIsRefusedByItsName) {
  const ClientSession first = attach(0, 0);
  const ClientSession second = attach(1, 0);
  PendingJoin waiting(first, small_group("twice", 0, 2));
  const Outcome outcome = join_until(second, small_group("twice", 0, 2), EXPERTD_REASON_DUPLICATE_RANK);
  expect_words(outcome, {"twice", "rank 0", DaemonCluster::name(0)});
  PendingJoin completes(second, small_group("twice", 1, 2));
  EXPECT_TRUE(completes.outcome().ok()) << describe(completes.outcome());
  EXPECT_TRUE(waiting.outcome().ok()) << describe(waiting.outcome());
  // Now that it runs, too.
  const ClientSession third = attach(1, 1);
  expect_words(join_until(third, small_group("twice", 0, 2), EXPERTD_REASON_DUPLICATE_RANK),
               {"twice", "rank 0", DaemonCluster::name(0)});
}

TEST_F(NodesJoin, AnotherConfigurationIsRefusedByRankNodeFieldAndValues) {
  const ClientSession first = attach(0, 0);
  const ClientSession second = attach(1, 0);
  PendingJoin waiting(first, small_group("unlike", 0, 2));
  expertd_group_options_t other = small_group("unlike", 1, 2);
  other.hidden = 256;
  const Outcome outcome = join_until(second, other, EXPERTD_REASON_CONFIG_MISMATCH);
  expect_words(outcome, {"unlike", "rank 1", DaemonCluster::name(1), "hidden", "256", "128"});
  PendingJoin completes(second, small_group("unlike", 1, 2));
  EXPECT_TRUE(completes.outcome().ok()) << describe(completes.outcome());
  EXPECT_TRUE(waiting.outcome().ok()) << describe(waiting.outcome());
}

TEST_F(NodesJoin, AJoinThatTimesOutNamesTheRanksThatAreMissing) {
  const std::vector<Seat> seats = cluster_.seats(1);
  Outcome outcomes[2];
  const uint64_t begin = monotonic_ns();
  on_threads(2, [&](uint32_t index) {
    const ClientSession session(seats[index].socket, seats[index].device);
    expertd_group_options_t options = small_group("waiting", index * 2, 4);
    options.join_timeout_ns = 500'000'000;
    expertd_group_t* group = nullptr;
    outcomes[index] = outcome_of(expertd_group_join(session.get(), &options, &group));
  });
  std::printf("two joins of 500 ms: %.0f ms\n", elapsed_ms(begin));
  for (const Outcome& outcome : outcomes) {
    EXPECT_EQ(outcome.status.reason, EXPERTD_REASON_JOIN_TIMEOUT) << describe(outcome);
    // The later of the two may find that the earlier has gone already.
    expect_words(outcome, {"waiting", "1,", "3"});
  }
  EXPECT_GE(elapsed_ms(begin), 500);
  EXPECT_LT(elapsed_ms(begin), worst_bound_ms(2000));
}

TEST_F(NodesJoin, MaskOnLossIsTakenOverSeveralNodesAndOnOne) {
  const auto with_mask = [](expertd_group_options_t* options) { options->on_rank_loss = EXPERTD_RANK_LOSS_MASK; };
  for (const uint32_t nodes : {2U, 1U}) {
    RankGroup group(cluster_.seats(2, nodes), "masked", with_mask);
    ASSERT_TRUE(group.ok()) << group.failure();
    group.run([](Rank& rank) { EXPECT_TRUE(barrier(rank.group).outcome.ok()); });
  }
}

TEST_F(NodesJoin, WithoutRdmaAGroupIsRefusedOverSeveralNodesAndTakenOnOne) {
  const auto without = [](expertd_group_options_t* options) {
    options->communication.use_rdma = EXPERTD_USE_NO;
    options->communication.use_nvlink = EXPERTD_USE_NO;  // host devices have none to use
  };
  RankGroup over_two(cluster_.seats(1), "near", without);
  for (uint32_t index : {0U, 1U}) {
    const Outcome& joined = over_two.rank(index).joined;
    EXPECT_EQ(joined.status.reason, EXPERTD_REASON_UNSUPPORTED) << describe(joined);
    expect_words(joined, {"communication.use_rdma", "2 nodes"});
  }
  RankGroup on_one(cluster_.seats(2, 1), "near", without);
  ASSERT_TRUE(on_one.ok()) << on_one.failure();
  on_one.run([](Rank& rank) { EXPECT_TRUE(barrier(rank.group).outcome.ok()); });
}

TEST_F(NodesJoin, GroupsOfOneLaneAndOfAnyRatioWorkAndRanksAgreeOnThem) {
  const auto patterned = [](expertd_group_options_t* options) {
    options->communication.virtual_lanes = 1;
    options->communication.bandwidth_ratio = 64;
  };
  const RandomCase random_case = make_case(OpKind::kLlDispatch, {.ranks = 2, .hidden = 256});
  RankGroup group(cluster_.seats(1), "one lane", [&](expertd_group_options_t* options) {
    configure(random_case, options);
    patterned(options);
  });
  ASSERT_TRUE(group.ok()) << group.failure();
  EXPECT_EQ(run_low_latency(&group, random_case, Place::kWindow), "");
  const ClientSession first = attach(0, 2);
  const ClientSession second = attach(1, 2);
  expertd_group_options_t joins = small_group("ratios", 0, 2);
  patterned(&joins);
  PendingJoin waiting(first, joins);
  expertd_group_options_t other = small_group("ratios", 1, 2);
  patterned(&other);
  other.communication.bandwidth_ratio = 2;
  const Outcome outcome = join_until(second, other, EXPERTD_REASON_CONFIG_MISMATCH);
  expect_words(outcome, {"communication.bandwidth_ratio", "64", "2"});
  joins.rank = 1;
  PendingJoin completes(second, joins);
  EXPECT_TRUE(completes.outcome().ok()) << describe(completes.outcome());
  EXPECT_TRUE(waiting.outcome().ok()) << describe(waiting.outcome());
}

TEST_F(NodesJoin, TheBenchmarkVerifiesWhatItRunsOverBothNodes) {
  std::string devices;
  for (const Seat& seat : cluster_.seats(2)) {
    devices += (devices.empty() ? "" : ",") + seat.device + "@" + seat.socket;
  }
  const RunResult result = run_program("expertctl",
                                       {"bench", "--devices", devices, "--quick", "--hidden", "256", "--tokens", "64",
                                        "--iterations", "2", "--warmup", "0"},
                                       seconds(60));
  EXPECT_EQ(result.exit_code, 0) << result.error;
  EXPECT_NE(result.output.find("verified "), std::string::npos) << result.output;
}

}  // namespace
}  // namespace expertd::support
