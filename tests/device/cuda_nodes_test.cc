// SPDX-License-Identifier: Apache-2.0
// Label gpu. The kernels of groups over several nodes on one GPU (nodes_group.h): random cases of every form, byte for
// byte against what host devices of as many nodes made of them. Skips where there is no GPU.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <string>
#include <utility>

#include "tests/device/compare_outputs.h"
#include "tests/device/large_cases.h"
#include "tests/device/nodes_group.h"
#include "tests/support/nodes_case.h"

namespace expertd::device_test {
namespace {

constexpr uint32_t kCases = 200;
constexpr uint32_t kGarbageCases = 40;
constexpr uint32_t kMaskedCases = 100;

using support::NodesCase;

class CudaNodes : public testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
      GTEST_SKIP() << "no GPU";
    }
    ASSERT_EQ(cudaSuccess, cudaSetDevice(0));
  }

  static void expect_ended(const NodesGroup& group, const GroupMemory& host, const GroupMemory& gpu, uint64_t active) {
    for (uint32_t r = 0; r < host.ranks.size(); ++r) {
      if (((active >> r) & 1) == 0) {
        continue;
      }
      SCOPED_TRACE("rank " + std::to_string(r));
      const kernels::cuda::PartFacts facts = group.facts(r);
      EXPECT_EQ(group.part(), facts.done);
      EXPECT_EQ(kernels::cuda::kVerdictGo, facts.verdict);
      expect_equal_reports(host.reports[r], facts.report);
      if (group.garbage) {
        continue;
      }
      if (host.reports[r].reason == 0) {
        expect_equal_outputs(host.ranks[r], gpu.ranks[r]);
      } else {
        expect_failed_outputs(host.params[r].shape, gpu.ranks[r]);
      }
    }
  }

  /// The dispatch that the hosts made last, on the GPU. False: it failed on both.
  static bool run_dispatch(NodesCase* it, NodesGroup* group, std::vector<int32_t>* matrix) {
    EXPECT_EQ("", it->world->finish());
    const auto& op = it->pending.back();
    if (op.random_case.shape.cached == 0) {
      *matrix = op.one.matrix;
    }
    auto unused = support::make_handles(op.random_case);
    GroupMemory gpu = support::make_dispatch(op.random_case, &unused);
    group->run({op.random_case, nullptr, nullptr, op.one, &gpu}, *matrix);
    expect_ended(*group, op.one, gpu, op.random_case.shape.active_ranks.low());
    const bool runs = !fails(op.one);
    it->pending.clear();
    return runs;
  }

  static void run_combine(NodesCase* it, NodesGroup* group, const std::vector<int32_t>& matrix) {
    it->start_combine();
    EXPECT_EQ("", it->world->finish());
    const auto& op = it->pending.back();
    GroupMemory gpu = support::make_combine(op.random_case, &it->handles, op.rows, op.in_rows);
    group->run({op.random_case, &op.rows, &op.in_rows, op.many, &gpu}, matrix);
    expect_ended(*group, op.many, gpu, op.random_case.shape.active_ranks.low());
    it->pending.clear();
  }

  /// Ranks that take part in the dispatch, and of those the ones that do in what follows: without a node, with one rank
  /// of each node, on one node alone, or any.
  static void mask(NodesCase* it) {
    const engine::Placement& placement = it->world->placement();
    const uint64_t all = (uint64_t{2} << (placement.ranks() - 1)) - 1;
    const auto draw = [&] {
      const uint32_t node = it->random.below(placement.nodes());
      uint64_t of_node = 0;
      uint64_t one_each = 0;
      for (uint32_t rank = 0; rank < placement.ranks(); ++rank) {
        of_node |= uint64_t{placement.node_of[rank] == node ? 1U : 0U} << rank;
      }
      for (const std::vector<uint32_t>& ranks : placement.ranks_of) {
        one_each |= uint64_t{1} << ranks[it->random.below(static_cast<uint32_t>(ranks.size()))];
      }
      const uint64_t any = it->random.next() | uint64_t{1} << it->random.below(placement.ranks());
      const uint64_t drawn[] = {all & ~of_node, of_node, one_each, any & all, all};
      return drawn[it->random.below(5)];
    };
    const uint64_t active = draw();
    const uint64_t later = active & draw();
    it->dispatch.shape.active_ranks = base::RankSet(active);
    it->dispatch.later_active = base::RankSet(later != 0 ? later : active);
  }

  static void run_masked(OpKind kind) {
    uint32_t ran = 0;
    for (const uint64_t seed : support::seeds_to_run(kMaskedCases)) {
      RandomCase made = support::make_random_case(seed, kind);
      if (made.shape.ranks < 2 || made.shape.ranks > base::kMaxGpuRanks || testing::Test::HasFailure()) {
        continue;
      }
      NodesCase it(seed, std::move(made));
      mask(&it);
      run_case(std::move(it), false);
      ++ran;
    }
    std::printf("ran %u cases\n", ran);
  }

  /// Dispatch, a cached dispatch (HT), and the combine with the same handle.
  static void run_case(NodesCase it, bool garbage) {
    SCOPED_TRACE(support::repro_line(it.dispatch) + " on " + std::to_string(it.nodes) + " nodes");
    spoil(&it.dispatch);
    NodesGroup group(it.dispatch.shape, it.world->placement(), &it.random);
    group.garbage = garbage;
    std::vector<int32_t> matrix;
    it.start_dispatch(it.dispatch);
    if (!run_dispatch(&it, &group, &matrix)) {
      return;
    }
    if (it.dispatch.shape.kind == OpKind::kDispatch) {
      it.start_cached();
      run_dispatch(&it, &group, &matrix);
    }
    run_combine(&it, &group, matrix);
  }

  static void run_cases(OpKind kind, uint32_t cases, bool garbage) {
    uint32_t ran = 0;
    for (const uint64_t seed : support::seeds_to_run(cases)) {
      RandomCase made = support::make_random_case(seed, kind);
      if (made.shape.ranks < 2 || made.shape.ranks > base::kMaxGpuRanks || testing::Test::HasFailure()) {
        continue;
      }
      run_case(NodesCase(seed, std::move(made)), garbage);
      ++ran;
    }
    std::printf("ran %u cases\n", ran);
  }
};

TEST_F(CudaNodes, HighThroughput) {
  run_cases(OpKind::kDispatch, kCases, false);
}

TEST_F(CudaNodes, LowLatency) {
  run_cases(OpKind::kLlDispatch, kCases, false);
}

TEST_F(CudaNodes, ManyTokens) {
  for (uint64_t seed = 2; seed < 6 && !HasFailure(); ++seed) {
    run_case(NodesCase(seed, make_large_case(seed, OpKind::kDispatch, 3)), false);
    run_case(NodesCase(seed, make_large_case(seed, OpKind::kLlDispatch, 4)), false);
  }
}

TEST_F(CudaNodes, LowLatencyEdges) {
  for (uint64_t seed = 2; seed < 10 && !HasFailure(); ++seed) {
    run_case(NodesCase(seed, make_edge_case(seed, 3)), false);
  }
}

TEST_F(CudaNodes, HighThroughputUnderMasks) {
  run_masked(OpKind::kDispatch);
}

TEST_F(CudaNodes, LowLatencyUnderMasks) {
  run_masked(OpKind::kLlDispatch);
}

TEST_F(CudaNodes, HighThroughputGarbage) {
  run_cases(OpKind::kDispatch, kGarbageCases, true);
}

TEST_F(CudaNodes, LowLatencyGarbage) {
  run_cases(OpKind::kLlDispatch, kGarbageCases, true);
}

}  // namespace
}  // namespace expertd::device_test
