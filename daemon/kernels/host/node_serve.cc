// SPDX-License-Identifier: Apache-2.0
// What a rank sums on behalf of a rank of another node: the rows that a token has at the ranks of this node.
#include <algorithm>
#include <array>
#include <cstring>

#include "daemon/kernels/host/node_ops.h"
#include "daemon/kernels/host/tables.h"
#include "daemon/kernels/host/token_sum.h"

namespace expertd::kernels::host {
namespace {

bool ids_in_range(const OpShape& shape, const int32_t* topk) {
  return std::all_of(topk, topk + shape.top_k,
                     [&](int32_t id) { return id >= -1 && id < static_cast<int32_t>(shape.experts); });
}

/// Whether a row is one that the peer has; whoever pulls it knows how many those are.
bool has_row(const OpShape& shape, const NodeView& nodes, const PeerView* peers, uint32_t rank, uint64_t row) {
  return is_active(shape, rank) && nodes.is_local(rank) && row < peers[rank].in_rows;
}

/// Row numbers per place become row numbers per rank.
bool take_rank_rows(const OpShape& shape, const NodeView& nodes, const PeerView* peers, const int32_t* rows,
                    int32_t* rank_rows) {
  std::fill_n(rank_rows, shape.ranks, -1);
  const std::vector<uint32_t>& local = nodes.ranks_of[nodes.own_node];
  for (size_t place = 0; place < local.size(); ++place) {
    if (rows[place] < 0) {
      continue;
    }
    if (!has_row(shape, nodes, peers, local[place], static_cast<uint32_t>(rows[place]))) {
      return false;
    }
    rank_rows[local[place]] = rows[place];
  }
  return true;
}

bool lane_rows_exist(const OpShape& shape, const NodeView& nodes, const PeerView* peers, const TokenRouting& token) {
  for (uint32_t lane = 0; lane < shape.top_k; ++lane) {
    if (token.lane_rows[lane] < 0) {
      continue;
    }
    if (token.topk[lane] < 0) {
      return false;
    }
    const uint32_t expert = static_cast<uint32_t>(token.topk[lane]);
    const auto row = static_cast<uint32_t>(token.lane_rows[lane]);
    const uint64_t slot = uint64_t{expert % shape.local_experts} * shape.slots_per_expert + row;
    if (!has_row(shape, nodes, peers, expert / shape.local_experts, is_ll(shape) ? slot : row)) {
      return false;
    }
  }
  return true;
}

}  // namespace

bool serve_pull(const OpShape& shape, const NodeView& nodes, const PeerView* peers, const MessageHead& head,
                const std::byte* pull, std::byte* sum) {
  const EntryLayout layout = pulls_layout(shape, static_cast<uint32_t>(nodes.ranks_of[nodes.own_node].size()));
  const EntryLayout out = sums_layout(shape, head);
  std::array<int32_t, base::kMaxRanks> rank_rows;
  TokenRouting token;
  token.rank_rows = rank_rows.data();
  token.lane_rows = entry_table<const int32_t>(pull, layout.rows_at);
  token.topk = entry_table<const int32_t>(pull, layout.topk_at);
  if (!ids_in_range(shape, token.topk) ||
      (rows_by_expert(shape) ? !lane_rows_exist(shape, nodes, peers, token)
                             : !take_rank_rows(shape, nodes, peers, token.lane_rows, rank_rows.data()))) {
    return false;
  }
  int32_t* sum_head = entry_table<int32_t>(sum, 0);
  sum_head[0] = *entry_table<const int32_t>(pull, 0);
  sum_head[1] = 0;
  if (out.weights_at != 0) {
    token.weights = entry_table<float>(sum, out.weights_at);
    std::fill_n(token.weights, shape.top_k, 0.0f);
  }
  TokenRows rows;
  auto* summed = entry_table<uint16_t>(sum, out.payload_at);
  if (is_ll(shape)) {
    token.lane_weights = entry_table<const float>(pull, layout.weights_at);
    collect_lanes(shape, peers, token, &rows, nullptr);
    sum_lanes(shape, rows, {}, summed);
    return true;
  }
  OpShape ordered = shape;  // the order is the puller's choice
  ordered.order_last_lane = (head.flags & kMessageLastLane) != 0 ? 1 : 0;
  collect_rows(ordered, peers, token, &rows, nullptr);
  sum_rows(shape, rows, {}, summed);
  return true;
}

}  // namespace expertd::kernels::host
