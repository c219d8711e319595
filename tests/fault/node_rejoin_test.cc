// SPDX-License-Identifier: Apache-2.0
// Ranks that come back to a group over several daemons with on_rank_loss = mask while the others go on: a client that
// was killed, a daemon that was, two at once, twice, half-way. Every row is checked under the mask of its operation,
// and no operation of those that go on may fail from the join on. Each test prints how long it took.
#include <gtest/gtest.h>

#include <cstdio>

#include "tests/fault/node_clients.h"

namespace expertd::support {
namespace {

using std::chrono::seconds;

constexpr double kRejoinMs = 2000;  // from the join to the first operation with all ranks

class NodeRejoin : public NodeClients {
 protected:
  explicit NodeRejoin(uint32_t nodes = 3) : NodeClients(nodes) {}

  uint32_t node_of(uint32_t rank) const { return rank / kRanks; }
  uint64_t whole() const { return (uint64_t{1} << clients_.size()) - 1; }
  std::vector<uint32_t> without(const std::vector<uint32_t>& gone) const {
    std::vector<uint32_t> left;
    for (const uint32_t rank : all()) {
      if (std::find(gone.begin(), gone.end(), rank) == gone.end()) {
        left.push_back(rank);
      }
    }
    return left;
  }

  uint64_t mask_without(const std::vector<uint32_t>& gone) const {
    uint64_t mask = whole();
    for (const uint32_t rank : gone) {
      mask &= ~(uint64_t{1} << rank);
    }
    return mask;
  }

  /// All ranks are in a group that masks.
  void begin() {
    std::vector<uint32_t> nodes(cluster_.nodes());
    for (uint32_t node = 0; node < nodes.size(); ++node) {
      nodes[node] = node;
    }
    ASSERT_NO_FATAL_FAILURE(attach(nodes));
    ASSERT_TRUE(join(all(), "rejoined", "mask"));
  }
  /// These go while all run, and the others have gone on without them.
  void lose(const std::vector<uint32_t>& gone, int daemon = -1) {
    const std::string command = "until 20 " + std::to_string(mask_without(gone));
    ASSERT_TRUE(tell(all(), command));
    if (daemon >= 0) {
      cluster_.node(static_cast<uint32_t>(daemon)).kill();
    }
    for (const uint32_t rank : gone) {
      client(rank).kill();
    }
    ASSERT_TRUE(expect_ok(without(gone), command));
  }
  /// These run until the ranks that come back have run `rounds` with them.
  void go_on(const std::vector<uint32_t>& ranks, uint32_t rounds = 50) {
    ASSERT_TRUE(tell(ranks, "until " + std::to_string(rounds) + " " + std::to_string(whole())));
  }
  /// A new client on the device of a rank that is gone, which is told to join.
  void come_back(uint32_t rank) {
    clients_[rank] = std::make_unique<FaultClient>();
    ASSERT_TRUE(client(rank).attach(cluster_.node(node_of(rank)).attach_socket(), rank % kRanks));
    client(rank).send("join rejoined " + std::to_string(rank) + " " + std::to_string(clients_.size()) + " mask");
  }
  /// These join and run with all others, every row right, and nothing fails, or no more than this since the others were
  /// told to go on. Milliseconds to the first round.
  double run_with_all(const std::vector<uint32_t>& ranks, uint64_t begin_ns, double failures = 0,
                      uint32_t rounds = 50) {
    EXPECT_TRUE(expect_ok(ranks, "join"));
    for (const uint32_t rank : ranks) {
      client(rank).send("until " + std::to_string(rounds) + " " + std::to_string(whole()));
    }
    EXPECT_TRUE(expect_ok(ranks, "begin"));
    const double first_ms = elapsed_ms(begin_ns);
    for (const uint32_t rank : all()) {
      const std::string end = client(rank).answer(seconds(30)).value_or("nothing");
      EXPECT_TRUE(is_ok(end)) << "rank " << rank << ": " << end;
      EXPECT_LE(number_in(end, "failed"), failures) << "rank " << rank << ": " << end;
    }
    return first_ms;
  }
  void print(const char* what, double ms) {
    std::printf("%s: %.0f ms from the join to the end of the first round with all ranks\n", what, ms);
    EXPECT_LT(ms, worst_bound_ms(kRejoinMs));
  }
};

TEST_F(NodeRejoin, AKilledClientComesBack) {
  ASSERT_NO_FATAL_FAILURE(begin());
  ASSERT_NO_FATAL_FAILURE(lose({3}));
  ASSERT_NO_FATAL_FAILURE(go_on(without({3})));
  const uint64_t begin_ns = monotonic_ns();
  ASSERT_NO_FATAL_FAILURE(come_back(3));
  print("a client that was killed", run_with_all({3}, begin_ns));
}

TEST_F(NodeRejoin, ItComesBackAsOftenAsItGoes) {
  ASSERT_NO_FATAL_FAILURE(begin());
  for (const uint32_t rank : {3U, 3U, 0U, 5U}) {
    ASSERT_NO_FATAL_FAILURE(lose({rank}));
    ASSERT_NO_FATAL_FAILURE(go_on(without({rank})));
    const uint64_t begin_ns = monotonic_ns();
    ASSERT_NO_FATAL_FAILURE(come_back(rank));
    print(("rank " + std::to_string(rank)).c_str(), run_with_all({rank}, begin_ns));
  }
}

TEST_F(NodeRejoin, TwoClientsOfTwoNodesComeBackAtOnce) {
  ASSERT_NO_FATAL_FAILURE(begin());
  ASSERT_NO_FATAL_FAILURE(lose({1, 4}));
  ASSERT_NO_FATAL_FAILURE(go_on(without({1, 4})));
  const uint64_t begin_ns = monotonic_ns();
  ASSERT_NO_FATAL_FAILURE(come_back(1));
  ASSERT_NO_FATAL_FAILURE(come_back(4));
  print("two clients at once", run_with_all({1, 4}, begin_ns));
}

TEST_F(NodeRejoin, AKilledDaemonComesBackWithItsRanks) {
  ASSERT_NO_FATAL_FAILURE(begin());
  ASSERT_NO_FATAL_FAILURE(lose({2, 3}, 1));
  ASSERT_NO_FATAL_FAILURE(go_on(without({2, 3})));
  ASSERT_TRUE(cluster_.node(1).start());
  const uint64_t begin_ns = monotonic_ns();
  ASSERT_NO_FATAL_FAILURE(come_back(2));
  ASSERT_NO_FATAL_FAILURE(come_back(3));
  print("a daemon that was killed", run_with_all({2, 3}, begin_ns));
}

TEST_F(NodeRejoin, TheHostOfTheRendezvousComesBackAndLearnsOfTheGroup) {
  ASSERT_NO_FATAL_FAILURE(begin());
  ASSERT_NO_FATAL_FAILURE(lose({0, 1}, 0));
  ASSERT_NO_FATAL_FAILURE(go_on(without({0, 1})));
  ASSERT_TRUE(cluster_.node(0).start());
  const uint64_t begin_ns = monotonic_ns();
  ASSERT_NO_FATAL_FAILURE(come_back(0));
  ASSERT_NO_FATAL_FAILURE(come_back(1));
  print("the daemon that hosts the rendezvous", run_with_all({0, 1}, begin_ns));
}

TEST_F(NodeRejoin, OneThatGoesHalfWayChangesNothingAndTheNextOneComesIn) {
  ASSERT_NO_FATAL_FAILURE(begin());
  ASSERT_NO_FATAL_FAILURE(lose({3}));
  ASSERT_NO_FATAL_FAILURE(go_on(without({3})));
  for (int time = 0; time < 5; ++time) {
    ASSERT_NO_FATAL_FAILURE(come_back(3));
    client(3).kill();
  }
  const uint64_t begin_ns = monotonic_ns();
  ASSERT_NO_FATAL_FAILURE(come_back(3));
  // One that was in already may have taken the operation with it that it was to take part in.
  print("after five that went half-way", run_with_all({3}, begin_ns, 10));
}

TEST_F(NodeRejoin, ARankThatLivesIsRefusedByName) {
  ASSERT_NO_FATAL_FAILURE(begin());
  ASSERT_NO_FATAL_FAILURE(lose({3}));
  ASSERT_NO_FATAL_FAILURE(go_on(without({3})));
  FaultClient other;
  ASSERT_TRUE(other.attach(cluster_.node(2).attach_socket(), kRanks));
  const std::string refused = other.ask("join rejoined 0 6 mask");
  EXPECT_EQ(refused.compare(0, 21, "failed DUPLICATE_RANK"), 0) << refused;
  EXPECT_NE(refused.find("node \"n1\""), std::string::npos) << refused;
  const uint64_t begin_ns = monotonic_ns();
  ASSERT_NO_FATAL_FAILURE(come_back(3));
  print("beside one that is refused", run_with_all({3}, begin_ns));
}

class HalvesRejoin : public NodeRejoin {
 protected:
  HalvesRejoin() : NodeRejoin(2) {}
};

TEST_F(HalvesRejoin, TheOtherDaemonComesBack) {
  ASSERT_NO_FATAL_FAILURE(begin());
  ASSERT_NO_FATAL_FAILURE(lose({2, 3}, 1));
  ASSERT_NO_FATAL_FAILURE(go_on(without({2, 3})));
  ASSERT_TRUE(cluster_.node(1).start());
  const uint64_t begin_ns = monotonic_ns();
  ASSERT_NO_FATAL_FAILURE(come_back(2));
  ASSERT_NO_FATAL_FAILURE(come_back(3));
  print("the second of two daemons", run_with_all({2, 3}, begin_ns));
}

/// All ranks on one node, which has its own part of the rendezvous: nobody has to agree with anybody.
class AloneRejoin : public NodeRejoin {
 protected:
  AloneRejoin() : NodeRejoin(1) {}
};

TEST_F(AloneRejoin, AKilledClientComesBack) {
  ASSERT_NO_FATAL_FAILURE(begin());
  for (const uint32_t rank : {1U, 0U}) {
    ASSERT_NO_FATAL_FAILURE(lose({rank}));
    ASSERT_NO_FATAL_FAILURE(go_on(without({rank})));
    const uint64_t begin_ns = monotonic_ns();
    ASSERT_NO_FATAL_FAILURE(come_back(rank));
    print("on one node", run_with_all({rank}, begin_ns));
  }
}

/// And without a fabric: the directory of the daemon is all there is.
TEST(HereRejoin, AKilledClientComesBack) {
  DaemonProcess daemon(3);
  ASSERT_TRUE(daemon.start());
  std::vector<std::unique_ptr<FaultClient>> clients(3);
  const auto attach = [&](uint32_t rank) {
    clients[rank] = std::make_unique<FaultClient>();
    ASSERT_TRUE(clients[rank]->attach(daemon.attach_socket(), rank));
    clients[rank]->send("join here " + std::to_string(rank) + " 3 mask");
  };
  const auto expect = [&](const std::vector<uint32_t>& ranks) {
    for (const uint32_t rank : ranks) {
      const std::string answer = clients[rank]->answer(seconds(30)).value_or("nothing");
      ASSERT_TRUE(is_ok(answer)) << "rank " << rank << ": " << answer;
    }
  };
  for (const uint32_t rank : {0U, 1U, 2U}) {
    ASSERT_NO_FATAL_FAILURE(attach(rank));
  }
  ASSERT_NO_FATAL_FAILURE(expect({0, 1, 2}));
  for (const uint32_t rank : {0U, 2U}) {
    clients[rank]->send("until 20 5");
  }
  clients[1]->send("masked 5");
  ASSERT_NO_FATAL_FAILURE(expect({0, 2, 1}));  // each says that it has begun
  clients[1]->kill();
  ASSERT_NO_FATAL_FAILURE(expect({0, 2}));
  for (const uint32_t rank : {0U, 2U}) {
    clients[rank]->send("until 50 7");
  }
  ASSERT_NO_FATAL_FAILURE(expect({0, 2}));
  const uint64_t begin_ns = monotonic_ns();
  ASSERT_NO_FATAL_FAILURE(attach(1));
  ASSERT_NO_FATAL_FAILURE(expect({1}));
  clients[1]->send("until 50 7");
  ASSERT_NO_FATAL_FAILURE(expect({1}));
  std::printf("without a fabric: %.0f ms from the join to the end of the first round with all ranks\n",
              elapsed_ms(begin_ns));
  for (const uint32_t rank : {0U, 1U, 2U}) {
    const std::string end = clients[rank]->answer(seconds(30)).value_or("nothing");
    EXPECT_TRUE(is_ok(end) && number_in(end, "failed") == 0) << "rank " << rank << ": " << end;
  }
}

}  // namespace
}  // namespace expertd::support
