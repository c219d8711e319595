// SPDX-License-Identifier: Apache-2.0
// What networks do to daemons of several nodes, each in a network namespace of its own (support/node_network.h), so
// that heartbeats, messages and joins all go over links that the test takes away: blackholes, links that go down,
// partitions, losses in one direction. Skipped aloud where there are no namespaces. Each test prints what it measured.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "tests/fault/node_clients.h"
#include "tests/support/node_network.h"

namespace expertd::support {
namespace {

using std::chrono::seconds;

constexpr double kSilentMs = 600;     // until silence is a loss and operations have ended
constexpr double kRecoveryMs = 2000;  // until rounds run again

const std::vector<uint32_t> kFirst = {0, 1};   // the ranks of the first node
const std::vector<uint32_t> kSecond = {2, 3};  // of the second
const std::vector<uint32_t> kThird = {4, 5};

std::vector<uint32_t> both(const std::vector<uint32_t>& some, const std::vector<uint32_t>& others) {
  std::vector<uint32_t> ranks = some;
  ranks.insert(ranks.end(), others.begin(), others.end());
  return ranks;
}

class Network : public NodeClients {
 protected:
  explicit Network(uint32_t nodes = 2) : NodeClients(nodes), network_(nodes) { cluster_.use_network(&network_); }
  ~Network() override { clients_.clear(); }

  void SetUp() override {
    if (!network_.problem().empty()) {
      GTEST_SKIP() << network_.problem()
                   << ". NOT RUN: faults of the network below UCX. Daemons that fall silent are tested by SIGSTOP "
                      "(NodeDeath), the channel of joins by a relay (BootstrapRelay)";
    }
    ASSERT_TRUE(cluster_.start());
    std::vector<uint32_t> nodes;
    for (uint32_t node = 0; node < cluster_.nodes(); ++node) {
      nodes.push_back(node);
    }
    ASSERT_NO_FATAL_FAILURE(attach(nodes));
  }

  /// What one kind of outage between the first two nodes comes to: operations end by name and in time on both sides,
  /// and both form a group again when it is over.
  void expect_outage_and_recovery(const char* what, int cycles, const std::function<bool(bool)>& out) {
    for (int cycle = 0; cycle < cycles; ++cycle) {
      ASSERT_TRUE(join(all(), "net"));
      ASSERT_TRUE(loop(all()));
      const size_t before[] = {losses(0), losses(1)};
      const uint64_t begin = monotonic_ns();
      ASSERT_TRUE(out(true)) << network_.problem();
      const double told_ms = elapsed_ms(begin);
      const double first_ms = expect_lost(kFirst, kSecond, begin);
      const double second_ms = expect_lost(kSecond, kFirst, begin);
      const double found_ms = std::max(detected_ms(0, before[0], begin), detected_ms(1, before[1], begin));
      EXPECT_LT(std::max(first_ms, second_ms), worst_bound_ms(kSilentMs) + told_ms);
      EXPECT_LT(found_ms, worst_bound_ms(kSilentMs) + told_ms);
      ASSERT_TRUE(tell(all(), "leave"));
      // The first node hosts the rendezvous, so its ranks go on by themselves at once.
      ASSERT_TRUE(join(kFirst, "left"));
      ASSERT_NO_FATAL_FAILURE(outlast(kFirst));
      ASSERT_TRUE(tell(kFirst, "leave"));
      const uint64_t healing = monotonic_ns();
      ASSERT_TRUE(out(false)) << network_.problem();
      ASSERT_TRUE(join(all(), "net"));
      const double joined_ms = elapsed_ms(healing);
      ASSERT_TRUE(tell(all(), "rounds 20"));
      std::printf(
          "%s (%.0f ms to do): operations ended after %.0f and %.0f ms, both nodes found lost after %.0f ms; heal to a "
          "group %.0f ms, to 20 rounds %.0f ms\n",
          what, told_ms, first_ms, second_ms, found_ms, joined_ms, elapsed_ms(healing));
      EXPECT_LT(elapsed_ms(healing), worst_bound_ms(kRecoveryMs));
      ASSERT_TRUE(tell(all(), "leave"));
    }
  }

  NodeNetwork network_;
};

TEST_F(Network, ABlackholeIsFoundBySilenceAndHeals) {
  expect_outage_and_recovery("blackhole", outage_s() > 0 ? 1 : 2,
                             [&](bool on) { return on ? network_.isolate(1) : network_.reconnect(1); });
}

TEST_F(Network, ALinkThatGoesDownIsFoundAndHeals) {
  expect_outage_and_recovery("link down", 1, [&](bool on) { return network_.set_link(1, !on); });
}

TEST_F(Network, TheHostsLinkThatGoesDownIsFoundAndHeals) {
  expect_outage_and_recovery("link of the host down", 1, [&](bool on) { return network_.set_link(0, !on); });
}

TEST_F(Network, ALossInOneDirectionIsFoundOnBothSidesAndHeals) {
  expect_outage_and_recovery("loss from the second node to the first", 1,
                             [&](bool on) { return on ? network_.lose(1, 0) : network_.lose_no_more(1, 0); });
}

/// Three nodes; the first hosts the rendezvous.
class Partition : public Network {
 protected:
  Partition() : Network(3) {}
};

TEST_F(Partition, TheNodesThatStillReachEachOtherFormAGroupAtOnce) {
  ASSERT_TRUE(join(all(), "whole"));
  ASSERT_TRUE(loop(all()));
  const uint64_t begin = monotonic_ns();
  ASSERT_TRUE(network_.isolate(2)) << network_.problem();
  const double ended_ms = expect_lost(both(kFirst, kSecond), kThird, begin);
  // Whom of the two the isolated one misses first is its own affair.
  const double alone_ms = expect_lost(kThird, both(kFirst, kSecond), begin);
  EXPECT_LT(std::max(ended_ms, alone_ms), worst_bound_ms(kSilentMs));
  ASSERT_TRUE(tell(all(), "leave"));
  const uint64_t left = monotonic_ns();
  ASSERT_TRUE(join(both(kFirst, kSecond), "whole"));
  ASSERT_TRUE(tell(both(kFirst, kSecond), "rounds 20"));
  const double formed_ms = elapsed_ms(left);
  EXPECT_LT(formed_ms, worst_bound_ms(kRecoveryMs));

  // The isolated one cannot join anything, and says so at the deadline; its return disturbs nobody.
  const std::vector<Seat> alone = {{cluster_.node(2).attach_socket(), "host:2"}};
  const uint64_t asked = monotonic_ns();
  RankGroup refused(alone, "alone", [](expertd_group_options_t* options) { options->join_timeout_ns = 300'000'000; });
  EXPECT_EQ(refused.rank(0).joined.status.reason, EXPERTD_REASON_RENDEZVOUS_UNAVAILABLE) << refused.failure();
  EXPECT_LT(elapsed_ms(asked), worst_bound_ms(1000));
  const uint64_t healing = monotonic_ns();
  ASSERT_TRUE(network_.reconnect(2)) << network_.problem();
  ASSERT_TRUE(join(kThird, "third"));
  ASSERT_TRUE(tell(kThird, "rounds 20"));
  const double back_ms = elapsed_ms(healing);
  EXPECT_LT(back_ms, worst_bound_ms(kRecoveryMs));
  ASSERT_TRUE(tell(both(kFirst, kSecond), "rounds 20"));
  ASSERT_TRUE(tell(all(), "leave"));
  ASSERT_TRUE(join(all(), "whole"));
  ASSERT_TRUE(tell(all(), "rounds 20"));
  std::printf(
      "one of three isolated: operations of the others ended after %.0f ms, its own after %.0f ms; the two formed a "
      "group "
      "and ran 20 rounds in %.0f ms; heal to rounds of the third %.0f ms, of all %.0f ms\n",
      ended_ms, alone_ms, formed_ms, back_ms, elapsed_ms(healing));
}

}  // namespace
}  // namespace expertd::support
