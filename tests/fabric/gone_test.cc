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
  /// Every two nodes have answered each other. UCX leaks where it still connects to a node that has ended.
  void TearDown() override {
    for (const uint32_t node : {0U, 1U, 2U}) {
      if (world_.node(node).port != nullptr) {
        EXPECT_TRUE(bell(node).wait([&] { return has_answers(world_.snapshot(node)); })) << "node " << node;
      }
    }
  }
  static bool has_answers(const fabric::FabricSnapshot& snapshot) {
    return std::all_of(snapshot.peers.begin(), snapshot.peers.end(), [](const fabric::PeerSnapshot& peer) {
      return peer.state == fabric::PeerState::kLost || peer.rtt_ns != 0;
    });
  }

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

TEST_P(FabricGone, ARankThatTakesNothingHoldsNoBufferOnceItIsForgotten) {
  constexpr uint64_t kBytes = 64 * 1024;  // by rendezvous
  const engine::MessageHeader to_gone{.kind = engine::MessageKind::kRows, .op = 1, .node = 1, .targets = 0b01};
  for (uint32_t i = 0; i < world_.link(0).receive_buffers + world_.link(0).send_buffers; ++i) {
    ASSERT_TRUE(send(world_.node(0), 0, to_gone, kBytes));
  }
  engine::MessageHeader to_other = to_gone;
  to_other.targets = 0b10;
  ASSERT_TRUE(send(world_.node(0), 1, to_other, kBytes));
  engine::Arrival arrival;
  EXPECT_FALSE(receive(world_.node(1), 3, &arrival, std::chrono::milliseconds(100)));
  world_.node(1).port->forget(2);
  ASSERT_TRUE(receive(world_.node(1), 3, &arrival));
  EXPECT_EQ(wrong_bytes(arrival), 0U);
  world_.node(1).port->release(3, arrival);
  for (uint32_t i = 0; i < 3 * world_.link(0).receive_buffers; ++i) {
    ASSERT_TRUE(send(world_.node(0), 0, to_gone, kBytes)) << "those to come hold none either";
  }
}

TEST_P(FabricGone, SaysWhatNodesAgreeOn) {
  engine::ViewMessage message;
  message.kind = engine::ViewKind::kPromise;
  message.epoch = 7;
  message.ballot = 65;
  message.accepted = 64;
  const auto ranks = [](uint32_t low, uint32_t high) { return base::RankSet::one(low) | base::RankSet::one(high); };
  message.value = {{7, 11, ranks(1, 64), ranks(2, 511)}, 63};
  message.report = {10, 1, ranks(1, 200), ranks(0, 130), ranks(2, 300)};
  world_.node(0).port->tell_view(1, message);
  ASSERT_TRUE(bell(1).wait([&] { return !bell(1).said().empty(); }));
  const Bell::Said said = bell(1).said()[0];
  EXPECT_EQ(said.group_key, key());
  EXPECT_EQ(said.node, 0U);
  EXPECT_EQ(said.message.kind, message.kind);
  EXPECT_EQ(said.message.ballot, 65U);
  EXPECT_EQ(said.message.accepted, 64U);
  EXPECT_EQ(said.message.value.view, message.value.view);
  EXPECT_EQ(said.message.value.made, 63U);
  EXPECT_EQ(said.message.report.last, 10U);
  EXPECT_EQ(said.message.report.lost_nodes, 1U);
  EXPECT_EQ(said.message.report.gone, ranks(1, 200));
  EXPECT_EQ(said.message.report.exclude, ranks(0, 130));
  EXPECT_EQ(said.message.report.readmit, ranks(2, 300));
  EXPECT_TRUE(bell(2).said().empty());
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
