// SPDX-License-Identifier: Apache-2.0
// Low latency combine between GPUs that all reach each other, in one kernel. Definitions: daemon/kernels/README.md.
#include <algorithm>

#include "daemon/kernels/cuda/launch_config.h"
#include "daemon/kernels/cuda/low_latency_combine_packets.cuh"

namespace expertd::kernels::cuda {
namespace {

// link_ll_combine. Grid: at most two blocks of 16 warps per multiprocessor; the same for all entries. First kernel of
// its part.
//
// With packets (no rank has more than kPacketTokens tokens): every 16 bytes that ranks exchange carry the operation's
// tag, and that tag makes those bytes visible, no flag or fence does. (1) The first block reads this rank's tables and
// what its caller gave, and pushes owner, row and weight of every lane to all ranks; then it announces `routed` and
// waits for everybody's, so that no rank runs ahead, and has no other work. (2) A warp of the others takes 512 bytes of
// the sum of one (origin, token): it waits for the token's lanes, reads the rows, eight at once, adds them in float32
// in lane order, rounds once and pushes them to the origin. (3) Then the same for an own token: it keeps this rank's
// sum in registers, waits for those of the other owners, one after the other, and adds all in rank order. Beside its
// end a block counts; the last one announces `moved`, which only ranks that left something wait for. Bytes per token: K
// * 16 per rank; H * 2 per row read, 8/3 H per other owner over the link, read again; H * 2 written. Bound: the rows
// from HBM, and two stores over the link, one behind the other.
//
// Without: (1) The first block announces `routed` at once: the tables of this rank may be read. (2) Behind all ranks'
// routed flags a warp's lanes read the origin's tables over the link; it sums as above and stores to the origin's
// staging: first for the other ranks, then for the own tokens. Every block counts between the two; the last one
// announces `moved`, which makes all sums visible. (3) Behind all moved flags the same warp takes the same 512 bytes of
// an own token and adds the owners' sums in rank order. Bytes per token: K * 20 per owner and team, over the link; H *
// 2 per row read, H * 2 per owner over the link and read again, H * 2 written. Bound: the link.
//
// The last block to end releases the caller, then writes the facts. What is late is left to the kernel behind the
// stream's wait for the same exchange; the last of them writes `done`.
template <bool kMany, bool kPackets>
__global__ __launch_bounds__(kLowLatencyThreads,
                             kLowLatencyBlocksPerSm) void link_ll_combine(const __grid_constant__ PartParams p,
                                                                          LowLatencyEntry entry) {
  let_next_start();  // of those that wait; it has no other place than that of one warp
  if (p.null_operation == 0) {
    if constexpr (kPackets) {
      run_packet_combine<kMany>(p, entry);
    } else {
      run_ll_combine<kMany>(p, entry);
    }
  }
}

/// Enough blocks that every warp has about one part of a row in each step.
uint32_t combine_blocks(const PartParams& params) {
  const OpShape& shape = params.op.shape;
  const uint32_t units = most_tokens(params) * std::max(shape.ranks - 1, 1u) * sum_parts(shape);
  const uint32_t wanted = (units + kTeamWarps - 1) / kTeamWarps;  // not all its warps: more multiprocessors are faster
  const uint32_t least = in_packets(params) ? 2 : 1;              // the first one sums nothing
  return std::clamp(wanted + least - 1, least, std::max(most_low_latency_blocks(params), least));
}

}  // namespace

uint32_t link_ll_combine_blocks(const PartParams& params) {
  return params.null_operation != 0 ? 1 : combine_blocks(params);
}

cudaError_t launch_link_ll_combine(const PartParams& params, LowLatencyEntry entry, cudaStream_t stream) {
  const bool null = params.null_operation != 0;
  const bool many = params.table_top_k > kRowsAtOnce;
  const bool packets = in_packets(params);
  LaunchConfig config(link_ll_combine_blocks(params), kLowLatencyThreads, 0, stream);
  config.starts_early((entry == LowLatencyEntry::kWaits ? params.after_doorbell : params.after_flags) != 0);
  if (!null) {
    const auto kernel = many ? (packets ? link_ll_combine<true, true> : link_ll_combine<true, false>)
                             : (packets ? link_ll_combine<false, true> : link_ll_combine<false, false>);
    return cudaLaunchKernelEx(config.get(), kernel, params, entry);
  }
  cudaError_t error = cudaSuccess;
  for (const auto kernel : {link_ll_combine<true, true>, link_ll_combine<true, false>, link_ll_combine<false, true>,
                            link_ll_combine<false, false>}) {
    error = error == cudaSuccess ? cudaLaunchKernelEx(config.get(), kernel, params, entry) : error;
  }
  return error;
}

}  // namespace expertd::kernels::cuda
