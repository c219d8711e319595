// SPDX-License-Identifier: Apache-2.0
// Inputs of the benchmark: which experts tokens go to, and how much of that crosses to other nodes.
#include <gtest/gtest.h>

#include <set>

#include "client/ctl/bench_routing.h"

namespace expertd::ctl {
namespace {

constexpr BenchShape kShape{8, 32, 128, 4, 50};

TEST(CtlBenchRouting, NodesAreNumberedByTheirLowestRank) {
  BenchOptions options;
  options.devices = {"host:0", "host:0", "host:1", "host:1"};
  EXPECT_EQ(options.node_of(), (std::vector<uint32_t>{0, 0, 0, 0}));
  options.sockets = {"b", "a", "b", ""};
  options.socket = "a";
  EXPECT_EQ(options.node_of(), (std::vector<uint32_t>{0, 1, 0, 1}));
}

TEST(CtlBenchRouting, CrossingsAreCountedPerNodeRankAndLane) {
  const BenchRouting routing(kShape, BenchInput(3, 0));
  const std::vector<uint32_t> node_of{0, 0, 1, 1, 2, 2, 3, 3};
  double nodes = 0, ranks = 0, lanes = 0;
  for (uint64_t source = 0; source < kShape.ranks; ++source) {
    for (uint64_t token = 0; token < kShape.tokens; ++token) {
      std::set<uint32_t> to_nodes, to_ranks;
      for (uint64_t lane = 0; lane < kShape.top_k; ++lane) {
        const int32_t rank = routing.rank(source, token, lane);
        if (rank >= 0 && static_cast<uint64_t>(rank) / 2 != source / 2) {
          to_nodes.insert(static_cast<uint32_t>(rank) / 2);
          to_ranks.insert(static_cast<uint32_t>(rank));
          ++lanes;
        }
      }
      nodes += static_cast<double>(to_nodes.size());
      ranks += static_cast<double>(to_ranks.size());
    }
  }
  const BenchCrossings found = routing.crossings(node_of);
  const double tokens = kShape.ranks * kShape.tokens;
  EXPECT_DOUBLE_EQ(found.nodes, nodes / tokens);
  EXPECT_DOUBLE_EQ(found.ranks, ranks / tokens);
  EXPECT_DOUBLE_EQ(found.lanes, lanes / tokens);
  EXPECT_LT(found.nodes, found.ranks);
  EXPECT_LT(found.ranks, found.lanes);
}

TEST(CtlBenchRouting, NothingCrossesOnOneNode) {
  const BenchRouting routing(kShape, BenchInput(3, 0));
  const BenchCrossings found = routing.crossings(std::vector<uint32_t>(kShape.ranks, 0));
  EXPECT_EQ(found.nodes, 0);
  EXPECT_EQ(found.ranks, 0);
  EXPECT_EQ(found.lanes, 0);
}

TEST(CtlBenchRouting, LimitedTokensKeepToTheirGroups) {
  const BenchRouting routing(kShape, BenchInput(3, 0, {8, 2}));
  std::set<int32_t> seen;
  for (uint64_t source = 0; source < kShape.ranks; ++source) {
    for (uint64_t token = 0; token < kShape.tokens; ++token) {
      std::set<int32_t> groups, experts;
      uint32_t lanes = 0;
      for (uint64_t lane = 0; lane < kShape.top_k; ++lane) {
        const int32_t expert = routing.expert(source, token, lane);
        if (expert >= 0) {
          groups.insert(expert / 4);
          experts.insert(expert);
          ++lanes;
        }
      }
      EXPECT_LE(groups.size(), 2U);
      EXPECT_EQ(experts.size(), lanes);  // no expert twice
      seen.insert(groups.begin(), groups.end());
    }
  }
  EXPECT_EQ(seen.size(), 8U);
}

TEST(CtlBenchRouting, AllGroupsAreNoLimit) {
  const BenchRouting plain(kShape, BenchInput(3, 0));
  const BenchRouting all(kShape, BenchInput(3, 0, {8, 8}));
  for (uint64_t token = 0; token < kShape.tokens; ++token) {
    for (uint64_t lane = 0; lane < kShape.top_k; ++lane) {
      EXPECT_EQ(plain.expert(1, token, lane), all.expert(1, token, lane));
    }
  }
}

}  // namespace
}  // namespace expertd::ctl
