// SPDX-License-Identifier: Apache-2.0
// A low latency combine in packets: an origin's first block sends the row numbers and weights of its tokens to the
// owners, whose warps sum as soon as those of their token are there and send the sums; the origin's warps add them as
// they come. Device code only, included by the kernels' .cu files; no state. Definitions: daemon/kernels/README.md.
#pragma once

#include "daemon/kernels/cuda/low_latency_combine.cuh"
#include "daemon/kernels/cuda/low_latency_packets.cuh"

namespace expertd::kernels::cuda {
namespace {

static_assert(kPacketPartBytes == kSumPartBytes);

/// This warp's parts, those of teams next to each other; none of the counting warp and of the first block.
__device__ Crew packet_crew(const PartParams& p) {
  const uint32_t warp = threadIdx.x / 32;
  const uint32_t blocks = grid_blocks(p) - 1;
  const uint32_t team = warp / kTeamWarps * blocks + blockIdx.x - 1;
  return {warp < kSumWarps && blockIdx.x != 0 ? team * kTeamWarps + warp % kTeamWarps : ~0u, blocks * kSumWarps};
}

/// The entry of (token, lane) `position` in this rank's tables, which earlier kernels and the caller's stream wrote.
__device__ __forceinline__ LaneEntry read_position(const PartParams& p, uint32_t position) {
  const LaneTables& tables = p.low_latency.lanes[p.op.shape.rank];
  const uint32_t token = position / p.table_top_k;
  const uint32_t k = position % p.table_top_k;
  LaneEntry entry;
  if (k < tables.top_k) {
    const uint64_t given = uint64_t{token} * tables.top_k + k;
    entry.expert = static_cast<uint32_t>(tables.topk[position]);
    entry.row = static_cast<uint32_t>(tables.token_expert[position]);
    if (tables.topk_idx != nullptr) {
      const uint32_t* ids = tables.topk_idx + given * tables.id_words;
      entry.id_low = ids[0];
      entry.id_high = tables.id_words == 2 ? ids[1] : 0;
    }
    if (tables.topk_weights != nullptr) {
      entry.weight = tables.topk_weights[given];
    }
  }
  return entry;
}

/// The lanes of this rank's tokens to every rank, the own one too: {row, owner, weight}. They are read once, so that
/// owners and origin have the same whatever the caller does meanwhile. Counts them for the report. Whole block.
__device__ void send_lanes(const PartParams& p) {
  __shared__ uint32_t counts[2];  // rows of the own rank, of others
  const OpShape& shape = p.op.shape;
  const uint32_t positions = shape.tokens * p.table_top_k;
  if (threadIdx.x < 2) {
    counts[threadIdx.x] = 0;
  }
  __syncthreads();
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < positions; i += kLowLatencyThreads) {
    const LaneEntry entry = read_position(p, i);
    const LaneRow lane = row_of(p, entry);
    const uint4 packet{static_cast<uint32_t>(lane.row), lane.owner, __float_as_uint(entry.weight), tag_of(p)};
#pragma unroll 1
    for (uint32_t j = 0; j < shape.ranks; ++j) {
      if (rank_active(shape, j)) {
        st_packet(lane_packets(p, j, shape.rank, 0) + i, packet);
      }
    }
    if (lane.row >= 0) {
      atomicAdd(&counts[lane.owner == shape.rank ? 0 : 1], 1);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    p.scratch.block_rows[0] = {counts[0], counts[1]};
  }
}

/// The first block: the lanes, then `routed` behind them, and the wait for everybody's, without which a rank for which
/// nobody has a row would run ahead and write where others still read. kFound... Whole block.
__device__ uint32_t lead_combine(const PartParams& p) {
  const uint64_t begin_ns = global_timer_ns();
  const uint64_t aborted = ld_relaxed_sys(&p.words.state->aborted_part);
  if (__syncthreads_or(aborted == p.words.part ? 1 : 0) != 0) {
    return kFoundAborted;
  }
  send_lanes(p);
  if (threadIdx.x < 32) {
    stamp_captured(p);
    announce(p, SignalStep::kRouted);
  }
  if (threadIdx.x == 0) {
    mark_start_at(p, begin_ns);
  }
  const uint32_t found = found_of(wait_for_all(p, SignalStep::kRouted, true));
  return found == kFoundLate ? kFoundLate | kFoundUnsent : found;
}

/// The lane's 16 bytes of one part of this rank's weighted rows of a token; `rows`: lanes that hold one. Whole warp.
template <bool kMany>
__device__ __forceinline__ uint4 sum_rows(const PartParams& p, uint32_t piece, uint32_t rows, const uint4& lane) {
  const OpShape& shape = p.op.shape;
  RowSum s{};
  s.x = static_cast<const uint4*>(p.peers.views[shape.rank].in_x) + piece;
  s.pieces = shape.hidden / 8;
  s.inside = piece < s.pieces;
  s.rows = rows;
  const auto row = static_cast<int32_t>(lane.x);
  const float weight = __uint_as_float(lane.z);
  return kMany ? sum_many(s, row, weight) : sum_few(s, row, weight);
}

/// The lanes that hold a row of this rank, whatever a packet says. Whole warp.
__device__ __forceinline__ uint32_t own_rows(const PartParams& p, const uint4& lane) {
  const PeerView& view = p.peers.views[p.op.shape.rank];
  const bool mine = lane.y == p.op.shape.rank && lane.x < view.in_rows && view.in_x != nullptr;
  return __ballot_sync(kFullWarp, mine);
}

__device__ __forceinline__ uint32_t row_piece(uint32_t part) {
  return part * (kSumPartBytes / 16) + (threadIdx.x & 31);
}

/// The ranks that hold a row of a token, as bits. Whole warp.
__device__ __forceinline__ uint32_t owners_of(const PartParams& p, const uint4& lane) {
  const OpShape& shape = p.op.shape;
  const bool held = static_cast<int32_t>(lane.x) >= 0 && lane.y < shape.ranks && rank_active(shape, lane.y);
  return __reduce_or_sync(kFullWarp, held ? 1u << lane.y : 0);
}

/// One part of a token of this rank: the owners' sums in rank order, `own` this rank's. Whole warp.
__device__ __forceinline__ Arrival add_packets(const PartParams& p, uint32_t token, uint32_t part, uint32_t owners,
                                               const uint4& own) {
  const OpShape& shape = p.op.shape;
  float sums[8] = {};
#pragma unroll 1
  for (; owners != 0; owners &= owners - 1) {
    const uint32_t owner = lowest_bit(owners);
    uint4 sum = own;
    if (owner != shape.rank) {
      const uint4* from = part_packets(p, shape.rank, owner, token, part);
      LanePackets packets = read_part(from);
      const Arrival arrival = take_part(p, from, &packets);
      if (arrival != Arrival::kCame) {
        return arrival;
      }
      sum = unpack_part(packets);
    }
    const Bf16x8 values = to_bf16x8(sum);
#pragma unroll
    for (uint32_t e = 0; e < 8; ++e) {
      sums[e] = __fadd_rn(sums[e], element(values, e));
    }
  }
  if (row_piece(part) < shape.hidden / 8) {
    static_cast<uint4*>(p.op.out.x)[uint64_t{token} * (shape.hidden / 8) + row_piece(part)] = rounded(sums);
  }
  return Arrival::kCame;
}

/// Whose token an item of a step is, and which one; a token of nobody behind the last.
struct SumItem {
  uint32_t origin;
  uint32_t token;
};

__device__ __forceinline__ SumItem sum_item(const PartParams& p, Sums which, uint32_t item) {
  const OpShape& shape = p.op.shape;
  if (which == Sums::kOwnTokens) {
    return {shape.rank, item};
  }
  const uint32_t other = item % (shape.ranks - 1);
  return {other + (other >= shape.rank ? 1 : 0), item / (shape.ranks - 1)};
}

/// This warp's parts of a step: the sums for the other ranks, or the own tokens with what the others sent. kFound...
template <bool kMany>
__device__ __forceinline__ uint32_t sum_packets(const PartParams& p, Sums which, Crew warps) {
  const OpShape& shape = p.op.shape;
  const uint32_t parts = sum_parts(shape);
  const uint32_t units = which == Sums::kOwnTokens ? own_units(p) : (shape.ranks - 1) * most_tokens(p) * parts;
#pragma unroll 1
  for (uint32_t unit = warps.first; unit < units; unit += warps.step) {
    const uint32_t part = unit % parts;
    const SumItem item = sum_item(p, which, unit / parts);
    if (!rank_active(shape, item.origin) || item.token >= p.low_latency.tokens[item.origin]) {
      continue;
    }
    uint4 lane = read_lane_packet(p, item.origin, item.token);
    Arrival arrival = take_lanes(p, item.origin, item.token, &lane);
    const uint32_t rows = arrival == Arrival::kCame ? own_rows(p, lane) : 0;
    const uint32_t owners = owners_of(p, lane);
    const uint4 sum = rows == 0 ? uint4{} : sum_rows<kMany>(p, row_piece(part), rows, lane);
    if (which == Sums::kOthers && rows != 0) {
      send_part(part_packets(p, item.origin, shape.rank, item.token, part), pack_part(sum, 0, tag_of(p)));
    } else if (which == Sums::kOwnTokens && arrival == Arrival::kCame) {
      arrival = add_packets(p, item.token, part, owners, sum);
    }
    if (arrival != Arrival::kCame && !is_missing(arrival)) {
      return found_of(arrival) | (which == Sums::kOthers ? kFoundUnsent : 0);
    }
  }
  return 0;
}

/// The other blocks, from the step on at which they stand. kFound... Whole block.
template <bool kMany>
__device__ __forceinline__ uint32_t work_combine(const PartParams& p, LowLatencyEntry entry) {
  __shared__ uint32_t found;
  const Crew warps = packet_crew(p);
  uint32_t mine = 0;
  if (threadIdx.x == 0) {
    found = 0;
  }
  __syncthreads();
  const bool begins = entry == LowLatencyEntry::kWaits;
  const bool last = entry == LowLatencyEntry::kBehindMoved;
  if (!last && __any_sync(kFullWarp, ld_relaxed_sys(&p.words.state->aborted_part) == p.words.part)) {
    mine = kFoundAborted | kFoundUnsent;
  }
  // One copy of the code for both steps: it is cold when an operation comes.
#pragma unroll 1
  for (uint32_t step = last ? 1 : 0; step < 2 && mine == 0; ++step) {
    begin_patience(step == 0 ? begins : !last);
    mine = sum_packets<kMany>(p, static_cast<Sums>(step), warps);
    if (step == 0 && blockIdx.x == 1 && threadIdx.x < 32) {
      stamp_step(p, SignalStep::kMoved);
    }
  }
  if (mine != 0 && (threadIdx.x & 31) == 0) {
    atomicOr(&found, mine);
  }
  __syncthreads();
  return found;
}

/// Behind the exchange that the block left, or at the beginning: its work, and where it leaves again what is to be left
/// to a later kernel; false when it did. Whole block.
template <bool kMany>
__device__ __forceinline__ bool pass_combine(const PartParams& p, LowLatencyEntry entry) {
  const bool begins = entry == LowLatencyEntry::kWaits;
  const bool last = entry == LowLatencyEntry::kBehindMoved;
  const SignalStep before = last ? SignalStep::kMoved : SignalStep::kRouted;
  uint32_t found = kFoundAborted | kFoundUnsent;
  if (begins || wait_for_all(p, before, false) == Arrival::kCame) {
    found = blockIdx.x != 0 ? work_combine<kMany>(p, entry) : begins ? lead_combine(p) : 0;
  }
  if (!last && (found & (kFoundLate | kFoundAborted)) == kFoundLate) {
    const bool unsent = (found & kFoundUnsent) != 0;
    leave_block(p, unsent ? SignalStep::kRouted : SignalStep::kMoved);
    if (!unsent && threadIdx.x == kCountingWarp * 32) {
      count_sent(p, false);
    }
    return false;
  }
  const bool good = (found & (kFoundLate | kFoundAborted)) == 0;
  const Sent sent = last ? Sent::kCounted : !good && (found & kFoundUnsent) != 0 ? Sent::kGated : Sent::kAll;
  end_block(p, good ? Ending::kGood : Ending::kAborted, sent);
  return true;
}

/// A combine in packets, as run_ll_combine().
template <bool kMany>
__device__ __forceinline__ void run_packet_combine(const PartParams& p, LowLatencyEntry entry) {
  const bool begins = entry == LowLatencyEntry::kWaits;
  const bool last = entry == LowLatencyEntry::kBehindMoved;
  const SignalStep before = last ? SignalStep::kMoved : SignalStep::kRouted;
  if (!begins && !was_left(p, before)) {
    if (last) {
      drain_chain(p, false);
    }
    return;
  }
  if ((begins || block_was_left(p, before)) && !pass_combine<kMany>(p, entry)) {
    return;
  }
  if (last) {
    drain_chain(p, true);
  }
}

}  // namespace
}  // namespace expertd::kernels::cuda
