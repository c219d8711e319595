// SPDX-License-Identifier: Apache-2.0
// Clients that stop, fork or never finish: their peers' operations end at the deadline, other sessions are not held up.
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>

#include "tests/support/daemon_process.h"
#include "tests/support/fault_client.h"

namespace expertd::support {
namespace {

using std::chrono::seconds;

constexpr double kDeadlineMs = 500;
// Windows, registered and quarantined memory together; there is no cap, so nothing counts as free.
constexpr const char* kPool = "expertd_pool_bytes{gpu=\"host\",";

class ClientStop : public ::testing::Test {
 protected:
  void SetUp() override { ASSERT_TRUE(daemon_.start()); }

  bool pair(FaultClient* first, FaultClient* second, const std::string& group) {
    const bool attached = first->attach(daemon_.attach_socket(), 0) && second->attach(daemon_.attach_socket(), 1);
    first->send("join " + group + " 0 2");
    second->send("join " + group + " 1 2");
    return attached && is_ok(first->answer().value_or("")) && is_ok(second->answer().value_or(""));
  }
  static bool both(FaultClient* first, FaultClient* second, const std::string& command) {
    first->send(command);
    second->send(command);
    const std::string one = first->answer().value_or("nothing");
    const std::string two = second->answer().value_or("nothing");
    EXPECT_TRUE(is_ok(one)) << command << ": " << one;
    EXPECT_TRUE(is_ok(two)) << command << ": " << two;
    return is_ok(one) && is_ok(two);
  }

  DaemonProcess daemon_{3, {"--engine-op-deadline=500ms", "--engine-first-op-deadline=500ms"}};
};

TEST_F(ClientStop, EndsThePeersOperationAtItsDeadlineNamingTheRank) {
  FaultClient first;
  FaultClient stopped;
  ASSERT_TRUE(pair(&first, &stopped, "stopped"));
  first.send("loop");
  stopped.send("loop");
  ASSERT_TRUE(is_ok(first.answer().value_or("")) && is_ok(stopped.answer().value_or("")));
  stopped.pause();
  const uint64_t begin = monotonic_ns();
  const std::string late = first.answer().value_or("nothing");
  const double ms = elapsed_ms(begin);
  std::printf("stop to TIMEOUT at the peer: %.1f ms (deadline %.0f ms)\n", ms, kDeadlineMs);
  EXPECT_EQ(late.compare(0, 21, "failed TIMEOUT rank=1"), 0) << late;
  EXPECT_GE(ms, kDeadlineMs - 50);
  EXPECT_LT(ms, worst_bound_ms(kDeadlineMs + 100));
  // The lease is alive, so the rank is late and not lost.
  EXPECT_EQ(daemon_.metric("expertd_sessions"), 2);
  stopped.resume();
  const std::string own = stopped.answer().value_or("nothing");
  EXPECT_EQ(own.compare(0, 14, "failed TIMEOUT"), 0) << own;
  EXPECT_TRUE(both(&first, &stopped, "sync"));
  EXPECT_TRUE(both(&first, &stopped, "rounds 20"));
}

TEST_F(ClientStop, DoesNotTouchAnotherGroupOnTheSameDevice) {
  FaultClient first;
  FaultClient stopped;
  ASSERT_TRUE(pair(&first, &stopped, "stopped"));
  FaultClient other;
  ASSERT_TRUE(other.attach(daemon_.attach_socket(), 1) && is_ok(other.ask("join alone 0 1")));
  ASSERT_TRUE(both(&first, &stopped, "rounds 5"));
  stopped.pause();
  first.send("barrier 400");
  const uint64_t begin = monotonic_ns();
  EXPECT_TRUE(is_ok(other.ask("rounds 500")));
  std::printf("500 rounds beside a stopped client: %.1f ms\n", elapsed_ms(begin));
  EXPECT_LT(elapsed_ms(begin), 5000);
  const std::string late = first.answer().value_or("nothing");
  EXPECT_EQ(late.compare(0, 21, "failed TIMEOUT rank=1"), 0) << late;
  stopped.resume();
}

TEST_F(ClientStop, ATenantThatNeverCompletesHoldsNobodyUp) {
  DaemonProcess daemon(2);  // deadlines of minutes: nothing of this may end by them
  ASSERT_TRUE(daemon.start());
  FaultClient tenant;
  FaultClient absent;
  ASSERT_TRUE(tenant.attach(daemon.attach_socket(), 0) && absent.attach(daemon.attach_socket(), 1));
  tenant.send("join never 0 2");
  absent.send("join never 1 2");
  ASSERT_TRUE(is_ok(tenant.answer().value_or("")) && is_ok(absent.answer().value_or("")));
  for (int i = 0; i < 60; ++i) {
    ASSERT_TRUE(is_ok(tenant.ask("submit")));
  }
  const double used = daemon.metric(kPool);
  double worst = 0;
  for (int round = 0; round < 5; ++round) {
    const uint64_t begin = monotonic_ns();
    auto neighbour = std::make_unique<FaultClient>();
    ASSERT_TRUE(neighbour->attach(daemon.attach_socket(), 0));
    for (const char* command : {"alloc 1048576", "window 1048576", "join mine 0 1", "rounds 100", "release"}) {
      ASSERT_TRUE(is_ok(neighbour->ask(command, seconds(5)))) << command;
    }
    if (round % 2 == 0) {
      ASSERT_TRUE(is_ok(neighbour->ask("leave")) && is_ok(neighbour->ask("detach")));
    }
    neighbour.reset();
    ASSERT_TRUE(wait_until([&] { return daemon.metric(kPool) <= used; }, seconds(5)));
    worst = std::max(worst, elapsed_ms(begin));
  }
  std::printf("a neighbour's whole life beside 60 operations that never end: at most %.1f ms\n", worst);
  EXPECT_LT(worst, worst_bound_ms(1000));
  EXPECT_TRUE(is_ok(tenant.ask("state"))) << "the tenant is still there";
}

TEST_F(ClientStop, AForkedChildIsRefusedAndItsParentGoesOn) {
  FaultClient client;
  ASSERT_TRUE(client.attach(daemon_.attach_socket(), 0) && is_ok(client.ask("join forking 0 1")));
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(client.ask("fork"), "ok child=FORKED");
    EXPECT_TRUE(is_ok(client.ask("rounds 10")));
  }
  EXPECT_EQ(daemon_.metric("expertd_sessions"), 1);
  EXPECT_TRUE(is_ok(client.ask("detach")));
  EXPECT_TRUE(wait_until([&] { return daemon_.metric("expertd_sessions") == 0; }, seconds(5)));
}

TEST_F(ClientStop, AStoppedClientCanBeKilledAndIsReclaimed) {
  auto client = std::make_unique<FaultClient>();
  ASSERT_TRUE(client->attach(daemon_.attach_socket(), 0) && is_ok(client->ask("alloc 65536")));
  client->pause();
  client.reset();
  EXPECT_TRUE(wait_until([&] { return daemon_.metric(kPool) == 0; }, seconds(5)));
}

}  // namespace
}  // namespace expertd::support
