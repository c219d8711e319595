// SPDX-License-Identifier: Apache-2.0
// Operations of a real daemon's host devices against the reference: every form once by name, then random cases.
#include <gtest/gtest.h>

#include "tests/integration/moe_case.h"
#include "tests/support/daemon_process.h"

namespace expertd::support {
namespace {

using kernels::OpKind;
using kernels::Payload;
using kernels::ScaleForm;

/// One daemon with 64 host devices for the whole file.
class Operations : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    daemon_ = std::make_unique<DaemonProcess>(64, std::vector<std::string>{"--engine-op-deadline=20s"});
    ASSERT_TRUE(daemon_->start());
  }
  static void TearDownTestSuite() { daemon_.reset(); }

  static std::string high_throughput(const Wish& wish, Place place = Place::kRegistered) {
    return run_case(daemon_->attach_socket(), make_case(OpKind::kDispatch, wish), place);
  }
  static std::string low_latency(const Wish& wish, Place place = Place::kRegistered) {
    return run_case(daemon_->attach_socket(), make_case(OpKind::kLlDispatch, wish), place);
  }
  static void run_random(OpKind kind, uint32_t cases);

  static std::unique_ptr<DaemonProcess> daemon_;
};
std::unique_ptr<DaemonProcess> Operations::daemon_;

TEST_F(Operations, DispatchAndCombineBf16) {
  EXPECT_EQ(high_throughput({.ranks = 3}), "");
}
TEST_F(Operations, DispatchAndCombineOfOneRank) {
  EXPECT_EQ(high_throughput({.ranks = 1}), "");
}
TEST_F(Operations, DispatchAndCombineOfEightRanks) {
  EXPECT_EQ(high_throughput({.ranks = 8, .top_k = 4}), "");
}
TEST_F(Operations, DispatchAndCombineThroughTheLibrarysCopies) {
  EXPECT_EQ(high_throughput({.ranks = 3}, Place::kStaged), "");
}
TEST_F(Operations, DispatchOfBytesWithASideTensor) {
  EXPECT_EQ(high_throughput({.payload = Payload::kBytes}), "");
}
TEST_F(Operations, DispatchOfASideTensorInColumns) {
  EXPECT_EQ(high_throughput({.payload = Payload::kBytes, .side_layout = 1}), "");
}
TEST_F(Operations, DispatchOfAPaddedSideTensorThroughTheLibrarysCopies) {
  EXPECT_EQ(high_throughput({.payload = Payload::kBytes, .side_layout = 2}, Place::kStaged), "");
}
TEST_F(Operations, ExpandedDispatchAndCombine) {
  EXPECT_EQ(high_throughput({.ranks = 3, .top_k = 4, .expanded = true, .alignment = 8}), "");
}
TEST_F(Operations, WorstTokensMarksTheRowsBehindTheLast) {
  EXPECT_EQ(high_throughput({.ranks = 3, .worst_tokens = true}), "");
  EXPECT_EQ(high_throughput({.ranks = 2, .worst_tokens = true}, Place::kStaged), "");
}
TEST_F(Operations, RoutingByMask) {
  EXPECT_EQ(high_throughput({.ranks = 4, .mask = true}), "");
}
TEST_F(Operations, CombineWithBiases) {
  EXPECT_EQ(high_throughput({.ranks = 3, .biases = true}), "");
}
TEST_F(Operations, CombineInTheOrderOfTheLastLane) {
  EXPECT_EQ(high_throughput({.ranks = 4, .top_k = 4, .last_lane = true}), "");
}
TEST_F(Operations, WithoutWeights) {
  EXPECT_EQ(high_throughput({.ranks = 2, .weights = false}), "");
}
TEST_F(Operations, ForeignWeightsAreKeptWhenAskedFor) {
  EXPECT_EQ(high_throughput({.ranks = 3, .keep_foreign_weights = true}), "");
}
TEST_F(Operations, NarrowIds) {
  EXPECT_EQ(high_throughput({.ranks = 3, .narrow_ids = true}), "");
}
TEST_F(Operations, ARankWithoutTokensTakesPart) {
  EXPECT_EQ(high_throughput({.ranks = 3, .empty_rank = 1}), "");
}
TEST_F(Operations, NoRankHasTokens) {
  EXPECT_EQ(high_throughput({.ranks = 3, .empty_rank = -2}), "");
}
TEST_F(Operations, ALargeHiddenSize) {
  EXPECT_EQ(high_throughput({.ranks = 2, .hidden = 7168, .tokens = 64}), "");
}

TEST_F(Operations, SixtyFourRanks) {
  EXPECT_EQ(high_throughput({.ranks = 64, .local_experts = 2, .top_k = 4, .hidden = 128, .tokens = 4}), "");
}

TEST_F(Operations, LowLatencyBf16) {
  EXPECT_EQ(low_latency({.ranks = 3}), "");
}
TEST_F(Operations, LowLatencyOfOneRank) {
  EXPECT_EQ(low_latency({.ranks = 1}), "");
}
TEST_F(Operations, LowLatencyOfEightRanks) {
  EXPECT_EQ(low_latency({.ranks = 8, .top_k = 4}), "");
}
TEST_F(Operations, LowLatencyFp8) {
  EXPECT_EQ(low_latency({.ranks = 2, .hidden = 512, .payload = Payload::kFp8}), "");
}
TEST_F(Operations, LowLatencyFp8WithRoundedScales) {
  EXPECT_EQ(low_latency({.hidden = 512, .payload = Payload::kFp8, .scale = ScaleForm::kRounded}), "");
}
TEST_F(Operations, LowLatencyFp8WithPackedExponents) {
  EXPECT_EQ(low_latency({.hidden = 512, .payload = Payload::kFp8, .scale = ScaleForm::kUe8m0}), "");
}
TEST_F(Operations, LowLatencyFp8ThroughTheLibrarysCopies) {
  EXPECT_EQ(low_latency({.hidden = 512, .payload = Payload::kFp8}, Place::kStaged), "");
}
TEST_F(Operations, LowLatencyBytesWithASideTensor) {
  EXPECT_EQ(low_latency({.payload = Payload::kBytes}), "");
}
TEST_F(Operations, LowLatencyBytesThroughTheLibrarysCopies) {
  EXPECT_EQ(low_latency({.payload = Payload::kBytes}, Place::kStaged), "");
}
TEST_F(Operations, LowLatencyWithARankWithoutTokens) {
  EXPECT_EQ(low_latency({.ranks = 3, .empty_rank = 0}), "");
}

TEST_F(Operations, LowLatencyInTheWindowWithoutACopy) {
  const RandomCase random_case = make_case(OpKind::kLlDispatch, {.ranks = 3, .hidden = 256});
  RankGroup group(daemon_->attach_socket(), "window", 3,
                  [&](expertd_group_options_t* options) { configure(random_case, options); });
  ASSERT_TRUE(group.ok()) << group.failure();
  const auto staged = [] {
    std::string text(expertd_client_metrics_text(nullptr, 0) + 1, '\0');
    text.resize(std::min(expertd_client_metrics_text(text.data(), text.size()), text.size()));
    return text.substr(text.find("\nexpertd_client_staged_copies_total "), 60);
  };
  const std::string before = staged();
  EXPECT_EQ(run_low_latency(&group, random_case, Place::kWindow, 5), "");
  EXPECT_EQ(staged(), before) << "nothing may be copied";
}

TEST_F(Operations, LowLatencyFp8InTheWindow) {
  for (const ScaleForm scale : {ScaleForm::kFloat32, ScaleForm::kUe8m0}) {
    EXPECT_EQ(low_latency({.hidden = 512, .payload = Payload::kFp8, .scale = scale}, Place::kWindow), "");
  }
}

void Operations::run_random(OpKind kind, uint32_t cases) {
  uint32_t number = 0;
  for (const uint64_t seed : seeds_to_run(cases)) {
    RandomCase random_case = make_random_case(seed, kind);
    random_case.shape.active_ranks = base::RankSet::first(random_case.shape.ranks);
    random_case.later_active = random_case.shape.active_ranks;
    const bool only_masks = std::any_of(random_case.inputs.begin(), random_case.inputs.end(),
                                        [](const RankInput& in) { return in.tokens > 0 && in.topk_idx.empty(); });
    if (only_masks || random_case.shape.ranks > 16) {
      continue;  // the interface carries ids always; 64 ranks have a test of their own
    }
    const auto dispatched = reference_dispatch(random_case.shape, random_case.inputs);
    for (uint32_t rank = 0; rank < random_case.shape.ranks && kind == OpKind::kDispatch; ++rank) {
      random_case.capacities[rank] = static_cast<uint32_t>(dispatched[rank].rows.size());
    }
    const bool in_window = kind == OpKind::kLlDispatch && random_case.shape.payload != Payload::kBytes;
    const Place places[] = {Place::kRegistered, Place::kStaged, in_window ? Place::kWindow : Place::kRegistered};
    if (kind == OpKind::kLlDispatch) {
      random_case.side_layout = 0;
    }
    ASSERT_EQ(run_case(daemon_->attach_socket(), random_case, places[number++ % 3]), "") << repro_line(random_case);
  }
}

TEST_F(Operations, RandomHighThroughputCases) {
  run_random(OpKind::kDispatch, 60);
}
TEST_F(Operations, RandomLowLatencyCases) {
  run_random(OpKind::kLlDispatch, 60);
}

}  // namespace
}  // namespace expertd::support
