// SPDX-License-Identifier: Apache-2.0
// The kernels of capture lanes. Definitions: daemon/kernels/README.md; who enqueues them: device/cuda/capture_lane.h.
#include <algorithm>

#include "daemon/kernels/cuda/arm_params.h"
#include "daemon/kernels/cuda/await_word.cuh"
#include "daemon/kernels/cuda/launch_config.h"
#include "daemon/kernels/cuda/low_latency_combine.cuh"
#include "daemon/kernels/cuda/low_latency_dispatch.cuh"

namespace expertd::kernels::cuda {
namespace {

/// Tells the host that the arm is over; one thread.
__device__ void tell_arm_done(const ArmParams& a) {
  st_relaxed_sys(&a.words.progress->routed, a.words.group_op);
  st_relaxed_sys(&a.words.progress->moved, a.words.group_op);
  st_release_sys(&a.words.facts->done, a.words.part);
}

/// The end of an operation that does not run: LL counts 0 and the Reason. `p` null: nothing is known of it. The first
/// block, whole.
__device__ __noinline__ void refuse(const ArmParams& a, const PartParams* p, uint32_t reason) {
  if (p != nullptr) {
    fail_outputs(*p, {threadIdx.x, blockDim.x});
  }
  fence_sys();
  __syncthreads();
  if (threadIdx.x == 0) {
    wait_for_previous();  // the doorbell is back at 0 before the client may ring again
    st_pair_relaxed_sys(a.words.completion, a.words.seq, reason);
    a.words.facts->report.reason = reason;
    a.words.facts->report.rank = -1;
    st_relaxed_sys(&a.words.facts->verdict, kVerdictGo);
    tell_arm_done(a);
  }
}

/// What comes of a doorbell, below the arm's number in PartState.taken_entry.
struct Taken {
  uint32_t entry =
      kNoEntry;          // place in the table; kMostCapturedEntries: it names none; kNoEntry: nothing is to be done
  bool refused = false;  // the lane is broken, or there is no such place: the operation ends without running
};
constexpr uint32_t kRefused = 0x4000;
static_assert((kRefused | kMostCapturedEntries) < kNoEntry && kMostCapturedEntries < kRefused);

__device__ uint64_t pack_taken(const ArmParams& a, const Taken& taken) {
  return a.words.part << 16 | (taken.refused ? kRefused | taken.entry : taken.entry);
}

__device__ Taken unpack_taken(uint64_t word) {
  const auto code = static_cast<uint32_t>(word & 0xffff);
  Taken taken;
  taken.refused = code != kNoEntry && (code & kRefused) != 0;
  taken.entry = taken.refused ? code & ~kRefused : code;
  return taken;
}

/// Takes the doorbell back to 0, unless the arm was taken back before it rang: then it stays for the arms to come. Once
/// one arm was, so are those behind it, or operations would change places. One thread. `decided` is called as soon as
/// the blocks may read what was taken, before the words for the host, which are slower.
template <typename Decided>
__device__ Taken take_doorbell(const ArmParams& a, const Decided& decided) {
  const uint64_t rung = ld_relaxed_sys(a.doorbell);
  const uint64_t broken = ld_relaxed_sys(&a.lane->broken);
  const uint64_t cancelled = ld_relaxed_sys(&a.lane->cancelled);
  Taken taken;
  const bool runs = cancelled < a.generation && rung != EXPERTD_CAPTURE_CANCEL;
  if (runs) {
    // A doorbell is memory of the client: whatever it holds, the place is one of the table.
    taken.entry = static_cast<uint32_t>(rung - 1 < kMostCapturedEntries ? rung - 1 : kMostCapturedEntries);
    taken.refused = broken != 0 || taken.entry == kMostCapturedEntries;
  }
  st_relaxed_sys(&a.words.state->taken_entry, pack_taken(a, taken));
  decided();
  if (runs) {
    st_relaxed_sys(a.doorbell, 0);
    st_relaxed_sys(&a.words.facts->entry, rung);
  } else {
    st_relaxed_sys(&a.lane->cancelled, a.generation);
    st_relaxed_sys(&a.words.facts->verdict, kVerdictCancelled);
    tell_arm_done(a);
  }
  return taken;
}

/// What came of the doorbell, the same for all blocks: the kernel in front has decided, or the first block does, which
/// runs before any of the others, and those wait for it. Whole block.
__device__ Taken take_entry(const ArmParams& a) {
  __shared__ Taken taken;
  if (threadIdx.x == 0 && blockIdx.x == 0 && a.after_wait == 0) {
    taken = take_doorbell(a, [] {});
  } else if (threadIdx.x == 0) {
    uint64_t seen = 0;
    do {
      seen = ld_relaxed_gpu(&a.words.state->taken_entry);
    } while (seen >> 16 != a.words.part);
    taken = unpack_taken(seen);
  }
  __syncthreads();
  return taken;
}

/// await_arm. Grid: one thread. As await_doorbell for the doorbell of a lane, which it takes: it writes the place of
/// the operation in the table for all blocks of the arm, which then find it there. Bytes: 40.
__global__ void await_arm(const __grid_constant__ ArmParams a) {
  wait_for_previous();
  if (a.null_operation == 0) {
    await_word(a.doorbell, 1);
    take_doorbell(a, [] {
      fence_gpu();
      let_next_start();
    });
  }
}

/// The operation's parameters into shared memory, with the words of this arm. False: there is no such operation. Whole
/// block.
__device__ bool load_part(const ArmParams& a, uint32_t entry, LowLatencyEntry place, PartParams* p) {
  static_assert(sizeof(PartParams) % sizeof(uint4) == 0);
  const auto* from = reinterpret_cast<const uint4*>(a.entries + entry);
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < sizeof(PartParams) / sizeof(uint4); i += blockDim.x) {
    reinterpret_cast<uint4*>(p)[i] = from[i];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    p->words = a.words;
    p->captured.ends_chain = place == LowLatencyEntry::kWaits ? 1 : 0;
  }
  __syncthreads();
  return p->captured.number != 0;
}

/// Counts this block as at the end of the arm's first kernel. When all are and one of them left something, the host
/// enqueues the kernels that do it. Whole block.
__device__ void count_through(const PartParams& p) {
  __syncthreads();
  if (threadIdx.x != 0) {
    return;
  }
  const uint64_t mark = p.scratch.left_blocks[blockIdx.x];
  const bool left = mark == left_mark(p, SignalStep::kRouted) || mark == left_mark(p, SignalStep::kMoved);
  fence_gpu();
  const uint32_t before = atomicAdd(&p.words.state->blocks_through, left ? kAbortedBlock + 1 : 1);
  if (before % kAbortedBlock != p.captured.blocks - 1) {
    return;
  }
  p.words.state->blocks_through = 0;
  if (left || before >= kAbortedBlock) {
    st_release_sys(&p.words.facts->left, p.words.part);
  }
}

/// Whether the kernel before has left what comes after the exchange that this one stands behind.
__device__ bool arm_was_left(const ArmParams& a, LowLatencyEntry place) {
  const auto step =
      static_cast<uint32_t>(place == LowLatencyEntry::kBehindMoved ? SignalStep::kMoved : SignalStep::kRouted);
  return ld_acquire_sys(&a.words.state->passed[step]) == a.words.part * 4 + kLeft;
}

__device__ void run_captured(const PartParams& p, LowLatencyEntry place, void* route_memory) {
  if (p.op.shape.kind != OpKind::kLlDispatch) {
    if (p.table_top_k > kRowsAtOnce) {
      run_ll_combine<true>(p, place);
    } else {
      run_ll_combine<false>(p, place);
    }
  } else if (place != LowLatencyEntry::kBehindRouted) {
    run_ll_dispatch(p, place == LowLatencyEntry::kWaits, route_memory);
  }
}

/// Why an operation does not run: the lane is broken, or the doorbell names none. The same for the whole block.
__device__ uint32_t reason_of_lane(const ArmParams& a) {
  const auto broken = static_cast<uint32_t>(ld_relaxed_sys(&a.lane->broken));
  return broken != 0 ? broken : static_cast<uint32_t>(EXPERTD_REASON_DESCRIPTOR_MALFORMED);
}

// link_ll_captured. Grid: that of the largest operation, two blocks of 16 warps per multiprocessor; blocks beyond those
// of the operation leave at once. Behind the stream's wait for the doorbell the first block, or await_arm in place of
// that wait, reads the doorbell, which the client may write, takes it back and tells all blocks in the arm's state;
// each copies the operation's parameters (4 KB) from the daemon's table into shared memory and goes on as
// link_ll_dispatch or link_ll_combine. Its last block to end writes `done`. When ranks are late the last block through
// tells the host, which enqueues the same kernel twice on the lane's other stream, behind waits for both exchanges; the
// last of those writes `done`. Bound: that of the operation, and two reads of a word, one after the other, and one of
// the parameters.
__global__ __launch_bounds__(kLowLatencyThreads,
                             kLowLatencyBlocksPerSm) void link_ll_captured(const __grid_constant__ ArmParams a,
                                                                           LowLatencyEntry place) {
  extern __shared__ __align__(16) char route_memory[];
  __shared__ __align__(16) char part_memory[sizeof(PartParams)];
  auto* p = reinterpret_cast<PartParams*>(part_memory);
  let_next_start();
  if (a.null_operation != 0) {
    return;
  }
  Taken taken;
  if (place == LowLatencyEntry::kWaits) {
    taken = take_entry(a);
  } else if (arm_was_left(a, place)) {
    taken = unpack_taken(ld_relaxed_gpu(&a.words.state->taken_entry));
  } else if (place == LowLatencyEntry::kBehindMoved && blockIdx.x == 0 && threadIdx.x == 0) {
    tell_arm_done(a);
  }
  if (taken.entry == kNoEntry) {
    return;
  }
  if (taken.refused && blockIdx.x != 0) {
    return;
  }
  const bool known = taken.entry < kMostCapturedEntries && load_part(a, taken.entry, place, p);
  if (taken.refused || !known) {
    if (blockIdx.x == 0) {
      refuse(a, known ? p : nullptr, reason_of_lane(a));
    }
    return;
  }
  if (blockIdx.x >= p->captured.blocks) {
    return;
  }
  run_captured(*p, place, route_memory);
  if (place == LowLatencyEntry::kWaits) {
    count_through(*p);
  }
}

// swap_word. One thread: `desired` into the word if it holds `expected`, then `mark` for the host.
__global__ void swap_word(const __grid_constant__ SwapParams p) {
  if (p.word == nullptr) {
    return;
  }
  atomicCAS(reinterpret_cast<unsigned long long*>(p.word), p.expected, p.desired);
  fence_sys();
  st_release_sys(p.done, p.mark);
}

}  // namespace

cudaError_t launch_link_ll_captured(const ArmParams& params, LowLatencyEntry place, cudaStream_t stream) {
  const bool null = params.null_operation != 0;
  if (null) {
    const cudaError_t allowed = cudaFuncSetAttribute(link_ll_captured, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                     route_shared_bytes(base::kMaxExperts));
    if (allowed != cudaSuccess) {
      return allowed;
    }
  }
  PartParams grid;
  grid.multiprocessors = params.multiprocessors;
  const uint32_t blocks = null ? 1 : std::max(most_low_latency_blocks(grid), 2u);
  const uint32_t bytes = null ? 0 : route_shared_bytes(params.experts);
  LaunchConfig config(blocks, kLowLatencyThreads, bytes, stream);
  config.starts_early(params.after_wait != 0);
  return cudaLaunchKernelEx(config.get(), link_ll_captured, params, place);
}

cudaError_t launch_await_arm(const ArmParams& params, cudaStream_t stream) {
  LaunchConfig config(1, 1, 0, stream);
  config.starts_early(true);
  return cudaLaunchKernelEx(config.get(), await_arm, params);
}

cudaError_t launch_swap_word(const SwapParams& params, cudaStream_t stream) {
  swap_word<<<1, 1, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace expertd::kernels::cuda
