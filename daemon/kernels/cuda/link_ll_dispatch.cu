// SPDX-License-Identifier: Apache-2.0
// Low latency dispatch between GPUs that all reach each other, in one kernel. Definitions: daemon/kernels/README.md.
#include <algorithm>

#include "daemon/kernels/cuda/launch_config.h"
#include "daemon/kernels/cuda/low_latency_dispatch_packets.cuh"

namespace expertd::kernels::cuda {
namespace {

// link_ll_dispatch. Grid: at most two blocks of 16 warps per multiprocessor; the same for both entries. First kernel of
// its part. Before the exchange the first blocks number the (token, lane) positions, keep them in the handle and push
// numbers and counts; a warp of the others takes a part of a token: ids and row read at once, quantised in registers,
// stored to every destination rank, the own one too.
//
// With packets (no rank has more than kPacketTokens tokens): every 16 bytes of numbers, counts and rows carry the
// operation's tag, and that tag makes those bytes visible, no flag or fence does. Order of what is read: each block the
// count rows of all ranks (a packet per thread; the sums of earlier sources go to shared memory), then each warp the
// numbers of its (source, token) and its 512 bytes, and stores them to every slot of this rank's experts at once. The
// first block takes no rows; it writes matrix, plan and the caller's tables. Beside its end a block counts, and the
// last one announces `moved`, which only ranks that left something wait for. Bytes per token: row read; 11/8 of the
// row, 16 K per destination; read again there; row + side written per slot. Bound: one store over the link behind the
// slower of routing and row, three reads of the second-level cache.
//
// Without: a part is 1 KiB; every block counts, the last one announces `moved` behind a fence; `moved` of all ranks
// makes all their bytes visible. Behind it (waited for, or left to the kernel behind the stream's wait) a warp takes 1
// KiB of a staged token, reads its numbers and stores it to its slots. Bytes per token: row read; row + side + K * 8
// per destination; the same read there, row + side written per slot. Bound: the link.
//
// The last block to end releases the caller, then writes the facts; the kernel behind the wait writes `done`.
template <bool kPackets>
__global__ __launch_bounds__(kLowLatencyThreads,
                             kLowLatencyBlocksPerSm) void link_ll_dispatch(const __grid_constant__ PartParams p,
                                                                           Entry entry) {
  extern __shared__ __align__(16) char route_memory[];
  let_next_start();  // of those that wait; it has no other place than that of one warp
  if (p.null_operation == 0) {
    if constexpr (kPackets) {
      run_packet_dispatch(p, entry == Entry::kWaits, route_memory);
    } else {
      run_ll_dispatch(p, entry == Entry::kWaits, route_memory);
    }
  }
}

/// Enough blocks that every warp has about one part of a row.
uint32_t dispatch_blocks(const PartParams& params) {
  const OpShape& shape = params.op.shape;
  const uint32_t most = most_tokens(params);
  const uint32_t units = in_packets(params) ? most * shape.ranks * packet_parts(shape.out_row_bytes)
                                            : std::max(most * row_parts(shape.row_bytes),
                                                       most * shape.ranks * row_parts(shape.out_row_bytes));
  constexpr uint32_t kUnitsPerBlock = kLowLatencyWarps / 4;  // fewer than it has warps: more multiprocessors are faster
  const uint32_t wanted =
      route_blocks(params, most_low_latency_blocks(params)) + (units + kUnitsPerBlock - 1) / kUnitsPerBlock;
  return std::clamp(wanted, 2u, std::max(most_low_latency_blocks(params), 2u));
}

}  // namespace

uint32_t link_ll_dispatch_blocks(const PartParams& params) {
  return params.null_operation != 0 ? 1 : dispatch_blocks(params);
}

cudaError_t launch_link_ll_dispatch(const PartParams& params, Entry entry, cudaStream_t stream) {
  const bool null = params.null_operation != 0;
  const bool packets = in_packets(params);
  const uint32_t blocks = link_ll_dispatch_blocks(params);
  for (const auto kernel : {link_ll_dispatch<true>, link_ll_dispatch<false>}) {
    const cudaError_t allowed = null ? cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                            route_shared_bytes(base::kMaxExperts))
                                     : cudaSuccess;
    if (allowed != cudaSuccess) {
      return allowed;
    }
  }
  const bool routes = !null && (entry == Entry::kWaits || packets);
  const uint32_t bytes = routes ? route_shared_bytes(params.op.shape.experts) : 0;
  LaunchConfig config(blocks, kLowLatencyThreads, bytes, stream);
  config.starts_early((entry == Entry::kWaits ? params.after_doorbell : params.after_flags) != 0);
  cudaError_t error = cudaSuccess;
  if (null || packets) {
    error = cudaLaunchKernelEx(config.get(), link_ll_dispatch<true>, params, entry);
  }
  if (error == cudaSuccess && (null || !packets)) {
    error = cudaLaunchKernelEx(config.get(), link_ll_dispatch<false>, params, entry);
  }
  return error;
}

}  // namespace expertd::kernels::cuda
