// SPDX-License-Identifier: Apache-2.0
// Between the steps of a part: the signal to the other ranks and the plan from the count matrix. Memory ordering of an
// exchange: every thread that stored into another GPU fenced at system scope before its kernel ended; the signal kernel
// runs later in the same stream and stores the flag with release at system scope; the peer's stream waits for the flag
// in its own memory and starts its next kernel only then, with cold L1 caches. So the data is in the peer's L2 before
// the flag is, and no load of the peer's kernel can be older than the flag.
#include "daemon/kernels/cuda/device_common.cuh"
#include "daemon/kernels/cuda/launch.h"
#include "proto/abi/expertd_reason.h"
#include "proto/abi/ring_v1.h"

namespace expertd::kernels::cuda {
namespace {

constexpr uint32_t kSignalThreads = 32;
constexpr uint32_t kPlanThreads = 1024;

__device__ bool first_kernel_is_signal(const PartParams& p) {
  const OpShape& shape = p.op.shape;
  if (p.relay.own != nullptr) {
    return false;  // what is published comes before
  }
  return shape.kind == OpKind::kBarrier || shape.kind == OpKind::kCombine || shape.kind == OpKind::kLlCombine ||
         (shape.kind == OpKind::kDispatch && shape.cached != 0);
}

// signal. Grid: one warp; lane j serves rank j. Writes the time, then (release) n into routed[rank] or moved[rank] of
// every active rank's page, the own one too, then the progress word of the host. Reads no flag. 16 bytes per rank.
__global__ __launch_bounds__(kSignalThreads) void signal(const __grid_constant__ PartParams p, SignalStep step) {
  if (block_is_gated(p)) {
    return;
  }
  const OpShape& shape = p.op.shape;
  if (step == SignalStep::kRouted && first_kernel_is_signal(p)) {
    mark_start(p);
  }
  const uint32_t j = threadIdx.x;
  if (j < shape.ranks && rank_active(shape, j)) {
    SyncPage* page = p.peers.pages[j];
    fence_sys();
    const bool routed = step == SignalStep::kRouted;
    st_relaxed_sys(routed ? &page->routed_time_ns[shape.rank] : &page->moved_time_ns[shape.rank], global_timer_ns());
    st_release_sys(routed ? &page->routed[shape.rank] : &page->moved[shape.rank], p.words.group_op);
  }
  __syncwarp();
  if (threadIdx.x == 0) {
    st_relaxed_sys(step == SignalStep::kRouted ? &p.words.progress->routed : &p.words.progress->moved,
                   p.words.group_op);
  }
}

/// State of the plan kernel in shared memory.
struct PlanShared {
  int64_t rank_rows[base::kMaxGpuRanks];      // Nr
  int64_t expanded_rows[base::kMaxGpuRanks];  // Ne
  int32_t first_over_slots[base::kMaxGpuRanks];
  int32_t expert_count[base::kMaxExperts];
  int32_t expert_before[base::kMaxExperts];  // rows of lower sources
  int64_t expert_start[base::kMaxExperts];
};

/// Starts of a rank's experts and its rows in expanded form: one warp per rank, prefix over the local experts.
__device__ void scan_rank_experts(const OpShape& shape, PlanShared* s, uint32_t rank) {
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
__device__ int32_t rejected_rank(const OpShape& shape, const int32_t* matrix) {
  for (uint32_t s = 0; s < shape.ranks; ++s) {
    const uint64_t row = uint64_t{s} * matrix_row_ints(shape);
    if (rank_active(shape, s) && matrix[row + count_columns(shape)] != 0) {
      return static_cast<int32_t>(s);
    }
  }
  return -1;
}

/// Whether the operation runs; thread 0. The same matrix and capacities give the same answer on every rank.
__device__ void decide(const PartParams& p, const int32_t* matrix, const PlanShared& s, Plan* plan) {
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

/// Rows this rank sends, for the report; thread 0. Inactive ranks get none.
__device__ void count_sent(const PartParams& p, const int32_t* matrix, Plan* plan) {
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

/// Totals over sources and the part of lower sources, per rank column and per expert column. Whole block.
__device__ void sum_columns(const PartParams& p, const int32_t* matrix, PlanShared* s) {
  const OpShape& shape = p.op.shape;
  const uint32_t row = matrix_row_ints(shape);
  for (uint32_t c = threadIdx.x; c < count_columns(shape); c += kPlanThreads) {
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

// plan. Grid: one block of 1024 threads. Sums the columns of the count matrix (cached: the handle's), scans the local
// experts with one warp per rank, decides, and writes the bases; copies the matrix into the handle. Runs after the wait
// for every routed flag. For a combine it only clears the counters of pulled rows. Bytes: R * (R + E + 4) * 4 read.
__global__ __launch_bounds__(kPlanThreads) void plan_part(const __grid_constant__ PartParams p) {
  __shared__ PlanShared s;
  if (block_is_gated(p)) {
    return;
  }
  const OpShape& shape = p.op.shape;
  Plan* plan = p.scratch.plan;
  if (shape.kind == OpKind::kCombine || shape.kind == OpKind::kLlCombine) {
    if (threadIdx.x == 0) {
      plan->reason = EXPERTD_REASON_NONE;
      plan->pulled_local_rows = 0;
      plan->pulled_remote_rows = 0;
    }
    return;
  }
  const bool fresh = shape.cached == 0;
  const int32_t* matrix = fresh ? p.op.counts : p.op.routing.counts;
  sum_columns(p, matrix, &s);
  __syncthreads();
  const uint32_t warp = threadIdx.x / 32;
  if (warp < shape.ranks) {
    scan_rank_experts(shape, &s, warp);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    plan->recv_rows =
        static_cast<uint32_t>(per_expert_rows(shape) ? s.expanded_rows[shape.rank] : s.rank_rows[shape.rank]);
    decide(p, matrix, s, plan);
    count_sent(p, matrix, plan);
  }
  for (uint32_t e = threadIdx.x; e < shape.experts; e += kPlanThreads) {
    const int64_t start = shape.expanded != 0 ? s.expert_start[e] : 0;
    plan->expert_base[e] = static_cast<int32_t>(start) + s.expert_before[e];
    if (e / shape.local_experts == shape.rank) {
      const uint32_t local = e % shape.local_experts;
      plan->local_start[local] = static_cast<int32_t>(start);
      plan->local_count[local] = s.expert_count[e];
      plan->local_rounded[local] = shape.kind == OpKind::kLlDispatch
                                       ? s.expert_count[e]
                                       : static_cast<int32_t>(round_up(s.expert_count[e], shape.expert_alignment));
    }
  }
  const uint32_t matrix_ints = shape.ranks * matrix_row_ints(shape);
  for (uint32_t i = threadIdx.x; fresh && p.refused_reason == 0 && i < matrix_ints; i += kPlanThreads) {
    p.op.routing.counts[i] = i == handle_alignment_at(shape) ? static_cast<int32_t>(shape.expert_alignment) : matrix[i];
  }
}

}  // namespace

cudaError_t launch_signal(const PartParams& params, SignalStep step, cudaStream_t stream) {
  signal<<<1, kSignalThreads, 0, stream>>>(params, step);
  return cudaGetLastError();
}

cudaError_t launch_plan(const PartParams& params, cudaStream_t stream) {
  plan_part<<<1, kPlanThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace expertd::kernels::cuda
