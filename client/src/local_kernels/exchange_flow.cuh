// SPDX-License-Identifier: Apache-2.0
// How the blocks of an operation by copy engines share its steps and wait for the other ranks, in one kernel. Device
// code only.
//
// Any number of blocks ends an operation, one after the other or together, of one launch or of two (EXPERTD_ASYNC). A
// step is cut into units, which blocks take by counting up; the block that ends the last one does what follows. So who
// waits for other ranks never waits for a block of its own that has no place yet: the blocks that are there have taken
// all units of the steps before, and who has taken one is running. What waits holds places of the GPU. So all blocks
// are patient for a short while only, and then leave the rest to a few that stay, whether those are there already or
// come later; those wait until the words say something, or for longer than the daemon lets an operation last.
//
// Counters are those of the operation's number modulo kExchangeCounterSets: the number above, the count below. Who
// finds an older number puts its own; who finds a newer one comes so late that its operation is over. Nobody resets
// them, so a kernel that a stream held back for longer than its operation lasted disturbs nobody: of an operation that
// is over, only what nobody has begun is taken, by compare-and-swap. Otherwise a block looks whether it is over right
// before it counts, and for a count to hit a later operation's the ring would have to go round three times in between.
//
// Memory order. What a unit wrote is behind the fence of its block's count; who counts last fences again, at system
// scope before a word that copies, streams or the host wait for. Words of other ranks are read with acquire at system
// scope by a warp whose block then meets at a barrier.
#pragma once

#include "client/src/local_kernels/exchange.cuh"

namespace expertd::client::exchange {

/// Of each step the units taken and those done; three steps at most.
__device__ constexpr uint32_t taken_of(uint32_t step) {
  return 2 * step;
}
__device__ constexpr uint32_t done_of(uint32_t step) {
  return 2 * step + 1;
}
enum Counter : uint32_t {
  kGone = 6,  // blocks that left the waiting to others
  kRung = 7,
  kLocalRows = 8,
  kRemoteRows = 9,
};
static_assert(kRemoteRows + 1 == kExchangeCounters);

inline constexpr uint32_t kCountBits = 24;
inline constexpr uint64_t kCountsMax = uint64_t{1} << kCountBits;
inline constexpr uint32_t kTooLate = ~0u;  // more than any step has units

__device__ inline uint64_t first_count(const ExchangeParams& p) {
  return p.number << kCountBits;
}

/// What was counted before; kTooLate when the counter is of a later operation.
__device__ inline uint32_t count_up(const ExchangeParams& p, uint32_t counter, uint32_t by) {
  auto* word = reinterpret_cast<unsigned long long*>(p.counters + counter);
  const uint64_t before = atomicAdd(word, by) - first_count(p);
  return before < kCountsMax ? static_cast<uint32_t>(before) : kTooLate;
}

/// Takes the first count of a counter. Whether nobody had, of this operation.
__device__ inline bool is_first(const ExchangeParams& p, uint32_t counter) {
  const uint64_t first = first_count(p);
  return atomicCAS(reinterpret_cast<unsigned long long*>(p.counters + counter), first, first + 1) == first;
}

/// Makes the counters this operation's, a lane per counter. Whether they are a later one's.
__device__ inline bool came_too_late(const ExchangeParams& p) {
  const uint32_t counter = threadIdx.x;
  if (counter >= kExchangeCounters) {
    return false;
  }
  auto* word = reinterpret_cast<unsigned long long*>(p.counters + counter);
  const uint64_t first = first_count(p);
  uint64_t seen = load_acquire_sys(p.counters + counter);
  while (static_cast<int64_t>(seen - first) < 0) {
    const uint64_t before = atomicCAS(word, seen, first);
    seen = before == seen ? first : before;
  }
  return seen - first >= kCountsMax;
}

/// Does units of a step until none is left. True in the block that ended the step's last unit, where all that the
/// step's blocks wrote is seen. Whole block.
template <typename Operation>
__device__ bool do_units(const ExchangeParams& p, uint32_t step, Operation* operation) {
  __shared__ uint32_t shared_unit;
  const uint32_t units = operation->units(step);
  uint32_t ahead = threadIdx.x == 0 ? count_up(p, taken_of(step), 1) : 0;
  uint32_t done = 0;
#pragma unroll 1
  for (;;) {
    __syncthreads();  // the unit before is done, and its number read
    if (threadIdx.x == 0) {
      shared_unit = ahead;
    }
    __syncthreads();
    const uint32_t unit = shared_unit;
    if (unit >= units) {
      break;
    }
    if (threadIdx.x == 0) {
      ahead = count_up(p, taken_of(step), 1);  // under way while the unit is done
    }
    operation->do_unit(step, unit);
    ++done;
  }
  bool last = false;
  if (threadIdx.x == 0 && done != 0) {
    __threadfence();
    const uint32_t before = count_up(p, done_of(step), done);
    last = before != kTooLate && before + done == units;
    __threadfence();
  }
  return __syncthreads_or(last ? 1 : 0) != 0;
}

enum class Waited : uint32_t { kArrived = 0, kGone = 1, kTimeout = 2 };

/// Whether what this lane looks at in front of a step is there: a rank's word, and in front of the last step that the
/// own units of the one before, `units`, are done. A word that was released by an abort counts too.
__device__ inline bool lane_arrived(const ExchangeParams& p, uint32_t step, uint32_t units) {
  const uint32_t rank = lane_id();
  if (rank >= p.ranks) {
    return true;
  }
  if (step == 2 && rank == p.rank) {
    return load_acquire_sys(p.counters + done_of(1)) - first_count(p) >= units;
  }
  return load_acquire_sys(p.steps + (step - 1) * EXPERTD_STEP_RANKS + rank) >= p.seq;
}

/// Whether this block may leave the waiting to others. Whole warp.
__device__ inline bool may_go(const ExchangeParams& p) {
  const uint32_t gone = lane_id() == 0 ? count_up(p, kGone, 1) : 0;
  return __shfl_sync(kFullWarp, gone, 0) + kExchangeKeepers < gridDim.x;
}

/// Until all words in front of a step are there. Whole block; the first warp looks, the others stand at the barrier.
__device__ inline Waited wait_for(const ExchangeParams& p, uint32_t step, uint32_t units) {
  __shared__ Waited shared_end;
  if (threadIdx.x < 32) {
    const uint64_t begin = global_timer_ns();
    Waited end = Waited::kArrived;
    bool stays = false;
#pragma unroll 1
    while (!__all_sync(kFullWarp, lane_arrived(p, step, units))) {
      const uint64_t waited = __shfl_sync(kFullWarp, global_timer_ns() - begin, 0);
      if (waited > p.limit_ns) {
        end = Waited::kTimeout;
        break;
      }
      if (!stays && waited > kExchangePatienceNs) {
        if (may_go(p)) {
          end = Waited::kGone;
          break;
        }
        stays = true;
      }
      if (waited > kExchangeSpinNs) {
        __nanosleep(kExchangePauseNs);
      }
    }
    if (threadIdx.x == 0) {
      shared_end = end;
    }
  }
  __syncthreads();
  return shared_end;
}

__device__ inline uint64_t* step_word(const ExchangeParams& p, uint64_t offset) {
  return p.steps + (offset - EXPERTD_STEP_OFFSET(0)) / sizeof(uint64_t);
}

/// Lets the daemon's copies begin, once per operation. One thread, behind a barrier and what made it see the work.
__device__ inline void ring_once(const ExchangeParams& p) {
  if (p.doorbell != nullptr && is_first(p, kRung)) {
    __threadfence_system();
    store_relaxed_sys(p.doorbell, p.seq);
  }
}

/// Of an operation that was over before this block began: a stream may wait for the doorbell all the same, and the
/// counters may be a later operation's.
__device__ inline void ring_of_ended(const ExchangeParams& p, bool too_late) {
  if (threadIdx.x != 0) {
    return;
  }
  if (!too_late) {
    ring_once(p);
  } else if (blockIdx.x == 0 && p.doorbell != nullptr) {
    store_relaxed_sys(p.doorbell, p.seq);
  }
}

/// The operation is through on this rank. As ring_once().
__device__ inline void end_operation(const ExchangeParams& p) {
  __threadfence_system();
  store_relaxed_sys(step_word(p, EXPERTD_STEP_ENDED_OFFSET(0)), p.seq);
  store_release_sys(p.completion, p.seq);
}

/// The steps of an operation that this launch does: the first one is sent, the others receive. Operation: `kSteps`;
/// units() of a step; do_unit(), whole block; end_step(), one thread of the block that ended a step's last unit;
/// give_up(), whole block, of an operation that is over or was not ended in time.
template <typename Operation>
__device__ void run_steps(const ExchangeParams& p) {
  if (p.steps == nullptr) {
    return;
  }
  Operation operation(p);
  const bool too_late = __syncthreads_or(came_too_late(p) ? 1 : 0) != 0;
  const uint32_t end = (p.stages & kExchangeReceive) != 0 ? Operation::kSteps : 1;
#pragma unroll 1
  for (uint32_t step = (p.stages & kExchangeSend) != 0 ? 0 : 1; step < end; ++step) {
    const Waited waited = step == 0 ? Waited::kArrived : wait_for(p, step, operation.units(step - 1));
    if (waited == Waited::kGone) {
      return;
    }
    if (too_late || waited == Waited::kTimeout || was_aborted(p, step)) {
      if (step == 0) {
        ring_of_ended(p, too_late);
      }
      if (waited == Waited::kTimeout && threadIdx.x == 0) {
        *p.result = EXPERTD_REASON_TIMEOUT;
      }
      operation.give_up(too_late);
      return;
    }
    if (do_units(p, step, &operation) && threadIdx.x == 0) {
      operation.end_step(step);
    }
  }
}

}  // namespace expertd::client::exchange
