// SPDX-License-Identifier: Apache-2.0
// Groups over several daemons with on_rank_loss = mask while a daemon is killed or stopped or told to end, or a client
// goes: the others go on under one mask for each operation, every row right. Each test prints what it measured.
#include <gtest/gtest.h>
#include <signal.h>

#include <cstdio>
#include <map>
#include <sstream>

#include "tests/fault/node_clients.h"

namespace expertd::support {
namespace {

using std::chrono::seconds;

constexpr double kMaskedMs = 700;  // without a good operation, from the loss of a daemon on
constexpr double kClientMs = 150;  // and of a client
constexpr const char* kRounds = "masked 600";

class NodeMask : public NodeClients {
 protected:
  explicit NodeMask(uint32_t nodes = 3) : NodeClients(nodes) {}

  /// All ranks begin rounds in a group that masks.
  void begin() {
    std::vector<uint32_t> nodes(cluster_.nodes());
    for (uint32_t node = 0; node < nodes.size(); ++node) {
      nodes[node] = node;
    }
    ASSERT_NO_FATAL_FAILURE(attach(nodes));
    ASSERT_TRUE(join(all(), "masked", "mask"));
    ASSERT_TRUE(tell(all(), kRounds));
  }

  /// The ranks are through with their rounds, the last of them under `mask`, and no operation had two masks. The
  /// longest time without a good operation.
  double expect_masked(const std::vector<uint32_t>& ranks, uint64_t mask) {
    double gap_ms = 0;
    std::map<uint64_t, uint64_t> mask_of;  // by operation
    for (const uint32_t rank : ranks) {
      const std::string end = client(rank).answer(seconds(30)).value_or("nothing");
      EXPECT_TRUE(is_ok(end)) << "rank " << rank << ": " << end;
      if (!is_ok(end)) {
        continue;
      }
      gap_ms = std::max(gap_ms, number_in(end, "gap"));
      EXPECT_LT(number_in(end, "failed"), 200) << "rank " << rank << ": " << end;
      std::istringstream spans(end.substr(std::min(end.find("masks=") + 6, end.size())));
      uint64_t last_mask = 0;
      for (std::string span; std::getline(spans, span, ',');) {
        uint64_t first = 0;
        uint64_t last = 0;
        unsigned long long given = 0;
        std::istringstream(span.replace(span.find('-'), 1, " ").replace(span.find(':'), 1, " ")) >> first >> last >>
            given;
        for (uint64_t op = first; op <= last; ++op) {
          EXPECT_EQ(mask_of.emplace(op, given).first->second, given) << "operation " << op << " of rank " << rank;
        }
        last_mask = given;
      }
      EXPECT_EQ(last_mask, mask) << "rank " << rank << ": " << end;
    }
    return gap_ms;
  }
  /// Ranks that have no group any more say so by failing.
  void expect_ended(const std::vector<uint32_t>& ranks) {
    for (const uint32_t rank : ranks) {
      const std::string end = client(rank).answer(seconds(30)).value_or("nothing");
      EXPECT_GT(number_in(end, "failed"), 100) << "rank " << rank << ": " << end;
      const std::string why = client(rank).ask("barrier 2000");
      EXPECT_EQ(why.compare(0, 16, "failed PEER_LOST"), 0) << "rank " << rank << ": " << why;
    }
  }
  static void print(const char* what, double gap_ms) {
    std::printf("%s: at most %.0f ms without a good operation\n", what, gap_ms);
  }
};

TEST_F(NodeMask, AKilledDaemonIsLeftOutByAllOthers) {
  ASSERT_NO_FATAL_FAILURE(begin());
  ASSERT_EQ(::kill(cluster_.node(1).pid(), SIGKILL), 0);
  const double gap_ms = expect_masked({0, 1, 4, 5}, 0b110011);
  print("SIGKILL of one of three daemons", gap_ms);
  EXPECT_LT(gap_ms, worst_bound_ms(kMaskedMs));
  // The next loss takes the host of the rendezvous, which the others need for joins alone.
  for (const uint32_t rank : {0U, 1U, 4U, 5U}) {
    client(rank).send(kRounds);
  }
  ASSERT_TRUE(expect_ok({0, 1, 4, 5}, "begin"));
  client(5).kill();
  print("and then of a client", expect_masked({0, 1, 4}, 0b010011));
}

TEST_F(NodeMask, AStoppedDaemonIsLeftOutAndEndsWhenItWakes) {
  ASSERT_NO_FATAL_FAILURE(begin());
  cluster_.node(1).pause();
  const double gap_ms = expect_masked({0, 1, 4, 5}, 0b110011);
  print("SIGSTOP of one of three daemons", gap_ms);
  EXPECT_LT(gap_ms, worst_bound_ms(kMaskedMs));
  for (const uint32_t rank : {0U, 1U, 4U, 5U}) {
    client(rank).send(kRounds);
  }
  ASSERT_TRUE(expect_ok({0, 1, 4, 5}, "begin"));
  cluster_.node(1).resume();  // what it sent and still sends belongs to an older view
  expect_ended({2, 3});
  (void)expect_masked({0, 1, 4, 5}, 0b110011);
}

TEST_F(NodeMask, AKilledClientIsLeftOutOnAllNodes) {
  ASSERT_NO_FATAL_FAILURE(begin());
  client(3).kill();
  const double gap_ms = expect_masked({0, 1, 2, 4, 5}, 0b110111);
  print("SIGKILL of a client", gap_ms);
  EXPECT_LT(gap_ms, worst_bound_ms(kClientMs));
}

TEST_F(NodeMask, TheHostOfTheRendezvousMayGo) {
  ASSERT_NO_FATAL_FAILURE(begin());
  ASSERT_EQ(::kill(cluster_.node(0).pid(), SIGKILL), 0);
  const double gap_ms = expect_masked({2, 3, 4, 5}, 0b111100);
  print("SIGKILL of the first of three daemons", gap_ms);
  EXPECT_LT(gap_ms, worst_bound_ms(kMaskedMs));
}

class HalvesMask : public NodeMask {
 protected:
  HalvesMask() : NodeMask(2) {}
};

TEST_F(HalvesMask, TheHalfWithTheFirstRankGoesOn) {
  ASSERT_NO_FATAL_FAILURE(begin());
  cluster_.node(1).pause();
  const double gap_ms = expect_masked({0, 1}, 0b0011);
  print("SIGSTOP of the second of two daemons", gap_ms);
  EXPECT_LT(gap_ms, worst_bound_ms(kMaskedMs));
  cluster_.node(1).resume();
  expect_ended({2, 3});
}

TEST_F(HalvesMask, TheOtherHalfEndsByName) {
  ASSERT_NO_FATAL_FAILURE(begin());
  ASSERT_EQ(::kill(cluster_.node(0).pid(), SIGKILL), 0);
  expect_ended({2, 3});
  EXPECT_NE(cluster_.node(1).log().find("do not have most of the ranks"), std::string::npos);
  ASSERT_TRUE(tell({2, 3}, "leave"));
}

TEST_F(HalvesMask, ADaemonThatIsToldToEndTakesItsRanksOutFirst) {
  ASSERT_NO_FATAL_FAILURE(begin());
  cluster_.node(0).terminate();
  EXPECT_EQ(cluster_.node(0).wait_exit(seconds(20)), 0);
  const double gap_ms = expect_masked({2, 3}, 0b1100);
  print("end of the first of two daemons", gap_ms);
}

}  // namespace
}  // namespace expertd::support
