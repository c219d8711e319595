// SPDX-License-Identifier: Apache-2.0
// What the library's kernels of an operation by copy engines are given: the words of the ring slot, the exchange
// window, the sizes, the caller's tensors. Plain data, compiled by the host compiler and by nvcc.
#pragma once

#include <cstdint>
#include <type_traits>

#include "proto/abi/exchange_v1.h"

#if defined(__CUDACC__)
#define EXPERTD_EXCHANGE_BOTH __host__ __device__
#else
#define EXPERTD_EXCHANGE_BOTH
#endif

namespace expertd::client {

/// A warp's share of a sum waits for the memory twice, and a block begins its next unit when all of its warps are done:
/// so many warps that a multiprocessor's accesses overlap, as many as its registers allow.
inline constexpr uint32_t kExchangeThreads = 1024;
inline constexpr uint32_t kExchangeWarps = kExchangeThreads / 32;
/// Blocks of a launch, one per multiprocessor. A multiprocessor moves about 48 GB/s in and out, so 64 of them do what
/// the memory does, and leave the other half of the GPU to the caller while they wait.
inline constexpr uint32_t kExchangeBlocks = 64;
/// Of a row, what a warp packs or expands at a time: two accesses of 16 bytes per lane.
inline constexpr uint32_t kExchangePartBytes = 1024;
/// Of a sum, what a warp takes at a time: 16 bytes per lane.
inline constexpr uint32_t kExchangeSumBytes = 512;
/// Units of a step: more rows than so many have warps for are taken in turn.
inline constexpr uint32_t kExchangeUnitsMax = 512;
/// How many tokens other ranks sent is first known on the GPU: the own number is reckoned with, and at least this one.
inline constexpr uint32_t kExchangeReckonedMin = 16;

/// How long all blocks of a launch wait for the other ranks: beside a client that fills the GPU the daemon's copies
/// take up to 40 us, so ranks that are in step meet within it.
inline constexpr uint64_t kExchangePatienceNs = 100'000;
/// And how many stay after that. Their multiprocessors have no room for a block that wants a whole one, so this is what
/// a late rank costs the others: 2 of 132 at most. Any number ends the operation, more of them sooner.
inline constexpr uint32_t kExchangeKeepers = 2;
/// Looks at the words come without a pause before this, and then with one: a look costs the memory nothing to speak of,
/// but its warp an issue slot of others.
inline constexpr uint64_t kExchangeSpinNs = 20'000;
inline constexpr uint32_t kExchangePauseNs = 200;
/// A launch waits so much longer than the operation's deadline. Before that the daemon ends the operation, or the
/// library when the daemon is gone; this is for the case that neither does.
inline constexpr uint64_t kExchangeGraceNs = 10'000'000'000;

/// Of the operation's counters (exchange_flow.cuh).
inline constexpr uint32_t kExchangeCounters = 10;
inline constexpr uint32_t kExchangeCounterWords = 16;
/// Operations of a session whose counters are apart. Far more than the ring has slots.
inline constexpr uint32_t kExchangeCounterSets = 256;
static_assert(kExchangeCounters <= kExchangeCounterWords);

enum class ExchangeKernel : uint32_t { kDispatch = 0, kCombine = 1 };
inline constexpr uint32_t kExchangeKernels = 2;
/// What a launch does of its operation.
enum ExchangeStage : uint32_t { kExchangeSend = 1, kExchangeReceive = 2 };

enum class ExchangePayload : uint32_t { kPlain = 0, kFp8 = 1, kFp8Rounded = 2, kUe8m0 = 3 };

struct ExchangeParams {
  // Words of the slot, of the flag page.
  uint64_t* steps = nullptr;     // at EXPERTD_STEP_OFFSET; null: a launch that does nothing
  uint64_t* doorbell = nullptr;  // null: nobody waits for it
  uint64_t* completion = nullptr;
  uint64_t* result = nullptr;
  uint64_t seq = 0;
  // Of this launch. The number is that of the library's operations by copy engines, from 1, over all attachments.
  uint64_t* counters = nullptr;  // [kExchangeCounters]
  uint64_t number = 0;
  uint64_t limit_ns = 0;  // of its waits
  uint32_t stages = 0;
  // Of the exchange window.
  char* buffer = nullptr;
  char* handle = nullptr;
  expertd_exchange_layout layout{};
  uint64_t row_stride = 0;
  // R, this rank, E, L, H, M, K of the group; T and K of the operation.
  uint32_t ranks = 1;
  uint32_t rank = 0;
  uint32_t experts = 1;
  uint32_t local_experts = 1;
  uint32_t hidden = 128;
  uint32_t max_tokens = 1;
  uint32_t table_top_k = 1;
  uint32_t tokens = 0;
  uint32_t top_k = 1;
  uint32_t idx_bytes = 8;
  ExchangePayload payload = ExchangePayload::kPlain;
  uint32_t row_bytes = 16;      // of x
  uint32_t out_row_bytes = 16;  // of recv_x
  uint32_t side_elements = 0;   // S, of rows of bytes
  uint32_t side_element_bytes = 1;
  int64_t side_row_stride = 0;  // bytes
  int64_t side_element_stride = 0;
  // The caller's; 16-byte aligned.
  const void* x = nullptr;
  const void* topk_idx = nullptr;
  const float* topk_weights = nullptr;
  const void* side = nullptr;
  void* out_x = nullptr;
  void* out_side = nullptr;
  int32_t* expert_counts = nullptr;
  int32_t* src_info = nullptr;
  int64_t* layout_range = nullptr;
  int32_t* stats = nullptr;
};
static_assert(std::is_trivially_copyable_v<ExchangeParams> && sizeof(ExchangeParams) <= 1024);

/// Units of packing that number rows: a warp per expert, and one for lanes without.
EXPERTD_EXCHANGE_BOTH constexpr uint32_t exchange_route_units(uint32_t experts) {
  return (experts + kExchangeWarps) / kExchangeWarps;
}

EXPERTD_EXCHANGE_BOTH constexpr uint32_t exchange_parts(uint32_t bytes, uint32_t part) {
  return (bytes + part - 1) / part;
}

/// Units for so many shares of a warp.
EXPERTD_EXCHANGE_BOTH constexpr uint32_t exchange_row_units(uint64_t shares) {
  const uint64_t units = (shares + kExchangeWarps - 1) / kExchangeWarps;
  return units == 0 ? 1 : units < kExchangeUnitsMax ? static_cast<uint32_t>(units) : kExchangeUnitsMax;
}

/// (origin, token) pairs of all ranks.
EXPERTD_EXCHANGE_BOTH constexpr uint64_t exchange_reckoned(const ExchangeParams& p) {
  return uint64_t{p.ranks} * (p.tokens < kExchangeReckonedMin ? kExchangeReckonedMin : p.tokens);
}

// A step's units: what a block takes at a time. All blocks of all launches of an operation reckon the same.
EXPERTD_EXCHANGE_BOTH constexpr uint32_t exchange_pack_units(const ExchangeParams& p) {
  return exchange_route_units(p.experts) +
         exchange_row_units(uint64_t{p.tokens} * exchange_parts(p.row_bytes, kExchangePartBytes));
}
EXPERTD_EXCHANGE_BOTH constexpr uint32_t exchange_expand_units(const ExchangeParams& p) {
  return 1 + exchange_row_units(exchange_reckoned(p) * exchange_parts(p.out_row_bytes, kExchangePartBytes));
}
EXPERTD_EXCHANGE_BOTH constexpr uint32_t exchange_weights_units(const ExchangeParams& p) {
  return exchange_row_units(p.tokens);
}
EXPERTD_EXCHANGE_BOTH constexpr uint32_t exchange_reduce_units(const ExchangeParams& p) {
  return exchange_row_units(exchange_reckoned(p) * exchange_parts(2 * p.hidden, kExchangeSumBytes));
}
EXPERTD_EXCHANGE_BOTH constexpr uint32_t exchange_add_units(const ExchangeParams& p) {
  return exchange_row_units(uint64_t{p.tokens} * exchange_parts(2 * p.hidden, kExchangeSumBytes));
}

/// The grid of a launch: a block per unit of its largest step, within kExchangeBlocks.
constexpr uint32_t exchange_blocks(ExchangeKernel kernel, const ExchangeParams& p) {
  const bool dispatch = kernel == ExchangeKernel::kDispatch;
  const uint32_t send = dispatch ? exchange_pack_units(p) : exchange_weights_units(p);
  const uint32_t receive = dispatch ? exchange_expand_units(p) : exchange_reduce_units(p);
  const uint32_t units = (p.stages & kExchangeReceive) == 0 || send > receive ? send : receive;
  return units < kExchangeBlocks ? units : kExchangeBlocks;
}

}  // namespace expertd::client
