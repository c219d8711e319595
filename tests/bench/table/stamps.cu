// SPDX-License-Identifier: Apache-2.0
#include <cuda/atomic>

#include "tests/bench/cuda_check.h"
#include "tests/bench/table/stamps.h"

namespace expertd::bench {

namespace {

constexpr uint64_t kGateMaxNs = 60'000'000'000;
constexpr uint32_t kSteps = 64;

using HostWord = cuda::atomic_ref<uint32_t, cuda::thread_scope_system>;

// The only clock that all multiprocessors share. Volatile, and with memory clobbered, so that it is read where it
// stands.
__device__ uint64_t timer_ns() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  return now;
}

// One thread. The release pairs with the host's look at `arrived`, the acquire with the host's store that opens.
__global__ void hold(uint32_t* word, StreamMarks* marks, uint32_t round) {
  HostWord(marks->arrived).store(round, cuda::memory_order_release);
  const uint64_t until = timer_ns() + kGateMaxNs;
  while (static_cast<int32_t>(HostWord(*word).load(cuda::memory_order_acquire) - round) < 0 && timer_ns() < until) {
  }
}

// One thread. Into device memory: a kernel that writes to the host ends later, and that would be timed.
__global__ void stamp_begin(uint64_t* begin_ns) {
  *begin_ns = timer_ns();
}

// One thread. The release pairs with the host's acquire of `ended`.
__global__ void stamp_end(const uint64_t* begin_ns, StreamMarks* marks, uint32_t round) {
  const uint64_t end_ns = timer_ns();
  marks->begin_ns = *begin_ns;
  marks->end_ns = end_ns;
  HostWord(marks->ended).store(round, cuda::memory_order_release);
}

// One thread.
__global__ void find_step(uint64_t* step_ns) {
  uint64_t least = UINT64_MAX;
  uint64_t before = timer_ns();
  for (uint32_t step = 0; step < kSteps;) {
    const uint64_t now = timer_ns();
    if (now != before) {
      least = min(least, now - before);
      before = now;
      ++step;
    }
  }
  *step_ns = least;
}

}  // namespace

void enqueue_gate(cudaStream_t stream, uint32_t* word, StreamMarks* marks, uint32_t round) {
  hold<<<1, 1, 0, stream>>>(word, marks, round);
  check_cuda(cudaGetLastError(), "launch of the gate");
}

void enqueue_begin(cudaStream_t stream, uint64_t* begin_ns) {
  stamp_begin<<<1, 1, 0, stream>>>(begin_ns);
  check_cuda(cudaGetLastError(), "launch of the first stamp");
}

void enqueue_end(cudaStream_t stream, const uint64_t* begin_ns, StreamMarks* marks, uint32_t round) {
  stamp_end<<<1, 1, 0, stream>>>(begin_ns, marks, round);
  check_cuda(cudaGetLastError(), "launch of the last stamp");
}

uint64_t timer_step_ns(cudaStream_t stream, uint64_t* scratch) {
  find_step<<<1, 1, 0, stream>>>(scratch);
  check_cuda(cudaGetLastError(), "launch of the look at the timer");
  uint64_t step_ns = 0;
  check_cuda(cudaMemcpyAsync(&step_ns, scratch, sizeof(step_ns), cudaMemcpyDeviceToHost, stream), "step of the timer");
  check_cuda(cudaStreamSynchronize(stream), "step of the timer");
  return step_ns;
}

}  // namespace expertd::bench
