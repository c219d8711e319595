// SPDX-License-Identifier: Apache-2.0
// Cases for the kernels on a GPU that the random ones do not reach: many tokens, many lanes, wide rows. Pure, tests
// only.
#pragma once

#include <cstring>

#include "tests/support/random_case.h"

namespace expertd::device_test {

using kernels::OpKind;
using support::RandomCase;
using support::RankInput;

/// More tokens than one block of the route kernels numbers, uneven over the ranks.
inline RandomCase make_large_case(uint64_t seed, OpKind kind, uint32_t ranks) {
  support::Random random(seed);
  RandomCase made;
  made.seed = seed;
  made.shape.kind = kind;
  made.shape.ranks = ranks;
  made.shape.local_experts = random.between(1, 64);
  made.shape.experts = ranks * made.shape.local_experts;
  made.shape.top_k = random.between(1, 9);
  made.shape.topk_idx_bytes = seed % 2 == 0 ? 4 : 8;
  made.shape.active_ranks = base::RankSet::first(ranks);
  made.later_active = made.shape.active_ranks;
  made.shape.hidden = 128;
  made.shape.row_bytes = 256;
  made.shape.out_row_bytes = 256;
  made.shape.expanded = kind == OpKind::kDispatch ? random.below(2) : 0;
  made.shape.worst_tokens = random.below(2);
  made.shape.max_tokens = kind == OpKind::kDispatch ? 3000 : 700;
  made.shape.slots_per_expert = ranks * made.shape.max_tokens;
  made.combine_weights = kind == OpKind::kDispatch;
  made.optional_outputs = true;
  made.inputs.resize(ranks);
  for (RankInput& input : made.inputs) {
    input.tokens = random.between(made.shape.max_tokens / 2, made.shape.max_tokens);
    for (uint32_t i = 0; i < input.tokens * made.shape.top_k; ++i) {
      const uint32_t lane = i % made.shape.top_k;
      // Lanes of one token choose from different experts where there are enough.
      const uint32_t expert = random.below(made.shape.experts / made.shape.top_k + 1) * made.shape.top_k + lane;
      input.topk_idx.push_back(expert < made.shape.experts && !random.chance(10) ? static_cast<int64_t>(expert) : -1);
      input.topk_weights.push_back(static_cast<float>(random.unit()));
    }
    const auto rows = support::random_rows(&random, size_t{input.tokens} * made.shape.hidden);
    input.x.resize(rows.size() * 2);
    std::memcpy(input.x.data(), rows.data(), input.x.size());
  }
  made.capacities.assign(ranks, made.shape.local_experts * made.shape.slots_per_expert);
  if (kind == OpKind::kDispatch) {
    const auto dispatched = support::reference_dispatch(made.shape, made.inputs);
    for (uint32_t r = 0; r < ranks; ++r) {
      made.capacities[r] = static_cast<uint32_t>(dispatched[r].rows.size()) + 100;
    }
  }
  return made;
}

/// Few experts and 32 lanes, so that ids stand in a token several times; a rank without tokens; the widest rows.
inline RandomCase make_edge_case(uint64_t seed, uint32_t ranks) {
  support::Random random(seed);
  RandomCase made = make_large_case(seed, OpKind::kLlDispatch, ranks);
  made.shape.local_experts = 3;
  made.shape.experts = 3 * ranks;
  made.shape.top_k = 32;
  made.shape.hidden = seed % 2 == 0 ? 7168 : 16384;
  made.shape.max_tokens = 100;
  made.shape.slots_per_expert = 100 * ranks;
  made.shape.payload = seed % 3 == 0 ? kernels::Payload::kBf16 : kernels::Payload::kFp8;
  made.shape.scale = seed % 3 == 1 ? kernels::ScaleForm::kUe8m0 : kernels::ScaleForm::kFloat32;
  made.shape.row_bytes = made.shape.hidden * 2;
  made.shape.out_row_bytes = made.shape.hidden * (seed % 3 == 0 ? 2 : 1);
  made.capacities.assign(ranks, 3 * made.shape.slots_per_expert);
  for (uint32_t r = 0; r < ranks; ++r) {
    RankInput& input = made.inputs[r];
    // Every fourth case has more rows for an expert than slots.
    input.tokens = r + 1 == ranks && seed % 2 == 0 ? 0 : (seed % 4 == 3 ? 40 : 7);
    input.topk_idx.resize(input.tokens * 32);
    input.topk_weights.resize(input.tokens * 32);
    for (int64_t& id : input.topk_idx) {
      id = seed % 4 == 3 ? 1 : (random.chance(5) ? -1 : static_cast<int64_t>(random.below(made.shape.experts)));
    }
    const auto rows = support::random_rows(&random, size_t{input.tokens} * made.shape.hidden);
    input.x.resize(rows.size() * 2);
    std::memcpy(input.x.data(), rows.data(), input.x.size());
  }
  return made;
}

}  // namespace expertd::device_test
