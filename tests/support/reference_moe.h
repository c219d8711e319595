// SPDX-License-Identifier: Apache-2.0
// The executable form of what each operation computes: plain, unoptimised C++ that takes the inputs of all ranks at
// once and yields every output. It shares types with daemon/kernels/op_params.h and nothing else: conversions,
// numbering and sums are written a second time here, by building lists instead of by prefix sums, so that an error in
// the kernels is not repeated. Pure functions, any thread, tests only.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "daemon/kernels/op_params.h"

namespace expertd::support {

/// Conversions written by search and by decomposition, independent of daemon/kernels/numerics.h.
float reference_bf16_to_float(uint16_t value);
uint16_t reference_float_to_bf16(float value);
float reference_e4m3_to_float(uint8_t code);
uint8_t reference_float_to_e4m3(float value);

/// One quantised row of bf16: payload bytes, one scale per 128 channels, and the scales' exponent bytes (UE8M0 only).
struct QuantisedRow {
  std::vector<uint8_t> payload;
  std::vector<float> scales;
  std::vector<uint8_t> exponents;
};
QuantisedRow reference_quantise(const uint16_t* row, uint32_t hidden, kernels::ScaleForm form);

/// Inputs of one rank; an empty vector means "not given". `side` is already row-major, whatever strides the operation
/// under test uses; `topk_idx` holds the values whatever their width.
struct RankInput {
  uint32_t tokens = 0;
  std::vector<uint8_t> x;                // [T] rows of row_bytes
  std::vector<int64_t> topk_idx;         // [T,K]
  std::vector<float> topk_weights;       // [T,K]
  std::vector<uint8_t> side;             // [T] rows of side_elements * side_element_bytes
  std::vector<uint8_t> token_rank_mask;  // [T,R]
  std::vector<uint16_t> bias0;           // combine [T,H]
  std::vector<uint16_t> bias1;           // combine [T,H]
};

/// Where a received row comes from; source -1 is an alignment gap of the expanded form. `lane` is -1 for whole tokens.
struct RowOrigin {
  int32_t source = -1;
  int32_t token = -1;
  int32_t lane = -1;
  friend bool operator==(const RowOrigin&, const RowOrigin&) = default;
};

struct LayoutResult {
  std::vector<int32_t> tokens_per_rank;    // [R]
  std::vector<int32_t> tokens_per_node;    // [nodes]
  std::vector<int32_t> tokens_per_expert;  // [E]
  std::vector<uint8_t> token_rank_mask;    // [T,R]
};
/// `shape` gives ranks, experts, top_k, tokens and ranks_per_node. Ids outside the range count nowhere.
LayoutResult reference_layout(const kernels::OpShape& shape, const std::vector<int64_t>& topk_idx);

/// What one rank receives from a high throughput dispatch. Contents of gap rows are unspecified but for the index (-1)
/// and the weight (0).
struct DispatchResult {
  std::vector<RowOrigin> rows;          // Nr, expanded Ne
  std::vector<uint8_t> x;               // [rows] of row_bytes
  std::vector<uint8_t> side;            // [rows] of side_elements * side_element_bytes
  std::vector<int64_t> topk_idx;        // [rows,K], expanded [rows]
  std::vector<float> topk_weights;      // [rows,K], expanded [rows]; empty when no rank gave weights
  std::vector<int32_t> expert_counts;   // [L], not rounded
  std::vector<uint32_t> report_counts;  // [L], rounded up to expert_alignment
  std::vector<int32_t> rank_prefix;     // [R,R] inclusive over sources
  uint64_t local_bytes = 0;             // rows this rank sent to itself
  uint64_t remote_bytes = 0;            // rows this rank sent to others
};
/// One result per rank; those of inactive ranks are empty. shape.rank and shape.tokens are not read.
std::vector<DispatchResult> reference_dispatch(const kernels::OpShape& shape, const std::vector<RankInput>& inputs);

/// Input of one rank to a combine: rows as its dispatch delivered them.
struct CombineInput {
  std::vector<uint16_t> x;     // [rows,H]
  std::vector<float> weights;  // [rows,K], expanded [rows]; empty when not given
};
struct CombineResult {
  std::vector<uint16_t> x;     // [T,H]
  std::vector<float> weights;  // [T,K]; empty when not given
  uint64_t local_bytes = 0;    // rows this rank pulled from itself
  uint64_t remote_bytes = 0;   // rows this rank pulled from others
};
/// `inputs` and `dispatched` are those of the dispatch whose handle is combined. Rows at and behind in_rows[j] of rank
/// j are skipped, as are ranks outside shape.active_ranks.
std::vector<CombineResult> reference_combine(const kernels::OpShape& shape, const std::vector<RankInput>& inputs,
                                             const std::vector<DispatchResult>& dispatched,
                                             const std::vector<CombineInput>& rows,
                                             const std::vector<uint32_t>& in_rows);

/// What one rank receives from a low latency dispatch. The order inside an expert is free, so there is no payload here:
/// compare_ll_dispatch looks rows up by their source.
struct LlDispatchResult {
  std::vector<std::vector<RowOrigin>> expert_rows;  // [L], by source rank, then (token, lane)
  uint64_t local_bytes = 0;
  uint64_t remote_bytes = 0;
};
std::vector<LlDispatchResult> reference_ll_dispatch(const kernels::OpShape& shape,
                                                    const std::vector<RankInput>& inputs);

/// One rank's outputs of the dispatch under test.
struct LlDispatchView {
  const uint8_t* x = nullptr;              // [L,N] rows of out_row_bytes
  const void* side = nullptr;              // scales or side rows; null when none travel
  const int32_t* expert_counts = nullptr;  // [L]
  const int32_t* src_info = nullptr;       // [L,N]
  const int64_t* layout_range = nullptr;   // [L,R]
};
/// Empty when `view` is a right answer for rank `rank` in any permitted order, else a sentence about the first fault.
std::string compare_ll_dispatch(const kernels::OpShape& shape, uint32_t rank, const std::vector<RankInput>& inputs,
                                const std::vector<LlDispatchResult>& expected, const LlDispatchView& view);

/// The rows that experts return, by source: lane_rows[s] is [T,K,H] bf16, the row that expert topk_idx[t,k] returned.
/// Gives [T,H] float sums, not rounded, per source rank: of the sums of each rank rounded to bf16, or of all lanes.
enum class LlSum { kOfRanks, kOfLanes };
std::vector<std::vector<float>> reference_ll_combine(const kernels::OpShape& shape,
                                                     const std::vector<RankInput>& inputs,
                                                     const std::vector<std::vector<uint16_t>>& lane_rows, LlSum order);
/// Empty when a rank's combined rows are what the definition says bit for bit, and near enough to the sum of all lanes.
std::string compare_ll_combine(const std::vector<float>& of_ranks, const std::vector<float>& of_lanes,
                               const std::vector<uint16_t>& combined);
/// 1 - 2<a,b>/(<a,a>+<b,b>) of a and b shifted by one; 0 for empty inputs.
double relative_error(const std::vector<float>& a, const std::vector<uint16_t>& bf16_b);

/// The end of an operation as each rank must report it; reason 0 when it runs.
struct ExpectedEnd {
  uint32_t reason = 0;
  uint32_t argument = 0;
  int64_t value = 0;
  int64_t minimum = 0;
  int64_t maximum = 0;
  int32_t rank = -1;
};
/// `capacities` are the capacity_rows of each rank (HT); LL uses shape.slots_per_expert.
std::vector<ExpectedEnd> reference_end(const kernels::OpShape& shape, const std::vector<RankInput>& inputs,
                                       const std::vector<uint32_t>& capacities);

}  // namespace expertd::support
