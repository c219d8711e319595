// SPDX-License-Identifier: Apache-2.0
// What the kernels of a low latency combine do between GPUs that all reach each other: the owners read an origin's row
// numbers and weights over the link, sum its tokens' rows and send the sums; the origin adds them. Device code only,
// included by the kernels' .cu files; no state. Definitions: daemon/kernels/README.md.
#pragma once

#include "daemon/kernels/cuda/combine_rows.cuh"
#include "daemon/kernels/cuda/low_latency_steps.cuh"

namespace expertd::kernels::cuda {
namespace {

constexpr uint32_t kSumPartBytes = 512;  // of a row, what one warp takes at a time: 16 bytes per lane
constexpr uint32_t kRowsAtOnce = 8;      // rows whose loads are in flight together
constexpr uint32_t kSumsAtOnce = 4;      // the same of owners' sums, and of rows where a token has more lanes
/// Warps of a block that take parts next to each other, mostly of one token, whose tables one of them then fetches for
/// all. More of them would give some blocks only tokens with many rows.
constexpr uint32_t kTeamWarps = 5;
constexpr uint32_t kSumWarps = kLowLatencyWarps - 1;  // of a block: all but the counting one
static_assert(kCountingWarp == kSumWarps && kSumWarps % kTeamWarps == 0);

__host__ __device__ constexpr uint32_t sum_parts(const OpShape& shape) {
  return (shape.hidden * 2 + kSumPartBytes - 1) / kSumPartBytes;
}

/// This warp's parts in both steps: what a warp sums of the own tokens, it also adds. None of the counting warp.
__device__ Crew team_crew(const PartParams& p) {
  const uint32_t warp = threadIdx.x / 32;
  const uint32_t team = warp / kTeamWarps * grid_blocks(p) + blockIdx.x;
  return {warp < kSumWarps ? team * kTeamWarps + warp % kTeamWarps : ~0u, grid_blocks(p) * kSumWarps};
}

/// One (token, lane) as it stands in the tables of its origin.
struct LaneEntry {
  uint32_t expert = ~0u;
  uint32_t row = ~0u;  // inside the expert's slots
  uint32_t id_low = 0;
  uint32_t id_high = 0;
  float weight = 1.0f;
};

/// The warp's lane k has the token's k-th.
__device__ __forceinline__ LaneEntry read_lane(const PartParams& p, uint32_t origin, uint32_t token) {
  const LaneTables& tables = p.low_latency.lanes[origin];
  const uint32_t k = threadIdx.x & 31;
  LaneEntry entry;
  if (k < p.table_top_k && k < tables.top_k) {
    const uint64_t at = uint64_t{token} * p.table_top_k + k;
    const uint64_t given = uint64_t{token} * tables.top_k + k;
    entry.expert = static_cast<uint32_t>(tables.topk[at]);
    entry.row = static_cast<uint32_t>(tables.token_expert[at]);
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

/// The row of a (token, lane).
struct LaneRow {
  uint32_t owner = 0;
  int32_t row = -1;  // of the owner's [L * N] rows, -1 for none
};

/// The entry is another rank's word, and its caller's: whatever it says, the row is one of the owner's. The caller's
/// ids may take lanes away.
__device__ __forceinline__ LaneRow row_of(const PartParams& p, const LaneEntry& entry) {
  const OpShape& shape = p.op.shape;
  LaneRow lane;
  // Negative numbers are large ones here.
  if (entry.expert >= shape.experts || entry.row >= shape.slots_per_expert || entry.id_low >= shape.experts ||
      entry.id_high != 0) {
    return lane;
  }
  lane.owner = entry.expert / shape.local_experts;
  const uint64_t slot = uint64_t{entry.expert % shape.local_experts} * shape.slots_per_expert + entry.row;
  const PeerView& peer = p.peers.views[lane.owner];
  if (rank_active(shape, lane.owner) && peer.in_x != nullptr && slot < peer.in_rows) {
    lane.row = static_cast<int32_t>(slot);
  }
  return lane;
}

__device__ LaneRow own_lane(const PartParams& p, uint32_t token) {
  return row_of(p, read_lane(p, p.op.shape.rank, token));
}

/// Begins the part and tells the owners that they may read this rank's tables, which earlier kernels and the caller's
/// stream wrote. The first block's first warp.
__device__ void open_exchange(const PartParams& p) {
  const uint64_t begin_ns = global_timer_ns();
  if (__any_sync(kFullWarp, ld_relaxed_sys(&p.words.state->aborted_part) == p.words.part)) {
    return;
  }
  announce(p, SignalStep::kRouted);
  if (threadIdx.x == 0) {
    mark_start_at(p, begin_ns);
  }
}

__device__ uint32_t own_units(const PartParams& p) {
  return p.op.out.x == nullptr ? 0 : p.op.shape.tokens * sum_parts(p.op.shape);
}

/// Lets the second-level cache fetch the own tables, for this warp's second step and for the owners.
__device__ void fetch_own_tables(const PartParams& p, Crew warps) {
  const LaneTables& tables = p.low_latency.lanes[p.op.shape.rank];
  const uint32_t k = threadIdx.x & 31;
  if (warps.first >= p.op.shape.tokens * sum_parts(p.op.shape) || k >= p.table_top_k || k >= tables.top_k) {
    return;
  }
  const uint32_t token = warps.first / sum_parts(p.op.shape);
  const uint64_t at = uint64_t{token} * p.table_top_k + k;
  const uint64_t given = uint64_t{token} * tables.top_k + k;
  prefetch(tables.topk + at);
  prefetch(tables.token_expert + at);
  if (tables.topk_idx != nullptr) {
    prefetch(tables.topk_idx + given * tables.id_words);
  }
  if (tables.topk_weights != nullptr) {
    prefetch(tables.topk_weights + given);
  }
}

/// How many rows the tokens of this rank have, for the report. The counting warp of every block.
__device__ void count_rows(const PartParams& p) {
  if (threadIdx.x / 32 != kCountingWarp) {
    return;
  }
  uint32_t local = 0;
  uint32_t remote = 0;
#pragma unroll 1
  for (uint32_t token = blockIdx.x; token < p.op.shape.tokens; token += grid_blocks(p)) {
    const LaneRow lane = own_lane(p, token);
    const bool own = lane.owner == p.op.shape.rank;
    local += __popc(__ballot_sync(kFullWarp, lane.row >= 0 && own));
    remote += __popc(__ballot_sync(kFullWarp, lane.row >= 0 && !own));
  }
  if ((threadIdx.x & 31) == 0) {
    p.scratch.block_rows[blockIdx.x] = {local, remote};
  }
}

/// Which tokens a step sums: those of the other ranks, who wait for them, or the own ones.
enum class Sums : uint32_t { kOthers = 0, kOwnTokens = 1 };

/// Where the lane's 16 bytes of one part of rank `owner`'s sum for a token lie in the origin's staging.
__device__ __forceinline__ uint4* staged_sum(const PartParams& p, uint32_t origin, uint32_t owner, uint32_t token,
                                             uint32_t piece) {
  char* rows = p.low_latency.staging[origin] + p.low_latency.layout.combine_rows;
  return reinterpret_cast<uint4*>(rows) + uint64_t{row_at_index(p.op.shape, owner, token)} * (p.op.shape.hidden / 8) +
         piece;
}

/// One part of a token, as far as this lane has a share in it.
struct Unit {
  uint4* sum = nullptr;  // in the origin's staging; null behind the last unit, and for tokens that are none
  uint32_t piece = 0;    // of the row
};

/// Also asks for the token's tables.
__device__ __forceinline__ Unit unit_at(const PartParams& p, Sums which, uint32_t index, LaneEntry* entry) {
  const OpShape& shape = p.op.shape;
  const uint32_t parts = sum_parts(shape);
  uint32_t token = index / parts;
  Unit unit;
  unit.piece = (index - token * parts) * (kSumPartBytes / 16) + (threadIdx.x & 31);
  uint32_t origin = shape.rank;
  if (which == Sums::kOthers) {
    const uint32_t other = token % (shape.ranks - 1);
    token /= shape.ranks - 1;
    origin = other + (other >= shape.rank ? 1 : 0);
  }
  if (rank_active(shape, origin) && token < p.low_latency.tokens[origin]) {
    *entry = read_lane(p, origin, token);
    unit.sum = staged_sum(p, origin, shape.rank, token, unit.piece);
  }
  return unit;
}

__device__ __forceinline__ uint32_t lowest_bit(uint32_t bits) {
  return bits == 0 ? 0 : __ffs(static_cast<int>(bits)) - 1;
}

__device__ __forceinline__ void add_weighted(const uint4& v, float weight, float* sums) {
  const Bf16x8 values = to_bf16x8(v);
#pragma unroll
  for (uint32_t e = 0; e < 8; ++e) {
    sums[e] = __fadd_rn(sums[e], __fmul_rn(weight, element(values, e)));
  }
}

/// The lane's 16 bytes of a token's weighted rows, in lane order, rounded. `rows`: the lanes of the warp that hold a
/// row; `x`: where the piece of row 0 lies. Whole warp, whose lanes behind the end of a row read nothing.
struct RowSum {
  const uint4* x;
  uint32_t pieces;  // of a row
  bool inside;
  uint32_t rows;
};

/// For operations with more lanes than kRowsAtOnce.
__device__ __forceinline__ uint4 sum_many(RowSum s, int32_t row, float weight) {
  float sums[8] = {};
  while (s.rows != 0) {
    uint32_t weighted = s.rows;
    uint4 v[kSumsAtOnce];
#pragma unroll
    for (uint32_t i = 0; i < kSumsAtOnce; ++i) {
      const auto at = static_cast<uint32_t>(__shfl_sync(kFullWarp, row, static_cast<int>(lowest_bit(s.rows))));
      v[i] = s.rows != 0 && s.inside ? s.x[uint64_t{at} * s.pieces] : uint4{};
      s.rows &= s.rows - 1;
    }
#pragma unroll
    for (uint32_t i = 0; i < kSumsAtOnce && weighted != 0; ++i) {
      add_weighted(v[i], __shfl_sync(kFullWarp, weight, static_cast<int>(lowest_bit(weighted))), sums);
      weighted &= weighted - 1;
    }
  }
  return rounded(sums);
}

/// For the others: every lane has its place, so that nothing is computed between the tables and the rows.
__device__ __forceinline__ uint4 sum_few(const RowSum& s, int32_t row, float weight) {
  float sums[8] = {};
  uint4 v[kRowsAtOnce];
#pragma unroll
  for (uint32_t i = 0; i < kRowsAtOnce; ++i) {
    const auto at = static_cast<uint32_t>(__shfl_sync(kFullWarp, row, static_cast<int>(i)));
    v[i] = (s.rows >> i & 1) != 0 && s.inside ? s.x[uint64_t{at} * s.pieces] : uint4{};
  }
#pragma unroll
  for (uint32_t i = 0; i < kRowsAtOnce; ++i) {
    const float mine = __shfl_sync(kFullWarp, weight, static_cast<int>(i));
    if ((s.rows >> i & 1) != 0) {
      add_weighted(v[i], mine, sums);
    }
  }
  return rounded(sums);
}

/// One part of this rank's weighted rows of a token to the origin. Whole warp.
template <bool kMany>
__device__ __forceinline__ void sum_part(const PartParams& p, const Unit& unit, const LaneEntry& entry) {
  const OpShape& shape = p.op.shape;
  const LaneRow lane = row_of(p, entry);
  RowSum s{};
  s.x = static_cast<const uint4*>(p.peers.views[shape.rank].in_x) + unit.piece;
  s.pieces = shape.hidden / 8;
  s.inside = unit.piece < s.pieces;
  s.rows = __ballot_sync(kFullWarp, lane.row >= 0 && lane.owner == shape.rank);
  if (s.rows == 0) {
    return;
  }
  const uint4 sum = kMany ? sum_many(s, lane.row, entry.weight) : sum_few(s, lane.row, entry.weight);
  if (s.inside) {
    *unit.sum = sum;
  }
}

/// This warp's parts of one step.
template <bool kMany>
__device__ __forceinline__ void sum_tokens(const PartParams& p, Sums which, Crew warps) {
  const OpShape& shape = p.op.shape;
  const uint32_t units =
      which == Sums::kOwnTokens ? own_units(p) : (shape.ranks - 1) * most_tokens(p) * sum_parts(shape);
#pragma unroll 1
  for (uint32_t index = warps.first; index < units; index += warps.step) {
    LaneEntry entry;
    const Unit unit = unit_at(p, which, index, &entry);
    if (unit.sum != nullptr) {
      sum_part<kMany>(p, unit, entry);
    }
  }
}

/// The ranks that have a sum for the token of one unit of this rank, as bits; 0 behind the last unit. Whole warp.
__device__ uint32_t unit_owners(const PartParams& p, uint32_t unit) {
  if (unit >= own_units(p)) {
    return 0;
  }
  const LaneRow lane = own_lane(p, unit / sum_parts(p.op.shape));
  return __reduce_or_sync(kFullWarp, lane.row >= 0 ? 1u << lane.owner : 0);
}

/// One part of a token of this rank: the owners' sums in rank order.
__device__ void add_part(const PartParams& p, uint32_t token, uint32_t part, uint32_t owners) {
  const OpShape& shape = p.op.shape;
  const uint32_t pieces = shape.hidden / 8;
  const uint32_t piece = part * (kSumPartBytes / 16) + (threadIdx.x & 31);
  if (piece >= pieces) {
    return;
  }
  float sums[8] = {};
  while (owners != 0) {
    uint32_t added = owners;
    uint4 v[kSumsAtOnce];
#pragma unroll
    for (uint32_t i = 0; i < kSumsAtOnce; ++i) {
      v[i] = owners != 0 ? *staged_sum(p, shape.rank, lowest_bit(owners), token, piece) : uint4{};
      owners &= owners - 1;
    }
#pragma unroll
    for (uint32_t i = 0; i < kSumsAtOnce && added != 0; ++i) {
      const Bf16x8 values = to_bf16x8(v[i]);
#pragma unroll
      for (uint32_t e = 0; e < 8; ++e) {
        sums[e] = __fadd_rn(sums[e], element(values, e));
      }
      added &= added - 1;
    }
  }
  static_cast<uint4*>(p.op.out.x)[uint64_t{token} * pieces + piece] = rounded(sums);
}

/// This warp's parts of this rank's tokens; `owners` are those of its first one.
__device__ void add_tokens(const PartParams& p, Crew warps, uint32_t owners) {
  const uint32_t parts = sum_parts(p.op.shape);
#pragma unroll 1
  for (uint32_t unit = warps.first; unit < own_units(p); unit += warps.step) {
    add_part(p, unit / parts, unit % parts, owners);
    owners = unit_owners(p, unit + warps.step);
  }
}

/// Behind the first exchange: the sums of this rank's rows, and between those of the others' tokens and of the own ones
/// the second step's flags, which so are under way meanwhile. False when the block left it. Whole block.
template <bool kMany>
__device__ __forceinline__ bool pass_routed(const PartParams& p, bool waits) {
  const Arrival arrival = wait_for_all(p, SignalStep::kRouted, waits);
  if (arrival == Arrival::kLate) {
    leave_block(p, SignalStep::kRouted);
    return false;
  }
  // One copy of the code for both: it is cold when an operation comes.
#pragma unroll 1
  for (uint32_t step = 0; step < 2; ++step) {
    if (arrival == Arrival::kCame) {
      sum_tokens<kMany>(p, static_cast<Sums>(step), team_crew(p));
      stamp(step == 0 ? Stamp::kRowsDone : Stamp::kOwnSums);
    }
    if (step == 0) {
      if (blockIdx.x == 0 && threadIdx.x < 32) {
        stamp_step(p, SignalStep::kMoved);
      }
      send_block(p, arrival != Arrival::kCame);
    }
  }
  return true;
}

/// The whole of a combine as its kernels run it, by the kernel's place in the chain. All blocks of the part, whole
/// blocks.
template <bool kMany>
__device__ __forceinline__ void run_ll_combine(const PartParams& p, LowLatencyEntry entry) {
  const bool last = entry == LowLatencyEntry::kBehindMoved;
  const SignalStep before = last ? SignalStep::kMoved : SignalStep::kRouted;
  if (entry == LowLatencyEntry::kWaits) {
    if (threadIdx.x < 32) {
      stamp(Stamp::kStarted);
    }
    if (blockIdx.x == 0 && threadIdx.x < 32) {
      open_exchange(p);
      stamp(Stamp::kHandedOver);
    }
    fetch_own_tables(p, team_crew(p));
  } else if (!was_left(p, before)) {
    if (last) {
      drain_chain(p, false);
    }
    return;
  }
  if (entry == LowLatencyEntry::kWaits || block_was_left(p, before)) {
    if (!last && !pass_routed<kMany>(p, entry == LowLatencyEntry::kWaits)) {
      return;
    }
    const uint32_t owners = unit_owners(p, team_crew(p).first);  // known before the exchange
    count_rows(p);
    const Arrival arrival = wait_for_all(p, SignalStep::kMoved, !last);
    if (arrival == Arrival::kLate) {
      leave_block(p, SignalStep::kMoved);
      return;
    }
    if (arrival == Arrival::kCame) {
      add_tokens(p, team_crew(p), owners);
    }
    end_block(p, arrival == Arrival::kCame ? Ending::kGood : Ending::kAborted);
  }
  if (last) {
    drain_chain(p, true);
  }
}

}  // namespace
}  // namespace expertd::kernels::cuda
