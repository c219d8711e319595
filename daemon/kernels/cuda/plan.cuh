// SPDX-License-Identifier: Apache-2.0
// The plan of a dispatch: bases, sizes and the decision whether anything moves, from the whole count matrix. One block
// or one warp of a part computes it. Device code only, included by the kernels' .cu files; no state.
#pragma once

#include "daemon/kernels/cuda/device_common.cuh"
#include "proto/abi/expertd_reason.h"
#include "proto/abi/ring_v1.h"

namespace expertd::kernels::cuda {

/// Starts of a rank's experts and its rows in expanded form: one warp per rank, prefix over the local experts.
__device__ inline void scan_rank_experts(const OpShape& shape, PlanWork* s, uint32_t rank) {
  const uint32_t lane = threadIdx.x & 31;
  int64_t start = 0;
  int32_t over = -1;
  for (uint32_t first = 0; first < shape.local_experts; first += 32) {
    const uint32_t local = first + lane;
    const uint32_t expert = rank * shape.local_experts + local;
    const bool valid = local < shape.local_experts;
    const uint32_t alignment = shape.kind == OpKind::kLlDispatch ? 1 : shape.expert_alignment;
    const int64_t rows = valid ? round_up(s->expert_count[expert], alignment) : 0;
    int64_t inclusive = rows;
    for (uint32_t step = 1; step < 32; step *= 2) {
      const int64_t other = __shfl_up_sync(kFullWarp, inclusive, step);
      inclusive += lane >= step ? other : 0;
    }
    if (valid) {
      s->expert_start[expert] = start + inclusive - rows;
    }
    start += __shfl_sync(kFullWarp, inclusive, 31);
    const uint32_t overflowing =
        __ballot_sync(kFullWarp, valid && s->expert_count[expert] > static_cast<int32_t>(shape.slots_per_expert));
    if (over < 0 && overflowing != 0) {
      over = static_cast<int32_t>(rank * shape.local_experts + first) + __ffs(static_cast<int>(overflowing)) - 1;
    }
  }
  if (lane == 0) {
    s->expanded_rows[rank] = start;
    s->first_over_slots[rank] = over;
  }
}

/// The lowest active rank with an error in its row of the matrix; -1 for none.
__device__ inline int32_t rejected_rank(const OpShape& shape, const int32_t* matrix) {
  for (uint32_t s = 0; s < shape.ranks; ++s) {
    const uint64_t row = uint64_t{s} * matrix_row_ints(shape);
    if (rank_active(shape, s) && matrix[row + count_columns(shape)] != 0) {
      return static_cast<int32_t>(s);
    }
  }
  return -1;
}

/// Whether the operation runs; one thread. The same matrix and capacities give the same answer on every rank.
__device__ inline void decide(const PartParams& p, const int32_t* matrix, const PlanWork& s, Plan* plan) {
  const OpShape& shape = p.op.shape;
  plan->reason = EXPERTD_REASON_NONE;
  plan->argument = EXPERTD_ARGUMENT_NONE;
  plan->value = 0;
  plan->maximum = 0;
  plan->rank = -1;
  const int32_t rejected = shape.cached != 0 ? -1 : rejected_rank(shape, matrix);
  if (rejected >= 0) {
    const int32_t* own = matrix + uint64_t{shape.rank} * matrix_row_ints(shape) + count_columns(shape);
    plan->reason = EXPERTD_REASON_PEER_REJECTED;
    plan->rank = rejected;
    if (own[0] != 0) {
      const uint64_t low = static_cast<uint32_t>(own[1]);
      const uint64_t high = static_cast<uint32_t>(own[2]);
      plan->reason = static_cast<uint32_t>(own[0]);
      plan->rank = -1;
      plan->value = static_cast<int64_t>(high << 32 | low);
      plan->argument =
          own[0] == EXPERTD_REASON_EXPERT_OUT_OF_RANGE ? EXPERTD_ARGUMENT_EXPERT_ID : EXPERTD_ARGUMENT_NONE;
      plan->maximum = own[0] == EXPERTD_REASON_EXPERT_OUT_OF_RANGE ? static_cast<int64_t>(shape.experts) - 1 : 0;
    }
    return;
  }
  for (uint32_t j = 0; j < shape.ranks; ++j) {
    const bool low_latency = shape.kind == OpKind::kLlDispatch;
    const int64_t rows = low_latency ? (s.first_over_slots[j] >= 0 ? s.expert_count[s.first_over_slots[j]] : 0)
                                     : (shape.expanded != 0 ? s.expanded_rows[j] : s.rank_rows[j]);
    const int64_t limit = low_latency ? shape.slots_per_expert : p.peers.views[j].capacity_rows;
    if (rank_active(shape, j) && rows > limit) {
      plan->reason = EXPERTD_REASON_CAPACITY_EXCEEDED;
      plan->argument = EXPERTD_ARGUMENT_RECV_ROWS;
      plan->value = rows;
      plan->maximum = limit;
      plan->rank = static_cast<int32_t>(j);
      return;
    }
  }
}

/// Rows this rank sends, for the report; one thread. Inactive ranks get none.
__device__ inline void count_sent(const PartParams& p, const int32_t* matrix, Plan* plan) {
  const OpShape& shape = p.op.shape;
  const int32_t* own = matrix + uint64_t{shape.rank} * matrix_row_ints(shape);
  const bool experts = per_expert_rows(shape);
  plan->sent_local_rows = 0;
  plan->sent_remote_rows = 0;
  for (uint32_t j = 0; j < shape.ranks; ++j) {
    if (!rank_active(shape, j)) {
      continue;
    }
    uint64_t rows = experts ? 0 : static_cast<uint32_t>(own[j]);
    for (uint32_t e = 0; experts && e < shape.local_experts; ++e) {
      rows += static_cast<uint32_t>(own[shape.ranks + j * shape.local_experts + e]);
    }
    (j == shape.rank ? plan->sent_local_rows : plan->sent_remote_rows) += rows;
  }
}

/// Totals over sources and the part of lower sources, per rank column and per expert column.
__device__ inline void sum_columns(const PartParams& p, const int32_t* matrix, PlanWork* s, Crew crew) {
  const OpShape& shape = p.op.shape;
  const uint32_t row = matrix_row_ints(shape);
  for (uint32_t c = crew.first; c < count_columns(shape); c += crew.step) {
    int64_t total = 0;
    int64_t before = 0;
    for (uint32_t source = 0; source < shape.ranks; ++source) {
      before = source == shape.rank ? total : before;
      total += matrix[uint64_t{source} * row + c];
    }
    if (c < shape.ranks) {
      s->rank_rows[c] = total;
      p.scratch.plan->rank_base[c] = static_cast<int32_t>(before);
    } else {
      s->expert_count[c - shape.ranks] = static_cast<int32_t>(total);
      s->expert_before[c - shape.ranks] = static_cast<int32_t>(before);
    }
  }
}

/// Writes the plan of a dispatch and copies the matrix into the handle. `crew`: whole warps, which `sync` brings
/// together. After every routed flag.
template <typename Sync>
__device__ void plan_dispatch(const PartParams& p, PlanWork* s, Crew crew, Sync sync) {
  const OpShape& shape = p.op.shape;
  Plan* plan = p.scratch.plan;
  const bool fresh = shape.cached == 0;
  const int32_t* matrix = fresh ? p.op.counts : p.op.routing.counts;
  sum_columns(p, matrix, s, crew);
  sync();
  for (uint32_t rank = crew.first / 32; rank < shape.ranks; rank += crew.step / 32) {
    scan_rank_experts(shape, s, rank);
  }
  sync();
  if (crew.first == 0) {
    plan->recv_rows =
        static_cast<uint32_t>(per_expert_rows(shape) ? s->expanded_rows[shape.rank] : s->rank_rows[shape.rank]);
    decide(p, matrix, *s, plan);
    count_sent(p, matrix, plan);
  }
  for (uint32_t e = crew.first; e < shape.experts; e += crew.step) {
    const int64_t start = shape.expanded != 0 ? s->expert_start[e] : 0;
    plan->expert_base[e] = static_cast<int32_t>(start) + s->expert_before[e];
    if (e / shape.local_experts == shape.rank) {
      const uint32_t local = e % shape.local_experts;
      plan->local_start[local] = static_cast<int32_t>(start);
      plan->local_count[local] = s->expert_count[e];
      plan->local_rounded[local] = shape.kind == OpKind::kLlDispatch
                                       ? s->expert_count[e]
                                       : static_cast<int32_t>(round_up(s->expert_count[e], shape.expert_alignment));
    }
  }
  const uint32_t matrix_ints = shape.ranks * matrix_row_ints(shape);
  for (uint32_t i = crew.first; fresh && p.refused_reason == 0 && i < matrix_ints; i += crew.step) {
    p.op.routing.counts[i] = i == handle_alignment_at(shape) ? static_cast<int32_t>(shape.expert_alignment) : matrix[i];
  }
}

}  // namespace expertd::kernels::cuda
