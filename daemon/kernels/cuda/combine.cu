// SPDX-License-Identifier: Apache-2.0
// The move step of combine and ll_combine: pulls the rows that belong to this rank's tokens out of every rank's input
// and sums them in float32 in the order that the definitions name. Definitions: daemon/kernels/README.md.
#include <algorithm>

#include "daemon/kernels/cuda/device_common.cuh"
#include "daemon/kernels/cuda/launch.h"

namespace expertd::kernels::cuda {
namespace {

constexpr uint32_t kPullThreads = 256;
constexpr uint32_t kBlocksPerMultiprocessor = 4;
constexpr uint32_t kLinkBlocks = 32;    // of the bulk kernel where the link is the bound
constexpr uint32_t kSumThreads = 512;   // of the bulk kernel, beside one warp that loads
constexpr uint32_t kMostSumPieces = 4;  // 16-byte pieces per thread: kMaxHidden * 2 / 16 / kSumThreads

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
__device__ bool make_source(const PartParams& p, uint32_t rank, int32_t row, int32_t packed, Source* source) {
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
__device__ bool expert_source(const PartParams& p, uint32_t token, uint32_t lane, Source* source) {
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
__device__ int32_t last_lane_of(const PartParams& p, int32_t expert, uint32_t rank) {
  int32_t last = -1;
  for (int32_t lane = 0; lane < 32; ++lane) {
    const int32_t other = __shfl_sync(kFullWarp, expert, lane);
    if (other >= 0 && static_cast<uint32_t>(other) / p.op.shape.local_experts == rank) {
      last = lane;
    }
  }
  return last;
}

/// Fills `s` for one token: warp 0 only. One lane per rank or per top-k lane; the position of a row is the number of
/// rows with a smaller key, and keys are distinct: (order of the rank, rank, lane).
__device__ void collect_sources(const PartParams& p, uint32_t token, PullShared* s) {
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
  // LL adds lane by lane; everything else rank by rank. order <= 32, rank < 16, lane < 32.
  const bool by_lane = shape.kind == OpKind::kLlCombine;
  const uint32_t key = by_lane ? lane : (static_cast<uint32_t>(order) * 32 + source.rank) * 32 + lane;
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
  const uint32_t own = __popc(__ballot_sync(kFullWarp, wanted && source.rank == shape.rank));
  if (lane == 0) {
    s->count = __popc(ballot);
    s->local_rows += own;
    s->remote_rows += s->count - own;
  }
}

/// Adds one piece of a row: weighted rows to the sum, others to their rank's partial sum, which is rounded behind the
/// last row of the rank.
__device__ void add_piece(const Source& source, const uint4& v, bool weighted, float* partial, float* sum) {
  const Bf16x8 values = to_bf16x8(v);
#pragma unroll
  for (uint32_t c = 0; c < 8; ++c) {
    if (weighted) {
      sum[c] = __fadd_rn(sum[c], __fmul_rn(source.weight, element(values, c)));
    } else {
      partial[c] = __fadd_rn(partial[c], element(values, c));
    }
  }
  if (!weighted && source.ends_rank != 0) {
#pragma unroll
    for (uint32_t c = 0; c < 8; ++c) {
      sum[c] = __fadd_rn(sum[c], bf16_to_float(float_to_bf16(partial[c])));
      partial[c] = 0.0f;
    }
  }
}

/// Adds four rows at a time so that four loads are in flight; the order of additions is that of the sources.
__device__ void sum_piece(const PullShared& s, uint32_t piece, bool weighted, float* sum) {
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

__device__ void add_bias(const void* bias, uint64_t piece, bool first, float* sum) {
  const Bf16x8 values = to_bf16x8(static_cast<const uint4*>(bias)[piece]);
#pragma unroll
  for (uint32_t c = 0; c < 8; ++c) {
    sum[c] = first ? element(values, c) : __fadd_rn(sum[c], element(values, c));
  }
}

__device__ void start_sum(const PartParams& p, uint64_t piece, float* sum) {
  if (p.op.in.bias0 != nullptr) {
    add_bias(p.op.in.bias0, piece, true, sum);
  }
  if (p.op.in.bias1 != nullptr) {
    add_bias(p.op.in.bias1, piece, false, sum);
  }
}

__device__ uint4 rounded(const float* sum) {
  uint32_t words[4];
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    words[i] = static_cast<uint32_t>(float_to_bf16(sum[2 * i])) | static_cast<uint32_t>(float_to_bf16(sum[2 * i + 1]))
                                                                      << 16;
  }
  return {words[0], words[1], words[2], words[3]};
}

/// The weights that a rank gave beside its rows, null for none.
__device__ const float* peer_weights(const PartParams& p, uint32_t rank) {
  if (!relayed(p, rank)) {
    return p.peers.views[rank].in_topk_weights;
  }
  const RelayPeer& peer = p.relay.peers[rank];
  return peer.has_weights == 0 ? nullptr : reinterpret_cast<const float*>(peer.base + p.relay.layout.weights);
}

/// Weights come back summed like the rows; one thread per lane.
__device__ void pull_weights(const PartParams& p, uint32_t token, uint32_t lane, const PullShared& s) {
  const OpShape& shape = p.op.shape;
  if (p.op.out.topk_weights == nullptr || shape.kind == OpKind::kLlCombine || lane >= shape.top_k) {
    return;
  }
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
  p.op.out.topk_weights[uint64_t{token} * shape.top_k + lane] = sum;
}

// combine_pull. Grid: blocks of 256 threads, at most 4 per multiprocessor, tokens strided over blocks. Warp 0 collects
// the token's rows (one lane per rank or top-k lane) in the order of addition; then every thread takes 16-byte pieces:
// loads from all rows, sums in float32, one rounding, one store. Reads the handle's tables and the peers' inputs (after
// their routed flags), no flag itself; writes only this rank's outputs. Bytes per token: H * 2 per row pulled + H * 2.
// Bound: the link, pulled once per remote row.
__global__ __launch_bounds__(kPullThreads) void combine_pull(const __grid_constant__ PartParams p) {
  __shared__ PullShared s;
  if (block_is_gated(p)) {
    return;
  }
  const OpShape& shape = p.op.shape;
  if (threadIdx.x == 0) {
    s.local_rows = 0;
    s.remote_rows = 0;
  }
  __syncwarp();
  const bool weighted = shape.kind == OpKind::kLlCombine;
  const uint32_t pieces = shape.hidden / 8;
  for (uint32_t token = blockIdx.x; token < shape.tokens; token += gridDim.x) {
    if (threadIdx.x < 32) {
      collect_sources(p, token, &s);
    }
    __syncthreads();
    for (uint32_t piece = threadIdx.x; piece < pieces && p.op.out.x != nullptr; piece += kPullThreads) {
      const uint64_t at = uint64_t{token} * pieces + piece;
      float sum[8] = {};
      start_sum(p, at, sum);
      sum_piece(s, piece, weighted, sum);
      static_cast<uint4*>(p.op.out.x)[at] = rounded(sum);
    }
    pull_weights(p, token, threadIdx.x, s);
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    atomicAdd(&p.scratch.plan->pulled_local_rows, s.local_rows);
    atomicAdd(&p.scratch.plan->pulled_remote_rows, s.remote_rows);
  }
  fence_sys();
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

constexpr uint32_t kSumWarps = kSumThreads / 32;
constexpr uint32_t kTokensAhead = 4;  // tokens whose rows are being loaded or summed

/// What the loading warp and the summing warps of one block share. A barrier of the first kind is completed by the
/// loading warp (and the bytes it announced), one of the second by every summing warp.
struct PullPipeline {
  PullShared tokens[kTokensAhead];
  uint64_t token_there[kTokensAhead];
  uint64_t token_free[kTokensAhead];
  uint64_t row_there[kBulkRows];
  uint64_t row_free[kBulkRows];
};

/// A place in a ring of barriers and the parity of its next phase.
struct RingPlace {
  uint32_t size;
  uint32_t index = 0;
  uint32_t parity = 0;
  __device__ void next() {
    index += 1;
    if (index == size) {
      index = 0;
      parity ^= 1;
    }
  }
};

/// The loading warp: collects each token's rows and starts their loads as places become free. A fresh barrier counts as
/// one whose phase of parity 1 is over, so the first round does not wait.
__device__ void load_rows(const PartParams& p, PullPipeline* pipeline, char* rows, uint32_t places) {
  const OpShape& shape = p.op.shape;
  const uint32_t bytes = shape.hidden * 2;
  const uint32_t lane = threadIdx.x & 31;
  RingPlace token_place{kTokensAhead};
  RingPlace row_place{places};
  uint32_t local = 0;
  uint32_t remote = 0;
  for (uint32_t token = blockIdx.x; token < shape.tokens; token += gridDim.x) {
    PullShared& s = pipeline->tokens[token_place.index];
    barrier_wait(&pipeline->token_free[token_place.index], token_place.parity ^ 1);
    if (lane == 0) {
      s.local_rows = 0;
      s.remote_rows = 0;
    }
    __syncwarp();
    collect_sources(p, token, &s);
    __syncwarp();
    if (lane == 0) {
      local += s.local_rows;
      remote += s.remote_rows;
      barrier_arrive(&pipeline->token_there[token_place.index]);
    }
    const uint32_t count = s.count;
    for (uint32_t i = 0; i < count; ++i) {
      if (lane == 0) {
        barrier_wait(&pipeline->row_free[row_place.index], row_place.parity ^ 1);
        barrier_expect(&pipeline->row_there[row_place.index], bytes);
        bulk_load(rows + row_place.index * bulk_row_stride(bytes), s.sources[i].x, bytes,
                  &pipeline->row_there[row_place.index]);
      }
      row_place.next();
    }
    __syncwarp();
    token_place.next();
  }
  if (lane == 0) {
    atomicAdd(&p.scratch.plan->pulled_local_rows, local);
    atomicAdd(&p.scratch.plan->pulled_remote_rows, remote);
  }
}

/// The summing warps: every thread owns kPieces pieces of the token's row.
template <uint32_t kPieces>
__device__ void sum_rows(const PartParams& p, PullPipeline* pipeline, const char* rows, uint32_t places) {
  const OpShape& shape = p.op.shape;
  const uint32_t thread = threadIdx.x - 32;
  const uint32_t pieces = shape.hidden / 8;
  RingPlace token_place{kTokensAhead};
  RingPlace row_place{places};
  for (uint32_t token = blockIdx.x; token < shape.tokens; token += gridDim.x) {
    const PullShared& s = pipeline->tokens[token_place.index];
    float sum[kPieces][8] = {};
    float partial[kPieces][8] = {};
#pragma unroll
    for (uint32_t i = 0; i < kPieces; ++i) {
      if (thread + i * kSumThreads < pieces) {
        start_sum(p, uint64_t{token} * pieces + thread + i * kSumThreads, sum[i]);
      }
    }
    barrier_wait(&pipeline->token_there[token_place.index], token_place.parity);
    for (uint32_t row = 0; row < s.count; ++row) {
      barrier_wait(&pipeline->row_there[row_place.index], row_place.parity);
      const auto* in = reinterpret_cast<const uint4*>(rows + row_place.index * bulk_row_stride(shape.hidden * 2));
#pragma unroll
      for (uint32_t i = 0; i < kPieces; ++i) {
        if (thread + i * kSumThreads < pieces) {
          add_piece(s.sources[row], in[thread + i * kSumThreads], false, partial[i], sum[i]);
        }
      }
      __syncwarp();
      if ((thread & 31) == 0) {
        barrier_arrive(&pipeline->row_free[row_place.index]);
      }
      row_place.next();
    }
#pragma unroll
    for (uint32_t i = 0; i < kPieces; ++i) {
      if (thread + i * kSumThreads < pieces && p.op.out.x != nullptr) {
        static_cast<uint4*>(p.op.out.x)[uint64_t{token} * pieces + thread + i * kSumThreads] = rounded(sum[i]);
      }
    }
    pull_weights(p, token, thread, s);
    __syncwarp();
    if ((thread & 31) == 0) {
      barrier_arrive(&pipeline->token_free[token_place.index]);
    }
    token_place.next();
  }
}

#endif

// combine_pull_bulk. The same as combine_pull for HT rows, on sm_90. Grid: one block per multiprocessor, as many as
// fill the link (all of them for expanded rows). Warp 0 collects the tokens' rows ahead and lets the copy unit load
// them into as many places as shared memory has; 16 warps add them in the same order and store the sum. Waits only for
// the own block's copies and warps. Bytes and bound as combine_pull.
template <uint32_t kPieces>
__global__ __launch_bounds__(kSumThreads + 32, 1) void combine_pull_bulk(const __grid_constant__ PartParams p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char rows[];
  __shared__ PullPipeline pipeline;
  if (block_is_gated(p)) {
    return;
  }
  const uint32_t places = bulk_rows(p.op.shape.hidden * 2);
  if (threadIdx.x < kTokensAhead) {
    barrier_init(&pipeline.token_there[threadIdx.x], 1);
    barrier_init(&pipeline.token_free[threadIdx.x], kSumWarps);
  }
  if (threadIdx.x < places) {
    barrier_init(&pipeline.row_there[threadIdx.x], 1);
    barrier_init(&pipeline.row_free[threadIdx.x], kSumWarps);
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    load_rows(p, &pipeline, rows, places);
  } else {
    sum_rows<kPieces>(p, &pipeline, rows, places);
  }
  fence_sys();
#endif
}

template <uint32_t kPieces>
cudaError_t launch_bulk(const PartParams& params, cudaStream_t stream) {
  const OpShape& shape = params.op.shape;
  const uint32_t bytes = params.null_operation != 0 ? 16 : shape.hidden * 2;
  if (params.null_operation != 0) {
    const cudaError_t allowed =
        cudaFuncSetAttribute(combine_pull_bulk<kPieces>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBulkSharedBytes);
    if (allowed != cudaSuccess) {
      return allowed;
    }
  }
  const uint32_t most =
      params.link_sms != 0 ? params.link_sms : (shape.expanded != 0 ? params.multiprocessors : kLinkBlocks);
  const uint32_t blocks = std::clamp(shape.tokens, 1u, std::min(most, params.multiprocessors));
  combine_pull_bulk<kPieces><<<blocks, kSumThreads + 32, bulk_rows(bytes) * bulk_row_stride(bytes), stream>>>(params);
  return cudaGetLastError();
}

cudaError_t launch_bulk_for_width(const PartParams& params, cudaStream_t stream) {
  static_assert(base::kMaxHidden / 8 <= kMostSumPieces * kSumThreads);
  return params.op.shape.hidden / 8 <= 2 * kSumThreads ? launch_bulk<2>(params, stream)
                                                       : launch_bulk<kMostSumPieces>(params, stream);
}

/// Rows behind the relay lie in memory of the host, and LL has few rows per block.
bool pulls_in_bulk(const PartParams& params) {
  const OpShape& shape = params.op.shape;
  return params.bulk_copies != 0 && shape.kind == OpKind::kCombine && params.relay.ranks == 0 && shape.hidden != 0;
}

}  // namespace

cudaError_t launch_combine_pull(const PartParams& params, cudaStream_t stream) {
  if (params.null_operation != 0 && params.bulk_copies != 0) {
    if (const cudaError_t error = launch_bulk<2>(params, stream); error != cudaSuccess) {
      return error;
    }
    if (const cudaError_t error = launch_bulk<kMostSumPieces>(params, stream); error != cudaSuccess) {
      return error;
    }
  } else if (pulls_in_bulk(params)) {
    return launch_bulk_for_width(params, stream);
  }
  const uint32_t most = params.multiprocessors * kBlocksPerMultiprocessor;
  const uint32_t tokens = params.op.shape.tokens == 0 ? 1 : params.op.shape.tokens;
  const uint32_t blocks = tokens > most ? most : tokens;
  combine_pull<<<blocks, kPullThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace expertd::kernels::cuda
