// SPDX-License-Identifier: Apache-2.0
// Requests of random cases in a GpuGroup's memory, and low latency pairs of which several are in flight. Tests only.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <vector>

#include "tests/device/case_steps.h"
#include "tests/device/compare_outputs.h"
#include "tests/device/gpu_group.h"
#include "tests/support/random_case_host.h"

namespace expertd::device_test {

using engine::Request;

/// The request of one rank with every tensor of its params placed in the rank's arena, behind those of earlier
/// operations.
inline Request add_request(GpuGroup* group, uint32_t rank, const RankInput& input, const support::CombineInput* rows,
                           GroupMemory* memory) {
  Request made = group->request(rank, memory->params[rank].shape);
  for_each_tensor(input, rows, memory->params[rank], &memory->ranks[rank], [&](const CaseTensor& tensor) {
    made.tensors[tensor.name] = group->arena(rank).place(tensor.data, tensor.bytes, tensor.output);
  });
  return made;
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
