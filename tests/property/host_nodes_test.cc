// SPDX-License-Identifier: Apache-2.0
// Random operations of groups over two to four simulated nodes, against the same operations on one node: dispatches bit
// for bit, combines within what one rounding per node costs. Messages are delivered in a random order, through pools so
// small that everybody waits for buffers all the time. A failing case prints its EXPERTD_SEED.
#include <gtest/gtest.h>

#include "tests/support/nodes_case.h"

namespace expertd::support {
namespace {

using kernels::OpKind;

constexpr uint32_t kCases = 300;

TEST(HostNodes, HighThroughputEqualsOneNode) {
  for (const uint64_t seed : seeds_to_run(kCases)) {
    NodesCase run(seed, OpKind::kDispatch);
    if (run.nodes == 0) {
      continue;
    }
    ASSERT_EQ(run.run_dispatch(run.dispatch), "") << repro_line(run.dispatch);
    ASSERT_EQ(run.run_combine(), "") << repro_line(run.dispatch);
    ASSERT_EQ(run.run_cached(), "") << repro_line(run.dispatch);
    ASSERT_EQ(run.run_combine(), "") << "after cached: " << repro_line(run.dispatch);
    ASSERT_TRUE(run.world->network->quiet()) << repro_line(run.dispatch);
  }
}

TEST(HostNodes, LowLatencyEqualsOneNode) {
  for (const uint64_t seed : seeds_to_run(kCases)) {
    NodesCase run(seed, OpKind::kLlDispatch);
    if (run.nodes == 0) {
      continue;
    }
    ASSERT_EQ(run.run_dispatch(run.dispatch), "") << repro_line(run.dispatch);
    ASSERT_EQ(run.run_combine(), "") << repro_line(run.dispatch);
    ASSERT_TRUE(run.world->network->quiet()) << repro_line(run.dispatch);
  }
}

/// Ranks come to the operations at different times, so that messages of later ones arrive early.
TEST(HostNodes, OperationsFollowEachOtherWithoutWaiting) {
  for (const uint64_t seed : seeds_to_run(kCases / 2)) {
    NodesCase run(seed, seed % 2 == 0 ? OpKind::kDispatch : OpKind::kLlDispatch);
    if (run.nodes == 0) {
      continue;
    }
    run.dispatch.later_active = run.dispatch.shape.active_ranks;
    for (uint32_t round = 0; round < 2; ++round) {
      run.start_dispatch(run.dispatch);
      run.start_combine();
      if (!run.settings.low_latency) {
        run.start_cached();
      }
      run.start_combine();
    }
    ASSERT_EQ(run.finish(), "") << repro_line(run.dispatch);
    ASSERT_TRUE(run.world->network->quiet()) << repro_line(run.dispatch);
  }
}

}  // namespace
}  // namespace expertd::support
