// SPDX-License-Identifier: Apache-2.0
// A daemon is killed while operations of either mode are under way: whoever is left hears of it by
// name and in time, no output is wrong, and the same sessions' memory serves the next group. Ranks are threads.
#include <gtest/gtest.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <thread>

#include "tests/integration/moe_case.h"
#include "tests/support/daemon_cluster.h"

namespace expertd::support {
namespace {

using kernels::OpKind;
using std::chrono::seconds;

constexpr double kEndedMs = 600;
constexpr int kCycles = 3;

class NodeDeathIn : public ::testing::TestWithParam<OpKind> {
 protected:
  void SetUp() override { ASSERT_TRUE(cluster_.start()); }

  static std::string run_once(RankGroup* group, const RandomCase& random_case) {
    return random_case.shape.kind == OpKind::kLlDispatch ? run_low_latency(group, random_case, Place::kWindow)
                                                         : run_high_throughput(group, random_case, Place::kRegistered);
  }
  /// Runs rounds, kills the second daemon in one of them, and gives the milliseconds until all ranks were through.
  double kill_in_a_round(RankGroup* group, const RandomCase& random_case);

  DaemonCluster cluster_{2, 2};
};

INSTANTIATE_TEST_SUITE_P(Mode, NodeDeathIn, ::testing::Values(OpKind::kDispatch, OpKind::kLlDispatch),
                         [](const auto& of) {
                           return of.param == OpKind::kDispatch ? "HighThroughput" : "LowLatency";
                         });

double NodeDeathIn::kill_in_a_round(RankGroup* group, const RandomCase& random_case) {
  std::atomic<uint32_t> rounds{0};
  std::atomic<bool> over{false};
  std::string found;
  std::thread runner([&] {
    while (found.empty()) {
      found = run_once(group, random_case);
      rounds.fetch_add(1);
    }
    over.store(true);
  });
  const bool runs = wait_until([&] { return rounds.load() >= 2 || over.load(); }, seconds(20));
  const uint64_t begin = monotonic_ns();
  EXPECT_EQ(::kill(cluster_.node(1).pid(), SIGKILL), 0);
  EXPECT_TRUE(wait_until([&] { return over.load(); }, seconds(20))) << "operations hang";
  const double ended_ms = elapsed_ms(begin);
  runner.join();
  EXPECT_TRUE(runs);
  const bool by_name = found.find("PEER_LOST") != std::string::npos || found.find("UNAVAILABLE") != std::string::npos;
  EXPECT_TRUE(by_name) << "round " << rounds.load() << ": " << found;
  return ended_ms;
}

TEST_P(NodeDeathIn, EndsTheOthersByNameAndNothingIsWrong) {
  const uint32_t tokens = GetParam() == OpKind::kDispatch ? 400 : 128;
  const RandomCase random_case = make_case(GetParam(), {.ranks = 4, .hidden = 512, .tokens = tokens});
  double worst_ms = 0;
  for (int cycle = 0; cycle < kCycles; ++cycle) {
    {
      RankGroup group(cluster_.seats(2), "killed",
                      [&](expertd_group_options_t* options) { configure(random_case, options); });
      ASSERT_TRUE(group.ok()) << group.failure();
      worst_ms = std::max(worst_ms, kill_in_a_round(&group, random_case));
      for (const uint32_t rank : {0U, 1U}) {
        const OpEnd end = barrier(group.rank(rank).group);
        EXPECT_EQ(end.outcome.status.reason, EXPERTD_REASON_PEER_LOST) << describe(end.outcome);
        EXPECT_GE(end.result.rank, 2) << describe(end.outcome);
      }
    }
    cluster_.node(1).kill();
    ASSERT_TRUE(cluster_.node(1).start());
  }
  std::printf("SIGKILL beside rounds to the end of operations: at most %.1f ms\n", worst_ms);
  EXPECT_LT(worst_ms, worst_bound_ms(kEndedMs));
  EXPECT_EQ(run_case(cluster_.seats(2), random_case, Place::kRegistered), "");
}

}  // namespace
}  // namespace expertd::support
