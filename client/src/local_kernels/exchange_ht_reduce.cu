// SPDX-License-Identifier: Apache-2.0
#include "client/src/local_kernels/exchange_ht.cuh"

namespace expertd::client::exchange_ht {
namespace {

constexpr uint32_t kRowsAtOnce = 2;  // whose loads are in flight together

/// What the daemon said of the lane's rank: how many of its rows there are, whether weights came with them, and of the
/// own rank the first of its rows in x.
struct Owner {
  uint32_t rows = 0;
  uint32_t base = 0;
  bool weighted = false;
};

__device__ Owner owner_of(const HtParams& p) {
  Owner owner;
  if (lane_id() < p.ranks) {
    const uint64_t word = step_word(p, EXPERTD_HT_STEP_ROWS + lane_id() * 8);
    owner.rows = static_cast<uint32_t>(word) & 0x7fffffffu;
    owner.weighted = (word >> 31 & 1) != 0;
    owner.base = static_cast<uint32_t>(word >> 32);
  }
  return owner;
}

/// At which place of the sum the lane's rank comes: by its number, or by the last of the token's lanes that it owns.
__device__ uint32_t order_of(const HtParams& p, uint32_t token, uint32_t ranks) {
  if (!p.last_lane) {
    return __popc(ranks & ((1u << lane_id()) - 1));
  }
  const uint32_t owner = lane_id() < p.top_k ? owners_of(p)[uint64_t{token} * p.top_k + lane_id()] : 255;
  int32_t last = -1;
#pragma unroll 1
  for (uint32_t j = 0; j < p.ranks; ++j) {
    const uint32_t lanes = __ballot_sync(kFullWarp, owner == j);
    last = lane_id() == j && lanes != 0 ? 31 - __clz(static_cast<int>(lanes)) : last;
  }
  uint32_t order = 0;
#pragma unroll 1
  for (uint32_t left = ranks; left != 0; left &= left - 1) {
    const int j = __ffs(static_cast<int>(left)) - 1;
    const int32_t other = __shfl_sync(kFullWarp, last, j);
    order += other < last || (other == last && j < static_cast<int>(lane_id())) ? 1 : 0;
  }
  return order;
}

/// Adds rows of 16 bytes to the sums. `at` and `order` are those of the lane's rank; ranks are those that have a row.
__device__ void add_rows(float* sums, uint64_t at, uint32_t order, uint32_t ranks, uint32_t piece, bool inside) {
  const uint32_t count = __popc(ranks);
#pragma unroll 1
  for (uint32_t first = 0; first < count; first += kRowsAtOnce) {
    uint4 v[kRowsAtOnce];
#pragma unroll
    for (uint32_t i = 0; i < kRowsAtOnce; ++i) {
      const uint32_t from = __ballot_sync(kFullWarp, has_bit(ranks, lane_id()) && order == first + i);
      const uint64_t row = __shfl_sync(kFullWarp, at, from == 0 ? 0 : __ffs(static_cast<int>(from)) - 1);
      v[i] = from != 0 && inside ? reinterpret_cast<const uint4*>(row)[piece] : uint4{};
    }
#pragma unroll
    for (uint32_t i = 0; i < kRowsAtOnce; ++i) {
      if (first + i < count) {
#pragma unroll
        for (uint32_t e = 0; e < 8; ++e) {
          sums[e] = __fadd_rn(sums[e], bf16_at(v[i], e));
        }
      }
    }
  }
}

__device__ void begin_sums(const HtParams& p, float* sums, uint64_t piece) {
  if (p.bias0 != nullptr) {
    const uint4 v = static_cast<const uint4*>(p.bias0)[piece];
#pragma unroll
    for (uint32_t e = 0; e < 8; ++e) {
      sums[e] = bf16_at(v, e);
    }
  }
  if (p.bias1 != nullptr) {
    const uint4 v = static_cast<const uint4*>(p.bias1)[piece];
#pragma unroll
    for (uint32_t e = 0; e < 8; ++e) {
      sums[e] = __fadd_rn(sums[e], bf16_at(v, e));
    }
  }
}

/// The token's weights: a lane per lane. `at` is the first weight of the lane's rank, 0 for none.
__device__ void add_weights(const HtParams& p, uint32_t token, uint64_t at, uint32_t order, uint32_t ranks) {
  float sum = 0.0f;
  const uint32_t count = __popc(ranks);
#pragma unroll 1
  for (uint32_t i = 0; i < count; ++i) {
    const uint32_t from = __ballot_sync(kFullWarp, has_bit(ranks, lane_id()) && order == i);
    const uint64_t row = __shfl_sync(kFullWarp, at, from == 0 ? 0 : __ffs(static_cast<int>(from)) - 1);
    if (from != 0 && row != 0 && lane_id() < p.top_k) {
      sum = __fadd_rn(sum, reinterpret_cast<const float*>(row)[lane_id()]);
    }
  }
  if (lane_id() < p.top_k) {
    p.out_topk_weights[uint64_t{token} * p.top_k + lane_id()] = sum;
  }
}

/// Of the lane's rank: where its row of a tensor of `bytes` per row is, the own rank's in the caller's `own`.
__device__ uint64_t address_of(const HtParams& p, const Owner& owner, const void* own, uint64_t region,
                               uint64_t place_bytes, uint32_t row, uint64_t bytes) {
  if (lane_id() == p.rank) {
    return reinterpret_cast<uint64_t>(own) + (uint64_t{owner.base} + row) * bytes;
  }
  return reinterpret_cast<uint64_t>(p.buffer) + region + place_of(p, lane_id()) * place_bytes + row * bytes;
}

__device__ void sum_part(const HtParams& p, const Bases& bases, const Owner& owner, uint32_t token, uint32_t part) {
  const uint32_t pieces = p.hidden / 8;
  const int32_t number = row_of(p, bases, token);
  const auto row = static_cast<uint32_t>(number);
  const uint32_t ranks = __ballot_sync(kFullWarp, number >= 0 && row < owner.rows);
  const uint32_t order = order_of(p, token, ranks);
  const uint32_t piece = part * (kHtSumBytes / 16) + lane_id();
  const uint64_t at = address_of(p, owner, p.x, p.layout.rows, p.layout.rows_bytes, row, 2ull * p.hidden);
  float sums[8] = {};
  if (piece < pieces) {
    begin_sums(p, sums, uint64_t{token} * pieces + piece);
  }
  add_rows(sums, at, order, ranks, piece, piece < pieces);
  if (piece < pieces) {
    static_cast<uint4*>(p.out_x)[uint64_t{token} * pieces + piece] = exchange::rounded(sums);
  }
  if (part == 0 && p.out_topk_weights != nullptr) {
    const uint64_t weights =
        address_of(p, owner, p.topk_weights, p.layout.weights, p.layout.weights_bytes, row, 4ull * p.top_k);
    add_weights(p, token, owner.weighted ? weights : 0, order, ranks);
  }
}

}  // namespace
}  // namespace expertd::client::exchange_ht

// exchange_ht_reduce. Grid: a warp per 512 bytes of the sum of a token of the chunk. Behind the stream's wait for
// `plan` and for the progress of the other ranks; does nothing when the operation has ended before or rows do not move.
// The own rank's rows are read in the caller's x, those of others in the window, in the order of the ranks or of the
// token's lanes, summed in float32 behind the biases and rounded once. The first chunk writes the result word. Bytes
// per token: 2H per rank and bias read, 2H written. Bound: HBM.
extern "C" __global__ void __launch_bounds__(expertd::client::kHtThreads)
    expertd_exchange_ht_reduce(const __grid_constant__ expertd::client::HtParams p) {
  using namespace expertd::client;
  using namespace expertd::client::exchange_ht;
  __shared__ Bases bases;
  if (p.steps == nullptr || was_aborted(p)) {
    return;
  }
  const uint64_t verdict = step_word(p, EXPERTD_HT_STEP_VERDICT);
  if (p.step == 0 && blockIdx.x == 0 && threadIdx.x == 0) {
    *p.result = verdict;
  }
  if (verdict != 0) {
    return;
  }
  load_bases(p, bases);
  const Owner owner = owner_of(p);
  const uint32_t parts = (2 * p.hidden + kHtSumBytes - 1) / kHtSumBytes;
  const uint32_t step = gridDim.x * kHtWarps;
#pragma unroll 1
  for (uint32_t unit = blockIdx.x * kHtWarps + threadIdx.x / 32; unit < p.step_tokens * parts; unit += step) {
    sum_part(p, bases, owner, p.first_token + unit / parts, unit % parts);
  }
}
