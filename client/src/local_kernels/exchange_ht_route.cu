// SPDX-License-Identifier: Apache-2.0
#include "client/src/local_kernels/exchange_ht.cuh"

namespace expertd::client::exchange_ht {
namespace {

constexpr uint32_t kWarps = kHtRouteThreads / 32;
constexpr uint32_t kIdsAhead = 4;  // of a token, under way together

struct RouteShared {
  int32_t experts[2048];
  int32_t warp_rows[kWarps][EXPERTD_EXCHANGE_RANKS_MAX];
  int32_t rows[EXPERTD_EXCHANGE_RANKS_MAX];  // of the tokens before
  uint32_t bad;                              // position of the first id that is none
};

/// The ranks that a token goes to; its lanes are counted and their owners kept.
__device__ uint32_t route_lanes(const HtParams& p, RouteShared* s, uint32_t token) {
  uint32_t ranks = 0;
  const uint64_t base = uint64_t{token} * p.top_k;
#pragma unroll 1
  for (uint32_t first = 0; first < p.top_k; first += kIdsAhead) {
    int64_t ids[kIdsAhead];
#pragma unroll
    for (uint32_t i = 0; i < kIdsAhead; ++i) {
      ids[i] = first + i < p.top_k ? load_id(p, base + first + i) : -1;
    }
#pragma unroll
    for (uint32_t i = 0; i < kIdsAhead; ++i) {
      uint32_t owner = 255;
      if (ids[i] >= 0 && ids[i] < int64_t{p.experts}) {
        owner = static_cast<uint32_t>(ids[i]) / p.local_experts;
        ranks |= 1u << owner;
        atomicAdd(&s->experts[ids[i]], 1);
      } else if (ids[i] != -1) {
        atomicMin(&s->bad, static_cast<uint32_t>(base) + first + i);
      }
      if (first + i < p.top_k) {
        owners_of(p)[base + first + i] = static_cast<uint8_t>(owner);
      }
    }
  }
  if (p.token_rank_mask != nullptr) {
    ranks = 0;
#pragma unroll 1
    for (uint32_t j = 0; j < p.ranks; ++j) {
      ranks |= p.token_rank_mask[uint64_t{token} * p.ranks + j] != 0 ? 1u << j : 0;
    }
  }
  return ranks;
}

/// Numbers the rows of as many tokens as there are threads, in token order. Whole block.
__device__ void number_rows(const HtParams& p, RouteShared* s, uint32_t token, uint32_t end) {
  const uint32_t ranks = token < end ? route_lanes(p, s, token) : 0;
  const uint32_t warp = threadIdx.x / 32;
#pragma unroll 1
  for (uint32_t j = 0; j < p.ranks; ++j) {
    const uint32_t all = __ballot_sync(kFullWarp, has_bit(ranks, j));
    if (lane_id() == j) {
      s->warp_rows[warp][j] = __popc(all);
    }
  }
  __syncthreads();
#pragma unroll 1
  for (uint32_t j = 0; j < p.ranks; ++j) {
    const uint32_t all = __ballot_sync(kFullWarp, has_bit(ranks, j));
    int32_t before = lane_id() < warp ? s->warp_rows[lane_id()][j] : 0;
    before = __reduce_add_sync(kFullWarp, before) + s->rows[j];
    if (token < end) {
      const int32_t number = before + __popc(all & ((1u << lane_id()) - 1));
      numbers_of(p)[uint64_t{token} * p.ranks + j] = has_bit(ranks, j) ? number : -1;
    }
  }
  __syncthreads();
  if (threadIdx.x < p.ranks) {
#pragma unroll 1
    for (uint32_t w = 0; w < kWarps; ++w) {
      s->rows[threadIdx.x] += s->warp_rows[w][threadIdx.x];
    }
  }
  __syncthreads();
}

}  // namespace
}  // namespace expertd::client::exchange_ht

// exchange_ht_route. Grid: a block per slice of the tokens, a thread per token. Reads the caller's ids (and mask);
// writes the handle's numbers, owners and rows, and what the daemon copies to the host: rows per destination, rows per
// expert and the first bad id of each slice. Does nothing when the operation has ended before. Waits for nothing; the
// stream rings the doorbell behind it. Bytes per token: 8K read, 4R + K written. Bound: latency.
extern "C" __global__ void __launch_bounds__(expertd::client::kHtRouteThreads)
    expertd_exchange_ht_route(const __grid_constant__ expertd::client::HtParams p) {
  using namespace expertd::client;
  using namespace expertd::client::exchange_ht;
  __shared__ RouteShared s;
  if (p.steps == nullptr || was_aborted(p)) {
    return;
  }
  for (uint32_t e = threadIdx.x; e < p.experts; e += kHtRouteThreads) {
    s.experts[e] = 0;
  }
  if (threadIdx.x < EXPERTD_EXCHANGE_RANKS_MAX) {
    s.rows[threadIdx.x] = 0;
  }
  if (threadIdx.x == 0) {
    s.bad = ~0u;
  }
  __syncthreads();
  const uint32_t slice = blockIdx.x;
  const uint32_t end = slice_begin(p, slice + 1);
#pragma unroll 1
  for (uint32_t first = slice_begin(p, slice); first < end; first += kHtRouteThreads) {
    number_rows(p, &s, first + threadIdx.x, end);
  }
  auto* counts = reinterpret_cast<expertd_exchange_ht_counts*>(p.buffer);
  auto* experts = reinterpret_cast<int32_t*>(counts + 1) + slice * p.experts;
  for (uint32_t e = threadIdx.x; e < p.experts; e += kHtRouteThreads) {
    experts[e] = s.experts[e];
  }
  if (threadIdx.x < EXPERTD_EXCHANGE_RANKS_MAX) {
    counts->rows[slice][threadIdx.x] = s.rows[threadIdx.x];
    handle_of(p).rows[slice][threadIdx.x] = s.rows[threadIdx.x];
  }
  if (threadIdx.x == 0) {
    counts->errors[slice].reason = s.bad == ~0u ? EXPERTD_REASON_NONE : EXPERTD_REASON_EXPERT_OUT_OF_RANGE;
    counts->errors[slice].value = s.bad == ~0u ? 0 : load_id(p, s.bad);
  }
}
