// SPDX-License-Identifier: Apache-2.0
// Combine, high throughput and low latency: pulls the rows that this rank's tokens have at their destinations and sums
// them in float32, 128 channels at a time, so that the sums stay in the first-level cache while every source row is
// read once.
#include <algorithm>
#include <array>
#include <utility>

#include "daemon/kernels/host/tables.h"
#include "daemon/kernels/numerics.h"

namespace expertd::kernels::host {
namespace {

constexpr uint32_t kBlock = 128;  // H is a multiple of it, so that the inner loops have a constant length

/// Rows of one token, in the order in which they are added. A group is what one rank contributes: one row, or the rows
/// of its experts in the expanded form.
struct TokenRows {
  struct Row {
    const uint16_t* data;
    float weight;
    uint32_t rank;
  };
  uint32_t groups = 0;
  uint32_t rows = 0;
  std::array<uint32_t, base::kMaxLocalRanks> group_end;
  std::array<Row, base::kMaxLocalRanks> row;
};
static_assert(base::kMaxLocalRanks >= base::kMaxTopK, "a token has at most one row per rank or per lane");

void add_block(const uint16_t* __restrict in, float* __restrict sum) {
  for (uint32_t i = 0; i < kBlock; ++i) {
    sum[i] += bf16_to_float(in[i]);
  }
}

void add_weighted_block(const uint16_t* __restrict in, float weight, float* __restrict sum) {
  for (uint32_t i = 0; i < kBlock; ++i) {
    sum[i] += weight * bf16_to_float(in[i]);
  }
}

/// Adds a partial sum as it would cross the wire: rounded to bf16 once.
void add_rounded_block(const float* __restrict partial, float* __restrict sum) {
  for (uint32_t i = 0; i < kBlock; ++i) {
    sum[i] += bf16_to_float(float_to_bf16(partial[i]));
  }
}

void store_block(const float* __restrict sum, uint16_t* __restrict out) {
  for (uint32_t i = 0; i < kBlock; ++i) {
    out[i] = float_to_bf16(sum[i]);
  }
}

void begin_block(const uint16_t* bias0, const uint16_t* bias1, uint32_t at, float* __restrict sum) {
  if (bias0 == nullptr) {
    std::fill_n(sum, kBlock, 0.0f);
  } else {
    for (uint32_t i = 0; i < kBlock; ++i) {
      sum[i] = bf16_to_float(bias0[at + i]);
    }
  }
  if (bias1 != nullptr) {
    add_block(bias1 + at, sum);
  }
}

const uint16_t* bias_row(const void* bias, const OpShape& shape, uint32_t token) {
  return bias == nullptr ? nullptr : static_cast<const uint16_t*>(bias) + size_t{token} * shape.hidden;
}

void combine_rows(const OpParams& params, uint32_t token, const TokenRows& rows) {
  const OpShape& shape = params.shape;
  auto* out = static_cast<uint16_t*>(params.out.x) + size_t{token} * shape.hidden;
  const uint16_t* bias0 = bias_row(params.in.bias0, shape, token);
  const uint16_t* bias1 = bias_row(params.in.bias1, shape, token);
  alignas(64) std::array<float, kBlock> sum;
  alignas(64) std::array<float, kBlock> partial;
  for (uint32_t at = 0; at < shape.hidden; at += kBlock) {
    begin_block(bias0, bias1, at, sum.data());
    if (shape.expanded == 0) {
      for (uint32_t row = 0; row < rows.rows; ++row) {
        add_block(rows.row[row].data + at, sum.data());
      }
    } else {
      uint32_t row = 0;
      for (uint32_t group = 0; group < rows.groups; ++group) {
        std::fill_n(partial.data(), kBlock, 0.0f);
        for (; row < rows.group_end[group]; ++row) {
          add_block(rows.row[row].data + at, partial.data());
        }
        add_rounded_block(partial.data(), sum.data());
      }
    }
    store_block(sum.data(), out + at);
  }
}

/// The active ranks of the group in the order of their sums. A rank without a lane of its own (a mask can send a token
/// anywhere) comes first, by number.
uint32_t order_ranks(const OpParams& params, uint32_t token, std::array<uint8_t, base::kMaxLocalRanks>* order) {
  const OpShape& shape = params.shape;
  std::array<int32_t, base::kMaxLocalRanks> last_lane;
  uint32_t count = 0;
  for (uint32_t rank = 0; rank < shape.ranks; ++rank) {
    if (is_active(shape, rank)) {
      (*order)[count++] = static_cast<uint8_t>(rank);
    }
  }
  if (shape.order_last_lane == 0 || params.routing.topk == nullptr) {
    return count;
  }
  std::fill_n(last_lane.begin(), shape.ranks, -1);
  for (uint32_t lane = 0; lane < shape.top_k; ++lane) {
    const int32_t id = params.routing.topk[size_t{token} * shape.top_k + lane];
    if (id >= 0) {
      last_lane[static_cast<uint32_t>(id) / shape.local_experts] = static_cast<int32_t>(lane);
    }
  }
  std::sort(order->begin(), order->begin() + count,
            [&last_lane](uint8_t a, uint8_t b) { return std::pair(last_lane[a], a) < std::pair(last_lane[b], b); });
  return count;
}

const uint16_t* row_at(const OpShape& shape, const PeerView& peer, uint64_t row) {
  return static_cast<const uint16_t*>(peer.in_x) + row * shape.hidden;
}

/// Collects a rank's row of a whole token and adds its weights.
void take_rank_row(const OpParams& params, const PeerView& peer, uint32_t token, uint32_t rank, TokenRows* rows) {
  const OpShape& shape = params.shape;
  const int32_t row = params.routing.token_rank[size_t{token} * shape.ranks + rank];
  // The table is the daemon's, but how many rows stand behind in_x is the peer client's word: never read past it.
  if (row < 0 || static_cast<uint32_t>(row) >= peer.in_rows) {
    return;
  }
  rows->row[rows->rows++] = {row_at(shape, peer, static_cast<uint64_t>(row)), 1.0f, rank};
  if (params.out.topk_weights != nullptr && peer.in_topk_weights != nullptr) {
    float* out = params.out.topk_weights + size_t{token} * shape.top_k;
    const float* in = peer.in_topk_weights + static_cast<uint64_t>(row) * shape.top_k;
    for (uint32_t lane = 0; lane < shape.top_k; ++lane) {
      out[lane] += in[lane];
    }
  }
}

/// Collects the rows that a rank's experts made of a token, in lane order, and takes their weights.
void take_expert_rows(const OpParams& params, const PeerView& peer, uint32_t token, uint32_t rank, TokenRows* rows) {
  const OpShape& shape = params.shape;
  for (uint32_t lane = 0; lane < shape.top_k; ++lane) {
    const size_t at = size_t{token} * shape.top_k + lane;
    const int32_t id = params.routing.topk[at];
    const int32_t row = params.routing.token_expert[at];
    if (id < 0 || row < 0 || static_cast<uint32_t>(id) / shape.local_experts != rank ||
        static_cast<uint32_t>(row) >= peer.in_rows) {
      continue;
    }
    rows->row[rows->rows++] = {row_at(shape, peer, static_cast<uint64_t>(row)), 1.0f, rank};
    if (params.out.topk_weights != nullptr && peer.in_topk_weights != nullptr) {
      params.out.topk_weights[at] = peer.in_topk_weights[row];
    }
  }
}

void count_pulled(const OpShape& shape, uint32_t rank, uint32_t rows, OpReport* report) {
  (rank == shape.rank ? report->local_bytes : report->remote_bytes) += uint64_t{rows} * shape.hidden * 2;
}

/// Collects the rows of one token's lanes with their weights, rank by rank and in a rank lane by lane; at most one per
/// lane.
void take_weighted_rows(const OpParams& params, const PeerView* peers, uint32_t token, TokenRows* rows,
                        OpReport* report) {
  const OpShape& shape = params.shape;
  for (uint32_t lane = 0; lane < shape.top_k; ++lane) {
    const size_t at = size_t{token} * shape.top_k + lane;
    // The caller's ids may take lanes away, but which expert a row belongs to is the handle's knowledge.
    const int32_t id = params.routing.topk[at];
    const int32_t row = params.routing.token_expert[at];
    if (id < 0 || row < 0 || (params.in.topk_idx != nullptr && read_expert_id(params, at) < 0)) {
      continue;
    }
    const uint32_t rank = static_cast<uint32_t>(id) / shape.local_experts;
    const uint64_t slot =
        uint64_t{static_cast<uint32_t>(id) % shape.local_experts} * shape.slots_per_expert + static_cast<uint32_t>(row);
    if (!is_active(shape, rank) || slot >= peers[rank].in_rows) {
      continue;
    }
    const float weight = params.in.topk_weights == nullptr ? 1.0f : params.in.topk_weights[at];
    uint32_t place = rows->rows++;
    for (; place != 0 && rows->row[place - 1].rank > rank; --place) {
      rows->row[place] = rows->row[place - 1];
    }
    rows->row[place] = {row_at(shape, peers[rank], slot), weight, rank};
    count_pulled(shape, rank, 1, report);
  }
}

}  // namespace

void combine_range(const OpParams& params, const PeerView* peers, uint32_t token_begin, uint32_t token_end,
                   OpReport* report) {
  const OpShape& shape = params.shape;
  TokenRows rows;
  std::array<uint8_t, base::kMaxLocalRanks> order;
  for (uint32_t token = token_begin; token < token_end; ++token) {
    if (params.out.topk_weights != nullptr) {
      std::fill_n(params.out.topk_weights + size_t{token} * shape.top_k, shape.top_k, 0.0f);
    }
    rows.rows = 0;
    rows.groups = 0;
    const uint32_t count = order_ranks(params, token, &order);
    for (uint32_t i = 0; i < count; ++i) {
      const uint32_t before = rows.rows;
      if (shape.expanded != 0) {
        take_expert_rows(params, peers[order[i]], token, order[i], &rows);
      } else {
        take_rank_row(params, peers[order[i]], token, order[i], &rows);
      }
      if (rows.rows != before) {
        rows.group_end[rows.groups++] = rows.rows;
        count_pulled(shape, order[i], rows.rows - before, report);
      }
    }
    combine_rows(params, token, rows);
  }
}

void ll_combine_range(const OpParams& params, const PeerView* peers, uint32_t token_begin, uint32_t token_end,
                      OpReport* report) {
  const OpShape& shape = params.shape;
  TokenRows rows;
  alignas(64) std::array<float, kBlock> sum;
  alignas(64) std::array<float, kBlock> partial;
  for (uint32_t token = token_begin; token < token_end; ++token) {
    rows.rows = 0;
    take_weighted_rows(params, peers, token, &rows, report);
    auto* out = static_cast<uint16_t*>(params.out.x) + size_t{token} * shape.hidden;
    for (uint32_t at = 0; at < shape.hidden; at += kBlock) {
      std::fill_n(sum.data(), kBlock, 0.0f);
      for (uint32_t row = 0; row < rows.rows;) {
        const uint32_t rank = rows.row[row].rank;
        std::fill_n(partial.data(), kBlock, 0.0f);
        for (; row < rows.rows && rows.row[row].rank == rank; ++row) {
          add_weighted_block(rows.row[row].data + at, rows.row[row].weight, partial.data());
        }
        add_rounded_block(partial.data(), sum.data());
      }
      store_block(sum.data(), out + at);
    }
  }
}

}  // namespace expertd::kernels::host
