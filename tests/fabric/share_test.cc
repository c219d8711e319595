// SPDX-License-Identifier: Apache-2.0
// How groups share the throughput lane of one peer: turns by weight in bytes, and nobody waits for a group that has
// nothing to move. First the rule by itself, then two groups that saturate a pair of real fabrics.
#include <gtest/gtest.h>

#include <atomic>
#include <deque>

#include "daemon/fabric/receive_share.h"
#include "tests/fabric/fabric_pair.h"

namespace expertd::fabric_test {
namespace {

using engine::FabricLane;
using engine::MessageHeader;
using engine::MessageKind;
using fabric::ReceiveShare;
using fabric::ShareMember;

constexpr uint64_t kWindowBytes = 1'000'000;

class Group final : public ShareMember {
 public:
  explicit Group(uint32_t of_weight) { weight = of_weight; }
  uint64_t waiting_bytes() const override { return has_buffer && !waiting.empty() ? waiting.front() : 0; }
  void start_waiting() override {
    started_bytes += waiting.front();
    waiting.pop_front();
  }
  void fill(uint32_t messages, uint64_t bytes) { waiting.insert(waiting.end(), messages, bytes); }

  std::deque<uint64_t> waiting;
  bool has_buffer = true;
  uint64_t started_bytes = 0;
};

/// Everything under way ends, and what waits is looked at again.
void turn(ReceiveShare& share) {
  share.ended(share.in_flight_bytes());
  (void)share.run();
}

TEST(FabricShare, GivesBytesByWeightWhateverTheSizesOfMessages) {
  ReceiveShare share(kWindowBytes);
  Group heavy(3);
  Group light(1);
  heavy.fill(10'000, 20'000);
  light.fill(10'000, 250'000);
  share.join(&heavy);
  share.join(&light);
  for (int i = 0; i < 100; ++i) {
    turn(share);
  }
  const double ratio = static_cast<double>(heavy.started_bytes) / static_cast<double>(light.started_bytes);
  EXPECT_NEAR(ratio, 3.0, 0.1);
}

TEST(FabricShare, KeepsToItsWindowButAlwaysMovesOneMessage) {
  ReceiveShare share(kWindowBytes);
  Group group(1);
  share.join(&group);
  group.fill(1, 5 * kWindowBytes);
  group.fill(10, 300'000);
  EXPECT_TRUE(share.run());
  EXPECT_EQ(group.started_bytes, 5 * kWindowBytes);
  EXPECT_FALSE(share.run());
  turn(share);
  EXPECT_EQ(share.in_flight_bytes(), 900'000U);
}

TEST(FabricShare, WaitsForNoGroupWithoutABufferOrAMessage) {
  ReceiveShare share(kWindowBytes);
  Group stuck(64);
  Group busy(1);
  Group idle(64);
  stuck.has_buffer = false;
  stuck.fill(100, 100'000);
  busy.fill(1'000, 100'000);
  share.join(&stuck);
  share.join(&busy);
  share.join(&idle);
  for (int i = 0; i < 50; ++i) {
    turn(share);
    EXPECT_EQ(share.in_flight_bytes(), kWindowBytes);
  }
  EXPECT_EQ(stuck.started_bytes, 0U);
}

TEST(FabricShare, WhoComesLateHasNoClaimOnTheTimeBefore) {
  ReceiveShare share(kWindowBytes);
  Group early(1);
  Group late(1);
  early.fill(1'000, 100'000);
  share.join(&early);
  share.join(&late);
  for (int i = 0; i < 50; ++i) {
    turn(share);
  }
  late.fill(1'000, 100'000);
  const uint64_t before = early.started_bytes;
  for (int i = 0; i < 4; ++i) {
    turn(share);
  }
  EXPECT_GE(early.started_bytes - before, kWindowBytes) << "a claim of a part of the window, and no more";
  EXPECT_GE(late.started_bytes, 2 * kWindowBytes);
}

TEST(FabricShare, WhatCameWithoutWaitingCountsToo) {
  ReceiveShare share(kWindowBytes);
  Group eager(1);
  Group other(1);
  eager.fill(1'000, 100'000);
  other.fill(1'000, 100'000);
  share.join(&eager);
  share.join(&other);
  share.charge(eager, 2 * kWindowBytes);
  turn(share);
  EXPECT_EQ(eager.started_bytes, 0U);
  EXPECT_EQ(other.started_bytes, kWindowBytes);
}

/// Groups with the weights 3 and 1 between two nodes, a rank each. In a round both hand over as much as they have
/// buffers for, and what the light one got is looked at when the heavy one's last message comes: until then both have
/// something to move, however slow the machine is.
class TwoGroups {
 public:
  static constexpr uint32_t kEach = 60;  // messages of a round
  static constexpr uint32_t kRounds = 15;

  void open(World& world) {
    world_ = &world;
    world.node(1).bell->on_wake = [this](base::DeviceIndex device) { arrived(device.value); };
    for (const uint32_t node : {1U, 0U}) {
      for (const uint32_t group : {kLight, kHeavy}) {
        fabric::GroupLink link = world.link(node);
        link.key = 11 + group;
        link.weight = group == kHeavy ? 3 : 1;
        link.devices = {{group}};
        link.message_bytes = 65536;
        link.send_buffers = kEach;
        link.lanes = 1;
        auto opened = world.node(node).fabric->open_group(link);
        ASSERT_TRUE(opened.is_ok()) << opened.status().message();
        ports_[node][group] = std::move(opened).value();
      }
    }
    open_.store(true);
  }
  void run_rounds() {
    for (uint32_t round = 1; round <= kRounds; ++round) {
      target_.store(round * kEach);
      send(kLight);
      send(kHeavy);
      ASSERT_TRUE(world_->node(1).bell->wait([&] {
        return received_[kLight].load() == round * kEach && received_[kHeavy].load() == round * kEach;
      })) << "round "
          << round;
    }
  }
  /// That of the median round: where this thread loses its processor between the two, the first has the pair to itself.
  double ratio() {
    std::sort(beside_.begin(), beside_.end());
    return static_cast<double>(kEach) / beside_[kRounds / 2];
  }
  void close() {
    open_.store(false);
    ports_ = {};
  }

 private:
  static constexpr uint32_t kHeavy = 0;
  static constexpr uint32_t kLight = 1;

  void send(uint32_t group) {
    engine::FabricPort& port = *ports_[0][group];
    for (uint32_t i = 0; i < kEach; ++i) {
      engine::SendBuffer buffer;
      ASSERT_TRUE(world_->node(0).bell->wait([&] {
        buffer = port.take(0, FabricLane::kThroughput);
        return buffer.data != nullptr;
      }));
      const MessageHeader header{
          .kind = MessageKind::kRows, .lane = FabricLane::kThroughput, .op = 1, .node = 1, .targets = 1};
      port.send(0, buffer, header, buffer.capacity);
    }
  }
  /// On the throughput lane's thread, as the loop of a rank that is never late.
  void arrived(uint32_t group) {
    engine::Arrival arrival;
    while (open_.load() && ports_[1][group]->receive(1, &arrival)) {
      ports_[1][group]->release(1, arrival);
      const uint32_t count = ++received_[group];
      if (group == kHeavy && count == target_.load()) {
        beside_[count / kEach - 1] = received_[kLight].load() - (count - kEach);
      }
    }
  }

  World* world_ = nullptr;
  std::array<std::array<std::unique_ptr<engine::FabricPort>, 2>, 2> ports_;  // by node and group
  std::atomic<bool> open_{false};
  std::atomic<uint32_t> target_{0};  // of the heavy one, at the end of the round
  std::array<std::atomic<uint32_t>, 2> received_{};
  std::array<uint32_t, kRounds> beside_{};  // by round: messages of the light one until the last of the heavy one
};

class FabricShares : public testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(Over, FabricShares, testing::Values("tcp", "posix"), [](const auto& of) { return of.param; });

TEST_P(FabricShares, TwoGroupsThatSaturateAPairGetBytesByTheirRatio) {
  World world({1, 1});
  TwoGroups groups;
  world.create([](uint32_t node) {
    fabric::FabricOptions options = options_for(GetParam(), "node" + std::to_string(node));
    options.window_bytes = 256 * 1024;
    return options;
  });
  ASSERT_NO_FATAL_FAILURE(world.connect());
  ASSERT_NO_FATAL_FAILURE(world.wait_up());
  ASSERT_NO_FATAL_FAILURE(groups.open(world));
  groups.run_rounds();
  if (!HasFatalFailure()) {
    RecordProperty("ratio", std::to_string(groups.ratio()));
    EXPECT_NEAR(groups.ratio(), 3.0, 0.3);
  }
  groups.close();
}

TEST(FabricLanes, AGroupOfOneLaneSendsEverythingByThatAndTakesHalfTheMemory) {
  World world({1, 1});
  world.create([](uint32_t node) { return options_for("tcp", "node" + std::to_string(node)); });
  ASSERT_NO_FATAL_FAILURE(world.connect());
  ASSERT_NO_FATAL_FAILURE(world.wait_up());
  ASSERT_NO_FATAL_FAILURE(world.open());
  const uint64_t both_bytes = world.snapshot(0).memory_bytes;
  for (const uint32_t node : {0U, 1U}) {
    world.node(node).port.reset();
  }
  ASSERT_TRUE(world.node(0).bell->wait([&] { return world.snapshot(0).memory_bytes == 0; }));
  ASSERT_NO_FATAL_FAILURE(world.open([](fabric::GroupLink* link) { link->lanes = 1; }));
  EXPECT_EQ(world.snapshot(0).memory_bytes * 2, both_bytes);
  for (const uint64_t bytes : {uint64_t{100}, uint64_t{100'000}}) {
    MessageHeader header{.kind = MessageKind::kPulls, .lane = FabricLane::kLatency, .op = 1, .node = 1, .targets = 1};
    ASSERT_TRUE(send(world.node(0), 0, header, bytes));
    engine::Arrival arrival;
    ASSERT_TRUE(receive(world.node(1), 1, &arrival));
    EXPECT_EQ(arrival.bytes, bytes);
    EXPECT_EQ(arrival.header.lane, FabricLane::kThroughput);
    world.node(1).port->release(1, arrival);
  }
  const fabric::PeerSnapshot peer = world.snapshot(0).peers[0];
  EXPECT_EQ(peer.lanes[0].sent_messages, 0U);
  EXPECT_EQ(peer.lanes[1].sent_messages, 2U);
}

}  // namespace
}  // namespace expertd::fabric_test
