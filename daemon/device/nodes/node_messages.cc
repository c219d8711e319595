// SPDX-License-Identifier: Apache-2.0
#include "daemon/device/nodes/node_messages.h"

#include <algorithm>

#include "daemon/kernels/node_message.h"

namespace expertd::device {

uint64_t low_latency_message_bytes(const engine::GroupShape& shape, const engine::Placement& placement) {
  if (!shape.low_latency) {
    return 0;
  }
  uint32_t node_ranks = 0;
  for (uint32_t node = 0; node < placement.nodes(); ++node) {
    node_ranks = std::max(node_ranks, placement.ranks_on(node));
  }
  kernels::OpShape op;
  op.kind = kernels::OpKind::kLlDispatch;
  op.payload = kernels::Payload::kBf16;
  op.hidden = shape.hidden;
  op.top_k = shape.top_k;
  op.row_bytes = shape.hidden * 2;
  op.out_row_bytes = op.row_bytes;
  const kernels::MessageHead rows{.flags = kernels::kMessageWeights};
  uint64_t stride = kernels::rows_layout(op, rows, node_ranks).stride;
  op.kind = kernels::OpKind::kLlCombine;
  stride = std::max<uint64_t>(stride, kernels::sums_layout(op, kernels::MessageHead{}).stride);
  stride = std::max<uint64_t>(stride, kernels::pulls_layout(op, node_ranks).stride);
  return sizeof(kernels::MessageHead) + std::min(shape.max_tokens, kMostWindowTokens) * stride;
}

uint32_t windows_of(const engine::GroupShape& shape, uint64_t message_bytes, uint32_t most) {
  kernels::OpShape op;
  op.kind = kernels::OpKind::kCombine;
  op.hidden = shape.hidden;
  op.top_k = shape.top_k;
  const kernels::MessageHead head{.flags = kernels::kMessageWeights};
  const uint64_t room = message_bytes - std::min<uint64_t>(message_bytes, sizeof(head));
  const uint64_t tokens = std::clamp<uint64_t>(room / kernels::sums_layout(op, head).stride, 1, kMostWindowTokens);
  return static_cast<uint32_t>(std::clamp<uint64_t>((shape.max_tokens + tokens - 1) / tokens, 1, most));
}

}  // namespace expertd::device
