// SPDX-License-Identifier: Apache-2.0
// Label gpu. Random cases of every operation through the ports of up to four GPUs, byte for byte against the host
// kernels (which the property tests hold to the reference) and the ends of operations against the reference itself.
// Skips where there is no GPU.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <functional>
#include <thread>

#include "tests/device/case_requests.h"
#include "tests/device/compare_outputs.h"
#include "tests/device/gpu_fixture.h"
#include "tests/device/large_cases.h"
#include "tests/support/random_case_host.h"

namespace expertd::device_test {
namespace {

constexpr uint32_t kCases = 1500;  // about one in five has few enough ranks

class CudaKernels : public GpuTest {};

/// The same with the kernels of sm_80 on any GPU.
class CudaGeneric : public GpuTestWith<true, true> {};

/// The same without peer access between the GPUs.
class CudaRelay : public GpuTestWith<false> {
 protected:
  void SetUp() override {
    GpuTestWith<false>::SetUp();
    if (!IsSkipped() && group_->size() < 2) {
      GTEST_SKIP() << "needs two GPUs";
    }
  }
};

/// The same, alone in the arena.
Request make_request(GpuGroup* group, uint32_t rank, const RankInput& input, const support::CombineInput* rows,
                     GroupMemory* memory) {
  group->arena(rank).reset();
  return add_request(group, rank, input, rows, memory);
}

/// Longer than a kernel waits for another rank, so that the rest of its part is left to the kernel behind the stream's
/// wait.
void be_late() {
  const uint64_t until = base::now_ns() + 300'000;
  while (base::now_ns() < until) {
  }
}

/// Runs one operation on the GPUs and compares it with what the host kernels made of it.
void run_and_compare(GpuGroup* group, const CaseStep& step) {
  const RandomCase& random_case = step.made;
  const std::vector<support::CombineInput>* rows = step.rows;
  const std::vector<uint32_t>* in_rows = step.in_rows;
  const GroupMemory& host = step.host;
  GroupMemory* gpu = step.gpu;
  const kernels::OpShape& shape = random_case.shape;
  std::vector<Request> requests;
  for (uint32_t r = 0; r < shape.ranks; ++r) {
    requests.push_back(make_request(group, r, random_case.inputs[r], rows == nullptr ? nullptr : &(*rows)[r], gpu));
    if (in_rows != nullptr) {
      requests.back().shape.capacity_rows = (*in_rows)[r];
    }
    requests.back().doorbell_rung = random_case.seed % 2 == 0;
    group->arena(r).upload(group->device_index(r));
  }
  auto parts = group->launch(&requests, shape.active_ranks.low());
  for (uint32_t r = 0; r < shape.ranks && random_case.seed % 2 != 0; ++r) {
    if (r != 0 && random_case.seed % 4 == 1) {
      be_late();
    }
    group->ring(r);
  }
  if (!group->drain(&parts)) {
    for (uint32_t r = 0; r < shape.ranks; ++r) {
      base::RankSet ranks;
      ADD_FAILURE() << "rank " << r << " waits for " << group->port(r).missing(parts[r].id, &ranks) << " of "
                    << ranks.low();
      group->port(r).abort(parts[r].id, EXPERTD_REASON_TIMEOUT);
    }
    ASSERT_TRUE(group->drain(&parts)) << "not even an abort ended the parts";
    return;
  }
  for (uint32_t r = 0; r < shape.ranks; ++r) {
    if (!shape.active_ranks.contains(r)) {
      continue;
    }
    SCOPED_TRACE("rank " + std::to_string(r));
    group->arena(r).download(group->device_index(r));
    expect_equal_reports(host.reports[r], parts[r].outcome.report);
    const auto [completion, result] = group->completion(r);
    EXPECT_EQ(completion, group->seq());
    EXPECT_EQ(result, host.reports[r].reason);
    EXPECT_GE(parts[r].outcome.end_ns, parts[r].outcome.start_ns);
    EXPECT_GE(parts[r].outcome.start_ns, parts[r].outcome.launch_ns);
    EXPECT_EQ(parts[r].outcome.executor, static_cast<uint32_t>(EXPERTD_COMPLETION_EXECUTOR_SM));
    EXPECT_GE(parts[r].outcome.sms, 1u);
    EXPECT_LE(parts[r].outcome.sms, group->multiprocessors(r));
    if (host.reports[r].reason == 0) {
      expect_equal_outputs(host.ranks[r], gpu->ranks[r]);
    } else {
      expect_failed_outputs(shape, gpu->ranks[r]);
    }
  }
}

/// All operations of a case, in a group of their own.
void run_case(GpuGroup* group, RandomCase random_case) {
  SCOPED_TRACE(support::repro_line(random_case));
  spoil(&random_case);
  const base::Status created = group->create_group(random_case.shape);
  ASSERT_TRUE(created.is_ok()) << created.message();
  run_steps(random_case, [group](const CaseStep& step) { run_and_compare(group, step); });
  group->destroy_group();
}

void run_cases(GpuGroup* group, OpKind kind) {
  uint32_t ran = 0;
  for (const uint64_t seed : support::seeds_to_run(kCases)) {
    RandomCase random_case = support::make_random_case(seed, kind);
    if (random_case.shape.ranks > group->size() || testing::Test::HasFatalFailure()) {
      continue;
    }
    run_case(group, std::move(random_case));
    ++ran;
  }
  testing::Test::RecordProperty("cases", static_cast<int>(ran));
  std::printf("ran %u cases on %u GPUs\n", ran, group->size());
}

TEST_F(CudaKernels, HighThroughput) {
  run_cases(group_.get(), OpKind::kDispatch);
}

TEST_F(CudaKernels, LowLatency) {
  run_cases(group_.get(), OpKind::kLlDispatch);
}

TEST_F(CudaKernels, ManyTokens) {
  for (uint64_t seed = 2; seed < 12 && !HasFatalFailure(); ++seed) {
    run_case(group_.get(), make_large_case(seed, OpKind::kDispatch, group_->size()));
    run_case(group_.get(), make_large_case(seed, OpKind::kLlDispatch, group_->size()));
  }
}

/// Dispatches and their combines, all launched before any has ended, so that ranks run into each other's operations.
void run_back_to_back(GpuGroup* group, const RandomCase& first) {
  SCOPED_TRACE(support::repro_line(first));
  Pairs pairs;
  ASSERT_TRUE(group->create_group(first.shape).is_ok());
  make_pairs(group, first, &pairs);
  const auto& ops = pairs.ops;
  for (uint32_t r = 0; r < group->size(); ++r) {
    group->arena(r).upload(group->device_index(r));
  }
  for (const auto& op : ops) {
    op->parts = group->launch(&op->requests, op->made.shape.active_ranks.low());
  }
  for (const auto& op : ops) {
    ASSERT_TRUE(group->drain(&op->parts));
  }
  for (uint32_t r = 0; r < group->size(); ++r) {
    if (!first.shape.active_ranks.contains(r)) {
      continue;
    }
    group->arena(r).download(group->device_index(r));
    for (size_t i = 0; i < ops.size(); ++i) {
      SCOPED_TRACE("rank " + std::to_string(r) + ", operation " + std::to_string(i));
      expect_equal_reports(ops[i]->host.reports[r], ops[i]->parts[r].outcome.report);
      expect_equal_outputs(ops[i]->host.ranks[r], ops[i]->gpu.ranks[r]);
    }
  }
  group->destroy_group();
}

TEST_F(CudaKernels, LowLatencyBackToBack) {
  uint32_t ran = 0;
  for (uint64_t seed = 1; ran < 60 && !HasFailure(); ++seed) {
    const RandomCase random_case = support::make_random_case(seed, OpKind::kLlDispatch);
    const base::RankSet all = base::RankSet::first(group_->size());
    if (random_case.shape.ranks == group_->size() && random_case.shape.active_ranks == all) {
      run_back_to_back(group_.get(), random_case);
      ++ran;
    }
  }
}

TEST_F(CudaKernels, LowLatencyEdges) {
  for (uint64_t seed = 2; seed < 26 && !HasFatalFailure(); ++seed) {
    run_case(group_.get(), make_edge_case(seed, group_->size()));
  }
}

/// Launches an operation and aborts it at a random moment, some doorbells not rung. True when it was in time.
bool launch_and_abort(GpuGroup* group, support::Random* random, std::vector<Request>* requests) {
  for (uint32_t r = 0; r < group->size(); ++r) {
    (*requests)[r].doorbell_rung = random->chance(50);
    group->arena(r).upload(group->device_index(r));
  }
  auto parts = group->launch(requests, (uint64_t{1} << group->size()) - 1);
  for (uint32_t r = 0; r < group->size(); ++r) {
    if (!(*requests)[r].doorbell_rung && random->chance(60)) {
      group->ring(r);
    }
  }
  std::this_thread::sleep_for(std::chrono::microseconds(random->below(80)));
  bool aborted = false;
  for (uint32_t r = 0; r < group->size(); ++r) {
    group->port(r).abort(parts[r].id, EXPERTD_REASON_CANCELLED);
  }
  EXPECT_TRUE(group->drain(&parts));
  for (uint32_t r = 0; r < group->size(); ++r) {
    const uint32_t reason = parts[r].outcome.report.reason;
    EXPECT_TRUE(reason == 0 || reason == EXPERTD_REASON_CANCELLED) << reason;
    aborted = aborted || reason != 0;
  }
  return aborted;
}

/// Dispatches and combines that are aborted at random moments; after each pair the whole of the case, in the same
/// places.
void abort_cases(GpuGroup* group, const std::function<RandomCase(uint64_t)>& make) {
  support::Random random(9);
  uint32_t aborted = 0;
  for (uint64_t seed = 2; seed < 80 && !testing::Test::HasFailure(); seed += 2) {
    const RandomCase made = make(seed);
    auto handles = support::make_handles(made);
    GroupMemory dispatch = support::make_dispatch(made, &handles);
    std::vector<uint32_t> in_rows;
    const auto rows = make_rows(made, &in_rows);
    GroupMemory combine = support::make_combine(combine_of(made), &handles, rows, in_rows);
    ASSERT_TRUE(group->create_group(made.shape).is_ok());
    for (GroupMemory* memory : {&dispatch, &combine}) {
      std::vector<Request> requests;
      for (uint32_t r = 0; r < group->size(); ++r) {
        const bool has_rows = memory == &combine;
        requests.push_back(make_request(group, r, made.inputs[r], has_rows ? &rows[r] : nullptr, memory));
      }
      aborted += launch_and_abort(group, &random, &requests) ? 1 : 0;
    }
    group->destroy_group();
    run_case(group, made);  // parts stand where the aborted ones stood
  }
  std::printf("%u operations were aborted\n", aborted);
}

TEST_F(CudaKernels, LowLatencyAborts) {
  abort_cases(group_.get(), [&](uint64_t seed) { return make_edge_case(seed, group_->size()); });
}

TEST_F(CudaKernels, HighThroughputAborts) {
  abort_cases(group_.get(), [&](uint64_t seed) {
    RandomCase made = make_large_case(seed, OpKind::kDispatch, group_->size());
    made.shape.expanded = 0;
    return made;
  });
}

TEST_F(CudaGeneric, HighThroughput) {
  run_cases(group_.get(), OpKind::kDispatch);
}

TEST_F(CudaGeneric, LowLatency) {
  run_cases(group_.get(), OpKind::kLlDispatch);
}

TEST_F(CudaGeneric, ManyTokens) {
  for (uint64_t seed = 2; seed < 8 && !HasFatalFailure(); ++seed) {
    run_case(group_.get(), make_large_case(seed, OpKind::kDispatch, group_->size()));
    run_case(group_.get(), make_large_case(seed, OpKind::kLlDispatch, group_->size()));
  }
}

TEST_F(CudaRelay, HighThroughput) {
  run_cases(group_.get(), OpKind::kDispatch);
}

TEST_F(CudaRelay, LowLatency) {
  run_cases(group_.get(), OpKind::kLlDispatch);
}

TEST_F(CudaRelay, ManyTokens) {
  for (uint64_t seed = 2; seed < 8 && !HasFatalFailure(); ++seed) {
    run_case(group_.get(), make_large_case(seed, OpKind::kDispatch, group_->size()));
    run_case(group_.get(), make_large_case(seed, OpKind::kLlDispatch, group_->size()));
  }
}

TEST_F(CudaKernels, Layout) {
  for (const uint64_t seed : support::seeds_to_run(kCases / 10)) {
    RandomCase random_case = support::make_random_case(seed, OpKind::kLayout);
    SCOPED_TRACE(support::repro_line(random_case));
    GroupMemory host = support::make_layout(random_case);
    GroupMemory gpu = support::make_layout(random_case);
    kernels::host::layout(host.params[0], &host.reports[0]);
    std::vector<Request> requests = {make_request(group_.get(), 0, random_case.inputs[0], nullptr, &gpu)};
    group_->arena(0).upload(group_->device_index(0));
    auto parts = group_->launch(&requests, 1, true);
    ASSERT_TRUE(group_->drain(&parts));
    group_->arena(0).download(group_->device_index(0));
    EXPECT_EQ(host.reports[0].reason, parts[0].outcome.report.reason);
    expect_equal_outputs(host.ranks[0], gpu.ranks[0]);
  }
}

}  // namespace
}  // namespace expertd::device_test
