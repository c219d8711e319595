// SPDX-License-Identifier: Apache-2.0
#include "client/src/local_kernels/exchange_flow.cuh"

namespace expertd::client::exchange {
namespace {

constexpr uint32_t kRowsAtOnce = 4;  // whose loads are in flight together

__device__ const expertd_exchange_handle& handle_of(const ExchangeParams& p) {
  return *reinterpret_cast<const expertd_exchange_handle*>(p.handle);
}

/// Partial sums of rank `owner` for the own tokens.
__device__ uint4* sums_from(const ExchangeParams& p, uint32_t owner) {
  return reinterpret_cast<uint4*>(p.buffer + p.layout.in_sums + uint64_t{owner} * p.max_tokens * p.hidden * 2);
}
/// Partial sums of this rank for the tokens of rank `origin`; the own ones need not travel.
__device__ uint4* sums_for(const ExchangeParams& p, uint32_t origin) {
  return origin == p.rank
             ? sums_from(p, p.rank)
             : reinterpret_cast<uint4*>(p.buffer + p.layout.out_sums + uint64_t{origin} * p.max_tokens * p.hidden * 2);
}

__device__ bool lane_is_taken(const ExchangeParams& p, const char* weights, uint32_t token, uint32_t k) {
  return (reinterpret_cast<const uint32_t*>(weights + p.layout.masks)[token] >> k & 1) != 0;
}

/// 16 bytes of one token's weighted rows, in lane order, in float32. `slot` and `weight` are those of the warp's lanes;
/// `left` the lanes that have a row. Whole warp.
__device__ uint4 sum_rows(const uint4* x, uint32_t pieces, bool inside, uint32_t left, int32_t slot, float weight) {
  float sums[8] = {};
#pragma unroll 1
  while (left != 0) {
    uint4 v[kRowsAtOnce];
    uint32_t ahead = left;
#pragma unroll
    for (uint32_t i = 0; i < kRowsAtOnce; ++i) {
      const int from = ahead == 0 ? 0 : __ffs(static_cast<int>(ahead)) - 1;
      const int32_t at = __shfl_sync(kFullWarp, slot, from);
      v[i] = ahead != 0 && inside ? x[uint64_t{static_cast<uint32_t>(at)} * pieces] : uint4{};
      ahead &= ahead - 1;
    }
#pragma unroll
    for (uint32_t i = 0; i < kRowsAtOnce; ++i) {
      const int from = left == 0 ? 0 : __ffs(static_cast<int>(left)) - 1;
      const float mine = __shfl_sync(kFullWarp, weight, from);
      if (left != 0) {
#pragma unroll
        for (uint32_t e = 0; e < 8; ++e) {
          sums[e] = __fadd_rn(sums[e], __fmul_rn(mine, bf16_at(v[i], e)));
        }
      }
      left &= left - 1;
    }
  }
  return rounded(sums);
}

/// This warp's parts of the sums for all origins.
__device__ void reduce_rows(const ExchangeParams& p, uint64_t active, Warps warps) {
  const uint32_t pieces = p.hidden / 8;
  const uint32_t parts = exchange_parts(2 * p.hidden, kExchangeSumBytes);
  const auto* slots = reinterpret_cast<const int32_t*>(p.handle + p.layout.handle_slots);
  uint32_t most = 0;
#pragma unroll 1
  for (uint32_t o = 0; o < p.ranks; ++o) {
    most = has_bit(active, o) ? max(most, min(handle_of(p).tokens[o], p.max_tokens)) : most;
  }
#pragma unroll 1
  for (uint32_t unit = warps.first; unit < p.ranks * most * parts; unit += warps.step) {
    const uint32_t origin = unit / parts % p.ranks;
    const uint32_t token = unit / parts / p.ranks;
    const char* weights = weights_of(p, origin);
    if (!has_bit(active, origin) || token >= min(handle_of(p).tokens[origin], tokens_of(p, weights))) {
      continue;
    }
    const uint64_t at = uint64_t{token} * p.table_top_k + lane_id();
    int32_t slot = -1;
    float weight = 0.0f;
    if (lane_id() < p.table_top_k && !lane_is_taken(p, weights, token, lane_id())) {
      slot = slots[uint64_t{origin} * p.max_tokens * p.table_top_k + at];
      weight = reinterpret_cast<const float*>(weights + p.layout.weights)[at];
    }
    const uint32_t rows = __ballot_sync(kFullWarp, slot >= 0);
    const uint32_t piece = unit % parts * (kExchangeSumBytes / 16) + lane_id();
    const uint4 sum = sum_rows(static_cast<const uint4*>(p.x) + piece, pieces, piece < pieces, rows, slot, weight);
    if (rows != 0 && piece < pieces) {
      sums_for(p, origin)[uint64_t{token} * pieces + piece] = sum;
    }
  }
}

/// This warp's parts of the own tokens: the owners' sums in rank order.
__device__ void add_sums(const ExchangeParams& p, uint64_t active, Warps warps) {
  const uint32_t pieces = p.hidden / 8;
  const uint32_t parts = exchange_parts(2 * p.hidden, kExchangeSumBytes);
  const auto* experts = reinterpret_cast<const int32_t*>(p.handle + p.layout.handle_lanes);
  const char* weights = weights_of(p, p.rank);
#pragma unroll 1
  for (uint32_t unit = warps.first; unit < p.tokens * parts; unit += warps.step) {
    const uint32_t token = unit / parts;
    uint32_t bit = 0;
    if (lane_id() < p.table_top_k && !lane_is_taken(p, weights, token, lane_id())) {
      const auto expert = static_cast<uint32_t>(experts[uint64_t{token} * p.table_top_k + lane_id()]);
      bit = expert < p.experts && has_bit(active, expert / p.local_experts) ? 1u << (expert / p.local_experts) : 0;
    }
    uint32_t owners = __reduce_or_sync(kFullWarp, bit);
    const uint32_t piece = unit % parts * (kExchangeSumBytes / 16) + lane_id();
    if (piece >= pieces) {
      continue;
    }
    float sums[8] = {};
#pragma unroll 1
    for (; owners != 0; owners &= owners - 1) {
      const uint32_t owner = __ffs(static_cast<int>(owners)) - 1;
      const uint4 v = sums_from(p, owner)[uint64_t{token} * pieces + piece];
#pragma unroll
      for (uint32_t e = 0; e < 8; ++e) {
        sums[e] = __fadd_rn(sums[e], bf16_at(v, e));
      }
    }
    static_cast<uint4*>(p.out_x)[uint64_t{token} * pieces + piece] = rounded(sums);
  }
}

/// One unit of the out weights: a mask of the lanes that the caller took away, and the weights, K of the group per
/// token. Counts the lanes, of the own rank and of others. Whole block.
__device__ void weights_unit(const ExchangeParams& p, uint32_t unit) {
  char* block = p.buffer + p.layout.out_weights;
  const auto* experts = reinterpret_cast<const int32_t*>(p.handle + p.layout.handle_lanes);
  const uint32_t k = lane_id();
  const Warps warps = warps_of(unit, exchange_weights_units(p));
  uint32_t locals = 0;
  uint32_t remotes = 0;
#pragma unroll 1
  for (uint32_t token = warps.first; token < p.tokens; token += warps.step) {
    const bool given = k < p.top_k;
    const uint64_t at = uint64_t{token} * p.table_top_k + k;
    const int64_t id = given ? load_id(p, token * p.top_k + k) : -1;
    const float weight = given ? p.topk_weights[token * p.top_k + k] : 0.0f;
    const uint32_t had = k < p.table_top_k ? static_cast<uint32_t>(experts[at]) : ~0u;
    const bool taken = id < 0 || id >= int64_t{p.experts};
    if (k < p.table_top_k) {
      reinterpret_cast<float*>(block + p.layout.weights)[at] = weight;
    }
    const uint32_t mask = __ballot_sync(kFullWarp, taken);
    const uint32_t expert = taken ? ~0u : had;
    const bool local = expert < p.experts && expert / p.local_experts == p.rank;
    locals += __popc(__ballot_sync(kFullWarp, local));
    remotes += __popc(__ballot_sync(kFullWarp, expert < p.experts && !local));
    if (k == 0) {
      reinterpret_cast<uint32_t*>(block + p.layout.masks)[token] = mask;
    }
  }
  if (k == 0 && locals + remotes != 0) {
    count_up(p, kLocalRows, locals);
    count_up(p, kRemoteRows, remotes);
  }
}

/// The weights' header and the report's rows, when all weights are there. One thread.
__device__ void write_weights_head(const ExchangeParams& p) {
  auto* header = reinterpret_cast<expertd_exchange_header*>(p.buffer + p.layout.out_weights);
  header->tokens = p.tokens;
  header->error = EXPERTD_REASON_NONE;
  expertd_exchange_report* report = report_of(p);
  report->reason = EXPERTD_REASON_NONE;
  report->value = 0;
  report->recv_rows = 0;
  report->expert_count_entries = 0;
  report->rank = -1;
  report->local_rows = count_up(p, kLocalRows, 0);
  report->remote_rows = count_up(p, kRemoteRows, 0);
}

/// Weights, reduce, add. What arrived is read by who has a unit only, as in Dispatch.
class Combine {
 public:
  static constexpr uint32_t kSteps = 3;

  __device__ explicit Combine(const ExchangeParams& p) : p_(p) {}
  __device__ uint32_t units(uint32_t step) const {
    return step == 0 ? exchange_weights_units(p_) : step == 1 ? exchange_reduce_units(p_) : exchange_add_units(p_);
  }
  __device__ void do_unit(uint32_t step, uint32_t unit) {
    if (step == 0) {
      weights_unit(p_, unit);
      return;
    }
    if (!known_) {
      known_ = true;
      active_ = active_ranks(p_) & handle_of(p_).active;
    }
    if (step == 1) {
      reduce_rows(p_, active_, warps_of(unit, exchange_reduce_units(p_)));
    } else {
      add_sums(p_, active_, warps_of(unit, exchange_add_units(p_)));
    }
  }
  __device__ void end_step(uint32_t step) const {
    if (step == 0) {
      write_weights_head(p_);
      ring_once(p_);
    } else if (step == 1) {
      __threadfence_system();
      store_relaxed_sys(step_word(p_, EXPERTD_STEP_RUNG_OFFSET(0)), p_.seq);
    } else {
      *p_.result = EXPERTD_REASON_NONE;
      end_operation(p_);
    }
  }
  __device__ void give_up(bool /*too_late*/) const {}

 private:
  const ExchangeParams& p_;
  uint64_t active_ = 0;
  bool known_ = false;
};

}  // namespace
}  // namespace expertd::client::exchange

// exchange_combine. Grid: at most kExchangeBlocks blocks of 1024 threads, each taking units (exchange_flow.cuh). Send:
// writes the out weights from the caller's and the handle's own lanes, a warp per token; the block that ends the last
// unit writes header and report and rings the doorbell. Receive: waits for arrived[0] of all ranks; a warp per 512
// bytes of the sum of an (origin, token) reads the token's slots and weights, reads the rows, four at once, adds them
// in float32 in lane order, rounds once and stores: for other origins where the copies take them, for the own tokens
// where the sum of an owner lies; the block that ends the last unit writes `rung`. Waits for arrived[1] of all others
// and for the own sums; a warp per 512 bytes of an own token adds the owners' sums in rank order; the block that ends
// the last unit writes result, `ended` and the completion word. Does nothing when the operation was over before, but
// for its doorbell. Bytes per token: 2H per row read, 2H per origin written, 2H per owner read, 2H written. Bound:
// reading the rows from HBM.
extern "C" __global__ void __launch_bounds__(expertd::client::kExchangeThreads, 1)
    expertd_exchange_combine(const __grid_constant__ expertd::client::ExchangeParams p) {
  using namespace expertd::client::exchange;
  run_steps<Combine>(p);
}
