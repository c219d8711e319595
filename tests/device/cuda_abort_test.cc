// SPDX-License-Identifier: Apache-2.0
// Label gpu. Parts that are ended early: before their doorbell, while a peer is missing, at any moment; the words they
// leave behind; the bounds of the queues. Skips where there is no GPU.
#include <chrono>
#include <cstdio>
#include <thread>
#include <utility>

#include "daemon/base/clock.h"
#include "tests/device/gpu_fixture.h"
#include "tests/support/random_case.h"

namespace expertd::device_test {
namespace {

using engine::Request;
using kernels::OpKind;

class CudaAborts : public GpuTest {};

/// A group for barriers.
kernels::OpShape barrier_shape(uint32_t ranks) {
  kernels::OpShape shape;
  shape.kind = OpKind::kBarrier;
  shape.ranks = ranks;
  shape.experts = ranks;
  shape.local_experts = 1;
  shape.top_k = 1;
  shape.hidden = 128;
  shape.max_tokens = 1;
  return shape;
}

std::vector<Request> barrier_requests(GpuGroup* group, uint64_t rung) {
  std::vector<Request> requests;
  for (uint32_t r = 0; r < group->size(); ++r) {
    requests.push_back(group->request(r, barrier_shape(group->size())));
    requests.back().doorbell_rung = ((rung >> r) & 1) != 0;
  }
  return requests;
}

constexpr uint64_t kAllRanks = (1u << GpuGroup::kMostRanks) - 1;

uint64_t all_ranks(const GpuGroup& group) {
  return kAllRanks >> (GpuGroup::kMostRanks - group.size());
}

/// Barriers on every page, each waiting for all doorbells: a word left wrong by an abort would show.
void expect_working(GpuGroup* group) {
  for (uint32_t i = 0; i < 2 * engine::kExchangePages; ++i) {
    auto requests = barrier_requests(group, 0);
    auto next = group->launch(&requests, all_ranks(*group));
    for (uint32_t r = 0; r < group->size(); ++r) {
      engine::Outcome early;
      std::this_thread::sleep_for(std::chrono::microseconds(200));
      EXPECT_FALSE(group->port(r).poll(next[r].id, &early)) << "ended before its doorbell rang";
      group->ring(r);
    }
    ASSERT_TRUE(group->drain(&next));
    for (uint32_t r = 0; r < group->size(); ++r) {
      EXPECT_EQ(next[r].outcome.report.reason, 0u);
    }
  }
}

/// Aborts all parts and expects them to drain in milliseconds with the reason, words included; then a barrier works.
void abort_and_recover(GpuGroup* group, std::vector<LaunchedPart>* parts, uint32_t reason) {
  const uint64_t begin = base::now_ns();
  for (uint32_t r = 0; r < group->size(); ++r) {
    group->port(r).abort((*parts)[r].id, reason);
  }
  ASSERT_TRUE(group->drain(parts));
  std::printf("abort drained in %.3f ms\n", static_cast<double>(base::now_ns() - begin) * 1e-6);
  EXPECT_LT(base::now_ns() - begin, 100'000'000u);
  for (uint32_t r = 0; r < group->size(); ++r) {
    EXPECT_EQ((*parts)[r].outcome.report.reason, reason);
    EXPECT_EQ(group->completion(r), std::pair(group->seq(), uint64_t{reason}));
  }
  expect_working(group);
}

TEST_F(CudaAborts, AbortBeforeTheDoorbell) {
  ASSERT_TRUE(group_->create_group(barrier_shape(group_->size())).is_ok());
  auto requests = barrier_requests(group_.get(), 0);
  auto parts = group_->launch(&requests, all_ranks(*group_));
  EXPECT_FALSE(group_->drain(&parts, 20'000'000));
  base::RankSet ranks;
  EXPECT_EQ(group_->port(0).missing(parts[0].id, &ranks), uint32_t{EXPERTD_MISSING_DOORBELL});
  EXPECT_EQ(ranks, base::RankSet(1));
  abort_and_recover(group_.get(), &parts, EXPERTD_REASON_CANCELLED);
  group_->destroy_group();
}

TEST_F(CudaAborts, AbortWhileAPeerIsMissing) {
  if (group_->size() < 2) {
    GTEST_SKIP() << "needs two GPUs";
  }
  ASSERT_TRUE(group_->create_group(barrier_shape(group_->size())).is_ok());
  auto requests = barrier_requests(group_.get(), 1);
  auto parts = group_->launch(&requests, all_ranks(*group_));
  EXPECT_FALSE(group_->drain(&parts, 20'000'000));
  base::RankSet ranks;
  EXPECT_EQ(group_->port(0).missing(parts[0].id, &ranks), uint32_t{EXPERTD_MISSING_COUNTS});
  EXPECT_EQ(ranks, base::RankSet(2));
  abort_and_recover(group_.get(), &parts, EXPERTD_REASON_TIMEOUT);
  group_->destroy_group();
}

TEST_F(CudaAborts, AbortAfterTheEndChangesNothing) {
  ASSERT_TRUE(group_->create_group(barrier_shape(group_->size())).is_ok());
  auto requests = barrier_requests(group_.get(), kAllRanks);
  auto parts = group_->launch(&requests, all_ranks(*group_));
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  for (uint32_t r = 0; r < group_->size(); ++r) {
    group_->port(r).abort(parts[r].id, EXPERTD_REASON_CANCELLED);
  }
  ASSERT_TRUE(group_->drain(&parts));
  for (uint32_t r = 0; r < group_->size(); ++r) {
    EXPECT_EQ(parts[r].outcome.report.reason, 0u);
    EXPECT_EQ(group_->completion(r).second, 0u);
  }
  group_->destroy_group();
}

TEST_F(CudaAborts, AbortAtAnyMoment) {
  ASSERT_TRUE(group_->create_group(barrier_shape(group_->size())).is_ok());
  support::Random random(5);
  uint32_t aborted = 0;
  for (uint32_t i = 0; i < 300 && !HasFailure(); ++i) {
    auto requests = barrier_requests(group_.get(), random.below(4));
    auto parts = group_->launch(&requests, all_ranks(*group_));
    for (uint32_t r = 0; r < group_->size(); ++r) {
      if (!requests[r].doorbell_rung && random.chance(60)) {
        group_->ring(r);
      }
    }
    std::this_thread::sleep_for(std::chrono::microseconds(random.below(60)));
    for (uint32_t r = 0; r < group_->size(); ++r) {
      group_->port(r).abort(parts[r].id, EXPERTD_REASON_CANCELLED);
    }
    ASSERT_TRUE(group_->drain(&parts));
    for (uint32_t r = 0; r < group_->size(); ++r) {
      const uint32_t reason = parts[r].outcome.report.reason;
      EXPECT_TRUE(reason == 0 || reason == EXPERTD_REASON_CANCELLED) << reason;
      EXPECT_EQ(group_->completion(r), std::pair(group_->seq(), uint64_t{reason}));
      aborted += reason != 0 ? 1 : 0;
    }
  }
  std::printf("%u of %u parts were aborted\n", aborted, 300 * group_->size());
  expect_working(group_.get());
  group_->destroy_group();
}

TEST_F(CudaAborts, QueuesAreBounded) {
  // Local operations without tokens, parked at their doorbells.
  kernels::OpShape shape = barrier_shape(1);
  shape.kind = OpKind::kLayout;
  Request request = group_->request(0, shape);
  request.doorbell_rung = false;
  std::vector<engine::PartId> ids;
  bool more = true;
  for (uint32_t i = 0; more && i < 200; ++i) {
    engine::LaunchSpec spec;
    spec.own = &request;
    engine::PartId id = 0;
    more = group_->port(0).launch(spec, {group_->words(0).flag_page, i % EXPERTD_RING_SLOTS_MAX, 1'000'000 + i}, &id);
    if (more) {
      ids.push_back(id);
    }
  }
  EXPECT_FALSE(more);
  EXPECT_GE(ids.size(), 8u);
  EXPECT_LE(ids.size(), 64u);
  for (const engine::PartId id : ids) {
    group_->port(0).abort(id, EXPERTD_REASON_CANCELLED);
  }
  const uint64_t until = base::now_ns() + kDrainNs;
  for (const engine::PartId id : ids) {
    engine::Outcome outcome;
    bool ended = false;
    while (!ended && base::now_ns() < until) {
      ended = group_->port(0).poll(id, &outcome);
    }
    ASSERT_TRUE(ended);
    while (!group_->port(0).settle(id) && base::now_ns() < until) {
    }
    EXPECT_EQ(outcome.report.reason, uint32_t{EXPERTD_REASON_CANCELLED});
  }
  EXPECT_FALSE(group_->port(0).busy());
}

}  // namespace
}  // namespace expertd::device_test
