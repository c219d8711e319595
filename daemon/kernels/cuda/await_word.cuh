// SPDX-License-Identifier: Apache-2.0
// A thread's wait for a word, in the kernels that stand for a stream's wait. Device code only, included by the kernels'
// .cu files; no state.
#pragma once

#include "daemon/kernels/cuda/ptx.cuh"

namespace expertd::kernels::cuda {

/// Polls in a row before the thread sleeps between them: about 100 us.
inline constexpr uint32_t kEagerPolls = 200;
inline constexpr uint32_t kPollSleepNs = 200;

/// Until the word is at least `value`, as a stream's wait compares them. It lies in memory of the own GPU; an abort
/// writes it as it does for a stream's wait.
__device__ __forceinline__ void await_word(const uint64_t* word, uint64_t value) {
#pragma unroll 1
  for (uint32_t polls = 0; static_cast<int64_t>(ld_acquire_sys(word) - value) < 0; ++polls) {
    if (polls >= kEagerPolls) {
      __nanosleep(kPollSleepNs);
    }
  }
}

}  // namespace expertd::kernels::cuda
