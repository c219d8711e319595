// SPDX-License-Identifier: Apache-2.0
// What the move kernels of dispatch share: the targets of a token, and storing its row, side, indices, weights and
// source token to all of them. Device code only, included by the dispatch kernels' .cu files; no state.
#pragma once

#include "daemon/kernels/cuda/quantise.cuh"

namespace expertd::kernels::cuda {

inline constexpr uint32_t kMoveThreads = 256;

/// Where one copy of the token goes.
struct Target {
  uint64_t row;  // row of the owner's output tensors; LL: expert * N + slot_row
  uint32_t rank;
  uint32_t lane;      // of the top-k, for rows per expert
  uint32_t expert;    // local to the owner, for rows per expert
  uint32_t slot_row;  // LL: row inside the expert's slots
};

struct MoveShared {
  Target targets[base::kMaxTopK];
  int32_t experts[base::kMaxTopK];  // global expert of each lane, -1 for none
  uint32_t count;
};
static_assert(base::kMaxGpuRanks <= 32 && base::kMaxTopK <= 32, "one lane of a warp per target");

/// One token as it is read: the own inputs, or what another rank published.
struct TokenSource {
  const char* x = nullptr;
  const char* side = nullptr;  // null: none
  int64_t side_element_stride = 0;
  uint32_t side_elements = 0;
  const float* weights = nullptr;  // of its top-k lanes; null: none travel
  bool zero_foreign_weights = false;
};

__device__ inline TokenSource own_token(const PartParams& p, uint32_t token) {
  const OpShape& shape = p.op.shape;
  TokenSource source;
  source.x = static_cast<const char*>(p.op.in.x) + uint64_t{token} * shape.row_bytes;
  if (p.op.in.side != nullptr) {
    source.side = static_cast<const char*>(p.op.in.side) + static_cast<int64_t>(token) * shape.side_row_stride;
    source.side_element_stride = shape.side_element_stride;
    source.side_elements = shape.side_elements;
  }
  if (p.op.in.topk_weights != nullptr) {
    source.weights = p.op.in.topk_weights + uint64_t{token} * shape.top_k;
  }
  source.zero_foreign_weights = shape.zero_foreign_weights != 0;
  return source;
}

__device__ inline TokenSource relayed_token(const PartParams& p, uint32_t rank, uint32_t token) {
  const OpShape& shape = p.op.shape;
  const RelayPeer& peer = p.relay.peers[rank];
  TokenSource source;
  source.x = peer.base + uint64_t{token} * shape.row_bytes;
  if (peer.side_elements != 0) {
    source.side = peer.base + p.relay.layout.side + uint64_t{token} * peer.side_elements * shape.side_element_bytes;
    source.side_element_stride = shape.side_element_bytes;
    source.side_elements = peer.side_elements;
  }
  if (peer.has_weights != 0) {
    source.weights = reinterpret_cast<const float*>(peer.base + p.relay.layout.weights) + uint64_t{token} * shape.top_k;
  }
  source.zero_foreign_weights = shape.zero_foreign_weights != 0;
  return source;
}

/// The target of lane `lane` when every rank gets the token once; false for none.
__device__ inline bool rank_target(const PartParams& p, uint32_t token, uint32_t lane, Target* target) {
  const OpShape& shape = p.op.shape;
  if (lane >= shape.ranks || !rank_active(shape, lane)) {
    return false;
  }
  int32_t* entry = &p.op.routing.token_rank[uint64_t{token} * shape.ranks + lane];
  int32_t row = *entry;
  if (row >= 0 && shape.cached == 0) {
    row += p.scratch.plan->rank_base[lane];
    *entry = row;
  }
  *target = {static_cast<uint64_t>(row), lane, 0, 0, 0};
  return row >= 0 && static_cast<uint32_t>(row) < p.peers.views[lane].capacity_rows;
}

/// The target of top-k lane `lane` when every (token, expert) has a row; false for none.
__device__ inline bool expert_target(const PartParams& p, uint32_t token, uint32_t lane, Target* target) {
  const OpShape& shape = p.op.shape;
  if (lane >= p.table_top_k) {
    return false;
  }
  const uint64_t at = uint64_t{token} * p.table_top_k + lane;
  const int32_t expert = p.op.routing.topk[at];
  int32_t row = p.op.routing.token_expert[at];
  if (expert < 0 || expert >= static_cast<int32_t>(shape.experts) || row < 0) {
    return false;
  }
  if (shape.cached == 0) {
    row += p.scratch.plan->expert_base[expert];
    p.op.routing.token_expert[at] = row;
  }
  const uint32_t owner = static_cast<uint32_t>(expert) / shape.local_experts;
  const uint32_t local = static_cast<uint32_t>(expert) % shape.local_experts;
  const auto slot_row = static_cast<uint32_t>(row);
  const bool low_latency = shape.kind == OpKind::kLlDispatch;
  *target = {low_latency ? uint64_t{local} * shape.slots_per_expert + slot_row : uint64_t{slot_row}, owner, lane, local,
             slot_row};
  const uint32_t limit = low_latency ? shape.slots_per_expert : p.peers.views[owner].capacity_rows;
  return rank_active(shape, owner) && slot_row < limit;
}

/// Fills `s` for one token by one whole warp, targets packed in lane order.
__device__ inline void collect_targets(const PartParams& p, uint32_t token, MoveShared* s) {
  const uint32_t lane = threadIdx.x & 31;
  Target target{};
  bool wanted =
      per_expert_rows(p.op.shape) ? expert_target(p, token, lane, &target) : rank_target(p, token, lane, &target);
  wanted = wanted && p.peers.views[target.rank].out_x != nullptr;
  s->experts[lane] = lane < p.table_top_k ? p.op.routing.topk[uint64_t{token} * p.table_top_k + lane] : -1;
  const uint32_t ballot = __ballot_sync(kFullWarp, wanted);
  if (wanted) {
    s->targets[__popc(ballot & lanes_below())] = target;
  }
  if (lane == 0) {
    s->count = __popc(ballot);
  }
}

/// Copies one row to `count` places, the t-th of which starts at place(t): each 16-byte piece is read once, four
/// independent reads per thread in flight. Whole block of kMoveThreads.
template <typename Place>
__device__ void copy_row(const char* from, uint32_t row_bytes, uint32_t count, const Place& place) {
  const uint32_t pieces = row_bytes / 16;
  const auto* in = reinterpret_cast<const uint4*>(from);
  for (uint32_t first = threadIdx.x; first < pieces; first += 4 * kMoveThreads) {
    uint4 v[4];
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      v[i] = first + i * kMoveThreads < pieces ? in[first + i * kMoveThreads] : uint4{};
    }
    for (uint32_t t = 0; t < count; ++t) {
      auto* out = reinterpret_cast<uint4*>(place(t));
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) {
        if (first + i * kMoveThreads < pieces) {
          out[first + i * kMoveThreads] = v[i];
        }
      }
    }
  }
}

/// Quantises one row of bf16 once and stores its codes to `count` places: a warp takes 512 channels per step, and then
/// all of it calls put_scale(channel, scale) with each lane's first channel and the scale of that channel's group.
template <typename Place, typename PutScale>
__device__ void quantise_row(const OpShape& shape, const char* from, uint32_t count, const Place& place,
                             const PutScale& put_scale) {
  const uint32_t lane = threadIdx.x & 31;
  for (uint32_t base_channel = threadIdx.x / 32 * 512; base_channel < shape.hidden;
       base_channel += kMoveThreads / 32 * 512) {
    const uint32_t channel = base_channel + lane * kChannelsPerLane;
    const bool valid = channel < shape.hidden;
    const auto* source = reinterpret_cast<const uint4*>(from + uint64_t{channel} * 2);
    const QuantisedLane lane_codes =
        quantise_lane(valid ? source[0] : uint4{}, valid ? source[1] : uint4{}, shape.scale);
    for (uint32_t t = 0; valid && t < count; ++t) {
      *reinterpret_cast<uint4*>(place(t) + channel) = lane_codes.codes;
    }
    put_scale(channel, lane_codes.scale);
  }
}

/// The row of a target.
__device__ __forceinline__ char* target_row(const PartParams& p, const Target& target) {
  return static_cast<char*>(p.peers.views[target.rank].out_x) + target.row * p.op.shape.out_row_bytes;
}

/// Copies one row of `row_bytes` to all targets.
__device__ inline void push_bytes(const PartParams& p, const char* from, uint32_t row_bytes, const MoveShared& s) {
  copy_row(from, row_bytes, s.count, [&](uint32_t t) { return target_row(p, s.targets[t]); });
}

/// Stores the scales of the four groups of one warp step. Eight lanes share a scale; `scale` is the lane's group's.
__device__ inline void push_scales(const PartParams& p, const MoveShared& s, uint32_t channel, float scale) {
  const OpShape& shape = p.op.shape;
  const uint32_t lane = threadIdx.x & 31;
  const uint32_t group = channel / kScaleGroup;
  const uint32_t groups = shape.hidden / kScaleGroup;
  const uint64_t slots = shape.slots_per_expert;
  const uint32_t word = pack_ue8m0(scale);
  const bool packed = shape.scale == ScaleForm::kUe8m0;
  const bool writes = channel < shape.hidden && (packed ? lane == 0 : lane % 8 == 0);
  for (uint32_t t = 0; writes && t < s.count; ++t) {
    const Target& target = s.targets[t];
    void* out = p.peers.views[target.rank].out_side;
    if (out == nullptr) {
      continue;
    }
    if (packed) {
      const uint64_t column = uint64_t{target.expert} * (groups / 4) + group / 4;
      static_cast<uint32_t*>(out)[column * slots + target.slot_row] = word;
    } else {
      static_cast<float*>(out)[(uint64_t{target.expert} * groups + group) * slots + target.slot_row] = scale;
    }
  }
}

/// Quantises one bf16 row once and stores payload and scales to all targets.
__device__ inline void push_fp8(const PartParams& p, const TokenSource& token, const MoveShared& s) {
  quantise_row(
      p.op.shape, token.x, s.count, [&](uint32_t t) { return target_row(p, s.targets[t]); },
      [&](uint32_t channel, float scale) { push_scales(p, s, channel, scale); });
}

template <typename Element>
__device__ void push_side_elements(const PartParams& p, const TokenSource& source, const MoveShared& s, Crew crew) {
  for (uint32_t i = crew.first; i < source.side_elements; i += crew.step) {
    const Element value =
        *reinterpret_cast<const Element*>(source.side + static_cast<int64_t>(i) * source.side_element_stride);
    for (uint32_t t = 0; t < s.count; ++t) {
      const Target& target = s.targets[t];
      auto* out = static_cast<Element*>(p.peers.views[target.rank].out_side);
      if (out != nullptr) {
        out[target.row * source.side_elements + i] = value;
      }
    }
  }
}

__device__ inline void push_side(const PartParams& p, const TokenSource& source, const MoveShared& s, Crew crew) {
  if (source.side == nullptr || p.op.shape.payload == Payload::kFp8) {
    return;
  }
  switch (p.op.shape.side_element_bytes) {
    case 1:
      push_side_elements<uint8_t>(p, source, s, crew);
      break;
    case 2:
      push_side_elements<uint16_t>(p, source, s, crew);
      break;
    case 4:
      push_side_elements<uint32_t>(p, source, s, crew);
      break;
    default:
      break;
  }
}

/// Indices, weights and the source token of each row; one thread per (target, lane), rows per expert one per target.
__device__ inline void push_meta(const PartParams& p, const TokenSource& source, uint32_t token, const MoveShared& s,
                                 Crew crew) {
  const OpShape& shape = p.op.shape;
  const bool experts = per_expert_rows(shape);
  const uint32_t lanes = experts ? 1 : shape.top_k;
  for (uint32_t i = crew.first; i < s.count; i += crew.step) {
    const Target& target = s.targets[i];
    if (p.peers.views[target.rank].out_src_info != nullptr) {
      p.peers.views[target.rank].out_src_info[target.row] = static_cast<int32_t>(token);
    }
  }
  if (shape.kind == OpKind::kLlDispatch) {
    return;
  }
  for (uint32_t i = crew.first; i < s.count * lanes; i += crew.step) {
    const Target& target = s.targets[i / lanes];
    const PeerView& peer = p.peers.views[target.rank];
    const uint32_t lane = experts ? target.lane : i % lanes;
    const uint64_t at = experts ? target.row : target.row * shape.top_k + lane;
    const int32_t expert = s.experts[lane];
    const bool local = expert >= 0 && static_cast<uint32_t>(expert) / shape.local_experts == target.rank;
    if (peer.out_topk_idx != nullptr) {
      store_id(peer.out_topk_idx, shape.topk_idx_bytes, at,
               local ? expert - static_cast<int32_t>(target.rank * shape.local_experts) : -1);
    }
    if (peer.out_topk_weights != nullptr && source.weights != nullptr) {
      peer.out_topk_weights[at] = !local && source.zero_foreign_weights ? 0.0f : source.weights[lane];
    }
  }
}

/// One token to all its targets; whole block, after the targets were collected.
__device__ inline void push_token(const PartParams& p, const TokenSource& source, uint32_t token, const MoveShared& s) {
  if (p.op.shape.payload == Payload::kFp8) {
    push_fp8(p, source, s);
  } else {
    push_bytes(p, source.x, p.op.shape.row_bytes, s);
  }
  const Crew block{threadIdx.x, kMoveThreads};
  push_side(p, source, s, block);
  if (p.op.shape.cached == 0) {
    push_meta(p, source, token, s, block);
  }
}

}  // namespace expertd::kernels::cuda
