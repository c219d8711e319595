// SPDX-License-Identifier: Apache-2.0
#include "tests/bench/table/stream_timer.h"

#include <string>
#include <thread>

#include "tests/bench/cuda_check.h"

namespace expertd::bench {

namespace {

using Clock = std::chrono::steady_clock;

/// Longer than the deadline of any operation here, so that its own message comes first.
constexpr std::chrono::seconds kStuck{40};

}  // namespace

StreamTimer::StreamTimer(Gate* gate) : gate_(gate) {
  int least = 0;
  int greatest = 0;
  check_cuda(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
  check_cuda(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, greatest), "cudaStreamCreate");
  check_cuda(cudaEventCreateWithFlags(&flushed_, cudaEventDisableTiming), "cudaEventCreate");
  check_cuda(cudaEventCreate(&begin_), "cudaEventCreate");
  check_cuda(cudaEventCreate(&end_), "cudaEventCreate");
  check_cuda(cudaMalloc(&flush_, kFlushBytes), "cudaMalloc");
  // Once each, because a first use must not happen while a stream is parked.
  check_cuda(cudaMemsetAsync(flush_, 0, kFlushBytes, stream_), "cudaMemsetAsync");
  for (cudaEvent_t event : {flushed_, begin_, end_}) {
    check_cuda(cudaEventRecord(event, stream_), "cudaEventRecord");
  }
  check_cuda(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
}

StreamTimer::~StreamTimer() {
  // At the end of the program; a failure means that the context is lost, and all this with it.
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
      throw std::runtime_error(std::string(what) + ": not reached in " + std::to_string(kStuck.count()) + " s");
    }
    std::this_thread::yield();
  }
}

double StreamTimer::time_us(Start start, std::chrono::nanoseconds arm, const std::function<void()>& enqueue) {
  // Nobody parks a stream while another rank still prepares.
  meeting_->meet();
  const uint32_t round = round_++;
  try {
    start == Start::kAtOnce ? time_at_once(enqueue) : time_round(round, arm, enqueue);
  } catch (...) {
    // What unwinds from here frees memory, which never ends beside a parked stream.
    gate_->open_all();
    meeting_->abort();
    throw;
  }
  float ms = 0;
  check_cuda(cudaEventElapsedTime(&ms, begin_, end_), "cudaEventElapsedTime");
  return double{ms} * 1e3;
}

void StreamTimer::time_at_once(const std::function<void()>& enqueue) {
  check_cuda(cudaMemsetAsync(flush_, 0, kFlushBytes, stream_), "cudaMemsetAsync");
  check_cuda(cudaEventRecord(flushed_, stream_), "cudaEventRecord");
  wait_for(flushed_, "the end of the flush");
  meeting_->meet();
  check_cuda(cudaEventRecord(begin_, stream_), "cudaEventRecord");
  enqueue();
  check_cuda(cudaEventRecord(end_, stream_), "cudaEventRecord");
  wait_for(end_, "the end of what was timed");
}

void StreamTimer::time_round(uint32_t round, std::chrono::nanoseconds arm, const std::function<void()>& enqueue) {
  check_cuda(cudaMemsetAsync(flush_, static_cast<int>(round & 0xff), kFlushBytes, stream_), "cudaMemsetAsync");
  check_cuda(cudaEventRecord(flushed_, stream_), "cudaEventRecord");
  gate_->park(stream_, round);
  check_cuda(cudaEventRecord(begin_, stream_), "cudaEventRecord");
  enqueue();
  check_cuda(cudaEventRecord(end_, stream_), "cudaEventRecord");
  // A stream still at work when the gate opens would make its peers wait, and be timed as theirs.
  wait_for(flushed_, "the stream's way to the gate");
  meeting_->meet();
  if (leads_) {
    const auto until = Clock::now() + arm;
    while (Clock::now() < until) {
    }
    gate_->open(round);
  }
  wait_for(end_, "the end of what was timed");
}

}  // namespace expertd::bench
