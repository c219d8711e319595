// SPDX-License-Identifier: Apache-2.0
// Clients that die: what they had comes back, their peers hear of it at once, nobody else notices.
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <thread>

#include "tests/support/daemon_process.h"
#include "tests/support/fault_client.h"
#include "tests/support/random_case.h"

namespace expertd::support {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr double kReclaimMs = 100;  // after the end of file
// Windows, registered and quarantined memory together; there is no cap, so nothing counts as free.
constexpr const char* kPool = "expertd_pool_bytes{gpu=\"host\",";

/// What a daemon holds; equal before and after means that nothing stayed.
struct Ledger {
  explicit Ledger(const DaemonProcess& daemon)
      : descriptors(daemon.open_descriptors()),
        sessions(daemon.metric("expertd_sessions")),
        bytes(daemon.metric(kPool)) {}
  bool covers(const Ledger& now) const {
    return now.descriptors <= descriptors && now.sessions <= sessions && now.bytes <= bytes;
  }
  std::string text() const {
    return std::to_string(descriptors) + " descriptors, " + std::to_string(sessions) + " sessions, " +
           std::to_string(bytes) + " bytes";
  }

  size_t descriptors;
  double sessions;
  double bytes;
};

class ClientDeath : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(daemon_.start());
    // What is made once for the first session stays.
    FaultClient first;
    ASSERT_TRUE(is_ok(first.ask("cycles " + daemon_.attach_socket() + " host:0 2")));
  }

  bool returns_to(const Ledger& before) {
    return wait_until([&] { return before.covers(Ledger(daemon_)); }, seconds(5));
  }
  bool member(FaultClient* client, const std::string& group, uint32_t rank, uint32_t ranks, uint32_t device,
              const char* loss = "") {
    return client->attach(daemon_.attach_socket(), device) && is_ok(client->ask(join_line(group, rank, ranks, loss)));
  }
  static std::string join_line(const std::string& group, uint32_t rank, uint32_t ranks, const char* loss = "") {
    return "join " + group + " " + std::to_string(rank) + " " + std::to_string(ranks) + " " + loss;
  }
  /// Attaches and joins all at once: a join waits for the others.
  bool members(std::vector<FaultClient*> clients, const std::string& group, uint32_t first_device,
               const char* loss = "") {
    bool good = true;
    for (uint32_t i = 0; i < clients.size(); ++i) {
      good = good && clients[i]->attach(daemon_.attach_socket(), first_device + i);
      clients[i]->send(join_line(group, i, static_cast<uint32_t>(clients.size()), loss));
    }
    for (FaultClient* client : clients) {
      good = is_ok(client->answer().value_or("")) && good;
    }
    return good;
  }
  static bool start_loops(const std::vector<FaultClient*>& clients) {
    for (FaultClient* client : clients) {
      client->send("loop");
    }
    return std::all_of(clients.begin(), clients.end(),
                       [](FaultClient* client) { return is_ok(client->answer().value_or("")); });
  }

  /// What two loops of one group came to. One of them may be a round ahead: the other does that round too.
  static std::vector<std::string> stop_loops(FaultClient* first, FaultClient* second) {
    FaultClient* clients[2] = {first, second};
    std::vector<std::string> ends(2);
    first->send("state");
    second->send("state");
    ends[0] = first->answer(milliseconds(300)).value_or("");
    ends[1] = second->answer(milliseconds(300)).value_or("");
    for (const size_t ahead : {size_t{0}, size_t{1}}) {
      if (ends[ahead].empty()) {
        clients[1 - ahead]->send("round");
        ends[ahead] = clients[ahead]->answer().value_or("nothing");
      }
    }
    return ends;
  }

  DaemonProcess daemon_{6, {"--engine-op-deadline=5s", "--engine-first-op-deadline=5s"}};
};

class IdleDeath : public ClientDeath, public ::testing::WithParamInterface<uint64_t> {};

TEST_P(IdleDeath, GivesEverythingBackInTime) {
  const Ledger before(daemon_);
  double worst = 0;
  double end_of_file = 0;
  for (int cycle = 0; cycle < 5; ++cycle) {
    FaultClient client;
    ASSERT_TRUE(client.attach(daemon_.attach_socket(), 0));
    ASSERT_TRUE(is_ok(client.ask("alloc " + std::to_string(GetParam()))));
    ASSERT_TRUE(is_ok(client.ask("window 1048576")));
    ASSERT_FALSE(before.covers(Ledger(daemon_)));
    const uint64_t begin = monotonic_ns();
    client.signal_kill();
    ASSERT_TRUE(client.wait_end_of_file(seconds(5)));
    end_of_file = std::max(end_of_file, elapsed_ms(begin));
    ASSERT_TRUE(returns_to(before)) << Ledger(daemon_).text() << " instead of " << before.text();
    worst = std::max(worst, elapsed_ms(begin));
  }
  const double count = daemon_.metric("expertd_lease_reap_duration_seconds_count");
  const double reap_ms = 1e3 * daemon_.metric("expertd_lease_reap_duration_seconds_sum") / std::max(count, 1.0);
  std::printf(
      "%.0f MiB: kill to end of file at most %.1f ms, to reclaimed at most %.1f ms; end of file to reclaimed %.3f ms "
      "on "
      "average\n",
      static_cast<double>(GetParam()) / (1 << 20), end_of_file, worst, reap_ms);
  EXPECT_LT(reap_ms, bound_ms(kReclaimMs));
  // Before the end of file the kernel takes the client's memory apart.
  EXPECT_LT(worst, worst_bound_ms(kReclaimMs + 160));
}

INSTANTIATE_TEST_SUITE_P(Bytes, IdleDeath, ::testing::Values(uint64_t{1} << 16, uint64_t{1} << 28));

TEST_F(ClientDeath, MidOperationEndsThePeersAtOnceAndNobodyElsesEver) {
  constexpr int kCycles = 50;
  FaultClient bystanders[2];
  ASSERT_TRUE(members({&bystanders[0], &bystanders[1]}, "bystanders", 3));
  FaultClient survivor;
  ASSERT_TRUE(survivor.attach(daemon_.attach_socket(), 0));
  ASSERT_TRUE(start_loops({&bystanders[0], &bystanders[1]}));
  ASSERT_TRUE(is_ok(survivor.ask("join warm 0 1")) && is_ok(survivor.ask("leave")));
  const Ledger before(daemon_);
  Random random(5);
  double worst_ms = 0;
  double sum_ms = 0;
  double end_of_file_ms = 0;
  for (int cycle = 0; cycle < kCycles; ++cycle) {
    FaultClient victim;
    ASSERT_TRUE(victim.attach(daemon_.attach_socket(), 1));
    survivor.send(join_line("struck", 0, 2));
    victim.send(join_line("struck", 1, 2));
    ASSERT_TRUE(is_ok(survivor.answer().value_or("")) && is_ok(victim.answer().value_or(""))) << cycle;
    ASSERT_TRUE(start_loops({&survivor, &victim})) << cycle;
    // Not a synchronisation: the phase of the operation at which death comes.
    std::this_thread::sleep_for(std::chrono::microseconds(random.below(3000)));
    const uint64_t begin = monotonic_ns();
    victim.signal_kill();
    const std::string end = survivor.answer().value_or("nothing");
    const double ms = elapsed_ms(begin);
    ASSERT_TRUE(victim.wait_end_of_file(seconds(5)));
    end_of_file_ms = std::max(end_of_file_ms, elapsed_ms(begin));
    ASSERT_EQ(end.compare(0, 23, "failed PEER_LOST rank=1"), 0) << "cycle " << cycle << ": " << end;
    worst_ms = std::max(worst_ms, ms);
    sum_ms += ms;
    ASSERT_TRUE(is_ok(survivor.ask("leave"))) << cycle;
  }
  std::printf(
      "kill to PEER_LOST at the peer: %.2f ms on average, %.2f ms at most; to the end of file at most %.2f ms\n",
      sum_ms / kCycles, worst_ms, end_of_file_ms);
  EXPECT_LT(sum_ms / kCycles, bound_ms(kReclaimMs));
  EXPECT_LT(worst_ms, worst_bound_ms(kReclaimMs));
  EXPECT_TRUE(returns_to(before)) << Ledger(daemon_).text() << " instead of " << before.text();
  for (const std::string& end : stop_loops(&bystanders[0], &bystanders[1])) {
    EXPECT_TRUE(is_ok(end) && number_in(end, "rounds") > 0) << end;
    EXPECT_EQ(number_in(end, "degraded"), 0) << end;
    std::printf("a bystander: %s\n", end.c_str());
  }
}

TEST_F(ClientDeath, WithAMaskTheSurvivorsGoOnDegradedAndRight) {
  FaultClient clients[3];
  ASSERT_TRUE(members({&clients[0], &clients[1], &clients[2]}, "masked", 0, "mask"));
  ASSERT_TRUE(start_loops({&clients[0], &clients[1], &clients[2]}));
  clients[2].signal_kill();
  ASSERT_TRUE(wait_until([&] { return daemon_.metric("expertd_sessions") == 2; }, seconds(5)));
  // The operation that was running ends with PEER_LOST; one that was not launched runs without the lost rank.
  for (FaultClient* client : {&clients[0], &clients[1]}) {
    client->send("sync");
  }
  for (FaultClient* client : {&clients[0], &clients[1]}) {
    const std::string looped = client->answer().value_or("nothing");
    std::printf("a survivor's loop: %s\n", looped.c_str());
    EXPECT_EQ(looped.find("WRONG_RESULT"), std::string::npos) << looped;
  }
  for (FaultClient* client : {&clients[0], &clients[1]}) {
    ASSERT_TRUE(is_ok(client->answer().value_or("")));
  }
  for (FaultClient* client : {&clients[0], &clients[1]}) {
    client->send("rounds 50");
  }
  for (FaultClient* client : {&clients[0], &clients[1]}) {
    const std::string end = client->answer().value_or("nothing");
    EXPECT_EQ(number_in(end, "rounds"), 50) << end;
    EXPECT_EQ(number_in(end, "degraded"), 50) << end;
  }
}

TEST_F(ClientDeath, WhileItWaitsForItsGroupFreesItsRank) {
  {
    FaultClient waiting;
    ASSERT_TRUE(waiting.attach(daemon_.attach_socket(), 0));
    waiting.send(join_line("deserted", 0, 2));
    ASSERT_TRUE(wait_until([&] { return daemon_.metric("expertd_sessions") == 1; }, seconds(5)));
  }
  ASSERT_TRUE(wait_until([&] { return daemon_.metric("expertd_sessions") == 0; }, seconds(5)));
  FaultClient pair[2];
  EXPECT_TRUE(members({&pair[0], &pair[1]}, "deserted", 0));
}

TEST_F(ClientDeath, ARankThatDiedCanBeReplacedByJoiningAnew) {
  FaultClient first;
  auto second = std::make_unique<FaultClient>();
  ASSERT_TRUE(members({&first, second.get()}, "replaced", 0));
  second = std::make_unique<FaultClient>();
  ASSERT_TRUE(second->attach(daemon_.attach_socket(), 1));
  const std::string lost = first.ask("barrier 5000");
  EXPECT_EQ(lost.compare(0, 23, "failed PEER_LOST rank=1"), 0) << lost;
  ASSERT_TRUE(is_ok(first.ask("leave")));
  first.send(join_line("replaced", 0, 2));
  second->send(join_line("replaced", 1, 2));
  ASSERT_TRUE(is_ok(first.answer().value_or("")) && is_ok(second->answer().value_or("")));
  first.send("rounds 20");
  EXPECT_TRUE(is_ok(second->ask("rounds 20")));
  EXPECT_TRUE(is_ok(first.answer().value_or("")));
}

TEST_F(ClientDeath, DetachingWithOperationsInFlightReturnsAndTellsThePeer) {
  const Ledger before(daemon_);
  {
    FaultClient clients[2];
    ASSERT_TRUE(members({&clients[0], &clients[1]}, "detached", 0));
    for (int i = 0; i < 8; ++i) {
      ASSERT_TRUE(is_ok(clients[0].ask("submit")));
    }
    const uint64_t begin = monotonic_ns();
    EXPECT_TRUE(is_ok(clients[0].ask("detach")));
    std::printf("detach with 8 operations in flight: %.2f ms\n", elapsed_ms(begin));
    EXPECT_LT(elapsed_ms(begin), worst_bound_ms(1100));
    const std::string lost = clients[1].ask("barrier 5000");
    EXPECT_EQ(lost.compare(0, 23, "failed PEER_LOST rank=0"), 0) << lost;
  }
  EXPECT_TRUE(returns_to(before)) << Ledger(daemon_).text() << " instead of " << before.text();
}

TEST_F(ClientDeath, TwoHundredAttachmentsLeaveNothing) {
  FaultClient client;
  ASSERT_TRUE(is_ok(client.ask("cycles " + daemon_.attach_socket() + " host:0 50")));
  const Ledger before(daemon_);
  const size_t mappings = daemon_.mappings();
  const uint64_t begin = monotonic_ns();
  ASSERT_TRUE(is_ok(client.ask("cycles " + daemon_.attach_socket() + " host:0 200")));
  std::printf("200 attachments in %.0f ms; mappings %zu -> %zu\n", elapsed_ms(begin), mappings, daemon_.mappings());
  EXPECT_TRUE(returns_to(before)) << Ledger(daemon_).text() << " instead of " << before.text();
  // Heaps of threads may come and go; a leak would be one mapping per attachment.
  EXPECT_LE(daemon_.mappings(), mappings + 20);
}

}  // namespace
}  // namespace expertd::support
