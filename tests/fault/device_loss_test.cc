// SPDX-License-Identifier: Apache-2.0
// A device loses its context while loops are stuck in its driver: every session hears why, without them, and the
// process ends for a restart. The devices are host devices that fail so (support/lossy_daemon.cc); on GPUs it is
// ProcessFaultUnderMps.
#include <gtest/gtest.h>
#include <signal.h>

#include <string>
#include <vector>

#include "tests/support/daemon_process.h"
#include "tests/support/fault_client.h"
#include "tests/support/lossy_daemon.h"
#include "tests/support/rank_threads.h"

namespace expertd::support {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr int kExitTryAgain = 75;
// From the loss as a thread of the daemon saw it to the process's own end; what is promised is a second.
constexpr double kEndMs = 200;
// From the fault on, a probe's 100 ms included.
constexpr double kToldMs = 300;

/// Two groups over both devices. In each one rank waits for the other, so both devices have a call in flight.
class DeviceLossTest : public ::testing::Test {
 protected:
  void SetUp() override {
    daemon_.use_program("expertd_lossy_daemon");
    ASSERT_TRUE(daemon_.start());
    for (uint32_t i = 0; i < 4; ++i) {
      ASSERT_TRUE(clients_[i].attach(daemon_.attach_socket(), i % 2));
    }
    ASSERT_TRUE(join() && all("rounds 5"));
  }

  bool all(const std::string& command) { return all_of({command, command, command, command}); }
  bool join() { return all_of({"join first 0 2", "join first 1 2", "join second 0 2", "join second 1 2"}); }
  bool all_of(const std::vector<std::string>& commands) {
    for (size_t i = 0; i < commands.size(); ++i) {
      clients_[i].send(commands[i]);
    }
    bool good = true;
    for (size_t i = 0; i < commands.size(); ++i) {
      const std::string answer = clients_[i].answer().value_or("nothing");
      EXPECT_TRUE(is_ok(answer)) << commands[i] << ": " << answer;
      good = good && is_ok(answer);
    }
    return good;
  }

  void begin_calls() {
    // One on each device; the other rank of its group issues nothing.
    for (const size_t i : {0, 3}) {
      ASSERT_TRUE(is_ok(clients_[i].ask("submit")));
      clients_[i].send("wait 60000");
    }
  }
  void ask(uint32_t faults) {
    sigval value{};
    value.sival_int = static_cast<int>(faults);
    ASSERT_EQ(::sigqueue(daemon_.pid(), SIGUSR1, value), 0);
  }
  static void expect_lost(const std::string& end, const std::string& who) {
    EXPECT_EQ(end.rfind("failed GPU_LOST ", 0), 0u) << who << ": " << end;
  }
  void expect_all_lost(uint64_t begin) {
    for (const size_t i : {0, 3}) {
      expect_lost(clients_[i].answer().value_or("nothing"), "the call in flight of client " + std::to_string(i));
    }
    const double told_ms = elapsed_ms(begin);
    EXPECT_LT(told_ms, worst_bound_ms(kToldMs));
    for (FaultClient& client : clients_) {
      expect_lost(client.ask("state"), "state");
      expect_lost(client.ask("barrier 1000"), "a later call");
    }
    std::printf("calls in flight told after %.1f ms\n", told_ms);
  }
  void expect_end(uint64_t begin) {
    EXPECT_EQ(daemon_.wait_exit(seconds(10)), kExitTryAgain);
    const double gone_ms = elapsed_ms(begin);
    const std::string log = daemon_.log();
    const size_t line = log.find("GPU context lost; the process ends for a restart");
    ASSERT_NE(line, std::string::npos) << log;
    const double own_ms = number_in(log.substr(line), "since_seen_ms");
    EXPECT_GE(own_ms, 0);
    EXPECT_LT(own_ms, bound_ms(kEndMs));
    std::printf("seen to the process's own end %.2f ms; the process gone after %.1f ms\n", own_ms, gone_ms);
  }
  void come_back() {
    ASSERT_TRUE(daemon_.start());
    ASSERT_TRUE(all("reattach 5000") && join() && all("rounds 5"));
  }

  DaemonProcess daemon_{2};
  FaultClient clients_[4];
};

TEST_F(DeviceLossTest, ACallOfAStuckLoopEndsWithTheLossThatAnotherLoopSaw) {
  begin_calls();
  const uint64_t begin = monotonic_ns();
  ask(kLoop0Stuck | kLoop1SeesLoss);
  expect_all_lost(begin);
  expect_end(begin);
  come_back();
}

TEST_F(DeviceLossTest, CallsEndWithTheLossWhenEveryLoopIsStuckAndAProbeSawIt) {
  begin_calls();
  const uint64_t begin = monotonic_ns();
  ask(kLoop0Stuck | kLoop1Stuck | kProbe0SeesLoss);
  expect_all_lost(begin);
  expect_end(begin);
  come_back();
}

TEST_F(DeviceLossTest, ADrainThatWaitsForAStuckLoopDoesNotKeepTheProcess) {
  begin_calls();
  ask(kLoop0Stuck | kLoop1Stuck);
  daemon_.terminate();
  ASSERT_TRUE(wait_until([this] { return daemon_.metric("expertd_state{state=\"draining\"}") == 1; }, seconds(10)));
  const uint64_t begin = monotonic_ns();
  ask(kProbe0SeesLoss);
  expect_all_lost(begin);
  expect_end(begin);
}

TEST_F(DeviceLossTest, AStuckLoopAloneEndsNothing) {
  ask(kLoop0Stuck);
  // The other device's watch, loop and listener go on; nobody saw a loss.
  FaultClient other;
  ASSERT_TRUE(other.attach(daemon_.attach_socket(), 1));
  ASSERT_TRUE(is_ok(other.ask("join alone 0 1")) && is_ok(other.ask("rounds 100")));
  EXPECT_TRUE(daemon_.running());
  EXPECT_TRUE(is_ok(clients_[0].ask("state")));
}

TEST_F(DeviceLossTest, UnderLoadEveryCallEndsWithTheLoss) {
  for (int cycle = 0; cycle < 5; ++cycle) {
    ASSERT_TRUE(all("loop"));
    const uint64_t begin = monotonic_ns();
    ask(cycle % 2 == 0 ? kLoop0Stuck | kLoop1SeesLoss : kLoop0Stuck | kLoop1Stuck | kProbe0SeesLoss);
    for (FaultClient& client : clients_) {
      expect_lost(client.answer().value_or("nothing"), "a call under load");
    }
    expect_end(begin);
    come_back();
    if (HasFatalFailure()) {
      return;
    }
  }
}

}  // namespace
}  // namespace expertd::support
