// SPDX-License-Identifier: Apache-2.0
// Requests of random cases in a GpuGroup's memory, and low latency pairs of which several are in flight. Tests only.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <vector>

#include "tests/device/compare_outputs.h"
#include "tests/device/gpu_group.h"
#include "tests/support/random_case_host.h"

namespace expertd::device_test {

using engine::Request;
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

inline void place_output(Arena* arena, PoisonedBuffer* buffer, const void* given, engine::TensorView* view) {
  if (given != nullptr) {
    *view = arena->place(buffer->as<uint8_t>(), buffer->bytes(), buffer);
  }
}

/// The request of one rank with every tensor of its params placed in the rank's arena, behind those of earlier
/// operations.
inline Request add_request(GpuGroup* group, uint32_t rank, const RankInput& input, const support::CombineInput* rows,
                           GroupMemory* memory) {
  const OpParams& params = memory->params[rank];
  RankMemory& own = memory->ranks[rank];
  Arena& arena = group->arena(rank);
  Request made = group->request(rank, params.shape);
  auto& t = made.tensors;
  const size_t x_bytes = rows != nullptr ? bytes_of(rows->x) : input.x.size();
  t[EXPERTD_IN_X] = arena.place(params.in.x, x_bytes);
  t[EXPERTD_IN_TOPK_IDX] = arena.place(params.in.topk_idx, own.topk_idx.size());
  const bool row_weights = rows != nullptr && params.shape.kind == OpKind::kCombine;
  t[EXPERTD_IN_TOPK_WEIGHTS] =
      arena.place(params.in.topk_weights, row_weights ? bytes_of(rows->weights) : bytes_of(input.topk_weights));
  t[EXPERTD_IN_SIDE] = arena.place(params.in.side, own.side.size());
  t[EXPERTD_IN_BIAS0] = arena.place(params.in.bias0, bytes_of(input.bias0));
  t[EXPERTD_IN_BIAS1] = arena.place(params.in.bias1, bytes_of(input.bias1));
  t[EXPERTD_IN_TOKEN_RANK_MASK] = arena.place(params.in.token_rank_mask, input.token_rank_mask.size());
  place_output(&arena, &own.x, params.out.x, &t[EXPERTD_OUT_X]);
  place_output(&arena, &own.out_side, params.out.side, &t[EXPERTD_OUT_SIDE]);
  place_output(&arena, &own.out_topk_idx, params.out.topk_idx, &t[EXPERTD_OUT_TOPK_IDX]);
  place_output(&arena, &own.out_topk_weights, params.out.topk_weights, &t[EXPERTD_OUT_TOPK_WEIGHTS]);
  place_output(&arena, &own.expert_counts, params.out.expert_counts, &t[EXPERTD_OUT_EXPERT_COUNTS]);
  place_output(&arena, &own.rank_prefix, params.out.rank_prefix, &t[EXPERTD_OUT_RANK_PREFIX]);
  place_output(&arena, &own.src_info, params.out.src_info, &t[EXPERTD_OUT_SRC_INFO]);
  place_output(&arena, &own.layout_range, params.out.layout_range, &t[EXPERTD_OUT_LAYOUT_RANGE]);
  place_output(&arena, &own.stats, params.out.stats, &t[EXPERTD_OUT_STATS]);
  place_output(&arena, &own.token_rank_mask, params.out.token_rank_mask, &t[EXPERTD_OUT_TOKEN_RANK_MASK]);
  return made;
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

/// An operation of several in flight: everything that it points to, until it has ended.
struct Outstanding {
  RandomCase made;
  std::vector<support::CombineInput> rows;
  GroupMemory host;
  GroupMemory gpu;
  std::vector<Request> requests;
  std::vector<LaunchedPart> parts;
};

inline void place_outstanding(GpuGroup* group, uint32_t handle, Outstanding* op) {
  support::drive(support::Drive::kWhole, &op->host);
  for (uint32_t r = 0; r < group->size(); ++r) {
    const support::CombineInput* rows = op->rows.empty() ? nullptr : &op->rows[r];
    op->requests.push_back(add_request(group, r, op->made.inputs[r], rows, &op->gpu));
    op->requests.back().handle_index = handle;
  }
}

inline constexpr uint32_t kPairs = 4;  // as many as the group has handles

/// Dispatches and their combines, of one group and in one arena: operation 2 i and 2 i + 1 are pair i.
struct Pairs {
  std::vector<std::vector<support::HandleTables>> handles;
  std::vector<std::unique_ptr<Outstanding>> ops;
};

inline void make_pairs(GpuGroup* group, const RandomCase& first, Pairs* pairs) {
  std::vector<std::vector<support::HandleTables>>& handles = pairs->handles;
  auto& ops = pairs->ops;
  handles.resize(2 * kPairs);
  for (uint32_t r = 0; r < group->size(); ++r) {
    group->arena(r).reset();
  }
  for (uint32_t i = 0; i < kPairs; ++i) {
    handles[2 * i] = support::make_handles(first);
    handles[2 * i + 1] = support::make_handles(first);
    auto& dispatch = *ops.emplace_back(std::make_unique<Outstanding>());
    dispatch.made = first;
    dispatch.made.later_active = first.shape.active_ranks;
    for (RankInput& input : dispatch.made.inputs) {
      for (int64_t& id : input.topk_idx) {
        id = id < 0 ? id : (id + i) % first.shape.experts;
      }
    }
    support::refill_payload(first.seed + i, &dispatch.made);
    dispatch.host = support::make_dispatch(dispatch.made, &handles[2 * i]);
    dispatch.gpu = support::make_dispatch(dispatch.made, &handles[2 * i + 1]);
    place_outstanding(group, i, &dispatch);
    auto& combine = *ops.emplace_back(std::make_unique<Outstanding>());
    combine.made = combine_of(dispatch.made);
    std::vector<uint32_t> in_rows;
    combine.rows = make_rows(dispatch.made, &in_rows);
    combine.host = support::make_combine(combine.made, &handles[2 * i], combine.rows, in_rows);
    combine.gpu = support::make_combine(combine.made, &handles[2 * i + 1], combine.rows, in_rows);
    place_outstanding(group, i, &combine);
  }
}

}  // namespace expertd::device_test
