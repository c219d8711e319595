// SPDX-License-Identifier: Apache-2.0
// How the host operations read their tables: ids, masks, the count matrix and the row bases that follow from it. Pure
// inline functions for the files of this folder; called wherever those are.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

#include "daemon/base/limits.h"
#include "daemon/kernels/op_params.h"

namespace expertd::kernels::host {

inline bool is_active(const OpShape& shape, uint32_t rank) {
  return shape.active_ranks.contains(rank);
}

inline bool is_ll(const OpShape& shape) {
  return shape.kind == OpKind::kLlDispatch || shape.kind == OpKind::kLlCombine;
}

inline bool is_dispatch(const OpShape& shape) {
  return shape.kind == OpKind::kDispatch || shape.kind == OpKind::kLlDispatch;
}

/// True when rows are numbered per expert (LL, expanded) and not per rank.
inline bool rows_by_expert(const OpShape& shape) {
  return is_ll(shape) || shape.expanded != 0;
}

/// One id of the client's topk_idx. The client may write while we read, so the value is fetched exactly once and what
/// was checked is what is used.
inline int64_t read_expert_id(const OpParams& params, size_t index) {
  if (params.shape.topk_idx_bytes == 4) {
    return static_cast<const volatile int32_t*>(params.in.topk_idx)[index];
  }
  return static_cast<const volatile int64_t*>(params.in.topk_idx)[index];
}

/// LL combine: the rows of a token's lanes, -1 for lanes that the caller's ids take away. Which expert a row belongs to
/// is the handle's knowledge.
inline void wanted_lane_rows(const OpParams& params, uint32_t token, int32_t* rows) {
  const size_t first_lane = size_t{token} * params.shape.top_k;
  for (uint32_t lane = 0; lane < params.shape.top_k; ++lane) {
    const bool taken = params.in.topk_idx != nullptr && read_expert_id(params, first_lane + lane) < 0;
    rows[lane] = taken ? -1 : params.routing.token_expert[first_lane + lane];
  }
}

/// The matrix a dispatch goes by: that of the handle when cached.
inline const int32_t* matrix_of(const OpParams& params) {
  return params.shape.cached != 0 ? params.routing.counts : params.counts;
}

inline const int32_t* matrix_row(const OpShape& shape, const int32_t* matrix, uint32_t source) {
  return matrix + static_cast<size_t>(source) * count_row_ints(shape.ranks, shape.experts);
}

/// Rows of an expert (by global id) over all sources, or over the sources before `source_end`.
inline uint64_t expert_rows(const OpShape& shape, const int32_t* matrix, uint32_t expert, uint32_t source_end) {
  uint64_t rows = 0;
  for (uint32_t source = 0; source < source_end; ++source) {
    rows += static_cast<uint32_t>(matrix_row(shape, matrix, source)[shape.ranks + expert]);
  }
  return rows;
}

/// Adds columns [first, first + count) of the rows of sources before `source_end` to `sums`. Row by row: a column has
/// one number in every few kilobytes, and with many ranks reading those alone would miss the cache each time.
inline void add_columns(const OpShape& shape, const int32_t* matrix, uint32_t first, uint32_t count,
                        uint32_t source_end, uint32_t* __restrict sums) {
  for (uint32_t source = 0; source < source_end; ++source) {
    const int32_t* __restrict row = matrix_row(shape, matrix, source) + first;
    for (uint32_t i = 0; i < count; ++i) {
      sums[i] += static_cast<uint32_t>(row[i]);
    }
  }
}
static_assert(uint64_t{base::kMaxRanks} * base::kMaxTokens * base::kMaxTopK <= uint64_t{1} << 31, "sums fit 32 bits");

inline uint64_t round_up(uint64_t rows, uint32_t alignment) {
  return alignment <= 1 ? rows : (rows + alignment - 1) / alignment * alignment;
}

/// What every rank (or every expert, where rows are numbered by those) gets of all sources.
struct Totals {
  std::array<uint32_t, base::kMaxExperts> rows;
  Totals(const OpShape& shape, const int32_t* matrix) {
    const uint32_t count = rows_by_expert(shape) ? shape.experts : shape.ranks;
    std::fill_n(rows.begin(), count, 0U);
    add_columns(shape, matrix, rows_by_expert(shape) ? shape.ranks : 0, count, shape.ranks, rows.data());
  }
};
static_assert(base::kMaxRanks <= base::kMaxExperts);

/// Rows that a rank receives: tokens, or with the expanded form the aligned rows of its experts.
inline uint64_t received_rows(const OpShape& shape, const Totals& totals, uint32_t rank) {
  if (!rows_by_expert(shape)) {
    return totals.rows[rank];
  }
  uint64_t rows = 0;
  for (uint32_t expert = rank * shape.local_experts; expert < (rank + 1) * shape.local_experts; ++expert) {
    rows += round_up(totals.rows[expert], is_ll(shape) ? 1 : shape.expert_alignment);
  }
  return rows;
}

/// Where this rank's first row for each destination stands.
struct Bases {
  std::array<uint32_t, base::kMaxRanks> rank;
  std::array<uint32_t, base::kMaxExperts> expert;
};

/// Bytes of a row as it lands: payload and what travels beside it.
inline uint64_t landed_row_bytes(const OpShape& shape) {
  if (shape.payload == Payload::kFp8) {
    const uint64_t groups = shape.hidden / 128;
    return shape.out_row_bytes + (shape.scale == ScaleForm::kUe8m0 ? groups : groups * sizeof(float));
  }
  return shape.out_row_bytes + uint64_t{shape.side_elements} * shape.side_element_bytes;
}

/// Quantises one row of bf16 to `payload` [hidden] and one scale per 128 channels.
void quantise_row(const uint16_t* row, uint32_t hidden, ScaleForm form, uint8_t* payload, float* scales);

}  // namespace expertd::kernels::host
