// SPDX-License-Identifier: Apache-2.0
// Lanes with several devices: which rail a message leaves by, and that all of them carry it. The rails of real fabrics
// here are the loopback named several times, each with workers and connections of its own.
#include <gtest/gtest.h>

#include <atomic>
#include <numeric>
#include <thread>

#include "daemon/base/clock.h"
#include "daemon/fabric/lane_options.h"
#include "daemon/fabric/rail_loads.h"
#include "tests/fabric/fabric_pair.h"

namespace expertd::fabric_test {
namespace {

using engine::FabricLane;
using engine::MessageHeader;
using engine::MessageKind;
using fabric::LaneKind;
using fabric::RailLoads;
using fabric::Route;

constexpr uint64_t kMessage = 262144;
constexpr uint64_t kIdleNs = 20'000'000;

RailLoads loads_of(Route route, uint32_t rails) {
  RailLoads loads(route, kIdleNs);
  loads.use_rails(rails);
  return loads;
}

/// The most bytes of a rail in those of the mean.
double slowest_over_mean(const std::vector<uint64_t>& bytes) {
  const uint64_t sum = std::accumulate(bytes.begin(), bytes.end(), uint64_t{0});
  return static_cast<double>(*std::max_element(bytes.begin(), bytes.end())) * static_cast<double>(bytes.size()) /
         static_cast<double>(sum);
}

TEST(FabricRails, RailIsThatOfTheDevicesNumberWhateverItHasToCarry) {
  RailLoads loads = loads_of(Route::kRail, 4);
  for (uint32_t i = 0; i < 10; ++i) {
    EXPECT_EQ(loads.choose(6, kMessage), 2U);
    loads.started(2, kMessage);
  }
}

TEST(FabricRails, AutoStaysOnTheOwnRailUntilItHasMuchMoreThanAnother) {
  RailLoads loads = loads_of(Route::kAuto, 4);
  EXPECT_EQ(loads.choose(5, kMessage), 1U);
  loads.started(1, kMessage);
  EXPECT_EQ(loads.choose(5, kMessage), 1U);
  loads.started(1, 2 * kMessage);
  EXPECT_NE(loads.choose(5, kMessage), 1U);
  loads.ended(1, 3 * kMessage);
  EXPECT_NE(loads.choose(5, kMessage), 1U) << "what it took just now counts";
  loads.look(kIdleNs / 2);
  EXPECT_NE(loads.choose(5, kMessage), 1U);
  loads.look(kIdleNs);
  EXPECT_EQ(loads.choose(5, kMessage), 1U) << "nothing was under way for long";
}

TEST(FabricRails, AHotDevicesMessagesLeaveByAllRails) {
  for (const Route route : {Route::kAuto, Route::kSpread}) {
    RailLoads loads = loads_of(route, 8);
    // Four buffers of a rank: the fifth message waits for the first.
    std::vector<uint32_t> under_way;
    for (uint32_t i = 0; i < 1'000; ++i) {
      if (under_way.size() == 4) {
        loads.ended(under_way.front(), kMessage);
        under_way.erase(under_way.begin());
      }
      under_way.push_back(loads.choose(3, kMessage));
      loads.started(under_way.back(), kMessage);
    }
    std::vector<uint64_t> sent;
    for (uint32_t rail = 0; rail < 8; ++rail) {
      sent.push_back(loads.sent_bytes(rail));
    }
    EXPECT_LE(slowest_over_mean(sent), 1.2) << fabric::kRouteNames[static_cast<uint32_t>(route)];
  }
}

TEST(FabricRails, ALanesDevicesBecomeRailsButForTheControlLane) {
  const fabric::LaneOptionList options = {{"transports", "tcp"}, {"devices", "eth0,eth1,eth2"}};
  const auto rails = fabric::rails_of(LaneKind::kThroughput, options);
  ASSERT_TRUE(rails.is_ok());
  ASSERT_EQ(rails.value().size(), 3U);
  EXPECT_EQ(rails.value()[1], (fabric::LaneOptionList{{"transports", "tcp"}, {"devices", "eth1"}}));
  EXPECT_EQ(fabric::rails_of(LaneKind::kControl, options).value().size(), 1U);
  const auto many = fabric::rails_of(LaneKind::kLatency, {{"devices", "a,b,c,d,e,f,g,h,i"}});
  ASSERT_FALSE(many.is_ok());
  EXPECT_NE(many.status().message().find("at most 8"), std::string::npos) << many.status().message();
  EXPECT_FALSE(fabric::rails_of(LaneKind::kLatency, {{"devices", "a,,b"}}).is_ok());
}

/// `rails` of the latency and the throughput lane over the loopback.
fabric::FabricOptions options_with(uint32_t node, Route route, uint32_t rails) {
  fabric::FabricOptions options = options_for("tcp", "node" + std::to_string(node));
  options.route = route;
  // Where the test's threads wait long for a processor, the lane is idle after every message, and would begin anew.
  options.rail_idle_ns = UINT64_MAX;
  options.heartbeat.misses = 200;  // and nobody is lost for it
  std::string devices = "lo";
  for (uint32_t rail = 1; rail < rails; ++rail) {
    devices += ",lo";
  }
  for (const LaneKind lane : {LaneKind::kLatency, LaneKind::kThroughput}) {
    options.lanes[static_cast<uint32_t>(lane)] = {{"transports", "tcp"}, {"devices", devices}};
  }
  return options;
}

/// Rank 0 sends `count` messages to rank 2, all of which arrive whole.
void exchange(World& world, uint32_t count, uint64_t bytes) {
  std::thread sender([&] {
    for (uint32_t i = 0; i < count; ++i) {
      const MessageHeader header{.kind = MessageKind::kRows, .op = 1, .node = 1, .targets = 1, .sequence = i};
      ASSERT_TRUE(send(world.node(0), 0, header, bytes));
    }
  });
  for (uint32_t i = 0; i < count; ++i) {
    engine::Arrival arrival;
    const bool received = receive(world.node(1), 2, &arrival);
    EXPECT_TRUE(received) << "only " << i << " messages came";
    if (!received) {
      break;
    }
    EXPECT_EQ(wrong_bytes(arrival), 0U);
    world.node(1).port->release(2, arrival);
  }
  sender.join();
}

std::vector<uint64_t> sent_by(World& world, uint32_t node, LaneKind lane) {
  std::vector<uint64_t> bytes;
  for (const fabric::RailSnapshot& rail : world.snapshot(node).rails) {
    if (rail.lane == lane) {
      bytes.push_back(rail.sent_bytes);
    }
  }
  return bytes;
}

class FabricRailsOf : public testing::TestWithParam<Route> {
 protected:
  void start(World& world, uint32_t rails_of_first, uint32_t rails_of_second) {
    world.create(
        [&](uint32_t node) { return options_with(node, GetParam(), node == 0 ? rails_of_first : rails_of_second); });
    ASSERT_NO_FATAL_FAILURE(world.connect());
    ASSERT_NO_FATAL_FAILURE(world.wait_up());
    ASSERT_NO_FATAL_FAILURE(world.open());
  }
};
INSTANTIATE_TEST_SUITE_P(By, FabricRailsOf, testing::Values(Route::kAuto, Route::kRail, Route::kSpread),
                         [](const auto& of) { return fabric::kRouteNames[static_cast<uint32_t>(of.param)]; });

TEST_P(FabricRailsOf, OneHotRankUsesAsManyRailsAsItsRouteSays) {
  World world({2, 1});
  ASSERT_NO_FATAL_FAILURE(start(world, 3, 3));
  ASSERT_EQ(world.node(0).fabric->identity().addresses[2].size(), 3U);
  constexpr uint32_t kMessages = 400;
  exchange(world, kMessages, 100'000);
  const std::vector<uint64_t> bytes = sent_by(world, 0, LaneKind::kThroughput);
  ASSERT_EQ(bytes.size(), 3U);
  RecordProperty("slowest_over_mean", std::to_string(slowest_over_mean(bytes)));
  if (GetParam() == Route::kRail) {
    EXPECT_EQ(bytes[0], uint64_t{kMessages} * 100'000) << "rank 0 is on device 0";
  } else {
    EXPECT_LE(slowest_over_mean(bytes), 1.05) << "with four buffers a rail is a few messages ahead at most";
  }
  EXPECT_TRUE(world.node(0).bell->wait([&] {
    const auto rails = world.snapshot(0).rails;
    return std::all_of(rails.begin(), rails.end(), [](const auto& rail) { return rail.under_way_bytes == 0; });
  }));
}

TEST_P(FabricRailsOf, NodesOfOtherNumbersOfRailsReachEachOther) {
  World world({2, 1});
  ASSERT_NO_FATAL_FAILURE(start(world, 3, 2));
  exchange(world, 60, 100'000);
  exchange(world, 60, 4'000);
  for (uint32_t i = 0; i < 20; ++i) {
    const MessageHeader header{.kind = MessageKind::kSums, .op = 2, .node = 0, .targets = 2, .sequence = i};
    ASSERT_TRUE(send(world.node(1), 2, header, i * 5'000));
    engine::Arrival arrival;
    ASSERT_TRUE(receive(world.node(0), 1, &arrival));
    EXPECT_EQ(wrong_bytes(arrival), 0U);
    world.node(0).port->release(1, arrival);
  }
}

TEST_P(FabricRailsOf, EveryRailIsMeasuredByItself) {
  constexpr uint64_t kProbe = 77;
  constexpr uint32_t kRails = 3;
  World world({2, 1});
  ASSERT_NO_FATAL_FAILURE(start(world, kRails, 2));
  // A probe has 10 s at most. Runs end after this, with two messages at least, so that a machine on which each takes
  // half a second gets through all of them; how many a run has otherwise is tested with FabricProbe.
  constexpr uint64_t kRunNs = 100'000'000;
  const uint64_t deadline_ns = base::now_ns() + 9'900'000'000;
  fabric::ProbePlan plan{
      .node_id = world.node(1).fabric->identity().node_id, .probe = kProbe, .runs = {}, .deadline_ns = deadline_ns};
  for (uint32_t rail = 0; rail < kRails; ++rail) {
    plan.runs.push_back({FabricLane::kThroughput, 8, 1, 10, kRunNs, rail});
    plan.runs.push_back({FabricLane::kThroughput, 100'000, 4, 10, kRunNs, rail});
  }
  const uint64_t own = world.node(0).fabric->identity().node_id;
  ASSERT_TRUE(world.node(1).fabric->open_probe({own, kProbe, 100'000, deadline_ns}).is_ok());
  std::atomic<bool> done{false};
  base::Status status;
  std::vector<fabric::ProbeFigures> figures;
  ASSERT_TRUE(world.node(0)
                  .fabric
                  ->begin_probe(plan,
                                [&](const base::Status& ended, const std::vector<fabric::ProbeFigures>& found) {
                                  status = ended;
                                  figures = found;
                                  done.store(true, std::memory_order_release);
                                })
                  .is_ok());
  ASSERT_TRUE(world.node(0).bell->wait([&] { return done.load(std::memory_order_acquire); }));
  ASSERT_TRUE(status.is_ok()) << status.message();
  ASSERT_EQ(figures.size(), 2 * kRails);
  for (uint32_t i = 0; i < figures.size(); ++i) {
    EXPECT_EQ(figures[i].rail, i / 2);
    EXPECT_GE(figures[i].messages, 1U);
    EXPECT_LE(figures[i].messages, 9U);
    EXPECT_GT(figures[i].p50_ns, 0U);
  }
  EXPECT_TRUE(world.node(0).bell->lost().empty() && world.node(1).bell->lost().empty());
}

}  // namespace
}  // namespace expertd::fabric_test
