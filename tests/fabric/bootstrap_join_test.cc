// SPDX-License-Identifier: Apache-2.0
// Ranks of several nodes find each other through the embedded rendezvous.
#include "tests/fabric/bootstrap_fixture.h"

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

}  // namespace
}  // namespace expertd::fabric
