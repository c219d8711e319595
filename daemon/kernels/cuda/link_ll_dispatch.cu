// SPDX-License-Identifier: Apache-2.0
// Low latency dispatch between GPUs that all reach each other, in one kernel. Definitions: daemon/kernels/README.md.
#include <algorithm>

#include "daemon/kernels/cuda/launch_config.h"
#include "daemon/kernels/cuda/low_latency_dispatch.cuh"

namespace expertd::kernels::cuda {
namespace {

// link_ll_dispatch. Grid: at most two blocks of 16 warps per multiprocessor; the same for both entries. First kernel of
// its part. Before the exchange: the first blocks number the (token, lane) positions, write the handle and push numbers
// and counts; a warp of the others takes 1 KiB of a token: ids and row read at once, quantised in registers,
// stored to the staging of every destination rank, the own one too. Every block counts; the last one announces `moved`.
// Behind it (all ranks' moved flags, the own one too, waited for or left to the kernel behind the stream's wait): a
// warp takes 1 KiB of a staged token, reads its numbers and stores it to every slot of this rank's experts; the first
// block writes plan, the caller's tables and the handle's matrix. The last block to end releases the caller, then
// writes the facts; the kernel behind the wait writes `done`. Bytes per token: row read; row + side + K * 8 per
// destination; the same read there, row + side written per slot. Bound: latency of one exchange, about five memory
// round trips.
__global__ __launch_bounds__(kLowLatencyThreads,
                             kLowLatencyBlocksPerSm) void link_ll_dispatch(const __grid_constant__ PartParams p,
                                                                           Entry entry) {
  extern __shared__ __align__(16) char route_memory[];
  let_next_start();  // of those that wait; it has no other place than that of one warp
  if (p.null_operation == 0) {
    run_ll_dispatch(p, entry == Entry::kWaits, route_memory);
  }
}

/// Enough blocks that every warp has about one part of a row.
uint32_t dispatch_blocks(const PartParams& params) {
  const OpShape& shape = params.op.shape;
  const uint32_t most = most_tokens(params);
  const uint32_t units =
      std::max(most * row_parts(shape.row_bytes), most * shape.ranks * row_parts(shape.out_row_bytes));
  constexpr uint32_t kUnitsPerBlock = kLowLatencyWarps / 4;  // fewer than it has warps: more multiprocessors are faster
  const uint32_t wanted =
      route_blocks(params, most_low_latency_blocks(params)) + (units + kUnitsPerBlock - 1) / kUnitsPerBlock;
  return std::clamp(wanted, 2u, std::max(most_low_latency_blocks(params), 2u));
}

}  // namespace

uint32_t link_ll_dispatch_blocks(const PartParams& params) {
  return params.null_operation != 0 ? 1 : dispatch_blocks(params);
}

cudaError_t take_link_ll_dispatch_timeline(Timeline* timeline) {
  return take_timeline(timeline);
}

cudaError_t launch_link_ll_dispatch(const PartParams& params, Entry entry, cudaStream_t stream) {
  const bool null = params.null_operation != 0;
  if (null) {
    const cudaError_t allowed = cudaFuncSetAttribute(link_ll_dispatch, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                     route_shared_bytes(base::kMaxExperts));
    if (allowed != cudaSuccess) {
      return allowed;
    }
  }
  const uint32_t bytes = entry == Entry::kWaits && !null ? route_shared_bytes(params.op.shape.experts) : 0;
  LaunchConfig config(link_ll_dispatch_blocks(params), kLowLatencyThreads, bytes, stream);
  config.starts_early((entry == Entry::kWaits ? params.after_doorbell : params.after_flags) != 0);
  return cudaLaunchKernelEx(config.get(), link_ll_dispatch, params, entry);
}

}  // namespace expertd::kernels::cuda
