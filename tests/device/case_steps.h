// SPDX-License-Identifier: Apache-2.0
// A random case as the operations that it is made of, whoever runs them on a GPU: its tensors by name, and what comes
// after its dispatch. Pure, tests only.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "proto/abi/ring_v1.h"
#include "tests/support/random_case_host.h"

namespace expertd::device_test {

using kernels::OpKind;
using kernels::OpParams;
using support::GroupMemory;
using support::PoisonedBuffer;
using support::RandomCase;
using support::RankInput;
using support::RankMemory;

template <typename T>
size_t bytes_of(const std::vector<T>& values) {
  return values.size() * sizeof(T);
}

/// One tensor of an operation in memory of the host: an expertd_tensor. Null data: not given.
struct CaseTensor {
  uint32_t name;
  const void* data;
  size_t bytes;
  PoisonedBuffer* output = nullptr;  // where an output is to come back to
};

/// Calls `visit` with every tensor of a rank's params. `rows`: what the experts return, for a combine.
template <typename Visit>
void for_each_tensor(const RankInput& input, const support::CombineInput* rows, const OpParams& params, RankMemory* own,
                     const Visit& visit) {
  const bool row_weights = rows != nullptr && params.shape.kind == OpKind::kCombine;
  visit({EXPERTD_IN_X, params.in.x, rows != nullptr ? bytes_of(rows->x) : input.x.size()});
  visit({EXPERTD_IN_TOPK_IDX, params.in.topk_idx, own->topk_idx.size()});
  visit({EXPERTD_IN_TOPK_WEIGHTS, params.in.topk_weights,
         row_weights ? bytes_of(rows->weights) : bytes_of(input.topk_weights)});
  visit({EXPERTD_IN_SIDE, params.in.side, own->side.size()});
  visit({EXPERTD_IN_BIAS0, params.in.bias0, bytes_of(input.bias0)});
  visit({EXPERTD_IN_BIAS1, params.in.bias1, bytes_of(input.bias1)});
  visit({EXPERTD_IN_TOKEN_RANK_MASK, params.in.token_rank_mask, input.token_rank_mask.size()});
  const auto output = [&](uint32_t name, const void* given, PoisonedBuffer* buffer) {
    visit({name, given == nullptr ? nullptr : buffer->as<uint8_t>(), buffer->bytes(), buffer});
  };
  output(EXPERTD_OUT_X, params.out.x, &own->x);
  output(EXPERTD_OUT_SIDE, params.out.side, &own->out_side);
  output(EXPERTD_OUT_TOPK_IDX, params.out.topk_idx, &own->out_topk_idx);
  output(EXPERTD_OUT_TOPK_WEIGHTS, params.out.topk_weights, &own->out_topk_weights);
  output(EXPERTD_OUT_EXPERT_COUNTS, params.out.expert_counts, &own->expert_counts);
  output(EXPERTD_OUT_RANK_PREFIX, params.out.rank_prefix, &own->rank_prefix);
  output(EXPERTD_OUT_SRC_INFO, params.out.src_info, &own->src_info);
  output(EXPERTD_OUT_LAYOUT_RANGE, params.out.layout_range, &own->layout_range);
  output(EXPERTD_OUT_STATS, params.out.stats, &own->stats);
  output(EXPERTD_OUT_TOKEN_RANK_MASK, params.out.token_rank_mask, &own->token_rank_mask);
}

/// The combine that follows a dispatch.
inline RandomCase combine_of(const RandomCase& dispatch) {
  RandomCase combine = dispatch;
  combine.shape.kind = dispatch.shape.kind == OpKind::kDispatch ? OpKind::kCombine : OpKind::kLlCombine;
  combine.shape.payload = kernels::Payload::kBf16;
  combine.shape.row_bytes = combine.shape.hidden * 2;
  combine.shape.out_row_bytes = combine.shape.row_bytes;
  combine.shape.order_last_lane = dispatch.order_last_lane ? 1 : 0;
  combine.shape.active_ranks = dispatch.later_active;
  return combine;
}

/// Random expert outputs for a combine; sometimes a peer claims fewer rows than it received.
inline std::vector<support::CombineInput> make_rows(const RandomCase& random_case, std::vector<uint32_t>* in_rows) {
  const kernels::OpShape& shape = random_case.shape;
  support::Random random(random_case.seed + 17);
  std::vector<support::CombineInput> rows(shape.ranks);
  const bool ll = shape.kind == OpKind::kLlDispatch;
  for (uint32_t r = 0; r < shape.ranks; ++r) {
    const uint32_t count = ll ? shape.local_experts * shape.slots_per_expert : random_case.capacities[r];
    in_rows->push_back(!ll && random.chance(10) ? count / 2 : count);
    rows[r].x = support::random_rows(&random, size_t{count} * shape.hidden);
    const size_t weights = size_t{count} * (shape.expanded != 0 ? 1 : shape.top_k);
    for (size_t i = 0; random_case.combine_weights && i < weights; ++i) {
      rows[r].weights.push_back(static_cast<float>(random.unit()));
    }
  }
  return rows;
}

/// An id out of range or a row too few, in some cases.
inline void spoil(RandomCase* random_case) {
  for (uint32_t r = random_case->shape.ranks; r-- > 0;) {
    auto& ids = random_case->inputs[r].topk_idx;
    if (random_case->seed % 9 == 0 && !ids.empty()) {
      ids[ids.size() / 2] = random_case->shape.experts + 3;
      return;
    }
    if (random_case->seed % 9 == 1 && random_case->capacities[r] != 0) {
      random_case->capacities[r] = 0;
      return;
    }
  }
}

inline bool fails(const GroupMemory& memory) {
  return std::any_of(memory.reports.begin(), memory.reports.end(),
                     [](const kernels::OpReport& report) { return report.reason != 0; });
}

/// One operation of a case: what it is given, what the host kernels made of it, and memory for what a GPU makes.
struct CaseStep {
  const RandomCase& made;
  const std::vector<support::CombineInput>* rows = nullptr;  // of a combine
  const std::vector<uint32_t>* in_rows = nullptr;            // and how many each rank claims to have
  const GroupMemory& host;
  GroupMemory* gpu;
};

/// Dispatch, a cached dispatch (HT), and the combine with the same handle, each run by `run`.
template <typename Run>
void run_steps(const RandomCase& random_case, const Run& run) {
  auto handles = support::make_handles(random_case);
  auto other_handles = support::make_handles(random_case);  // the GPU has its own; only the params want some
  GroupMemory host = support::make_dispatch(random_case, &handles);
  GroupMemory gpu = support::make_dispatch(random_case, &other_handles);
  support::drive(support::Drive::kWhole, &host);
  run(CaseStep{random_case, nullptr, nullptr, host, &gpu});
  if (fails(host)) {
    const auto ends = support::reference_end(random_case.shape, random_case.inputs, random_case.capacities);
    for (uint32_t r = 0; r < random_case.shape.ranks; ++r) {
      const bool active = random_case.shape.active_ranks.contains(r);
      EXPECT_EQ(active ? ends[r].reason : 0u, host.reports[r].reason);
    }
    return;
  }
  if (random_case.shape.kind == OpKind::kDispatch) {
    RandomCase cached = random_case;
    cached.shape.cached = 1;
    cached.shape.active_ranks = random_case.later_active;
    support::refill_payload(random_case.seed, &cached);
    GroupMemory cached_host = support::make_dispatch(cached, &handles);
    GroupMemory cached_gpu = support::make_dispatch(cached, &other_handles);
    support::drive(support::Drive::kWhole, &cached_host);
    run(CaseStep{cached, nullptr, nullptr, cached_host, &cached_gpu});
  }
  std::vector<uint32_t> in_rows;
  const auto rows = make_rows(random_case, &in_rows);
  const RandomCase combine = combine_of(random_case);
  GroupMemory combine_host = support::make_combine(combine, &handles, rows, in_rows);
  GroupMemory combine_gpu = support::make_combine(combine, &other_handles, rows, in_rows);
  support::drive(support::Drive::kWhole, &combine_host);
  run(CaseStep{combine, &rows, &in_rows, combine_host, &combine_gpu});
}

}  // namespace expertd::device_test
