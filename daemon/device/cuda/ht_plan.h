// SPDX-License-Identifier: Apache-2.0
// What the loops decide about a high throughput operation by copy engines: whether the counts that a client wrote can
// be true, who gets how many rows and where, and which rows a copy takes. Pure functions without CUDA, so that they are
// built and tested everywhere; any thread.
#pragma once

#include <array>
#include <cstdint>

#include "daemon/base/limits.h"
#include "daemon/kernels/op_params.h"
#include "proto/abi/exchange_ht_v1.h"

namespace expertd::device::cuda {

inline constexpr uint32_t kHtRanks = EXPERTD_EXCHANGE_RANKS_MAX;
inline constexpr uint32_t kHtSlices = EXPERTD_HT_SLICES;
inline constexpr std::array<uint32_t, EXPERTD_HT_CHUNKS> kHtChunkEnds = EXPERTD_HT_CHUNK_ENDS;

/// What a rank says of its share before anything moves: an error, or its rows. Checked; the loops share it.
struct HtRow {
  uint32_t reason = 0;  // expertd_reason
  uint32_t argument = 0;
  int64_t value = 0;
  std::array<std::array<uint32_t, kHtRanks>, kHtSlices> rows{};  // by destination, up to the end of each slice
  std::array<uint32_t, base::kMaxExperts> experts{};             // per global expert
};
using HtRows = std::array<const HtRow*, kHtRanks>;  // null for ranks that take no part

/// The routing of a dispatch as one rank needs it, also for what follows with its handle.
struct HtTable {
  uint64_t active = 0;
  std::array<std::array<uint32_t, kHtRanks>, kHtRanks> rows{};       // [source][destination]
  std::array<std::array<uint32_t, kHtRanks>, kHtSlices> sent{};      // of this rank, up to the end of each slice
  std::array<std::array<uint32_t, kHtRanks>, kHtSlices> received{};  // by source, the same of this rank's rows
  std::array<uint32_t, base::kMaxLocalExperts> experts{};            // rows per local expert

  /// The first row of a source in the output of a destination.
  uint64_t base(uint32_t source, uint32_t destination) const;
  /// Rows in the output of a destination.
  uint64_t total(uint32_t destination) const { return base(kHtRanks, destination); }
};

/// Rows one behind the other.
struct HtSpan {
  uint64_t begin = 0;
  uint64_t count = 0;
};
/// Those of slices [first, end) by the sums up to the end of each slice, of one rank; no further than `limit` rows.
HtSpan ht_span(const std::array<std::array<uint32_t, kHtRanks>, kHtSlices>& sums, uint32_t rank, uint32_t first,
               uint32_t end, uint64_t limit);
/// How many of `rows` rows that begin at `base` lie in front of row `limit`.
uint64_t ht_rows_inside(uint64_t base, uint64_t rows, uint64_t limit);

/// Takes over what a client counted of its ids (`experts` [slices, E] behind the counts); what cannot be true becomes
/// BAD_STATE about EXCHANGE_BUFFER, whatever else the counts say.
void ht_take_counts(const expertd_exchange_ht_counts& said, const int32_t* experts, const kernels::OpShape& shape,
                    HtRow* row);

HtTable ht_table(const HtRows& rows, const kernels::OpShape& shape, uint64_t active);

/// Whether rows move, decided alike by every rank; else `report` has what this rank says. `table` is null for a
/// combine, `capacities` are rows of the ranks' outputs.
bool ht_decide(const HtRows& rows, const HtTable* table, const std::array<uint64_t, kHtRanks>& capacities,
               const kernels::OpShape& shape, kernels::OpReport* report);

/// What the own client is told of a dispatch.
void ht_fill_plan(const HtTable& table, const kernels::OpShape& shape, expertd_exchange_ht_plan* plan);
/// The report of a dispatch whose outputs have `capacities` rows, and of a combine for which each rank gave
/// `capacities` rows.
void ht_report(const HtTable& table, const std::array<uint64_t, kHtRanks>& capacities, const kernels::OpShape& shape,
               kernels::OpReport* report);

}  // namespace expertd::device::cuda
