// SPDX-License-Identifier: Apache-2.0
// The layout operation and the route step: both read topk_idx once, in (token, lane) order.
#include <algorithm>
#include <cstring>

#include "daemon/kernels/host/host_ops.h"
#include "daemon/kernels/host/tables.h"
#include "proto/abi/expertd_reason.h"
#include "proto/abi/ring_v1.h"

namespace expertd::kernels::host {
namespace {

/// The tables of one token while it is routed; null where the handle does not keep them.
struct TokenTables {
  int32_t* rank_rows = nullptr;    // [R]
  int32_t* expert_rows = nullptr;  // [K]
  int32_t* topk = nullptr;         // [K]
};

void store(int32_t* table, uint32_t index, int32_t value) {
  if (table != nullptr) {
    table[index] = value;
  }
}

void store_error_value(int32_t* error, int64_t value) {
  error[1] = static_cast<int32_t>(static_cast<uint64_t>(value) & 0xffffffffu);
  error[2] = static_cast<int32_t>(static_cast<uint64_t>(value) >> 32);
}

/// Keeps the first bad id of the rank, in (token, lane) order, behind the counts of its matrix row.
void note_bad_id(int32_t* error, int64_t id) {
  if (error[0] == 0) {
    error[0] = EXPERTD_REASON_EXPERT_OUT_OF_RANGE;
    store_error_value(error, id);
  }
}

/// Numbers one token's lanes per expert; returns the ranks that own at least one of them.
base::RankSet route_lanes(const OpParams& params, uint32_t token, const TokenTables& tables, int32_t* row) {
  const OpShape& shape = params.shape;
  base::RankSet owners;
  for (uint32_t lane = 0; lane < shape.top_k; ++lane) {
    store(tables.expert_rows, lane, -1);
    store(tables.topk, lane, -1);
    const int64_t id = params.in.topk_idx == nullptr ? -1 : read_expert_id(params, size_t{token} * shape.top_k + lane);
    if (id == -1) {
      continue;
    }
    if (id < 0 || id >= static_cast<int64_t>(shape.experts)) {
      note_bad_id(row + shape.ranks + shape.experts, id);
      continue;
    }
    const auto expert = static_cast<uint32_t>(id);
    store(tables.topk, lane, static_cast<int32_t>(expert));
    const uint32_t owner = expert / shape.local_experts;
    if (is_active(shape, owner)) {
      owners.add(owner);
      store(tables.expert_rows, lane, row[shape.ranks + expert]++);
    }
  }
  return owners;
}

base::RankSet mask_ranks(const OpParams& params, uint32_t token) {
  const uint8_t* mask = params.in.token_rank_mask + size_t{token} * params.shape.ranks;
  base::RankSet ranks;
  for (uint32_t rank = 0; rank < params.shape.ranks; ++rank) {
    if (mask[rank] != 0 && is_active(params.shape, rank)) {
      ranks.add(rank);
    }
  }
  return ranks;
}

/// The first id of these tokens that is neither -1 nor an expert; false when there is none.
bool find_bad_id(const OpParams& params, uint32_t token_begin, uint32_t token_end, int64_t* bad) {
  const size_t end = size_t{token_end} * params.shape.top_k;
  const size_t begin = size_t{token_begin} * params.shape.top_k;
  for (size_t lane = begin; lane < end; ++lane) {
    const int64_t id = read_expert_id(params, lane);
    if (id < -1 || id >= static_cast<int64_t>(params.shape.experts)) {
      *bad = id;
      return true;
    }
  }
  return false;
}

void add(int32_t* counts, size_t index) {
  if (counts != nullptr) {
    ++counts[index];
  }
}

/// True when an earlier lane of the token, with its owner divided by `divisor`, already led to `target`. Quadratic in
/// K, which is at most 32, and free of memory that would have to scale with the number of ranks.
bool seen_before(const OpParams& params, size_t first_lane, uint32_t lane, uint32_t divisor, uint32_t target) {
  for (uint32_t earlier = 0; earlier < lane; ++earlier) {
    const int64_t id = read_expert_id(params, first_lane + earlier);
    if (id >= 0 && id < static_cast<int64_t>(params.shape.experts) && static_cast<uint32_t>(id) / divisor == target) {
      return true;
    }
  }
  return false;
}

}  // namespace

bool layout_check(const OpParams& params, uint32_t token_begin, uint32_t token_end, OpReport* report) {
  const OpShape& shape = params.shape;
  int64_t bad = 0;
  if (find_bad_id(params, token_begin, std::min(token_end, shape.tokens), &bad)) {
    report->reason = EXPERTD_REASON_EXPERT_OUT_OF_RANGE;
    report->argument = EXPERTD_ARGUMENT_EXPERT_ID;
    report->value = bad;
    report->minimum = -1;
    report->maximum = static_cast<int64_t>(shape.experts) - 1;
    return false;
  }
  return true;
}

void layout_count(const OpParams& params, uint32_t token_begin, uint32_t token_end) {
  const OpShape& shape = params.shape;
  const uint32_t per_rank = shape.experts / shape.ranks;
  const uint32_t node_ranks = shape.ranks_per_node == 0 ? shape.ranks : shape.ranks_per_node;
  const uint32_t per_node = per_rank * node_ranks;
  auto* node_counts = reinterpret_cast<int32_t*>(params.out.layout_range);
  const auto clear = [token_begin](int32_t* counts, uint32_t entries) {
    if (counts != nullptr && token_begin == 0) {
      std::fill_n(counts, entries, 0);
    }
  };
  clear(params.out.rank_prefix, shape.ranks);
  clear(params.out.expert_counts, shape.experts);
  clear(node_counts, (shape.ranks + node_ranks - 1) / node_ranks);
  for (uint32_t token = token_begin; token < std::min(token_end, shape.tokens); ++token) {
    if (params.out.token_rank_mask != nullptr) {
      std::memset(params.out.token_rank_mask + size_t{token} * shape.ranks, 0, shape.ranks);
    }
    const size_t first_lane = size_t{token} * shape.top_k;
    for (uint32_t lane = 0; lane < shape.top_k; ++lane) {
      const int64_t id = read_expert_id(params, first_lane + lane);
      if (id < 0 || id >= static_cast<int64_t>(shape.experts)) {
        continue;  // none, or changed by the client since it was checked
      }
      const auto expert = static_cast<uint32_t>(id);
      add(params.out.expert_counts, expert);
      if (params.out.token_rank_mask != nullptr) {
        params.out.token_rank_mask[size_t{token} * shape.ranks + expert / per_rank] = 1;
      }
      if (!seen_before(params, first_lane, lane, per_rank, expert / per_rank)) {
        add(params.out.rank_prefix, expert / per_rank);
      }
      if (!seen_before(params, first_lane, lane, per_node, expert / per_node)) {
        add(node_counts, expert / per_node);
      }
    }
  }
}

void layout(const OpParams& params, OpReport* report) {
  if (layout_check(params, 0, params.shape.tokens, report)) {
    layout_count(params, 0, params.shape.tokens);
  }
}

void route_range(const OpParams& params, uint32_t token_begin, uint32_t token_end) {
  const OpShape& shape = params.shape;
  if (!is_dispatch(shape) || shape.cached != 0) {
    return;
  }
  const size_t row_ints = count_row_ints(shape.ranks, shape.experts);
  int32_t* row = params.counts + size_t{shape.rank} * row_ints;
  if (token_begin == 0) {
    std::fill_n(row, row_ints, 0);
  }
  for (uint32_t token = token_begin; token < std::min(token_end, shape.tokens); ++token) {
    const auto at = [token](int32_t* table, uint32_t width) {
      return table == nullptr ? nullptr : table + size_t{token} * width;
    };
    const TokenTables tables{at(params.routing.token_rank, shape.ranks), at(params.routing.token_expert, shape.top_k),
                             at(params.routing.topk, shape.top_k)};
    base::RankSet ranks = route_lanes(params, token, tables, row);
    if (params.in.token_rank_mask != nullptr) {
      ranks = mask_ranks(params, token);
    }
    for (uint32_t rank = 0; rank < shape.ranks; ++rank) {
      const bool goes = ranks.contains(rank);
      store(tables.rank_rows, rank, goes ? row[rank]++ : -1);
    }
  }
}

void route(const OpParams& params) {
  route_range(params, 0, params.shape.tokens);
}

void announce(const OpParams& params, uint32_t reason, int64_t value) {
  const OpShape& shape = params.shape;
  int32_t* error =
      params.counts + size_t{shape.rank} * count_row_ints(shape.ranks, shape.experts) + shape.ranks + shape.experts;
  error[0] = static_cast<int32_t>(reason);
  store_error_value(error, value);
}

}  // namespace expertd::kernels::host
