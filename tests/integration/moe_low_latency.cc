// SPDX-License-Identifier: Apache-2.0
// Low latency runs: dispatch against the reference in any permitted order, combine within its bound, over several nodes
// within theirs.
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
using kernels::ScaleForm;

/// The row that an expert makes of a token: different for different (expert, source, token).
std::vector<uint16_t> expert_row(const RandomCase& random_case, uint64_t expert, uint64_t source, uint64_t token) {
  Random random(random_case.seed ^ (expert << 40) ^ (source << 20) ^ token);
  return random_rows(&random, random_case.shape.hidden);
}

std::vector<std::vector<uint16_t>> lane_rows(const RandomCase& random_case) {
  const OpShape& shape = random_case.shape;
  std::vector<std::vector<uint16_t>> lanes(shape.ranks);
  for (uint32_t source = 0; source < shape.ranks; ++source) {
    const RankInput& input = random_case.inputs[source];
    for (size_t at = 0; at < input.topk_idx.size(); ++at) {
      const int64_t id = input.topk_idx[at];
      const auto row = id < 0 ? std::vector<uint16_t>(shape.hidden)
                              : expert_row(random_case, static_cast<uint64_t>(id), source, at / shape.top_k);
      lanes[source].insert(lanes[source].end(), row.begin(), row.end());
    }
  }
  return lanes;
}

/// One rank's outputs.
struct Outputs {
  expertd_ll_outputs_t places = EXPERTD_INIT(expertd_ll_outputs_t);
  expertd_handle_t handle{};
  uint16_t* combined = nullptr;
  OpEnd dispatched;
  OpEnd combined_end;
};

class LowLatencyRun {
 public:
  LowLatencyRun(RankGroup* group, const RandomCase& random_case, Place place)
      : group_(group), case_(random_case), place_(place), outputs_(group->ranks()) {
    for (uint32_t rank = 0; rank < group->ranks(); ++rank) {
      arenas_.push_back(std::make_unique<RankArena>(&group->rank(rank).session, place != Place::kStaged));
    }
  }

  std::string run() {
    run_active([&](Rank& rank) { dispatch(rank); });
    const auto expected = reference_ll_dispatch(case_.shape, case_.inputs);
    for (uint32_t rank = 0; rank < group_->ranks(); ++rank) {
      if (std::string found = active(rank) ? check(rank, expected) : ""; !found.empty()) {
        return "rank " + std::to_string(rank) + ": " + found;
      }
    }
    run_active([&](Rank& rank) { combine(rank); });
    return compare_combined();
  }

 private:
  std::string compare_combined() const {
    const auto lanes = lane_rows(case_);
    const auto sums = reference_ll_combine(case_.shape, case_.inputs, lanes, LlSum::kOfRanks);
    const auto plain = reference_ll_combine(case_.shape, case_.inputs, lanes, LlSum::kOfLanes);
    const auto of_nodes = sums_of_nodes(lanes);
    for (uint32_t rank = 0; rank < group_->ranks(); ++rank) {
      const Outputs& out = outputs_[rank];
      if (!active(rank)) {
        continue;
      }
      if (!out.combined_end.outcome.ok()) {
        return "combine of rank " + std::to_string(rank) + ": " + describe(out.combined_end.outcome);
      }
      const std::vector<uint16_t> combined(out.combined, out.combined + sums[rank].size());
      std::string found = of_nodes.empty() ? compare_ll_combine(sums[rank], plain[rank], combined)
                                           : compare_nodes(rank, sums[rank], of_nodes, combined);
      if (!found.empty()) {
        return "rank " + std::to_string(rank) + ": " + found;
      }
    }
    return {};
  }

  /// What each node's experts alone make of the tokens of every rank; nothing where all ranks are on one.
  std::vector<std::vector<std::vector<float>>> sums_of_nodes(const std::vector<std::vector<uint16_t>>& lanes) const {
    std::vector<std::vector<std::vector<float>>> sums;
    for (uint32_t node = 0; group_->nodes() > 1 && node < group_->nodes(); ++node) {
      std::vector<RankInput> inputs = case_.inputs;
      for (RankInput& input : inputs) {
        for (int64_t& id : input.topk_idx) {
          const auto owner = static_cast<uint64_t>(std::max<int64_t>(id, 0)) / case_.shape.local_experts;
          id = group_->node_of()[owner] == node ? id : -1;
        }
      }
      sums.push_back(reference_ll_combine(case_.shape, inputs, lanes, LlSum::kOfRanks));
    }
    return sums;
  }

  std::string compare_nodes(uint32_t rank, const std::vector<float>& sums,
                            const std::vector<std::vector<std::vector<float>>>& of_nodes,
                            const std::vector<uint16_t>& combined) const {
    for (size_t at = 0; at < sums.size(); ++at) {
      float elsewhere = 0;
      for (uint32_t node = 0; node < of_nodes.size(); ++node) {
        elsewhere += node == group_->node_of()[rank] ? 0 : std::abs(of_nodes[node][rank][at]);
      }
      const float got = reference_bf16_to_float(combined[at]);
      const float wanted = reference_bf16_to_float(reference_float_to_bf16(sums[at]));
      if (!(std::abs(got - wanted) <= nodes_combine_bound(elsewhere, got, wanted))) {
        return "combined element " + std::to_string(at) + " is " + std::to_string(got) + ", not " +
               std::to_string(wanted);
      }
    }
    return {};
  }

  bool active(uint32_t rank) const { return case_.shape.active_ranks.contains(rank); }
  void run_active(const std::function<void(Rank&)>& body) {
    group_->run([&](Rank& rank) {
      if (active(rank.rank)) {
        body(rank);
      }
    });
  }
  size_t rows() const { return size_t{case_.shape.local_experts} * case_.shape.slots_per_expert; }

  size_t side_row_bytes() const {
    const OpShape& shape = case_.shape;
    if (shape.payload != Payload::kFp8) {
      return size_t{shape.side_elements} * shape.side_element_bytes;
    }
    return shape.scale == ScaleForm::kUe8m0 ? shape.hidden / 128 : shape.hidden / 128 * 4;
  }

  void give_outputs(uint32_t rank, expertd_ll_dispatch_args_t* args) {
    const OpShape& shape = case_.shape;
    RankArena& arena = *arenas_[rank];
    if (place_ == Place::kWindow) {
      return;
    }
    args->recv_x = arena.output<uint8_t>(rows() * shape.out_row_bytes);
    args->recv_scales = arena.output<uint8_t>(rows() * side_row_bytes());
    args->expert_counts = arena.output<int32_t>(shape.local_experts);
    args->recv_src_info = arena.output<int32_t>(rows());
    args->layout_range = arena.output<int64_t>(size_t{shape.local_experts} * shape.ranks);
    expertd_ll_outputs_t& places = outputs_[rank].places;
    places.recv_x = args->recv_x;
    places.recv_scales = args->recv_scales;
    places.expert_counts = args->expert_counts;
    places.recv_src_info = args->recv_src_info;
    places.layout_range = args->layout_range;
    places.rows_per_expert = shape.slots_per_expert;
  }

  void dispatch(Rank& rank) {
    const OpShape& shape = case_.shape;
    const RankInput& input = case_.inputs[rank.rank];
    RankArena& arena = *arenas_[rank.rank];
    Outputs& out = outputs_[rank.rank];
    expertd_ll_dispatch_args_t args = EXPERTD_INIT(expertd_ll_dispatch_args_t);
    args.x = arena.input(input.x);
    args.dtype = shape.payload == Payload::kBytes ? EXPERTD_BYTES : EXPERTD_BF16;
    args.row_bytes = shape.row_bytes;
    args.side = arena.input(input.side);
    args.side_elements = shape.side_elements;
    args.side_element_bytes = shape.side_element_bytes;
    const auto ids = ids_of(input);
    args.topk_idx = arena.input(ids);
    args.idx_type = shape.topk_idx_bytes == 4 ? EXPERTD_I32 : EXPERTD_I64;
    args.tokens = input.tokens;
    args.token_bound = case_.token_bound;
    args.flags = shape.payload != Payload::kFp8       ? 0u
                 : shape.scale == ScaleForm::kUe8m0   ? EXPERTD_USE_FP8 | EXPERTD_ROUND_SCALE | EXPERTD_UE8M0
                 : shape.scale == ScaleForm::kRounded ? EXPERTD_USE_FP8 | EXPERTD_ROUND_SCALE
                                                      : +EXPERTD_USE_FP8;
    int32_t* stats = arena.output<int32_t>(shape.local_experts);
    std::fill_n(stats, shape.local_experts, 1000);
    args.stats = stats;
    stats_[rank.rank] = stats;
    give_outputs(rank.rank, &args);
    expertd_event_t event{};
    out.dispatched.outcome = outcome_of(expertd_ll_dispatch(rank.group, &args, nullptr, &out.handle, &event));
    if (out.dispatched.outcome.ok()) {
      out.dispatched = finish(event);
    }
    if (place_ == Place::kWindow && out.dispatched.outcome.ok()) {
      out.dispatched.outcome = outcome_of(expertd_ll_handle_outputs(rank.group, out.handle, &out.places));
    }
  }

  std::vector<uint8_t> ids_of(const RankInput& input) const {
    const uint32_t width = case_.shape.topk_idx_bytes;
    std::vector<uint8_t> bytes(input.topk_idx.size() * width);
    for (size_t i = 0; i < input.topk_idx.size(); ++i) {
      std::memcpy(bytes.data() + i * width, &input.topk_idx[i], width);
    }
    return bytes;
  }

  std::string check(uint32_t rank, const std::vector<LlDispatchResult>& expected) {
    const Outputs& out = outputs_[rank];
    if (!out.dispatched.outcome.ok()) {
      return "ll_dispatch: " + describe(out.dispatched.outcome);
    }
    const expertd_op_result_t& result = out.dispatched.result;
    if (result.local_bytes != expected[rank].local_bytes || result.remote_bytes != expected[rank].remote_bytes ||
        result.expert_count_entries != case_.shape.local_experts) {
      return "result of ll_dispatch";
    }
    if (result.executor != EXPERTD_EXECUTOR_HOST || result.sms != 0) {
      return "executor " + std::to_string(result.executor);
    }
    for (uint32_t expert = 0; expert < case_.shape.local_experts; ++expert) {
      const size_t count = expected[rank].expert_rows[expert].size();
      if (result.expert_counts[expert] != count || stats_[rank][expert] != 1000 + static_cast<int32_t>(count)) {
        return "counts or statistics of local expert " + std::to_string(expert);
      }
    }
    const LlDispatchView view{static_cast<const uint8_t*>(out.places.recv_x),
                              side_row_bytes() == 0 ? nullptr : out.places.recv_scales, out.places.expert_counts,
                              out.places.recv_src_info, out.places.layout_range};
    return compare_ll_dispatch(case_.shape, rank, case_.inputs, expected, view);
  }

  /// The experts' answers where the combine reads them; rows that no token owns hold NaN.
  uint16_t* run_experts(uint32_t rank) {
    const OpShape& shape = case_.shape;
    const Outputs& out = outputs_[rank];
    const size_t elements = rows() * shape.hidden;
    uint16_t* x = place_ == Place::kWindow ? static_cast<uint16_t*>(out.places.combine_x)
                                           : arenas_[rank]->output<uint16_t>(elements);
    std::fill_n(x, elements, uint16_t{0x7fff});
    for (uint64_t at = 0; at < uint64_t{shape.local_experts} * shape.ranks; ++at) {
      const uint64_t expert = at / shape.ranks;
      const auto range = static_cast<uint64_t>(out.places.layout_range[at]);
      for (uint64_t row = range >> 32; row < (range >> 32) + (range & 0xffffffffu); ++row) {
        const uint64_t slot = expert * shape.slots_per_expert + row;
        const auto token = static_cast<uint64_t>(out.places.recv_src_info[slot]);
        const auto made = expert_row(case_, uint64_t{rank} * shape.local_experts + expert, at % shape.ranks, token);
        std::copy(made.begin(), made.end(), x + slot * shape.hidden);
      }
    }
    return x;
  }

  void combine(Rank& rank) {
    const RankInput& input = case_.inputs[rank.rank];
    RankArena& arena = *arenas_[rank.rank];
    Outputs& out = outputs_[rank.rank];
    expertd_ll_combine_args_t args = EXPERTD_INIT(expertd_ll_combine_args_t);
    uint16_t* x = run_experts(rank.rank);
    args.x = place_ == Place::kWindow ? nullptr : x;
    args.topk_idx = arena.input(ids_of(input));
    args.idx_type = case_.shape.topk_idx_bytes == 4 ? EXPERTD_I32 : EXPERTD_I64;
    args.topk_weights = arena.input(input.topk_weights);
    args.handle = out.handle;
    args.tokens = input.tokens;
    args.token_bound = case_.token_bound;
    out.combined = arena.output<uint16_t>(size_t{input.tokens} * case_.shape.hidden);
    args.combined_x = out.combined;
    expertd_event_t event{};
    out.combined_end.outcome = outcome_of(expertd_ll_combine(rank.group, &args, nullptr, &event));
    if (out.combined_end.outcome.ok()) {
      out.combined_end = finish(event);
    }
  }

  RankGroup* group_;
  const RandomCase& case_;
  Place place_;
  std::vector<Outputs> outputs_;
  std::vector<int32_t*> stats_ = std::vector<int32_t*>(64);
  std::vector<std::unique_ptr<RankArena>> arenas_;
};

}  // namespace

std::string run_low_latency(RankGroup* group, const RandomCase& random_case, Place place, uint32_t rounds) {
  std::string found;
  for (uint32_t round = 0; round < rounds && found.empty(); ++round) {
    found = LowLatencyRun(group, random_case, place).run();
  }
  return found;
}

}  // namespace expertd::support
