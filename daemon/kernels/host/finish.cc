// SPDX-License-Identifier: Apache-2.0
// The finish step: what a destination can write only after all rows arrived, from the matrix and its own outputs alone.
#include <algorithm>
#include <array>
#include <cstring>

#include "daemon/kernels/host/host_ops.h"
#include "daemon/kernels/host/tables.h"

namespace expertd::kernels::host {
namespace {

/// Index -1 and weight 0 for the rows of [begin, end) that lie in `window`, of this rank's outputs.
void clear_rows(const OpParams& params, const RowRange& window, uint64_t begin, uint64_t end) {
  const OpShape& shape = params.shape;
  const uint64_t width = shape.expanded != 0 ? 1 : shape.top_k;
  const uint64_t last = std::min({end, window.end, uint64_t{shape.capacity_rows}});
  begin = std::max(begin, window.begin);
  if (begin >= last) {
    return;
  }
  if (params.out.topk_idx != nullptr) {
    // -1 is all ones in either width.
    std::memset(static_cast<char*>(params.out.topk_idx) + begin * width * shape.topk_idx_bytes, 0xff,
                (last - begin) * width * shape.topk_idx_bytes);
  }
  if (params.out.topk_weights != nullptr) {
    std::fill(params.out.topk_weights + begin * width, params.out.topk_weights + last * width, 0.0f);
  }
}

void clear_gaps(const OpParams& params, const int32_t* matrix, const RowRange& window) {
  const OpShape& shape = params.shape;
  uint64_t start = 0;
  for (uint32_t local = 0; start < window.end && local < shape.local_experts; ++local) {
    const uint64_t rows = expert_rows(shape, matrix, shape.rank * shape.local_experts + local, shape.ranks);
    const uint64_t end = start + round_up(rows, shape.expert_alignment);
    clear_rows(params, window, start + rows, end);
    start = end;
  }
}

void store_prefix(const OpParams& params, const int32_t* matrix) {
  const OpShape& shape = params.shape;
  // Client memory: what is added up is kept beside it.
  std::array<uint32_t, base::kMaxRanks> sums{};
  for (uint32_t source = 0; params.out.rank_prefix != nullptr && source < shape.ranks; ++source) {
    const int32_t* row = matrix_row(shape, matrix, source);
    for (uint32_t rank = 0; rank < shape.ranks; ++rank) {
      sums[rank] += static_cast<uint32_t>(row[rank]);
      params.out.rank_prefix[size_t{source} * shape.ranks + rank] = static_cast<int32_t>(sums[rank]);
    }
  }
}

/// LL: where each source's rows of each expert stand, and the cumulative statistics.
void store_ranges(const OpParams& params, const int32_t* matrix) {
  const OpShape& shape = params.shape;
  for (uint32_t local = 0; local < shape.local_experts; ++local) {
    const uint32_t expert = shape.rank * shape.local_experts + local;
    uint64_t begin = 0;
    for (uint32_t source = 0; source < shape.ranks; ++source) {
      const auto count = static_cast<uint32_t>(matrix_row(shape, matrix, source)[shape.ranks + expert]);
      if (params.out.layout_range != nullptr) {
        params.out.layout_range[size_t{local} * shape.ranks + source] = static_cast<int64_t>(begin << 32 | count);
      }
      begin += count;
    }
    if (params.out.stats != nullptr) {
      // Client memory: whatever it holds, the addition must be defined.
      const auto before = static_cast<uint32_t>(params.out.stats[local]);
      params.out.stats[local] = static_cast<int32_t>(before + static_cast<uint32_t>(begin));
    }
  }
}

}  // namespace

void finish_counts(const OpParams& params, OpReport* report) {
  const OpShape& shape = params.shape;
  if (!is_dispatch(shape) || report->reason != 0) {
    return;
  }
  const int32_t* matrix = matrix_of(params);
  const uint64_t rows = received_rows(shape, Totals(shape, matrix), shape.rank);
  report->recv_rows = static_cast<uint32_t>(rows);
  report->expert_count_entries = std::min(shape.local_experts, base::kMaxLocalExperts);
  for (uint32_t local = 0; local < report->expert_count_entries; ++local) {
    const uint64_t count = expert_rows(shape, matrix, shape.rank * shape.local_experts + local, shape.ranks);
    report->expert_counts[local] = static_cast<uint32_t>(round_up(count, is_ll(shape) ? 1 : shape.expert_alignment));
    if (params.out.expert_counts != nullptr) {
      params.out.expert_counts[local] = static_cast<int32_t>(count);
    }
  }
  store_prefix(params, matrix);
  if (is_ll(shape)) {
    store_ranges(params, matrix);
  }
  if (shape.cached == 0 && params.routing.counts != nullptr && params.routing.counts != params.counts) {
    std::memcpy(params.routing.counts, params.counts,
                size_t{shape.ranks} * count_row_ints(shape.ranks, shape.experts) * sizeof(int32_t));
  }
}

RowRange rows_to_clear(const OpParams& params, const OpReport& report) {
  const OpShape& shape = params.shape;
  // With a handle the first dispatch wrote the indices, and they still hold; low-latency rows have none.
  if (shape.kind != OpKind::kDispatch || shape.cached != 0 || report.reason != 0) {
    return {};
  }
  return {shape.expanded != 0 ? 0U : report.recv_rows,
          shape.worst_tokens != 0 ? shape.capacity_rows : report.recv_rows};
}

void finish_rows(const OpParams& params, const OpReport& report, const RowRange& window) {
  const OpShape& shape = params.shape;
  if (shape.expanded != 0) {
    clear_gaps(params, matrix_of(params), window);
  }
  if (shape.worst_tokens != 0) {
    clear_rows(params, window, report.recv_rows, shape.capacity_rows);
  }
}

void finish(const OpParams& params, const PeerView* /*peers*/, OpReport* report) {
  finish_counts(params, report);
  finish_rows(params, *report, rows_to_clear(params, *report));
}

}  // namespace expertd::kernels::host
