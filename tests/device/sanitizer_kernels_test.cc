// SPDX-License-Identifier: Apache-2.0
// Label gpu. Every kernel of the daemon on small operations of several ranks, without one kernel that needs another to
// run (serial_group.h): what compute-sanitizer can look at. Cases stand in the order of what is worth most when time is
// short; outputs are compared byte for byte with the host kernels. One GPU.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <array>
#include <string>
#include <utility>

#include "proto/abi/expertd_reason.h"
#include "tests/device/compare_outputs.h"
#include "tests/device/large_cases.h"
#include "tests/device/serial_group.h"
#include "tests/device/small_cases.h"

namespace expertd::device_test {
namespace {

class SanitizerKernels : public testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
      GTEST_SKIP() << "no GPU";
    }
    ASSERT_EQ(cudaSuccess, cudaSetDevice(0));
    ASSERT_EQ(cudaSuccess, cudaDeviceGetAttribute(&major_, cudaDevAttrComputeCapabilityMajor, 0));
  }

  /// True where the GPU has no bulk copies.
  bool lacks_links() const { return major_ < 9; }

  void expect_ended(SerialGroup* group, const CaseStep& step) {
    const uint64_t active = step.made.shape.active_ranks.low();
    for (uint32_t r = 0; r < step.made.shape.ranks; ++r) {
      if (((active >> r) & 1) == 0) {
        continue;
      }
      SCOPED_TRACE("rank " + std::to_string(r));
      const kernels::cuda::PartFacts facts = group->facts(r);
      EXPECT_EQ(group->part(), facts.done);
      EXPECT_EQ(kernels::cuda::kVerdictGo, facts.verdict);
      expect_equal_reports(step.host.reports[r], facts.report);
      EXPECT_EQ(group->seq(), group->words(r)[0]);
      EXPECT_EQ(step.host.reports[r].reason, group->words(r)[1]);
      if (step.host.reports[r].reason == 0) {
        expect_equal_outputs(step.host.ranks[r], step.gpu->ranks[r]);
      } else {
        expect_failed_outputs(step.made.shape, step.gpu->ranks[r]);
      }
    }
  }
  static void expect_aborted(SerialGroup* group, uint64_t active, uint32_t ranks) {
    for (uint32_t r = 0; r < ranks; ++r) {
      if (((active >> r) & 1) != 0) {
        EXPECT_EQ(group->part(), group->facts(r).done) << "rank " << r;
        EXPECT_EQ(kernels::cuda::kVerdictAborted, group->facts(r).verdict) << "rank " << r;
      }
    }
  }

  /// Every operation of a case, some behind the same one that was aborted, and ranks that are late in all ways.
  void run_case(RandomCase made, Kernels which, uint32_t round) {
    SCOPED_TRACE(support::repro_line(made));
    spoil(&made);
    SerialGroup group(made.shape, which);
    uint32_t number = round;
    run_steps(made, [&](const CaseStep& step) {
      if (round % 2 == 1) {
        group.run(step, Heard::kAborted);
        expect_aborted(&group, step.made.shape.active_ranks.low(), step.made.shape.ranks);
      }
      constexpr Heard kTimes[] = {Heard::kAtOnce, Heard::kAllLate, Heard::kLastLate};
      const uint32_t time = number++ % 3;
      SCOPED_TRACE("operation " + std::to_string(number - round) + ", heard " + std::to_string(time));
      group.run(step, kTimes[time]);
      expect_ended(&group, step);
    });
  }
  template <typename Accepts>
  void run_cases(OpKind kind, Kernels which, const Accepts& accepts) {
    for_small_cases(kind, accepts, [&](RandomCase made, uint32_t round) { run_case(std::move(made), which, round); });
  }

  int major_ = 0;
};

bool any(const RandomCase& /*made*/) {
  return true;
}

/// What the kernels of GPUs that reach each other serve.
bool is_linked(const RandomCase& made) {
  const kernels::OpShape& shape = made.shape;
  if (shape.kind == OpKind::kDispatch) {
    return shape.expanded == 0;
  }
  kernels::OpShape widest;
  widest.ranks = shape.ranks;
  widest.hidden = shape.hidden;
  widest.max_tokens = shape.max_tokens;
  return kernels::cuda::fits_low_latency(shape, kernels::cuda::low_latency_layout(widest, shape.top_k));
}

TEST_F(SanitizerKernels, LowLatency) {
  if (lacks_links()) {
    GTEST_SKIP() << "needs sm_90";
  }
  run_cases(OpKind::kLlDispatch, Kernels::kLinked, is_linked);
}

TEST_F(SanitizerKernels, HighThroughput) {
  if (lacks_links()) {
    GTEST_SKIP() << "needs sm_90";
  }
  run_cases(OpKind::kDispatch, Kernels::kLinked, is_linked);
}

TEST_F(SanitizerKernels, Captured) {
  if (lacks_links()) {
    GTEST_SKIP() << "needs sm_90";
  }
  run_cases(OpKind::kLlDispatch, Kernels::kCaptured, is_linked);
}

TEST_F(SanitizerKernels, GenericHighThroughput) {
  run_cases(OpKind::kDispatch, Kernels::kGeneric, any);
}

TEST_F(SanitizerKernels, GenericLowLatency) {
  run_cases(OpKind::kLlDispatch, Kernels::kGeneric, any);
}

TEST_F(SanitizerKernels, RelayHighThroughput) {
  run_cases(OpKind::kDispatch, Kernels::kRelay, any);
}

TEST_F(SanitizerKernels, RelayLowLatency) {
  run_cases(OpKind::kLlDispatch, Kernels::kRelay, any);
}

TEST_F(SanitizerKernels, Layout) {
  uint32_t ran = 0;
  for (const uint64_t seed : support::seeds_to_run(kSmallCases)) {
    const RandomCase made = support::make_random_case(seed, OpKind::kLayout);
    SCOPED_TRACE(support::repro_line(made));
    GroupMemory host = support::make_layout(made);
    GroupMemory gpu = support::make_layout(made);
    kernels::host::layout(host.params[0], &host.reports[0]);
    kernels::OpShape shape;
    shape.ranks = shape.experts = shape.local_experts = shape.top_k = shape.max_tokens = 1;
    shape.hidden = 128;
    SerialGroup group(shape, Kernels::kGeneric);
    group.run_layout(made, &gpu);
    EXPECT_EQ(group.part(), group.facts(0).done);
    EXPECT_EQ(host.reports[0].reason, group.facts(0).report.reason);
    expect_equal_outputs(host.ranks[0], gpu.ranks[0]);
    if (++ran == kSmallCases) {
      break;
    }
  }
}

TEST_F(SanitizerKernels, Barrier) {
  kernels::OpShape shape;
  shape.ranks = shape.experts = 3;
  shape.local_experts = shape.top_k = shape.max_tokens = 1;
  shape.hidden = 128;
  SerialGroup group(shape, Kernels::kGeneric);
  for (const uint64_t active : {uint64_t{7}, uint64_t{5}, uint64_t{2}}) {
    for (const Heard heard : {Heard::kAtOnce, Heard::kAllLate, Heard::kAborted, Heard::kAtOnce}) {
      group.run_barrier(active, heard);
      if (heard == Heard::kAborted) {
        expect_aborted(&group, active, shape.ranks);
        continue;
      }
      for (uint32_t r = 0; r < shape.ranks; ++r) {
        if (((active >> r) & 1) != 0) {
          EXPECT_EQ(group.part(), group.facts(r).done);
          EXPECT_EQ(group.seq(), group.words(r)[0]);
          EXPECT_EQ(0u, group.words(r)[1]);
        }
      }
    }
  }
}

TEST_F(SanitizerKernels, DoorbellsThatNameNothing) {
  if (lacks_links()) {
    GTEST_SKIP() << "needs sm_90";
  }
  kernels::OpShape shape;
  shape.kind = OpKind::kLlDispatch;
  shape.ranks = 1;
  shape.experts = shape.local_experts = 4;
  shape.top_k = shape.max_tokens = 1;
  shape.hidden = 128;
  SerialGroup group(shape, Kernels::kCaptured);
  for (const bool by_kernel : {false, true}) {
    // The first is no place of the table.
    for (const uint64_t rung : {uint64_t{kernels::cuda::kMostCapturedEntries} + 1, uint64_t{0xffffffffffff}}) {
      group.ring_captured(rung, by_kernel);
      const auto [completion, result, doorbell] = group.words(0);
      EXPECT_EQ(1u, completion);
      EXPECT_EQ(uint64_t{EXPERTD_REASON_DESCRIPTOR_MALFORMED}, result);
      EXPECT_EQ(0u, doorbell) << "it was taken";
      EXPECT_EQ(group.part(), group.facts(0).done);
    }
    group.ring_captured(EXPERTD_CAPTURE_CANCEL, by_kernel);
    EXPECT_EQ(kernels::cuda::kVerdictCancelled, group.facts(0).verdict);
    EXPECT_EQ(uint64_t{EXPERTD_CAPTURE_CANCEL}, group.words(0)[2]) << "it stays for the arms to come";
    group.renew_lane();
  }
}

TEST_F(SanitizerKernels, SwapsOfWords) {
  const Memory words(2 * sizeof(uint64_t));
  for (const uint64_t expected : {uint64_t{0}, uint64_t{5}}) {
    const kernels::cuda::SwapParams params{words.at<uint64_t>(), expected, 9, words.at<uint64_t>(8), expected + 1};
    ASSERT_EQ(cudaSuccess, kernels::cuda::launch_swap_word(params, cudaStreamLegacy));
    ASSERT_EQ(cudaSuccess, cudaDeviceSynchronize());
    EXPECT_EQ(9u, words.get<uint64_t>(1)[0]);
    EXPECT_EQ(expected + 1, words.get<uint64_t>(1, 8)[0]);
  }
}

// Paths that small cases do not reach: more lanes than rows are read at once, wide rows.
TEST_F(SanitizerKernels, ManyLanes) {
  if (lacks_links()) {
    GTEST_SKIP() << "needs sm_90";
  }
  run_case(make_edge_case(4, 2), Kernels::kLinked, 0);
  run_case(make_edge_case(2, 2), Kernels::kCaptured, 1);
}

// And more tokens than one block numbers.
TEST_F(SanitizerKernels, ManyTokens) {
  run_case(make_large_case(2, OpKind::kDispatch, 2), Kernels::kGeneric, 0);
  if (!lacks_links()) {
    RandomCase made = make_large_case(3, OpKind::kDispatch, 2);
    made.shape.expanded = 0;
    run_case(std::move(made), Kernels::kLinked, 1);
  }
}

}  // namespace
}  // namespace expertd::device_test
