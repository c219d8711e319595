// SPDX-License-Identifier: Apache-2.0
#include "daemon/kernels/cuda/ptx.cuh"
#include "tests/bench/push_observe.h"

namespace expertd::bench {
namespace {

using kernels::cuda::global_timer_ns;
using kernels::cuda::ld_acquire_sys;
using kernels::cuda::st_relaxed_sys;
using kernels::cuda::st_release_sys;

constexpr uint64_t kPatienceNs = 1'000'000'000;

// push_commands. One thread; waits for every answer, at most kPatienceNs. Reads `answer`, writes payload and then
// `command`. Bytes: 24 per command over PCIe, and what it polls.
__global__ void push_commands(PushJob job) {
  uint64_t free_ns = 0;
  for (uint32_t i = 0; i < job.count; ++i) {
    const uint64_t command = job.first + i;
    while (global_timer_ns() < free_ns) {
    }
    const uint64_t sent_ns = global_timer_ns();
    const long long begin = clock64();
    st_relaxed_sys(&job.page->payload, command * kPushPayload);
    st_release_sys(&job.page->command, command);
    uint64_t answer = 0;
    do {
      answer = ld_acquire_sys(&job.page->answer);
    } while (answer < command && global_timer_ns() - sent_ns < kPatienceNs);
    const long long end = clock64();
    const uint64_t seen_ns = global_timer_ns();
    if (answer != command) {
      st_release_sys(&job.page->failed, command);
      return;
    }
    job.sent_ns[i] = sent_ns;
    job.seen_ns[i] = seen_ns;
    job.trip_cycles[i] = static_cast<uint64_t>(end - begin);
    free_ns = seen_ns + job.pause_ns;
  }
}

__global__ void stamp_timer(PushPage* page) {
  st_release_sys(&page->stamp_ns, global_timer_ns());
}

__global__ void timer_step(uint64_t* step_ns) {
  uint64_t least = ~uint64_t{0};
  uint64_t before = global_timer_ns();
  for (uint32_t i = 0; i < 20'000; ++i) {
    const uint64_t now = global_timer_ns();
    least = now != before && now - before < least ? now - before : least;
    before = now;
  }
  *step_ns = least;
}

}  // namespace

cudaError_t launch_push_commands(const PushJob& job, cudaStream_t stream) {
  push_commands<<<1, 1, 0, stream>>>(job);
  return cudaGetLastError();
}

cudaError_t launch_stamp_timer(PushPage* page, cudaStream_t stream) {
  stamp_timer<<<1, 1, 0, stream>>>(page);
  return cudaGetLastError();
}

cudaError_t launch_timer_step(uint64_t* step_ns, cudaStream_t stream) {
  timer_step<<<1, 1, 0, stream>>>(step_ns);
  return cudaGetLastError();
}

}  // namespace expertd::bench
