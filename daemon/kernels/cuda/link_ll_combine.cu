// SPDX-License-Identifier: Apache-2.0
// Low latency combine between GPUs that all reach each other, in one kernel. Definitions: daemon/kernels/README.md.
#include <algorithm>

#include "daemon/kernels/cuda/launch_config.h"
#include "daemon/kernels/cuda/low_latency_combine.cuh"

namespace expertd::kernels::cuda {
namespace {

// link_ll_combine. Grid: at most two blocks of 16 warps per multiprocessor; the same for all entries. First kernel of
// its part. (1) The first block announces `routed` at once: the tables of this rank may be read. (2) Behind all ranks'
// routed flags a warp takes 512 bytes of the sum of one (origin, token): its lanes read the origin's tables over the
// link, all read the rows, eight at once, add them in float32 in lane order, round once and store to the origin's
// staging: first for the other ranks, then for the own tokens. Every block counts between the two; the last one
// announces `moved`. (3) Behind all moved flags the same warp takes the same 512 bytes of an own token and adds the
// owners' sums in rank order. The last block to end releases the caller, then writes the facts. Every exchange is
// waited for, or left to the kernel behind the stream's wait for it; the last of them writes `done`. Bytes per token:
// K * 20 per owner and team, over the link; H * 2 per row read, H * 2 per owner over the link and read again,
// H * 2 written. Bound: reading the rows from HBM, and the latency of two exchanges.
template <bool kMany>
__global__ __launch_bounds__(kLowLatencyThreads,
                             kLowLatencyBlocksPerSm) void link_ll_combine(const __grid_constant__ PartParams p,
                                                                          LowLatencyEntry entry) {
  let_next_start();  // of those that wait; it has no other place than that of one warp
  if (p.null_operation == 0) {
    run_ll_combine<kMany>(p, entry);
  }
}

/// Enough blocks that every warp has about one part of a row in each step.
uint32_t combine_blocks(const PartParams& params) {
  const OpShape& shape = params.op.shape;
  const uint32_t units = most_tokens(params) * std::max(shape.ranks - 1, 1u) * sum_parts(shape);
  const uint32_t wanted = (units + kTeamWarps - 1) / kTeamWarps;  // not all its warps: more multiprocessors are faster
  return std::clamp(wanted, 1u, std::max(most_low_latency_blocks(params), 1u));
}

}  // namespace

uint32_t link_ll_combine_blocks(const PartParams& params) {
  return params.null_operation != 0 ? 1 : combine_blocks(params);
}

cudaError_t take_link_ll_combine_timeline(Timeline* timeline) {
  return take_timeline(timeline);
}

cudaError_t launch_link_ll_combine(const PartParams& params, LowLatencyEntry entry, cudaStream_t stream) {
  const bool null = params.null_operation != 0;
  const bool many = params.table_top_k > kRowsAtOnce;
  LaunchConfig config(link_ll_combine_blocks(params), kLowLatencyThreads, 0, stream);
  config.starts_early((entry == LowLatencyEntry::kWaits ? params.after_doorbell : params.after_flags) != 0);
  cudaError_t error = cudaSuccess;
  if (null || many) {
    error = cudaLaunchKernelEx(config.get(), link_ll_combine<true>, params, entry);
  }
  if (error == cudaSuccess && (null || !many)) {
    error = cudaLaunchKernelEx(config.get(), link_ll_combine<false>, params, entry);
  }
  return error;
}

}  // namespace expertd::kernels::cuda
