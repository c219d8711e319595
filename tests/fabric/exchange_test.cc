// SPDX-License-Identifier: Apache-2.0
// Messages between fabrics of one process: whole, to everybody they are for, and none lost when there are more than
// buffers. Over TCP on the loopback and over shared memory.
#include <gtest/gtest.h>

#include <map>
#include <set>
#include <thread>

#include "daemon/base/clock.h"
#include "tests/fabric/fabric_pair.h"

namespace expertd::fabric_test {
namespace {

using engine::FabricLane;
using engine::MessageHeader;
using engine::MessageKind;

class FabricExchange : public testing::TestWithParam<std::string> {
 protected:
  void start(World& world) {
    world.create([](uint32_t node) { return options_for(GetParam(), "node" + std::to_string(node)); });
    ASSERT_NO_FATAL_FAILURE(world.connect());
    ASSERT_NO_FATAL_FAILURE(world.wait_up());
  }
};

INSTANTIATE_TEST_SUITE_P(Over, FabricExchange, testing::Values("tcp", "posix"),
                         [](const auto& of) { return of.param; });

TEST_P(FabricExchange, CarriesMessagesOfEverySizeOnBothLanesBothWays) {
  World world({1, 1});
  ASSERT_NO_FATAL_FAILURE(start(world));
  ASSERT_NO_FATAL_FAILURE(world.open());
  const uint64_t most = world.node(0).port->message_bytes();
  uint32_t sequence = 0;
  for (const uint64_t bytes : {uint64_t{0}, uint64_t{1}, uint64_t{63}, uint64_t{4096}, uint64_t{8192}, uint64_t{8193},
                               uint64_t{65536}, most - 1, most}) {
    for (const FabricLane lane : {FabricLane::kLatency, FabricLane::kThroughput}) {
      for (const uint32_t from : {0U, 1U}) {
        const uint32_t to = 1 - from;
        const MessageHeader header{.kind = MessageKind::kPulls,
                                   .lane = lane,
                                   .op = 7,
                                   .source_rank = from,
                                   .node = to,
                                   .targets = 1,
                                   .entries = 3,
                                   .sequence = sequence++};
        const uint64_t sent_ns = base::now_ns();
        ASSERT_TRUE(send(world.node(from), from, header, bytes));
        engine::Arrival arrival;
        ASSERT_TRUE(receive(world.node(to), to, &arrival)) << bytes << " bytes";
        EXPECT_EQ(arrival.bytes, bytes);
        EXPECT_TRUE(arrival.arrived_ns > sent_ns && arrival.arrived_ns <= base::now_ns());
        EXPECT_EQ(arrival.header.kind, header.kind);
        EXPECT_EQ(arrival.header.lane, lane);
        EXPECT_EQ(arrival.header.op, 7U);
        EXPECT_EQ(arrival.header.source_rank, from);
        EXPECT_EQ(arrival.header.node, from);
        EXPECT_EQ(arrival.header.entries, 3U);
        EXPECT_EQ(arrival.header.sequence, header.sequence);
        EXPECT_EQ(wrong_bytes(arrival), 0U);
        world.node(to).port->release(to, arrival);
      }
    }
  }
}

}  // namespace
}  // namespace expertd::fabric_test
