// SPDX-License-Identifier: Apache-2.0
// What a rank does with rows that came from another node: each lands in its outputs as if the source had copied it.
#include "daemon/kernels/host/node_ops.h"
#include "daemon/kernels/host/tables.h"

namespace expertd::kernels::host {
namespace {

struct Spreader {
  OpShape shape;  // as the source has it
  const NodeView& nodes;
  const PeerView& own;
  EntryLayout layout;
  uint64_t landed = 0;

  LandingRow row_of(const std::byte* entry) const {
    LandingRow row;
    row.token = entry_token(entry);
    row.payload = entry + layout.payload_at;
    row.topk = entry_table<const int32_t>(entry, layout.topk_at);
    row.weights = layout.weights_at == 0 ? nullptr : entry_table<const float>(entry, layout.weights_at);
    if (shape.payload == Payload::kFp8) {
      row.scales = entry_table<const uint32_t>(entry, layout.side_at);
    } else if (layout.side_bytes != 0 && own.out_side != nullptr) {
      row.side = entry_table<const char>(entry, layout.side_at);
      row.side_stride = shape.side_element_bytes;
    }
    return row;
  }

  bool ids_in_range(const LandingRow& row) const {
    for (uint32_t lane = 0; lane < shape.top_k; ++lane) {
      if (row.topk[lane] < -1 || row.topk[lane] >= static_cast<int32_t>(shape.experts)) {
        return false;
      }
    }
    return true;
  }

  /// Rows of a handle may lie behind the outputs, those of a matrix that was checked may not.
  bool landed_or_left_out(bool landed_now) {
    ++landed;
    return landed_now || shape.cached != 0 || own.out_x == nullptr;
  }

  bool spread(const std::byte* entry) {
    const LandingRow row = row_of(entry);
    const int32_t* rows = entry_table<const int32_t>(entry, layout.rows_at);
    if (!ids_in_range(row)) {
      return false;
    }
    if (!rows_by_expert(shape)) {
      const int32_t at = rows[nodes.index_of[shape.rank]];
      return at < 0 || landed_or_left_out(land_token(shape, row, own, shape.rank, static_cast<uint64_t>(at)));
    }
    for (uint32_t lane = 0; lane < shape.top_k; ++lane) {
      const bool mine =
          row.topk[lane] >= 0 && static_cast<uint32_t>(row.topk[lane]) / shape.local_experts == shape.rank;
      if (mine && rows[lane] >= 0 &&
          !landed_or_left_out(land_lane(shape, row, own, lane, static_cast<uint64_t>(rows[lane])))) {
        return false;
      }
    }
    return true;
  }
};

/// A side that this rank takes is of the shape that all ranks agreed on.
bool head_fits(const OpShape& shape, const PeerView& own, const MessageHead& head) {
  if ((head.flags & ~kMessageFlags) != 0 || head.side_elements > base::kMaxHidden || head.side_element_bytes > 4) {
    return false;
  }
  const bool same = head.side_elements == shape.side_elements && head.side_element_bytes == shape.side_element_bytes;
  return shape.payload == Payload::kFp8 || own.out_side == nullptr || same ||
         uint64_t{head.side_elements} * head.side_element_bytes == 0;
}

}  // namespace

bool spread_rows(const OpParams& params, const NodeView& nodes, const PeerView& own, const MessageHead& head,
                 const Entries& entries, uint64_t* landed) {
  if (!is_dispatch(params.shape) || !head_fits(params.shape, own, head)) {
    return false;
  }
  const auto node_ranks = static_cast<uint32_t>(nodes.ranks_of[nodes.own_node].size());
  Spreader spreader{params.shape, nodes, own, rows_layout(params.shape, head, node_ranks)};
  spreader.shape.zero_foreign_weights = (head.flags & kMessageZeroForeign) != 0 ? 1 : 0;
  if (!entries.well_formed(params.shape, spreader.layout)) {
    return false;
  }
  bool good = true;
  for (uint32_t i = 0; good && i < entries.count; ++i) {
    good = spreader.spread(entries.at(spreader.layout, i));
  }
  *landed += spreader.landed;
  return good;
}

}  // namespace expertd::kernels::host
