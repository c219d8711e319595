// SPDX-License-Identifier: Apache-2.0
// Random operations of groups over two to four simulated nodes (one in twenty: over 9 to 12, with more than 64 ranks),
// against the same operations on one node: dispatches bit for bit, combines within what one rounding per node costs.
// Messages are delivered in a random order, through pools so small that everybody waits for buffers all the time. A
// failing case prints its EXPERTD_SEED.
#include <gtest/gtest.h>

#include <set>
#include <tuple>

#include "tests/support/nodes_case.h"

namespace expertd::support {
namespace {

using kernels::OpKind;
using kernels::OpShape;

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

/// The ranks of whole nodes are left out after an operation that they took part in.
TEST(HostNodes, NodesAreLeftOutOneAfterTheOther) {
  for (const uint64_t seed : seeds_to_run(kCases / 5)) {
    NodesCase run(seed, seed % 2 == 0 ? OpKind::kDispatch : OpKind::kLlDispatch);
    if (run.nodes == 0) {
      continue;
    }
    for (uint32_t left = run.nodes; left != 0; --left) {
      run.dispatch.later_active = run.dispatch.shape.active_ranks;
      ASSERT_EQ(run.run_dispatch(run.dispatch), "") << left << " nodes: " << repro_line(run.dispatch);
      ASSERT_EQ(run.run_combine(), "") << left << " nodes: " << repro_line(run.dispatch);
      for (const uint32_t rank : run.world->placement().ranks_of[left - 1]) {
        run.dispatch.shape.active_ranks.remove(rank);
      }
      if (run.dispatch.shape.active_ranks.empty()) {
        break;
      }
    }
    ASSERT_TRUE(run.world->network->quiet()) << repro_line(run.dispatch);
  }
}

/// Copies of rows that have to cross: one per token and other node with a rank that gets it.
size_t token_node_pairs(const NodesCase& run) {
  std::set<std::tuple<int32_t, int32_t, uint32_t>> pairs;
  const engine::Placement& placement = run.world->placement();
  const auto add = [&](uint32_t rank, const std::vector<RowOrigin>& rows) {
    const uint32_t node = placement.node_of[rank];
    for (const RowOrigin& row : rows) {
      if (row.source >= 0 && placement.node_of[static_cast<uint32_t>(row.source)] != node) {
        pairs.insert({row.source, row.token, node});
      }
    }
  };
  const OpShape& shape = run.dispatch.shape;
  if (shape.kind == OpKind::kDispatch) {
    const auto results = reference_dispatch(shape, run.dispatch.inputs);
    for (uint32_t rank = 0; rank < shape.ranks; ++rank) {
      add(rank, results[rank].rows);
    }
    return pairs.size();
  }
  const auto results = reference_ll_dispatch(shape, run.dispatch.inputs);
  for (uint32_t rank = 0; rank < shape.ranks; ++rank) {
    for (const std::vector<RowOrigin>& rows : results[rank].expert_rows) {
      add(rank, rows);
    }
  }
  return pairs.size();
}

TEST(HostNodes, ARowCrossesOncePerTokenAndNode) {
  for (const uint64_t seed : seeds_to_run(kCases / 2)) {
    NodesCase run(seed, seed % 2 == 0 ? OpKind::kDispatch : OpKind::kLlDispatch);
    if (run.nodes == 0) {
      continue;
    }
    size_t crossed = 0;
    run.world->network->tamper = [&](engine::MessageHeader* header, std::vector<std::byte>*) {
      crossed += header->kind == engine::MessageKind::kRows ? header->entries : 0;
      return true;
    };
    ASSERT_EQ(run.run_dispatch(run.dispatch), "") << repro_line(run.dispatch);
    ASSERT_EQ(crossed, token_node_pairs(run)) << repro_line(run.dispatch);
  }
}

TEST(HostNodes, NobodyLeavesABarrierBeforeAllCame) {
  for (const uint64_t seed : seeds_to_run(kCases / 4)) {
    NodesCase run(seed, OpKind::kDispatch);
    if (run.nodes == 0) {
      continue;
    }
    run.world->change = [](uint32_t /*rank*/, engine::Request* request) { request->shape.kind = OpKind::kBarrier; };
    auto handles = make_handles(run.dispatch);
    GroupMemory memory = make_dispatch(run.dispatch, &handles);
    ASSERT_EQ(run.world->run(run.dispatch, run.settings, nullptr, &memory), "") << repro_line(run.dispatch);
    uint64_t last_start_ns = 0;
    uint64_t first_end_ns = ~uint64_t{0};
    for (uint32_t rank = 0; rank < run.dispatch.shape.ranks; ++rank) {
      if (run.dispatch.shape.active_ranks.contains(rank)) {
        ASSERT_EQ(memory.reports[rank].reason, 0U) << repro_line(run.dispatch);
        last_start_ns = std::max(last_start_ns, run.world->outcome(rank).start_ns);
        first_end_ns = std::min(first_end_ns, run.world->outcome(rank).end_ns);
      }
      ASSERT_TRUE(outputs_untouched(memory.ranks[rank])) << repro_line(run.dispatch);
    }
    ASSERT_LE(last_start_ns, first_end_ns) << repro_line(run.dispatch);
    ASSERT_TRUE(run.world->network->quiet()) << repro_line(run.dispatch);
  }
}

}  // namespace
}  // namespace expertd::support
