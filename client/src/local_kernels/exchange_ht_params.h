// SPDX-License-Identifier: Apache-2.0
// What the library's kernels of a high throughput operation by copy engines are given: the words of the ring slot, the
// exchange window, the sizes, the caller's tensors. Plain data, compiled by the host compiler and by nvcc.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "proto/abi/exchange_ht_v1.h"

namespace expertd::client {

inline constexpr uint32_t kHtRouteThreads = 512;
inline constexpr uint32_t kHtThreads = 256;
inline constexpr uint32_t kHtWarps = kHtThreads / 32;
/// Of a row, what a warp moves at a time: four accesses of 16 bytes per lane.
inline constexpr uint32_t kHtPartBytes = 2048;
/// Of a sum, what a warp takes at a time: 16 bytes per lane.
inline constexpr uint32_t kHtSumBytes = 512;
inline constexpr uint32_t kHtBlocksMax = 2048;
/// How many records a warp spreads, one behind the other, where the outputs are full.
inline constexpr uint32_t kHtRecordsAtOnce = 4;

enum class HtKernel : uint32_t { kRoute = 0, kMove = 1, kReduce = 2 };
inline constexpr uint32_t kHtKernels = 3;
/// Of HtKernel::kMove, behind the pieces that travel: the rows that stay, and everything beside rows.
inline constexpr uint32_t kHtPlace = EXPERTD_HT_PIECES;

struct HtParams {
  // Words of the slot, of the flag page.
  const uint64_t* steps = nullptr;  // at EXPERTD_HT_STEP_OFFSET; null: a launch that does nothing
  const uint64_t* completion = nullptr;
  uint64_t* result = nullptr;
  uint64_t seq = 0;
  // Of the exchange window.
  char* buffer = nullptr;
  char* handle = nullptr;
  expertd_exchange_ht_layout layout{};
  // R, this rank, E, L, H, M, K of the group; T and C of the operation.
  uint32_t ranks = 1;
  uint32_t rank = 0;
  uint32_t experts = 1;
  uint32_t local_experts = 1;
  uint32_t hidden = 128;
  uint32_t max_tokens = 1;
  uint32_t top_k = 1;
  uint32_t tokens = 0;
  uint32_t capacity_rows = 0;
  uint32_t idx_bytes = 8;
  uint32_t row_bytes = 16;
  uint32_t side_elements = 0;
  uint32_t side_element_bytes = 1;
  uint32_t record_bytes = 0;  // expertd_exchange_ht_record_bytes()
  uint32_t step = 0;          // piece of a dispatch, kHtPlace, or chunk of a combine
  uint32_t first_token = 0;   // of the step
  uint32_t step_tokens = 0;
  bool cached = false;
  bool zero_foreign = false;
  bool worst_tokens = false;
  bool last_lane = false;
  int64_t side_row_stride = 0;  // bytes
  int64_t side_element_stride = 0;
  // The caller's; 16-byte aligned.
  const void* x = nullptr;
  const void* topk_idx = nullptr;
  const float* topk_weights = nullptr;
  const void* side = nullptr;
  const uint8_t* token_rank_mask = nullptr;
  const void* bias0 = nullptr;
  const void* bias1 = nullptr;
  void* out_x = nullptr;
  void* out_side = nullptr;
  void* out_topk_idx = nullptr;
  float* out_topk_weights = nullptr;
  int32_t* expert_counts = nullptr;
  int32_t* rank_prefix = nullptr;
  int32_t* src_info = nullptr;
};
static_assert(std::is_trivially_copyable_v<HtParams> && sizeof(HtParams) <= 1024);

/// The tokens of a launch's step.
inline void set_ht_step(HtKernel kernel, uint32_t step, HtParams* p) {
  constexpr uint32_t kEnds[] = EXPERTD_HT_CHUNK_ENDS;
  uint32_t first = step == 1 ? EXPERTD_HT_FIRST_SLICES : 0;
  uint32_t end = step == 0 ? EXPERTD_HT_FIRST_SLICES : EXPERTD_HT_SLICES;
  if (kernel == HtKernel::kReduce) {
    first = step == 0 ? 0 : kEnds[step - 1];
    end = kEnds[step];
  }
  p->step = step;
  p->first_token = expertd_exchange_ht_slice(p->tokens, first);
  p->step_tokens = expertd_exchange_ht_slice(p->tokens, end) - p->first_token;
}

inline uint32_t ht_blocks(HtKernel kernel, const HtParams& p) {
  if (kernel == HtKernel::kRoute) {
    return EXPERTD_HT_SLICES;
  }
  const uint64_t bytes = kernel == HtKernel::kMove ? p.row_bytes : 2 * p.hidden;
  const uint64_t part = kernel == HtKernel::kMove ? kHtPartBytes : kHtSumBytes;
  uint64_t warps = p.step_tokens * ((bytes + part - 1) / part);
  if (kernel == HtKernel::kMove && p.step == kHtPlace && p.record_bytes != 0) {
    warps = std::max<uint64_t>(warps, p.capacity_rows / kHtRecordsAtOnce);  // a rank without tokens has rows of others
  }
  const uint64_t blocks = (warps + kHtWarps - 1) / kHtWarps;
  // One more where rows stay: it writes what is beside them.
  return static_cast<uint32_t>(std::clamp<uint64_t>(blocks, 1, kHtBlocksMax)) + (p.step == kHtPlace ? 1 : 0);
}

}  // namespace expertd::client
