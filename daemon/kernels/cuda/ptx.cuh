// SPDX-License-Identifier: Apache-2.0
// The only place with PTX, fences and scopes: each function is named for what it means. Device code only, no state.
// Everything here exists from sm_80 on.
#pragma once

#include <cstdint>

namespace expertd::kernels::cuda {

/// Orders everything this thread did (and saw done) before everything it does later, for all GPUs and the host. The
/// PTX behind it is fence.sc.sys; a fence.acq_rel.sys would do, the intrinsic is taken because it is documented.
__device__ __forceinline__ void fence_sys() {
  __threadfence_system();
}

/// Orders for the threads of this GPU only: partial results of blocks before the counter of finished blocks.
__device__ __forceinline__ void fence_gpu() {
  __threadfence();
}

/// A flag word that a stream memory operation, another GPU or the host waits for. Scope sys: the observer is outside
/// this GPU; release: what was written before is visible to whoever sees the word. No intrinsic has both.
__device__ __forceinline__ void st_release_sys(uint64_t* word, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}

/// A word next to a flag, in memory of another GPU or of the host; ordered by the flag's release that follows.
__device__ __forceinline__ void st_relaxed_sys(uint64_t* word, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}

/// A word that a stream memory operation writes while kernels may run (the abort word). Scope sys so that no cache of
/// this SM answers; acquire so that nothing of the part is read before the decision.
__device__ __forceinline__ uint64_t ld_acquire_sys(const uint64_t* word) {
  uint64_t value = 0;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}

/// Nanoseconds of the node-wide GPU timer; volatile because it changes between reads. There is no intrinsic for it.
__device__ __forceinline__ uint64_t global_timer_ns() {
  uint64_t now = 0;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

}  // namespace expertd::kernels::cuda
