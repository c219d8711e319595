// SPDX-License-Identifier: Apache-2.0
// The bytes of messages between the parts of a group on several nodes, whatever devices those have. Pure; any thread.
//
// A message is a MessageHead and `entries` entries of one stride, a multiple of 16. All integers are little-endian, all
// tables of an entry start at multiples of 4, payload, side, scales and sums at multiples of 16:
//   rows   int32 token, int32 0, int32 rows[n], int32 topk[K], [float weights[K]], payload, [side or scales]
//   pulls  int32 token, int32 0, int32 rows[n], int32 topk[K], [float weights[K]: low latency]
//   sums   int32 token, int32 0, [float weights[K]], bf16 sum[H]
// token: index on its source rank. n and rows: where rows are numbered per rank (high throughput, not expanded), one
// per rank of the destination's node, in their order; else K, one per lane whose expert is there. -1: none. As in
// Routing::token_rank and Routing::token_expert they are final: nobody adds a base. topk: global ids, -1 for none. FP8
// rows are quantised, with their scales as they land (landing.h); side rows are dense.
#pragma once

#include <cstdint>

#include "daemon/kernels/op_params.h"

namespace expertd::kernels {

inline constexpr uint32_t kMessageWeights = 1;   // rows: weights travel; pulls: weights are wanted back; sums: they are
inline constexpr uint32_t kMessageLastLane = 2;  // pulls: ranks are summed in the order of the token's last lane
inline constexpr uint32_t kMessageZeroForeign = 4;  // rows: the weight of a lane whose expert is elsewhere lands as 0
inline constexpr uint32_t kMessageFlags = 7;

/// In front of the entries, so that whoever reads them needs nothing else of the source's operation.
struct MessageHead {
  uint32_t flags = 0;
  uint32_t side_elements = 0;
  uint32_t side_element_bytes = 0;
  // In the last message to a node, how many there were, else 0: of pulls, and of rows from a GPU, whose messages go to
  // all ranks of the node. In sums from a GPU: of which pulls of their source, counted from 1.
  uint32_t last = 0;
};
static_assert(sizeof(MessageHead) == 16);

struct EntryLayout {
  uint32_t rows = 0;  // how many row numbers
  uint32_t rows_at = 8;
  uint32_t topk_at = 0;
  uint32_t weights_at = 0;  // 0: none
  uint32_t payload_at = 0;  // rows: the payload, sums: the sum
  uint32_t side_at = 0;
  uint32_t side_bytes = 0;
  uint32_t stride = 0;
};
/// `node_ranks`: how many ranks of the group sit on the destination's node.
EntryLayout rows_layout(const OpShape& shape, const MessageHead& head, uint32_t node_ranks);
EntryLayout pulls_layout(const OpShape& shape, uint32_t node_ranks);
EntryLayout sums_layout(const OpShape& shape, const MessageHead& head);

}  // namespace expertd::kernels
