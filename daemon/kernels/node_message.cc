// SPDX-License-Identifier: Apache-2.0
#include "daemon/kernels/node_message.h"

#include "daemon/kernels/host/landing.h"
#include "daemon/kernels/host/tables.h"

namespace expertd::kernels {
namespace {

constexpr uint32_t kInt = sizeof(int32_t);

uint32_t round_16(uint64_t bytes) {
  return static_cast<uint32_t>((bytes + 15) / 16 * 16);
}

/// Where the tables of rows and pulls stand; the entry ends behind them, not rounded.
EntryLayout tables_layout(const OpShape& shape, bool weights, uint32_t node_ranks, uint32_t* end) {
  EntryLayout layout;
  layout.rows = host::rows_by_expert(shape) ? shape.top_k : node_ranks;
  layout.topk_at = layout.rows_at + layout.rows * kInt;
  *end = layout.topk_at + shape.top_k * kInt;
  if (weights) {
    layout.weights_at = *end;
    *end += shape.top_k * kInt;
  }
  return layout;
}

}  // namespace

EntryLayout rows_layout(const OpShape& shape, const MessageHead& head, uint32_t node_ranks) {
  uint32_t end = 0;
  EntryLayout layout = tables_layout(shape, (head.flags & kMessageWeights) != 0, node_ranks, &end);
  layout.payload_at = round_16(end);
  layout.side_at = round_16(uint64_t{layout.payload_at} + shape.out_row_bytes);
  layout.side_bytes =
      shape.payload == Payload::kFp8 ? host::scale_words(shape) * kInt : head.side_elements * head.side_element_bytes;
  layout.stride = round_16(uint64_t{layout.side_at} + layout.side_bytes);
  return layout;
}

EntryLayout pulls_layout(const OpShape& shape, uint32_t node_ranks) {
  uint32_t end = 0;
  EntryLayout layout = tables_layout(shape, host::is_ll(shape), node_ranks, &end);
  layout.stride = round_16(end);
  return layout;
}

EntryLayout sums_layout(const OpShape& shape, const MessageHead& head) {
  EntryLayout layout;
  const bool weights = (head.flags & kMessageWeights) != 0;
  layout.weights_at = weights ? layout.rows_at : 0;
  layout.payload_at = round_16(uint64_t{layout.rows_at} + (weights ? shape.top_k * kInt : 0));
  layout.stride = round_16(uint64_t{layout.payload_at} + uint64_t{shape.hidden} * 2);
  return layout;
}

}  // namespace expertd::kernels
