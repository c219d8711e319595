// SPDX-License-Identifier: Apache-2.0
// Generator of random cases. Each aspect (shape, routing, payload, flags) has a function of its own that draws from the
// case's one random sequence.
#include "tests/support/random_case.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

namespace expertd::support {
namespace {

using kernels::OpKind;
using kernels::OpShape;
using kernels::Payload;
using kernels::ScaleForm;

template <typename T, size_t n>
T pick(Random* random, const T (&values)[n]) {
  return values[random->below(n)];
}

void draw_active(Random* random, OpShape* shape) {
  shape->active_ranks = base::RankSet::first(shape->ranks);
  if (random->chance(25)) {
    base::RankSet some;
    for (uint32_t first = 0; first < shape->ranks; first += 64) {
      some.words[first / 64] = random->next() | random->next();
    }
    some.add(random->below(shape->ranks));
    shape->active_ranks &= some;
  }
}

void draw_group(Random* random, uint32_t ranks, OpShape* shape) {
  const uint32_t roll = random->below(100);
  shape->ranks = ranks != 0 ? ranks : roll < 90 ? random->between(1, 8) : (roll < 97 ? 16 : 64);
  shape->local_experts = shape->ranks > 8 ? random->between(1, 4) : pick(random, {1u, 2u, 3u, 4u, 8u, 16u});
  if (shape->kind != OpKind::kLlDispatch && shape->ranks <= 4 && random->chance(3)) {
    shape->local_experts = 256;
  }
  shape->experts = shape->ranks * shape->local_experts;
  shape->top_k = random->chance(80) ? pick(random, {1u, 2u, 4u, 6u, 8u}) : random->between(1, 32);
  shape->topk_idx_bytes = random->chance(50) ? 4 : 8;
  draw_active(random, shape);
}

void draw_payload(Random* random, OpShape* shape) {
  const bool ll = shape->kind == OpKind::kLlDispatch;
  shape->hidden = random->chance(4) ? 7168 : 128 * pick(random, {1u, 1u, 2u, 3u, 4u, 5u, 8u});
  shape->hidden = shape->ranks > 64 ? std::min(shape->hidden, 384U) : shape->hidden;
  shape->payload = random->chance(35) ? Payload::kBytes : Payload::kBf16;
  if (ll && random->chance(50)) {
    shape->payload = Payload::kFp8;
    shape->scale = pick(random, {ScaleForm::kFloat32, ScaleForm::kRounded, ScaleForm::kUe8m0});
  }
  if (ll && uint64_t{shape->experts} * shape->ranks * shape->hidden > 1'000'000) {
    shape->hidden = 128;
  }
  if (shape->scale == ScaleForm::kUe8m0) {
    shape->hidden = (shape->hidden + 511) / 512 * 512;
  }
  shape->row_bytes = shape->hidden * 2;
  if (shape->payload == Payload::kBytes) {
    shape->row_bytes = 16 * random->between(1, 40);
    shape->side_elements = random->chance(80) ? random->between(1, 20) : 0;
    shape->side_element_bytes = pick(random, {1u, 2u, 4u});
  }
  shape->out_row_bytes = shape->payload == Payload::kFp8 ? shape->hidden : shape->row_bytes;
}

/// Most tokens of a rank, so that neither copies nor LL windows become large.
uint32_t token_limit(const OpShape& shape) {
  const uint64_t copies = uint64_t{shape.ranks} * shape.top_k * shape.hidden;
  uint64_t limit = 400'000 / copies;
  if (shape.kind == OpKind::kLlDispatch) {
    limit = std::min<uint64_t>(limit, 1'500'000 / (uint64_t{shape.experts} * shape.ranks * shape.hidden));
  }
  return static_cast<uint32_t>(std::clamp<uint64_t>(limit, 2, 48));
}

/// Experts of one token: skewed by `skew` (0 even, 1 zipf, 2 all to one), with lanes of -1 and perhaps duplicates.
struct RoutingStyle {
  uint32_t skew = 0;
  uint32_t none_percent = 0;
  bool duplicates = false;
  int64_t favourite = 0;
};

int64_t draw_expert(Random* random, const RoutingStyle& style, uint32_t experts) {
  if (style.skew == 2) {
    return style.favourite;
  }
  if (style.skew == 1) {
    const double rank = std::exp2(random->unit() * std::log2(static_cast<double>(experts) + 1)) - 1;
    return std::min<int64_t>(static_cast<int64_t>(rank), static_cast<int64_t>(experts) - 1);
  }
  return random->below(experts);
}

void draw_routing(Random* random, const RoutingStyle& style, const OpShape& shape, RankInput* input) {
  for (uint32_t token = 0; token < input->tokens; ++token) {
    const size_t first = input->topk_idx.size();
    for (uint32_t lane = 0; lane < shape.top_k; ++lane) {
      int64_t expert = random->chance(style.none_percent) ? -1 : draw_expert(random, style, shape.experts);
      const auto begin = input->topk_idx.begin() + static_cast<std::ptrdiff_t>(first);
      if (!style.duplicates && std::find(begin, input->topk_idx.end(), expert) != input->topk_idx.end()) {
        expert = -1;
      }
      input->topk_idx.push_back(expert);
    }
  }
}

void draw_mask(Random* random, const OpShape& shape, bool consistent, RankInput* input) {
  for (uint32_t token = 0; token < input->tokens; ++token) {
    for (uint32_t rank = 0; rank < shape.ranks; ++rank) {
      bool goes = !consistent && random->chance(30);
      for (uint32_t lane = 0; consistent && lane < shape.top_k; ++lane) {
        const int64_t id = input->topk_idx[size_t{token} * shape.top_k + lane];
        goes = goes || (id >= 0 && id / shape.local_experts == rank);
      }
      input->token_rank_mask.push_back(goes ? static_cast<uint8_t>(random->between(1, 255)) : uint8_t{0});
    }
  }
}

/// Rows for quantisation: ordinary, tiny, constant, zero and (rarely) non-finite ones.
void fill_bf16_rows(Random* random, uint32_t hidden, RankInput* input) {
  for (uint32_t token = 0; token < input->tokens; ++token) {
    const uint32_t style = random->below(12);
    const auto base = static_cast<uint16_t>(random->between(90, 140) << 7);
    const uint16_t constant = static_cast<uint16_t>(base | random->below(128));
    for (uint32_t i = 0; i < hidden; ++i) {
      const uint64_t bits = random->next();
      auto value = static_cast<uint16_t>((bits & 0x807f) | (base - (((bits >> 20) % 12) << 7)));
      if (style == 0) {
        value = constant;
      } else if (style == 1) {
        value = static_cast<uint16_t>(bits & 0x8000);
      } else if (style == 2 && bits >> 58 == 0) {
        value = static_cast<uint16_t>(bits);  // any bit pattern
      } else if (style == 3) {
        value = static_cast<uint16_t>(bits & 0xb8ff);  // below the floor of amax
      }
      std::memcpy(input->x.data() + (size_t{token} * hidden + i) * 2, &value, 2);
    }
  }
}

void fill_bytes(Random* random, std::vector<uint8_t>* bytes) {
  for (uint8_t& byte : *bytes) {
    byte = static_cast<uint8_t>(random->next() >> 32);
  }
}

void fill_payload(Random* random, const OpShape& shape, RankInput* input) {
  input->x.resize(size_t{input->tokens} * shape.row_bytes);
  input->side.resize(size_t{input->tokens} * shape.side_elements * shape.side_element_bytes);
  fill_bytes(random, &input->side);
  if (shape.payload == Payload::kFp8) {
    fill_bf16_rows(random, shape.hidden, input);
  } else {
    fill_bytes(random, &input->x);
  }
}

void draw_flags(Random* random, RandomCase* result) {
  OpShape& shape = result->shape;
  result->optional_outputs = random->chance(75);
  result->side_layout = random->below(3);
  if (shape.kind != OpKind::kDispatch) {
    return;
  }
  shape.expanded = random->chance(35) ? 1 : 0;
  shape.worst_tokens = random->chance(40) ? 1 : 0;
  shape.zero_foreign_weights = random->chance(50) ? 1 : 0;
  shape.expert_alignment = pick(random, {1u, 1u, 4u, 8u, 128u});
  // Gaps cost memory: at most alignment - 1 rows per expert.
  while (shape.expanded != 0 && uint64_t{shape.experts} * shape.expert_alignment * shape.hidden > 1'000'000 &&
         shape.expert_alignment > 1) {
    shape.expert_alignment /= 2;
  }
  result->combine_weights = random->chance(60);
  result->order_last_lane = random->chance(40);
}

void draw_inputs(Random* random, RandomCase* result) {
  const OpShape& shape = result->shape;
  const bool dispatch = shape.kind == OpKind::kDispatch;
  const bool weights = shape.kind == OpKind::kLlDispatch || random->chance(75);
  const bool masked = dispatch && shape.expanded == 0 && random->chance(20);
  const bool consistent = random->chance(50);
  const bool ids = !masked || consistent || random->chance(60);
  const bool bias[2] = {random->chance(30), random->chance(20)};
  RoutingStyle style;
  style.skew = pick(random, {0u, 0u, 1u, 1u, 2u});
  style.none_percent = pick(random, {0u, 10u, 60u});
  style.duplicates = random->chance(25);
  if (shape.kind == OpKind::kLlDispatch) {
    // Duplicates can send an expert K rows per token, and the windows are made wide enough for that.
    style.duplicates =
        style.duplicates &&
        uint64_t{shape.experts} * shape.ranks * shape.hidden * shape.top_k * shape.max_tokens < 4'000'000;
  }
  style.favourite = random->below(shape.experts);
  for (RankInput& input : result->inputs) {
    if (ids) {
      draw_routing(random, style, shape, &input);
    }
    if (masked) {
      draw_mask(random, shape, consistent, &input);
    }
    for (size_t i = 0; weights && i < size_t{input.tokens} * shape.top_k; ++i) {
      input.topk_weights.push_back(static_cast<float>(random->unit()));
    }
    fill_payload(random, shape, &input);
    if (dispatch && bias[0]) {
      input.bias0 = random_rows(random, size_t{input.tokens} * shape.hidden);
    }
    if (dispatch && bias[1]) {
      input.bias1 = random_rows(random, size_t{input.tokens} * shape.hidden);
    }
  }
}

/// Most rows of one expert: LL windows are widened where duplicates need it, so that only error cases overflow.
uint32_t most_expert_rows(const RandomCase& random_case) {
  std::vector<uint32_t> rows(random_case.shape.experts);
  for (const RankInput& input : random_case.inputs) {
    for (const int64_t id : input.topk_idx) {
      if (id >= 0) {
        ++rows[static_cast<size_t>(id)];
      }
    }
  }
  return *std::max_element(rows.begin(), rows.end());
}

void draw_capacities(Random* random, RandomCase* result) {
  OpShape& shape = result->shape;
  if (shape.kind == OpKind::kLlDispatch) {
    const uint32_t needed = (most_expert_rows(*result) + shape.ranks - 1) / shape.ranks;
    shape.max_tokens = std::max(shape.max_tokens, needed);
    shape.slots_per_expert = shape.ranks * shape.max_tokens;
    result->capacities.assign(shape.ranks, shape.local_experts * shape.slots_per_expert);
    return;
  }
  result->capacities.assign(shape.ranks, 0);
  if (shape.kind != OpKind::kDispatch) {
    return;
  }
  const uint32_t slack = random->chance(50) ? 0 : random->below(20);
  const auto dispatched = reference_dispatch(shape, result->inputs);
  for (uint32_t rank = 0; rank < shape.ranks; ++rank) {
    result->capacities[rank] = static_cast<uint32_t>(dispatched[rank].rows.size()) + slack;
  }
}

}  // namespace

uint64_t Random::next() {
  state_ += 0x9e3779b97f4a7c15ULL;
  uint64_t mixed = state_;
  mixed = (mixed ^ (mixed >> 30)) * 0xbf58476d1ce4e5b9ULL;
  mixed = (mixed ^ (mixed >> 27)) * 0x94d049bb133111ebULL;
  return mixed ^ (mixed >> 31);
}

uint32_t Random::below(uint32_t bound) {
  return static_cast<uint32_t>((next() >> 32) * bound >> 32);
}

double Random::unit() {
  return static_cast<double>(next() >> 11) * 0x1p-53;
}

std::vector<uint16_t> random_rows(Random* random, size_t elements) {
  std::vector<uint16_t> rows(elements);
  for (uint16_t& value : rows) {
    const uint64_t bits = random->next();
    value = static_cast<uint16_t>((bits & 0x807f) | ((118 + (bits >> 20) % 14) << 7));
    if (bits >> 57 == 0) {
      value = static_cast<uint16_t>(bits & 0x807f);  // zeros and subnormals of both signs
    }
  }
  return rows;
}

RandomCase make_random_case(uint64_t seed, OpKind kind, uint32_t ranks) {
  Random random(seed ^ (static_cast<uint64_t>(kind) << 56));
  RandomCase result;
  result.seed = seed;
  result.shape.kind = kind;
  draw_group(&random, ranks, &result.shape);
  draw_payload(&random, &result.shape);
  if (kind == OpKind::kLayout) {
    result.shape.ranks_per_node = random.chance(50) ? 0 : random.between(1, result.shape.ranks);
  }
  draw_flags(&random, &result);
  const uint32_t limit = token_limit(result.shape);
  result.inputs.resize(result.shape.ranks);
  for (RankInput& input : result.inputs) {
    input.tokens = random.chance(15) ? 0 : random.between(1, limit);
    result.shape.max_tokens = std::max(result.shape.max_tokens, input.tokens);
  }
  result.shape.max_tokens = std::max(result.shape.max_tokens + random.below(3), 1u);
  draw_inputs(&random, &result);
  draw_capacities(&random, &result);
  result.later_active = result.shape.active_ranks;
  if (random.chance(15)) {
    // One more rank is lost between the dispatch and what uses its handle; at least one stays.
    base::RankSet fewer = result.shape.active_ranks;
    fewer.remove(static_cast<uint32_t>(fewer.lowest()));
    result.later_active = fewer.any() ? fewer : result.shape.active_ranks;
  }
  return result;
}

void refill_payload(uint64_t seed, RandomCase* random_case) {
  Random random(~seed);
  for (RankInput& input : random_case->inputs) {
    fill_payload(&random, random_case->shape, &input);
  }
}

std::string repro_line(const RandomCase& random_case) {
  const OpShape& shape = random_case.shape;
  std::string line = "EXPERTD_SEED=" + std::to_string(random_case.seed);
  const auto add = [&line](const char* name, uint64_t value) { line += std::string(name) + std::to_string(value); };
  add(" (kind ", static_cast<uint64_t>(shape.kind));
  add(" R ", shape.ranks);
  add(" E ", shape.experts);
  add(" K ", shape.top_k);
  add(" H ", shape.hidden);
  add(" M ", shape.max_tokens);
  add(" payload ", static_cast<uint64_t>(shape.payload));
  add(" scale ", static_cast<uint64_t>(shape.scale));
  add(" expanded ", shape.expanded);
  add(" worst ", shape.worst_tokens);
  add(" active ", shape.active_ranks.count());
  add(" later ", random_case.later_active.count());
  return line + ")";
}

std::vector<uint64_t> seeds_to_run(uint32_t cases) {
  const char* seed = std::getenv("EXPERTD_SEED");
  if (seed != nullptr && *seed != '\0') {
    return {std::strtoull(seed, nullptr, 0)};
  }
  const char* wanted = std::getenv("EXPERTD_CASES");
  if (wanted != nullptr && *wanted != '\0') {
    cases = static_cast<uint32_t>(std::strtoul(wanted, nullptr, 0));
  }
  const char* start = std::getenv("EXPERTD_TEST_SEED");
  std::vector<uint64_t> seeds;
  Random random(20240229 + (start != nullptr ? std::strtoull(start, nullptr, 0) : 0));
  for (uint32_t i = 0; i < cases; ++i) {
    seeds.push_back(random.next());
  }
  return seeds;
}

}  // namespace expertd::support
