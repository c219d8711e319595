// SPDX-License-Identifier: Apache-2.0
// Wall clocks that are set while daemons and clients of several nodes run and joins wait: no deadline moves, nobody is
// found lost. What the code may read of the wall clock at all is checked by deploy/dev/limits.py.
#include <gtest/gtest.h>
#include <time.h>

#include <cstdio>
#include <filesystem>
#include <string>
#include <vector>

#include "tests/fault/node_clients.h"
#include "tests/integration/pending_join.h"
#include "tests/support/clock_jump.h"

namespace expertd::support {
namespace {

constexpr int64_t kDay = 24 * 3600;
constexpr uint64_t kJoinNs = 500'000'000;

std::string day_in(int64_t seconds_ahead) {
  const time_t then = ::time(nullptr) + seconds_ahead;
  tm parts{};
  ::gmtime_r(&then, &parts);
  char text[16];
  (void)std::strftime(text, sizeof(text), "%Y-%m-%d", &parts);
  return text;
}

/// Both daemons have the clock that is set; the first hosts the rendezvous.
class Clock : public NodeClients {
 protected:
  Clock() : NodeClients(2) {}

  void SetUp() override {
    if (!clock_.problem().empty()) {
      GTEST_SKIP() << clock_.problem() << ". NOT RUN: clocks that are set (the code is still checked by limits.py)";
    }
    cluster_.set_environment(clock_.environment());
    ASSERT_TRUE(cluster_.start());
    for (const uint32_t node : {0U, 1U}) {
      for (uint32_t device = 0; device < kRanks; ++device) {
        const ClientProgram program{{binary_directory() + "/expertd_fault_client"}, clock_.environment(), false};
        clients_.push_back(std::make_unique<FaultClient>(program));
        ASSERT_TRUE(clients_.back()->attach(cluster_.node(node).attach_socket(), device));
      }
    }
  }

  /// A join that nobody completes, with the clock set in the middle of it, ends when it would have anyway.
  void expect_timeout_in_time(int64_t jump) {
    const ClientSession session(cluster_.node(1).attach_socket(), "host:2");
    expertd_group_options_t options = small_group("waits", 0, 2);
    options.join_timeout_ns = kJoinNs;
    const uint64_t begin = monotonic_ns();
    PendingJoin waiting(session, options);
    clock_.set(jump);
    EXPECT_EQ(waiting.outcome().status.reason, EXPERTD_REASON_JOIN_TIMEOUT) << describe(waiting.outcome());
    std::printf("clock set by %+lld days: a join of 500 ms ended after %.0f ms\n", static_cast<long long>(jump / kDay),
                elapsed_ms(begin));
    EXPECT_GE(elapsed_ms(begin), 499);
    EXPECT_LT(elapsed_ms(begin), worst_bound_ms(1500));
  }

  ClockJump clock_;
};

TEST_F(Clock, SettingItMovesNoDeadlineAndLosesNobody) {
  ASSERT_TRUE(join(all(), "clock"));
  ASSERT_TRUE(tell(all(), "rounds 20"));
  for (const int64_t jump : {400 * kDay, -400 * kDay}) {
    // A rank that waits for the others meanwhile is placed with them.
    const ClientSession first(cluster_.node(0).attach_socket(), "host:2");
    const ClientSession second(cluster_.node(1).attach_socket(), "host:2");
    PendingJoin waiting(second, small_group("across", 1, 2));
    clock_.set(jump);
    ASSERT_TRUE(tell(all(), "rounds 20"));
    PendingJoin completes(first, small_group("across", 0, 2));
    EXPECT_TRUE(completes.outcome().ok()) << describe(completes.outcome());
    EXPECT_TRUE(waiting.outcome().ok()) << describe(waiting.outcome());
    ASSERT_TRUE(tell(all(), "leave"));
    ASSERT_TRUE(join(all(), "clock"));
    ASSERT_TRUE(tell(all(), "rounds 20"));
  }
  for (const int64_t jump : {400 * kDay, -400 * kDay}) {
    expect_timeout_in_time(jump);
  }
  EXPECT_EQ(losses(0) + losses(1), 0U);
  // The daemons did live through other days: the time of their log is the one thing that moves.
  clock_.set(400 * kDay);
  ASSERT_EQ(cluster_.node(1).stop(), 0);
  EXPECT_NE(cluster_.node(1).log().find(day_in(400 * kDay)), std::string::npos) << cluster_.node(1).log();
}

}  // namespace
}  // namespace expertd::support
