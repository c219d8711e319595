// SPDX-License-Identifier: Apache-2.0
// The route step of dispatch and ll_dispatch: numbers this rank's rows per destination in token order, without atomics
// whose order matters, and hands the count row to every active rank. Definitions: daemon/kernels/README.md.
#include "daemon/kernels/cuda/device_common.cuh"
#include "daemon/kernels/cuda/launch.h"
#include "proto/abi/expertd_reason.h"

namespace expertd::kernels::cuda {
namespace {

constexpr uint32_t kRouteThreads = 128;
constexpr uint32_t kScanThreads = 256;
constexpr uint32_t kNoError = 0xffffffffu;
static_assert(kRouteChunkTokens == 64, "two warps of one token per lane");

/// Active ranks that a token goes to, from the mask when there is one.
__device__ uint32_t token_ranks(const PartParams& p, uint32_t token) {
  const OpShape& shape = p.op.shape;
  uint32_t bits = 0;
  if (p.op.in.token_rank_mask != nullptr) {
    for (uint32_t j = 0; j < shape.ranks; ++j) {
      bits |= p.op.in.token_rank_mask[uint64_t{token} * shape.ranks + j] != 0 ? 1u << j : 0u;
    }
  } else {
    for (uint32_t k = 0; k < shape.top_k; ++k) {
      const int32_t expert = lane_expert(p, token, k);
      bits |= expert >= 0 ? 1u << (static_cast<uint32_t>(expert) / shape.local_experts) : 0u;
    }
  }
  return bits & static_cast<uint32_t>(active_bits(shape));
}

// route_count. Grid: one block of 128 threads per chunk of 64 tokens. All threads histogram the chunk's lanes by expert
// in shared memory, the first 64 add their token's rank bits. Reads the ids (K * 4 or 8 bytes per token) once; writes
// chunk_counts[chunk] and chunk_errors[chunk]. First kernel of the part: stamps its start. No flags. Bound: latency of
// one pass over the ids.
__global__ __launch_bounds__(kRouteThreads) void route_count(const __grid_constant__ PartParams p) {
  __shared__ int32_t counts[base::kMaxGpuRanks + base::kMaxExperts];
  __shared__ uint32_t error;
  if (block_is_gated(p)) {
    return;
  }
  tell_start(p);
  const OpShape& shape = p.op.shape;
  const uint32_t columns = count_columns(shape);
  for (uint32_t c = threadIdx.x; c < columns; c += kRouteThreads) {
    counts[c] = 0;
  }
  if (threadIdx.x == 0) {
    error = kNoError;
  }
  __syncthreads();
  const uint32_t first = blockIdx.x * kRouteChunkTokens;
  const uint32_t tokens = first < shape.tokens ? min(kRouteChunkTokens, shape.tokens - first) : 0;
  const uint32_t lanes = p.op.in.topk_idx != nullptr && p.refused_reason == 0 ? tokens * shape.top_k : 0;
  for (uint32_t i = threadIdx.x; i < lanes; i += kRouteThreads) {
    const uint32_t position = first * shape.top_k + i;  // at most 65536 * 32
    const int64_t id = load_id(p.op.in.topk_idx, shape.topk_idx_bytes, position);
    if (id < -1 || id >= static_cast<int64_t>(shape.experts)) {
      atomicMin(&error, position);
    } else if (id >= 0 && rank_active(shape, static_cast<uint32_t>(id) / shape.local_experts)) {
      atomicAdd(&counts[shape.ranks + static_cast<uint32_t>(id)], 1);
    }
  }
  if (threadIdx.x < tokens && p.refused_reason == 0) {
    for (uint32_t bits = token_ranks(p, first + threadIdx.x); bits != 0; bits &= bits - 1) {
      atomicAdd(&counts[__ffs(static_cast<int>(bits)) - 1], 1);
    }
  }
  __syncthreads();
  int32_t* out = p.scratch.chunk_counts + uint64_t{blockIdx.x} * columns;
  for (uint32_t c = threadIdx.x; c < columns; c += kRouteThreads) {
    out[c] = counts[c];
  }
  if (threadIdx.x == 0) {
    p.scratch.chunk_errors[blockIdx.x] = error;
  }
}

/// Writes one integer of this rank's count row into every active rank's copy of the matrix (the own one too). Ranks of
/// other nodes have none here.
__device__ void write_count(const PartParams& p, uint32_t column, int32_t value) {
  const OpShape& shape = p.op.shape;
  const uint64_t at = uint64_t{shape.rank} * matrix_row_ints(shape) + column;
  for (uint32_t j = 0; j < shape.ranks; ++j) {
    if (rank_active(shape, j) && p.peers.views[j].counts != nullptr) {
      p.peers.views[j].counts[at] = value;
    }
  }
}

/// The four error integers of this rank's row, from the first bad position of all chunks. Whole block, one block only.
__device__ void write_error_row(const PartParams& p, uint32_t chunks) {
  __shared__ uint32_t first_bad;
  const OpShape& shape = p.op.shape;
  if (threadIdx.x == 0) {
    first_bad = kNoError;
  }
  __syncthreads();
  for (uint32_t chunk = threadIdx.x; chunk < chunks; chunk += kScanThreads) {
    atomicMin(&first_bad, p.scratch.chunk_errors[chunk]);
  }
  __syncthreads();
  if (threadIdx.x < kCountRowErrorInts) {
    int64_t value = 0;
    uint32_t reason = p.refused_reason;
    if (reason == 0 && first_bad != kNoError) {
      reason = EXPERTD_REASON_EXPERT_OUT_OF_RANGE;
      value = load_id(p.op.in.topk_idx, shape.topk_idx_bytes, first_bad);
    }
    const auto bits = static_cast<uint64_t>(value);
    const uint32_t words[kCountRowErrorInts] = {reason, static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32),
                                                0};
    uint32_t word = 0;
    for (uint32_t i = 0; i < kCountRowErrorInts; ++i) {
      word = threadIdx.x == i ? words[i] : word;
    }
    write_count(p, count_columns(shape) + threadIdx.x, static_cast<int32_t>(word));
  }
}

// route_scan. Grid: one thread of 256 per column (R + E). Each thread turns its column of chunk_counts into the
// exclusive prefix over chunks and writes the total into row `rank` of every active rank's count matrix; block 0 adds
// the error integers and zeroes the rows of inactive ranks in the own copy. Sets no flag: signal follows in the stream.
// Every thread fences at system scope after its remote stores. Bytes: (R + E + 4) * 4 per active rank.
__global__ __launch_bounds__(kScanThreads) void route_scan(const __grid_constant__ PartParams p) {
  if (block_is_gated(p)) {
    return;
  }
  const OpShape& shape = p.op.shape;
  const uint32_t columns = count_columns(shape);
  const uint32_t chunks = shape.tokens == 0 ? 1 : (shape.tokens + kRouteChunkTokens - 1) / kRouteChunkTokens;
  const uint32_t column = blockIdx.x * kScanThreads + threadIdx.x;
  if (column < columns) {
    int32_t* counts = p.scratch.chunk_counts + column;
    int32_t running = 0;
    for (uint32_t chunk = 0; chunk < chunks; chunk += 8) {
      int32_t part[8];
#pragma unroll
      for (uint32_t i = 0; i < 8; ++i) {
        part[i] = chunk + i < chunks ? counts[uint64_t{chunk + i} * columns] : 0;
      }
#pragma unroll
      for (uint32_t i = 0; i < 8; ++i) {
        if (chunk + i < chunks) {
          counts[uint64_t{chunk + i} * columns] = running;
        }
        running += part[i];
      }
    }
    write_count(p, column, running);
  }
  if (blockIdx.x == 0) {
    write_error_row(p, chunks);
    const uint32_t row = matrix_row_ints(shape);
    for (uint32_t i = threadIdx.x; i < shape.ranks * row; i += kScanThreads) {
      if (!rank_active(shape, i / row)) {
        p.op.counts[i] = 0;
      }
    }
  }
  fence_sys();
}

/// token_rank of the chunk's tokens: warps 0 and 1, one token per lane, a ballot per rank. `below` is block-shared.
__device__ void number_ranks(const PartParams& p, uint32_t first, const int32_t* chunk_base, int32_t* below) {
  const OpShape& shape = p.op.shape;
  const uint32_t token = first + threadIdx.x;
  const bool valid = threadIdx.x < kRouteChunkTokens && token < shape.tokens;
  const uint32_t bits = valid ? token_ranks(p, token) : 0;
  const uint32_t warp = threadIdx.x / 32;
  for (uint32_t j = 0; j < shape.ranks; ++j) {
    const uint32_t ballot = __ballot_sync(kFullWarp, (bits >> j) & 1u);
    if (warp == 0 && threadIdx.x == 0) {
      below[j] = __popc(ballot);
    }
  }
  __syncthreads();
  for (uint32_t j = 0; j < shape.ranks; ++j) {
    const uint32_t ballot = __ballot_sync(kFullWarp, (bits >> j) & 1u);
    if (valid) {
      const int32_t row = chunk_base[j] + (warp == 1 ? below[j] : 0) + __popc(ballot & lanes_below());
      p.op.routing.token_rank[uint64_t{token} * shape.ranks + j] = ((bits >> j) & 1u) != 0 ? row : -1;
    }
  }
}

/// token_expert and topk of the chunk's tokens by one warp, 32 (token, lane) positions at a time in order. `next` holds
/// the next row of every expert in shared memory.
__device__ void number_experts(const PartParams& p, uint32_t first, uint32_t tokens, int32_t* next) {
  const OpShape& shape = p.op.shape;
  const uint32_t lane = threadIdx.x & 31;
  const uint32_t stride = p.table_top_k;
  const uint32_t positions = tokens * stride;
  const bool numbered = per_expert_rows(shape);
  for (uint32_t start = 0; start < positions; start += 32) {
    const uint32_t i = start + lane;
    const uint32_t token = first + i / stride;
    const int32_t expert = i < positions ? lane_expert(p, token, i % stride) : -1;
    const bool counted = expert >= 0 && rank_active(shape, static_cast<uint32_t>(expert) / shape.local_experts);
    const uint32_t key = counted ? static_cast<uint32_t>(expert) : 0x80000000u | lane;  // unique where not counted
    const uint32_t same = __match_any_sync(kFullWarp, key);
    const int32_t row = counted ? next[expert] + __popc(same & lanes_below()) : -1;
    __syncwarp();
    if (counted && (same & lanes_below()) == 0) {
      next[expert] += __popc(same);
    }
    __syncwarp();
    if (i < positions) {
      const uint64_t at = uint64_t{first} * stride + i;
      p.op.routing.topk[at] = expert;
      p.op.routing.token_expert[at] = numbered ? row : -1;
    }
  }
}

// route_number. Grid: one block of 128 threads per chunk of 64 tokens. Warps 0-1 number the rank rows with ballots,
// warp 2 the expert rows with match, each from the chunk's prefix; warp 3 only loads. Reads the ids again and one row
// of chunk_counts; writes the handle's tables (R + 2K integers per token). After the signal, so it hides in the
// exchange.
__global__ __launch_bounds__(kRouteThreads) void route_number(const __grid_constant__ PartParams p) {
  __shared__ int32_t bases[base::kMaxGpuRanks + base::kMaxExperts];
  __shared__ int32_t below[base::kMaxGpuRanks];
  if (block_is_gated(p) || p.refused_reason != 0) {
    return;
  }
  const OpShape& shape = p.op.shape;
  const uint32_t columns = count_columns(shape);
  const uint32_t first = blockIdx.x * kRouteChunkTokens;
  const uint32_t tokens = first < shape.tokens ? min(kRouteChunkTokens, shape.tokens - first) : 0;
  for (uint32_t c = threadIdx.x; c < columns; c += kRouteThreads) {
    bases[c] = p.scratch.chunk_counts[uint64_t{blockIdx.x} * columns + c];
  }
  __syncthreads();
  number_ranks(p, first, bases, below);
  if (threadIdx.x / 32 == 2) {
    number_experts(p, first, tokens, bases + shape.ranks);
  }
}

}  // namespace

cudaError_t launch_route_count(const PartParams& params, cudaStream_t stream) {
  route_count<<<route_chunks(params.op.shape.tokens), kRouteThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t launch_route_scan(const PartParams& params, cudaStream_t stream) {
  const uint32_t columns = params.op.shape.ranks + params.op.shape.experts;
  route_scan<<<columns == 0 ? 1 : (columns + kScanThreads - 1) / kScanThreads, kScanThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t launch_route_number(const PartParams& params, cudaStream_t stream) {
  route_number<<<route_chunks(params.op.shape.tokens), kRouteThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace expertd::kernels::cuda
