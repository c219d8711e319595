// SPDX-License-Identifier: Apache-2.0
// The only place with PTX, fences and scopes: each function is named for what it means. Device code only, no state.
// Everything here exists from sm_80 on, except the second half: bulk copies between global and shared memory, by the
// SM's copy unit instead of by threads, exist from sm_90 on.
#pragma once

#include <cstdint>

namespace expertd::kernels::cuda {

/// Orders everything this thread did (and saw done) before everything it does later, for all GPUs and the host. Behind
/// a barrier of the block it does so for what the other threads did before the barrier. Acquire and release are all
/// that a flag needs; the intrinsic is the dearer fence.sc.sys.
__device__ __forceinline__ void fence_sys() {
  asm volatile("fence.acq_rel.sys;" ::: "memory");
}

/// Orders for the threads of this GPU only: partial results of blocks before the counter of finished blocks.
__device__ __forceinline__ void fence_gpu() {
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
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

/// A word that blocks of this GPU decide by atomic operations.
__device__ __forceinline__ uint64_t ld_relaxed_gpu(const uint64_t* word) {
  uint64_t value = 0;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}

/// The same word where only its value counts and nothing is read behind it.
__device__ __forceinline__ uint64_t ld_relaxed_sys(const uint64_t* word) {
  uint64_t value = 0;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}

/// Two words next to each other, the first on a 16-byte boundary, at once: who sees one sees the other. They follow a
/// fence. Where the compiler is older than such stores, the second word comes first, behind a fence of its own.
__device__ __forceinline__ void st_pair_relaxed_sys(uint64_t* words, uint64_t first, uint64_t second) {
#if __CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 4)
  asm volatile(
      "{\n"
      ".reg .b128 pair;\n"
      "mov.b128 pair, {%1, %2};\n"
      "st.relaxed.sys.global.b128 [%0], pair;\n"
      "}" ::"l"(words),
      "l"(first), "l"(second)
      : "memory");
#else
  st_relaxed_sys(words + 1, second);
  st_release_sys(words, first);
#endif
}

/// Lets the kernel behind this one in the stream start, if that was launched for it (launch_config.h).
__device__ __forceinline__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// Waits until the kernel in front in the stream has ended and what it wrote is visible, in one that was launched
/// early.
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// Asks for the line in the second-level cache.
__device__ __forceinline__ void prefetch(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

/// Nanoseconds of the node-wide GPU timer; volatile because it changes between reads. There is no intrinsic for it.
__device__ __forceinline__ uint64_t global_timer_ns() {
  uint64_t now = 0;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

/// Two floats rounded to nearest even as bf16, `low` in the low half; a NaN becomes 0x7fff.
__device__ __forceinline__ uint32_t pack_bf16x2(float low, float high) {
  uint32_t packed = 0;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

/// What this thread knows of memory through ordinary accesses also holds for the copies that it starts from here on:
/// the copy unit is another proxy than the threads.
__device__ __forceinline__ void fence_copy_unit() {
  asm volatile("fence.proxy.async;" ::: "memory");
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/// A barrier in shared memory whose phase ends after `arrivals` and after all bytes that were announced. The copy unit
/// is another proxy than the threads, so it must be told that the barrier is there.
__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

/// Arrives, and announces bytes that bulk_load() will bring.
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

/// Waits for the end of the phase with this parity. It is a wait for this block's own copies and threads, never for
/// another rank.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}

/// Arrives at the barrier of the cluster, once per phase and by every thread of all its blocks; cluster_wait() is to
/// follow before the next. What this thread did before is visible behind that wait. Threads of one block may do so in
/// different places.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}

/// The same where nothing that this thread did is to be seen by others, without the fence: it only tells that the
/// thread has come here.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}

/// Waits until all threads of the cluster have arrived.
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

/// Starts a copy into shared memory; its bytes count against the barrier. All addresses and bytes: multiples of 16.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

/// Starts a copy out of shared memory, of what a bulk_load() brought. It belongs to this thread's open group.
__device__ __forceinline__ void bulk_store(void* global, const void* shared, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared_address(shared)),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void bulk_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

/// Until this thread's stores have read shared memory, so that it may be filled again.
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

/// Until this thread's stores are done and visible to it; a fence_sys() behind it makes them visible to everybody.
__device__ __forceinline__ void bulk_wait_written() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

#endif

}  // namespace expertd::kernels::cuda
