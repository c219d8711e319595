// SPDX-License-Identifier: Apache-2.0
// What the kernels of combine share: the rows of a token in the order of addition, and adding them. Device code only,
// included by the combine kernels' .cu files; no state.
#pragma once

#include "daemon/kernels/cuda/device_common.cuh"

namespace expertd::kernels::cuda {

/// One row to add.
struct Source {
  const uint4* x;
  uint64_t row;
  float weight;  // LL
  uint32_t rank;
  uint32_t lane;       // of the top-k, for rows per expert
  uint32_t ends_rank;  // the last row of its rank: the rank's partial sum is rounded and added behind it
};

struct PullShared {
  Source sources[base::kMaxTopK];
  uint32_t count;
  uint32_t local_rows;  // of all tokens of the block, for the report
  uint32_t remote_rows;
};

/// A row that the token has at `rank`, from the handle; false for none. Rows behind the peer's input are skipped.
/// Behind the relay the row lies at `packed`.
__device__ inline bool make_source(const PartParams& p, uint32_t rank, int32_t row, int32_t packed, Source* source) {
  const OpShape& shape = p.op.shape;
  const PeerView& peer = p.peers.views[rank];
  source->rank = rank;
  if (relayed(p, rank)) {
    source->row = static_cast<uint64_t>(packed);
    source->x = reinterpret_cast<const uint4*>(p.relay.peers[rank].base + source->row * shape.hidden * 2);
    return static_cast<uint64_t>(row) < peer.in_rows && packed >= 0 && source->row < p.relay.layout.rows;
  }
  source->row = static_cast<uint64_t>(row);
  source->x = reinterpret_cast<const uint4*>(static_cast<const char*>(peer.in_x) +
                                             static_cast<uint64_t>(row) * shape.hidden * 2);
  return peer.in_x != nullptr && static_cast<uint64_t>(row) < peer.in_rows;
}

/// LL and expanded rows: lane `lane` of the top-k.
__device__ inline bool expert_source(const PartParams& p, uint32_t token, uint32_t lane, Source* source) {
  const OpShape& shape = p.op.shape;
  if (lane >= p.table_top_k || lane >= shape.top_k) {
    return false;
  }
  const uint64_t at = uint64_t{token} * p.table_top_k + lane;
  const int32_t expert = p.op.routing.topk[at];
  const int32_t row = p.op.routing.token_expert[at];
  if (expert < 0 || expert >= static_cast<int32_t>(shape.experts) || row < 0) {
    return false;
  }
  const uint32_t owner = static_cast<uint32_t>(expert) / shape.local_experts;
  source->lane = lane;
  if (!rank_active(shape, owner)) {
    return false;
  }
  // Behind the relay the rows of an owner lie packed, without the gaps behind its experts.
  const bool behind = relayed(p, owner);
  if (shape.kind != OpKind::kLlCombine) {
    const int32_t shift = behind ? p.scratch.plan->packed_start[expert] - p.scratch.plan->aligned_start[expert] : 0;
    return make_source(p, owner, row, row + shift, source);
  }
  if (p.op.in.topk_idx != nullptr && lane_expert(p, token, lane) < 0) {
    return false;
  }
  const uint32_t local = static_cast<uint32_t>(expert) % shape.local_experts;
  source->weight = p.op.in.topk_weights != nullptr ? p.op.in.topk_weights[uint64_t{token} * shape.top_k + lane] : 1.0f;
  const int32_t packed = behind ? p.scratch.plan->packed_start[expert] + row : 0;
  return static_cast<uint32_t>(row) < shape.slots_per_expert &&
         make_source(p, owner, static_cast<int32_t>(local * shape.slots_per_expert) + row, packed, source);
}

/// The last top-k lane of the token that a rank owns, -1 for none: the order of ranks under order_last_lane. All lanes
/// of the warp take part; `expert` is that of the own lane.
__device__ inline int32_t last_lane_of(const PartParams& p, int32_t expert, uint32_t rank) {
  int32_t last = -1;
  for (int32_t lane = 0; lane < 32; ++lane) {
    const int32_t other = __shfl_sync(kFullWarp, expert, lane);
    if (other >= 0 && static_cast<uint32_t>(other) / p.op.shape.local_experts == rank) {
      last = lane;
    }
  }
  return last;
}

/// Puts the lanes' rows in the order of addition and counts them; one whole warp. The position of a row is the number
/// of rows with a smaller key, and keys are distinct: (order of the rank, rank, lane).
__device__ inline void order_sources(Source source, bool wanted, int32_t order, PullShared* s) {
  const uint32_t lane = threadIdx.x & 31;
  // order <= 32, rank < 16, lane < 32.
  const uint32_t key = (static_cast<uint32_t>(order) * 32 + source.rank) * 32 + lane;
  const uint32_t ballot = __ballot_sync(kFullWarp, wanted);
  uint32_t position = 0;
  uint32_t ends_rank = 1;
  for (int32_t other = 0; other < 32; ++other) {
    const uint32_t other_key = __shfl_sync(kFullWarp, key, other);
    const bool other_wanted = ((ballot >> other) & 1u) != 0;
    position += other_wanted && other_key < key ? 1 : 0;
    ends_rank = other_wanted && other_key > key && other_key / 32 == key / 32 ? 0 : ends_rank;
  }
  if (wanted) {
    source.ends_rank = ends_rank;
    s->sources[position] = source;
  }
  if (lane == 0) {
    s->count = __popc(ballot);
  }
}

/// Fills `s` for one token: warp 0 only. One lane per rank or per top-k lane.
__device__ inline void collect_sources(const PartParams& p, uint32_t token, PullShared* s) {
  const OpShape& shape = p.op.shape;
  const uint32_t lane = threadIdx.x;
  const bool experts = per_expert_rows(shape);
  Source source{};
  bool wanted = false;
  if (experts) {
    wanted = expert_source(p, token, lane, &source);
  } else if (lane < shape.ranks && rank_active(shape, lane)) {
    const int32_t row = p.op.routing.token_rank[uint64_t{token} * shape.ranks + lane];
    wanted = row >= 0 && make_source(p, lane, row, row, &source);
  }
  int32_t order = 0;
  if (shape.order_last_lane != 0) {
    const int32_t expert = lane < p.table_top_k ? p.op.routing.topk[uint64_t{token} * p.table_top_k + lane] : -1;
    order = last_lane_of(p, expert, wanted ? source.rank : 0) + 1;
  }
  order_sources(source, wanted, order, s);
  const uint32_t all = __popc(__ballot_sync(kFullWarp, wanted));
  const uint32_t own = __popc(__ballot_sync(kFullWarp, wanted && source.rank == shape.rank));
  if (lane == 0) {
    s->local_rows += own;
    s->remote_rows += all - own;
  }
}

/// Adds one piece of a row, weighted in LL, to its rank's partial sum, which is rounded and added behind the last row
/// of the rank.
__device__ inline void add_piece(const Source& source, const uint4& v, bool weighted, float* partial, float* sum) {
  const Bf16x8 values = to_bf16x8(v);
#pragma unroll
  for (uint32_t c = 0; c < 8; ++c) {
    const float value = element(values, c);
    partial[c] = __fadd_rn(partial[c], weighted ? __fmul_rn(source.weight, value) : value);
  }
  if (source.ends_rank != 0) {
#pragma unroll
    for (uint32_t c = 0; c < 8; ++c) {
      sum[c] = __fadd_rn(sum[c], bf16_to_float(float_to_bf16(partial[c])));
      partial[c] = 0.0f;
    }
  }
}

/// Adds four rows at a time so that four loads are in flight; the order of additions is that of the sources.
__device__ inline void sum_piece(const PullShared& s, uint32_t piece, bool weighted, float* sum) {
  float partial[8] = {};
  for (uint32_t first = 0; first < s.count; first += 4) {
    uint4 v[4];
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      v[i] = first + i < s.count ? s.sources[first + i].x[piece] : uint4{};
    }
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      if (first + i >= s.count) {
        break;
      }
      add_piece(s.sources[first + i], v[i], weighted, partial, sum);
    }
  }
}

__device__ inline void add_bias(const void* bias, uint64_t piece, bool first, float* sum) {
  const Bf16x8 values = to_bf16x8(static_cast<const uint4*>(bias)[piece]);
#pragma unroll
  for (uint32_t c = 0; c < 8; ++c) {
    sum[c] = first ? element(values, c) : __fadd_rn(sum[c], element(values, c));
  }
}

__device__ inline void start_sum(const PartParams& p, uint64_t piece, float* sum) {
  if (p.op.in.bias0 != nullptr) {
    add_bias(p.op.in.bias0, piece, true, sum);
  }
  if (p.op.in.bias1 != nullptr) {
    add_bias(p.op.in.bias1, piece, false, sum);
  }
}

__device__ inline uint4 rounded(const float* sum) {
  return {pack_bf16x2(sum[0], sum[1]), pack_bf16x2(sum[2], sum[3]), pack_bf16x2(sum[4], sum[5]),
          pack_bf16x2(sum[6], sum[7])};
}

/// The weights that a rank gave beside its rows, null for none.
__device__ inline const float* peer_weights(const PartParams& p, uint32_t rank) {
  if (!relayed(p, rank)) {
    return p.peers.views[rank].in_topk_weights;
  }
  const RelayPeer& peer = p.relay.peers[rank];
  return peer.has_weights == 0 ? nullptr : reinterpret_cast<const float*>(peer.base + p.relay.layout.weights);
}

/// The weight that comes back for a lane of the top-k, summed like the rows.
__device__ inline float pulled_weight(const PartParams& p, uint32_t lane, const PullShared& s) {
  const OpShape& shape = p.op.shape;
  float sum = 0.0f;
  for (uint32_t i = 0; i < s.count; ++i) {
    const Source& source = s.sources[i];
    const float* weights = peer_weights(p, source.rank);
    if (weights == nullptr) {
      continue;
    }
    if (shape.expanded == 0) {
      sum = __fadd_rn(sum, weights[source.row * shape.top_k + lane]);
    } else if (source.lane == lane) {
      sum = weights[source.row];
    }
  }
  return sum;
}

/// Whether a thread is one of those that write the weights of a token, one per lane of the top-k.
__device__ inline bool writes_weight(const PartParams& p, uint32_t lane) {
  const OpShape& shape = p.op.shape;
  return p.op.out.topk_weights != nullptr && shape.kind != OpKind::kLlCombine && lane < shape.top_k;
}

/// Weights come back summed like the rows; one thread per lane.
__device__ inline void pull_weights(const PartParams& p, uint32_t token, uint32_t lane, const PullShared& s) {
  if (writes_weight(p, lane)) {
    p.op.out.topk_weights[uint64_t{token} * p.op.shape.top_k + lane] = pulled_weight(p, lane, s);
  }
}

}  // namespace expertd::kernels::cuda
