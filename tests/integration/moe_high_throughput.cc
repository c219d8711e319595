// SPDX-License-Identifier: Apache-2.0
// High throughput runs against the reference, bit for bit; combines over several nodes within their bound.
#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>

#include "tests/integration/moe_case.h"
#include "tests/integration/moe_memory.h"
#include "tests/support/combine_bound.h"

namespace expertd::support {
namespace {

using kernels::OpShape;
using kernels::Payload;

std::string fault(const char* what, uint64_t rank, uint64_t row) {
  return std::string(what) + " of rank " + std::to_string(rank) + ", row " + std::to_string(row);
}

std::string failed(const char* what, uint32_t rank, const OpEnd& end) {
  return std::string(what) + " of rank " + std::to_string(rank) + ": " + describe(end.outcome);
}

base::RankSet ranks_of(const expertd_op_result_t& result) {
  base::RankSet ranks(result.rank_mask);
  std::copy(std::begin(result.rank_mask_more), std::end(result.rank_mask_more), ranks.words + 1);
  return ranks;
}

uint32_t flag(bool wanted, uint32_t value) {
  return wanted ? value : 0;
}

/// One rank's tensors of one dispatch.
struct DispatchOutputs {
  uint8_t* x = nullptr;
  uint8_t* side = nullptr;
  uint8_t* topk_idx = nullptr;
  float* topk_weights = nullptr;
  int32_t* src_info = nullptr;
  int32_t* counts = nullptr;
  int32_t* prefix = nullptr;
  int64_t* wait_stats = nullptr;
  OpEnd end;
};

std::vector<uint8_t> ids_at_width(const std::vector<int64_t>& ids, uint32_t width) {
  std::vector<uint8_t> bytes(ids.size() * width);
  for (size_t i = 0; i < ids.size(); ++i) {
    std::memcpy(bytes.data() + i * width, &ids[i], width);
  }
  return bytes;
}

/// Side rows at the strides of the case, which it stores in the arguments.
std::vector<uint8_t> strided_side(const RandomCase& random_case, const RankInput& input,
                                  expertd_dispatch_args_t* args) {
  const int64_t element = random_case.shape.side_element_bytes;
  const int64_t elements = random_case.shape.side_elements;
  if (random_case.side_layout == 0 || elements == 0) {
    return input.side;
  }
  const bool padded = random_case.side_layout == 2;
  args->side_element_stride = padded ? 3 * element : element * std::max<int64_t>(input.tokens, 1);
  args->side_row_stride = padded ? args->side_element_stride * elements + 16 : element;
  std::vector<uint8_t> bytes;
  for (int64_t token = 0; token < input.tokens; ++token) {
    for (int64_t i = 0; i < elements; ++i) {
      const int64_t at = token * args->side_row_stride + i * args->side_element_stride;
      bytes.resize(std::max(bytes.size(), static_cast<size_t>(at + element)));
      std::memcpy(bytes.data() + at, input.side.data() + (token * elements + i) * element,
                  static_cast<size_t>(element));
    }
  }
  return bytes;
}

class HighThroughputRun {
 public:
  HighThroughputRun(RankGroup* group, const RandomCase& random_case, bool registered)
      : group_(group), case_(random_case), expected_(reference_dispatch(random_case.shape, random_case.inputs)) {
    handles_.resize(group->ranks());
    outputs_.resize(group->ranks());
    for (uint32_t rank = 0; rank < group->ranks(); ++rank) {
      arenas_.push_back(std::make_unique<RankArena>(&group->rank(rank).session, registered));
    }
    degraded_ = case_.shape.active_ranks != base::RankSet::first(group->ranks());
    weighted_ = std::any_of(random_case.inputs.begin(), random_case.inputs.end(),
                            [](const RankInput& input) { return !input.topk_weights.empty(); });
  }

  std::string run() {
    for (const bool cached : {false, true}) {
      if (cached) {
        refill_payload(case_.seed, &case_);
        expected_ = reference_dispatch(case_.shape, case_.inputs);
      }
      run_active([&](Rank& rank) { dispatch(rank, cached); });
      for (uint32_t rank = 0; rank < group_->ranks(); ++rank) {
        if (std::string found = active(rank) ? check(rank, cached) : ""; !found.empty()) {
          return (cached ? "cached: " : "") + found;
        }
      }
      if (std::string found = combine(); !found.empty()) {
        return (cached ? "after cached: " : "") + found;
      }
    }
    return free_handles();
  }

 private:
  bool active(uint32_t rank) const { return case_.shape.active_ranks.contains(rank); }
  void run_active(const std::function<void(Rank&)>& body) {
    group_->run([&](Rank& rank) {
      if (active(rank.rank)) {
        body(rank);
      }
    });
  }
  uint32_t width() const { return case_.shape.expanded != 0 ? 1 : case_.shape.top_k; }

  void give_outputs(uint32_t rank, bool cached, expertd_dispatch_args_t* args) {
    const OpShape& shape = case_.shape;
    RankArena& arena = *arenas_[rank];
    DispatchOutputs& out = outputs_[rank];
    const size_t rows = case_.capacities[rank];
    out = DispatchOutputs();
    out.x = arena.output<uint8_t>(rows * shape.row_bytes);
    out.side = arena.output<uint8_t>(rows * shape.side_elements * shape.side_element_bytes);
    if (!cached) {
      out.topk_idx = arena.output<uint8_t>(rows * width() * shape.topk_idx_bytes);
      out.topk_weights = weighted_ ? arena.output<float>(rows * width()) : nullptr;
      out.src_info = arena.output<int32_t>(rows);
      out.counts = arena.output<int32_t>(shape.local_experts);
      out.prefix = arena.output<int32_t>(size_t{shape.ranks} * shape.ranks);
    }
    out.wait_stats = arena.output<int64_t>(shape.ranks);
    std::fill_n(out.wait_stats, shape.ranks, 0);
    args->capacity_rows = case_.capacities[rank];
    args->recv_x = out.x;
    args->recv_side = out.side;
    args->recv_topk_idx = out.topk_idx;
    args->recv_topk_weights = out.topk_weights;
    args->recv_src_info = out.src_info;
    args->expert_counts = out.counts;
    args->rank_prefix = out.prefix;
    args->wait_stats = out.wait_stats;
  }

  void dispatch(Rank& rank, bool cached) {
    const OpShape& shape = case_.shape;
    const RankInput& input = case_.inputs[rank.rank];
    RankArena& arena = *arenas_[rank.rank];
    expertd_dispatch_args_t args = EXPERTD_INIT(expertd_dispatch_args_t);
    args.dtype = shape.payload == Payload::kBytes ? EXPERTD_BYTES : EXPERTD_BF16;
    args.row_bytes = shape.row_bytes;
    args.x = arena.input(input.x);
    args.side = arena.input(strided_side(case_, input, &args));
    args.side_elements = shape.side_elements;
    args.side_element_bytes = shape.side_element_bytes;
    args.idx_type = shape.topk_idx_bytes == 4 ? EXPERTD_I32 : EXPERTD_I64;
    args.tokens = input.tokens;
    args.token_bound = case_.token_bound;
    args.expert_alignment = shape.expert_alignment;
    args.flags = flag(shape.expanded != 0, EXPERTD_EXPANDED) | flag(shape.worst_tokens != 0, EXPERTD_WORST_TOKENS) |
                 flag(shape.zero_foreign_weights == 0, EXPERTD_KEEP_FOREIGN_WEIGHTS);
    if (cached) {
      args.cached = handles_[rank.rank];
    } else {
      args.topk_idx = arena.input(ids_at_width(input.topk_idx, shape.topk_idx_bytes));
      args.topk_weights = arena.input(input.topk_weights);
      args.token_rank_mask = arena.input(input.token_rank_mask);
    }
    give_outputs(rank.rank, cached, &args);
    expertd_event_t event{};
    OpEnd& end = outputs_[rank.rank].end;
    end.outcome =
        outcome_of(expertd_dispatch(rank.group, &args, nullptr, cached ? nullptr : &handles_[rank.rank], &event));
    if (end.outcome.ok()) {
      end = finish(event);
    }
  }

  std::string check(uint32_t rank, bool cached) const {
    const DispatchOutputs& out = outputs_[rank];
    const DispatchResult& wanted = expected_[rank];
    if (!out.end.outcome.ok()) {
      return failed("dispatch", rank, out.end);
    }
    const expertd_op_result_t& result = out.end.result;
    if (result.recv_rows != wanted.rows.size() || result.local_bytes != wanted.local_bytes ||
        result.remote_bytes != wanted.remote_bytes || ranks_of(result) != case_.shape.active_ranks ||
        (result.degraded != 0) != degraded_) {
      return fault("result", rank, result.recv_rows);
    }
    if (result.executor != EXPERTD_EXECUTOR_HOST || result.sms != 0) {
      return fault("executor", rank, result.executor);
    }
    if (!std::equal(wanted.report_counts.begin(), wanted.report_counts.end(), result.expert_counts,
                    result.expert_counts + result.expert_count_entries)) {
      return fault("reported counts", rank, 0);
    }
    const size_t side_bytes = size_t{case_.shape.side_elements} * case_.shape.side_element_bytes;
    for (size_t row = 0; row < wanted.rows.size(); ++row) {
      if (wanted.rows[row].source < 0) {
        continue;  // a gap
      }
      const auto differs = [row](const uint8_t* got, const std::vector<uint8_t>& right, size_t bytes) {
        return std::memcmp(got + row * bytes, right.data() + row * bytes, bytes) != 0;
      };
      if (differs(out.x, wanted.x, case_.shape.row_bytes) ||
          (side_bytes != 0 && differs(out.side, wanted.side, side_bytes))) {
        return fault("payload", rank, row);
      }
      if (out.src_info != nullptr && out.src_info[row] != wanted.rows[row].token) {
        return fault("src_info", rank, row);
      }
    }
    return cached ? std::string() : check_routing(rank);
  }

  std::string check_routing(uint32_t rank) const {
    const DispatchOutputs& out = outputs_[rank];
    const DispatchResult& wanted = expected_[rank];
    const OpShape& shape = case_.shape;
    const size_t rows = shape.worst_tokens != 0 ? case_.capacities[rank] : wanted.rows.size();
    for (size_t at = 0; at < rows * width(); ++at) {
      int32_t narrow = 0;
      int64_t wide = 0;
      if (shape.topk_idx_bytes == 4) {
        std::memcpy(&narrow, out.topk_idx + at * 4, sizeof(narrow));
      } else {
        std::memcpy(&wide, out.topk_idx + at * 8, sizeof(wide));
      }
      if ((shape.topk_idx_bytes == 4 ? narrow : wide) != (at < wanted.topk_idx.size() ? wanted.topk_idx[at] : -1)) {
        return fault("topk_idx", rank, at / width());
      }
      const float weight = at < wanted.topk_weights.size() ? wanted.topk_weights[at] : 0.0f;
      if (weighted_ && std::memcmp(&out.topk_weights[at], &weight, sizeof(weight)) != 0) {
        return fault("topk_weights", rank, at / width());
      }
    }
    if (!std::equal(wanted.expert_counts.begin(), wanted.expert_counts.end(), out.counts) ||
        !std::equal(wanted.rank_prefix.begin(), wanted.rank_prefix.end(), out.prefix)) {
      return fault("counts or prefix", rank, 0);
    }
    return {};
  }

  std::string combine() {
    Random random(case_.seed + 1);
    std::vector<CombineInput> rows(group_->ranks());
    for (uint32_t rank = 0; rank < group_->ranks(); ++rank) {
      rows[rank].x = random_rows(&random, size_t{case_.capacities[rank]} * case_.shape.hidden);
      for (size_t i = 0; case_.combine_weights && i < size_t{case_.capacities[rank]} * width(); ++i) {
        rows[rank].weights.push_back(static_cast<float>(random.unit()));
      }
    }
    std::vector<uint16_t*> combined(group_->ranks());
    std::vector<float*> weights(group_->ranks());
    std::vector<OpEnd> ends(group_->ranks());
    run_active([&](Rank& rank) {
      const uint32_t at = rank.rank;
      combined[at] = arenas_[at]->output<uint16_t>(size_t{case_.inputs[at].tokens} * case_.shape.hidden);
      if (case_.combine_weights) {
        weights[at] = arenas_[at]->output<float>(size_t{case_.inputs[at].tokens} * case_.shape.top_k);
      }
      ends[at] = combine_rank(rank, rows[at], combined[at], weights[at]);
    });
    OpShape shape = case_.shape;
    shape.kind = kernels::OpKind::kCombine;
    shape.order_last_lane = case_.order_last_lane ? 1 : 0;
    const auto wanted = reference_combine(shape, case_.inputs, expected_, rows, case_.capacities);
    const auto of_nodes = sums_of_nodes(shape, rows);
    for (uint32_t rank = 0; rank < group_->ranks(); ++rank) {
      if (!active(rank)) {
        continue;
      }
      if (!ends[rank].outcome.ok()) {
        return failed("combine", rank, ends[rank]);
      }
      if (std::string found = compare(rank, wanted[rank], of_nodes, combined[rank], weights[rank]); !found.empty()) {
        return found;
      }
    }
    return {};
  }

  /// What each node's rows alone make of the tokens of every rank; nothing where all ranks are on one.
  std::vector<std::vector<CombineResult>> sums_of_nodes(const OpShape& shape, const std::vector<CombineInput>& rows) {
    std::vector<std::vector<CombineResult>> sums;
    std::vector<RankInput> plain = case_.inputs;
    for (RankInput& input : plain) {
      input.bias0.clear();
      input.bias1.clear();
    }
    for (uint32_t node = 0; group_->nodes() > 1 && node < group_->nodes(); ++node) {
      std::vector<uint32_t> in_rows = case_.capacities;
      for (uint32_t rank = 0; rank < group_->ranks(); ++rank) {
        in_rows[rank] = group_->node_of()[rank] == node ? in_rows[rank] : 0;
      }
      sums.push_back(reference_combine(shape, plain, expected_, rows, in_rows));
    }
    return sums;
  }

  std::string compare(uint32_t rank, const CombineResult& wanted,
                      const std::vector<std::vector<CombineResult>>& of_nodes, const uint16_t* combined,
                      const float* weights) const {
    for (size_t at = 0; at < wanted.x.size(); ++at) {
      float elsewhere = 0;
      for (uint32_t node = 0; node < of_nodes.size(); ++node) {
        const bool own = node == group_->node_of()[rank];
        elsewhere += own ? 0 : std::abs(reference_bf16_to_float(of_nodes[node][rank].x[at]));
      }
      if (!combined_right(elsewhere, combined[at], wanted.x[at])) {
        return fault("combined channel", rank, at / case_.shape.hidden);
      }
    }
    for (size_t at = 0; weights != nullptr && at < wanted.weights.size(); ++at) {
      const bool same = group_->nodes() > 1 ? std::abs(weights[at] - wanted.weights[at]) <= kNodesWeightBound
                                            : std::memcmp(weights + at, &wanted.weights[at], sizeof(float)) == 0;
      if (!same) {
        return fault("combined weights", rank, at / case_.shape.top_k);
      }
    }
    return {};
  }

  bool combined_right(float elsewhere, uint16_t got_bits, uint16_t wanted_bits) const {
    if (group_->nodes() == 1) {
      return got_bits == wanted_bits;
    }
    const float got = reference_bf16_to_float(got_bits);
    const float wanted = reference_bf16_to_float(wanted_bits);
    return std::abs(got - wanted) <= nodes_combine_bound(elsewhere, got, wanted);
  }

  OpEnd combine_rank(Rank& rank, const CombineInput& rows, uint16_t* combined, float* weights) {
    const RankInput& input = case_.inputs[rank.rank];
    RankArena& arena = *arenas_[rank.rank];
    expertd_combine_args_t args = EXPERTD_INIT(expertd_combine_args_t);
    args.x = arena.input(rows.x);
    args.rows = case_.capacities[rank.rank];
    args.topk_weights = arena.input(rows.weights);
    args.bias0 = arena.input(input.bias0);
    args.bias1 = arena.input(input.bias1);
    args.handle = handles_[rank.rank];
    args.tokens = input.tokens;
    args.token_bound = case_.token_bound;
    args.combined_x = combined;
    args.combined_topk_weights = weights;
    args.flags =
        flag(case_.shape.expanded != 0, EXPERTD_EXPANDED) | flag(case_.order_last_lane, EXPERTD_ORDER_LAST_LANE);
    expertd_event_t event{};
    OpEnd end;
    end.outcome = outcome_of(expertd_combine(rank.group, &args, nullptr, &event));
    return end.outcome.ok() ? finish(event) : end;
  }

  std::string free_handles() {
    for (uint32_t rank = 0; rank < group_->ranks(); ++rank) {
      const Outcome freed =
          active(rank) ? outcome_of(expertd_handle_free(group_->rank(rank).group, handles_[rank])) : Outcome();
      if (!freed.ok()) {
        return "freeing a handle: " + describe(freed);
      }
    }
    return {};
  }

  RankGroup* group_;
  RandomCase case_;
  std::vector<DispatchResult> expected_;
  std::vector<expertd_handle_t> handles_;
  std::vector<DispatchOutputs> outputs_;
  std::vector<std::unique_ptr<RankArena>> arenas_;
  bool weighted_ = false;
  bool degraded_ = false;
};

}  // namespace

std::string run_high_throughput(RankGroup* group, const RandomCase& random_case, Place place) {
  return HighThroughputRun(group, random_case, place == Place::kRegistered).run();
}

}  // namespace expertd::support
