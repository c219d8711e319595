// SPDX-License-Identifier: Apache-2.0
// The rows that a token has at the ranks of this node, and their sum: for the rank whose token it is, or on behalf of a
// rank of another node. Sums are made 128 channels at a time, so that they stay in the first-level cache while every
// source row is read once. Pure functions; loop threads.
#pragma once

#include <array>
#include <cstdint>
#include <span>

#include "daemon/base/limits.h"
#include "daemon/kernels/op_params.h"

namespace expertd::kernels::host {

/// Rows of one token, in the order in which they are added. A group is what one rank contributes: one row, or the rows
/// of its experts in the expanded form and in LL. Ranks of other nodes have no rows here.
struct TokenRows {
  struct Row {
    const uint16_t* data;
    float weight;
    uint32_t rank;
  };
  uint32_t groups = 0;
  uint32_t rows = 0;
  std::array<uint32_t, base::kMaxRanks> group_end;
  std::array<Row, base::kMaxRanks> row;
};
static_assert(base::kMaxRanks >= base::kMaxTopK, "a token has at most one row per rank or per lane");

/// One token's tables: a handle's, or those of a message.
struct TokenRouting {
  const int32_t* rank_rows = nullptr;   // [R]; -1: none
  const int32_t* lane_rows = nullptr;   // [K]; -1: none
  const int32_t* topk = nullptr;        // [K] global ids; -1: none
  const float* lane_weights = nullptr;  // [K], LL; null: all are 1
  float* weights = nullptr;             // [K], zeroes at first: where the weights of the rows go; null: not wanted
};

/// Bytes pulled from the own rank and from others.
void count_pulled(const OpShape& shape, uint32_t rank, uint32_t rows, OpReport* report);

/// Collects a token's rows and weights from the active ranks, in the order of their sums: by number, or with
/// shape.order_last_lane by the token's last lane of each; ranks without a lane of their own (a mask can send a token
/// anywhere) come first, by number. Rows behind a peer's in_rows are left out. `report` is null where nobody counts.
void collect_rows(const OpShape& shape, const PeerView* peers, const TokenRouting& token, TokenRows* rows,
                  OpReport* report);
/// LL: rank by rank and in a rank lane by lane; at most one row per lane.
void collect_lanes(const OpShape& shape, const PeerView* peers, const TokenRouting& token, TokenRows* rows,
                   OpReport* report);

/// What is added before and behind a token's rows; each [H] bf16.
struct SumTerms {
  const uint16_t* bias0 = nullptr;
  const uint16_t* bias1 = nullptr;
  std::span<const uint16_t* const> partials;
};
/// Rows unweighted, and in the expanded form a rank's rows rounded to bf16 before they are added.
void sum_rows(const OpShape& shape, const TokenRows& rows, const SumTerms& terms, uint16_t* out);
/// LL: rows weighted, a rank's rows rounded before they are added.
void sum_lanes(const OpShape& shape, const TokenRows& rows, const SumTerms& terms, uint16_t* out);

}  // namespace expertd::kernels::host
