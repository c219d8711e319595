// SPDX-License-Identifier: Apache-2.0
// A low latency dispatch in packets: no block waits for another one of its own GPU or of others, but each warp for the
// packets of its unit and each block for the count rows. Device code only, included by the kernels' .cu files; no
// state. Definitions: daemon/kernels/README.md.
#pragma once

#include "daemon/kernels/cuda/low_latency_dispatch.cuh"

namespace expertd::kernels::cuda {
namespace {

/// What the count rows say to a block, in its dynamic shared memory, where the routing was before.
struct RowBases {
  uint32_t* local;  // [R, L]: rows of this rank's experts from the sources before
  uint32_t* own;    // [E]: rows of every expert from the sources before this rank
};
static_assert(kLowLatencyWarps * 2 + 4 >= 2 * sizeof(uint32_t), "the bases fit where the routing was");

/// This warp's parts of this rank's tokens to every destination. The gate is read beside the first row; false when the
/// part was aborted.
__device__ bool send_row_packets(const PartParams& p, Crew warps) {
  const OpShape& shape = p.op.shape;
  const uint32_t lane = threadIdx.x & 31;
  const bool fp8 = shape.payload == Payload::kFp8;
  const uint32_t parts = packet_parts(shape.out_row_bytes);
  const uint32_t units = p.op.in.x == nullptr || p.refused_reason != 0 ? 0 : shape.tokens * parts;
  const uint64_t aborted = ld_relaxed_sys(&p.words.state->aborted_part);
#pragma unroll 1
  for (uint32_t unit = warps.first; unit < units; unit += warps.step) {
    const uint32_t token = unit / parts;
    const uint32_t part = unit % parts;
    const char* row = static_cast<const char*>(p.op.in.x) + uint64_t{token} * shape.row_bytes;
    uint4 v[2] = {};
    if (fp8) {
      load_part(row, shape.row_bytes, part, true, v);  // 512 channels
    } else if (part * 32 + lane < shape.row_bytes / 16) {
      v[0] = reinterpret_cast<const uint4*>(row)[part * 32 + lane];
    }
    uint32_t ranks = ranks_of(p, id_at(p, token, lane));
    if (__any_sync(kFullWarp, aborted == p.words.part)) {
      return false;
    }
    uint32_t scale = 0;
    if (fp8) {
      const QuantisedLane quantised = quantise_lane(v[0], v[1], shape.scale);
      v[0] = quantised.codes;
      scale = shape.scale == ScaleForm::kUe8m0 ? pack_ue8m0(quantised.scale) : __float_as_uint(quantised.scale);
    }
    const LanePackets packets = pack_part(v[0], scale, tag_of(p));
#pragma unroll 1
    for (; ranks != 0; ranks &= ranks - 1) {
      send_part(part_packets(p, __ffs(static_cast<int>(ranks)) - 1, shape.rank, token, part), packets);
    }
  }
  return __all_sync(kFullWarp, aborted != p.words.part) != 0;
}

/// Everything that this rank sends; false when the part was aborted. Whole block.
__device__ bool send_dispatch_packets(const PartParams& p, void* shared) {
  const uint64_t begin_ns = global_timer_ns();
  const uint32_t routing = route_blocks(p, grid_blocks(p));
  const bool sent = blockIdx.x < routing ? route_tokens(p, routing, route_shared(shared, p.op.shape.experts))
                                         : send_row_packets(p, warps_behind(p, routing));
  const bool gated = __syncthreads_or(sent ? 0 : 1) != 0;
  if (blockIdx.x == 0 && !gated) {
    if (threadIdx.x < 32) {
      stamp_captured(p);
    }
    fetch_stats(p);
    if (threadIdx.x == 0) {
      mark_start_at(p, begin_ns);
    }
  }
  return !gated;
}

/// One packet of source s's count row into the bases; `before`: the rows of the sources before s. `keeps`: the block
/// that plans also wants the matrix and the times.
__device__ __forceinline__ uint32_t keep_count(const PartParams& p, const RowBases& bases, uint32_t s, uint32_t at,
                                               uint32_t value, uint32_t* before, bool keeps) {
  const OpShape& shape = p.op.shape;
  if (at >= shape.ranks && at < count_columns(shape)) {
    const uint32_t e = at - shape.ranks;
    if (e / shape.local_experts == shape.rank) {
      bases.local[s * shape.local_experts + e % shape.local_experts] = *before;
    }
    if (s == shape.rank) {
      bases.own[e] = *before;
    }
    *before += value;
  }
  if (keeps && at < matrix_row_ints(shape)) {
    p.op.counts[uint64_t{s} * matrix_row_ints(shape) + at] = static_cast<int32_t>(value);
  }
  return at == count_columns(shape) && value != 0 ? kFoundRejected : 0;
}

/// The two packets behind a count row.
__device__ __forceinline__ uint32_t keep_extra(const PartParams& p, uint32_t s, bool time, const uint4& packet,
                                               bool keeps) {
  const uint64_t word = uint64_t{packet.y} << 32 | packet.x;
  if (time && keeps) {
    SyncPage* page = p.peers.pages[p.op.shape.rank];
    page->moved_time_ns[s] = word;
    page->routed_time_ns[s] = 0;  // there is no such step to be late at
  }
  return !time && word != p.captured.number ? kFoundAborted : 0;  // the ranks' graphs went apart
}

constexpr uint32_t kSourcesAtOnce = 4;

/// Packet `index` of the count rows of the sources from `first` on; zeros of those that do not take part.
__device__ __forceinline__ Arrival take_count(const PartParams& p, uint32_t index, uint32_t first, uint4* packets) {
  const OpShape& shape = p.op.shape;
  const uint32_t tag = tag_of(p);
#pragma unroll 1
  for (uint32_t tries = 0;; ++tries) {
    bool came = true;
#pragma unroll
    for (uint32_t i = 0; i < kSourcesAtOnce; ++i) {
      const uint32_t s = first + i;
      const bool awaited = s < shape.ranks && rank_active(shape, s);
      packets[i] = awaited ? ld_packet(count_packets(p, shape.rank, s) + index) : uint4{0, 0, 0, tag};
      came = came && packets[i].w == tag;
    }
    if (came) {
      return Arrival::kCame;
    }
    const Arrival arrival = poll_on(p, tries);
    if (arrival != Arrival::kCame) {
      return arrival;
    }
  }
}

/// The count rows of all ranks, a packet per thread. Whole block, which meets behind it.
__device__ uint32_t take_counts(const PartParams& p, const RowBases& bases) {
  const OpShape& shape = p.op.shape;
  const bool keeps = blockIdx.x == 0;
  const uint32_t rows = p.low_latency.layout.count_packets - 2;
  uint32_t found = 0;
#pragma unroll 1
  for (uint32_t index = threadIdx.x; index < rows + 2; index += kLowLatencyThreads) {
    uint32_t before[kPacketWords] = {};
#pragma unroll 1
    for (uint32_t first = 0; first < shape.ranks; first += kSourcesAtOnce) {
      uint4 packets[kSourcesAtOnce];
      const Arrival arrival = take_count(p, index, first, packets);
      if (arrival != Arrival::kCame) {
        return found | found_of(arrival);
      }
#pragma unroll
      for (uint32_t i = 0; i < kSourcesAtOnce; ++i) {
        const uint32_t s = first + i;
        if (s < shape.ranks && index < rows) {
          found |= keep_count(p, bases, s, index * kPacketWords, packets[i].x, &before[0], keeps);
          found |= keep_count(p, bases, s, index * kPacketWords + 1, packets[i].y, &before[1], keeps);
          found |= keep_count(p, bases, s, index * kPacketWords + 2, packets[i].z, &before[2], keeps);
        } else if (s < shape.ranks && rank_active(shape, s)) {
          found |= keep_extra(p, s, index == rows, packets[i], keeps);
        }
      }
    }
  }
  return found;
}

/// One part of a (source, token) as it came.
struct TakenPart {
  uint32_t source = 0;
  uint32_t token = 0;
  uint32_t part = 0;
  RoutedLane lane{-1, -1};  // lane k's
  LanePackets packets{};
  bool wanted = false;  // lane k has a row here, and the part came
};

/// The numbers of a token, and its part if it has a row here; both are asked for at once. Whole warp.
__device__ __forceinline__ uint32_t take_unit(const PartParams& p, uint32_t unit, TakenPart* taken) {
  const OpShape& shape = p.op.shape;
  const uint32_t parts = packet_parts(shape.out_row_bytes);
  const uint32_t item = unit / parts;
  taken->part = unit % parts;
  taken->source = item % shape.ranks;
  taken->token = item / shape.ranks;
  taken->lane = {-1, -1};
  taken->wanted = false;
  if (!rank_active(shape, taken->source) || taken->token >= p.low_latency.tokens[taken->source]) {
    return 0;
  }
  const uint4* from = part_packets(p, shape.rank, taken->source, taken->token, taken->part);
  uint4 numbers = read_lane_packet(p, taken->source, taken->token);
  taken->packets = read_part(from);
  Arrival arrival = take_lanes(p, taken->source, taken->token, &numbers);
  if (arrival == Arrival::kCame) {
    taken->lane = {static_cast<int32_t>(numbers.x), static_cast<int32_t>(numbers.y)};
    const auto expert = static_cast<uint32_t>(taken->lane.expert);  // -1 is a large number here
    const bool local = expert < shape.experts && taken->lane.row >= 0 && expert / shape.local_experts == shape.rank;
    if (__any_sync(kFullWarp, local && p.op.out.x != nullptr)) {
      arrival = take_part(p, from, &taken->packets);
      taken->wanted = local && p.op.out.x != nullptr && arrival == Arrival::kCame;
    }
  }
  return is_missing(arrival) ? 0 : found_of(arrival);
}

/// The part to its slots, and of own tokens the absolute rows to the handle. Whole warp.
__device__ __forceinline__ void store_unit(const PartParams& p, const TakenPart& taken, const RowBases& bases) {
  const OpShape& shape = p.op.shape;
  const uint32_t lane = threadIdx.x & 31;
  const auto expert = static_cast<uint32_t>(taken.lane.expert);
  if (taken.part == 0 && taken.source == shape.rank && lane < p.table_top_k) {
    const bool numbered = expert < shape.experts && taken.lane.row >= 0;
    p.op.routing.token_expert[uint64_t{taken.token} * p.table_top_k + lane] =
        numbered ? taken.lane.row + static_cast<int32_t>(bases.own[expert]) : -1;
  }
  Slot slot;
  if (taken.wanted) {
    slot.local = expert % shape.local_experts;
    slot.row = static_cast<uint32_t>(taken.lane.row) + bases.local[taken.source * shape.local_experts + slot.local];
    slot.row_index = uint64_t{slot.local} * shape.slots_per_expert + slot.row;
    slot.wanted = slot.row < shape.slots_per_expert;
  }
  const uint32_t slots = __ballot_sync(kFullWarp, slot.wanted);
  const uint4 v = unpack_part(taken.packets);
  const uint32_t piece = taken.part * 32 + lane;
#pragma unroll 1
  for (uint32_t left = slots; left != 0; left &= left - 1) {
    const uint64_t row = __shfl_sync(kFullWarp, slot.row_index, __ffs(static_cast<int>(left)) - 1);
    if (piece < shape.out_row_bytes / 16) {
      reinterpret_cast<uint4*>(static_cast<char*>(p.op.out.x) + row * shape.out_row_bytes)[piece] = v;
    }
  }
  if (p.op.out.side != nullptr && shape.payload == Payload::kFp8) {
    const uint32_t each = shape.scale == ScaleForm::kUe8m0 ? 1 : 4;
    const uint32_t scale = unpack_scale(taken.packets, lane % each);
    scatter_scales(p, scale, taken.part * each + lane % each, each, slot, slots);
  }
  if (taken.part == 0 && slot.wanted && p.op.out.src_info != nullptr) {
    p.op.out.src_info[slot.row_index] = static_cast<int32_t>(taken.token);
  }
}

/// Everything that this rank receives; kFound... Whole block.
__device__ uint32_t receive_dispatch(const PartParams& p, bool waits, void* shared) {
  __shared__ uint32_t found;
  const OpShape& shape = p.op.shape;
  auto* memory = static_cast<uint32_t*>(shared);
  const RowBases bases{memory, memory + shape.experts};
  const uint32_t units = shape.ranks * most_tokens(p) * packet_parts(shape.out_row_bytes);
  const Crew warps = blockIdx.x == 0 ? Crew{units, 1} : warps_behind(p, 1);
  begin_patience(waits);
  if (threadIdx.x == 0) {
    found = 0;
  }
  __syncthreads();
  uint32_t mine = take_counts(p, bases);
  if (mine != 0) {
    atomicOr(&found, mine);
  }
  __syncthreads();
  mine = found;
  __syncthreads();  // before later units add to it
#pragma unroll 1
  for (uint32_t unit = warps.first; unit < units && mine == 0; unit += warps.step) {
    TakenPart taken;
    mine = take_unit(p, unit, &taken);
    if (mine == 0) {
      store_unit(p, taken, bases);
    } else if ((threadIdx.x & 31) == 0) {
      atomicOr(&found, mine);
    }
  }
  __syncthreads();
  return found;
}

/// A dispatch in packets, as run_ll_dispatch(). `memory`: of route_shared_bytes().
__device__ __forceinline__ void run_packet_dispatch(const PartParams& p, bool waits, void* memory) {
  bool sent = false;
  if (waits) {
    sent = send_dispatch_packets(p, memory);
  } else if (!was_left(p, SignalStep::kMoved)) {
    drain_chain(p, false);
    return;
  }
  if (waits || block_was_left(p, SignalStep::kMoved)) {
    uint32_t found = kFoundAborted;
    if (waits ? sent : wait_for_all(p, SignalStep::kMoved, false) == Arrival::kCame) {
      found = receive_dispatch(p, waits, memory);
    }
    if (waits && (found & (kFoundLate | kFoundAborted)) == kFoundLate) {
      leave_block(p, SignalStep::kMoved);
      if (threadIdx.x == kCountingWarp * 32) {
        count_sent(p, false);
      }
      return;
    }
    Ending ending = (found & (kFoundLate | kFoundAborted)) == 0 ? Ending::kGood : Ending::kAborted;
    const bool plans = ending == Ending::kGood && blockIdx.x == 0;
    if (plans && !plan_low_latency(p)) {
      ending = Ending::kFailed;
    }
    end_block(p, ending, !waits ? Sent::kCounted : sent ? Sent::kAll : Sent::kGated);
    if (plans) {
      keep_matrix(p);  // behind the count, because the caller does not wait for it
    }
  }
  if (!waits) {
    drain_chain(p, true);
  }
}

}  // namespace
}  // namespace expertd::kernels::cuda
