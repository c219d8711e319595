// SPDX-License-Identifier: Apache-2.0
// What a rank packs for other nodes: rows of a dispatch and pulls of a combine.
#include <algorithm>
#include <array>
#include <cstring>

#include "daemon/kernels/host/node_ops.h"
#include "daemon/kernels/host/tables.h"

namespace expertd::kernels::host {
namespace {

constexpr uint32_t kInt = sizeof(int32_t);

/// Calls `visit(lane, owner, row)` for the lanes of a token that have a row at an active rank of another node.
template <typename Visit>
void visit_lanes(const OpShape& shape, const NodeView& nodes, const int32_t* topk, const int32_t* rows, Visit visit) {
  for (uint32_t lane = 0; lane < shape.top_k; ++lane) {
    if (topk[lane] < 0 || topk[lane] >= static_cast<int32_t>(shape.experts) || rows[lane] < 0) {
      continue;
    }
    const uint32_t owner = static_cast<uint32_t>(topk[lane]) / shape.local_experts;
    if (is_active(shape, owner) && !nodes.is_local(owner)) {
      visit(lane, owner, static_cast<uint32_t>(rows[lane]));
    }
  }
}

/// The same for the ranks of a token whose rows are numbered per rank.
template <typename Visit>
void visit_ranks(const OpShape& shape, const NodeView& nodes, const int32_t* rows, Visit visit) {
  for (uint32_t rank = 0; rank < shape.ranks; ++rank) {
    if (rows[rank] >= 0 && is_active(shape, rank) && !nodes.is_local(rank)) {
      visit(rank, static_cast<uint32_t>(rows[rank]));
    }
  }
}

const int32_t* rank_rows(const OpParams& params, uint32_t token) {
  return params.routing.token_rank + size_t{token} * params.shape.ranks;
}
const int32_t* lane_rows(const OpParams& params, uint32_t token) {
  return params.routing.token_expert + size_t{token} * params.shape.top_k;
}
const int32_t* lane_ids(const OpParams& params, uint32_t token) {
  return params.routing.topk + size_t{token} * params.shape.top_k;
}

void begin_entry(const OpShape& shape, const EntryLayout& layout, uint32_t token, const int32_t* topk,
                 std::byte* entry) {
  int32_t* head = entry_table<int32_t>(entry, 0);
  head[0] = static_cast<int32_t>(token);
  head[1] = 0;
  std::fill_n(entry_table<int32_t>(entry, layout.rows_at), layout.rows, -1);
  std::memcpy(entry + layout.topk_at, topk, size_t{shape.top_k} * kInt);
}

}  // namespace

bool Entries::well_formed(const OpShape& shape, const EntryLayout& layout) const {
  if (bytes != uint64_t{count} * layout.stride) {
    return false;
  }
  for (uint32_t i = 0; i < count; ++i) {
    if (entry_token(at(layout, i)) >= shape.max_tokens) {
      return false;
    }
  }
  return true;
}

uint64_t row_nodes(const OpParams& params, const NodeView& nodes, uint32_t token) {
  uint64_t found = 0;
  if (rows_by_expert(params.shape)) {
    visit_lanes(params.shape, nodes, lane_ids(params, token), lane_rows(params, token),
                [&](uint32_t, uint32_t owner, uint32_t) { found |= uint64_t{1} << nodes.node_of[owner]; });
  } else {
    visit_ranks(params.shape, nodes, rank_rows(params, token),
                [&](uint32_t rank, uint32_t) { found |= uint64_t{1} << nodes.node_of[rank]; });
  }
  return found;
}

uint64_t pack_row(const OpParams& params, const NodeView& nodes, uint32_t node, const EntryLayout& layout,
                  const LandingRow& row, std::byte* entry) {
  const OpShape& shape = params.shape;
  begin_entry(shape, layout, row.token, row.topk, entry);
  int32_t* rows = entry_table<int32_t>(entry, layout.rows_at);
  uint64_t places = 0;
  if (rows_by_expert(shape)) {
    visit_lanes(shape, nodes, row.topk, lane_rows(params, row.token), [&](uint32_t lane, uint32_t owner, uint32_t at) {
      if (nodes.node_of[owner] == node) {
        rows[lane] = static_cast<int32_t>(at);
        places |= uint64_t{1} << nodes.index_of[owner];
      }
    });
  } else {
    visit_ranks(shape, nodes, rank_rows(params, row.token), [&](uint32_t rank, uint32_t at) {
      if (nodes.node_of[rank] == node) {
        rows[nodes.index_of[rank]] = static_cast<int32_t>(at);
        places |= uint64_t{1} << nodes.index_of[rank];
      }
    });
  }
  if (layout.weights_at != 0) {
    std::memcpy(entry + layout.weights_at, row.weights, size_t{shape.top_k} * kInt);
  }
  std::memcpy(entry + layout.payload_at, row.payload, shape.out_row_bytes);
  if (shape.payload == Payload::kFp8) {
    std::memcpy(entry + layout.side_at, row.scales, layout.side_bytes);
  } else if (layout.side_bytes != 0) {
    copy_side(shape, row.side, row.side_stride, entry_table<char>(entry, layout.side_at));
  }
  return places;
}

uint64_t landing_rows(const OpParams& params, const NodeView& nodes, std::span<const uint32_t> capacities,
                      uint32_t token) {
  const OpShape& shape = params.shape;
  uint64_t landing = 0;
  if (rows_by_expert(shape)) {
    visit_lanes(shape, nodes, lane_ids(params, token), lane_rows(params, token),
                [&](uint32_t, uint32_t owner, uint32_t row) {
                  landing += row < (is_ll(shape) ? shape.slots_per_expert : capacities[owner]) ? 1 : 0;
                });
  } else {
    visit_ranks(shape, nodes, rank_rows(params, token),
                [&](uint32_t rank, uint32_t row) { landing += row < capacities[rank] ? 1 : 0; });
  }
  return landing;
}

uint32_t pack_pull(const OpParams& params, const NodeView& nodes, uint32_t node, std::span<const uint32_t> capacities,
                   uint32_t token, std::byte* entry) {
  const OpShape& shape = params.shape;
  const EntryLayout layout = pulls_layout(shape, static_cast<uint32_t>(nodes.ranks_of[node].size()));
  int32_t* rows = entry_table<int32_t>(entry, layout.rows_at);
  uint32_t pulled = 0;
  const auto put = [&](uint32_t place, uint32_t row) {
    if (pulled++ == 0) {
      begin_entry(shape, layout, token, lane_ids(params, token), entry);
    }
    rows[place] = static_cast<int32_t>(row);
  };
  if (!rows_by_expert(shape)) {
    visit_ranks(shape, nodes, rank_rows(params, token), [&](uint32_t rank, uint32_t row) {
      if (nodes.node_of[rank] == node && row < capacities[rank]) {
        put(nodes.index_of[rank], row);
      }
    });
    return pulled;
  }
  std::array<int32_t, base::kMaxTopK> wanted;
  const int32_t* token_rows = lane_rows(params, token);
  if (is_ll(shape)) {
    wanted_lane_rows(params, token, wanted.data());
    token_rows = wanted.data();
  }
  visit_lanes(shape, nodes, lane_ids(params, token), token_rows, [&](uint32_t lane, uint32_t owner, uint32_t row) {
    const uint64_t local = static_cast<uint32_t>(lane_ids(params, token)[lane]) % shape.local_experts;
    const uint64_t slot = is_ll(shape) ? local * shape.slots_per_expert + row : row;
    if (nodes.node_of[owner] == node && slot < capacities[owner]) {
      put(lane, row);
    }
  });
  if (pulled != 0 && layout.weights_at != 0) {
    float* weights = entry_table<float>(entry, layout.weights_at);
    if (params.in.topk_weights == nullptr) {
      std::fill_n(weights, shape.top_k, 1.0f);
    } else {
      std::memcpy(weights, params.in.topk_weights + size_t{token} * shape.top_k, size_t{shape.top_k} * kInt);
    }
  }
  return pulled;
}

}  // namespace expertd::kernels::host
