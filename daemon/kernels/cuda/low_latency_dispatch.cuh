// SPDX-License-Identifier: Apache-2.0
// What the kernels of a low latency dispatch do between GPUs that all reach each other: a token crosses once per
// destination rank into that rank's staging, and the destination expands it to its experts' slots. Device code only,
// included by the kernels' .cu files; no state. Definitions: daemon/kernels/README.md.
#pragma once

#include "daemon/kernels/cuda/low_latency_route.cuh"
#include "daemon/kernels/cuda/quantise.cuh"

namespace expertd::kernels::cuda {
namespace {

/// Calls `use` with a zero of the side's element type.
template <typename Use>
__device__ void with_side_type(uint32_t element_bytes, const Use& use) {
  if (element_bytes == 4) {
    use(uint32_t{});
  } else if (element_bytes == 2) {
    use(uint16_t{});
  } else if (element_bytes == 1) {
    use(uint8_t{});
  }
}

/// Active ranks with an expert of the token, as bits. Whole warp, one id per lane.
__device__ uint32_t ranks_of(const PartParams& p, int64_t id) {
  const OpShape& shape = p.op.shape;
  const bool valid = id >= 0 && id < static_cast<int64_t>(shape.experts);
  const uint32_t bit = valid ? 1u << (static_cast<uint32_t>(id) / shape.local_experts) : 0;
  return __reduce_or_sync(kFullWarp, bit) & static_cast<uint32_t>(active_bits(shape));
}

/// The place of one of this rank's tokens in the staging of rank j.
__device__ char* staged_at(const PartParams& p, uint32_t j, uint32_t token) {
  const LowLatencyLayout& layout = p.low_latency.layout;
  return p.low_latency.staging[j] + layout.dispatch_rows +
         row_at_index(p.op.shape, p.op.shape.rank, token) * layout.row_stride;
}

/// 512 channels of a token, quantised once, and their scales to the staging of every destination.
__device__ void send_fp8(const PartParams& p, uint32_t token, uint32_t part, const uint4* v, uint32_t ranks) {
  const OpShape& shape = p.op.shape;
  const uint32_t lane = threadIdx.x & 31;
  const uint32_t channel = part * (kRowPartBytes / 2) + lane * kChannelsPerLane;
  const QuantisedLane quantised = quantise_lane(v[0], v[1], shape.scale);
  const bool packed = shape.scale == ScaleForm::kUe8m0;
  const uint32_t word = packed ? pack_ue8m0(quantised.scale) : __float_as_uint(quantised.scale);
  const uint32_t scale_at = packed ? channel / kScaleGroup / 4 : channel / kScaleGroup;
  if (channel >= shape.hidden) {
    return;
  }
#pragma unroll 1
  for (; ranks != 0; ranks &= ranks - 1) {
    char* staged = staged_at(p, __ffs(static_cast<int>(ranks)) - 1, token);
    *reinterpret_cast<uint4*>(staged + channel) = quantised.codes;
    if (lane % (packed ? 32 : 8) == 0) {
      reinterpret_cast<uint32_t*>(staged + shape.out_row_bytes)[scale_at] = word;
    }
  }
}

/// The side row of a token, row-major behind the payload.
__device__ void send_side(const PartParams& p, uint32_t token, uint32_t ranks) {
  const OpShape& shape = p.op.shape;
  if (p.op.in.side == nullptr) {
    return;
  }
  const char* in = static_cast<const char*>(p.op.in.side) + static_cast<int64_t>(token) * shape.side_row_stride;
  with_side_type(shape.side_element_bytes, [&](auto zero) {
    using Element = decltype(zero);
#pragma unroll 1
    for (uint32_t i = threadIdx.x & 31; i < shape.side_elements; i += 32) {
      const Element value = *reinterpret_cast<const Element*>(in + static_cast<int64_t>(i) * shape.side_element_stride);
#pragma unroll 1
      for (uint32_t left = ranks; left != 0; left &= left - 1) {
        char* staged = staged_at(p, __ffs(static_cast<int>(left)) - 1, token);
        reinterpret_cast<Element*>(staged + shape.out_row_bytes)[i] = value;
      }
    }
  });
}

/// One part of a token as it is, to the staging of every destination.
__device__ void send_bytes(const PartParams& p, uint32_t token, uint32_t part, const uint4* v, uint32_t ranks) {
  const uint32_t piece = part * (kRowPartBytes / 16) + (threadIdx.x & 31);
  const uint32_t pieces = p.op.shape.row_bytes / 16;
  if (part == 0) {
    send_side(p, token, ranks);
  }
#pragma unroll 1
  for (; ranks != 0; ranks &= ranks - 1) {
    auto* staged = reinterpret_cast<uint4*>(staged_at(p, __ffs(static_cast<int>(ranks)) - 1, token));
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
      if (piece + i * 32 < pieces) {
        staged[piece + i * 32] = v[i];
      }
    }
  }
}

/// The lane's two pieces of one part of a row: next to each other where they are to be quantised.
__device__ void load_part(const char* row, uint32_t bytes, uint32_t part, bool adjacent, uint4* v) {
  const uint32_t lane = threadIdx.x & 31;
  const uint32_t first = part * (kRowPartBytes / 16) + (adjacent ? lane * 2 : lane);
#pragma unroll
  for (uint32_t i = 0; i < 2; ++i) {
    const uint32_t piece = first + (adjacent ? i : i * 32);
    v[i] = piece < bytes / 16 ? reinterpret_cast<const uint4*>(row)[piece] : uint4{};
  }
}

/// This warp's parts of this rank's tokens. The gate is read beside the first row; false when the part was aborted.
__device__ bool send_rows(const PartParams& p, Crew warps) {
  const OpShape& shape = p.op.shape;
  const bool fp8 = shape.payload == Payload::kFp8;
  const uint32_t parts = row_parts(shape.row_bytes);
  const uint32_t units = p.op.in.x == nullptr || p.refused_reason != 0 ? 0 : shape.tokens * parts;
  const uint64_t aborted = ld_relaxed_sys(&p.words.state->aborted_part);
#pragma unroll 1
  for (uint32_t unit = warps.first; unit < units; unit += warps.step) {
    const uint32_t token = unit / parts;
    const uint32_t part = unit % parts;
    uint4 v[2];
    load_part(static_cast<const char*>(p.op.in.x) + uint64_t{token} * shape.row_bytes, shape.row_bytes, part, fp8, v);
    const uint32_t ranks = ranks_of(p, id_at(p, token, threadIdx.x & 31));
    if (__any_sync(kFullWarp, aborted == p.words.part)) {
      return false;
    }
    if (fp8) {
      send_fp8(p, token, part, v, ranks);
    } else {
      send_bytes(p, token, part, v, ranks);
    }
  }
  return __all_sync(kFullWarp, aborted != p.words.part) != 0;
}

/// Everything before the exchange; the last block announces it. Whole block.
__device__ void send_tokens(const PartParams& p, void* shared) {
  const uint64_t begin_ns = global_timer_ns();
  if (threadIdx.x < 32) {
    stamp(Stamp::kStarted);
  }
  const uint32_t routing = route_blocks(p, grid_blocks(p));
  bool gated = false;
  if (blockIdx.x < routing) {
    gated = !route_tokens(p, routing, route_shared(shared, p.op.shape.experts));
    if (!gated && blockIdx.x == 0 && threadIdx.x < 32) {
      stamp_step(p, SignalStep::kMoved);
    }
    stamp(Stamp::kRouted);
  } else {
    gated = !send_rows(p, warps_behind(p, routing));
    stamp(Stamp::kRowsDone);
  }
  send_block(p, gated);
  if (blockIdx.x == 0 && !gated) {
    fetch_stats(p);
    if (threadIdx.x == 0) {
      mark_start_at(p, begin_ns);
    }
  }
}

/// The slot that lane k's top-k lane of a staged token has with this rank.
struct Slot {
  bool wanted = false;
  uint32_t local = 0;  // expert
  uint32_t row = 0;    // inside the expert's slots
  uint64_t row_index = 0;
};

/// Lane k's top-k lane of a staged token as its source numbered it.
__device__ RoutedLane staged_lane(const PartParams& p, uint32_t source, uint32_t token) {
  const uint32_t k = threadIdx.x & 31;
  const char* lanes = p.low_latency.staging[p.op.shape.rank] + p.low_latency.layout.dispatch_lanes;
  const uint64_t at = uint64_t{row_at_index(p.op.shape, source, token)} * p.table_top_k + k;
  const int2 lane = k < p.table_top_k ? reinterpret_cast<const int2*>(lanes)[at] : int2{-1, -1};
  return {lane.x, lane.y};
}

/// Makes the handle's row absolute on the way, if `keeps`: those of the own tokens.
__device__ Slot slot_of(const PartParams& p, uint32_t source, uint32_t token, RoutedLane lane, bool keeps) {
  const OpShape& shape = p.op.shape;
  const auto expert = static_cast<uint32_t>(lane.expert);
  const bool numbered = expert < shape.experts && lane.row >= 0;  // -1 is a large number here
  const bool local = numbered && expert / shape.local_experts == shape.rank;
  auto row = static_cast<uint32_t>(lane.row);
  for (uint32_t s = 0; (local || (numbered && keeps)) && s < source; ++s) {
    row += static_cast<uint32_t>(p.op.counts[uint64_t{s} * matrix_row_ints(shape) + shape.ranks + expert]);
  }
  if (numbered && keeps) {
    p.op.routing.token_expert[uint64_t{token} * p.table_top_k + (threadIdx.x & 31)] = static_cast<int32_t>(row);
  }
  Slot slot;
  slot.wanted = local && row < shape.slots_per_expert;
  slot.local = local ? expert % shape.local_experts : 0;
  slot.row = row;
  slot.row_index = uint64_t{slot.local} * shape.slots_per_expert + row;
  return slot;
}

/// The scales of eight groups (UE8M0: two words) to the token's slots, in their transposed layout. Whole warp.
__device__ void store_scales(const PartParams& p, const char* staged, uint32_t part, const Slot& slot, uint32_t slots) {
  const OpShape& shape = p.op.shape;
  const bool packed = shape.scale == ScaleForm::kUe8m0;
  const uint32_t words = shape.hidden / kScaleGroup / (packed ? 4 : 1);
  const uint32_t each = packed ? 2 : 8;
  const uint32_t lane = threadIdx.x & 31;
  const uint32_t word = part * each + lane % each;
  const uint32_t value = word < words ? reinterpret_cast<const uint32_t*>(staged + shape.out_row_bytes)[word] : 0;
  // 32 / each slots at a time, one per neighbouring lanes.
  uint32_t left = slots;
#pragma unroll 1
  while (left != 0) {
    uint32_t mine = left;
#pragma unroll 1
    for (uint32_t skip = 0; skip < lane / each && mine != 0; ++skip) {
      mine &= mine - 1;
    }
    const int from = mine == 0 ? 0 : __ffs(static_cast<int>(mine)) - 1;
    const uint64_t column = uint64_t{__shfl_sync(kFullWarp, slot.local, from)} * words + word;
    const uint32_t row = __shfl_sync(kFullWarp, slot.row, from);
    if (mine != 0 && word < words) {
      static_cast<uint32_t*>(p.op.out.side)[column * shape.slots_per_expert + row] = value;
    }
#pragma unroll 1
    for (uint32_t taken = 0; taken < 32 / each; ++taken) {
      left &= left - 1;
    }
  }
}

/// The staged side row to the token's slots. Whole warp.
__device__ void store_side(const PartParams& p, const char* staged, const Slot& slot, uint32_t slots) {
  const OpShape& shape = p.op.shape;
  with_side_type(shape.side_element_bytes, [&](auto zero) {
    using Element = decltype(zero);
#pragma unroll 1
    for (; slots != 0; slots &= slots - 1) {
      const uint64_t row = __shfl_sync(kFullWarp, slot.row_index, __ffs(static_cast<int>(slots)) - 1);
#pragma unroll 1
      for (uint32_t i = threadIdx.x & 31; i < shape.side_elements; i += 32) {
        static_cast<Element*>(p.op.out.side)[row * shape.side_elements + i] =
            reinterpret_cast<const Element*>(staged + shape.out_row_bytes)[i];
      }
    }
  });
}

/// One part of a staged token to all its slots, `v` its pieces. Whole warp.
__device__ void store_part(const PartParams& p, const char* staged, uint32_t part, const uint4* v, const Slot& slot,
                           uint32_t slots) {
  const OpShape& shape = p.op.shape;
  const uint32_t piece = part * (kRowPartBytes / 16) + (threadIdx.x & 31);
#pragma unroll 1
  for (uint32_t left = slots; left != 0; left &= left - 1) {
    const uint64_t row = __shfl_sync(kFullWarp, slot.row_index, __ffs(static_cast<int>(left)) - 1);
    auto* out = reinterpret_cast<uint4*>(static_cast<char*>(p.op.out.x) + row * shape.out_row_bytes);
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
      if (piece + i * 32 < shape.out_row_bytes / 16) {
        out[piece + i * 32] = v[i];
      }
    }
  }
  if (p.op.out.side != nullptr && shape.payload == Payload::kFp8) {
    store_scales(p, staged, part, slot, slots);
  } else if (p.op.out.side != nullptr && part == 0) {
    store_side(p, staged, slot, slots);
  }
}

/// This warp's parts of all tokens that the ranks sent; nothing when a rank rejected its routing. Rows, numbers and
/// errors are read together, also of tokens that have no slot here: waiting for one to read the next costs more.
__device__ void expand_rows(const PartParams& p, Crew warps) {
  const OpShape& shape = p.op.shape;
  const LowLatencyLayout& layout = p.low_latency.layout;
  const uint32_t lane = threadIdx.x & 31;
  const uint32_t parts = row_parts(shape.out_row_bytes);
  const uint32_t units = shape.ranks * most_tokens(p) * parts;
  const bool rejects = lane < shape.ranks && rank_active(shape, lane) &&
                       p.op.counts[uint64_t{lane} * matrix_row_ints(shape) + count_columns(shape)] != 0;
#pragma unroll 1
  for (uint32_t unit = warps.first; unit < units; unit += warps.step) {
    const uint32_t item = unit / parts;
    const uint32_t part = unit % parts;
    const uint32_t source = item % shape.ranks;
    const uint32_t token = item / shape.ranks;
    if (!rank_active(shape, source) || token >= p.low_latency.tokens[source]) {
      continue;
    }
    const char* staged = p.low_latency.staging[shape.rank] + layout.dispatch_rows +
                         row_at_index(shape, source, token) * layout.row_stride;
    uint4 v[2];
    load_part(staged, shape.out_row_bytes, part, false, v);
    const RoutedLane routed = staged_lane(p, source, token);
    if (__any_sync(kFullWarp, rejects)) {
      return;
    }
    const Slot slot = slot_of(p, source, token, routed, part == 0 && source == shape.rank);
    const bool wanted = slot.wanted && p.op.out.x != nullptr;
    const uint32_t slots = __ballot_sync(kFullWarp, wanted);
    store_part(p, staged, part, v, slot, slots);
    if (part == 0 && wanted && p.op.out.src_info != nullptr) {
      p.op.out.src_info[slot.row_index] = static_cast<int32_t>(token);
    }
  }
}

/// The whole of a dispatch as its kernels run it; `waits`: as the one that waits for the exchange itself, else as the
/// one behind the stream's wait. All blocks of the part, whole blocks.
__device__ __forceinline__ void run_ll_dispatch(const PartParams& p, bool waits, void* route_memory) {
  if (waits) {
    send_tokens(p, route_memory);
  } else if (!was_left(p, SignalStep::kMoved)) {
    drain_chain(p, false);
    return;
  }
  if (waits || block_was_left(p, SignalStep::kMoved)) {
    const Arrival arrival = wait_for_all(p, SignalStep::kMoved, waits);
    if (arrival == Arrival::kLate) {
      leave_block(p, SignalStep::kMoved);
      return;
    }
    Ending ending = arrival == Arrival::kCame ? Ending::kGood : Ending::kAborted;
    const bool plans = arrival == Arrival::kCame && blockIdx.x == 0;
    if (plans && !plan_low_latency(p)) {
      ending = Ending::kFailed;
    }
    if (arrival == Arrival::kCame && blockIdx.x != 0) {
      expand_rows(p, warps_behind(p, 1));
    }
    end_block(p, ending);
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
