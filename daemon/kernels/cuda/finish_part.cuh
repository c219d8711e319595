// SPDX-License-Identifier: Apache-2.0
// The last step of every part: what only this rank can write after all rows arrived, the report, and the words that end
// the operation for the caller's stream. Device code only, included by the kernels that end parts; no state.
// Definitions: daemon/kernels/README.md.
#pragma once

#include "daemon/kernels/cuda/exchange_steps.cuh"
#include "proto/abi/expertd_reason.h"
#include "proto/abi/ring_v1.h"

namespace expertd::kernels::cuda {

__device__ inline bool is_dispatch(const OpShape& shape) {
  return shape.kind == OpKind::kDispatch || shape.kind == OpKind::kLlDispatch;
}

/// Index -1 and weight 0 for rows [begin, end) of the own outputs, by the crew.
__device__ inline void clear_rows(const PartParams& p, uint64_t begin, uint64_t end, Crew crew) {
  const OpShape& shape = p.op.shape;
  const uint64_t width = shape.expanded != 0 ? 1 : shape.top_k;
  const uint64_t last = end < shape.capacity_rows ? end : shape.capacity_rows;
  for (uint64_t i = begin * width + crew.first; i < last * width; i += crew.step) {
    if (p.op.out.topk_idx != nullptr) {
      store_id(p.op.out.topk_idx, shape.topk_idx_bytes, i, -1);
    }
    if (p.op.out.topk_weights != nullptr) {
      p.op.out.topk_weights[i] = 0.0f;
    }
  }
}

/// Whether the caller's stream had reached the operation, as a kernel saw before the part was aborted. Else the memory
/// of the outputs still belongs to what that stream runs before it, and nothing may be written.
__device__ inline bool caller_is_there(const PartParams& p) {
  return p.words.state->started_part == p.words.part;
}

/// Outputs of a failed part: HT indices -1, LL counts 0, where given.
__device__ inline void fail_outputs(const PartParams& p, Crew crew) {
  const OpShape& shape = p.op.shape;
  if (shape.kind == OpKind::kDispatch && shape.cached == 0 && p.op.out.topk_idx != nullptr) {
    const uint64_t width = shape.expanded != 0 ? 1 : shape.top_k;
    for (uint64_t i = crew.first; i < shape.capacity_rows * width; i += crew.step) {
      store_id(p.op.out.topk_idx, shape.topk_idx_bytes, i, -1);
    }
  }
  if (is_dispatch(shape) && p.op.out.expert_counts != nullptr) {
    for (uint32_t e = crew.first; e < shape.local_experts; e += crew.step) {
      p.op.out.expert_counts[e] = 0;
    }
  }
}

/// Where each source's rows of each local expert stand, the cumulative statistics, the inclusive prefix.
__device__ inline void store_tables(const PartParams& p, Crew crew) {
  const OpShape& shape = p.op.shape;
  const int32_t* matrix = shape.cached != 0 ? p.op.routing.counts : p.op.counts;
  const uint32_t row = matrix_row_ints(shape);
  const bool low_latency = shape.kind == OpKind::kLlDispatch;
  for (uint32_t e = crew.first; e < shape.local_experts; e += crew.step) {
    const uint32_t column = shape.ranks + shape.rank * shape.local_experts + e;
    uint64_t begin = 0;
    for (uint32_t s = 0; s < shape.ranks; ++s) {
      const auto count = static_cast<uint32_t>(matrix[uint64_t{s} * row + column]);
      if (low_latency && p.op.out.layout_range != nullptr) {
        p.op.out.layout_range[uint64_t{e} * shape.ranks + s] = static_cast<int64_t>(begin << 32 | count);
      }
      begin += count;
    }
    if (p.op.out.expert_counts != nullptr) {
      p.op.out.expert_counts[e] = static_cast<int32_t>(begin);
    }
    if (low_latency && p.op.out.stats != nullptr) {
      p.op.out.stats[e] += static_cast<int32_t>(begin);
    }
  }
  if (p.op.out.rank_prefix != nullptr) {
    for (uint32_t j = crew.first; j < shape.ranks; j += crew.step) {
      int32_t sum = 0;
      for (uint32_t s = 0; s < shape.ranks; ++s) {
        sum += matrix[uint64_t{s} * row + j];
        p.op.out.rank_prefix[s * shape.ranks + j] = sum;
      }
    }
  }
}

/// Nanoseconds by which each rank's flags came after the own ones, added to the caller's statistics. Ranks of other
/// nodes write no times.
__device__ inline void store_waits(const PartParams& p, Crew crew) {
  const OpShape& shape = p.op.shape;
  if (p.op.out.wait_stats == nullptr || p.peers.pages[shape.rank] == nullptr) {
    return;
  }
  const SyncPage& page = *p.peers.pages[shape.rank];
  for (uint32_t s = crew.first; s < shape.ranks; s += crew.step) {
    if (!rank_active(shape, s) || p.peers.pages[s] == nullptr) {
      continue;
    }
    const uint64_t times[2][2] = {{page.routed_time_ns[s], page.routed_time_ns[shape.rank]},
                                  {page.moved_time_ns[s], page.moved_time_ns[shape.rank]}};
    uint64_t waited = 0;
    for (uint32_t i = 0; i < 2; ++i) {
      waited += times[i][0] > times[i][1] ? times[i][0] - times[i][1] : 0;
    }
    p.op.out.wait_stats[s] += static_cast<int64_t>(waited);
  }
}

__device__ inline void finish_outputs(const PartParams& p, Crew crew) {
  const OpShape& shape = p.op.shape;
  const Plan& plan = *p.scratch.plan;
  store_tables(p, crew);
  if (shape.cached != 0 || shape.kind != OpKind::kDispatch) {
    return;  // the first dispatch wrote the indices, and they still hold
  }
  for (uint32_t e = 0; shape.expanded != 0 && e < shape.local_experts; ++e) {
    const uint64_t start = static_cast<uint32_t>(plan.local_start[e]);
    clear_rows(p, start + static_cast<uint32_t>(plan.local_count[e]),
               start + static_cast<uint32_t>(plan.local_rounded[e]), crew);
  }
  if (shape.worst_tokens != 0) {
    clear_rows(p, plan.recv_rows, shape.capacity_rows, crew);
  }
}

__device__ inline uint64_t landed_row_bytes(const OpShape& shape) {
  if (shape.payload == Payload::kFp8) {
    const uint64_t groups = shape.hidden / kScaleGroup;
    return shape.out_row_bytes + (shape.scale == ScaleForm::kUe8m0 ? groups : groups * sizeof(float));
  }
  return shape.out_row_bytes + uint64_t{shape.side_elements} * shape.side_element_bytes;
}

/// The Reason that the plan, or for layout its own check, found. Zero for kinds without one.
__device__ inline uint32_t found_reason(const PartParams& p) {
  const OpShape& shape = p.op.shape;
  if (shape.kind == OpKind::kLayout) {
    return p.words.state->layout_error != 0xffffffffu ? EXPERTD_REASON_EXPERT_OUT_OF_RANGE : EXPERTD_REASON_NONE;
  }
  return is_dispatch(shape) ? p.scratch.plan->reason : EXPERTD_REASON_NONE;
}

__device__ inline void report_reason(const PartParams& p, uint32_t reason, OpReport* report) {
  const OpShape& shape = p.op.shape;
  report->reason = reason;
  report->rank = -1;
  if (shape.kind == OpKind::kLayout) {
    report->argument = EXPERTD_ARGUMENT_EXPERT_ID;
    report->value = load_id(p.op.in.topk_idx, shape.topk_idx_bytes, p.words.state->layout_error);
    report->maximum = static_cast<int64_t>(shape.experts) - 1;
  } else {
    const Plan& plan = *p.scratch.plan;
    report->argument = plan.argument;
    report->value = plan.value;
    report->maximum = plan.maximum;
    report->rank = plan.rank;
  }
  report->minimum = reason == EXPERTD_REASON_EXPERT_OUT_OF_RANGE ? -1 : 0;
}

/// Fills the report in the host's facts; all threads of the last block.
__device__ inline void write_report(const PartParams& p, uint32_t reason) {
  const OpShape& shape = p.op.shape;
  OpReport* report = &p.words.facts->report;
  if (reason != EXPERTD_REASON_NONE) {
    if (threadIdx.x == 0) {
      report_reason(p, reason, report);
    }
    return;
  }
  const bool dispatch = is_dispatch(shape);
  const bool combine = shape.kind == OpKind::kCombine || shape.kind == OpKind::kLlCombine;
  if (threadIdx.x == 0) {
    report->reason = EXPERTD_REASON_NONE;
    report->rank = -1;
    if (dispatch) {
      const Plan& plan = *p.scratch.plan;
      report->recv_rows = plan.recv_rows;
      report->local_bytes = plan.sent_local_rows * landed_row_bytes(shape);
      report->remote_bytes = plan.sent_remote_rows * landed_row_bytes(shape);
      report->expert_count_entries = shape.local_experts;
    } else if (combine) {
      report->local_bytes = p.scratch.plan->pulled_local_rows * shape.hidden * 2;
      report->remote_bytes = p.scratch.plan->pulled_remote_rows * shape.hidden * 2;
    }
  }
  for (uint32_t e = threadIdx.x; dispatch && e < shape.local_experts; e += blockDim.x) {
    report->expert_counts[e] = static_cast<uint32_t>(p.scratch.plan->local_rounded[e]);
  }
}

/// Lets the caller's stream go on, by one thread, after all outputs were written. Both words go at once, so that none
/// waits for the other. An aborted part's words are left to the rescue stream, which first puts the doorbell and the
/// exchange words in order.
__device__ inline void release_caller(const PartParams& p, bool go, uint32_t reason) {
  if (go && p.words.completion != nullptr) {
    static_assert(EXPERTD_RESULT_WORD_OFFSET(0) == EXPERTD_COMPLETION_WORD_OFFSET(0) + 8);
    fence_sys();
    st_pair_relaxed_sys(p.words.completion, p.words.seq, reason);
  }
}

/// How the part went, for the host, which reads it after `done`. Whole block.
__device__ inline void write_facts(const PartParams& p, bool go, uint32_t reason) {
  if (go) {
    write_report(p, reason);
  }
  if (threadIdx.x == 0) {
    publish_start(p);
    st_relaxed_sys(&p.words.facts->end_ns, global_timer_ns());
    st_relaxed_sys(&p.words.facts->verdict, go ? kVerdictGo : kVerdictAborted);
  }
}

/// Tells the host that the chain of a group's part has drained; one thread of its last kernel.
__device__ inline void tell_done(const PartParams& p) {
  store_progress(p, SignalStep::kRouted);
  store_progress(p, SignalStep::kMoved);
  st_release_sys(&p.words.facts->done, p.words.part);
}

/// What the crew has to write before the end: tails, tables and statistics, or the outputs of a failure (of an aborted
/// part only if its caller was there).
__device__ inline void write_outputs(const PartParams& p, bool go, uint32_t reason, Crew crew) {
  if (reason != 0 || (!go && caller_is_there(p))) {
    fail_outputs(p, crew);
  } else if (is_dispatch(p.op.shape)) {
    finish_outputs(p, crew);
  }
  if (go && reason == 0) {
    store_waits(p, crew);
  }
}

/// The end of a part by one whole block, the kernel's last one: everything but `done`, which finish writes when the
/// chain has drained. `reason`: found_reason(), read while the block waited. `written`: the outputs of a good end are
/// there already, so that nothing stands between the last flag and the caller.
__device__ inline void finish_part(const PartParams& p, bool go, uint32_t reason, bool written) {
  reason = go ? reason : 0;
  if (!go || reason != 0 || !written || p.op.out.wait_stats != nullptr) {
    const Crew block{threadIdx.x, blockDim.x};
    if (go && reason == 0 && written) {
      store_waits(p, block);
    } else {
      write_outputs(p, go, reason, block);
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    release_caller(p, go, reason);
    stamp(Stamp::kReleased);
  }
  write_facts(p, go, reason);
}

}  // namespace expertd::kernels::cuda
