// SPDX-License-Identifier: Apache-2.0
// How the low latency kernels take part in their exchanges: as exchange_steps.cuh has it (bounded waits, what is left
// goes to the kernel behind the stream's wait), but every block decides for itself. No block needs what another block
// of this GPU does behind an exchange, so no decision has to be shared, and a rank that is on time pays for none. The
// kernels of one part have the same grid: what block b left, block b takes up. Device code only, no state.
//
// Aborts. A part that is aborted is known by its abort word, or by the abort value in the flags, which is written after
// the word. Such a block moves nothing, but counts, and says so with its count. Blocks that had seen the true flags go
// on; the part ended well if all blocks did.
#pragma once

#include "daemon/kernels/cuda/finish_part.cuh"

namespace expertd::kernels::cuda {

/// Two blocks fit a multiprocessor, so that one on which a small kernel runs (a caller's stream that waits) still has a
/// place: all blocks of a grid must run together, or the others wait for the missing one until their patience is over.
inline constexpr uint32_t kLowLatencyThreads = 512;
inline constexpr uint32_t kLowLatencyBlocksPerSm = 2;
inline constexpr uint32_t kLowLatencyWarps = kLowLatencyThreads / 32;
/// The warp that counts its block in, which takes two round trips that the others need not wait for.
inline constexpr uint32_t kCountingWarp = kLowLatencyWarps - 1;
/// Of a row, what one warp moves at a time: two accesses of 16 bytes per lane.
inline constexpr uint32_t kRowPartBytes = 1024;
static_assert(base::kMaxTopK <= 32 && base::kMaxGpuRanks <= 32, "one lane of a warp per top-k lane or rank");

enum class Arrival : uint32_t { kCame, kLate, kAborted };

/// The most blocks of a grid: all places but one of each eighth multiprocessor.
inline uint32_t most_low_latency_blocks(const PartParams& p) {
  const uint32_t places = p.multiprocessors * kLowLatencyBlocksPerSm - p.multiprocessors / 8;
  return places < kMostLinkSms ? places : kMostLinkSms;
}

/// Parts of a row of `bytes`.
__host__ __device__ constexpr uint32_t row_parts(uint32_t bytes) {
  return (bytes + kRowPartBytes - 1) / kRowPartBytes;
}

/// The most tokens of any rank. Items of an operation are (source, token) pairs up to it.
__host__ __device__ inline uint32_t most_tokens(const PartParams& p) {
  uint32_t most = 0;
  for (uint32_t s = 0; s < p.op.shape.ranks; ++s) {
    most = p.low_latency.tokens[s] > most ? p.low_latency.tokens[s] : most;
  }
  return most;
}

/// Blocks that work: of a captured operation fewer than the grid has, which serves any.
__device__ __forceinline__ uint32_t grid_blocks(const PartParams& p) {
  return p.captured.blocks != 0 ? p.captured.blocks : gridDim.x;
}

/// The warps of all blocks but the `reserved` first ones, those of different blocks next to each other.
__device__ inline Crew warps_behind(const PartParams& p, uint32_t reserved) {
  const uint32_t blocks = grid_blocks(p) - reserved;
  return {blockIdx.x - reserved + threadIdx.x / 32 * blocks, blocks * kLowLatencyWarps};
}

__device__ inline uint32_t row_at_index(const OpShape& shape, uint32_t rank, uint32_t token) {
  return rank * shape.max_tokens + token;
}

/// The time of a step, beside its flag-to-be, so that no flag waits for it alone. The first warp of one block, before
/// the fence of what is announced.
__device__ inline void stamp_step(const PartParams& p, SignalStep step) {
  const uint32_t j = threadIdx.x;
  if (j < p.op.shape.ranks && rank_active(p.op.shape, j)) {
    SyncPage* page = p.peers.pages[j];
    const bool routed = step == SignalStep::kRouted;
    st_relaxed_sys(routed ? &page->routed_time_ns[p.op.shape.rank] : &page->moved_time_ns[p.op.shape.rank],
                   global_timer_ns());
    if (p.op.shape.kind == OpKind::kLlDispatch) {
      st_relaxed_sys(&page->routed_time_ns[p.op.shape.rank], 0);  // there is no such step to be late at
    }
    if (p.captured.number != 0) {
      st_relaxed_sys(&page->captured[p.op.shape.rank], p.captured.number);
    }
  }
}

/// Above the blocks of any grid: what the counts of blocks tell beside their number.
inline constexpr uint32_t kAbortedBlock = 0x10000;
inline constexpr uint32_t kFailedBlock = 0x10000000;  // of one block
static_assert(kMostLinkSms * kAbortedBlock < kFailedBlock);

/// Counts this block as through with what comes before `moved`; the last one announces it to every active rank, unless
/// a block was gated. Whole block.
__device__ inline void send_block(const PartParams& p, bool gated) {
  const bool any_gated = __syncthreads_or(gated ? 1 : 0) != 0;
  if (threadIdx.x != kCountingWarp * 32) {
    return;
  }
  fence_sys();  // behind the barrier, so for the stores of the whole block
  stamp(Stamp::kFenced);
  const uint32_t before = atomicAdd(&p.words.state->blocks_done, any_gated ? kAbortedBlock + 1 : 1);
  if (before % kAbortedBlock != grid_blocks(p) - 1) {
    stamp(Stamp::kCountedIn);
    return;
  }
  if (!any_gated && before == grid_blocks(p) - 1) {
    fence_sys();  // for what all blocks stored before they counted; one thread has the flags behind one fence
#pragma unroll 1
    for (uint32_t j = 0; j < p.op.shape.ranks; ++j) {
      if (rank_active(p.op.shape, j)) {
        if (p.captured.number != 0) {
          // The chain behind a captured operation is the same for all, so it waits for both steps.
          st_relaxed_sys(&p.peers.pages[j]->routed[p.op.shape.rank], p.words.group_op);
        }
        st_relaxed_sys(&p.peers.pages[j]->moved[p.op.shape.rank], p.words.group_op);
      }
    }
    stamp(Stamp::kAnnounced);
  }
  p.words.state->blocks_done = 0;
}

/// Polls the flags of all active ranks, the own one too, which tells that all blocks of this kernel have sent. One
/// whole warp.
__device__ inline Arrival poll_flags(const PartParams& p, SignalStep step, int64_t patience) {
  const OpShape& shape = p.op.shape;
  const uint32_t s = threadIdx.x & 31;
  const SyncPage* page = p.peers.pages[shape.rank];
  const uint64_t* flags = step == SignalStep::kRouted ? page->routed : page->moved;
  const bool awaited = s < shape.ranks && rank_active(shape, s);
  const int64_t begin = clock64();
  for (;;) {
    const uint64_t seen = awaited ? ld_acquire_sys(&flags[s]) : p.words.group_op;
    if (__any_sync(kFullWarp, seen > p.words.group_op)) {
      return Arrival::kAborted;  // the page is not used again before this operation has ended
    }
    if (__all_sync(kFullWarp, seen == p.words.group_op)) {
      return Arrival::kCame;
    }
    if (__any_sync(kFullWarp, clock64() - begin > patience)) {
      return Arrival::kLate;
    }
  }
}

/// Whether a rank replays another captured operation than this one: their graphs went apart. One whole warp, behind the
/// flags.
__device__ inline bool ranks_differ(const PartParams& p) {
  const uint32_t s = threadIdx.x & 31;
  const bool compares = p.captured.number != 0 && s < p.op.shape.ranks && rank_active(p.op.shape, s);
  const SyncPage* page = p.peers.pages[p.op.shape.rank];
  return __any_sync(kFullWarp, compares && ld_relaxed_sys(&page->captured[s]) != p.captured.number) != 0;
}

/// Whole block, whose first warp polls. Behind the stream's wait nothing is waited for: what is late there is this
/// rank's own step, because the part was aborted before it.
__device__ inline Arrival wait_for_all(const PartParams& p, SignalStep step, bool waits) {
  __shared__ Arrival arrival;
  if (threadIdx.x < 32) {
    Arrival seen = poll_flags(p, step, waits ? kPatienceCycles : 0);
    if (p.captured.number != 0 && step == SignalStep::kMoved && seen == Arrival::kCame && ranks_differ(p)) {
      seen = Arrival::kAborted;
    }
    if (threadIdx.x == 0) {
      arrival = waits || seen != Arrival::kLate ? seen : Arrival::kAborted;
    }
    stamp(step == SignalStep::kRouted ? Stamp::kPassedRouted : Stamp::kPassedMoved);
  }
  __syncthreads();
  return arrival;
}

__device__ inline uint64_t left_mark(const PartParams& p, SignalStep step) {
  return p.words.part * 4 + 1 + static_cast<uint32_t>(step);
}

/// Leaves what comes behind an exchange to this block of the kernel behind the stream's wait. Whole block; not inlined,
/// because it is rare.
__device__ __noinline__ inline void leave_block(const PartParams& p, SignalStep step) {
  if (threadIdx.x == 0) {
    p.scratch.left_blocks[blockIdx.x] = left_mark(p, step);
    // From here on the host may want to know how far the part came. Where both steps are one, both words say so, or the
    // others would be said to miss counts.
    store_progress(p, SignalStep::kRouted);
    if (step == SignalStep::kMoved) {
      store_progress(p, SignalStep::kMoved);
    }
    publish_start(p);
    st_relaxed_sys(&p.words.state->passed[static_cast<uint32_t>(step)], p.words.part * 4 + kLeft);
  }
}

__device__ inline bool block_was_left(const PartParams& p, SignalStep step) {
  return p.scratch.left_blocks[blockIdx.x] == left_mark(p, step);
}

/// Lets the caller's stream go on, by one thread behind a fence.
__device__ inline void release_at_once(const PartParams& p, uint32_t reason) {
  static_assert(EXPERTD_RESULT_WORD_OFFSET(0) == EXPERTD_COMPLETION_WORD_OFFSET(0) + 8);
  if (p.captured.number != 0) {
    wait_for_previous();  // which takes the doorbell back and tells the host the entry; it has ended long ago
  }
  if (p.words.completion != nullptr) {
    st_pair_relaxed_sys(p.words.completion, p.words.seq, reason);
  }
}

/// The end of an operation that failed, was aborted or counts waits: what is left to write, the caller's words. Whole
/// block; not inlined, because it is rare.
__device__ __noinline__ inline void end_specially(const PartParams& p, bool go, uint32_t reason) {
  const Crew block{threadIdx.x, blockDim.x};
  if (go && reason == 0) {
    store_waits(p, block);
  } else if (go || caller_is_there(p)) {
    fail_outputs(p, block);
  }
  __syncthreads();
  if (threadIdx.x == 0 && go) {
    fence_sys();
    release_at_once(p, reason);
  }
}

/// The rows that the blocks of a combine counted, for the report; thread 0 keeps the sum, and reads it. Whole block.
__device__ inline void sum_block_rows(const PartParams& p) {
  if (threadIdx.x >= 32) {
    return;
  }
  uint32_t local = 0;
  uint32_t remote = 0;
  for (uint32_t b = threadIdx.x; b < grid_blocks(p); b += 32) {
    local += static_cast<uint32_t>(p.scratch.block_rows[b].local);
    remote += static_cast<uint32_t>(p.scratch.block_rows[b].remote);
  }
  local = __reduce_add_sync(kFullWarp, local);
  remote = __reduce_add_sync(kFullWarp, remote);
  if (threadIdx.x == 0) {
    p.scratch.plan->pulled_local_rows = local;
    p.scratch.plan->pulled_remote_rows = remote;
  }
}

/// How a block ends. kFailed: it has put a Reason into the plan; at most one block of a part does.
enum class Ending : uint32_t { kGood, kFailed, kAborted };

/// Counts this block as at its end; the last one ends the part, for the caller first. Its count tells how the others
/// ended, so that nothing is read between the count and the caller's words. Whole block.
__device__ inline void end_block(const PartParams& p, Ending ending) {
  __shared__ uint32_t counted;
  __syncthreads();
  if (threadIdx.x < 32) {
    stamp(Stamp::kFinished);
  }
  if (threadIdx.x == 0) {
    fence_gpu();
    const uint32_t mine =
        1 + (ending == Ending::kAborted ? kAbortedBlock : 0) + (ending == Ending::kFailed ? kFailedBlock : 0);
    const uint32_t all = atomicAdd(&p.words.state->finish_blocks, mine) + mine;
    counted = all;
    if (all % kAbortedBlock == grid_blocks(p)) {
      fence_sys();  // for what all blocks wrote before they counted
      if (all == grid_blocks(p) && p.op.out.wait_stats == nullptr) {
        release_at_once(p, EXPERTD_REASON_NONE);
        stamp(Stamp::kReleased);
      }
      p.words.state->finish_blocks = 0;
    }
  }
  __syncthreads();
  if (counted % kAbortedBlock != grid_blocks(p)) {
    return;
  }
  const bool go = counted % kFailedBlock / kAbortedBlock == 0;
  const uint32_t reason = go && counted >= kFailedBlock ? found_reason(p) : 0;
  if (counted != grid_blocks(p) || p.op.out.wait_stats != nullptr) {
    end_specially(p, go, reason);
  }
  if (p.op.shape.kind == OpKind::kLlCombine) {
    sum_block_rows(p);
  }
  write_facts(p, go, reason);
  if (p.captured.ends_chain != 0) {
    fence_sys();
    __syncthreads();
    if (threadIdx.x == 0) {
      tell_done(p);
    }
  }
}

/// The last kernel of the chain, when all its blocks are through: tells the host that the chain has drained. Whole
/// block. `worked`: blocks of this kernel may still be writing facts.
__device__ inline void drain_chain(const PartParams& p, bool worked) {
  bool tells = blockIdx.x == 0;
  if (worked) {
    fence_sys();
    __syncthreads();
    tells = threadIdx.x == 0 && atomicInc(&p.words.state->blocks_done, grid_blocks(p) - 1) == grid_blocks(p) - 1;
    fence_sys();
  }
  if (tells && threadIdx.x == 0) {
    tell_done(p);
  }
}

}  // namespace expertd::kernels::cuda
