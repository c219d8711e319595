// SPDX-License-Identifier: Apache-2.0
// Low latency combine between GPUs that all reach each other, in one kernel: the origin sends weights and row numbers
// to the owners, an owner sums a token's rows and sends the sum, the origin adds the owners' sums. Definitions:
// daemon/kernels/README.md.
#include <algorithm>

#include "daemon/kernels/cuda/combine_rows.cuh"
#include "daemon/kernels/cuda/low_latency_steps.cuh"

namespace expertd::kernels::cuda {
namespace {

constexpr uint32_t kPieces = kRowPartBytes / 512;  // 16-byte pieces of a part per lane
constexpr uint32_t kRowsAtOnce = 4;                // rows of an owner whose loads are in flight together
constexpr uint32_t kSumsAtOnce = 3;                // the same of owners' sums

/// The row of one (token, lane) of this rank.
struct LaneRow {
  uint32_t owner = 0;
  int32_t row = -1;  // of the owner's [L * N] rows, -1 for none
  float weight = 0.0f;
};

/// From the handle; the caller's ids may take lanes away.
__device__ LaneRow lane_row(const PartParams& p, uint32_t token, uint32_t k) {
  const OpShape& shape = p.op.shape;
  LaneRow lane;
  if (k >= p.table_top_k || k >= shape.top_k) {
    return lane;
  }
  const uint64_t at = uint64_t{token} * p.table_top_k + k;
  const uint64_t given = uint64_t{token} * shape.top_k + k;
  const auto expert = static_cast<uint32_t>(p.op.routing.topk[at]);
  const auto row = static_cast<uint32_t>(p.op.routing.token_expert[at]);
  const bool dropped = p.op.in.topk_idx != nullptr && lane_expert(p, token, k) < 0;
  lane.weight = p.op.in.topk_weights != nullptr ? p.op.in.topk_weights[given] : 1.0f;
  if (expert >= shape.experts || row >= shape.slots_per_expert || dropped) {
    return lane;  // negative numbers are large ones here
  }
  lane.owner = expert / shape.local_experts;
  const uint64_t slot = uint64_t{expert % shape.local_experts} * shape.slots_per_expert + row;
  const PeerView& peer = p.peers.views[lane.owner];
  if (rank_active(shape, lane.owner) && peer.in_x != nullptr && slot < peer.in_rows) {
    lane.row = static_cast<int32_t>(slot);
  }
  return lane;
}

/// Rows of this rank's tokens, for the report.
struct LaneCounts {
  uint32_t local = 0;
  uint32_t remote = 0;
};

/// Row numbers and weights of all this rank's lanes to every active owner, one position per thread. Whole block.
__device__ LaneCounts send_lanes(const PartParams& p) {
  const OpShape& shape = p.op.shape;
  const uint32_t positions = shape.tokens * p.table_top_k;
  const uint64_t first = uint64_t{shape.rank} * shape.max_tokens * p.table_top_k;
  LaneCounts counts;
#pragma unroll 4
  for (uint32_t i = threadIdx.x; i < positions; i += kLowLatencyThreads) {
    const LaneRow lane = lane_row(p, i / p.table_top_k, i % p.table_top_k);
    for (uint32_t j = 0; j < shape.ranks; ++j) {
      if (rank_active(shape, j)) {
        char* lanes = p.low_latency.staging[j] + p.low_latency.layout.combine_lanes;
        const int32_t row = lane.owner == j ? lane.row : -1;
        reinterpret_cast<int2*>(lanes)[first + i] = int2{row, __float_as_int(lane.weight)};
      }
    }
    counts.local += lane.row >= 0 && lane.owner == shape.rank ? 1 : 0;
    counts.remote += lane.row >= 0 && lane.owner != shape.rank ? 1 : 0;
  }
  return counts;
}

/// How many rows its tokens have, for the end of the part. Whole block.
__device__ void keep_counts(const PartParams& p, const LaneCounts& counts) {
  __shared__ uint32_t sums[2];
  if (threadIdx.x < 2) {
    sums[threadIdx.x] = 0;
  }
  __syncthreads();
  const uint32_t warp_sums[2] = {__reduce_add_sync(kFullWarp, counts.local),
                                 __reduce_add_sync(kFullWarp, counts.remote)};
  if ((threadIdx.x & 31) == 0) {
    atomicAdd(&sums[0], warp_sums[0]);
    atomicAdd(&sums[1], warp_sums[1]);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    p.scratch.plan->pulled_local_rows = sums[0];
    p.scratch.plan->pulled_remote_rows = sums[1];
  }
}

/// The first block's part before the first exchange; it alone announces it. Whole block.
__device__ void open_exchange(const PartParams& p) {
  const uint64_t begin_ns = global_timer_ns();
  const bool aborted = ld_relaxed_sys(&p.words.state->aborted_part) == p.words.part;
  if (__syncthreads_or(aborted ? 1 : 0) != 0) {
    return;
  }
  const LaneCounts counts = send_lanes(p);
  if (threadIdx.x < 32) {
    stamp_step(p, SignalStep::kRouted);
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    fence_sys();  // behind the barrier, so for the stores of the whole block
    raise_flags(p, SignalStep::kRouted);
  }
  if (threadIdx.x == 0) {
    mark_start_at(p, begin_ns);
  }
  keep_counts(p, counts);
}

/// One lane's pieces of one part of up to kRows rows.
template <uint32_t kRows>
using Loads = uint4[kRows][kPieces];

/// `next_row()`: where the next row begins, null behind the last one; called as often as rows fit.
template <uint32_t kRows, typename Row>
__device__ __forceinline__ void load_rows(uint32_t part, uint32_t pieces, const Row& next_row, Loads<kRows>& v) {
  const uint32_t first = part * (kRowPartBytes / 16) + (threadIdx.x & 31);
#pragma unroll
  for (uint32_t i = 0; i < kRows; ++i) {
    const auto* in = reinterpret_cast<const uint4*>(next_row());
#pragma unroll
    for (uint32_t c = 0; c < kPieces; ++c) {
      const uint32_t piece = first + c * 32;
      v[i][c] = in != nullptr && piece < pieces ? in[piece] : uint4{};
    }
  }
}

using Sums = float[kPieces][8];

/// Stores the lane's pieces of one part, rounded once.
__device__ __forceinline__ void store_sums(char* row, uint32_t part, uint32_t pieces, const Sums& sums) {
  const uint32_t first = part * (kRowPartBytes / 16) + (threadIdx.x & 31);
#pragma unroll
  for (uint32_t c = 0; c < kPieces; ++c) {
    if (first + c * 32 < pieces) {
      reinterpret_cast<uint4*>(row)[first + c * 32] = rounded(sums[c]);
    }
  }
}

/// Takes the lowest bit; 0 of none.
__device__ __forceinline__ uint32_t take_bit(uint32_t* bits) {
  const uint32_t lowest = *bits == 0 ? 0 : __ffs(static_cast<int>(*bits)) - 1;
  *bits &= *bits - 1;
  return lowest;
}

/// One part of this rank's weighted rows of a token, in lane order, to the origin. Whole warp.
__device__ void sum_part(const PartParams& p, uint32_t origin, uint32_t token, uint32_t part) {
  const OpShape& shape = p.op.shape;
  const LowLatencyLayout& layout = p.low_latency.layout;
  const uint32_t k = threadIdx.x & 31;
  const char* lanes = p.low_latency.staging[shape.rank] + layout.combine_lanes;
  const uint64_t at = uint64_t{row_at_index(shape, origin, token)} * p.table_top_k + k;
  const int2 lane = k < p.table_top_k ? reinterpret_cast<const int2*>(lanes)[at] : int2{-1, 0};
  const PeerView& own = p.peers.views[shape.rank];
  const bool has_row = lane.x >= 0 && static_cast<uint32_t>(lane.x) < own.in_rows;
  uint32_t left = __ballot_sync(kFullWarp, has_row && own.in_x != nullptr);
  if (left == 0) {
    return;
  }
  const uint64_t bytes = shape.hidden * 2;
  Sums sums = {};
  while (left != 0) {
    uint32_t weighted = left;
    const auto next_row = [&] {
      const bool none = left == 0;
      const auto row = static_cast<uint32_t>(__shfl_sync(kFullWarp, lane.x, static_cast<int>(take_bit(&left))));
      return none ? nullptr : static_cast<const char*>(own.in_x) + row * bytes;
    };
    Loads<kRowsAtOnce> v;
    load_rows<kRowsAtOnce>(part, shape.hidden / 8, next_row, v);
#pragma unroll
    for (uint32_t i = 0; i < kRowsAtOnce; ++i) {
      const bool none = weighted == 0;
      const float weight = __int_as_float(__shfl_sync(kFullWarp, lane.y, static_cast<int>(take_bit(&weighted))));
#pragma unroll
      for (uint32_t c = 0; !none && c < kPieces; ++c) {
        const Bf16x8 values = to_bf16x8(v[i][c]);
#pragma unroll
        for (uint32_t e = 0; e < 8; ++e) {
          sums[c][e] = __fadd_rn(sums[c][e], __fmul_rn(weight, element(values, e)));
        }
      }
    }
  }
  char* staged = p.low_latency.staging[origin] + layout.combine_rows + row_at_index(shape, shape.rank, token) * bytes;
  store_sums(staged, part, shape.hidden / 8, sums);
}

/// This warp's parts of all origins' tokens.
__device__ void sum_tokens(const PartParams& p, Crew warps) {
  const OpShape& shape = p.op.shape;
  const uint32_t parts = row_parts(shape.hidden * 2);
  const uint32_t units = shape.ranks * most_tokens(p) * parts;
  for (uint32_t unit = warps.first; unit < units; unit += warps.step) {
    const uint32_t item = unit / parts;
    const uint32_t origin = item % shape.ranks;
    const uint32_t token = item / shape.ranks;
    if (rank_active(shape, origin) && token < p.low_latency.tokens[origin]) {
      sum_part(p, origin, token, unit % parts);
    }
  }
}

/// Ranks that send a sum for a token of this rank, as bits. Whole warp.
__device__ uint32_t owners_of(const PartParams& p, uint32_t token) {
  const LaneRow lane = lane_row(p, token, threadIdx.x & 31);
  return __reduce_or_sync(kFullWarp, lane.row >= 0 ? 1u << lane.owner : 0);
}

/// One part of a token of this rank: the owners' sums in rank order. Whole warp.
__device__ void add_part(const PartParams& p, uint32_t token, uint32_t part, uint32_t owners) {
  const OpShape& shape = p.op.shape;
  const uint64_t bytes = shape.hidden * 2;
  const char* staged = p.low_latency.staging[shape.rank] + p.low_latency.layout.combine_rows;
  Sums sums = {};
  while (owners != 0) {
    uint32_t added = owners;
    const auto next_row = [&] {
      const bool none = owners == 0;
      const char* row = staged + row_at_index(shape, take_bit(&owners), token) * bytes;
      return none ? nullptr : row;
    };
    Loads<kSumsAtOnce> v;
    load_rows<kSumsAtOnce>(part, shape.hidden / 8, next_row, v);
#pragma unroll
    for (uint32_t i = 0; i < kSumsAtOnce && added != 0; ++i, added &= added - 1) {
#pragma unroll
      for (uint32_t c = 0; c < kPieces; ++c) {
        const Bf16x8 values = to_bf16x8(v[i][c]);
#pragma unroll
        for (uint32_t e = 0; e < 8; ++e) {
          sums[c][e] = __fadd_rn(sums[c][e], element(values, e));
        }
      }
    }
  }
  store_sums(static_cast<char*>(p.op.out.x) + token * bytes, part, shape.hidden / 8, sums);
}

__device__ uint32_t own_units(const PartParams& p) {
  return p.op.out.x == nullptr ? 0 : p.op.shape.tokens * row_parts(p.op.shape.hidden * 2);
}

/// The owners of the token of one unit, 0 behind the last one.
__device__ uint32_t unit_owners(const PartParams& p, uint32_t unit) {
  return unit < own_units(p) ? owners_of(p, unit / row_parts(p.op.shape.hidden * 2)) : 0;
}

/// This warp's parts of this rank's tokens; `owners` are those of its first one.
__device__ void add_tokens(const PartParams& p, Crew warps, uint32_t owners) {
  const uint32_t parts = row_parts(p.op.shape.hidden * 2);
  for (uint32_t unit = warps.first; unit < own_units(p); unit += warps.step) {
    add_part(p, unit / parts, unit % parts, owners);
    owners = unit_owners(p, unit + warps.step);
  }
}

/// Behind the first exchange: the sums of this rank's rows. False when the block left it. Whole block.
__device__ bool pass_routed(const PartParams& p, bool waits) {
  const Arrival arrival = wait_for_all(p, SignalStep::kRouted, waits);
  if (arrival == Arrival::kLate) {
    leave_block(p, SignalStep::kRouted);
    return false;
  }
  if (arrival == Arrival::kCame) {
    sum_tokens(p, warps_behind(0));
  }
  if (blockIdx.x == 0 && threadIdx.x < 32) {
    stamp_step(p, SignalStep::kMoved);
  }
  if (all_blocks_sent(p, arrival != Arrival::kCame)) {
    raise_flags(p, SignalStep::kMoved);
  }
  return true;
}

// link_ll_combine. Grid: at most two blocks of 16 warps per multiprocessor; the same for all entries. First kernel of
// its part. (1) The first block reads the handle and pushes a row number and a weight per (token, lane) to every owner
// and announces `routed`. (2) Behind all ranks' routed flags a warp takes 1 KiB of the sum of one (origin, token): its
// lanes read the numbers, all read the rows, four at once, add them in float32 in lane order, round once and store to
// the origin's staging. Every block counts; the last one announces `moved`. (3) Behind all moved flags a warp takes 1
// KiB of a token and adds the owners' sums in rank order. The last block to end releases the caller, then writes the
// facts. Every exchange is waited for, or left to the kernel behind the stream's wait for it; the last of them writes
// `done`. Bytes per token: K * 8 per owner; H * 2 per row read, H * 2 per owner over the link and read again, H * 2
// written. Bound: reading the rows from HBM, and the latency of two exchanges.
__global__ __launch_bounds__(kLowLatencyThreads,
                             kLowLatencyBlocksPerSm) void link_ll_combine(const __grid_constant__ PartParams p,
                                                                          LowLatencyEntry entry) {
  if (p.null_operation != 0) {
    return;
  }
  const bool last = entry == LowLatencyEntry::kBehindMoved;
  const SignalStep before = last ? SignalStep::kMoved : SignalStep::kRouted;
  if (entry == LowLatencyEntry::kWaits) {
    if (blockIdx.x == 0) {
      open_exchange(p);
    }
  } else if (!was_left(p, before)) {
    if (last) {
      drain_chain(p, false);
    }
    return;
  }
  if (entry == LowLatencyEntry::kWaits || block_was_left(p, before)) {
    if (!last && !pass_routed(p, entry == LowLatencyEntry::kWaits)) {
      return;
    }
    const uint32_t owners = unit_owners(p, warps_behind(0).first);  // known before the exchange
    const Arrival arrival = wait_for_all(p, SignalStep::kMoved, !last);
    if (arrival == Arrival::kLate) {
      leave_block(p, SignalStep::kMoved);
      return;
    }
    if (arrival == Arrival::kCame) {
      add_tokens(p, warps_behind(0), owners);
    }
    end_block(p);
  }
  if (last) {
    drain_chain(p, true);
  }
}

/// Enough blocks that every warp has about one part of a row.
uint32_t combine_blocks(const PartParams& params) {
  const OpShape& shape = params.op.shape;
  const uint32_t units = most_tokens(params) * shape.ranks * row_parts(shape.hidden * 2);
  constexpr uint32_t kUnitsPerBlock = kLowLatencyWarps / 4;  // fewer than it has warps: more multiprocessors are faster
  const uint32_t wanted = (units + kUnitsPerBlock - 1) / kUnitsPerBlock;
  return std::clamp(wanted, 1u, std::max(most_low_latency_blocks(params), 1u));
}

}  // namespace

uint32_t link_ll_combine_blocks(const PartParams& params) {
  return params.null_operation != 0 ? 1 : combine_blocks(params);
}

cudaError_t launch_link_ll_combine(const PartParams& params, LowLatencyEntry entry, cudaStream_t stream) {
  link_ll_combine<<<link_ll_combine_blocks(params), kLowLatencyThreads, 0, stream>>>(params, entry);
  return cudaGetLastError();
}

}  // namespace expertd::kernels::cuda
