// SPDX-License-Identifier: Apache-2.0
#include "tests/bench/table/stream_timer.h"

#include <atomic>
#include <new>
#include <string>
#include <thread>

#include "tests/bench/bench_figures.h"
#include "tests/bench/cuda_check.h"

namespace expertd::bench {

namespace {

using Clock = std::chrono::steady_clock;

/// Longer than the deadline of any operation here, so that its own message comes first.
constexpr std::chrono::seconds kStuck{40};
/// How often a wait for a word asks whether the stream failed; a call into CUDA between two looks would be timed.
constexpr std::chrono::milliseconds kAskEvery{5};

[[noreturn]] void throw_stuck(const char* what) {
  throw std::runtime_error(std::string(what) + ": not reached in " + std::to_string(kStuck.count()) + " s");
}

}  // namespace

const char* name_of(TimerClock clock) {
  switch (clock) {
    case TimerClock::kEvents:
      return "events";
    case TimerClock::kMemoryWords:
      return "memory words";
    case TimerClock::kKernels:
      return "kernels";
  }
  return "";
}

StreamTimer::StreamTimer(Gate* gate) : gate_(gate) {
  int least = 0;
  int greatest = 0;
  check_cuda(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
  check_cuda(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, greatest), "cudaStreamCreate");
  check_cuda(cudaEventCreateWithFlags(&flushed_, cudaEventDisableTiming), "cudaEventCreate");
  check_cuda(cudaEventCreate(&begin_), "cudaEventCreate");
  check_cuda(cudaEventCreate(&end_), "cudaEventCreate");
  check_cuda(cudaMalloc(&flush_, kFlushBytes), "cudaMalloc");
  void* memory = nullptr;
  check_cuda(cudaHostAlloc(&memory, sizeof(*marks_), cudaHostAllocPortable | cudaHostAllocMapped), "cudaHostAlloc");
  marks_ = new (memory) StreamMarks{};
  check_cuda(cudaHostGetDevicePointer(&memory, marks_, 0), "cudaHostGetDevicePointer");
  device_marks_ = static_cast<StreamMarks*>(memory);
  check_cuda(cudaMalloc(&memory, sizeof(*begin_ns_)), "cudaMalloc");
  begin_ns_ = static_cast<uint64_t*>(memory);
  use_all_once();
}

/// A first use must not happen while a stream is parked.
void StreamTimer::use_all_once() {
  constexpr uint32_t kOpen = 0;  // where the gate begins
  check_cuda(cudaMemsetAsync(flush_, 0, kFlushBytes, stream_), "cudaMemsetAsync");
  check_cuda(cudaEventRecord(flushed_, stream_), "cudaEventRecord");
  for (const TimerClock clock : {TimerClock::kEvents, TimerClock::kMemoryWords, TimerClock::kKernels}) {
    park(clock, kOpen);
    stamp_begin(clock);
    stamp_end(clock, kOpen);
  }
  check_cuda(cudaStreamSynchronize(stream_), "the first use of the timer");
  gpu_timer_step_ns_ = timer_step_ns(stream_, begin_ns_);
}

StreamTimer::~StreamTimer() {
  // At the end of the program; a failure means that the context is lost, and all this with it.
  static_cast<void>(cudaFree(begin_ns_));
  static_cast<void>(cudaFreeHost(marks_));
  static_cast<void>(cudaFree(flush_));
  for (cudaEvent_t event : {flushed_, begin_, end_}) {
    static_cast<void>(cudaEventDestroy(event));
  }
  static_cast<void>(cudaStreamDestroy(stream_));
}

void StreamTimer::begin(ctl::BenchRendezvous* meeting, bool leads) {
  meeting_ = meeting;
  leads_ = leads;
  round_ = gate_->first_round();
}

void StreamTimer::wait_for(cudaEvent_t event, const char* what) const {
  const auto end = Clock::now() + kStuck;
  for (;;) {
    const cudaError_t state = cudaEventQuery(event);
    if (state == cudaSuccess) {
      return;
    }
    if (state != cudaErrorNotReady) {
      check_cuda(state, what);
    }
    if (Clock::now() > end) {
      throw_stuck(what);
    }
    std::this_thread::yield();
  }
}

/// The time when the word was seen to hold the round. Keeps its CPU, because a wake-up would be timed.
uint64_t StreamTimer::wait_word(uint32_t* word, uint32_t round, const char* what) const {
  const std::atomic_ref<uint32_t> place(*word);
  const auto end = Clock::now() + kStuck;
  auto ask = Clock::now() + kAskEvery;
  // Pairs with the release of the stream that wrote it.
  while (place.load(std::memory_order_acquire) != round) {
    const auto now = Clock::now();
    if (now < ask) {
      continue;
    }
    const cudaError_t state = cudaStreamQuery(stream_);
    if (state != cudaSuccess && state != cudaErrorNotReady) {
      check_cuda(state, what);
    }
    if (now > end) {
      throw_stuck(what);
    }
    ask = now + kAskEvery;
  }
  return now_ns();
}

double StreamTimer::time_us(const Timing& timing, const std::function<void()>& enqueue) {
  if (timing.clock == TimerClock::kMemoryWords && timing.start == Start::kAtOnce) {
    throw std::logic_error("words of memory have no beginning without a gate");
  }
  // Nobody parks a stream while another rank still prepares.
  meeting_->meet();
  const uint32_t round = round_++;
  try {
    return time_round(timing, round, enqueue);
  } catch (...) {
    // What unwinds from here frees memory, which never ends beside a parked stream.
    gate_->open_all();
    meeting_->abort();
    throw;
  }
}

double StreamTimer::time_round(const Timing& timing, uint32_t round, const std::function<void()>& enqueue) {
  check_cuda(cudaMemsetAsync(flush_, static_cast<int>(round & 0xff), kFlushBytes, stream_), "cudaMemsetAsync");
  if (timing.before) {
    timing.before();
  }
  if (timing.start == Start::kAtOnce || timing.clock == TimerClock::kEvents) {
    check_cuda(cudaEventRecord(flushed_, stream_), "cudaEventRecord");
  }
  if (timing.start == Start::kAtOnce) {
    wait_arrived(timing, round);
    meeting_->meet();
  } else {
    park(timing.clock, round);
  }
  stamp_begin(timing.clock);
  enqueue();
  stamp_end(timing.clock, round);
  if (timing.start == Start::kAtTheGate) {
    // A stream still at work when the gate opens would make its peers wait, and be timed as theirs.
    wait_arrived(timing, round);
    meeting_->meet();
    if (leads_) {
      const auto until = Clock::now() + timing.arm;
      while (Clock::now() < until) {
      }
      gate_->open(round);
    }
  }
  return wait_ended(timing.clock, round);
}

void StreamTimer::park(TimerClock clock, uint32_t round) {
  switch (clock) {
    case TimerClock::kEvents:
      return gate_->park(stream_, round);
    case TimerClock::kMemoryWords:
      gate_->write(stream_, &device_marks_->arrived, round);
      return gate_->park(stream_, round);
    case TimerClock::kKernels:
      return enqueue_gate(stream_, gate_->device_word(), device_marks_, round);
  }
}

void StreamTimer::stamp_begin(TimerClock clock) {
  switch (clock) {
    case TimerClock::kEvents:
      return check_cuda(cudaEventRecord(begin_, stream_), "cudaEventRecord");
    case TimerClock::kMemoryWords:
      return;  // the time when the gate opens
    case TimerClock::kKernels:
      return enqueue_begin(stream_, begin_ns_);
  }
}

void StreamTimer::stamp_end(TimerClock clock, uint32_t round) {
  switch (clock) {
    case TimerClock::kEvents:
      return check_cuda(cudaEventRecord(end_, stream_), "cudaEventRecord");
    case TimerClock::kMemoryWords:
      return gate_->write(stream_, &device_marks_->ended, round);
    case TimerClock::kKernels:
      return enqueue_end(stream_, begin_ns_, device_marks_, round);
  }
}

void StreamTimer::wait_arrived(const Timing& timing, uint32_t round) const {
  constexpr const char* kWhat = "the stream's way to the gate";
  if (timing.start == Start::kAtOnce || timing.clock == TimerClock::kEvents) {
    wait_for(flushed_, kWhat);
  } else {
    wait_word(&marks_->arrived, round, kWhat);
  }
}

double StreamTimer::wait_ended(TimerClock clock, uint32_t round) const {
  constexpr const char* kWhat = "the end of what was timed";
  if (clock == TimerClock::kEvents) {
    wait_for(end_, kWhat);
    float ms = 0;
    check_cuda(cudaEventElapsedTime(&ms, begin_, end_), "cudaEventElapsedTime");
    return double{ms} * 1e3;
  }
  const uint64_t seen_ns = wait_word(&marks_->ended, round, kWhat);
  return clock == TimerClock::kMemoryWords ? static_cast<double>(seen_ns - gate_->opened_ns()) / 1e3
                                           : static_cast<double>(marks_->end_ns - marks_->begin_ns) / 1e3;
}

}  // namespace expertd::bench
