// SPDX-License-Identifier: Apache-2.0
// The move step of dispatch and ll_dispatch: pushes this rank's rows to their final places in the outputs of every
// destination that its GPU reaches, its own included, and moves the rows that the others published in the relay.
// Definitions: daemon/kernels/README.md.
#include "daemon/kernels/cuda/device_common.cuh"
#include "daemon/kernels/cuda/launch.h"

namespace expertd::kernels::cuda {
namespace {

constexpr uint32_t kMoveThreads = 256;
constexpr uint32_t kBlocksPerMultiprocessor = 4;
constexpr uint32_t kChannelsPerLane = 16;  // fp8: one 16-byte store per lane, eight lanes per scale

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
};

__device__ TokenSource own_token(const PartParams& p, uint32_t token) {
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
  return source;
}

__device__ TokenSource relayed_token(const PartParams& p, uint32_t rank, uint32_t token) {
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
  return source;
}

/// The target of lane `lane` when every rank gets the token once; false for none.
__device__ bool rank_target(const PartParams& p, uint32_t token, uint32_t lane, Target* target) {
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
__device__ bool expert_target(const PartParams& p, uint32_t token, uint32_t lane, Target* target) {
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

/// Fills `s` for one token: warp 0 only, targets packed in lane order.
__device__ void collect_targets(const PartParams& p, uint32_t token, MoveShared* s) {
  const uint32_t lane = threadIdx.x;
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

/// Copies one row to all targets: each 16-byte piece is read once, four independent reads per thread in flight.
__device__ void push_bytes(const PartParams& p, const TokenSource& source, const MoveShared& s) {
  const OpShape& shape = p.op.shape;
  const uint32_t pieces = shape.row_bytes / 16;
  const auto* in = reinterpret_cast<const uint4*>(source.x);
  for (uint32_t first = threadIdx.x; first < pieces; first += 4 * kMoveThreads) {
    uint4 v[4];
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      v[i] = first + i * kMoveThreads < pieces ? in[first + i * kMoveThreads] : uint4{};
    }
    for (uint32_t t = 0; t < s.count; ++t) {
      const Target& target = s.targets[t];
      auto* out = reinterpret_cast<uint4*>(static_cast<char*>(p.peers.views[target.rank].out_x) +
                                           target.row * shape.out_row_bytes);
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) {
        if (first + i * kMoveThreads < pieces) {
          out[first + i * kMoveThreads] = v[i];
        }
      }
    }
  }
}

/// Stores the scales of the four groups of one warp step. Eight lanes share a scale; `scale` is the lane's group's.
__device__ void push_scales(const PartParams& p, const MoveShared& s, uint32_t channel, float scale) {
  const OpShape& shape = p.op.shape;
  const uint32_t lane = threadIdx.x & 31;
  const uint32_t group = channel / kScaleGroup;
  const uint32_t groups = shape.hidden / kScaleGroup;
  const uint64_t slots = shape.slots_per_expert;
  const uint32_t exponent = scale_to_ue8m0(scale);
  uint32_t word = 0;
  for (uint32_t i = 0; i < 4; ++i) {
    word |= __shfl_sync(kFullWarp, exponent, static_cast<int>(i * 8)) << (8 * i);
  }
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

/// Quantises one bf16 row once and stores payload and scales to all targets: a warp takes 512 channels per step.
__device__ void push_fp8(const PartParams& p, const TokenSource& token, const MoveShared& s) {
  const OpShape& shape = p.op.shape;
  const uint32_t lane = threadIdx.x & 31;
  for (uint32_t base_channel = threadIdx.x / 32 * 512; base_channel < shape.hidden;
       base_channel += kMoveThreads / 32 * 512) {
    const uint32_t channel = base_channel + lane * kChannelsPerLane;
    const bool valid = channel < shape.hidden;
    const auto* source = reinterpret_cast<const uint4*>(token.x + uint64_t{channel} * 2);
    const Bf16x8 halves[2] = {to_bf16x8(valid ? source[0] : uint4{}), to_bf16x8(valid ? source[1] : uint4{})};
    float amax = 0.0f;
#pragma unroll
    for (uint32_t i = 0; i < kChannelsPerLane; ++i) {
      amax = fmaxf(amax, fabsf(element(halves[i / 8], i % 8)));
    }
#pragma unroll
    for (int step = 1; step < 8; step *= 2) {
      amax = fmaxf(amax, __shfl_xor_sync(kFullWarp, amax, step));
    }
    const float scale = fp8_scale(amax, shape.scale);
    uint32_t words[4] = {};
#pragma unroll
    for (uint32_t i = 0; i < kChannelsPerLane; ++i) {
      const uint32_t code = float_to_e4m3(divide_exact(element(halves[i / 8], i % 8), scale));
      words[i / 4] |= code << (8 * (i % 4));
    }
    for (uint32_t t = 0; valid && t < s.count; ++t) {
      const Target& target = s.targets[t];
      char* row = static_cast<char*>(p.peers.views[target.rank].out_x) + target.row * shape.out_row_bytes;
      *reinterpret_cast<uint4*>(row + channel) = uint4{words[0], words[1], words[2], words[3]};
    }
    push_scales(p, s, channel, scale);
  }
}

template <typename Element>
__device__ void push_side_elements(const PartParams& p, const TokenSource& source, const MoveShared& s) {
  for (uint32_t i = threadIdx.x; i < source.side_elements; i += kMoveThreads) {
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

__device__ void push_side(const PartParams& p, const TokenSource& source, const MoveShared& s) {
  if (source.side == nullptr || p.op.shape.payload == Payload::kFp8) {
    return;
  }
  switch (p.op.shape.side_element_bytes) {
    case 1:
      push_side_elements<uint8_t>(p, source, s);
      break;
    case 2:
      push_side_elements<uint16_t>(p, source, s);
      break;
    case 4:
      push_side_elements<uint32_t>(p, source, s);
      break;
    default:
      break;
  }
}

/// Indices, weights and the source token of each row; one thread per (target, lane), rows per expert one per target.
__device__ void push_meta(const PartParams& p, uint32_t token, const float* weights, const MoveShared& s) {
  const OpShape& shape = p.op.shape;
  const bool experts = per_expert_rows(shape);
  const uint32_t lanes = experts ? 1 : shape.top_k;
  for (uint32_t i = threadIdx.x; i < s.count; i += kMoveThreads) {
    const Target& target = s.targets[i];
    if (p.peers.views[target.rank].out_src_info != nullptr) {
      p.peers.views[target.rank].out_src_info[target.row] = static_cast<int32_t>(token);
    }
  }
  if (shape.kind == OpKind::kLlDispatch) {
    return;
  }
  for (uint32_t i = threadIdx.x; i < s.count * lanes; i += kMoveThreads) {
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
    if (peer.out_topk_weights != nullptr && weights != nullptr) {
      peer.out_topk_weights[at] = !local && shape.zero_foreign_weights != 0 ? 0.0f : weights[lane];
    }
  }
}

/// One token to all its targets; whole block, after the targets were collected.
__device__ void push_token(const PartParams& p, const TokenSource& source, uint32_t token, const MoveShared& s) {
  if (p.op.shape.payload == Payload::kFp8) {
    push_fp8(p, source, s);
  } else {
    push_bytes(p, source, s);
  }
  push_side(p, source, s);
  if (p.op.shape.cached == 0) {
    push_meta(p, token, source.weights, s);
  }
}

/// Rows of sources below `rank` in column `column` of the count matrix; 0 for a cached dispatch, whose numbers are
/// final.
__device__ int32_t rows_below(const PartParams& p, uint32_t rank, uint32_t column) {
  int32_t rows = 0;
  for (uint32_t s = 0; p.op.shape.cached == 0 && s < rank; ++s) {
    rows += p.op.counts[uint64_t{s} * matrix_row_ints(p.op.shape) + column];
  }
  return rows;
}

/// The targets at this rank of a token that `rank` published: warp 0 only. The numbers are checked like the own ones,
/// because the memory they lie in is the daemon's but their bounds are this rank's.
__device__ void collect_relayed(const PartParams& p, uint32_t rank, uint32_t token, MoveShared* s) {
  const OpShape& shape = p.op.shape;
  const RelayPeer& peer = p.relay.peers[rank];
  const RelayLayout& layout = p.relay.layout;
  const uint32_t lane = threadIdx.x;
  const auto* topk = reinterpret_cast<const int32_t*>(peer.base + layout.topk) + uint64_t{token} * p.table_top_k;
  const int32_t expert = lane < p.table_top_k ? topk[lane] : -1;
  s->experts[lane] = expert;
  Target target{};
  bool wanted = false;
  if (!per_expert_rows(shape)) {
    const auto* rows = reinterpret_cast<const int32_t*>(peer.base + layout.token_rank) + uint64_t{token} * shape.ranks;
    const int32_t row = lane == 0 ? rows[shape.rank] : -1;
    wanted = row >= 0;
    target = {static_cast<uint64_t>(row) + (wanted ? rows_below(p, rank, shape.rank) : 0), shape.rank, 0, 0, 0};
    wanted = wanted && target.row < p.peers.views[shape.rank].capacity_rows;
  } else if (expert >= 0 && static_cast<uint32_t>(expert) / shape.local_experts == shape.rank) {
    const auto* rows =
        reinterpret_cast<const int32_t*>(peer.base + layout.token_expert) + uint64_t{token} * p.table_top_k;
    const uint32_t local = static_cast<uint32_t>(expert) % shape.local_experts;
    const bool low_latency = shape.kind == OpKind::kLlDispatch;
    const int32_t start = shape.cached == 0 && !low_latency ? p.scratch.plan->local_start[local] : 0;
    const int32_t relative = rows[lane];
    const auto row =
        static_cast<uint32_t>(start + relative + rows_below(p, rank, shape.ranks + static_cast<uint32_t>(expert)));
    target = {low_latency ? uint64_t{local} * shape.slots_per_expert + row : uint64_t{row}, shape.rank, lane, local,
              row};
    wanted = relative >= 0 && row < (low_latency ? shape.slots_per_expert : p.peers.views[shape.rank].capacity_rows);
  }
  wanted = wanted && p.peers.views[shape.rank].out_x != nullptr;
  const uint32_t ballot = __ballot_sync(kFullWarp, wanted);
  if (wanted) {
    s->targets[__popc(ballot & lanes_below())] = target;
  }
  if (lane == 0) {
    s->count = __popc(ballot);
  }
}

// relay_move. Grid as dispatch_move, the published tokens of every rank behind the relay strided over blocks: reads
// each token that has a row here once over PCIe and stores it to its rows of this rank's outputs. Runs after the routed
// flags of the publishers and before this rank's moved flag, which lets them publish again. Reads no flag. Bound: PCIe.
__global__ __launch_bounds__(kMoveThreads) void relay_move(const __grid_constant__ PartParams p) {
  __shared__ MoveShared s;
  if (block_is_gated(p) || p.scratch.plan->reason != 0) {
    return;
  }
  for (uint32_t rank = 0; rank < p.op.shape.ranks; ++rank) {
    for (uint32_t token = blockIdx.x; relayed(p, rank) && token < p.relay.peers[rank].tokens; token += gridDim.x) {
      if (threadIdx.x < 32) {
        collect_relayed(p, rank, token, &s);
      }
      __syncthreads();
      if (s.count != 0) {
        push_token(p, relayed_token(p, rank, token), token, s);
      }
      __syncthreads();
    }
  }
  fence_sys();
}

// dispatch_move. Grid: blocks of 256 threads, at most 4 per multiprocessor, tokens strided over blocks. Warp 0 collects
// the token's targets (one lane per rank or top-k lane), turns relative rows into final ones and stores them in the
// handle; then all warps read the row once (16 bytes per access) and store it to every target, then side, indices,
// weights and source token. Reads the plan, no flag; does nothing when the plan carries a Reason. Every thread fences
// at system scope at the end; signal(moved) follows in the stream. Bytes per token: row read + (row + side) per target.
// Bound: the link (one copy per destination rank), HBM for local rows.
__global__ __launch_bounds__(kMoveThreads) void dispatch_move(const __grid_constant__ PartParams p) {
  __shared__ MoveShared s;
  if (block_is_gated(p) || p.op.in.x == nullptr || p.scratch.plan->reason != 0) {
    return;
  }
  for (uint32_t token = blockIdx.x; token < p.op.shape.tokens; token += gridDim.x) {
    if (threadIdx.x < 32) {
      collect_targets(p, token, &s);
    }
    __syncthreads();
    push_token(p, own_token(p, token), token, s);
    __syncthreads();
  }
  fence_sys();
}

}  // namespace

cudaError_t launch_relay_move(const PartParams& params, cudaStream_t stream) {
  relay_move<<<params.multiprocessors * kBlocksPerMultiprocessor, kMoveThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t launch_dispatch_move(const PartParams& params, cudaStream_t stream) {
  const uint32_t most = params.multiprocessors * kBlocksPerMultiprocessor;
  const uint32_t tokens = params.op.shape.tokens == 0 ? 1 : params.op.shape.tokens;
  const uint32_t blocks = tokens > most ? most : tokens;
  dispatch_move<<<blocks, kMoveThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace expertd::kernels::cuda
