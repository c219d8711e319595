// SPDX-License-Identifier: Apache-2.0
// How a kernel of a part takes part in an exchange itself: it announces its rank's step to the others, waits for their
// flags for a bounded time, and leaves the rest to the kernel behind the stream's wait for the same flags when that
// time is over. So a rank that is on time costs no launch and no stream wait, and a rank that is late holds no
// multiprocessor: nothing on a GPU ever depends on another kernel getting a place to run. Device code only, included by
// the kernels' .cu files; no state.
//
// Memory order. A flag is stored with release at system scope behind the fences of all threads that wrote what it
// announces, and read with acquire at system scope by a thread whose block then meets at a barrier.
#pragma once

#include "daemon/kernels/cuda/device_common.cuh"
#include "daemon/kernels/cuda/launch.h"
#include "daemon/kernels/cuda/timeline.cuh"
#include "proto/abi/ring_v1.h"

namespace expertd::kernels::cuda {

/// How long a kernel waits for the other ranks' flags: about 25 us, twice what a doorbell costs by itself. Ranks
/// that are further apart meet in the streams, where waiting is free and costs about 5 us more.
inline constexpr int64_t kPatienceCycles = 50'000;

/// Writes `part * 4 + mine` into the word unless the part has decided already; returns what is decided. `seen`: what
/// the word held a moment ago.
__device__ __forceinline__ uint64_t first_decision(uint64_t* word, uint64_t part, uint64_t mine, uint64_t seen) {
  if (seen / 4 != part) {
    // Only blocks of this part write the word now, so it holds an older part's decision or one of this part.
    const uint64_t wanted = part * 4 + mine;
    const uint64_t before = atomicCAS(reinterpret_cast<unsigned long long*>(word), seen, wanted);
    seen = before == seen ? wanted : before;
  }
  return seen % 4;
}

/// Whether the kernel before has gone on past an exchange itself. A newer part in the same place says so too: this part
/// ended before it began.
__device__ __forceinline__ bool has_passed(const PartParams& p, SignalStep exchange) {
  const uint64_t seen = ld_acquire_sys(&p.words.state->passed[static_cast<uint32_t>(exchange)]);
  return seen == p.words.part * 4 + kPassed || seen / 4 > p.words.part;
}

/// Whether the kernel before has left what comes after an exchange to this one.
__device__ __forceinline__ bool was_left(const PartParams& p, SignalStep exchange) {
  return ld_acquire_sys(&p.words.state->passed[static_cast<uint32_t>(exchange)]) == p.words.part * 4 + kLeft;
}

__device__ inline void store_progress(const PartParams& p, SignalStep step) {
  st_relaxed_sys(step == SignalStep::kRouted ? &p.words.progress->routed : &p.words.progress->moved, p.words.group_op);
}

/// Tells the lane's rank that this rank's step is done, in order behind everything that the lane wrote or that a
/// barrier put before it. The time is for statistics; before the flag it would cost a round trip. Ranks of other nodes
/// have no page here: the host tells them.
__device__ inline void announce_to_lane(const PartParams& p, SignalStep step) {
  const OpShape& shape = p.op.shape;
  const uint32_t j = threadIdx.x & 31;
  const bool routed = step == SignalStep::kRouted;
  SyncPage* page = j < shape.ranks && rank_active(shape, j) ? p.peers.pages[j] : nullptr;
  if (page != nullptr) {
    st_release_sys(routed ? &page->routed[shape.rank] : &page->moved[shape.rank], p.words.group_op);
    st_relaxed_sys(routed ? &page->routed_time_ns[shape.rank] : &page->moved_time_ns[shape.rank], global_timer_ns());
  }
}

/// The same to every active rank, by one whole warp.
__device__ inline void announce(const PartParams& p, SignalStep step) {
  announce_to_lane(p, step);
  __syncwarp();
}

/// Whether this rank has nobody to exchange with.
__device__ inline bool is_alone(const PartParams& p) {
  return active_bits(p.op.shape) == uint64_t{1} << p.op.shape.rank;
}

/// Whether the part was aborted before this kernel began; thread 0 looks, for the block's decision at its first
/// exchange.
__device__ inline bool look_at_gate(const PartParams& p) {
  return threadIdx.x == 0 && ld_acquire_sys(&p.words.state->aborted_part) == p.words.part;
}

/// The first kernel of a part that has nothing to route: announces `routed` at once, which lets the others read this
/// rank's inputs and write its outputs. Any block; the first one's first warp does it. `gated`: what thread 0 saw.
__device__ inline void open_part(const PartParams& p, bool gated) {
  if (blockIdx.x == 0 && threadIdx.x < 32 && __shfl_sync(kFullWarp, gated ? 1 : 0, 0) == 0) {
    if (!is_alone(p)) {
      announce(p, SignalStep::kRouted);
    }
    mark_start(p);
  }
}

/// How a kernel comes past an exchange: not (what follows is left to the kernel behind the stream's wait), regularly,
/// or because the part was aborted.
enum class Passage : uint32_t { kNot, kRegular, kAborted };

/// Waits for the words of all other active ranks; kNot when `patience` cycles are over. One whole warp.
__device__ inline Passage await_words(const PartParams& p, const uint64_t* words, int64_t patience) {
  const OpShape& shape = p.op.shape;
  const uint32_t s = threadIdx.x & 31;
  const bool waits = s < shape.ranks && s != shape.rank && rank_active(shape, s);
  uint64_t word = waits ? 0 : p.words.group_op;
  const int64_t begin = clock64();
  for (;;) {
    if (word < p.words.group_op) {
      word = ld_acquire_sys(&words[s]);
    }
    if (__all_sync(kFullWarp, word >= p.words.group_op)) {
      return __any_sync(kFullWarp, word == EXPERTD_ABORT_WORD) ? Passage::kAborted : Passage::kRegular;
    }
    if (__any_sync(kFullWarp, clock64() - begin > patience)) {
      return Passage::kNot;
    }
  }
}

/// The flags of a step.
__device__ inline Passage await_flags(const PartParams& p, SignalStep step, int64_t patience) {
  const SyncPage* page = p.peers.pages[p.op.shape.rank];
  return await_words(p, step == SignalStep::kRouted ? page->routed : page->moved, patience);
}

/// Who decides whether a kernel goes on: all its blocks together, or its only or last one.
enum class Decider : uint32_t { kAllBlocks, kOneBlock };

/// Keeps what was found as the decision of the exchange, or takes another block's; one thread. Returns the decision.
__device__ inline uint64_t decide_passage(const PartParams& p, uint64_t* word, uint64_t seen, bool came,
                                          Decider decider) {
  const uint64_t mine = came ? kPassed : kLeft;
  uint64_t decided = mine;
  if (decider == Decider::kOneBlock) {
    st_relaxed_sys(word, p.words.part * 4 + mine);
  } else {
    decided = first_decision(word, p.words.part, mine, seen);
  }
  if (decided == kLeft) {
    // From here on the host may want to know how far the part came.
    store_progress(p, SignalStep::kRouted);
    publish_start(p);
  }
  return decided;
}

/// Waits with `await(patience)` for what the ranks exchange and decides whether the kernel goes on; the decision is
/// kept as that of `exchange`. `gated`: what thread 0 saw. Whole block, whose first warp waits.
template <typename Await>
__device__ inline Passage passes_by(const PartParams& p, SignalStep exchange, bool gated, Decider decider,
                                    const Await& await) {
  __shared__ Passage passage;
  if (threadIdx.x < 32) {
    uint64_t* word = &p.words.state->passed[static_cast<uint32_t>(exchange)];
    const uint64_t seen = decider == Decider::kAllBlocks ? ld_relaxed_gpu(word) : 0;
    Passage found = await(kPatienceCycles);
    uint64_t decided = 0;
    if (threadIdx.x == 0) {
      decided = decide_passage(p, word, seen, found != Passage::kNot, decider);
    }
    decided = __shfl_sync(kFullWarp, decided, 0);
    if (decided == kLeft) {
      found = Passage::kNot;
    } else if (found == Passage::kNot) {
      found = await(INT64_MAX);  // another block has seen it, so it is there
    }
    if (threadIdx.x == 0) {
      passage = gated && found != Passage::kNot ? Passage::kAborted : found;
    }
  }
  __syncthreads();
  return passage;
}

/// The same for the flags of `step`.
__device__ inline Passage passes(const PartParams& p, SignalStep step, SignalStep exchange, bool gated,
                                 Decider decider) {
  return passes_by(p, exchange, gated, decider, [&](int64_t patience) { return await_flags(p, step, patience); });
}

/// Whether this block goes on past the exchange, as the kernel that waits itself or as the one behind the stream's
/// wait. Whole block; kNot for all blocks of the kernel or for none.
__device__ inline Passage enters(const PartParams& p, SignalStep step, Entry entry, bool gated) {
  if (entry == Entry::kWaits) {
    return passes(p, step, step, gated, Decider::kAllBlocks);
  }
  if (!was_left(p, step)) {
    return Passage::kNot;
  }
  return block_is_gated(p) ? Passage::kAborted : Passage::kRegular;
}

/// What the last block to end a step finds: whether it is that, and whether all blocks did their work.
struct LastBlock {
  bool last;
  bool complete;
};

/// Tells every active rank that this rank's step `moved` is done; one thread, behind a fence for all that the flag
/// announces. The times come last, because they are for statistics.
__device__ inline void announce_moved_behind_fence(const PartParams& p) {
#pragma unroll 1
  for (uint32_t j = 0; j < p.op.shape.ranks; ++j) {
    if (rank_active(p.op.shape, j) && p.peers.pages[j] != nullptr) {
      st_relaxed_sys(&p.peers.pages[j]->moved[p.op.shape.rank], p.words.group_op);
    }
  }
#pragma unroll 1
  for (uint32_t j = 0; j < p.op.shape.ranks; ++j) {
    if (rank_active(p.op.shape, j) && p.peers.pages[j] != nullptr) {
      st_relaxed_sys(&p.peers.pages[j]->moved_time_ns[p.op.shape.rank], global_timer_ns());
    }
  }
}

/// Counts this block as done with moving rows. The last one announces `moved` if all did their work, by the thread that
/// counted, so that one fence and no barrier is between the count and the flags; and it sets the counter back.
/// Everything that the others wrote is visible to it. `worked`: false for a block that an abort kept from its work.
/// Whole block.
__device__ inline LastBlock end_moving(const PartParams& p, bool worked) {
  constexpr uint32_t kIdle = 1u << 16;  // above the number of blocks
  __shared__ uint32_t before;
  __syncthreads();
  if (threadIdx.x == 0) {
    fence_sys();
    stamp(Stamp::kFenced);
    before = atomicAdd(&p.words.state->blocks_done, worked ? 1u : 1u + kIdle);
    if (before % kIdle == gridDim.x - 1) {
      fence_sys();  // for what all blocks wrote before they counted
      if (before / kIdle == 0 && worked) {
        announce_moved_behind_fence(p);
        stamp(Stamp::kAnnounced);
      }
      p.words.state->blocks_done = 0;
    }
  }
  __syncthreads();
  return {before % kIdle == gridDim.x - 1, before / kIdle == 0 && worked};
}

}  // namespace expertd::kernels::cuda
