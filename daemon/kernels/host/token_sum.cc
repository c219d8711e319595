// SPDX-License-Identifier: Apache-2.0
#include "daemon/kernels/host/token_sum.h"

#include <algorithm>
#include <utility>

#include "daemon/kernels/host/tables.h"

namespace expertd::kernels::host {
namespace {

using RankOrder = std::array<uint16_t, base::kMaxRanks>;

uint32_t order_ranks(const OpShape& shape, const TokenRouting& token, RankOrder* order) {
  std::array<int32_t, base::kMaxRanks> last_lane;
  uint32_t count = 0;
  for (uint32_t rank = 0; rank < shape.ranks; ++rank) {
    if (is_active(shape, rank)) {
      (*order)[count++] = static_cast<uint16_t>(rank);
    }
  }
  if (shape.order_last_lane == 0 || token.topk == nullptr) {
    return count;
  }
  std::fill_n(last_lane.begin(), shape.ranks, -1);
  for (uint32_t lane = 0; lane < shape.top_k; ++lane) {
    const int32_t id = token.topk[lane];
    if (id >= 0) {
      last_lane[static_cast<uint32_t>(id) / shape.local_experts] = static_cast<int32_t>(lane);
    }
  }
  std::sort(order->begin(), order->begin() + count,
            [&last_lane](uint16_t a, uint16_t b) { return std::pair(last_lane[a], a) < std::pair(last_lane[b], b); });
  return count;
}

const uint16_t* row_at(const OpShape& shape, const PeerView& peer, uint64_t row) {
  return static_cast<const uint16_t*>(peer.in_x) + row * shape.hidden;
}

/// Collects a rank's row of a whole token and adds its weights.
void take_rank_row(const OpShape& shape, const PeerView& peer, const TokenRouting& token, uint32_t rank,
                   TokenRows* rows) {
  const int32_t row = token.rank_rows[rank];
  // The table is the daemon's, but how many rows stand behind in_x is the peer client's word: never read past it.
  if (row < 0 || static_cast<uint32_t>(row) >= peer.in_rows) {
    return;
  }
  rows->row[rows->rows++] = {row_at(shape, peer, static_cast<uint64_t>(row)), 1.0f, rank};
  if (token.weights != nullptr && peer.in_topk_weights != nullptr) {
    const float* in = peer.in_topk_weights + static_cast<uint64_t>(row) * shape.top_k;
    for (uint32_t lane = 0; lane < shape.top_k; ++lane) {
      token.weights[lane] += in[lane];
    }
  }
}

/// Collects the rows that a rank's experts made of a token, in lane order, and takes their weights.
void take_expert_rows(const OpShape& shape, const PeerView& peer, const TokenRouting& token, uint32_t rank,
                      TokenRows* rows) {
  for (uint32_t lane = 0; lane < shape.top_k; ++lane) {
    const int32_t id = token.topk[lane];
    const int32_t row = token.lane_rows[lane];
    if (id < 0 || row < 0 || static_cast<uint32_t>(id) / shape.local_experts != rank ||
        static_cast<uint32_t>(row) >= peer.in_rows) {
      continue;
    }
    rows->row[rows->rows++] = {row_at(shape, peer, static_cast<uint64_t>(row)), 1.0f, rank};
    if (token.weights != nullptr && peer.in_topk_weights != nullptr) {
      token.weights[lane] = peer.in_topk_weights[row];
    }
  }
}

}  // namespace

void count_pulled(const OpShape& shape, uint32_t rank, uint32_t rows, OpReport* report) {
  (rank == shape.rank ? report->local_bytes : report->remote_bytes) += uint64_t{rows} * shape.hidden * 2;
}

void collect_rows(const OpShape& shape, const PeerView* peers, const TokenRouting& token, TokenRows* rows,
                  OpReport* report) {
  RankOrder order;
  rows->rows = 0;
  rows->groups = 0;
  const uint32_t count = order_ranks(shape, token, &order);
  for (uint32_t i = 0; i < count; ++i) {
    const uint32_t before = rows->rows;
    if (shape.expanded != 0) {
      take_expert_rows(shape, peers[order[i]], token, order[i], rows);
    } else {
      take_rank_row(shape, peers[order[i]], token, order[i], rows);
    }
    if (rows->rows == before) {
      continue;
    }
    rows->group_end[rows->groups++] = rows->rows;
    if (report != nullptr) {
      count_pulled(shape, order[i], rows->rows - before, report);
    }
  }
}

void collect_lanes(const OpShape& shape, const PeerView* peers, const TokenRouting& token, TokenRows* rows,
                   OpReport* report) {
  rows->rows = 0;
  for (uint32_t lane = 0; lane < shape.top_k; ++lane) {
    const int32_t id = token.topk[lane];
    const int32_t row = token.lane_rows[lane];
    if (id < 0 || row < 0) {
      continue;
    }
    const uint32_t rank = static_cast<uint32_t>(id) / shape.local_experts;
    const uint64_t slot =
        uint64_t{static_cast<uint32_t>(id) % shape.local_experts} * shape.slots_per_expert + static_cast<uint32_t>(row);
    if (!is_active(shape, rank) || slot >= peers[rank].in_rows) {
      continue;
    }
    const float weight = token.lane_weights == nullptr ? 1.0f : token.lane_weights[lane];
    uint32_t place = rows->rows++;
    for (; place != 0 && rows->row[place - 1].rank > rank; --place) {
      rows->row[place] = rows->row[place - 1];
    }
    rows->row[place] = {row_at(shape, peers[rank], slot), weight, rank};
    if (report != nullptr) {
      count_pulled(shape, rank, 1, report);
    }
  }
}

}  // namespace expertd::kernels::host
