// SPDX-License-Identifier: Apache-2.0
// In how many messages the rows of a dispatch leave for another node.
#include "daemon/device/nodes/node_outbox.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace expertd::device {
namespace {

constexpr uint32_t kMessageBytes = 256 * 1024;

/// Gives buffers, and notes how many entries each message has.
struct Port final : engine::FabricPort {
  uint64_t message_bytes() const override { return kMessageBytes; }
  engine::SendBuffer take(uint32_t /*rank*/, engine::FabricLane lane) override {
    return {memory.data(), memory.size(), lane, 0};
  }
  void send(uint32_t /*rank*/, const engine::SendBuffer& /*buffer*/, const engine::MessageHeader& header,
            uint64_t /*bytes*/) override {
    entries.push_back(header.entries);
  }
  void drop(uint32_t /*rank*/, const engine::SendBuffer& /*buffer*/) override {}
  bool receive(uint32_t /*rank*/, engine::Arrival* /*arrival*/) override { return false; }
  void release(uint32_t /*rank*/, const engine::Arrival& /*arrival*/) override {}

  std::vector<std::byte> memory = std::vector<std::byte>(kMessageBytes);
  std::vector<uint32_t> entries;
};

/// Entries of the messages that `tokens` rows of rank 0 for rank 1, on another node, leave in.
std::vector<uint32_t> messages(engine::FabricLane lane, uint32_t tokens, uint32_t hidden) {
  engine::Placement placement;
  placement.ranks_of = {{0}, {1}};
  placement.node_of = {0, 1};
  placement.index_of = {0, 0};
  kernels::OpParams params;
  params.shape.kind = kernels::OpKind::kLlDispatch;
  params.shape.ranks = 2;
  params.shape.experts = 2;
  params.shape.local_experts = 1;
  params.shape.top_k = 1;
  params.shape.tokens = tokens;
  params.shape.hidden = hidden;
  params.shape.row_bytes = hidden * 2;
  params.shape.out_row_bytes = hidden * 2;
  params.shape.slots_per_expert = tokens;
  params.shape.active_ranks = base::RankSet(3);
  std::vector<int32_t> topk(tokens, 1);
  std::vector<int32_t> rows(tokens, 0);
  params.routing.topk = topk.data();
  params.routing.token_expert = rows.data();
  const std::vector<uint16_t> payload(hidden);
  Port port;
  NodeOp op;
  op.fabric = &port;
  op.placement = &placement;
  op.nodes = {placement.own_node, placement.node_of, placement.index_of, placement.ranks_of};
  op.active = base::RankSet(3);
  op.lane = lane;
  op.message_bytes = kMessageBytes;
  op.params = &params;
  NodeOutbox outbox(2);
  outbox.open(&op);
  const std::vector<uint32_t> capacities(2, tokens);
  outbox.begin_rows(capacities);
  for (uint32_t token = 0; token < tokens; ++token) {
    kernels::host::LandingRow row;
    row.token = token;
    row.topk = &topk[token];
    row.payload = payload.data();
    EXPECT_TRUE(outbox.pack(row));
  }
  outbox.flush();
  outbox.close();
  return port.entries;
}

TEST(NodeOutbox, LowLatencyLeavesInQuarters) {
  EXPECT_EQ(messages(engine::FabricLane::kLatency, 16, 7168), (std::vector<uint32_t>{4, 4, 4, 4}));
  // What a quarter has no room for in one message leaves as messages are filled: 18 rows each.
  EXPECT_EQ(messages(engine::FabricLane::kLatency, 128, 7168), (std::vector<uint32_t>{18, 18, 18, 18, 18, 18, 18, 2}));
}

TEST(NodeOutbox, SmallRowsOfLowLatencyLeaveTogether) {
  EXPECT_EQ(messages(engine::FabricLane::kLatency, 16, 256), (std::vector<uint32_t>{16}));
}

TEST(NodeOutbox, HighThroughputFillsItsMessages) {
  EXPECT_EQ(messages(engine::FabricLane::kThroughput, 16, 7168), (std::vector<uint32_t>{16}));
  EXPECT_EQ(messages(engine::FabricLane::kThroughput, 20, 7168), (std::vector<uint32_t>{18, 2}));
}

}  // namespace
}  // namespace expertd::device
