// SPDX-License-Identifier: Apache-2.0
// Between the steps of a part: the signal to the other ranks and the plan from the count matrix. Memory ordering of an
// exchange: every thread that stored into another GPU fenced at system scope before its kernel ended; the signal kernel
// runs later in the same stream and stores the flag with release at system scope; the peer's stream waits for the flag
// in its own memory and starts its next kernel only then, with cold L1 caches. So the data is in the peer's L2 before
// the flag is, and no load of the peer's kernel can be older than the flag.
#include "daemon/kernels/cuda/exchange_steps.cuh"
#include "daemon/kernels/cuda/finish_part.cuh"
#include "daemon/kernels/cuda/launch.h"
#include "daemon/kernels/cuda/launch_config.h"
#include "daemon/kernels/cuda/plan.cuh"

namespace expertd::kernels::cuda {
namespace {

constexpr uint32_t kSignalThreads = 32;
constexpr uint32_t kPlanThreads = 1024;

__device__ bool first_kernel_is_signal(const PartParams& p) {
  const OpShape& shape = p.op.shape;
  if (p.relay.ranks != 0) {
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
  if (step == SignalStep::kRouted && first_kernel_is_signal(p)) {
    tell_start(p);
  }
  announce(p, step);
  if (threadIdx.x == 0) {
    store_progress(p, step);
  }
}

// meet. Grid: one warp, the whole of a barrier: announces, waits for the others' routed flags for a bounded time, and
// ends the part. What it leaves, finish does behind the stream's wait; of a rank alone it is the whole chain. 16 bytes
// per rank; bound by one exchange.
__global__ __launch_bounds__(kSignalThreads) void meet(const __grid_constant__ PartParams p) {
  let_next_start();
  if (p.null_operation != 0) {
    return;
  }
  const bool gated = look_at_gate(p);
  open_part(p, gated);
  const Passage passage = passes(p, SignalStep::kRouted, SignalStep::kMoved, gated, Decider::kOneBlock);
  if (passage != Passage::kNot) {
    finish_part(p, passage == Passage::kRegular, EXPERTD_REASON_NONE, true);
    if (is_alone(p) && threadIdx.x == 0) {
      tell_done(p);
    }
  }
}

// plan. Grid: one block of 1024 threads. Sums the columns of the count matrix (cached: the handle's), scans the local
// experts with one warp per rank, decides, and writes the bases; copies the matrix into the handle. Runs after the wait
// for every routed flag. For a combine it only clears the counters of pulled rows. Bytes: R * (R + E + 4) * 4 read.
__global__ __launch_bounds__(kPlanThreads) void plan_part(const __grid_constant__ PartParams p) {
  __shared__ PlanWork s;
  if (block_is_gated(p)) {
    return;
  }
  const OpShape& shape = p.op.shape;
  if (shape.kind == OpKind::kCombine || shape.kind == OpKind::kLlCombine) {
    if (threadIdx.x == 0) {
      p.scratch.plan->reason = EXPERTD_REASON_NONE;
      p.scratch.plan->pulled_local_rows = 0;
      p.scratch.plan->pulled_remote_rows = 0;
    }
    return;
  }
  plan_dispatch(p, &s, {threadIdx.x, kPlanThreads}, [] { __syncthreads(); });
}

}  // namespace

cudaError_t launch_signal(const PartParams& params, SignalStep step, cudaStream_t stream) {
  signal<<<1, kSignalThreads, 0, stream>>>(params, step);
  return cudaGetLastError();
}

cudaError_t launch_meet(const PartParams& params, cudaStream_t stream) {
  LaunchConfig config(1, kSignalThreads, 0, stream);
  config.starts_early(params.after_doorbell != 0);
  return cudaLaunchKernelEx(config.get(), meet, params);
}

cudaError_t launch_plan(const PartParams& params, cudaStream_t stream) {
  plan_part<<<1, kPlanThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace expertd::kernels::cuda
