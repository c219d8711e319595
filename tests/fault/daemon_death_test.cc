// SPDX-License-Identifier: Apache-2.0
// The daemon dies or stops: clients hear of it in time, never hang, and work again after its restart.
#include <gtest/gtest.h>

#include <algorithm>
#include <thread>
#include <vector>

#include "tests/support/daemon_process.h"
#include "tests/support/fault_client.h"
#include "tests/support/rank_threads.h"

namespace expertd::support {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr double kUnavailableMs = 200;
constexpr uint32_t kRanks = 3;

class DaemonDeath : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(daemon_.start());
    for (uint32_t rank = 0; rank < kRanks; ++rank) {
      ASSERT_TRUE(clients_[rank].attach(daemon_.attach_socket(), rank));
    }
    ASSERT_TRUE(all("join life ", " " + std::to_string(kRanks)));
    ASSERT_TRUE(all("rounds 5"));
  }

  /// Sends to every client, with its rank between the two texts when there is a second one.
  bool all(const std::string& command, const std::string& behind_rank = "") {
    for (uint32_t rank = 0; rank < kRanks; ++rank) {
      clients_[rank].send(behind_rank.empty() ? command : command + std::to_string(rank) + behind_rank);
    }
    bool good = true;
    for (FaultClient& client : clients_) {
      const std::string answer = client.answer().value_or("nothing");
      EXPECT_TRUE(is_ok(answer)) << command << ": " << answer;
      good = good && is_ok(answer);
    }
    return good;
  }

  DaemonProcess daemon_{kRanks};
  FaultClient clients_[kRanks];
};

TEST_F(DaemonDeath, EndsEveryWaitWithUnavailableInTime) {
  constexpr int kCycles = 5;
  double worst = 0;
  double sum = 0;
  for (int cycle = 0; cycle < kCycles; ++cycle) {
    // Two ranks wait for the third, which submits nothing.
    clients_[0].send("barrier");
    clients_[1].send("barrier");
    const uint64_t begin = monotonic_ns();
    daemon_.kill();
    for (FaultClient* client : {&clients_[0], &clients_[1]}) {
      const std::string end = client->answer().value_or("nothing");
      worst = std::max(worst, elapsed_ms(begin));
      EXPECT_EQ(end.compare(0, 18, "failed UNAVAILABLE"), 0) << end;
    }
    sum += elapsed_ms(begin);
    EXPECT_EQ(clients_[2].ask("barrier").compare(0, 18, "failed UNAVAILABLE"), 0);
    EXPECT_EQ(clients_[2].ask("state").compare(0, 18, "failed UNAVAILABLE"), 0);
    ASSERT_TRUE(daemon_.start());
    const uint64_t up = monotonic_ns();
    ASSERT_TRUE(all("reattach 5000"));
    ASSERT_TRUE(all("join life ", " " + std::to_string(kRanks)));
    ASSERT_TRUE(all("rounds 20"));
    std::printf("ready to 20 rounds after re-attaching: %.1f ms\n", elapsed_ms(up));
  }
  std::printf("kill of the daemon to UNAVAILABLE: %.2f ms on average, at most %.2f ms\n", sum / kCycles, worst);
  EXPECT_LT(sum / kCycles, bound_ms(kUnavailableMs));
  EXPECT_LT(worst, worst_bound_ms(kUnavailableMs));
}

TEST_F(DaemonDeath, UnderLoadNeverLeavesAClientHanging) {
  for (int cycle = 0; cycle < 5; ++cycle) {
    ASSERT_TRUE(all("loop"));
    std::this_thread::sleep_for(milliseconds(cycle));  // the phase at which it dies, not a synchronisation
    const uint64_t begin = monotonic_ns();
    daemon_.kill();
    for (FaultClient& client : clients_) {
      const std::string end = client.answer(seconds(5)).value_or("nothing");
      EXPECT_EQ(end.compare(0, 18, "failed UNAVAILABLE"), 0) << end;
    }
    EXPECT_LT(elapsed_ms(begin), worst_bound_ms(kUnavailableMs));
    ASSERT_TRUE(daemon_.start());
    ASSERT_TRUE(all("reattach 5000"));
    ASSERT_TRUE(all("join life ", " " + std::to_string(kRanks)));
    ASSERT_TRUE(all("rounds 5"));
  }
}

TEST_F(DaemonDeath, WithNobodyToReattachToIsUnavailableAgain) {
  daemon_.kill();
  const uint64_t begin = monotonic_ns();
  EXPECT_EQ(clients_[0].ask("reattach 300").compare(0, 18, "failed UNAVAILABLE"), 0);
  EXPECT_LT(elapsed_ms(begin), worst_bound_ms(1000));
  ASSERT_TRUE(daemon_.start());
  EXPECT_TRUE(is_ok(clients_[0].ask("reattach 5000")));
}

TEST_F(DaemonDeath, IsSeenAsANewGeneration) {
  FaultClient client;
  const std::string before = client.ask("attach " + daemon_.attach_socket() + " host:0");
  daemon_.kill();
  ASSERT_TRUE(daemon_.start());
  FaultClient later;
  const std::string after = later.ask("attach " + daemon_.attach_socket() + " host:0");
  EXPECT_TRUE(is_ok(before) && is_ok(after));
  EXPECT_NE(number_in(before, "generation"), number_in(after, "generation"));
}

TEST_F(DaemonDeath, DetachingFromADeadDaemonWorks) {
  daemon_.kill();
  const uint64_t begin = monotonic_ns();
  EXPECT_TRUE(all("detach"));
  EXPECT_LT(elapsed_ms(begin), worst_bound_ms(kUnavailableMs));
}

TEST_F(DaemonDeath, AStoppedDaemonLetsWaitsEndAtTheirOwnDeadline) {
  ASSERT_TRUE(is_ok(clients_[0].ask("submit")) && is_ok(clients_[1].ask("submit")));
  daemon_.pause();
  const uint64_t begin = monotonic_ns();
  const std::string late = clients_[0].ask("wait 300");
  std::printf("a wait of 300 ms beside a stopped daemon: %.1f ms\n", elapsed_ms(begin));
  EXPECT_EQ(late.compare(0, 14, "failed TIMEOUT"), 0) << late;
  EXPECT_GE(elapsed_ms(begin), 299);
  EXPECT_LT(elapsed_ms(begin), worst_bound_ms(500));
  EXPECT_TRUE(is_ok(clients_[2].ask("submit"))) << "submitting needs no daemon";
  daemon_.resume();
  EXPECT_TRUE(all("wait 5000"));
  EXPECT_TRUE(all("rounds 10"));
}

TEST_F(DaemonDeath, AnAttachToAStoppedDaemonEndsAtItsDeadline) {
  daemon_.pause();
  const std::string socket = daemon_.attach_socket();
  expertd_attach_options_t options = EXPERTD_INIT(expertd_attach_options_t);
  options.socket_path = socket.c_str();
  options.device = "host:0";
  options.timeout_ns = 300'000'000;
  expertd_session_t* session = nullptr;
  const uint64_t begin = monotonic_ns();
  const Outcome outcome = outcome_of(expertd_attach(&options, &session));
  EXPECT_FALSE(outcome.ok());
  EXPECT_TRUE(outcome.status.reason == EXPERTD_REASON_TIMEOUT || outcome.status.reason == EXPERTD_REASON_UNAVAILABLE)
      << describe(outcome);
  EXPECT_LT(elapsed_ms(begin), worst_bound_ms(600));
  daemon_.resume();
  EXPECT_TRUE(ClientSession(socket, "host:0").ok());
}

}  // namespace
}  // namespace expertd::support
