// SPDX-License-Identifier: Apache-2.0
#include "tests/bench/table/replay.h"

#include <chrono>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

#include "tests/bench/cuda_check.h"

namespace expertd::bench {

namespace {

using Clock = std::chrono::steady_clock;

/// Longer than the deadline of any operation here, after which a replay ends by itself.
constexpr std::chrono::seconds kStuck{40};

}  // namespace

ReplayOperation::ReplayOperation(ctl::BenchRank* rank, std::unique_ptr<ctl::BenchOperation> inner, bool of_inputs)
    : rank_(rank), inner_(std::move(inner)), of_inputs_(of_inputs) {}

ReplayOperation::~ReplayOperation() {
  drop();
  if (rank_->group() != nullptr) {
    try {
      rank_->leave();
    } catch (const std::exception&) {
      // What led here has failed before, and the session ends next.
    }
  }
}

void ReplayOperation::drop() {
  if (graph_ != nullptr) {
    // A failure means that the context is lost, and the graph with it.
    static_cast<void>(cudaGraphExecDestroy(std::exchange(graph_, nullptr)));
  }
}

void ReplayOperation::prepare(uint32_t iteration) {
  inner_->prepare(iteration);
  if (graph_ != nullptr && !of_inputs_) {
    return;
  }
  drop();
  capture();
  expertd_event_t unused{};
  issue(&unused);
  static_cast<void>(wait());
}

void ReplayOperation::capture() {
  cudaGraph_t graph = nullptr;
  expertd_event_t unused{};  // stands for every replay, so that the host cannot wait for it
  // Of this thread alone: other ranks' threads and a busy client call CUDA meanwhile.
  check_cuda(cudaStreamBeginCapture(stream(), cudaStreamCaptureModeThreadLocal), "begin of a capture");
  try {
    inner_->issue(&unused);
  } catch (...) {
    // The stream has to leave the capture; what was captured is of no use.
    if (cudaStreamEndCapture(stream(), &graph) == cudaSuccess) {
      static_cast<void>(cudaGraphDestroy(graph));
    }
    throw;
  }
  check_cuda(cudaStreamEndCapture(stream(), &graph), "end of a capture");
  const cudaError_t made = cudaGraphInstantiate(&graph_, graph, 0);
  static_cast<void>(cudaGraphDestroy(graph));
  check_cuda(made, "cudaGraphInstantiate");
}

void ReplayOperation::issue(expertd_event_t* event) {
  check_cuda(cudaGraphLaunch(graph_, stream()), "cudaGraphLaunch");
  *event = {};
}

// With an end: the completion that a graph waits for does not come when the daemon is gone.
expertd_op_result_t ReplayOperation::wait() const {
  const auto end = Clock::now() + kStuck;
  for (cudaError_t state = cudaStreamQuery(stream()); state != cudaSuccess; state = cudaStreamQuery(stream())) {
    if (state != cudaErrorNotReady) {
      check_cuda(state, "a replay");
    }
    if (Clock::now() > end) {
      throw std::runtime_error("a replay did not end in " + std::to_string(kStuck.count()) + " s");
    }
    std::this_thread::yield();
  }
  auto result = EXPERTD_INIT(expertd_op_result_t);
  result.executor = EXPERTD_EXECUTOR_SM;
  return result;
}

}  // namespace expertd::bench
