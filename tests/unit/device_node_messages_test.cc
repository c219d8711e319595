// SPDX-License-Identifier: Apache-2.0
// What messages of groups on GPUs hold: the worst case of a low latency operation in one.
#include <gtest/gtest.h>

#include "daemon/device/nodes/node_messages.h"
#include "daemon/kernels/node_message.h"

namespace expertd::device {
namespace {

engine::Placement two_nodes(uint32_t ranks) {
  engine::Placement placement;
  placement.ranks_of.resize(2);
  for (uint32_t rank = 0; rank < ranks; ++rank) {
    const uint32_t node = rank < ranks / 2 ? 0 : 1;
    placement.index_of.push_back(placement.ranks_on(node));
    placement.node_of.push_back(node);
    placement.ranks_of[node].push_back(rank);
  }
  return placement;
}

engine::GroupShape shape_of(uint32_t tokens) {
  engine::GroupShape shape;
  shape.ranks = 8;
  shape.experts = 256;
  shape.hidden = 7168;
  shape.top_k = 8;
  shape.max_tokens = tokens;
  shape.low_latency = true;
  return shape;
}

kernels::OpShape op_of(const engine::GroupShape& shape, kernels::OpKind kind, kernels::Payload payload) {
  kernels::OpShape op;
  op.kind = kind;
  op.payload = payload;
  op.hidden = shape.hidden;
  op.top_k = shape.top_k;
  op.ranks = shape.ranks;
  op.experts = shape.experts;
  op.out_row_bytes = payload == kernels::Payload::kFp8 ? shape.hidden : shape.hidden * 2;
  return op;
}

TEST(NodeMessages, OneHoldsEveryTokenOfALowLatencyOperation) {
  const engine::Placement placement = two_nodes(8);
  const kernels::MessageHead none;
  for (const uint32_t tokens : {1U, 16U, 128U, 256U}) {
    const engine::GroupShape shape = shape_of(tokens);
    const uint64_t bytes = low_latency_message_bytes(shape, placement);
    for (const auto payload : {kernels::Payload::kBf16, kernels::Payload::kFp8}) {
      const kernels::OpShape op = op_of(shape, kernels::OpKind::kLlDispatch, payload);
      EXPECT_LE(sizeof(none) + uint64_t{tokens} * kernels::rows_layout(op, none, 4).stride, bytes) << tokens;
    }
    const kernels::OpShape combine = op_of(shape, kernels::OpKind::kLlCombine, kernels::Payload::kBf16);
    EXPECT_LE(sizeof(none) + uint64_t{tokens} * kernels::sums_layout(combine, none).stride, bytes) << tokens;
    EXPECT_LE(sizeof(none) + uint64_t{tokens} * kernels::pulls_layout(combine, 4).stride, bytes) << tokens;
    EXPECT_EQ(windows_of(shape, bytes, 8), 1U) << tokens;
  }
}

TEST(NodeMessages, WhatTheyTakeIsBounded) {
  const engine::Placement placement = two_nodes(8);
  const uint64_t most = low_latency_message_bytes(shape_of(kMostWindowTokens), placement);
  EXPECT_EQ(low_latency_message_bytes(shape_of(4096), placement), most);
  EXPECT_LT(most, uint64_t{4} << 20);
  engine::GroupShape normal = shape_of(4096);
  normal.low_latency = false;
  EXPECT_EQ(low_latency_message_bytes(normal, placement), 0U);
  EXPECT_EQ(windows_of(normal, uint64_t{1} << 20, 8), 8U);
  EXPECT_EQ(windows_of(shape_of(100), uint64_t{1} << 20, 8), 2U);
}

}  // namespace
}  // namespace expertd::device
