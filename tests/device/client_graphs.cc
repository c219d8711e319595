// SPDX-License-Identifier: Apache-2.0
#include "tests/device/client_graphs.h"

#include <cuda_runtime_api.h>

#include <array>

#include "tests/support/random_case.h"
#include "tests/support/temp_dir.h"

namespace expertd::device_test {
namespace {

using support::Outcome;

std::string text_of(const char* what, cudaError_t error) {
  return error == cudaSuccess ? std::string() : std::string(what) + ": " + cudaGetErrorName(error);
}

std::string text_of(const char* what, const Outcome& outcome) {
  return outcome.ok() ? std::string()
                      : std::string(what) + ": " + expertd_reason_name(outcome.status.reason) + " " + outcome.message;
}

cudaStream_t stream_of(void* stream) {
  return static_cast<cudaStream_t>(stream);
}

}  // namespace

/// One pair on the stream, whose experts give back what they got.
std::string Graphs::issue(uint32_t tokens) {
  Rounds& r = *rounds_;
  expertd_handle_t handle{};
  expertd_event_t event{};
  std::string problem = text_of("ll_dispatch", r.issue_ll_dispatch(tokens, 0, &handle, &event));
  problem = problem.empty() ? text_of("copy", r.give_back(handle)) : problem;
  return problem.empty() ? text_of("ll_combine", r.issue_ll_combine(tokens, 0, handle, r.combined_, &event)) : problem;
}

/// Two pairs: both dispatches are sent before the first is received, and both combines.
std::string Graphs::issue_doubled(uint32_t tokens) {
  Rounds& r = *rounds_;
  std::array<expertd_handle_t, 2> handles{};
  std::array<expertd_event_t, 2> events{};
  std::string problem;
  for (uint32_t i = 0; i < 2 && problem.empty(); ++i) {
    problem = text_of("ll_dispatch", r.issue_ll_dispatch(tokens, EXPERTD_ASYNC, &handles[i], &events[i]));
  }
  for (uint32_t i = 0; i < 2 && problem.empty(); ++i) {
    problem = text_of("receive", support::outcome_of(expertd_event_stream_wait(events[i], r.stream())));
    problem = problem.empty() ? text_of("copy", r.give_back(handles[i])) : problem;
  }
  for (uint32_t i = 0; i < 2 && problem.empty(); ++i) {
    uint16_t* out = i == 0 ? r.recv_x_ : r.combined_;  // the first one's is not looked at
    problem = text_of("ll_combine", r.issue_ll_combine(tokens, EXPERTD_ASYNC, handles[i], out, &events[i]));
  }
  for (uint32_t i = 0; i < 2 && problem.empty(); ++i) {
    problem = text_of("receive", support::outcome_of(expertd_event_stream_wait(events[i], r.stream())));
  }
  return problem;
}

std::string Graphs::capture_one(uint32_t tokens, bool doubled) {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  const cudaStream_t stream = stream_of(rounds_->stream());
  std::string problem = text_of("begin", cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  if (!problem.empty()) {
    return problem;
  }
  problem = doubled ? issue_doubled(tokens) : issue(tokens);
  const std::string ended = text_of("end", cudaStreamEndCapture(stream, &graph));
  problem = problem.empty() ? ended : problem;
  problem = problem.empty() ? text_of("instantiate", cudaGraphInstantiate(&executable, graph, 0)) : problem;
  if (problem.empty()) {
    graphs_.push_back({tokens, doubled, executable});
  }
  return problem;
}

std::string Graphs::capture() {
  std::string problem;
  for (const uint32_t tokens : {1u, 16u, 77u, Rounds::kTokens}) {
    problem = problem.empty() ? capture_one(tokens, false) : problem;
  }
  return problem.empty() ? capture_one(Rounds::kTokens / 2, true) : problem;
}

std::string Graphs::replay(uint64_t seed, uint64_t count, uint64_t idle_us) {
  support::Random random(seed);
  Rounds& r = *rounds_;
  for (uint64_t i = 0; i < count; ++i) {
    const uint32_t which = random.below(static_cast<uint32_t>(graphs_.size()) + 1);
    const uint32_t tokens = which < graphs_.size() ? graphs_[which].tokens : 50;
    std::string problem = text_of("upload", r.upload());
    problem = problem.empty()
                  ? text_of("poison", cudaMemsetAsync(r.combined_, 0xff, Rounds::kTokens * Rounds::kHidden * 2,
                                                      stream_of(r.stream())))
                  : problem;
    if (problem.empty() && which < graphs_.size()) {
      problem = text_of(
          "launch", cudaGraphLaunch(static_cast<cudaGraphExec_t>(graphs_[which].executable), stream_of(r.stream())));
    } else if (problem.empty()) {
      problem = issue(tokens);
    }
    const uint64_t until = support::monotonic_ns() + idle_us * 1000;
    while (support::monotonic_ns() < until) {
    }
    problem = problem.empty() ? text_of("fetch", r.fetch()) : problem;
    problem = problem.empty() ? r.check(tokens) : problem;
    if (!problem.empty()) {
      return "replay " + std::to_string(i) + " of seed " + std::to_string(seed) + ", graph " + std::to_string(which) +
             ": " + problem;
    }
  }
  return {};
}

std::string Graphs::time(double* pair_us) {
  constexpr int kReplays = 400;
  const cudaStream_t stream = stream_of(rounds_->stream());
  const auto executable = static_cast<cudaGraphExec_t>(graphs_[3].executable);
  std::string problem;
  for (int round = 0; round < 2 && problem.empty(); ++round) {
    const uint64_t begin = support::monotonic_ns();
    for (int i = 0; i < kReplays && problem.empty(); ++i) {
      problem = text_of("launch", cudaGraphLaunch(executable, stream));
    }
    problem = problem.empty() ? text_of("synchronize", cudaStreamSynchronize(stream)) : problem;
    *pair_us = static_cast<double>(support::monotonic_ns() - begin) / 1000 / kReplays;
  }
  return problem;
}

std::string Graphs::replay_alone() {
  const cudaStream_t stream = stream_of(rounds_->stream());
  const std::string problem =
      text_of("launch", cudaGraphLaunch(static_cast<cudaGraphExec_t>(graphs_[3].executable), stream));
  return problem.empty() ? text_of("synchronize", cudaStreamSynchronize(stream)) : problem;
}

}  // namespace expertd::device_test
