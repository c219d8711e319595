// SPDX-License-Identifier: Apache-2.0
// Nodes that end, stop, or leave: how soon it is told, once, and that every buffer comes back. The other side is a
// process of its own.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>

#include "daemon/base/clock.h"
#include "daemon/base/fd.h"
#include "tests/fabric/fabric_pair.h"
#include "tests/fabric/identity_text.h"
#include "tests/support/child_process.h"
#include "tests/support/temp_dir.h"

namespace expertd::fabric_test {
namespace {

using engine::FabricLane;
using engine::MessageHeader;
using engine::MessageKind;

constexpr uint64_t kMs = 1'000'000;

class FabricLoss : public testing::TestWithParam<std::string> {
 protected:
  void start(std::vector<std::string> more = {}) {
    world_.create([](uint32_t) { return options_for(GetParam(), "parent"); });
    int to_child[2];
    int from_child[2];
    ASSERT_EQ(::pipe2(to_child, O_CLOEXEC), 0);
    ASSERT_EQ(::pipe2(from_child, O_CLOEXEC), 0);
    input_.reset(to_child[1]);
    output_ = ::fdopen(from_child[0], "r");
    support::ChildOptions options;
    options.arguments = {std::string(EXPERTD_BINARY_DIR) + "/bin/expertd_fabric_peer", GetParam()};
    options.arguments.insert(options.arguments.end(), more.begin(), more.end());
    options.input = to_child[0];
    options.output = from_child[1];
    child_ = support::start_child(options);
    ::close(to_child[0]);
    ::close(from_child[1]);
    ASSERT_GT(child_, 0);
    const fabric::NodeIdentity other = identity_from_text(line());
    child_id_ = other.node_id;
    const base::Status connected = node().fabric->connect(other);
    ASSERT_TRUE(connected.is_ok()) << connected.message();
    const std::string own = identity_to_text(node().fabric->identity()) + "\n";
    ASSERT_EQ(::write(input_.get(), own.data(), own.size()), static_cast<ssize_t>(own.size()));
    ASSERT_TRUE(node().bell->wait([&] { return !node().bell->up().empty(); }));
    auto port = node().fabric->open_group(pair_link(0, {node().fabric->identity().node_id, child_id_}));
    ASSERT_TRUE(port.is_ok()) << port.status().message();
    node().port = std::move(port).value();
    ASSERT_EQ(line(), "open");
  }
  void TearDown() override {
    input_.reset();
    if (child_ > 0) {
      (void)::kill(child_, SIGCONT);
      int status = 0;
      if (!support::reap_child(child_, &status, std::chrono::seconds(5))) {
        support::kill_children();
        (void)support::reap_child(child_, &status, std::chrono::seconds(5));
      }
    }
    if (output_ != nullptr) {
      (void)std::fclose(output_);
    }
  }
  std::string line() {
    char text[16384];
    if (std::fgets(text, sizeof(text), output_) == nullptr) {
      return "";
    }
    std::string read(text);
    read.pop_back();
    return read;
  }
  Node& node() { return world_.node(0); }

  /// Sends `signal` and waits for the loss; how long that took, in milliseconds.
  double lost_after(int signal) {
    uint64_t at_ns = base::now_ns();
    EXPECT_EQ(::kill(child_, signal), 0);
    if (signal == SIGKILL) {
      // Shared memory looks for the process in /proc, where one that nobody reaped still is. How long the kernel takes
      // to end it is not counted.
      int status = 0;
      EXPECT_TRUE(support::reap_child(child_, &status, std::chrono::seconds(5)));
      child_ = -1;
      at_ns = base::now_ns();
    }
    EXPECT_TRUE(node().bell->wait([&] { return !node().bell->lost().empty(); }));
    const std::vector<Bell::Loss> lost = node().bell->lost();
    if (lost.empty()) {
      return 1e9;
    }
    EXPECT_EQ(lost[0].node_id, child_id_);
    EXPECT_FALSE(lost[0].detail.empty());
    cause_ = lost[0].cause;
    RecordProperty("cause", fabric::loss_cause_name(lost[0].cause));
    const double after_ms = (static_cast<double>(lost[0].at_ns) - static_cast<double>(at_ns)) / 1e6;
    std::printf("lost after %.1f ms (%s)\n", after_ms, fabric::loss_cause_name(lost[0].cause));
    return after_ms;
  }
  /// Takes every send buffer of both lanes.
  void expect_all_buffers() {
    for (const FabricLane lane : {FabricLane::kLatency, FabricLane::kThroughput}) {
      for (int i = 0; i < 4; ++i) {
        EXPECT_TRUE(node().bell->wait([&] { return node().port->take(0, lane).data != nullptr; })) << "buffer " << i;
      }
    }
  }
  void send_all(uint64_t bytes) {
    for (const FabricLane lane : {FabricLane::kLatency, FabricLane::kThroughput}) {
      const MessageHeader header{.kind = MessageKind::kRows, .lane = lane, .op = 1, .node = 1, .targets = 1};
      for (int i = 0; i < 4; ++i) {
        ASSERT_TRUE(send(node(), 0, header, bytes));
      }
    }
  }

  World world_{{1}};
  base::ScopedFd input_;
  FILE* output_ = nullptr;
  pid_t child_ = -1;
  uint64_t child_id_ = 0;
  fabric::LossCause cause_ = fabric::LossCause::kTransport;  // of the first loss
};

INSTANTIATE_TEST_SUITE_P(Over, FabricLoss, testing::Values("tcp", "posix"), [](const auto& of) { return of.param; });

TEST_P(FabricLoss, AKilledNodeIsToldWithin50Milliseconds) {
  ASSERT_NO_FATAL_FAILURE(start());
  EXPECT_LE(lost_after(SIGKILL), support::worst_bound_ms(50));
  EXPECT_EQ(node().bell->lost().size(), 1U);
}

TEST_P(FabricLoss, AKilledNodeGivesItsBuffersBack) {
  ASSERT_NO_FATAL_FAILURE(start({"hold"}));
  // More than the other side takes in, so that some are under way when it dies.
  for (int i = 0; i < 2; ++i) {
    ASSERT_NO_FATAL_FAILURE(send_all(200'000));
  }
  EXPECT_LE(lost_after(SIGKILL), support::worst_bound_ms(50));
  expect_all_buffers();
  node().port.reset();
  EXPECT_TRUE(node().bell->wait([&] { return world_.snapshot(0).groups_closing == 0; }));
}

// At whatever point of a message it dies, and whether it is taken in or waits for a buffer.
TEST_P(FabricLoss, WhatAKilledNodeWasSendingIsLetGo) {
  ASSERT_NO_FATAL_FAILURE(start({"flood"}));
  for (int i = 0; i < 20; ++i) {
    engine::Arrival arrival;
    ASSERT_TRUE(receive(node(), 0, &arrival));
    node().port->release(0, arrival);
  }
  (void)lost_after(SIGKILL);
  node().port.reset();
  EXPECT_TRUE(node().bell->wait([&] { return world_.snapshot(0).groups_closing == 0; }))
      << "a receive of a lost node never ended";
}

TEST_P(FabricLoss, WhatAStoppedNodeWasSendingIsLetGo) {
  ASSERT_NO_FATAL_FAILURE(start({"flood"}));
  for (int i = 0; i < 20; ++i) {
    engine::Arrival arrival;
    ASSERT_TRUE(receive(node(), 0, &arrival));
    node().port->release(0, arrival);
  }
  ASSERT_EQ(::kill(child_, SIGSTOP), 0);
  // What had arrived is taken, so that receives begin of which the other side does its part no more.
  engine::Arrival arrival;
  while (receive(node(), 0, &arrival, std::chrono::milliseconds(50))) {
    node().port->release(0, arrival);
  }
  (void)lost_after(SIGSTOP);
  node().port.reset();
  EXPECT_TRUE(node().bell->wait([&] { return world_.snapshot(0).groups_closing == 0; }))
      << "a receive of a lost node never ended";
}

TEST_P(FabricLoss, AStoppedNodeIsToldWithin600Milliseconds) {
  ASSERT_NO_FATAL_FAILURE(start());
  const double after_ms = lost_after(SIGSTOP);
  EXPECT_LE(after_ms, support::worst_bound_ms(600));
  EXPECT_GE(after_ms, 300) << "nothing but silence can tell, and that takes its time";
  EXPECT_EQ(cause_, fabric::LossCause::kSilent);
}

TEST_P(FabricLoss, AStoppedNodeGivesItsBuffersBack) {
  ASSERT_NO_FATAL_FAILURE(start());
  ASSERT_EQ(::kill(child_, SIGSTOP), 0);
  ASSERT_NO_FATAL_FAILURE(send_all(200'000));
  EXPECT_LE(lost_after(SIGSTOP), support::worst_bound_ms(600));
  expect_all_buffers();
  node().port.reset();
  EXPECT_TRUE(node().bell->wait([&] { return world_.snapshot(0).groups_closing == 0; }));
}

TEST_P(FabricLoss, WhatArrivedBeforeTheLossIsStillDelivered) {
  ASSERT_NO_FATAL_FAILURE(start());
  const MessageHeader header{.kind = MessageKind::kRows, .op = 1, .node = 1, .targets = 1};
  ASSERT_TRUE(send(node(), 0, header, 100'000));
  ASSERT_TRUE(node().bell->wait([&] { return world_.snapshot(0).peers[0].lanes[1].received_messages == 1; }));
  (void)lost_after(SIGKILL);
  engine::Arrival arrival;
  ASSERT_TRUE(receive(node(), 0, &arrival));
  EXPECT_EQ(arrival.bytes, 100'000U);
  node().port->release(0, arrival);
}

TEST_P(FabricLoss, ANodeThatStopsOrderlySaysSo) {
  ASSERT_NO_FATAL_FAILURE(start());
  input_.reset();
  ASSERT_TRUE(node().bell->wait([&] { return !node().bell->lost().empty(); }));
  EXPECT_EQ(node().bell->lost()[0].cause, fabric::LossCause::kLeft);
}

TEST_P(FabricLoss, ANodeThatIsOnlyLateIsNotLost) {
  ASSERT_NO_FATAL_FAILURE(start());
  ASSERT_EQ(::kill(child_, SIGSTOP), 0);
  EXPECT_FALSE(node().bell->wait([&] { return !node().bell->lost().empty(); }, std::chrono::milliseconds(200)));
  ASSERT_EQ(::kill(child_, SIGCONT), 0);
  EXPECT_FALSE(node().bell->wait([&] { return !node().bell->lost().empty(); }, std::chrono::milliseconds(700)));
  EXPECT_GT(world_.snapshot(0).peers[0].rtt_ns, 0U);
}

TEST(FabricConnection, ANodeThatNeverAnswersIsLost) {
  World world({1, 1});
  world.create([](uint32_t node) {
    fabric::FabricOptions options = options_for("tcp", "node" + std::to_string(node));
    options.heartbeat.connect_limit_ns = 200 * kMs;
    return options;
  });
  ASSERT_TRUE(world.node(0).fabric->connect(world.node(1).fabric->identity()).is_ok());
  ASSERT_TRUE(world.node(0).bell->wait([&] { return !world.node(0).bell->lost().empty(); }));
  EXPECT_EQ(world.node(0).bell->lost()[0].cause, fabric::LossCause::kNeverAnswered);
  EXPECT_TRUE(world.node(0).bell->up().empty());
}

TEST(FabricConnection, ALostNodeCanBeConnectedAgain) {
  World world({1, 1});
  world.create([](uint32_t node) { return options_for("tcp", "node" + std::to_string(node)); });
  ASSERT_NO_FATAL_FAILURE(world.connect());
  ASSERT_NO_FATAL_FAILURE(world.wait_up());
  for (uint32_t round = 1; round <= 3; ++round) {
    ASSERT_TRUE(world.node(0).fabric->disconnect(world.node(1).fabric->identity().node_id).is_ok());
    for (uint32_t node : {0U, 1U}) {
      ASSERT_TRUE(world.node(node).bell->wait([&] { return world.node(node).bell->lost().size() == round; }));
    }
    ASSERT_NO_FATAL_FAILURE(world.connect());
    for (uint32_t node : {0U, 1U}) {
      ASSERT_TRUE(world.node(node).bell->wait([&] { return world.node(node).bell->up().size() == 1 + round; }));
    }
    ASSERT_NO_FATAL_FAILURE(world.open());
    const MessageHeader header{.kind = MessageKind::kRows, .op = round, .node = 1, .targets = 1};
    ASSERT_TRUE(send(world.node(0), 0, header, 100'000));
    engine::Arrival arrival;
    ASSERT_TRUE(receive(world.node(1), 1, &arrival));
    EXPECT_EQ(wrong_bytes(arrival), 0U);
    world.node(1).port->release(1, arrival);
    world.node(0).port.reset();
    world.node(1).port.reset();
  }
  EXPECT_EQ(world.snapshot(0).peers.size(), 1U);
}

TEST(FabricConnection, TheThreadBeatsWhileItHasNothingToDo) {
  World world({1});
  world.create([](uint32_t) { return options_for("tcp", "alone"); });
  const uint64_t before = world.node(0).bell->beats();
  EXPECT_TRUE(world.node(0).bell->wait([&] { return world.node(0).bell->beats() >= before + 3; },
                                       std::chrono::milliseconds(2000)));
}

}  // namespace
}  // namespace expertd::fabric_test
