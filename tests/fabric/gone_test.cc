// SPDX-License-Identifier: Apache-2.0
// Ranks that end: every other node of the group is told once, also when the group closes right behind, and a node that
// is lost holds nobody up.
#include <gtest/gtest.h>

#include <algorithm>

#include "tests/fabric/fabric_pair.h"

namespace expertd::fabric_test {
namespace {

class FabricGone : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    world_.create([](uint32_t node) { return options_for(GetParam(), "node" + std::to_string(node)); });
    ASSERT_NO_FATAL_FAILURE(world_.connect());
    ASSERT_NO_FATAL_FAILURE(world_.wait_up());
    ASSERT_NO_FATAL_FAILURE(world_.open());
  }
  Bell& bell(uint32_t node) { return *world_.node(node).bell; }
  bool hears(uint32_t node, size_t count) {
    return bell(node).wait([&] { return bell(node).gone().size() >= count; });
  }
  uint64_t key() { return world_.link(0).key; }

  World world_{{2, 2, 1}};
};

INSTANTIATE_TEST_SUITE_P(Over, FabricGone, testing::Values("tcp", "posix"), [](const auto& of) { return of.param; });

TEST_P(FabricGone, IsToldOnceToEveryOtherNode) {
  world_.node(0).port->tell_gone(1, 7);
  world_.node(0).port->tell_gone(0, 9);
  world_.node(0).port->tell_gone(1, 8);
  world_.node(1).port->tell_gone(3, 2);
  for (const uint32_t node : {1U, 2U}) {
    ASSERT_TRUE(hears(node, node == 1 ? 2 : 3));
    const std::vector<Bell::Gone> gone = bell(node).gone();
    const auto count = [&](const Bell::Gone& wanted) { return std::count(gone.begin(), gone.end(), wanted); };
    EXPECT_EQ(count({key(), 1, 7}), 1);
    EXPECT_EQ(count({key(), 0, 9}), 1);
    EXPECT_EQ(count({key(), 3, 2}), node == 1 ? 0 : 1);
    EXPECT_EQ(gone.size(), node == 1 ? 2U : 3U);
  }
  ASSERT_TRUE(hears(0, 1));
  EXPECT_EQ(bell(0).gone(), (std::vector<Bell::Gone>{{key(), 3, 2}}));
}

TEST_P(FabricGone, IsToldWhenTheGroupClosesRightBehind) {
  world_.node(0).port->tell_gone(0, 1);
  world_.node(0).port->tell_gone(1, 1);
  world_.node(0).port.reset();
  for (const uint32_t node : {1U, 2U}) {
    EXPECT_TRUE(hears(node, 2));
  }
  EXPECT_TRUE(bell(0).wait([&] { return world_.snapshot(0).groups_closing == 0; }));
}

TEST_P(FabricGone, ALostNodeHoldsNobodyUp) {
  world_.node(2).port.reset();
  world_.node(2).fabric->stop();
  ASSERT_TRUE(bell(0).wait([&] { return !bell(0).lost().empty(); }));
  world_.node(0).port->tell_gone(0, 3);
  ASSERT_TRUE(hears(1, 1));
  EXPECT_TRUE(bell(2).gone().empty());
  world_.node(0).port.reset();
  EXPECT_TRUE(bell(0).wait([&] { return world_.snapshot(0).groups_closing == 0; }));
}

}  // namespace
}  // namespace expertd::fabric_test
