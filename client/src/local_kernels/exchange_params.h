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

inline constexpr uint32_t kExchangeThreads = 256;
inline constexpr uint32_t kExchangeWarps = kExchangeThreads / 32;
inline constexpr uint32_t kWeightsThreads = 1024;
/// Of a row, what a warp packs or expands at a time: two accesses of 16 bytes per lane.
inline constexpr uint32_t kExchangePartBytes = 1024;
/// Of a sum, what a warp takes at a time: 16 bytes per lane.
inline constexpr uint32_t kExchangeSumBytes = 512;
/// More tokens than so many blocks have warps for are taken in turn.
inline constexpr uint32_t kExchangeBlocksMax = 2048;

enum class ExchangeKernel : uint32_t { kPack = 0, kExpand = 1, kWeights = 2, kReduce = 3, kAdd = 4 };
inline constexpr uint32_t kExchangeKernels = 5;

enum class ExchangePayload : uint32_t { kPlain = 0, kFp8 = 1, kFp8Rounded = 2, kUe8m0 = 3 };

struct ExchangeParams {
  // Words of the slot, of the flag page.
  const uint64_t* steps = nullptr;  // at EXPERTD_STEP_OFFSET; null: a launch that does nothing
  const uint64_t* completion = nullptr;
  uint64_t* result = nullptr;
  uint64_t seq = 0;
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

/// Blocks of the pack kernel that number rows: a warp per expert, and one for lanes without.
EXPERTD_EXCHANGE_BOTH constexpr uint32_t exchange_route_blocks(uint32_t experts) {
  return (experts + kExchangeWarps) / kExchangeWarps;
}

EXPERTD_EXCHANGE_BOTH constexpr uint32_t exchange_parts(uint32_t bytes, uint32_t part) {
  return (bytes + part - 1) / part;
}

constexpr uint32_t exchange_row_blocks(uint64_t units) {
  const uint64_t blocks = (units + kExchangeWarps - 1) / kExchangeWarps;
  return blocks == 0 ? 1 : blocks < kExchangeBlocksMax ? static_cast<uint32_t>(blocks) : kExchangeBlocksMax;
}

/// The grid of a kernel. How many tokens other ranks sent is first known on the GPU: as many as here are reckoned with.
constexpr uint32_t exchange_blocks(ExchangeKernel kernel, const ExchangeParams& p) {
  switch (kernel) {
    case ExchangeKernel::kPack:
      return exchange_route_blocks(p.experts) +
             exchange_row_blocks(uint64_t{p.tokens} * exchange_parts(p.row_bytes, kExchangePartBytes));
    case ExchangeKernel::kExpand:
      return 1 +
             exchange_row_blocks(uint64_t{p.ranks} * p.tokens * exchange_parts(p.out_row_bytes, kExchangePartBytes));
    case ExchangeKernel::kWeights:
      return 1;
    case ExchangeKernel::kReduce:
      return exchange_row_blocks(uint64_t{p.ranks} * p.tokens * exchange_parts(2 * p.hidden, kExchangeSumBytes));
    case ExchangeKernel::kAdd:
      return exchange_row_blocks(uint64_t{p.tokens} * exchange_parts(2 * p.hidden, kExchangeSumBytes));
  }
  return 1;
}

}  // namespace expertd::client
