// SPDX-License-Identifier: Apache-2.0
// More messages than there are buffers: they wait where they are, and each arrives once, whole, at everybody it is for.
// And groups that close while messages are under way.
#include <gtest/gtest.h>

#include <atomic>
#include <set>
#include <thread>
#include <tuple>

#include "tests/fabric/fabric_pair.h"

namespace expertd::fabric_test {
namespace {

using engine::FabricLane;
using engine::MessageHeader;
using engine::MessageKind;

class FabricPressure : public testing::TestWithParam<std::string> {
 protected:
  void start(World& world, const std::function<void(fabric::GroupLink*)>& change = {}) {
    world.create([](uint32_t node) { return options_for(GetParam(), "node" + std::to_string(node)); });
    ASSERT_NO_FATAL_FAILURE(world.connect());
    ASSERT_NO_FATAL_FAILURE(world.wait_up());
    ASSERT_NO_FATAL_FAILURE(world.open(change));
  }
};

INSTANTIATE_TEST_SUITE_P(Over, FabricPressure, testing::Values("tcp", "posix"),
                         [](const auto& of) { return of.param; });

uint64_t size_of(uint32_t sequence, uint64_t most) {
  constexpr uint64_t kSizes[] = {0, 16, 5000, 8192, 20000, 70000, 131072};
  return std::min(kSizes[sequence % std::size(kSizes)], most);
}

TEST_P(FabricPressure, MessagesBeyondAllBuffersWaitAndNoneIsLost) {
  World world({1, 1});
  ASSERT_NO_FATAL_FAILURE(start(world, [](fabric::GroupLink* link) { link->message_bytes = 131072; }));
  constexpr uint32_t kMessages = 300;
  std::atomic<uint32_t> sent{0};
  std::thread sender([&] {
    for (uint32_t i = 0; i < kMessages; ++i) {
      const MessageHeader header{.kind = MessageKind::kRows,
                                 .lane = static_cast<FabricLane>(i % 2),
                                 .op = i / 8,
                                 .node = 1,
                                 .targets = 1,
                                 .sequence = i};
      if (!send(world.node(0), 0, header, size_of(i, 131072))) {
        return;
      }
      sent.fetch_add(1);
    }
  });
  // The receiver takes nothing until the sender can go no further, and then everything.
  EXPECT_TRUE(world.node(1).bell->wait([&] {
    const fabric::FabricSnapshot snapshot = world.snapshot(1);
    return snapshot.peers[0].lanes[0].deferred + snapshot.peers[0].lanes[1].deferred > 0;
  }));
  EXPECT_LT(sent.load(), kMessages);
  std::set<uint32_t> seen;
  for (uint32_t i = 0; i < kMessages; ++i) {
    engine::Arrival arrival;
    if (!receive(world.node(1), 1, &arrival)) {
      ADD_FAILURE() << "only " << i << " messages came";
      break;
    }
    EXPECT_TRUE(seen.insert(arrival.header.sequence).second) << "message " << arrival.header.sequence << " came twice";
    EXPECT_EQ(arrival.bytes, size_of(arrival.header.sequence, 131072));
    EXPECT_EQ(wrong_bytes(arrival), 0U);
    world.node(1).port->release(1, arrival);
  }
  sender.join();
  EXPECT_EQ(seen.size(), kMessages);
  engine::Arrival none;
  EXPECT_FALSE(world.node(1).port->receive(1, &none));
}

TEST_P(FabricPressure, ABufferOfSeveralRanksComesBackWithTheLastOne) {
  World world({1, 3});
  ASSERT_NO_FATAL_FAILURE(start(world, [](fabric::GroupLink* link) {
    link->receive_buffers = 1;
    link->eager_messages = 0;
  }));
  const MessageHeader first{.kind = MessageKind::kRows, .node = 1, .targets = 0b101, .sequence = 1};
  const MessageHeader second{.kind = MessageKind::kRows, .node = 1, .targets = 0b010, .sequence = 2};
  ASSERT_TRUE(send(world.node(0), 0, first, 50'000));
  engine::Arrival at_first;
  engine::Arrival at_third;
  ASSERT_TRUE(receive(world.node(1), 1, &at_first));
  ASSERT_TRUE(receive(world.node(1), 3, &at_third));
  EXPECT_EQ(at_first.data, at_third.data) << "one copy for both";
  ASSERT_TRUE(send(world.node(0), 0, second, 50'000));
  ASSERT_TRUE(world.node(1).bell->wait([&] { return world.snapshot(1).peers[0].lanes[1].deferred == 1; }));
  world.node(1).port->release(1, at_first);
  (void)world.snapshot(1);  // the fabric thread has turned since
  engine::Arrival at_second;
  EXPECT_FALSE(receive(world.node(1), 2, &at_second, std::chrono::milliseconds(50))) << "the third rank still reads it";
  EXPECT_EQ(wrong_bytes(at_third), 0U);
  world.node(1).port->release(3, at_third);
  ASSERT_TRUE(receive(world.node(1), 2, &at_second));
  EXPECT_EQ(at_second.header.sequence, 2U);
  EXPECT_EQ(wrong_bytes(at_second), 0U);
  world.node(1).port->release(2, at_second);
}

TEST_P(FabricPressure, EveryRankOfThreeNodesExchangesWithEveryOtherNode) {
  World world({2, 1, 2});
  ASSERT_NO_FATAL_FAILURE(start(world, [](fabric::GroupLink* link) { link->message_bytes = 65536; }));
  constexpr uint32_t kEach = 20;
  const std::vector<uint32_t> ranks = {2, 1, 2};
  const engine::Placement placement = placement_of(0, ranks);
  std::atomic<uint32_t> wrong{0};
  std::vector<std::thread> loops;
  for (uint32_t rank = 0; rank < placement.ranks(); ++rank) {
    loops.emplace_back([&, rank] {
      const uint32_t own = placement.node_of[rank];
      Node& node = world.node(own);
      uint32_t expected = 0;
      for (uint32_t other = 0; other < 3; ++other) {
        expected += other == own ? 0 : kEach * ranks[other];
      }
      uint32_t received = 0;
      uint32_t next = 0;
      const bool done = node.bell->wait([&] {
        // As a loop does: sends what it can, takes what there is, waits for neither.
        while (next < 3 * kEach) {
          const uint32_t to = next / kEach;
          const FabricLane lane = static_cast<FabricLane>(next % 2);
          if (to == own) {
            ++next;
            continue;
          }
          const engine::SendBuffer buffer = node.port->take(rank, lane);
          if (buffer.data == nullptr) {
            break;
          }
          const MessageHeader header{.kind = MessageKind::kSums,
                                     .lane = lane,
                                     .op = 1,
                                     .source_rank = rank,
                                     .node = to,
                                     .targets = (uint64_t{1} << ranks[to]) - 1,
                                     .sequence = next};
          const uint64_t bytes = size_of(next, 65536);
          fill(header, buffer.data, bytes);
          node.port->send(rank, buffer, header, bytes);
          ++next;
        }
        engine::Arrival arrival;
        while (node.port->receive(rank, &arrival)) {
          wrong.fetch_add(wrong_bytes(arrival) == 0 ? 0 : 1);
          node.port->release(rank, arrival);
          ++received;
        }
        return received == expected && next == 3 * kEach;
      });
      wrong.fetch_add(done ? 0 : 1);
    });
  }
  for (std::thread& loop : loops) {
    loop.join();
  }
  EXPECT_EQ(wrong.load(), 0U);
}

TEST_P(FabricPressure, AGroupThatClosesUnderLoadGivesItsMemoryBack) {
  World world({1, 1});
  ASSERT_NO_FATAL_FAILURE(start(world));
  for (uint32_t round = 0; round < 5; ++round) {
    for (const uint32_t from : {0U, 1U}) {
      for (const FabricLane lane : {FabricLane::kLatency, FabricLane::kThroughput}) {
        engine::SendBuffer buffer = world.node(from).port->take(from, lane);
        while (buffer.data != nullptr) {
          world.node(from).port->send(
              from, buffer, {.kind = MessageKind::kRows, .lane = lane, .op = 1, .node = 1 - from, .targets = 1},
              262144);
          buffer = world.node(from).port->take(from, lane);
        }
      }
    }
    world.node(round % 2).port.reset();
    world.node(1 - round % 2).port.reset();
    for (const uint32_t node : {0U, 1U}) {
      EXPECT_TRUE(world.node(node).bell->wait([&] {
        const fabric::FabricSnapshot snapshot = world.snapshot(node);
        return snapshot.groups == 0 && snapshot.groups_closing == 0 && snapshot.memory_bytes == 0;
      })) << "node "
          << node << " keeps memory of the group";
      EXPECT_TRUE(world.node(node).bell->lost().empty());
    }
    ASSERT_NO_FATAL_FAILURE(world.open([&](fabric::GroupLink* link) { link->epoch = 2 + round; }));
  }
  const MessageHeader header{.kind = MessageKind::kRows, .op = 1, .node = 1, .targets = 1};
  ASSERT_TRUE(send(world.node(0), 0, header, 1000));
  engine::Arrival arrival;
  ASSERT_TRUE(receive(world.node(1), 1, &arrival));
  EXPECT_EQ(wrong_bytes(arrival), 0U) << "of an earlier epoch";
  world.node(1).port->release(1, arrival);
}

TEST_P(FabricPressure, WhatWasDroppedIsTakenAgain) {
  World world({1, 1});
  ASSERT_NO_FATAL_FAILURE(start(world));
  for (int i = 0; i < 100; ++i) {
    const engine::SendBuffer buffer = world.node(0).port->take(0, FabricLane::kLatency);
    ASSERT_NE(buffer.data, nullptr);
    world.node(0).port->drop(0, buffer);
  }
  std::vector<engine::SendBuffer> all;
  for (engine::SendBuffer buffer = world.node(0).port->take(0, FabricLane::kLatency); buffer.data != nullptr;
       buffer = world.node(0).port->take(0, FabricLane::kLatency)) {
    all.push_back(buffer);
  }
  EXPECT_EQ(all.size(), 4U);
}

TEST(FabricGroup, IsRefusedByTheFieldThatIsWrong) {
  World world({1, 1});
  world.create([](uint32_t node) { return options_for("tcp", "node" + std::to_string(node)); });
  const auto refusal = [&](const std::function<void(fabric::GroupLink*)>& change) {
    fabric::GroupLink link = world.link(0);
    change(&link);
    const auto opened = world.node(0).fabric->open_group(link);
    return opened.is_ok() ? std::string("opened") : opened.status().message();
  };
  EXPECT_NE(refusal([](fabric::GroupLink*) {}).find("not connected"), std::string::npos);
  ASSERT_NO_FATAL_FAILURE(world.connect());
  EXPECT_NE(refusal([](fabric::GroupLink* link) { link->key = 0; }).find("key"), std::string::npos);
  EXPECT_NE(refusal([](fabric::GroupLink* link) { link->message_bytes = 0; }).find("message_bytes"), std::string::npos);
  EXPECT_NE(refusal([](fabric::GroupLink* link) { link->send_buffers = 65; }).find("send_buffers"), std::string::npos);
  EXPECT_NE(refusal([](fabric::GroupLink* link) { link->receive_buffers = 0; }).find("receive_buffers"),
            std::string::npos);
  EXPECT_NE(refusal([](fabric::GroupLink* link) { link->devices.clear(); }).find("devices"), std::string::npos);
  EXPECT_NE(refusal([](fabric::GroupLink* link) { link->node_ids[0] = 5; }).find("own node"), std::string::npos);
  EXPECT_NE(refusal([](fabric::GroupLink* link) { link->placement.node_of[1] = 0; }).find("contradict"),
            std::string::npos);
  EXPECT_NE(refusal([](fabric::GroupLink* link) { link->placement.ranks_of[1].clear(); }).find("no rank"),
            std::string::npos);
  EXPECT_EQ(refusal([](fabric::GroupLink*) {}), "opened");
  ASSERT_NO_FATAL_FAILURE(world.open());
  EXPECT_NE(refusal([](fabric::GroupLink*) {}).find("open already"), std::string::npos);
}

}  // namespace
}  // namespace expertd::fabric_test
