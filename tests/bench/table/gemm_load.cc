// SPDX-License-Identifier: Apache-2.0
#include "tests/bench/table/gemm_load.h"

#include <exception>
#include <stdexcept>

#include "tests/bench/cuda_check.h"
#include "tests/bench/table/gemm.h"

namespace expertd::bench {

GemmLoad::GemmLoad(int device) : device_(device), gemm_(Gemm::create()) {
  int least = 0;
  int greatest = 0;
  check_cuda(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
  check_cuda(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, least), "cudaStreamCreate");
  for (cudaEvent_t& event : events_) {
    check_cuda(cudaEventCreateWithFlags(&event, cudaEventBlockingSync), "cudaEventCreate");
  }
  // A first use must not happen while a stream is parked.
  for (cudaEvent_t event : events_) {
    gemm_->enqueue(stream_);
    check_cuda(cudaEventRecord(event, stream_), "cudaEventRecord");
  }
  check_cuda(cudaStreamSynchronize(stream_), "the first GEMMs");
}

GemmLoad::~GemmLoad() {
  running_.store(false);
  if (thread_.joinable()) {
    thread_.join();
  }
  // At the end of the program; a failure means that the context is lost, and all this with it.
  for (cudaEvent_t event : events_) {
    static_cast<void>(cudaEventDestroy(event));
  }
  static_cast<void>(cudaStreamDestroy(stream_));
}

const char* GemmLoad::kind() const {
  return gemm_->kind();
}

void GemmLoad::start() {
  times_ms_ = {};
  counts_ = {};
  failure_.clear();
  set_phase(LoadPhase::kOther);
  running_.store(true);
  thread_ = std::thread(&GemmLoad::run, this);
}

void GemmLoad::stop() {
  running_.store(false);
  if (thread_.joinable()) {
    thread_.join();
  }
  if (!failure_.empty()) {
    throw std::runtime_error("the load of GEMMs: " + failure_);
  }
}

void GemmLoad::run() {
  try {
    check_cuda(cudaSetDevice(device_), "cudaSetDevice");
    loop();
    check_cuda(cudaStreamSynchronize(stream_), "the last GEMMs");
  } catch (const std::exception& error) {
    failure_ = error.what();
  }
}

// From the end of a GEMM to the end of the next one: with as many in flight there is no gap between them but what
// others take.
void GemmLoad::loop() {
  for (uint64_t launched = 0; running_.load(std::memory_order_relaxed); ++launched) {
    gemm_->enqueue(stream_);
    check_cuda(cudaEventRecord(events_[launched % events_.size()], stream_), "cudaEventRecord");
    if (launched < kInFlight) {
      continue;
    }
    cudaEvent_t const before = events_[(launched - kInFlight) % events_.size()];
    cudaEvent_t const ended = events_[(launched - kInFlight + 1) % events_.size()];
    check_cuda(cudaEventSynchronize(ended), "a GEMM");
    float ms = 0;
    check_cuda(cudaEventElapsedTime(&ms, before, ended), "cudaEventElapsedTime");
    const auto phase = static_cast<size_t>(phase_.load(std::memory_order_relaxed));
    times_ms_[phase] += double{ms};
    ++counts_[phase];
  }
}

double GemmLoad::slowdown(LoadPhase phase) const {
  const auto mean = [this](LoadPhase of) {
    const auto at = static_cast<size_t>(of);
    return counts_[at] == 0 ? 0.0 : times_ms_[at] / static_cast<double>(counts_[at]);
  };
  const double alone = mean(LoadPhase::kAlone);
  return alone == 0 ? 0 : mean(phase) / alone;
}

}  // namespace expertd::bench
