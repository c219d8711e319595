// SPDX-License-Identifier: Apache-2.0
#include "daemon/device/cuda/ht_plan.h"

#include <algorithm>
#include <limits>

#include "proto/abi/expertd_reason.h"

namespace expertd::device::cuda {

using kernels::OpKind;
using kernels::OpReport;
using kernels::OpShape;

namespace {

bool is_active(uint64_t mask, uint32_t rank) {
  return ((mask >> rank) & 1) != 0;
}

/// The counts of one slice; false when no ids can have them.
bool take_slice(const expertd_exchange_ht_counts& said, const int32_t* experts, const OpShape& shape, uint32_t slice,
                HtRow* row) {
  const uint32_t tokens =
      expertd_exchange_ht_slice(shape.tokens, slice + 1) - expertd_exchange_ht_slice(shape.tokens, slice);
  const uint64_t lanes = uint64_t{tokens} * shape.top_k;
  for (uint32_t j = 0; j < shape.ranks; ++j) {
    const int32_t count = said.rows[slice][j];
    if (count < 0 || static_cast<uint32_t>(count) > tokens) {
      return false;
    }
    row->rows[slice][j] = (slice == 0 ? 0 : row->rows[slice - 1][j]) + static_cast<uint32_t>(count);
  }
  uint64_t sum = 0;
  bool negative = false;
  for (uint32_t e = 0; e < shape.experts; ++e) {
    const int32_t count = experts[uint64_t{slice} * shape.experts + e];
    negative |= count < 0;
    sum += static_cast<uint32_t>(count);
    row->experts[e] += static_cast<uint32_t>(count);
  }
  return !negative && sum <= lanes;
}

/// The report of an operation that some rank cannot take part in.
bool find_error(const HtRows& rows, const OpShape& shape, OpReport* report) {
  for (uint32_t s = 0; s < shape.ranks; ++s) {
    if (rows[s] != nullptr && rows[s]->reason != 0 && report->reason == 0) {
      report->reason = EXPERTD_REASON_PEER_REJECTED;
      report->rank = static_cast<int32_t>(s);
    }
  }
  const HtRow& own = *rows[shape.rank];
  if (own.reason != 0) {
    report->reason = own.reason;
    report->argument = own.argument;
    report->value = own.value;
    report->rank = -1;
    if (own.reason == EXPERTD_REASON_EXPERT_OUT_OF_RANGE) {
      report->minimum = -1;
      report->maximum = int64_t{shape.experts} - 1;
    }
  }
  return report->reason != 0;
}

}  // namespace

uint64_t HtTable::base(uint32_t source, uint32_t destination) const {
  uint64_t sum = 0;
  for (uint32_t s = 0; s < source; ++s) {
    sum += rows[s][destination];
  }
  return sum;
}

HtSpan ht_span(const std::array<std::array<uint32_t, kHtRanks>, kHtSlices>& sums, uint32_t rank, uint32_t first,
               uint32_t end, uint64_t limit) {
  const uint64_t begin = first == 0 ? 0 : sums[first - 1][rank];
  const uint64_t stop = std::min<uint64_t>(sums[end - 1][rank], limit);
  return {begin, stop > begin ? stop - begin : 0};
}

uint64_t ht_rows_inside(uint64_t base, uint64_t rows, uint64_t limit) {
  return base >= limit ? 0 : std::min(rows, limit - base);
}

void ht_take_counts(const expertd_exchange_ht_counts& said, const int32_t* experts, const OpShape& shape, HtRow* row) {
  *row = {};
  bool sound = shape.ranks <= kHtRanks && shape.experts <= base::kMaxExperts;
  for (uint32_t slice = 0; slice < kHtSlices && sound; ++slice) {
    sound = take_slice(said, experts, shape, slice, row);
    const expertd_exchange_ht_error& error = said.errors[slice];
    if (error.reason == 0 || row->reason != 0) {
      continue;
    }
    sound = sound && error.reason == EXPERTD_REASON_EXPERT_OUT_OF_RANGE;
    row->reason = EXPERTD_REASON_EXPERT_OUT_OF_RANGE;
    row->argument = EXPERTD_ARGUMENT_EXPERT_ID;
    row->value = error.value;
  }
  if (!sound) {
    *row = {};
    row->reason = EXPERTD_REASON_BAD_STATE;
    row->argument = EXPERTD_ARGUMENT_EXCHANGE_BUFFER;
  }
}

HtTable ht_table(const HtRows& rows, const OpShape& shape, uint64_t active) {
  HtTable table;
  table.active = active;
  const uint32_t first = shape.rank * shape.local_experts;
  for (uint32_t s = 0; s < shape.ranks; ++s) {
    if (rows[s] == nullptr || !is_active(active, s)) {
      continue;
    }
    for (uint32_t j = 0; j < shape.ranks; ++j) {
      table.rows[s][j] = is_active(active, j) ? rows[s]->rows[kHtSlices - 1][j] : 0;
    }
    for (uint32_t slice = 0; slice < kHtSlices; ++slice) {
      table.received[slice][s] = rows[s]->rows[slice][shape.rank];
      if (s == shape.rank) {
        for (uint32_t j = 0; j < shape.ranks; ++j) {
          table.sent[slice][j] = is_active(active, j) ? rows[s]->rows[slice][j] : 0;
        }
      }
    }
    for (uint32_t e = 0; e < shape.local_experts; ++e) {
      table.experts[e] += rows[s]->experts[first + e];
    }
  }
  return table;
}

bool ht_decide(const HtRows& rows, const HtTable* table, const std::array<uint64_t, kHtRanks>& capacities,
               const OpShape& shape, OpReport* report) {
  *report = {};
  report->rank = -1;
  if (find_error(rows, shape, report)) {
    return false;
  }
  for (uint32_t j = 0; table != nullptr && j < shape.ranks; ++j) {
    if (rows[j] != nullptr && table->total(j) > capacities[j]) {
      report->reason = EXPERTD_REASON_CAPACITY_EXCEEDED;
      report->argument = EXPERTD_ARGUMENT_RECV_ROWS;
      report->value = static_cast<int64_t>(table->total(j));
      report->maximum = static_cast<int64_t>(capacities[j]);
      report->rank = static_cast<int32_t>(j);
      return false;
    }
  }
  return true;
}

void ht_fill_plan(const HtTable& table, const OpShape& shape, expertd_exchange_ht_plan* plan) {
  *plan = {};
  plan->recv_rows = static_cast<uint32_t>(table.total(shape.rank));
  plan->own_base = static_cast<uint32_t>(table.base(shape.rank, shape.rank));
  std::copy_n(table.experts.begin(), shape.local_experts, plan->expert_counts);
  for (uint32_t s = 0; s < shape.ranks; ++s) {
    for (uint32_t j = 0; j < shape.ranks; ++j) {
      plan->rank_prefix[s * shape.ranks + j] = static_cast<int32_t>(table.base(s + 1, j));
    }
  }
}

void ht_report(const HtTable& table, const std::array<uint64_t, kHtRanks>& capacities, const OpShape& shape,
               OpReport* report) {
  *report = {};
  report->rank = -1;
  const bool dispatch = shape.kind == OpKind::kDispatch;
  const uint64_t row_bytes =
      dispatch ? shape.out_row_bytes + uint64_t{shape.side_elements} * shape.side_element_bytes : 2ull * shape.hidden;
  for (uint32_t j = 0; j < shape.ranks; ++j) {
    const uint64_t rows = ht_rows_inside(table.base(shape.rank, j), table.rows[shape.rank][j],
                                         is_active(table.active, j) ? capacities[j] : 0);
    (j == shape.rank ? report->local_bytes : report->remote_bytes) += rows * row_bytes;
  }
  if (!dispatch) {
    return;
  }
  report->recv_rows = static_cast<uint32_t>(table.total(shape.rank));
  report->expert_count_entries = shape.local_experts;
  for (uint32_t e = 0; e < shape.local_experts; ++e) {
    const uint64_t alignment = std::max(shape.expert_alignment, 1u);
    report->expert_counts[e] = static_cast<uint32_t>((table.experts[e] + alignment - 1) / alignment * alignment);
  }
}

}  // namespace expertd::device::cuda
