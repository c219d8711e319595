// SPDX-License-Identifier: Apache-2.0
// Daemons of several nodes with client processes on them, which are told what to do together. Tests only.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "tests/support/daemon_cluster.h"
#include "tests/support/fault_client.h"

namespace expertd::support {

class NodeClients : public ::testing::Test {
 protected:
  static constexpr uint32_t kRanks = 2;  // of each node

  explicit NodeClients(uint32_t nodes) : cluster_(nodes, kRanks + 1) {}

  void SetUp() override { ASSERT_TRUE(cluster_.start()); }

  /// A client per device of each of these nodes; `clients_` are in the order of ranks.
  void attach(const std::vector<uint32_t>& nodes) {
    for (const uint32_t node : nodes) {
      for (uint32_t device = 0; device < kRanks; ++device) {
        clients_.push_back(std::make_unique<FaultClient>());
        ASSERT_TRUE(clients_.back()->attach(cluster_.node(node).attach_socket(), device));
      }
    }
  }
  FaultClient& client(uint32_t rank) { return *clients_[rank]; }
  std::vector<uint32_t> all() const {
    std::vector<uint32_t> ranks;
    for (uint32_t rank = 0; rank < clients_.size(); ++rank) {
      ranks.push_back(rank);
    }
    return ranks;
  }

  /// Sends to these ranks at once and expects "ok" of each.
  bool tell(const std::vector<uint32_t>& ranks, const std::string& command) {
    for (const uint32_t rank : ranks) {
      client(rank).send(command);
    }
    return expect_ok(ranks, command);
  }
  bool expect_ok(const std::vector<uint32_t>& ranks, const std::string& command) {
    bool good = true;
    for (const uint32_t rank : ranks) {
      const std::string answer = client(rank).answer().value_or("nothing");
      EXPECT_TRUE(is_ok(answer)) << command << " of rank " << rank << ": " << answer;
      good = good && is_ok(answer);
    }
    return good;
  }
  /// These clients become ranks 0.. of a group.
  bool join(const std::vector<uint32_t>& members, const std::string& name, const std::string& on_loss = "fail") {
    for (uint32_t rank = 0; rank < members.size(); ++rank) {
      client(members[rank])
          .send("join " + name + " " + std::to_string(rank) + " " + std::to_string(members.size()) + " " + on_loss);
    }
    return expect_ok(members, "join");
  }
  /// What begins as it is told ("ok looping") and goes on until something happens.
  bool loop(const std::vector<uint32_t>& ranks) { return tell(ranks, "loop"); }

  /// The ends of loops of `ranks`, all PEER_LOST of one of `lost`; milliseconds since `begin_ns` to the last.
  double expect_lost(const std::vector<uint32_t>& ranks, const std::vector<uint32_t>& lost, uint64_t begin_ns) {
    double worst_ms = 0;
    for (const uint32_t rank : ranks) {
      const std::string end = client(rank).answer().value_or("nothing");
      worst_ms = std::max(worst_ms, elapsed_ms(begin_ns));
      EXPECT_EQ(end.compare(0, 16, "failed PEER_LOST"), 0) << "rank " << rank << ": " << end;
      const auto named = static_cast<int64_t>(number_in(end, "rank"));
      EXPECT_TRUE(std::find(lost.begin(), lost.end(), named) != lost.end()) << "rank " << rank << ": " << end;
    }
    return worst_ms;
  }

  static double outage_s() {
    const char* const text = std::getenv("EXPERTD_TEST_OUTAGE_S");
    return text == nullptr ? 0 : std::strtod(text, nullptr);
  }
  /// Ranks of a group run rounds for EXPERTD_TEST_OUTAGE_S seconds (0; `make soak` says 60), so that what is away stays
  /// away for so long.
  void outlast(const std::vector<uint32_t>& ranks) {
    const uint64_t begin = monotonic_ns();
    do {
      ASSERT_TRUE(tell(ranks, "rounds 10"));
    } while (elapsed_ms(begin) < outage_s() * 1000);
  }

  /// How often a daemon has said that a node is lost.
  size_t losses(uint32_t node) {
    const std::string log = cluster_.node(node).log();
    size_t count = 0;
    for (size_t at = log.find(kLostLine); at != std::string::npos; at = log.find(kLostLine, at + 1)) {
      ++count;
    }
    return count;
  }
  /// Milliseconds since `begin_ns` until the daemon says that another node is lost.
  double detected_ms(uint32_t node, size_t losses_before, uint64_t begin_ns) {
    EXPECT_TRUE(wait_until([&] { return losses(node) > losses_before; }, std::chrono::seconds(10)));
    return elapsed_ms(begin_ns);
  }

  static constexpr const char* kLostLine = "a node is lost";
  DaemonCluster cluster_;
  std::vector<std::unique_ptr<FaultClient>> clients_;
};

}  // namespace expertd::support
