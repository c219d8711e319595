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

namespace expertd::kernels::cuda {

/// How long a kernel waits for the other ranks' flags: about 30 us, twice what a late doorbell costs by itself. Ranks
/// that are further apart meet in the streams, where waiting is free and costs about 5 us more.
inline constexpr int64_t kPatienceCycles = 50'000;

/// Writes `part * 4 + mine` into the word unless the part has decided already; returns what is decided.
__device__ __forceinline__ uint64_t first_decision(uint64_t* word, uint64_t part, uint64_t mine) {
  auto* shared = reinterpret_cast<unsigned long long*>(word);
  const unsigned long long wanted = part * 4 + mine;
  unsigned long long seen = atomicCAS(shared, 0ull, 0ull);
  if (seen / 4 != part) {
    // Only blocks of this part write the word now, so it holds an older part's decision or one of this part.
    const unsigned long long before = atomicCAS(shared, seen, wanted);
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

/// Tells every active rank that this rank's step is done, and the host. One whole warp, after a fence and a barrier
/// behind everything that is announced.
__device__ inline void announce(const PartParams& p, SignalStep step) {
  const OpShape& shape = p.op.shape;
  const uint32_t j = threadIdx.x & 31;
  const bool routed = step == SignalStep::kRouted;
  if (j < shape.ranks && rank_active(shape, j)) {
    SyncPage* page = p.peers.pages[j];
    fence_sys();
    st_relaxed_sys(routed ? &page->routed_time_ns[shape.rank] : &page->moved_time_ns[shape.rank], global_timer_ns());
    st_release_sys(routed ? &page->routed[shape.rank] : &page->moved[shape.rank], p.words.group_op);
  }
  __syncwarp();
  if (j == 0) {
    st_relaxed_sys(routed ? &p.words.progress->routed : &p.words.progress->moved, p.words.group_op);
  }
}

/// The first kernel of a part that has nothing to route: announces `routed` at once, which lets the others read this
/// rank's inputs. The stamp comes behind the flags, because a fence would wait for its way to the host. Any block; the
/// first one's first warp does it.
__device__ inline void open_part(const PartParams& p) {
  if (blockIdx.x == 0 && threadIdx.x < 32 && ld_acquire_sys(&p.words.state->aborted_part) != p.words.part) {
    announce(p, SignalStep::kRouted);
    mark_start(p);
  }
}

/// Waits for the flags of all other active ranks; false when `patience` cycles are over. One whole warp.
__device__ inline bool flags_came(const PartParams& p, SignalStep step, int64_t patience) {
  const OpShape& shape = p.op.shape;
  const uint32_t s = threadIdx.x & 31;
  const SyncPage* page = p.peers.pages[shape.rank];
  const uint64_t* flags = step == SignalStep::kRouted ? page->routed : page->moved;
  bool there = s >= shape.ranks || s == shape.rank || !rank_active(shape, s);
  const int64_t begin = clock64();
  for (;;) {
    there = there || ld_acquire_sys(&flags[s]) >= p.words.group_op;
    if (__all_sync(kFullWarp, there)) {
      return true;
    }
    if (__any_sync(kFullWarp, clock64() - begin > patience)) {
      return false;
    }
  }
}

/// Waits for the flags of `step` and decides, for all blocks of the kernel alike, whether it goes on; the decision is
/// kept as that of `exchange`. Whole block, whose first warp waits.
__device__ inline bool passes(const PartParams& p, SignalStep step, SignalStep exchange) {
  __shared__ uint64_t decision;
  if (threadIdx.x < 32) {
    const bool came = flags_came(p, step, kPatienceCycles);
    uint64_t decided = 0;
    if (threadIdx.x == 0) {
      decided =
          first_decision(&p.words.state->passed[static_cast<uint32_t>(exchange)], p.words.part, came ? kPassed : kLeft);
    }
    decided = __shfl_sync(kFullWarp, decided, 0);
    if (decided == kPassed && !came) {
      flags_came(p, step, INT64_MAX);  // another block has seen them, so they are there
    }
    if (threadIdx.x == 0) {
      decision = decided;
    }
  }
  __syncthreads();
  return decision == kPassed;
}

/// Whether this block goes on past the exchange, as the kernel that waits itself or as the one behind the stream's
/// wait. Whole block; the same answer for all blocks of the kernel.
__device__ inline bool enters(const PartParams& p, SignalStep step, Entry entry) {
  return entry == Entry::kWaits ? passes(p, step, step) : was_left(p, step);
}

/// Counts this block as done; true for the last one, to which everything that the others wrote is visible. Whole block.
__device__ inline bool is_last_block(const PartParams& p) {
  __shared__ bool last;
  fence_sys();
  __syncthreads();
  if (threadIdx.x == 0) {
    // Wraps to 0 with the last block, ready for the next part.
    last = atomicInc(&p.words.state->blocks_done, gridDim.x - 1) == gridDim.x - 1;
    fence_gpu();
  }
  __syncthreads();
  return last;
}

}  // namespace expertd::kernels::cuda
