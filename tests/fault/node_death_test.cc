// SPDX-License-Identifier: Apache-2.0
// Groups over several daemons when one of those is killed or stops, when a client of one ends, and when the rendezvous
// goes: the others hear of it by name and in time, and join again. Clients are processes, daemons reach each other over
// tcp. Each test prints what it measured.
#include <gtest/gtest.h>
#include <signal.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "tests/fault/node_clients.h"

namespace expertd::support {
namespace {

using std::chrono::seconds;

constexpr double kKilledMs = 50;      // until a killed daemon is found lost
constexpr double kSilentMs = 600;     // until a stopped one is, and until operations have ended in either case
constexpr double kRecoveryMs = 2000;  // until rounds run again

class NodeDeath : public NodeClients {
 protected:
  explicit NodeDeath(uint32_t nodes = 2) : NodeClients(nodes) {}
};

TEST_F(NodeDeath, AKilledDaemonEndsTheOperationsOfTheOthersAndComesBack) {
  constexpr int kCycles = 3;
  ASSERT_NO_FATAL_FAILURE(attach({0, 1}));
  double detection_ms = 0;
  double end_ms = 0;
  for (int cycle = 0; cycle < kCycles; ++cycle) {
    ASSERT_TRUE(join(all(), "life"));
    ASSERT_TRUE(loop(all()));
    const size_t before = losses(0);
    const uint64_t begin = monotonic_ns();
    ASSERT_EQ(::kill(cluster_.node(1).pid(), SIGKILL), 0);
    detection_ms = std::max(detection_ms, detected_ms(0, before, begin));
    end_ms = std::max(end_ms, expect_lost({0, 1}, {2, 3}, begin));
    for (const uint32_t rank : {2U, 3U}) {
      const std::string end = client(rank).answer().value_or("nothing");
      EXPECT_EQ(end.compare(0, 18, "failed UNAVAILABLE"), 0) << end;
    }
    cluster_.node(1).kill();
    ASSERT_TRUE(cluster_.node(1).start());
    const uint64_t ready = monotonic_ns();
    ASSERT_TRUE(tell({2, 3}, "reattach 5000"));
    ASSERT_TRUE(tell({0, 1}, "leave"));
    ASSERT_TRUE(join(all(), "life"));
    ASSERT_TRUE(tell(all(), "rounds 20"));
    const double recovery_ms = elapsed_ms(ready);
    std::printf("ready to 20 rounds over both nodes: %.0f ms\n", recovery_ms);
    EXPECT_LT(recovery_ms, worst_bound_ms(kRecoveryMs));
    ASSERT_TRUE(tell(all(), "leave"));
  }
  std::printf("SIGKILL of a daemon: found lost after at most %.1f ms, operations ended after at most %.1f ms\n",
              detection_ms, end_ms);
  EXPECT_LT(detection_ms, worst_bound_ms(kKilledMs));
  EXPECT_LT(end_ms, worst_bound_ms(kSilentMs));
}

TEST_F(NodeDeath, AStoppedDaemonIsLostAndWritesNothingLater) {
  ASSERT_NO_FATAL_FAILURE(attach({0, 1}));
  ASSERT_TRUE(join(all(), "pause"));
  ASSERT_TRUE(loop(all()));
  const size_t before = losses(0);
  const size_t before_stopped = losses(1);
  const uint64_t begin = monotonic_ns();
  cluster_.node(1).pause();
  const double detection_ms = detected_ms(0, before, begin);
  const double end_ms = expect_lost({0, 1}, {2, 3}, begin);
  // The ranks that are left use the same memory in a group of their own while the other daemon wakes up, with messages
  // of the old group under way.
  ASSERT_TRUE(tell({0, 1}, "leave"));
  ASSERT_TRUE(join({0, 1}, "left"));
  ASSERT_NO_FATAL_FAILURE(outlast({0, 1}));
  ASSERT_TRUE(loop({0, 1}));
  const uint64_t awake = monotonic_ns();
  cluster_.node(1).resume();
  const double woken_ms = expect_lost({2, 3}, {0, 1}, awake);
  EXPECT_TRUE(wait_until([&] { return losses(1) > before_stopped; }, seconds(5)));
  std::printf(
      "SIGSTOP of a daemon: found lost after %.0f ms, operations ended after %.0f ms, its own %.0f ms after "
      "SIGCONT\n",
      detection_ms, end_ms, woken_ms);
  EXPECT_LT(detection_ms, worst_bound_ms(kSilentMs));
  EXPECT_LT(end_ms, worst_bound_ms(kSilentMs));
  EXPECT_LT(woken_ms, worst_bound_ms(kSilentMs));
  // Their loops end with each other: one of them may be a round ahead, which the other's leaving ends.
  client(0).send("state");
  client(1).send("state");
  for (const uint32_t rank : {0U, 1U}) {
    const std::string end = client(rank).answer(seconds(1)).value_or("");
    EXPECT_EQ(end.find("WRONG_RESULT"), std::string::npos) << end;
  }
}

TEST_F(NodeDeath, AClientThatIsKilledIsLostOnTheOtherNodeAtOnce) {
  constexpr int kCycles = 10;
  ASSERT_NO_FATAL_FAILURE(attach({0, 1}));
  double worst_ms = 0;
  double sum_ms = 0;
  for (int cycle = 0; cycle < kCycles; ++cycle) {
    ASSERT_TRUE(join(all(), "client"));
    ASSERT_TRUE(loop(all()));
    const uint64_t begin = monotonic_ns();
    client(3).kill();
    const double ms = expect_lost({0, 1, 2}, {3}, begin);
    worst_ms = std::max(worst_ms, ms);
    sum_ms += ms;
    ASSERT_TRUE(tell({0, 1, 2}, "leave"));
    clients_[3] = std::make_unique<FaultClient>();
    ASSERT_TRUE(client(3).attach(cluster_.node(1).attach_socket(), 1));
  }
  std::printf("kill of a client to PEER_LOST on both nodes: %.1f ms on average, at most %.1f ms\n", sum_ms / kCycles,
              worst_ms);
  EXPECT_LT(sum_ms / kCycles, bound_ms(kKilledMs));
  EXPECT_LT(worst_ms, worst_bound_ms(kKilledMs));
  EXPECT_EQ(losses(0) + losses(1), 0U) << "the daemons live";
  ASSERT_TRUE(join(all(), "client"));
  ASSERT_TRUE(tell(all(), "rounds 20"));
}

/// The parts of a node start when all of its ranks have submitted, so the other node misses the messages of all of them
/// and names nobody; which of them is late is known on its own node.
TEST_F(NodeDeath, AClientThatIsStoppedEndsOperationsAtTheirDeadlineOnBothNodes) {
  ASSERT_NO_FATAL_FAILURE(attach({0, 1}));
  ASSERT_TRUE(join(all(), "late"));
  ASSERT_TRUE(tell(all(), "rounds 5"));
  client(3).pause();
  const uint64_t begin = monotonic_ns();
  for (const uint32_t rank : {0U, 1U, 2U}) {
    client(rank).send("barrier 300");
  }
  for (const uint32_t rank : {0U, 1U, 2U}) {
    const std::string end = client(rank).answer().value_or("nothing");
    EXPECT_EQ(end.compare(0, 14, "failed TIMEOUT"), 0) << "rank " << rank << ": " << end;
    EXPECT_EQ(number_in(end, "rank"), rank == 2 ? 3 : -1) << end;
  }
  std::printf("a stopped client, operations of 300 ms: ended after %.0f ms\n", elapsed_ms(begin));
  EXPECT_GE(elapsed_ms(begin), 299);
  EXPECT_LT(elapsed_ms(begin), worst_bound_ms(500));
  client(3).resume();
  ASSERT_TRUE(tell(all(), "leave"));
  ASSERT_TRUE(join(all(), "late"));
  ASSERT_TRUE(tell(all(), "rounds 20"));
}

TEST_F(NodeDeath, ADaemonThatIsToldToEndSaysSoToTheOthers) {
  ASSERT_NO_FATAL_FAILURE(attach({0, 1}));
  ASSERT_TRUE(join(all(), "end"));
  ASSERT_TRUE(loop(all()));
  cluster_.node(1).terminate();
  EXPECT_EQ(cluster_.node(1).wait_exit(seconds(20)), 0);
  const uint64_t ended = monotonic_ns();
  const double end_ms = expect_lost({0, 1}, {2, 3}, ended);
  std::printf("exit of a daemon to PEER_LOST on the other: %.1f ms\n", end_ms);
  EXPECT_LT(end_ms, worst_bound_ms(kKilledMs));
  for (const uint32_t rank : {2U, 3U}) {
    const std::string end = client(rank).answer().value_or("nothing");
    EXPECT_EQ(end.compare(0, 7, "failed "), 0) << end;
  }
}

/// Three daemons, of which the first hosts the rendezvous and nothing else.
class RendezvousDeath : public NodeDeath {
 protected:
  RendezvousDeath() : NodeDeath(3) {}
};

TEST_F(RendezvousDeath, RunningGroupsGoOnAndJoinsSaySo) {
  ASSERT_NO_FATAL_FAILURE(attach({1, 2}));
  ASSERT_TRUE(join(all(), "running"));
  cluster_.node(0).kill();
  ASSERT_TRUE(tell(all(), "rounds 200"));

  const uint64_t begin = monotonic_ns();
  const std::vector<Seat> seats = {{cluster_.node(1).attach_socket(), "host:2"},
                                   {cluster_.node(2).attach_socket(), "host:2"}};
  RankGroup refused(seats, "new", [](expertd_group_options_t* options) { options->join_timeout_ns = 1'000'000'000; });
  std::printf("joins of 1 s without a rendezvous ended after %.0f ms: %s\n", elapsed_ms(begin),
              refused.failure().c_str());
  for (const uint32_t index : {0U, 1U}) {
    const Outcome& joined = refused.rank(index).joined;
    EXPECT_EQ(joined.status.reason, EXPERTD_REASON_RENDEZVOUS_UNAVAILABLE) << describe(joined);
    EXPECT_NE(joined.message.find(cluster_.address(0)), std::string::npos) << joined.message;
  }
  EXPECT_LT(elapsed_ms(begin), worst_bound_ms(2000));
  ASSERT_TRUE(tell(all(), "rounds 20"));

  ASSERT_TRUE(cluster_.node(0).start());
  const uint64_t ready = monotonic_ns();
  RankGroup again(seats, "new");
  EXPECT_TRUE(again.ok()) << again.failure();
  std::printf("ready to a new group: %.0f ms\n", elapsed_ms(ready));
  EXPECT_LT(elapsed_ms(ready), worst_bound_ms(kRecoveryMs));
  again.run([](Rank& rank) { EXPECT_TRUE(barrier(rank.group).outcome.ok()); });
  ASSERT_TRUE(tell(all(), "rounds 20"));
}

}  // namespace
}  // namespace expertd::support
