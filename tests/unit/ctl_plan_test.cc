// SPDX-License-Identifier: Apache-2.0
// Figures that were worked out by hand, and what the model must do whatever its figures are.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <random>

#include "client/ctl/plan.h"
#include "client/ctl/plan_model.h"

namespace expertd::ctl {
namespace {

using enum PlanMode;
using enum PlanOperation;

/// No fixed costs: times are those of links.
PlanLink bare_link() {
  PlanLink link;
  link.latency_us = 0;
  link.message_us = 0;
  link.operation_us = 0;
  link.nvlink_gb_per_s = 1e9;
  return link;
}

TEST(CtlPlan, LeftOutIsAQuotientOfBinomials) {
  EXPECT_DOUBLE_EQ(plan_left_out(4, 2, 1), 0.5);
  EXPECT_DOUBLE_EQ(plan_left_out(4, 2, 2), 1.0 / 6);  // C(2,2) / C(4,2)
  EXPECT_DOUBLE_EQ(plan_left_out(6, 2, 3), 0.2);      // C(4,3) / C(6,3)
  EXPECT_DOUBLE_EQ(plan_left_out(4, 2, 3), 0);        // three of four cannot miss two
  EXPECT_DOUBLE_EQ(plan_left_out(8, 8, 1), 0);
}

TEST(CtlPlan, UniformRoutingReachesNodesAsCounted) {
  PlanShape shape;
  shape.experts = 4;
  shape.top_k = 2;
  // Of the six pairs of four experts one leaves out a given node of two.
  EXPECT_DOUBLE_EQ(plan_reached(shape, 2), 5.0 / 6);
  EXPECT_DOUBLE_EQ(plan_reached(shape, 4), 0.5);
  EXPECT_DOUBLE_EQ(plan_reached(shape, 1), 1);
}

TEST(CtlPlan, OneExpertATokenIsOnEveryNodeEquallyOften) {
  PlanShape shape;
  shape.top_k = 1;
  EXPECT_DOUBLE_EQ(plan_estimate({}, shape, 8, kHighThroughput, kDispatch).other_nodes, 7.0 / 8);
}

TEST(CtlPlan, GroupsWithinNodesAndNodesWithinGroups) {
  PlanShape shape;
  shape.experts = 8;
  shape.top_k = 2;
  shape.expert_groups = 4;
  shape.groups_per_token = 2;
  // Two groups of two experts each are chosen. A node of four holds one group: chosen in half of the cases, and then
  // left out by one of the six pairs of four experts.
  EXPECT_DOUBLE_EQ(plan_reached(shape, 4), 0.5 * 5 / 6);
  // A node of eight holds half a group: chosen in half of the cases, one of four experts left.
  EXPECT_DOUBLE_EQ(plan_reached(shape, 8), 0.5 * 0.5);
  // A node of two holds two groups: both chosen (1 of 6), one (4 of 6), none (1 of 6).
  EXPECT_DOUBLE_EQ(plan_reached(shape, 2), 1.0 / 6 + 4.0 / 6 * 5 / 6);
  EXPECT_FALSE(plan_aligned(shape, 3));
  EXPECT_TRUE(plan_aligned(shape, 8));
}

TEST(CtlPlan, ReachedAgreesWithDrawing) {
  const char* const given = std::getenv("EXPERTD_SEED");
  const uint64_t seed = given == nullptr ? std::random_device{}() : std::strtoull(given, nullptr, 10);
  SCOPED_TRACE("EXPERTD_SEED=" + std::to_string(seed));
  std::mt19937_64 random(seed);
  PlanShape shape;
  shape.experts = 32;
  shape.top_k = 4;
  shape.expert_groups = 8;
  shape.groups_per_token = 3;
  for (const uint32_t places : {2U, 4U, 8U, 16U, 32U}) {
    constexpr int kDraws = 40000;
    int reached = 0;
    for (int draw = 0; draw < kDraws; ++draw) {
      std::vector<uint32_t> groups{0, 1, 2, 3, 4, 5, 6, 7};
      std::shuffle(groups.begin(), groups.end(), random);
      std::vector<uint32_t> experts;
      for (uint32_t expert = 0; expert < 32; ++expert) {
        if (std::find(groups.begin(), groups.begin() + 3, expert / 4) != groups.begin() + 3) {
          experts.push_back(expert);
        }
      }
      std::shuffle(experts.begin(), experts.end(), random);
      reached += std::any_of(experts.begin(), experts.begin() + 4,
                             [&](uint32_t expert) { return expert / (32 / places) == 0; })
                     ? 1
                     : 0;
    }
    // Six standard deviations of the largest there are.
    EXPECT_NEAR(plan_reached(shape, places), double(reached) / kDraws, 6 * 0.5 / std::sqrt(kDraws)) << places;
  }
}

/// Floors that were worked out apart from this model: 128 tokens at 47 GB/s, one row per (token, node).
TEST(CtlPlan, LowLatencyOverBareLinksIsTheFloor) {
  const PlanLink link = bare_link();
  const double dispatch_us[] = {20, 55, 93};
  const double combine_us[] = {39, 106, 181};
  for (int i = 0; i < 3; ++i) {
    const uint32_t nodes = 2U << i;
    EXPECT_NEAR(plan_estimate(link, {}, nodes, kLowLatency, kDispatch).link_us, dispatch_us[i], 0.6) << nodes;
    EXPECT_NEAR(plan_estimate(link, {}, nodes, kLowLatency, kCombine).link_us, combine_us[i], 0.6) << nodes;
  }
}

TEST(CtlPlan, BytesOfATokenOnAnotherNode) {
  PlanShape shape;
  shape.experts = 2;
  shape.top_k = 2;  // a token is on both nodes, always
  shape.tokens = 10;
  PlanLink link = bare_link();
  link.gpus_per_node = 1;
  const PlanEstimate fp8 = plan_estimate(link, shape, 2, kHighThroughput, kDispatch);
  EXPECT_DOUBLE_EQ(fp8.link_bytes, 10 * (7168 + 224));
  EXPECT_DOUBLE_EQ(fp8.node_bytes, 20 * (7168 + 224));
  EXPECT_DOUBLE_EQ(fp8.nvlink_bytes, 0);  // one GPU a node has none beside it
  EXPECT_DOUBLE_EQ(fp8.slowest, 1);       // nothing is left to chance
  EXPECT_DOUBLE_EQ(plan_estimate(link, shape, 2, kHighThroughput, kCombine).link_bytes, 10 * 14336);
}

TEST(CtlPlan, FixedCostsAddUp) {
  PlanShape shape;
  shape.experts = 2;
  shape.top_k = 2;
  shape.tokens = 47;  // 347424 bytes: two messages of 256 KiB, 7.392 µs
  shape.low_latency_tokens = 47;
  PlanLink link = bare_link();
  link.gpus_per_node = 1;
  link.latency_us = 3;
  link.message_us = 2;
  link.operation_us = 10;
  const PlanEstimate ht = plan_estimate(link, shape, 2, kHighThroughput, kDispatch);
  EXPECT_DOUBLE_EQ(ht.messages, 3);
  EXPECT_NEAR(ht.time_us, 10 + (3 + 2) + 3 + 7.392, 1e-3);
  EXPECT_NEAR(ht.efficiency, 7.392 / 25.392, 1e-3);
  EXPECT_NEAR(plan_estimate(link, shape, 2, kLowLatency, kDispatch).time_us, 10 + 3 + 7.392, 1e-3);
}

TEST(CtlPlan, OneNodeUsesNvlinkAlone) {
  PlanShape shape;
  shape.experts = 2;
  shape.top_k = 2;
  shape.tokens = 1000;
  PlanLink link;
  link.gpus_per_node = 2;
  link.operation_us = 0;
  const PlanEstimate it = plan_estimate(link, shape, 1, kHighThroughput, kCombine);
  EXPECT_DOUBLE_EQ(it.link_bytes, 0);
  EXPECT_DOUBLE_EQ(it.nvlink_bytes, 1000 * 14336);
  EXPECT_NEAR(it.time_us, 1000 * 14336 / 158e3, 1e-9);
}

TEST(CtlPlan, EfficiencyIsAShareAndFallsWithLatency) {
  PlanLink slow;
  slow.latency_us = 200;
  for (const PlanMode mode : {kHighThroughput, kLowLatency}) {
    for (const PlanOperation operation : {kDispatch, kCombine}) {
      for (uint32_t nodes = 2; nodes <= 64; nodes *= 2) {
        const PlanShape shape = plan_shape_of({}, nodes * 8);
        const PlanEstimate it = plan_estimate({}, shape, nodes, mode, operation);
        EXPECT_GT(it.efficiency, 0);
        EXPECT_LT(it.efficiency, 1);
        EXPECT_LT(plan_estimate(slow, shape, nodes, mode, operation).efficiency, it.efficiency);
      }
    }
  }
}

TEST(CtlPlan, ExpectedMaximum) {
  EXPECT_EQ(plan_expected_maximum(1), 0);
  EXPECT_NEAR(plan_expected_maximum(100), 2.508, 0.1);
  EXPECT_NEAR(plan_expected_maximum(512), 3.04, 0.1);
}

TEST(CtlPlan, RanksWithoutExpertsGetOneEach) {
  EXPECT_EQ(plan_shape_of({}, 256).experts, 256U);
  EXPECT_EQ(plan_shape_of({}, 512).experts, 512U);
}

TEST(CtlPlan, ProblemsSayWhatToChange) {
  EXPECT_EQ(plan_problem({}, {}), "");
  PlanLink link;
  link.nic_gb_per_s = 0;
  EXPECT_NE(plan_problem(link, {}), "");
  link = {};
  link.latency_us = -1;
  EXPECT_NE(plan_problem(link, {}), "");
  PlanShape shape;
  shape.expert_groups = 3;
  EXPECT_NE(plan_problem({}, shape), "");
  shape.expert_groups = 64;
  EXPECT_NE(plan_problem({}, shape), "");  // one group of four experts for eight
  shape.groups_per_token = 2;
  EXPECT_EQ(plan_problem({}, shape), "");
}

TEST(CtlPlan, EverythingPrintedIsCalledModelled) {
  const std::string text = plan_text({}, {});
  EXPECT_EQ(text.rfind("All figures are modelled", 0), 0U);
  EXPECT_NE(text.find("163-194, 318"), std::string::npos);
  const nlohmann::json json = plan_document({}, {});
  EXPECT_EQ(json.at("modelled"), true);
  ASSERT_EQ(json.at("rows").size(), 7U);
  for (const auto& row : json.at("rows")) {
    EXPECT_EQ(row.at("ht_dispatch").at("modelled"), true);
  }
  EXPECT_EQ(json.at("rows").back().at("specified_efficiency"), 0.85);
  EXPECT_TRUE(json.at("rows").front().at("specified_efficiency").is_null());
}

}  // namespace
}  // namespace expertd::ctl
