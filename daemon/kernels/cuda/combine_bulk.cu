// SPDX-License-Identifier: Apache-2.0
// The move step of HT combine by bulk copies, on sm_90. Definitions: daemon/kernels/README.md.
#include <algorithm>

#include "daemon/kernels/cuda/combine_rows.cuh"
#include "daemon/kernels/cuda/launch.h"

namespace expertd::kernels::cuda {
namespace {

constexpr uint32_t kSumThreads = 512;   // beside one warp that loads
constexpr uint32_t kMostSumPieces = 4;  // 16-byte pieces per thread: kMaxHidden * 2 / 16 / kSumThreads
static_assert(base::kMaxHidden / 8 <= kMostSumPieces * kSumThreads);

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

/// Fills `s` with the rows of one token that every rank gave once, in rank order: what collect_sources() does, without
/// its sorting. `row` is the lane's entry of token_rank. Whole warp.
__device__ void collect_plain(const PartParams& p, int32_t row, PullShared* s) {
  const uint32_t lane = threadIdx.x & 31;
  Source source{};
  const bool wanted = row >= 0 && make_source(p, lane, row, row, &source);
  const uint32_t ballot = __ballot_sync(kFullWarp, wanted);
  if (wanted) {
    source.ends_rank = 1;
    s->sources[__popc(ballot & lanes_below())] = source;
  }
  if (lane == 0) {
    s->count = __popc(ballot);
    s->local_rows = (ballot >> p.op.shape.rank) & 1u;
    s->remote_rows = s->count - s->local_rows;
  }
}

/// The entry of token_rank for the lane's rank, -1 where it gets nothing or takes no part.
__device__ int32_t rank_row(const PartParams& p, uint32_t token) {
  const OpShape& shape = p.op.shape;
  const uint32_t lane = threadIdx.x & 31;
  const bool reads = token < shape.tokens && lane < shape.ranks && rank_active(shape, lane);
  return reads ? p.op.routing.token_rank[uint64_t{token} * shape.ranks + lane] : -1;
}

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
  const bool plain = shape.expanded == 0 && shape.order_last_lane == 0;
  int32_t next_row = plain ? rank_row(p, blockIdx.x) : -1;
  for (uint32_t token = blockIdx.x; token < shape.tokens; token += gridDim.x) {
    const int32_t row = next_row;
    next_row = plain ? rank_row(p, token + gridDim.x) : -1;  // under way while this token's rows are loaded
    PullShared& s = pipeline->tokens[token_place.index];
    barrier_wait(&pipeline->token_free[token_place.index], token_place.parity ^ 1);
    if (plain) {
      collect_plain(p, row, &s);
    } else {
      if (lane == 0) {
        s.local_rows = 0;
        s.remote_rows = 0;
      }
      __syncwarp();
      collect_sources(p, token, &s);
    }
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
  const uint32_t blocks = std::clamp(shape.tokens, 1u, std::clamp(params.link_sms, 1u, params.multiprocessors));
  combine_pull_bulk<kPieces><<<blocks, kSumThreads + 32, bulk_rows(bytes) * bulk_row_stride(bytes), stream>>>(params);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_combine_bulk(const PartParams& params, cudaStream_t stream) {
  if (params.null_operation != 0) {
    const cudaError_t narrow = launch_bulk<2>(params, stream);
    return narrow != cudaSuccess ? narrow : launch_bulk<kMostSumPieces>(params, stream);
  }
  return params.op.shape.hidden / 8 <= 2 * kSumThreads ? launch_bulk<2>(params, stream)
                                                       : launch_bulk<kMostSumPieces>(params, stream);
}

}  // namespace expertd::kernels::cuda
