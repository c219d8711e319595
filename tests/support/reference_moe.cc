// SPDX-License-Identifier: Apache-2.0
// Reference of layout, high throughput dispatch and combine, and of how operations end. Rows are collected in lists in
// the order the definitions name; nothing is computed from counts.
#include "tests/support/reference_moe.h"

#include <algorithm>
#include <map>
#include <tuple>

#include "proto/abi/expertd_reason.h"
#include "proto/abi/ring_v1.h"

namespace expertd::support {
namespace {

using kernels::OpShape;

bool active(const OpShape& shape, uint32_t rank) {
  return shape.active_ranks.contains(rank);
}

/// The expert of a lane, or -1 when the lane goes nowhere: no id given, none chosen, out of range.
int64_t lane_expert(const OpShape& shape, const RankInput& input, uint32_t token, uint32_t lane) {
  if (input.topk_idx.empty()) {
    return -1;
  }
  const int64_t id = input.topk_idx[static_cast<size_t>(token) * shape.top_k + lane];
  return id >= 0 && id < static_cast<int64_t>(shape.experts) ? id : -1;
}

/// The rank that owns a lane's expert, or -1.
int32_t lane_rank(const OpShape& shape, const RankInput& input, uint32_t token, uint32_t lane) {
  const int64_t expert = lane_expert(shape, input, token, lane);
  return expert < 0 ? -1 : static_cast<int32_t>(expert / shape.local_experts);
}

bool token_goes_to(const OpShape& shape, const RankInput& input, uint32_t token, uint32_t rank) {
  if (!input.token_rank_mask.empty()) {
    return input.token_rank_mask[static_cast<size_t>(token) * shape.ranks + rank] != 0;
  }
  for (uint32_t lane = 0; lane < shape.top_k; ++lane) {
    if (lane_rank(shape, input, token, lane) == static_cast<int32_t>(rank)) {
      return true;
    }
  }
  return false;
}

template <typename T>
void append_slice(std::vector<T>* out, const std::vector<T>& in, size_t row, size_t row_elements) {
  const auto begin = in.begin() + static_cast<std::ptrdiff_t>(row * row_elements);
  out->insert(out->end(), begin, begin + static_cast<std::ptrdiff_t>(row_elements));
}

std::vector<RowOrigin> rows_of_rank(const OpShape& shape, const std::vector<RankInput>& inputs, uint32_t rank) {
  std::vector<RowOrigin> rows;
  for (uint32_t source = 0; source < shape.ranks; ++source) {
    for (uint32_t token = 0; active(shape, source) && token < inputs[source].tokens; ++token) {
      if (token_goes_to(shape, inputs[source], token, rank)) {
        rows.push_back({static_cast<int32_t>(source), static_cast<int32_t>(token), -1});
      }
    }
  }
  return rows;
}

std::vector<RowOrigin> rows_of_expert(const OpShape& shape, const std::vector<RankInput>& inputs, int64_t expert) {
  std::vector<RowOrigin> rows;
  for (uint32_t source = 0; source < shape.ranks; ++source) {
    for (uint32_t token = 0; active(shape, source) && token < inputs[source].tokens; ++token) {
      for (uint32_t lane = 0; lane < shape.top_k; ++lane) {
        if (lane_expert(shape, inputs[source], token, lane) == expert) {
          rows.push_back({static_cast<int32_t>(source), static_cast<int32_t>(token), static_cast<int32_t>(lane)});
        }
      }
    }
  }
  return rows;
}

void append_row(const OpShape& shape, const std::vector<RankInput>& inputs, uint32_t rank, const RowOrigin& row,
                DispatchResult* result) {
  const RankInput& input = inputs[static_cast<size_t>(row.source)];
  const auto token = static_cast<uint32_t>(row.token);
  const size_t side_bytes = static_cast<size_t>(shape.side_elements) * shape.side_element_bytes;
  append_slice(&result->x, input.x, token, shape.row_bytes);
  if (!input.side.empty()) {
    append_slice(&result->side, input.side, token, side_bytes);
  }
  const bool weighted = !input.topk_weights.empty();
  const uint32_t first = row.lane < 0 ? 0 : static_cast<uint32_t>(row.lane);
  const uint32_t last = row.lane < 0 ? shape.top_k : first + 1;
  for (uint32_t lane = first; lane < last; ++lane) {
    const bool local = lane_rank(shape, input, token, lane) == static_cast<int32_t>(rank);
    const int64_t expert = lane_expert(shape, input, token, lane);
    result->topk_idx.push_back(local ? expert - static_cast<int64_t>(rank) * shape.local_experts : -1);
    if (weighted) {
      const float weight = input.topk_weights[static_cast<size_t>(token) * shape.top_k + lane];
      result->topk_weights.push_back(!local && shape.zero_foreign_weights != 0 ? 0.0f : weight);
    }
  }
}

void append_gap(const OpShape& shape, bool weighted, bool sided, DispatchResult* result) {
  result->rows.push_back(RowOrigin{});
  result->x.resize(result->x.size() + shape.row_bytes);
  if (sided) {
    result->side.resize(result->side.size() + static_cast<size_t>(shape.side_elements) * shape.side_element_bytes);
  }
  result->topk_idx.push_back(-1);
  if (weighted) {
    result->topk_weights.push_back(0.0f);
  }
}

DispatchResult dispatch_to(const OpShape& shape, const std::vector<RankInput>& inputs, uint32_t rank) {
  DispatchResult result;
  const auto any = [&](auto member) {
    return std::any_of(inputs.begin(), inputs.end(), [&](const RankInput& input) { return !(input.*member).empty(); });
  };
  const bool weighted = any(&RankInput::topk_weights);
  const bool sided = any(&RankInput::side);
  const uint32_t alignment = std::max(shape.expert_alignment, 1u);
  for (uint32_t local = 0; local < shape.local_experts; ++local) {
    const auto rows = rows_of_expert(shape, inputs, static_cast<int64_t>(rank) * shape.local_experts + local);
    const auto count = static_cast<uint32_t>(rows.size());
    const uint32_t rounded = (count + alignment - 1) / alignment * alignment;
    result.expert_counts.push_back(static_cast<int32_t>(count));
    result.report_counts.push_back(rounded);
    if (shape.expanded != 0) {
      for (const RowOrigin& row : rows) {
        result.rows.push_back(row);
        append_row(shape, inputs, rank, row, &result);
      }
      for (uint32_t gap = count; gap < rounded; ++gap) {
        append_gap(shape, weighted, sided, &result);
      }
    }
  }
  if (shape.expanded == 0) {
    result.rows = rows_of_rank(shape, inputs, rank);
    for (const RowOrigin& row : result.rows) {
      append_row(shape, inputs, rank, row, &result);
    }
  }
  return result;
}

std::vector<int32_t> prefix_matrix(const OpShape& shape, const std::vector<RankInput>& inputs) {
  std::vector<int32_t> prefix(static_cast<size_t>(shape.ranks) * shape.ranks);
  for (uint32_t rank = 0; rank < shape.ranks; ++rank) {
    const auto rows = active(shape, rank) ? rows_of_rank(shape, inputs, rank) : std::vector<RowOrigin>{};
    for (uint32_t source = 0; source < shape.ranks; ++source) {
      prefix[static_cast<size_t>(source) * shape.ranks + rank] = static_cast<int32_t>(std::count_if(
          rows.begin(), rows.end(), [&](const RowOrigin& row) { return row.source <= static_cast<int32_t>(source); }));
    }
  }
  return prefix;
}

/// Ranks in the order in which a token's partial results are added.
std::vector<uint32_t> combine_order(const OpShape& shape, const RankInput& input, uint32_t token) {
  std::vector<std::tuple<int32_t, uint32_t>> keyed;
  for (uint32_t rank = 0; rank < shape.ranks; ++rank) {
    int32_t last_lane = -1;
    for (uint32_t lane = 0; shape.order_last_lane != 0 && lane < shape.top_k; ++lane) {
      if (lane_rank(shape, input, token, lane) == static_cast<int32_t>(rank)) {
        last_lane = static_cast<int32_t>(lane);
      }
    }
    keyed.emplace_back(last_lane, rank);
  }
  std::sort(keyed.begin(), keyed.end());
  std::vector<uint32_t> order;
  for (const auto& [lane, rank] : keyed) {
    order.push_back(rank);
  }
  return order;
}

using RowIndex = std::map<std::tuple<int32_t, int32_t, int32_t>, uint32_t>;

RowIndex index_rows(const DispatchResult& dispatched) {
  RowIndex index;
  for (uint32_t row = 0; row < dispatched.rows.size(); ++row) {
    const RowOrigin& origin = dispatched.rows[row];
    if (origin.source >= 0) {
      index[{origin.source, origin.token, origin.lane}] = row;
    }
  }
  return index;
}

struct CombineContext {
  const OpShape& shape;
  const std::vector<RankInput>& inputs;
  const std::vector<CombineInput>& rows;
  const std::vector<uint32_t>& in_rows;
  std::vector<RowIndex> index;  // by rank
};

/// The (lane, row) pairs that a token has at a rank; lane -1 for whole tokens.
std::vector<std::pair<int32_t, uint32_t>> rows_at(const CombineContext& context, uint32_t source, uint32_t token,
                                                  uint32_t rank) {
  std::vector<std::pair<int32_t, uint32_t>> found;
  const int32_t first = context.shape.expanded != 0 ? 0 : -1;
  const int32_t last = context.shape.expanded != 0 ? static_cast<int32_t>(context.shape.top_k) : 0;
  for (int32_t lane = first; active(context.shape, rank) && lane < last; ++lane) {
    const auto row = context.index[rank].find({static_cast<int32_t>(source), static_cast<int32_t>(token), lane});
    if (row != context.index[rank].end() && row->second < context.in_rows[rank]) {
      found.emplace_back(lane, row->second);
    }
  }
  return found;
}

void combine_token(const CombineContext& context, uint32_t source, uint32_t token, CombineResult* result) {
  const OpShape& shape = context.shape;
  const RankInput& input = context.inputs[source];
  std::vector<float> sum(shape.hidden, 0.0f);
  const size_t at = static_cast<size_t>(token) * shape.hidden;
  for (uint32_t i = 0; i < shape.hidden; ++i) {
    if (!input.bias0.empty()) {
      sum[i] = reference_bf16_to_float(input.bias0[at + i]);
    }
    if (!input.bias1.empty()) {
      sum[i] += reference_bf16_to_float(input.bias1[at + i]);
    }
  }
  std::vector<float> weights(shape.top_k, 0.0f);
  for (const uint32_t rank : combine_order(shape, input, token)) {
    const auto found = rows_at(context, source, token, rank);
    const CombineInput& peer = context.rows[rank];
    for (const auto& [lane, row] : found) {
      (rank == source ? result->local_bytes : result->remote_bytes) += shape.hidden * 2ull;
      for (uint32_t k = 0; !peer.weights.empty() && lane < 0 && k < shape.top_k; ++k) {
        weights[k] += peer.weights[static_cast<size_t>(row) * shape.top_k + k];
      }
      if (!peer.weights.empty() && lane >= 0) {
        weights[static_cast<size_t>(lane)] = peer.weights[row];
      }
    }
    for (uint32_t i = 0; !found.empty() && i < shape.hidden; ++i) {
      float partial = 0.0f;
      for (const auto& [lane, row] : found) {
        partial += reference_bf16_to_float(peer.x[static_cast<size_t>(row) * shape.hidden + i]);
      }
      sum[i] += shape.expanded != 0 ? reference_bf16_to_float(reference_float_to_bf16(partial)) : partial;
    }
  }
  for (uint32_t i = 0; i < shape.hidden; ++i) {
    result->x.push_back(reference_float_to_bf16(sum[i]));
  }
  result->weights.insert(result->weights.end(), weights.begin(), weights.end());
}

}  // namespace

LayoutResult reference_layout(const OpShape& shape, const std::vector<int64_t>& topk_idx) {
  LayoutResult result;
  RankInput input;
  input.tokens = shape.tokens;
  input.topk_idx = topk_idx;
  const uint32_t per_node = shape.ranks_per_node == 0 ? shape.ranks : shape.ranks_per_node;
  result.tokens_per_rank.resize(shape.ranks);
  result.tokens_per_node.resize((shape.ranks + per_node - 1) / per_node);
  result.tokens_per_expert.resize(shape.experts);
  result.token_rank_mask.resize(static_cast<size_t>(shape.tokens) * shape.ranks);
  for (uint32_t token = 0; token < shape.tokens; ++token) {
    std::vector<bool> node_hit(result.tokens_per_node.size());
    for (uint32_t rank = 0; rank < shape.ranks; ++rank) {
      if (token_goes_to(shape, input, token, rank)) {
        result.token_rank_mask[static_cast<size_t>(token) * shape.ranks + rank] = 1;
        ++result.tokens_per_rank[rank];
        node_hit[rank / per_node] = true;
      }
    }
    for (size_t node = 0; node < node_hit.size(); ++node) {
      result.tokens_per_node[node] += node_hit[node] ? 1 : 0;
    }
    for (uint32_t lane = 0; lane < shape.top_k; ++lane) {
      const int64_t expert = lane_expert(shape, input, token, lane);
      if (expert >= 0) {
        ++result.tokens_per_expert[static_cast<size_t>(expert)];
      }
    }
  }
  return result;
}

std::vector<DispatchResult> reference_dispatch(const OpShape& shape, const std::vector<RankInput>& inputs) {
  std::vector<DispatchResult> results(shape.ranks);
  const auto prefix = prefix_matrix(shape, inputs);
  const uint64_t row_bytes = shape.out_row_bytes + uint64_t{shape.side_elements} * shape.side_element_bytes;
  for (uint32_t rank = 0; rank < shape.ranks; ++rank) {
    if (active(shape, rank)) {
      results[rank] = dispatch_to(shape, inputs, rank);
      results[rank].rank_prefix = prefix;
    }
  }
  for (uint32_t rank = 0; rank < shape.ranks; ++rank) {
    for (const RowOrigin& row : results[rank].rows) {
      if (row.source >= 0) {
        DispatchResult& sender = results[static_cast<size_t>(row.source)];
        (row.source == static_cast<int32_t>(rank) ? sender.local_bytes : sender.remote_bytes) += row_bytes;
      }
    }
  }
  return results;
}

std::vector<CombineResult> reference_combine(const OpShape& shape, const std::vector<RankInput>& inputs,
                                             const std::vector<DispatchResult>& dispatched,
                                             const std::vector<CombineInput>& rows,
                                             const std::vector<uint32_t>& in_rows) {
  CombineContext context{shape, inputs, rows, in_rows, {}};
  for (const DispatchResult& result : dispatched) {
    context.index.push_back(index_rows(result));
  }
  std::vector<CombineResult> results(shape.ranks);
  for (uint32_t source = 0; source < shape.ranks; ++source) {
    for (uint32_t token = 0; active(shape, source) && token < inputs[source].tokens; ++token) {
      combine_token(context, source, token, &results[source]);
    }
  }
  return results;
}

std::vector<ExpectedEnd> reference_end(const OpShape& shape, const std::vector<RankInput>& inputs,
                                       const std::vector<uint32_t>& capacities) {
  std::vector<ExpectedEnd> ends(shape.ranks);
  std::vector<ExpectedEnd> own(shape.ranks);
  ExpectedEnd others;
  for (uint32_t rank = shape.ranks; rank-- > 0;) {  // downwards, so that the lowest rank is the one named
    if (!active(shape, rank)) {
      continue;
    }
    const auto& ids = inputs[rank].topk_idx;
    const int64_t limit = static_cast<int64_t>(shape.experts);
    const auto bad = std::find_if(ids.begin(), ids.end(), [&](int64_t id) { return id < -1 || id >= limit; });
    if (bad != ids.end()) {
      own[rank] = {EXPERTD_REASON_EXPERT_OUT_OF_RANGE, EXPERTD_ARGUMENT_EXPERT_ID, *bad, -1, limit - 1, -1};
      others = {EXPERTD_REASON_PEER_REJECTED, EXPERTD_ARGUMENT_NONE, 0, 0, 0, static_cast<int32_t>(rank)};
    }
  }
  for (uint32_t rank = shape.ranks; others.reason == 0 && rank-- > 0;) {
    for (uint32_t local = shape.local_experts; active(shape, rank) && local-- > 0;) {
      const auto rows = rows_of_expert(shape, inputs, static_cast<int64_t>(rank) * shape.local_experts + local);
      if (shape.kind == kernels::OpKind::kLlDispatch && rows.size() > shape.slots_per_expert) {
        own[rank] = {EXPERTD_REASON_CAPACITY_EXCEEDED, EXPERTD_ARGUMENT_RECV_ROWS, static_cast<int64_t>(rows.size()), 0,
                     shape.slots_per_expert,           static_cast<int32_t>(rank)};
      }
    }
    if (active(shape, rank) && shape.kind == kernels::OpKind::kDispatch) {
      const auto rows = static_cast<int64_t>(dispatch_to(shape, inputs, rank).rows.size());
      if (rows > capacities[rank]) {
        own[rank] = {EXPERTD_REASON_CAPACITY_EXCEEDED, EXPERTD_ARGUMENT_RECV_ROWS, rows, 0, capacities[rank],
                     static_cast<int32_t>(rank)};
      }
    }
  }
  for (uint32_t rank = shape.ranks; others.reason == 0 && rank-- > 0;) {
    if (own[rank].reason == EXPERTD_REASON_CAPACITY_EXCEEDED) {
      std::fill(ends.begin(), ends.end(), own[rank]);
    }
  }
  for (uint32_t rank = 0; others.reason != 0 && rank < shape.ranks; ++rank) {
    ends[rank] = own[rank].reason != 0 ? own[rank] : others;
  }
  return ends;
}

}  // namespace expertd::support
