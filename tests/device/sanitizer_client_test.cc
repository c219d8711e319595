// SPDX-License-Identifier: Apache-2.0
// Label gpu. Every kernel of the client library on small operations of several ranks, without one kernel that needs
// another to run (serial_copies.h): what compute-sanitizer can look at. Outputs are compared byte for byte with the
// host kernels. One GPU.
#include <algorithm>
#include <string>
#include <utility>

#include "tests/device/compare_outputs.h"
#include "tests/device/layout_job.h"
#include "tests/device/local_kernels_fixture.h"
#include "tests/device/serial_copies.h"
#include "tests/device/small_cases.h"

namespace expertd::device_test {
namespace {

class SanitizerClient : public LocalKernelsTest {
 protected:
  /// Whether there are no kernels of operations by copy engines.
  bool lacks_exchanges() const { return !kernels_->exchanges(); }

  /// What the library gives to these kernels: all ranks take part, and tokens come with their ids.
  static bool is_served(const RandomCase& made) {
    const base::RankSet all = base::RankSet::first(made.shape.ranks);
    const bool ids = std::all_of(made.inputs.begin(), made.inputs.end(),
                                 [](const RankInput& input) { return input.tokens == 0 || !input.topk_idx.empty(); });
    return made.shape.active_ranks == all && made.later_active == all && ids;
  }
  static void expect_ended(const CaseStep& step, uint32_t rank, uint64_t result) {
    EXPECT_EQ(step.host.reports[rank].reason, result);
    if (step.host.reports[rank].reason == 0) {
      expect_equal_outputs(step.host.ranks[rank], step.gpu->ranks[rank]);
    } else {
      expect_failed_outputs(step.made.shape, step.gpu->ranks[rank]);
    }
  }
};

TEST_F(SanitizerClient, HighThroughput) {
  if (lacks_exchanges()) {
    GTEST_SKIP() << "the library has no code for this GPU";
  }
  const auto accepts = [](const RandomCase& made) {
    return is_served(made) && SerialHighThroughput::serves(made.shape);
  };
  for_small_cases(OpKind::kDispatch, accepts, [&](RandomCase made, uint32_t /*round*/) {
    SCOPED_TRACE(support::repro_line(made));
    spoil(&made);
    SerialHighThroughput group(kernels_.get(), made.shape);
    run_steps(made, [&](const CaseStep& step) {
      group.run(step);
      for (uint32_t rank = 0; rank < made.shape.ranks; ++rank) {
        SCOPED_TRACE("kind " + std::to_string(static_cast<uint32_t>(step.made.shape.kind)) + ", cached " +
                     std::to_string(step.made.shape.cached) + ", rank " + std::to_string(rank));
        expect_ended(step, rank, group.result(rank));
      }
    });
  });
}

TEST_F(SanitizerClient, LowLatency) {
  if (lacks_exchanges()) {
    GTEST_SKIP() << "the library has no code for this GPU";
  }
  const auto accepts = [](const RandomCase& made) { return is_served(made) && SerialLowLatency::serves(made.shape); };
  for_small_cases(OpKind::kLlDispatch, accepts, [&](RandomCase made, uint32_t round) {
    SCOPED_TRACE(support::repro_line(made));
    spoil(&made);
    SerialLowLatency group(kernels_.get(), made.shape);
    run_steps(made, [&](const CaseStep& step) {
      group.run(step, round % 2 == 0);
      for (uint32_t rank = 0; rank < made.shape.ranks; ++rank) {
        SCOPED_TRACE("kind " + std::to_string(static_cast<uint32_t>(step.made.shape.kind)) + ", rank " +
                     std::to_string(rank));
        EXPECT_TRUE(group.ended(rank));
        expect_ended(step, rank, group.result(rank));
      }
    });
  });
}

TEST_F(SanitizerClient, Layout) {
  constexpr uint32_t kTokens[] = {0, 1, 63, 65, 200};
  Random random(11);
  uint64_t seq = 0;
  for (const uint32_t tokens : kTokens) {
    SCOPED_TRACE(std::to_string(tokens) + " tokens");
    Job job(make_ids(&random, tokens, 3));
    const uint32_t slot = static_cast<uint32_t>(++seq) % client::kLocalSlots;
    client::LocalRecord* record = kernels_->record(slot);
    record->failed = 0;
    const LayoutParams params = job.params(seq);
    record->maximum = int64_t{params.experts} - 1;
    const client::Status launched = kernels_->launch_layout(params, slot, cudaStreamLegacy);
    ASSERT_TRUE(launched.ok()) << launched.text;
    ASSERT_EQ(cudaSuccess, cudaDeviceSynchronize());
    EXPECT_EQ(seq, record->seq);
    job.expect_right();
  }
}

}  // namespace
}  // namespace expertd::device_test
