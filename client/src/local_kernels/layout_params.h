// SPDX-License-Identifier: Apache-2.0
// What the library's kernels and its host side share: the parameters of a launch, the words by which an operation's end
// is seen, and the scratch between the blocks of one launch. Plain data, compiled by the host compiler and by nvcc.
#pragma once

#include <cstdint>
#include <type_traits>

namespace expertd::client {

inline constexpr uint32_t kLayoutExpertsMax = 2048;
inline constexpr uint32_t kLayoutRanksMax = 512;  // layout is local: it may describe more ranks than one node has
inline constexpr uint32_t kLayoutTokensMax = 65536;
inline constexpr uint32_t kLayoutTopKMax = 32;
/// Counts per expert, per rank and per node, one behind the other.
inline constexpr uint32_t kLayoutCountsMax = kLayoutExpertsMax + 2 * kLayoutRanksMax;

inline constexpr uint32_t kLayoutThreads = 256;
inline constexpr uint32_t kLayoutChunkTokens = 64;  // that a block takes at a time
inline constexpr uint32_t kLayoutBlocksMax = 128;   // so many are resident together on every GPU from sm_80 on

/// The end of one operation, in pinned memory of the host: it fills in what is known beforehand, the kernel the rest.
struct alignas(64) LocalRecord {
  uint64_t seq;       // of the operation that ended here last; the kernel's last word
  uint32_t failed;    // the kernel met a value that it must refuse
  uint32_t reserved;  // 0
  int64_t value;      // that value
  int64_t maximum;    // of those allowed; the host's
};
static_assert(sizeof(LocalRecord) == 64);

/// Of one slot, in memory of the GPU. All but seq is 0 between launches: the last block of one leaves it so.
struct alignas(128) LocalScratch {
  uint64_t seq;        // as LocalRecord::seq, for streams that wait
  uint32_t arrived;    // blocks that have added their counts
  uint32_t first_bad;  // ~position of the first id out of range; 0: there is none
  uint32_t counts[kLayoutCountsMax];
};

struct LayoutParams {
  const void* topk_idx = nullptr;        // [T,K], 16-byte aligned as everything else
  int32_t* tokens_per_rank = nullptr;    // [R]; outputs may be null
  int32_t* tokens_per_node = nullptr;    // [nodes]
  int32_t* tokens_per_expert = nullptr;  // [E]
  uint8_t* token_rank_mask = nullptr;    // [T,R]
  LocalScratch* scratch = nullptr;       // of the slot
  LocalRecord* record = nullptr;         // of the slot
  uint64_t seq = 0;
  uint32_t idx_bytes = 8;  // 4 or 8
  uint32_t tokens = 0;
  uint32_t top_k = 1;
  uint32_t experts = 1;
  uint32_t ranks = 1;
  uint32_t ranks_per_node = 1;  // ranks r with equal r / ranks_per_node share a node
};
static_assert(std::is_trivially_copyable_v<LayoutParams>);

/// Chunks are dealt out in turn.
constexpr uint32_t layout_blocks(uint32_t tokens) {
  const uint32_t chunks = (tokens + kLayoutChunkTokens - 1) / kLayoutChunkTokens;
  return chunks == 0 ? 1 : chunks < kLayoutBlocksMax ? chunks : kLayoutBlocksMax;
}

}  // namespace expertd::client
