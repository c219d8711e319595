// SPDX-License-Identifier: Apache-2.0
// What low latency operations of few tokens exchange: packets of 12 bytes and a tag, each written and read as one
// access, so that every warp goes on as soon as its own bytes are there, without a fence or a flag. Device code only,
// no state. The blocks still announce `moved` behind all packets, beside their end: it is what the stream of a rank
// that found somebody late waits for, and the host's diagnostics.
//
// Which bytes a tag makes visible: those of its own packet, nothing else. A part of a row is taken when all its packets
// have the tag. Old packets: a place is written again two operations later, and a rank gets there only behind packets
// or flags that every rank sends in the operation between, behind its last read here; tags are unique until the host
// has cleared the buffer (kPacketEpoch).
//
// Late packets. A warp waits for a bounded time; a block with a late one is left as a whole to the kernel behind the
// stream's wait, which does all its units again: the same bytes to the same places. What is missing there, behind all
// `moved`, was never sent (a caller changed its ids meanwhile), and its unit is left out.
#pragma once

#include "daemon/kernels/cuda/low_latency_steps.cuh"

namespace expertd::kernels::cuda {

inline constexpr uint32_t kMorePackets = kPartPackets - 32;  // of a part, behind one per lane
inline constexpr uint32_t kTriesPerGate = 16;  // polls between two looks at the gate, which is one word for all warps
static_assert(kPacketPartBytes == 32 * 16 && kMorePackets * kPacketWords >= 32 + 4,
              "the lanes' last words, four scales");

__host__ __device__ constexpr uint32_t packet_parts(uint32_t bytes) {
  return (bytes + kPacketPartBytes - 1) / kPacketPartBytes;
}

/// Never that of fresh memory.
__device__ __forceinline__ uint32_t tag_of(const PartParams& p) {
  return 1 + static_cast<uint32_t>(p.words.group_op % kPacketEpoch);
}

/// In the buffer of rank `at`: one part of a row of `source`'s token (combine: of owner `source`'s sum for it).
__device__ __forceinline__ uint4* part_packets(const PartParams& p, uint32_t at, uint32_t source, uint32_t token,
                                               uint32_t part) {
  const LowLatencyLayout& layout = p.low_latency.layout;
  const uint64_t index = (uint64_t{source} * layout.packet_tokens + token) * layout.packet_parts + part;
  return reinterpret_cast<uint4*>(p.low_latency.staging[at] + layout.packet_rows) + index * kPartStridePackets;
}

/// In the buffer of rank `at`: the lanes [K of the group] of a token of `source`.
__device__ __forceinline__ uint4* lane_packets(const PartParams& p, uint32_t at, uint32_t source, uint32_t token) {
  const LowLatencyLayout& layout = p.low_latency.layout;
  const uint64_t index = (uint64_t{source} * layout.packet_tokens + token) * p.table_top_k;
  return reinterpret_cast<uint4*>(p.low_latency.staging[at] + layout.packet_lanes) + index;
}

/// In the buffer of rank `at`: the count row of `source`.
__device__ __forceinline__ uint4* count_packets(const PartParams& p, uint32_t at, uint32_t source) {
  const LowLatencyLayout& layout = p.low_latency.layout;
  return reinterpret_cast<uint4*>(p.low_latency.staging[at] + layout.packet_counts) +
         uint64_t{source} * layout.count_packets;
}

/// The packets of one part that a lane writes or reads: those of the first 12 of its 16 bytes, and for kMorePackets
/// lanes those of three lanes' last 4 bytes or of scales.
struct LanePackets {
  uint4 first;
  uint4 more;
};

/// `scale`: of this lane's group of eight, where the part has scales. Whole warp.
__device__ __forceinline__ LanePackets pack_part(const uint4& v, uint32_t scale, uint32_t tag) {
  uint32_t words[kPacketWords];
#pragma unroll
  for (uint32_t i = 0; i < kPacketWords; ++i) {
    const uint32_t at = (threadIdx.x & 31) * kPacketWords + i;
    const uint32_t last = __shfl_sync(kFullWarp, v.w, static_cast<int>(at & 31));
    const uint32_t group = __shfl_sync(kFullWarp, scale, static_cast<int>((at & 3) * 8));
    words[i] = at < 32 ? last : group;
  }
  return {uint4{v.x, v.y, v.z, tag}, uint4{words[0], words[1], words[2], tag}};
}

__device__ __forceinline__ void send_part(uint4* to, const LanePackets& packets) {
  const uint32_t lane = threadIdx.x & 31;
  st_packet(to + lane, packets.first);
  if (lane < kMorePackets) {
    st_packet(to + 32 + lane, packets.more);
  }
}

/// Lanes without a packet of their own behind the first ask for the last one.
__device__ __forceinline__ LanePackets read_part(const uint4* from) {
  const uint32_t lane = threadIdx.x & 31;
  return {ld_packet(from + lane), ld_packet(from + 32 + (lane < kMorePackets ? lane : kMorePackets - 1))};
}

/// Whole warp.
__device__ __forceinline__ bool all_tagged(const LanePackets& packets, uint32_t tag) {
  return __all_sync(kFullWarp, packets.first.w == tag && packets.more.w == tag) != 0;
}

/// The lane's 16 bytes. Whole warp.
__device__ __forceinline__ uint4 unpack_part(const LanePackets& packets) {
  const uint32_t lane = threadIdx.x & 31;
  const int from = static_cast<int>(lane / kPacketWords);
  const uint32_t x = __shfl_sync(kFullWarp, packets.more.x, from);
  const uint32_t y = __shfl_sync(kFullWarp, packets.more.y, from);
  const uint32_t z = __shfl_sync(kFullWarp, packets.more.z, from);
  const uint32_t word = lane % kPacketWords;
  return {packets.first.x, packets.first.y, packets.first.z, word == 0 ? x : word == 1 ? y : z};
}

/// Scale `group` (0 to 3) of the part; they stand behind the 32 last words. Whole warp, any group per lane.
__device__ __forceinline__ uint32_t unpack_scale(const LanePackets& packets, uint32_t group) {
  const int from = static_cast<int>((32 + group) / kPacketWords);
  const uint32_t x = __shfl_sync(kFullWarp, packets.more.x, from);
  const uint32_t y = __shfl_sync(kFullWarp, packets.more.y, from);
  const uint32_t z = __shfl_sync(kFullWarp, packets.more.z, from);
  const uint32_t word = (32 + group) % kPacketWords;
  return word == 0 ? x : word == 1 ? y : z;
}

/// Until when each warp waits, by clock64(); 0 behind the stream's wait. In shared memory, because it is read when
/// nothing else is to do, and registers are short.
__device__ __forceinline__ int64_t* patience_end() {
  __shared__ int64_t ends[kLowLatencyWarps];
  return &ends[threadIdx.x / 32];
}

/// From here on this warp waits for its patience, or not at all. Whole warp.
__device__ __forceinline__ void begin_patience(bool waits) {
  __syncwarp();
  if ((threadIdx.x & 31) == 0) {
    *patience_end() = waits ? clock64() + kPatienceCycles : 0;
  }
  __syncwarp();
}

/// Whether to poll on, after `tries` polls: kCame for that.
__device__ __forceinline__ Arrival poll_on(const PartParams& p, uint32_t tries) {
  if (tries % kTriesPerGate == kTriesPerGate - 1 && ld_relaxed_sys(&p.words.state->aborted_part) == p.words.part) {
    return Arrival::kAborted;
  }
  return clock64() > *patience_end() ? Arrival::kLate : Arrival::kCame;
}

/// The same for a whole warp.
__device__ __forceinline__ Arrival warp_polls_on(const PartParams& p, uint32_t tries) {
  const Arrival mine = poll_on(p, tries);
  if (__any_sync(kFullWarp, mine == Arrival::kAborted)) {
    return Arrival::kAborted;
  }
  return __any_sync(kFullWarp, mine == Arrival::kLate) ? Arrival::kLate : Arrival::kCame;
}

/// Lane k's packet of a token's k-th lane; none for the others.
__device__ __forceinline__ uint4 read_lane_packet(const PartParams& p, uint32_t source, uint32_t token) {
  const uint32_t k = threadIdx.x & 31;
  return k < p.table_top_k ? ld_packet(lane_packets(p, p.op.shape.rank, source, token) + k)
                           : uint4{~0u, ~0u, 0, tag_of(p)};
}

/// The same when all are there; `packet`: as read_lane_packet() has it. Whole warp.
__device__ inline Arrival take_lanes(const PartParams& p, uint32_t source, uint32_t token, uint4* packet) {
  const uint32_t tag = tag_of(p);
#pragma unroll 1
  for (uint32_t tries = 0; !__all_sync(kFullWarp, packet->w == tag); ++tries) {
    const Arrival arrival = warp_polls_on(p, tries);
    if (arrival != Arrival::kCame) {
      return arrival;
    }
    *packet = read_lane_packet(p, source, token);
  }
  return Arrival::kCame;
}

/// One part's packets; `packets`: as read_part() has them. Then only the last packet is asked for until it is there:
/// all warps wait at once, and whole parts would fill the second-level cache's ways. Whole warp.
__device__ inline Arrival take_part(const PartParams& p, const uint4* from, LanePackets* packets) {
  const uint32_t tag = tag_of(p);
  uint32_t tries = 0;
#pragma unroll 1
  while (!all_tagged(*packets, tag)) {
    do {
      const Arrival arrival = warp_polls_on(p, tries++);
      if (arrival != Arrival::kCame) {
        return arrival;
      }
    } while (!__all_sync(kFullWarp, ld_packet(from + kPartPackets - 1).w == tag));
    *packets = read_part(from);
  }
  return Arrival::kCame;
}

/// What the warps of a block found, as bits of one word of its shared memory.
inline constexpr uint32_t kFoundLate = 1;
inline constexpr uint32_t kFoundAborted = 2;
inline constexpr uint32_t kFoundRejected = 4;  // a rank rejected its routing: nothing is moved
inline constexpr uint32_t kFoundUnsent = 8;    // combine: late before this block's sums were sent

/// What was never sent is left out.
__device__ __forceinline__ bool is_missing(Arrival arrival) {
  return arrival == Arrival::kLate && *patience_end() == 0;
}

__device__ __forceinline__ uint32_t found_of(Arrival arrival) {
  return arrival == Arrival::kCame ? 0 : arrival == Arrival::kLate ? kFoundLate : kFoundAborted;
}

}  // namespace expertd::kernels::cuda
