// SPDX-License-Identifier: Apache-2.0
// Label gpu. The kernels of the client library by themselves, without a session: what its interface cannot ask for
// (several nodes), what operations of one moment could do to each other's scratch, and every path of the kernel.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "client/src/local_kernels/cuda_kernels.h"
#include "tests/support/random_case.h"
#include "tests/support/reference_moe.h"

namespace expertd::device_test {
namespace {

using client::LayoutParams;
using support::LayoutResult;
using support::Random;

struct Ids {
  kernels::OpShape shape;
  std::vector<int64_t> values;
  bool narrow = false;
};

Ids make_ids(Random* random, uint32_t tokens, uint32_t ranks) {
  Ids ids;
  ids.shape.tokens = tokens;
  ids.shape.ranks = ranks;
  ids.shape.local_experts = random->between(1, std::min(32u, 2048 / ranks));
  ids.shape.experts = ranks * ids.shape.local_experts;
  ids.shape.ranks_per_node = random->chance(50) ? ranks : random->between(1, ranks);
  ids.shape.top_k = random->chance(50) ? 8 : random->between(1, 32);
  ids.narrow = random->chance(50);
  for (uint32_t i = 0; i < tokens * ids.shape.top_k; ++i) {
    ids.values.push_back(random->chance(10) ? -1 : int64_t{random->below(ids.shape.experts)});
  }
  return ids;
}

/// Unified memory: the host writes and reads it while no kernel runs.
template <typename T>
class Array {
 public:
  explicit Array(size_t size) : size_(size) {
    EXPECT_EQ(cudaSuccess, cudaMallocManaged(&data_, std::max<size_t>(size, 1) * sizeof(T)));
    std::fill_n(data_, size, static_cast<T>(0x5a));
  }
  ~Array() { cudaFree(data_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  T* data() { return data_; }
  std::vector<T> values() const { return std::vector<T>(data_, data_ + size_); }

 private:
  size_t size_;
  T* data_ = nullptr;
};

/// One layout with memory of its own.
class Job {
 public:
  explicit Job(Ids ids)
      : ids_(std::move(ids)),
        wanted_(support::reference_layout(ids_.shape, ids_.values)),
        wide_(ids_.values.size()),
        narrow_(ids_.values.size()),
        ranks_(wanted_.tokens_per_rank.size()),
        nodes_(wanted_.tokens_per_node.size()),
        experts_(wanted_.tokens_per_expert.size()),
        mask_(wanted_.token_rank_mask.size()) {
    for (size_t i = 0; i < ids_.values.size(); ++i) {
      wide_.data()[i] = ids_.values[i];
      narrow_.data()[i] = static_cast<int32_t>(ids_.values[i]);
    }
  }
  LayoutParams params(uint64_t seq) {
    LayoutParams params;
    params.topk_idx = ids_.narrow ? static_cast<const void*>(narrow_.data()) : wide_.data();
    params.tokens_per_rank = ranks_.data();
    params.tokens_per_node = nodes_.data();
    params.tokens_per_expert = experts_.data();
    params.token_rank_mask = mask_.data();
    params.seq = seq;
    params.idx_bytes = ids_.narrow ? 4 : 8;
    params.tokens = ids_.shape.tokens;
    params.top_k = ids_.shape.top_k;
    params.experts = ids_.shape.experts;
    params.ranks = ids_.shape.ranks;
    params.ranks_per_node = ids_.shape.ranks_per_node;
    return params;
  }
  void expect_right() const {
    EXPECT_EQ(wanted_.tokens_per_rank, ranks_.values());
    EXPECT_EQ(wanted_.tokens_per_node, nodes_.values());
    EXPECT_EQ(wanted_.tokens_per_expert, experts_.values());
    EXPECT_TRUE(wanted_.token_rank_mask == mask_.values()) << "token_rank_mask";
  }

 private:
  const Ids ids_;
  const LayoutResult wanted_;
  Array<int64_t> wide_;
  Array<int32_t> narrow_;
  Array<int32_t> ranks_, nodes_, experts_;
  Array<uint8_t> mask_;
};

class ClientKernels : public testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
      GTEST_SKIP() << "no GPU";
    }
    ASSERT_EQ(cudaSuccess, cudaSetDevice(0));
    ASSERT_EQ(cudaSuccess, cudaFree(nullptr));
    ASSERT_TRUE(client::load_driver(&driver_).ok());
    client::cuda::Context context = nullptr;
    ASSERT_EQ(client::cuda::kSuccess, driver_.device_get(&device_, 0));
    ASSERT_EQ(client::cuda::kSuccess, driver_.primary_retain(&context, device_));
    ASSERT_EQ(client::cuda::kSuccess, driver_.stream_create(&own_stream_, client::cuda::kStreamNonBlocking));
    const client::Status made = client::CudaKernels::create(&driver_, context, device_, own_stream_, &kernels_);
    ASSERT_TRUE(made.ok()) << made.text;
    for (cudaStream_t& stream : streams_) {
      ASSERT_EQ(cudaSuccess, cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    }
  }
  void TearDown() override {
    if (kernels_ == nullptr) {
      return;
    }
    EXPECT_EQ(cudaSuccess, cudaDeviceSynchronize());
    kernels_.reset();
    for (cudaStream_t stream : streams_) {
      cudaStreamDestroy(stream);
    }
    driver_.stream_destroy(own_stream_);
    driver_.primary_release(device_);
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

  client::cuda::Driver driver_;
  client::cuda::Device device_ = 0;
  client::cuda::Stream own_stream_ = nullptr;
  std::unique_ptr<client::CudaKernels> kernels_;
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
