// SPDX-License-Identifier: Apache-2.0
// The first exchange of a link dispatch: how many rows every source sends to every rank. Each count is one word that
// also says which operation it is of and whether its source rejects it, so that neither a fence nor a flag stands
// between a rank's counts and those who wait for them. `routed` and the matrix come behind, for the kernel behind the
// stream's wait and for the tables. Device code only, for sm_90; included by link_route.cuh; no state.
//
// Memory order. Of what a rank did before, the words tell only that its outputs may be written: nothing is read behind
// them but the words themselves, and what the rank's earlier kernels wrote to those outputs was done when they ended.
#pragma once

#include "daemon/kernels/cuda/exchange_steps.cuh"

namespace expertd::kernels::cuda {

/// A word: the operation's number from bit kRowWordOpShift on, below it whether the source rejects the operation, and
/// its rows for the rank.
inline constexpr uint32_t kRowWordOpShift = 18;
inline constexpr uint32_t kRowWordRejects = 1u << 17;
inline constexpr uint32_t kRowWordRows = kRowWordRejects - 1;
static_assert(base::kMaxTokens <= kRowWordRows);

/// The low halves of all words of an operation, by source and destination, as a block's first warp found them; rows of
/// inactive sources are 0.
struct RowCounts {
  uint32_t of[base::kMaxGpuRanks][base::kMaxGpuRanks];
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

__device__ inline uint64_t row_word(const PartParams& p, uint32_t rows, bool rejects) {
  return p.words.group_op << kRowWordOpShift | (rejects ? kRowWordRejects : 0) | rows;
}

/// The words of this lane, into `counts`; whether all of them are of this operation.
__device__ inline bool read_row_words(const PartParams& p, RowCounts* counts) {
  const OpShape& shape = p.op.shape;
  const SyncPage* page = p.peers.pages[shape.rank];
  bool all = true;
  for (uint32_t i = threadIdx.x & 31; i < shape.ranks * shape.ranks; i += 32) {
    const uint32_t source = i / shape.ranks;
    const uint32_t rank = i % shape.ranks;
    const bool active = rank_active(shape, source);
    const uint64_t word = active ? ld_relaxed_sys(&page->rows[source][rank]) : row_word(p, 0, false);
    counts->of[source][rank] = static_cast<uint32_t>(word) & (kRowWordRejects | kRowWordRows);
    all = all && (word ^ row_word(p, 0, false)) >> kRowWordOpShift == 0;
  }
  return all;
}

/// Waits for the words of all active ranks, the own one too; kNot when `patience` cycles are over. An abort is known by
/// the flags: by their abort word, or when all are there and the words are not. One whole warp.
__device__ inline Passage await_row_words(const PartParams& p, int64_t patience, RowCounts* counts) {
  const OpShape& shape = p.op.shape;
  const uint32_t s = threadIdx.x & 31;
  const bool waits = s < shape.ranks && rank_active(shape, s);
  const uint64_t* routed = p.peers.pages[shape.rank]->routed;
  const int64_t begin = clock64();
  bool all_routed = false;
  for (;;) {
    const uint64_t flag = waits ? ld_relaxed_sys(&routed[s]) : p.words.group_op;
    const bool there = read_row_words(p, counts);
    if (__all_sync(kFullWarp, there)) {
      __syncwarp();
      return Passage::kRegular;
    }
    if (all_routed || __any_sync(kFullWarp, flag == EXPERTD_ABORT_WORD)) {
      return Passage::kAborted;
    }
    all_routed = __all_sync(kFullWarp, flag >= p.words.group_op) != 0;
    if (all_routed) {
      fence_sys();  // the words were stored before the flags, so the next look finds them
    } else if (__any_sync(kFullWarp, clock64() - begin > patience)) {
      return Passage::kNot;
    }
  }
}

/// As enters() of exchange_steps.cuh, for a dispatch that routes: by the words, which the block has in `counts` when it
/// comes past regularly. Whole block.
__device__ inline Passage enters_with_rows(const PartParams& p, Entry entry, bool gated, RowCounts* counts) {
  __shared__ Passage passage;
  if (entry == Entry::kWaits) {
    return passes_by(p, SignalStep::kRouted, gated, Decider::kAllBlocks,
                     [&](int64_t patience) { return await_row_words(p, patience, counts); });
  }
  const Passage entered = enters(p, SignalStep::kRouted, entry, gated);
  if (entered != Passage::kRegular) {
    return entered;
  }
  if (threadIdx.x < 32) {
    // Behind the stream's wait for the flags they are there, or never will be.
    const Passage found = await_row_words(p, 0, counts);
    if (threadIdx.x == 0) {
      passage = found == Passage::kRegular ? Passage::kRegular : Passage::kAborted;
    }
  }
  __syncthreads();
  return passage;
}

#endif

}  // namespace expertd::kernels::cuda
