// SPDX-License-Identifier: Apache-2.0
// Wished-for cases, and what high throughput and low latency runs share.
#include "tests/integration/moe_case.h"

#include <algorithm>

namespace expertd::support {
namespace {

using kernels::OpKind;
using kernels::OpShape;
using kernels::Payload;

OpShape shape_of(OpKind kind, const Wish& wish) {
  OpShape shape;
  shape.kind = kind;
  shape.payload = wish.payload;
  shape.scale = wish.scale;
  shape.expanded = wish.expanded ? 1 : 0;
  shape.worst_tokens = wish.worst_tokens ? 1 : 0;
  shape.zero_foreign_weights = wish.keep_foreign_weights ? 0 : 1;
  shape.ranks = wish.ranks;
  shape.local_experts = wish.local_experts;
  shape.experts = wish.ranks * wish.local_experts;
  shape.top_k = wish.top_k;
  shape.hidden = wish.hidden;
  shape.row_bytes = wish.payload == Payload::kBytes ? 48 : 2 * wish.hidden;
  shape.out_row_bytes = wish.payload == Payload::kFp8 ? wish.hidden : shape.row_bytes;
  shape.topk_idx_bytes = wish.narrow_ids ? 4 : 8;
  shape.side_elements = wish.payload == Payload::kBytes ? 5 : 0;
  shape.side_element_bytes = wish.payload == Payload::kBytes ? 2 : 0;
  shape.expert_alignment = wish.alignment;
  shape.max_tokens = wish.max_tokens != 0 ? wish.max_tokens : wish.tokens;
  shape.slots_per_expert = wish.ranks * shape.max_tokens;
  shape.active_ranks = base::RankSet::first(wish.ranks);
  return shape;
}

/// Distinct experts for every token, with a lane of -1 now and then.
void draw_experts(Random* random, const OpShape& shape, RankInput* input) {
  for (uint32_t token = 0; token < input->tokens; ++token) {
    const size_t first = input->topk_idx.size();
    while (input->topk_idx.size() < first + shape.top_k) {
      int64_t expert = random->below(shape.experts);
      const auto begin = input->topk_idx.begin() + static_cast<std::ptrdiff_t>(first);
      const bool taken = std::find(begin, input->topk_idx.end(), expert) != input->topk_idx.end();
      input->topk_idx.push_back(taken || random->chance(10) ? -1 : expert);
    }
  }
}

void draw_bytes(Random* random, size_t count, std::vector<uint8_t>* bytes) {
  bytes->resize(count);
  for (uint8_t& byte : *bytes) {
    byte = static_cast<uint8_t>(random->next() >> 24);
  }
}

void draw_rows(Random* random, const OpShape& shape, RankInput* input) {
  if (shape.payload == Payload::kBytes) {
    draw_bytes(random, size_t{input->tokens} * shape.row_bytes, &input->x);
    draw_bytes(random, size_t{input->tokens} * shape.side_elements * shape.side_element_bytes, &input->side);
    return;
  }
  const auto rows = random_rows(random, size_t{input->tokens} * shape.hidden);
  input->x.resize(rows.size() * 2);
  std::copy_n(reinterpret_cast<const uint8_t*>(rows.data()), input->x.size(), input->x.begin());
}

void draw_input(Random* random, const OpShape& shape, const Wish& wish, RankInput* input) {
  draw_experts(random, shape, input);
  draw_rows(random, shape, input);
  const size_t lanes = size_t{input->tokens} * shape.top_k;
  for (size_t i = 0; i < lanes && (wish.weights || shape.kind == OpKind::kLlDispatch); ++i) {
    input->topk_weights.push_back(static_cast<float>(random->unit()));
  }
  for (size_t i = 0; i < size_t{input->tokens} * shape.ranks && wish.mask; ++i) {
    input->token_rank_mask.push_back(random->chance(40) ? uint8_t{1} : uint8_t{0});
  }
  if (wish.biases) {
    input->bias0 = random_rows(random, size_t{input->tokens} * shape.hidden);
    input->bias1 = random_rows(random, size_t{input->tokens} * shape.hidden);
  }
}

}  // namespace

RandomCase make_case(OpKind kind, const Wish& wish) {
  Random random(wish.seed);
  RandomCase made;
  made.seed = wish.seed;
  made.shape = shape_of(kind, wish);
  made.later_active = made.shape.active_ranks;
  made.combine_weights = wish.weights && kind == OpKind::kDispatch;
  made.order_last_lane = wish.last_lane;
  made.optional_outputs = true;
  made.side_layout = wish.side_layout;
  made.token_bound = wish.token_bound;
  made.inputs.resize(wish.ranks);
  for (uint32_t rank = 0; rank < wish.ranks; ++rank) {
    const bool empty = wish.empty_rank == -2 || wish.empty_rank == static_cast<int32_t>(rank);
    made.inputs[rank].tokens = empty ? 0 : wish.tokens - rank % 3;
    draw_input(&random, made.shape, wish, &made.inputs[rank]);
  }
  made.capacities.assign(wish.ranks, made.shape.local_experts * made.shape.slots_per_expert);
  if (kind == OpKind::kDispatch) {
    const auto dispatched = reference_dispatch(made.shape, made.inputs);
    for (uint32_t rank = 0; rank < wish.ranks; ++rank) {
      made.capacities[rank] = static_cast<uint32_t>(dispatched[rank].rows.size()) + (wish.worst_tokens ? 7 : 0);
    }
  }
  return made;
}

void configure(const RandomCase& random_case, expertd_group_options_t* options) {
  const OpShape& shape = random_case.shape;
  options->num_experts = shape.experts;
  options->hidden = shape.hidden;
  options->top_k = shape.top_k;
  options->max_tokens = shape.max_tokens;
  options->mode = shape.kind == OpKind::kLlDispatch ? EXPERTD_MODE_INFERENCE : EXPERTD_MODE_NORMAL;
  options->op_timeout_ns = 20'000'000'000;
  options->join_timeout_ns = 20'000'000'000;
}

std::string run_case(const std::vector<Seat>& seats, const RandomCase& random_case, Place place) {
  RankGroup group(seats, "case", [&](expertd_group_options_t* options) { configure(random_case, options); });
  if (!group.ok()) {
    return group.failure();
  }
  return random_case.shape.kind == OpKind::kLlDispatch ? run_low_latency(&group, random_case, place)
                                                       : run_high_throughput(&group, random_case, place);
}

}  // namespace expertd::support
