// SPDX-License-Identifier: Apache-2.0
// Reference of the low latency operations. Dispatch is checked, not compared: sources and the rows of one source may
// stand in any order, so each row is looked up by layout_range and src_info and held to the token it claims to be.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "tests/support/reference_moe.h"

namespace expertd::support {
namespace {

using kernels::OpShape;
using kernels::Payload;
using kernels::ScaleForm;

bool active(const OpShape& shape, uint32_t rank) {
  return shape.active_ranks.contains(rank);
}

int64_t lane_id(const OpShape& shape, const RankInput& input, uint32_t token, uint32_t lane) {
  return input.topk_idx[static_cast<size_t>(token) * shape.top_k + lane];
}

uint64_t landed_bytes(const OpShape& shape) {
  if (shape.payload == Payload::kFp8) {
    const uint64_t groups = shape.hidden / 128;
    return shape.out_row_bytes + (shape.scale == ScaleForm::kUe8m0 ? groups : groups * 4);
  }
  return shape.out_row_bytes + uint64_t{shape.side_elements} * shape.side_element_bytes;
}

/// Adds what one rank makes of a token: its rows in lane order, rounded together if the order says so.
void add_rank(const OpShape& shape, const RankInput& input, uint32_t token, uint32_t rank,
              const std::vector<uint16_t>& rows, LlSum order, std::vector<float>* sum) {
  std::vector<float> partial(shape.hidden, 0.0f);
  for (uint32_t lane = 0; lane < shape.top_k; ++lane) {
    const size_t at = static_cast<size_t>(token) * shape.top_k + lane;
    const int64_t id = input.topk_idx[at];
    if (id < 0 || static_cast<uint32_t>(id / shape.local_experts) != rank) {
      continue;
    }
    for (uint32_t i = 0; i < shape.hidden; ++i) {
      partial[i] += input.topk_weights[at] * reference_bf16_to_float(rows[at * shape.hidden + i]);
    }
  }
  for (uint32_t i = 0; i < shape.hidden; ++i) {
    const bool rounds = order == LlSum::kOfRanks;
    (*sum)[i] += rounds ? reference_bf16_to_float(reference_float_to_bf16(partial[i])) : partial[i];
  }
}

std::string fault(const char* what, uint32_t expert, uint64_t row) {
  return std::string(what) + " at local expert " + std::to_string(expert) + ", row " + std::to_string(row);
}

/// Scales of a slot, gathered from the column-major tensors.
bool scales_equal(const OpShape& shape, const void* side, uint64_t expert, uint64_t row, const QuantisedRow& expected) {
  const uint64_t groups = shape.hidden / 128;
  const uint64_t slots = shape.slots_per_expert;
  for (uint64_t group = 0; group < groups; ++group) {
    if (shape.scale == ScaleForm::kUe8m0) {
      uint32_t word = 0;
      std::memcpy(&word, static_cast<const uint8_t*>(side) + 4 * ((expert * (groups / 4) + group / 4) * slots + row),
                  4);
      if (((word >> (8 * (group % 4))) & 0xff) != expected.exponents[group]) {
        return false;
      }
    } else {
      float scale = 0;
      std::memcpy(&scale, static_cast<const uint8_t*>(side) + 4 * ((expert * groups + group) * slots + row), 4);
      if (scale != expected.scales[group]) {
        return false;
      }
    }
  }
  return true;
}

bool row_equal(const OpShape& shape, const RankInput& input, uint32_t token, uint64_t expert, uint64_t row,
               const LlDispatchView& view) {
  const uint64_t slot = expert * shape.slots_per_expert + row;
  const uint8_t* in = input.x.data() + static_cast<size_t>(token) * shape.row_bytes;
  const uint8_t* out = view.x + slot * shape.out_row_bytes;
  if (shape.payload == Payload::kFp8) {
    std::vector<uint16_t> values(shape.hidden);
    std::memcpy(values.data(), in, shape.hidden * 2ull);
    const QuantisedRow expected = reference_quantise(values.data(), shape.hidden, shape.scale);
    return std::memcmp(out, expected.payload.data(), shape.hidden) == 0 &&
           scales_equal(shape, view.side, expert, row, expected);
  }
  const size_t side_bytes = static_cast<size_t>(shape.side_elements) * shape.side_element_bytes;
  if (view.side != nullptr && side_bytes != 0 &&
      std::memcmp(static_cast<const uint8_t*>(view.side) + slot * side_bytes, input.side.data() + token * side_bytes,
                  side_bytes) != 0) {
    return false;
  }
  return std::memcmp(out, in, shape.row_bytes) == 0;
}

}  // namespace

std::vector<LlDispatchResult> reference_ll_dispatch(const OpShape& shape, const std::vector<RankInput>& inputs) {
  std::vector<LlDispatchResult> results(shape.ranks);
  for (LlDispatchResult& result : results) {
    result.expert_rows.resize(shape.local_experts);
  }
  for (uint32_t source = 0; source < shape.ranks; ++source) {
    for (uint32_t token = 0; active(shape, source) && token < inputs[source].tokens; ++token) {
      for (uint32_t lane = 0; lane < shape.top_k; ++lane) {
        const int64_t id = lane_id(shape, inputs[source], token, lane);
        if (id < 0 || id >= static_cast<int64_t>(shape.experts)) {
          continue;
        }
        const auto owner = static_cast<uint32_t>(id / shape.local_experts);
        if (!active(shape, owner)) {
          continue;
        }
        results[owner].expert_rows[static_cast<size_t>(id % shape.local_experts)].push_back(
            {static_cast<int32_t>(source), static_cast<int32_t>(token), static_cast<int32_t>(lane)});
        (owner == source ? results[source].local_bytes : results[source].remote_bytes) += landed_bytes(shape);
      }
    }
  }
  return results;
}

std::string compare_ll_dispatch(const OpShape& shape, uint32_t rank, const std::vector<RankInput>& inputs,
                                const std::vector<LlDispatchResult>& expected, const LlDispatchView& view) {
  for (uint32_t expert = 0; expert < shape.local_experts; ++expert) {
    const auto& rows = expected[rank].expert_rows[expert];
    if (view.expert_counts[expert] != static_cast<int32_t>(rows.size())) {
      return fault("wrong count", expert, static_cast<uint64_t>(view.expert_counts[expert]));
    }
    std::vector<bool> covered(rows.size());
    for (uint32_t source = 0; source < shape.ranks; ++source) {
      std::vector<int32_t> wanted;
      for (const RowOrigin& row : rows) {
        if (row.source == static_cast<int32_t>(source)) {
          wanted.push_back(row.token);
        }
      }
      const auto range = static_cast<uint64_t>(view.layout_range[static_cast<size_t>(expert) * shape.ranks + source]);
      const uint64_t begin = range >> 32;
      const uint64_t count = range & 0xffffffffu;
      if (count != wanted.size() || (count != 0 && begin + count > rows.size())) {
        return fault("wrong layout_range", expert, source);
      }
      std::vector<int32_t> got;
      for (uint64_t row = begin; row < begin + count; ++row) {
        const int32_t token = view.src_info[expert * uint64_t{shape.slots_per_expert} + row];
        if (covered[row] || std::find(wanted.begin(), wanted.end(), token) == wanted.end()) {
          return fault("overlapping range or foreign src_info", expert, row);
        }
        covered[row] = true;
        got.push_back(token);
        if (!row_equal(shape, inputs[source], static_cast<uint32_t>(token), expert, row, view)) {
          return fault("wrong row", expert, row);
        }
      }
      std::sort(got.begin(), got.end());
      if (got != wanted) {
        return fault("token missing or twice", expert, source);
      }
    }
  }
  return {};
}

std::vector<std::vector<float>> reference_ll_combine(const OpShape& shape, const std::vector<RankInput>& inputs,
                                                     const std::vector<std::vector<uint16_t>>& lane_rows, LlSum order) {
  std::vector<std::vector<float>> results(shape.ranks);
  for (uint32_t source = 0; source < shape.ranks; ++source) {
    for (uint32_t token = 0; active(shape, source) && token < inputs[source].tokens; ++token) {
      std::vector<float> sum(shape.hidden, 0.0f);
      for (uint32_t rank = 0; rank < shape.ranks; ++rank) {
        if (active(shape, rank)) {
          add_rank(shape, inputs[source], token, rank, lane_rows[source], order, &sum);
        }
      }
      results[source].insert(results[source].end(), sum.begin(), sum.end());
    }
  }
  return results;
}

std::string compare_ll_combine(const std::vector<float>& of_ranks, const std::vector<float>& of_lanes,
                               const std::vector<uint16_t>& combined) {
  for (size_t i = 0; i < of_ranks.size(); ++i) {
    if (reference_float_to_bf16(of_ranks[i]) != combined[i]) {
      return "combined element " + std::to_string(i) + " is not the sum of the ranks' sums";
    }
  }
  const double error = relative_error(of_lanes, combined);
  return error < 1e-5 ? "" : "relative error " + std::to_string(error);
}

double relative_error(const std::vector<float>& a, const std::vector<uint16_t>& bf16_b) {
  double product = 0;
  double squares = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double left = static_cast<double>(a[i]) + 1;
    const double right = static_cast<double>(reference_bf16_to_float(bf16_b[i])) + 1;
    product += left * right;
    squares += left * left + right * right;
  }
  return squares == 0 ? 0 : 1 - 2 * product / squares;
}

}  // namespace expertd::support
