// SPDX-License-Identifier: Apache-2.0
// Label gpu. The kernels of the client library by themselves, without a session: what its interface cannot ask for
// (several nodes), what operations of one moment could do to each other's scratch, and every path of the kernel.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "client/src/local_kernels/cuda_kernels.h"
#include "tests/device/layout_job.h"
#include "tests/device/local_kernels_fixture.h"
#include "tests/support/random_case.h"
#include "tests/support/reference_moe.h"

namespace expertd::device_test {
namespace {

using client::LayoutParams;
using support::Random;

class ClientKernels : public LocalKernelsTest {
 protected:
  void SetUp() override {
    LocalKernelsTest::SetUp();
    for (cudaStream_t& stream : streams_) {
      if (kernels_ != nullptr) {
        ASSERT_EQ(cudaSuccess, cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
      }
    }
  }
  void TearDown() override {
    if (kernels_ != nullptr) {
      EXPECT_EQ(cudaSuccess, cudaDeviceSynchronize());
      for (cudaStream_t stream : streams_) {
        cudaStreamDestroy(stream);
      }
    }
    LocalKernelsTest::TearDown();
  }
  void launch(const LayoutParams& params, uint32_t slot, cudaStream_t stream) {
    client::LocalRecord* record = kernels_->record(slot);
    record->failed = 0;
    record->maximum = int64_t{params.experts} - 1;
    const client::Status launched = kernels_->launch_layout(params, slot, stream);
    ASSERT_TRUE(launched.ok()) << launched.text;
  }
  void run(Job* job, uint32_t slot) {
    const uint64_t seq = ++seq_;
    launch(job->params(seq), slot, streams_[0]);
    ASSERT_EQ(cudaSuccess, cudaStreamSynchronize(streams_[0]));
    EXPECT_EQ(seq, kernels_->record(slot)->seq);
    uint64_t word = 0;
    ASSERT_EQ(cudaSuccess, cudaMemcpy(&word, kernels_->word(slot), sizeof(word), cudaMemcpyDeviceToHost));
    EXPECT_EQ(seq, word);
  }

  cudaStream_t streams_[4] = {};
  uint64_t seq_ = 0;
};

TEST_F(ClientKernels, LayoutEqualsTheReference) {
  constexpr uint32_t kTokens[] = {0, 1, 63, 64, 65, 127, 129, 1000, 4096, 12345, 65536};
  constexpr uint32_t kRanks[] = {1, 2, 3, 8, 16, 64, 64};
  for (const uint64_t seed : support::seeds_to_run(60)) {
    Random random(seed);
    const uint32_t tokens = kTokens[random.below(11)];
    Job job(make_ids(&random, tokens, tokens > 10'000 ? 8 : kRanks[random.below(7)]));
    SCOPED_TRACE("EXPERTD_SEED=" + std::to_string(seed) + ", " + std::to_string(tokens) + " tokens");
    run(&job, static_cast<uint32_t>(seed) % client::kLocalSlots);
    job.expect_right();
    EXPECT_EQ(0u, kernels_->record(static_cast<uint32_t>(seed) % client::kLocalSlots)->failed);
  }
}

TEST_F(ClientKernels, LayoutOfMoreRanksThanANodeHas) {
  Random random(1);
  for (const uint32_t tokens : {32u, 200u}) {
    Job job(make_ids(&random, tokens, client::kLayoutRanksMax));
    run(&job, 0);
    job.expect_right();
  }
}

TEST_F(ClientKernels, LayoutNamesTheFirstIdOutOfRange) {
  for (const uint32_t tokens : {40u, 5000u}) {
    Random random(tokens);
    Ids ids = make_ids(&random, tokens, 8);
    const size_t first = ids.values.size() / 2 + 3;
    ids.values[first] = ids.narrow ? -77 : int64_t{1} << 40;
    const int64_t bad = ids.values[first];
    ids.values[first + 1] = ids.shape.experts;
    ids.values.back() = -2;
    Job job(ids);
    run(&job, 5);
    EXPECT_EQ(1u, kernels_->record(5)->failed);
    EXPECT_EQ(bad, kernels_->record(5)->value);
    job.expect_right();
    Job good(make_ids(&random, tokens, 8));
    run(&good, 5);
    EXPECT_EQ(0u, kernels_->record(5)->failed) << "the slot remembers nothing";
    good.expect_right();
  }
}

TEST_F(ClientKernels, LayoutWithoutOutputs) {
  Random random(3);
  Job job(make_ids(&random, 300, 8));
  LayoutParams params = job.params(++seq_);
  params.tokens_per_rank = params.tokens_per_node = params.tokens_per_expert = nullptr;
  params.token_rank_mask = nullptr;
  launch(params, 0, streams_[0]);
  ASSERT_EQ(cudaSuccess, cudaStreamSynchronize(streams_[0]));
  EXPECT_EQ(seq_, kernels_->record(0)->seq);
}

TEST_F(ClientKernels, LayoutsOfAllSlotsAtOnce) {
  Random random(7);
  std::vector<std::unique_ptr<Job>> jobs;
  for (uint32_t slot = 0; slot < client::kLocalSlots; ++slot) {
    jobs.push_back(std::make_unique<Job>(make_ids(&random, 500 + 60 * slot, 8)));
  }
  for (int round = 0; round < 5; ++round) {
    for (uint32_t slot = 0; slot < client::kLocalSlots; ++slot) {
      launch(jobs[slot]->params(++seq_), slot, streams_[slot % 4]);
    }
    ASSERT_EQ(cudaSuccess, cudaDeviceSynchronize());
    for (const std::unique_ptr<Job>& job : jobs) {
      job->expect_right();
    }
  }
}

TEST_F(ClientKernels, ReachWhatIsAllocatedOnTheirGpu) {
  char* memory = nullptr;
  ASSERT_EQ(cudaSuccess, cudaMalloc(&memory, 1 << 20));
  client::Extent known;
  EXPECT_TRUE(kernels_->reaches(client::extent_of(memory + 100, 1000), &known));
  EXPECT_TRUE(known.contains(client::extent_of(memory, 1 << 20)));
  EXPECT_TRUE(kernels_->reaches(client::extent_of(memory + 5000, 1000), &known));
  int of_the_host = 0;
  client::Extent none;
  EXPECT_FALSE(kernels_->reaches(client::extent_of(&of_the_host, 4), &none));
  int count = 0;
  char* elsewhere = nullptr;
  if (cudaGetDeviceCount(&count) == cudaSuccess && count > 1) {
    ASSERT_EQ(cudaSuccess, cudaSetDevice(1));
    ASSERT_EQ(cudaSuccess, cudaMalloc(&elsewhere, 4096));
    EXPECT_FALSE(kernels_->reaches(client::extent_of(elsewhere, 4096), &none));
    cudaFree(elsewhere);
    ASSERT_EQ(cudaSuccess, cudaSetDevice(0));
  }
  cudaFree(memory);
}

}  // namespace
}  // namespace expertd::device_test
