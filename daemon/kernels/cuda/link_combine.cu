// SPDX-License-Identifier: Apache-2.0
// The move step of HT combine on sm_90, by bulk copies, with both exchanges in the kernel. Definitions:
// daemon/kernels/README.md.
#include <algorithm>

#include "daemon/kernels/cuda/combine_rows.cuh"
#include "daemon/kernels/cuda/finish_part.cuh"
#include "daemon/kernels/cuda/launch_config.h"
#include "daemon/kernels/cuda/timeline.cuh"

namespace expertd::kernels::cuda {
namespace {

constexpr uint32_t kMostSumThreads = 512;  // beside one warp that loads
constexpr uint32_t kWidePieces = 4;        // 16-byte pieces per thread of the widest rows
static_assert(base::kMaxHidden / 8 <= kWidePieces * kMostSumThreads);

/// Threads that sum, in whole warps: each owns kPieces pieces of the row.
constexpr uint32_t sum_threads(uint32_t hidden, uint32_t pieces_each) {
  return (hidden / 8 + pieces_each * 32 - 1) / (pieces_each * 32) * 32;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

constexpr uint32_t kTokensAhead = 8;  // tokens whose rows are being loaded or summed
constexpr uint32_t kClaimTokens = 2;  // that a block takes at a time

/// What the summing warps are told of one token: which ranks' rows come, in this order. A token behind the last one
/// ends their work.
struct PulledToken {
  uint32_t token;
  uint32_t ranks;
  int32_t rows[base::kMaxGpuRanks];
};

/// What the loading warp and the summing warps of one block share. A barrier of the first kind is completed by the
/// loading warp (and the bytes it announced), one of the second by every summing warp.
struct PullPipeline {
  PulledToken tokens[kTokensAhead];
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
  /// By at most `size` steps.
  __device__ void advance(uint32_t steps) {
    index += steps;
    if (index >= size) {
      index -= size;
      parity ^= 1;
    }
  }
  __device__ void next() { advance(1); }
};

/// The row that a token has at the lane's rank; -1 where it has none that the rank gave.
__device__ int32_t row_at_rank(const PartParams& p, uint32_t token) {
  const OpShape& shape = p.op.shape;
  const uint32_t lane = threadIdx.x & 31;
  if (token >= shape.tokens || lane >= shape.ranks || !rank_active(shape, lane)) {
    return -1;
  }
  const int32_t row = p.op.routing.token_rank[uint64_t{token} * shape.ranks + lane];
  const PeerView& peer = p.peers.views[lane];
  return row >= 0 && peer.in_x != nullptr && static_cast<uint32_t>(row) < peer.in_rows ? row : -1;
}

/// Rows that the loading warp has started.
struct Loaded {
  uint32_t local = 0;
  uint32_t remote = 0;
};

/// The loads of one token: lane j starts that of rank j's row. `row_place` moves on by the token's rows, which go in
/// turns of as many as there are places, because a barrier tells only neighbouring phases apart.
__device__ void load_token(const PartParams& p, int32_t row, PullPipeline* pipeline, char* rows, RingPlace* row_place) {
  const uint32_t bytes = p.op.shape.hidden * 2;
  const uint32_t lane = threadIdx.x & 31;
  const uint32_t ranks = __ballot_sync(kFullWarp, row >= 0);
  const uint32_t count = __popc(ranks);
  const uint32_t position = __popc(ranks & lanes_below());
  for (uint32_t done = 0; done < count; done += row_place->size) {
    const uint32_t turn = min(count - done, row_place->size);
    if (row >= 0 && position >= done && position < done + turn) {
      RingPlace place = *row_place;
      place.advance(position - done);
      // A fresh barrier counts as one whose phase of parity 1 is over, so the first round does not wait.
      barrier_wait(&pipeline->row_free[place.index], place.parity ^ 1);
      barrier_expect(&pipeline->row_there[place.index], bytes);
      bulk_load(rows + place.index * bulk_row_stride(bytes),
                static_cast<const char*>(p.peers.views[lane].in_x) + static_cast<uint64_t>(row) * bytes, bytes,
                &pipeline->row_there[place.index]);
    }
    __syncwarp();
    row_place->advance(turn);
  }
}

/// Tells the summing warps of the next token and starts its loads.
__device__ void start_token(const PartParams& p, uint32_t token, int32_t row, PullPipeline* pipeline, char* rows,
                            RingPlace* token_place, RingPlace* row_place) {
  const uint32_t lane = threadIdx.x & 31;
  const uint32_t ranks = __ballot_sync(kFullWarp, row >= 0);
  barrier_wait(&pipeline->token_free[token_place->index], token_place->parity ^ 1);
  PulledToken& pulled = pipeline->tokens[token_place->index];
  if (lane < p.op.shape.ranks) {
    pulled.rows[lane] = row;
  }
  if (lane == 0) {
    pulled.token = token;
    pulled.ranks = ranks;
  }
  __syncwarp();
  if (lane == 0) {
    barrier_arrive(&pipeline->token_there[token_place->index]);
  }
  load_token(p, row, pipeline, rows, row_place);
  token_place->next();
}

/// The next tokens for this block, in order over all blocks: multiprocessors differ in how far they are from the links,
/// so that equal shares would end 12 us apart. The first two claims of every block are its own without asking. Whole
/// warp.
__device__ uint32_t claim_tokens(const PartParams& p) {
  uint32_t first = 0;
  if ((threadIdx.x & 31) == 0) {
    first = 2 * gridDim.x * kClaimTokens + atomicAdd(&p.words.state->claimed_tokens, kClaimTokens);
  }
  return first;
}

/// Row numbers of the tokens of one claim, at the lane's rank.
struct ClaimedRows {
  int32_t rows[kClaimTokens];
};

__device__ ClaimedRows read_claim(const PartParams& p, uint32_t first) {
  ClaimedRows claim;
#pragma unroll
  for (uint32_t i = 0; i < kClaimTokens; ++i) {
    claim.rows[i] = row_at_rank(p, first + i);
  }
  return claim;
}

/// The loading warp. Claims and row numbers are on their way while the tokens before are loaded; `ahead` are those of
/// the first claim.
__device__ Loaded load_rows(const PartParams& p, PullPipeline* pipeline, char* rows, uint32_t places,
                            ClaimedRows ahead) {
  const OpShape& shape = p.op.shape;
  RingPlace token_place{kTokensAhead};
  RingPlace row_place{places};
  Loaded loaded;
  uint32_t first = blockIdx.x * kClaimTokens;
  uint32_t claimed = (gridDim.x + blockIdx.x) * kClaimTokens;
  while (first < shape.tokens) {
    const uint32_t next = __shfl_sync(kFullWarp, claimed, 0);
    claimed = claim_tokens(p);
#pragma unroll
    for (uint32_t i = 0; i < kClaimTokens; ++i) {
      const int32_t row = ahead.rows[i];
      ahead.rows[i] = row_at_rank(p, next + i);
      if (first + i < shape.tokens) {
        start_token(p, first + i, row, pipeline, rows, &token_place, &row_place);
        const uint32_t ranks = __ballot_sync(kFullWarp, row >= 0);
        loaded.local += (ranks >> shape.rank) & 1u;
        loaded.remote += __popc(ranks & ~(1u << shape.rank));
      }
    }
    first = next;
  }
  start_token(p, shape.tokens, -1, pipeline, rows, &token_place, &row_place);
  return loaded;
}

/// Weights come back summed like the rows; one thread per lane of the top-k.
__device__ void sum_weights(const PartParams& p, uint32_t token, uint32_t k, const PulledToken& pulled) {
  const OpShape& shape = p.op.shape;
  if (p.op.out.topk_weights == nullptr || k >= shape.top_k) {
    return;
  }
  float sum = 0.0f;
  for (uint32_t ranks = pulled.ranks; ranks != 0; ranks &= ranks - 1) {
    const uint32_t rank = __ffs(static_cast<int>(ranks)) - 1;
    const float* weights = p.peers.views[rank].in_topk_weights;
    if (weights != nullptr) {
      sum = __fadd_rn(sum, weights[static_cast<uint64_t>(pulled.rows[rank]) * shape.top_k + k]);
    }
  }
  p.op.out.topk_weights[uint64_t{token} * shape.top_k + k] = sum;
}

/// Waits for the rows of one token and adds them in rank order; `row_place` moves on by the token's rows.
template <uint32_t kPieces>
__device__ void add_rows(const PartParams& p, uint32_t ranks, PullPipeline* pipeline, const char* rows,
                         RingPlace* row_place, float (*sum)[8]) {
  const uint32_t thread = threadIdx.x - 32;
  const uint32_t threads = blockDim.x - 32;
  const uint32_t pieces = p.op.shape.hidden / 8;
  for (uint32_t left = __popc(ranks); left != 0; --left) {
    barrier_wait(&pipeline->row_there[row_place->index], row_place->parity);
    const auto* in = reinterpret_cast<const uint4*>(rows + row_place->index * bulk_row_stride(p.op.shape.hidden * 2));
#pragma unroll
    for (uint32_t i = 0; i < kPieces; ++i) {
      if (thread + i * threads < pieces) {
        const Bf16x8 values = to_bf16x8(in[thread + i * threads]);
#pragma unroll
        for (uint32_t c = 0; c < 8; ++c) {
          sum[i][c] = __fadd_rn(sum[i][c], element(values, c));
        }
      }
    }
    __syncwarp();
    if ((thread & 31) == 0) {
      barrier_arrive(&pipeline->row_free[row_place->index]);
    }
    row_place->next();
  }
}

template <uint32_t kPieces>
__device__ void begin_sums(const PartParams& p, uint32_t token, float (*sum)[8]) {
  const uint32_t thread = threadIdx.x - 32;
  const uint32_t threads = blockDim.x - 32;
  const uint32_t pieces = p.op.shape.hidden / 8;
#pragma unroll
  for (uint32_t i = 0; i < kPieces; ++i) {
    if (thread + i * threads < pieces) {
      start_sum(p, uint64_t{token} * pieces + thread + i * threads, sum[i]);
    }
  }
}

template <uint32_t kPieces>
__device__ void store_sums(const PartParams& p, uint32_t token, const float (*sum)[8]) {
  const uint32_t thread = threadIdx.x - 32;
  const uint32_t threads = blockDim.x - 32;
  const uint32_t pieces = p.op.shape.hidden / 8;
#pragma unroll
  for (uint32_t i = 0; i < kPieces; ++i) {
    if (thread + i * threads < pieces && p.op.out.x != nullptr) {
      static_cast<uint4*>(p.op.out.x)[uint64_t{token} * pieces + thread + i * threads] = rounded(sum[i]);
    }
  }
}

/// The summing warps: every thread owns kPieces pieces of the token's row.
template <uint32_t kPieces>
__device__ void sum_rows(const PartParams& p, PullPipeline* pipeline, const char* rows, uint32_t places) {
  const uint32_t thread = threadIdx.x - 32;
  RingPlace token_place{kTokensAhead};
  RingPlace row_place{places};
  bool first = true;
  for (;;) {
    barrier_wait(&pipeline->token_there[token_place.index], token_place.parity);
    const PulledToken& pulled = pipeline->tokens[token_place.index];
    const uint32_t token = pulled.token;
    if (token >= p.op.shape.tokens) {
      return;
    }
    float sum[kPieces][8] = {};
    begin_sums<kPieces>(p, token, sum);
    add_rows<kPieces>(p, pulled.ranks, pipeline, rows, &row_place, sum);
    sum_weights(p, token, thread, pulled);
    __syncwarp();
    if ((thread & 31) == 0) {
      barrier_arrive(&pipeline->token_free[token_place.index]);
    }
    token_place.next();
    store_sums<kPieces>(p, token, sum);
    if (first && threadIdx.x < 64) {
      stamp(Stamp::kFirstRow);
    }
    first = false;
  }
}

/// Tells the plan how many rows all blocks pulled, and sets the claims back. The last block.
__device__ void add_block_rows(const PartParams& p) {
  if (threadIdx.x == 0) {
    p.words.state->claimed_tokens = 0;
    BlockRows sum{};
    for (uint32_t b = 0; b < gridDim.x; ++b) {
      sum.local += __ldcg(&p.scratch.block_rows[b].local);
      sum.remote += __ldcg(&p.scratch.block_rows[b].remote);
    }
    p.scratch.plan->pulled_local_rows = sum.local;
    p.scratch.plan->pulled_remote_rows = sum.remote;
  }
  __syncthreads();
}

/// What the block needs before it pulls and what no other rank has to give: its barriers, which the exchange's barrier
/// of the block makes known, and the loading warp's first row numbers. Nothing is claimed and no copy started, so a
/// block may leave after it. Whole block.
__device__ ClaimedRows prepare_pull(const PartParams& p, PullPipeline* pipeline) {
  const uint32_t sum_warps = blockDim.x / 32 - 1;
  if (threadIdx.x < kTokensAhead) {
    barrier_init(&pipeline->token_there[threadIdx.x], 1);
    barrier_init(&pipeline->token_free[threadIdx.x], sum_warps);
  }
  if (threadIdx.x < bulk_rows(p.op.shape.hidden * 2)) {
    barrier_init(&pipeline->row_there[threadIdx.x], 1);
    barrier_init(&pipeline->row_free[threadIdx.x], sum_warps);
  }
  return threadIdx.x < 32 ? read_claim(p, blockIdx.x * kClaimTokens) : ClaimedRows{};
}

template <uint32_t kPieces>
__device__ void pull_and_sum(const PartParams& p, char* rows, PullPipeline* pipeline, const ClaimedRows& first) {
  const uint32_t places = bulk_rows(p.op.shape.hidden * 2);
  if (threadIdx.x < 32) {
    fence_copy_unit();
    const Loaded loaded = load_rows(p, pipeline, rows, places, first);
    stamp(Stamp::kLastIssued);
    if (threadIdx.x == 0) {
      p.scratch.block_rows[blockIdx.x] = {loaded.local, loaded.remote};
    }
  } else {
    sum_rows<kPieces>(p, pipeline, rows, places);
    stamp(Stamp::kRowsDone);
  }
}

#endif

// link_combine. Grid: at most link_sms blocks, one per multiprocessor, which claim tokens two by two. As the kernel
// that waits it announces `routed` first (this rank's rows may be read) and waits for the others'; else it runs behind
// the stream's wait. Warp 0 reads the handle's row numbers ahead, the first before the exchange, and lets the copy unit
// load each token's rows, one per rank, into as many places as shared memory has; the other warps add them in float32
// in rank order, round once and store. The last block announces `moved`, waits for the others' and ends the part. Bytes
// per token: H * 2 per rank that has a row, read; H * 2 written. Bound: the links, at the rate of reads.
template <uint32_t kPieces>
__global__ __launch_bounds__(kMostSumThreads + 32, 1) void link_combine(const __grid_constant__ PartParams p,
                                                                        Entry entry) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char rows[];
  __shared__ PullPipeline pipeline;
  if (p.null_operation != 0) {
    return;
  }
  if (threadIdx.x < 32 && entry == Entry::kWaits) {
    stamp(Stamp::kStarted);
  }
  bool gated = false;
  if (entry == Entry::kWaits) {
    gated = look_at_gate(p);
    open_part(p, gated);
    if (blockIdx.x == 0 && threadIdx.x < 32) {
      stamp(Stamp::kHandedOver);
    }
  }
  const ClaimedRows first = prepare_pull(p, &pipeline);
  const Passage passage = enters(p, SignalStep::kRouted, entry, gated);
  if (passage == Passage::kNot) {
    return;
  }
  if (threadIdx.x < 32) {
    stamp(Stamp::kPassedRouted);
  }
  const bool works = passage == Passage::kRegular;
  if (works) {
    pull_and_sum<kPieces>(p, rows, &pipeline, first);
  }
  const LastBlock end = end_moving(p, works);
  if (threadIdx.x < 32) {
    stamp(Stamp::kCountedIn);
  }
  if (!end.last) {
    return;
  }
  add_block_rows(p);  // while the flags are under way
  const Passage moved = passes(p, SignalStep::kMoved, SignalStep::kMoved, false, Decider::kOneBlock);
  if (moved != Passage::kNot) {
    if (threadIdx.x < 32) {
      stamp(Stamp::kPassedMoved);
    }
    finish_part(p, end.complete && moved == Passage::kRegular, EXPERTD_REASON_NONE, true);
  }
#endif
}

template <uint32_t kPieces>
cudaError_t launch_pieces(const PartParams& params, Entry entry, cudaStream_t stream) {
  const bool null = params.null_operation != 0;
  if (null) {
    const cudaError_t allowed =
        cudaFuncSetAttribute(link_combine<kPieces>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBulkSharedBytes);
    if (allowed != cudaSuccess) {
      return allowed;
    }
  }
  const uint32_t bytes = null ? 16 : params.op.shape.hidden * 2;
  const uint32_t threads = 32 + (null ? 32 : sum_threads(params.op.shape.hidden, kPieces));
  const uint32_t shared_bytes = bulk_rows(bytes) * bulk_row_stride(bytes);
  LaunchConfig config(link_combine_blocks(params), threads, shared_bytes, stream);
  config.starts_early(params.after_doorbell != 0 && entry == Entry::kWaits);
  return cudaLaunchKernelEx(config.get(), link_combine<kPieces>, params, entry);
}

}  // namespace

uint32_t link_combine_blocks(const PartParams& params) {
  return std::clamp(params.link_sms, 1u, std::min(params.multiprocessors, kMostLinkSms));
}

cudaError_t take_link_combine_timeline(Timeline* timeline) {
  return take_timeline(timeline);
}

cudaError_t launch_link_combine(const PartParams& params, Entry entry, cudaStream_t stream) {
  if (params.null_operation != 0) {
    const cudaError_t narrow = launch_pieces<2>(params, entry, stream);
    return narrow != cudaSuccess ? narrow : launch_pieces<kWidePieces>(params, entry, stream);
  }
  return params.op.shape.hidden / 8 <= 2 * kMostSumThreads ? launch_pieces<2>(params, entry, stream)
                                                           : launch_pieces<kWidePieces>(params, entry, stream);
}

}  // namespace expertd::kernels::cuda
