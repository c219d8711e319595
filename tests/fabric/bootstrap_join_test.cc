// SPDX-License-Identifier: Apache-2.0
// Ranks of several nodes find each other through the embedded rendezvous.
#include <cstdio>

#include "tests/fabric/bootstrap_fixture.h"
#include "tests/support/temp_dir.h"

namespace expertd::fabric {
namespace {

TEST(BootstrapJoin, PlacesTwoNodesOfAGroupAndTellsBothThatItIsFormed) {
  TestNode first({.name = "a", .id = 11});
  TestNode second({.name = "b", .id = 22, .rendezvous = {first.address()}});
  std::future<JoinEnd> rank1 = second.join("moe", 1, config_of(2));
  std::future<JoinEnd> rank0 = first.join("moe", 0, config_of(2));
  const JoinEnd here = take(std::move(rank0));
  const JoinEnd there = take(std::move(rank1));
  ASSERT_NE(here.placed, nullptr) << here.error.status.message();
  ASSERT_NE(there.placed, nullptr) << there.error.status.message();
  EXPECT_NE(here.placed->key, 0U);
  EXPECT_EQ(here.placed->key, there.placed->key);
  EXPECT_EQ(here.placed->epoch, 1U);
  ASSERT_EQ(there.placed->nodes.size(), 2U);
  EXPECT_EQ(there.placed->nodes[0], first.identity());
  EXPECT_EQ(there.placed->nodes[1], second.identity());
  const engine::Placement placement = group::placement_of(*there.placed, second.identity().id);
  EXPECT_EQ(placement.own_node, 1U);
  EXPECT_EQ(placement.ranks(), 2U);
  EXPECT_TRUE(placement.is_local(1));

  std::future<session::ErrorDetail> formed = first.report(here.placed->key);
  EXPECT_TRUE(take(second.report(here.placed->key)).status.is_ok());
  EXPECT_TRUE(take(std::move(formed)).status.is_ok());
}

/// Every rank of every node joins and every node reports; the time from the first join to the last report, in ms.
double form(const std::vector<std::unique_ptr<TestNode>>& nodes, uint32_t ranks_per_node) {
  const uint64_t begin_ns = base::now_ns();
  const auto ranks = static_cast<uint32_t>(nodes.size()) * ranks_per_node;
  std::vector<std::future<JoinEnd>> joins;
  for (uint32_t rank = 0; rank < ranks; ++rank) {
    joins.push_back(nodes[rank / ranks_per_node]->join("moe", rank, config_of(ranks)));
  }
  std::vector<std::future<session::ErrorDetail>> reports;
  for (uint32_t rank = 0; rank < ranks; ++rank) {
    const JoinEnd end = take(std::move(joins[rank]));
    if (end.placed == nullptr || end.placed->nodes.size() != nodes.size()) {
      ADD_FAILURE() << "rank " << rank << ": " << end.error.status.message();
      return 0;
    }
    if (rank % ranks_per_node == 0) {
      EXPECT_FALSE(end.placed->nodes[0].lanes.empty());
      reports.push_back(nodes[rank / ranks_per_node]->report(end.placed->key));
    }
  }
  for (std::future<session::ErrorDetail>& report : reports) {
    EXPECT_TRUE(take(std::move(report)).status.is_ok());
  }
  return support::elapsed_ms(begin_ns);
}

TEST(BootstrapJoin, FormsAGroupOverSixtyFourNodesOfEightRanks) {
  std::vector<std::unique_ptr<TestNode>> nodes;
  for (uint64_t i = 0; i < group::kMaxNodes; ++i) {
    nodes.push_back(std::make_unique<TestNode>(TestNode::Settings{
        .name = "n" + std::to_string(i),
        .id = i + 1,
        .rendezvous = i == 0 ? std::vector<std::string>{} : std::vector<std::string>{nodes[0]->address()}}));
  }
  // The first time with finding the rendezvous, the second time without.
  const double first_ms = form(nodes, 8);
  const double second_ms = form(nodes, 8);
  std::printf("64 nodes, 512 ranks: formed in %.0f ms, again in %.0f ms\n", first_ms, second_ms);
  EXPECT_LT(second_ms, support::bound_ms(2000));
}

}  // namespace
}  // namespace expertd::fabric
