// SPDX-License-Identifier: Apache-2.0
// Label gpu. The kernels of operations by copy engines by themselves: two ranks on one GPU, with streams of the test in
// place of the daemon's chains. What processes cannot arrange: few places, ranks that are late by a known time, kernels
// that their operation has outlived, halves in any order.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "client/src/local_kernels/cuda_kernels.h"
#include "tests/device/exchange_rank.h"
#include "tests/device/fill_gpu.h"
#include "tests/device/local_kernels_fixture.h"

namespace expertd::device_test {
namespace {

using client::ExchangeKernel;
using client::ExchangeParams;
using client::kExchangeReceive;
using client::kExchangeSend;

constexpr uint32_t kBoth = kExchangeSend | kExchangeReceive;

client::cuda::Stream driver_stream(cudaStream_t stream) {
  return reinterpret_cast<client::cuda::Stream>(stream);
}

class ExchangeKernels : public LocalKernelsTest {
 protected:
  void SetUp() override {
    LocalKernelsTest::SetUp();
    if (kernels_ == nullptr) {
      return;
    }
    if (!kernels_->exchanges()) {
      GTEST_SKIP() << "the library has no code for this GPU";
    }
    for (cudaStream_t* streams : {streams_, chains_, halves_}) {
      for (uint32_t r = 0; r < kRanks; ++r) {
        ASSERT_EQ(cudaSuccess, cudaStreamCreateWithFlags(&streams[r], cudaStreamNonBlocking));
      }
    }
    ASSERT_EQ(cudaSuccess, cudaMallocHost(&go_, sizeof(uint32_t)));
    *go_ = 1;
    // What a first launch loads must not be loaded beside a kernel that waits.
    ASSERT_EQ(cudaSuccess, fill_gpu(0, go_, streams_[0]));
    ASSERT_EQ(cudaSuccess, cudaDeviceSynchronize());
  }
  void TearDown() override {
    if (kernels_ != nullptr) {
      EXPECT_EQ(cudaSuccess, cudaDeviceSynchronize());
    }
    ranks_ = {};
    for (cudaStream_t* streams : {streams_, chains_, halves_}) {
      for (uint32_t r = 0; r < kRanks; ++r) {
        if (streams[r] != nullptr) {
          cudaStreamDestroy(streams[r]);
        }
      }
    }
    cudaFreeHost(bounce_);
    cudaFreeHost(go_);
    LocalKernelsTest::TearDown();
  }

  /// Before anything waits: allocating may wait for it.
  void make_ranks(const Sizes& sizes) {
    sizes_ = sizes;
    for (uint32_t r = 0; r < kRanks; ++r) {
      ranks_[r] = std::make_unique<Rank>(r, sizes);
    }
    const expertd_exchange_layout& layout = ranks_[0]->layout();
    bounce_bytes_ = std::max(layout.block_bytes, uint64_t{2} * sizes.max_tokens * sizes.hidden);
    ASSERT_EQ(cudaSuccess, cudaMallocHost(&bounce_, kRanks * bounce_bytes_));
  }
  void fill(uint32_t round) {
    for (const std::unique_ptr<Rank>& rank : ranks_) {
      rank->fill(round);
    }
    ASSERT_EQ(cudaSuccess, cudaDeviceSynchronize());
  }

  client::cuda::Pointer word(uint32_t rank, uint64_t offset) const {
    return reinterpret_cast<client::cuda::Pointer>(ranks_[rank]->page.at(offset));
  }
  void write(uint32_t rank, uint64_t offset, uint64_t value, cudaStream_t stream) {
    ASSERT_EQ(client::cuda::kSuccess, driver_.stream_write(driver_stream(stream), word(rank, offset), value, 0));
  }
  void wait(uint32_t rank, uint64_t offset, uint64_t value, cudaStream_t stream) {
    ASSERT_EQ(client::cuda::kSuccess,
              driver_.stream_wait(driver_stream(stream), word(rank, offset), value, client::cuda::kWaitGreaterOrEqual));
  }
  /// Through the host, so that no kernel does it.
  void carry(uint32_t from, uint64_t source, uint64_t target, uint64_t bytes) {
    char* between = bounce_ + from * bounce_bytes_;
    ASSERT_LE(bytes, bounce_bytes_);
    ASSERT_EQ(cudaSuccess,
              cudaMemcpyAsync(between, ranks_[from]->window.at(source), bytes, cudaMemcpyDeviceToHost, chains_[from]));
    ASSERT_EQ(cudaSuccess, cudaMemcpyAsync(ranks_[1 - from]->window.at(target), between, bytes, cudaMemcpyHostToDevice,
                                           chains_[from]));
  }

  /// What the daemon's chain of a rank does.
  void chain(uint32_t rank, ExchangeKernel kernel, uint64_t seq, uint32_t buffer) {
    const expertd_exchange_layout& layout = ranks_[rank]->layout();
    const uint64_t base = buffer * layout.buffer_bytes;
    const uint32_t tokens = sizes_.tokens[rank];
    const cudaStream_t stream = chains_[rank];
    wait(rank, EXPERTD_DOORBELL_OFFSET(slot_of(seq)), seq, stream);
    write(rank, EXPERTD_STEP_ACTIVE_OFFSET(slot_of(seq)), 3, stream);
    write(rank, EXPERTD_STEP_ARRIVED_OFFSET(slot_of(seq), 0, rank), seq, stream);
    if (kernel == ExchangeKernel::kDispatch) {
      const uint64_t stride = expertd_exchange_row_stride(2 * sizes_.hidden, 0);
      carry(rank, base + layout.out_block, base + layout.in_blocks + rank * layout.block_bytes,
            expertd_exchange_block_copy(&layout, tokens, stride));
      write(1 - rank, EXPERTD_STEP_ARRIVED_OFFSET(slot_of(seq), 0, rank), seq, stream);
      return;
    }
    carry(rank, base + layout.out_weights, base + layout.in_weights + rank * layout.weights_bytes,
          expertd_exchange_weights_copy(&layout, tokens, kTopK));
    write(1 - rank, EXPERTD_STEP_ARRIVED_OFFSET(slot_of(seq), 0, rank), seq, stream);
    wait(rank, EXPERTD_STEP_RUNG_OFFSET(slot_of(seq)), seq, stream);
    const uint64_t sums = uint64_t{2} * sizes_.max_tokens * sizes_.hidden;
    const uint64_t bytes = uint64_t{2} * sizes_.tokens[1 - rank] * sizes_.hidden;
    if (bytes != 0) {
      carry(rank, base + layout.out_sums + (1 - rank) * sums, base + layout.in_sums + rank * sums, bytes);
    }
    write(1 - rank, EXPERTD_STEP_ARRIVED_OFFSET(slot_of(seq), 1, rank), seq, stream);
  }

  void launch(ExchangeKernel kernel, const ExchangeParams& params, cudaStream_t stream) {
    const client::Status launched = kernels_->launch_exchange(kernel, params, stream);
    ASSERT_TRUE(launched.ok()) << launched.text;
  }
  /// A rank's share of an operation, in one kernel or in two.
  void issue(uint32_t rank, ExchangeKernel kernel, uint64_t seq, uint32_t buffer, bool halves = false) {
    chain(rank, kernel, seq, buffer);
    ExchangeParams params = ranks_[rank]->params(kernel, seq, buffer);
    kernels_->begin_exchange(&params);
    params.stages = halves ? kExchangeSend : kBoth;
    launch(kernel, params, streams_[rank]);
    if (!halves) {
      return;
    }
    params.stages = kExchangeReceive;
    wait(rank, EXPERTD_DOORBELL_OFFSET(slot_of(seq)), seq, halves_[rank]);
    for (uint32_t r = 0; r < kRanks; ++r) {
      wait(rank, EXPERTD_STEP_ARRIVED_OFFSET(slot_of(seq), 0, r), seq, halves_[rank]);
    }
    launch(kernel, params, halves_[rank]);
    // As the caller's stream does, by the event's completion word.
    wait(rank, EXPERTD_COMPLETION_WORD_OFFSET(slot_of(seq)), seq, streams_[rank]);
  }
  /// A dispatch and its combine on both ranks, the second one `late` behind the first.
  void run_pair(uint32_t round, std::chrono::milliseconds late = {}, bool halves = false) {
    const uint64_t seq = 2 * round + 1;
    for (uint32_t r = 0; r < kRanks; ++r) {
      issue(r, ExchangeKernel::kDispatch, seq, round % 2 * 2, halves && r == 0);
      issue(r, ExchangeKernel::kCombine, seq + 1, round % 2 * 2 + 1, halves && r == 0);
      if (r == 0) {
        std::this_thread::sleep_for(late);
      }
    }
  }
  void expect_pair(uint32_t round) {
    ASSERT_EQ(cudaSuccess, cudaDeviceSynchronize());
    std::array<uint64_t, kRanks> rows = {};
    for (const std::unique_ptr<Rank>& rank : ranks_) {
      for (uint32_t i = 0; i < sizes_.tokens[rank == ranks_[0] ? 0 : 1] * kTopK; ++i) {
        const int64_t expert = rank->expert(i / kTopK, i % kTopK);
        rows[expert < 0 ? 0 : static_cast<uint64_t>(expert) / kLocalExperts] += expert < 0 ? 0 : 1;
      }
    }
    const uint64_t seq = 2 * round + 2;
    for (uint32_t r = 0; r < kRanks; ++r) {
      EXPECT_EQ(rows[r], ranks_[r]->counted());
      EXPECT_EQ(seq, ranks_[r]->word(EXPERTD_STEP_ENDED_OFFSET(slot_of(seq))));
      EXPECT_EQ(seq, ranks_[r]->word(EXPERTD_COMPLETION_WORD_OFFSET(slot_of(seq))));
      EXPECT_EQ(0u, ranks_[r]->word(EXPERTD_RESULT_WORD_OFFSET(slot_of(seq))));
      ranks_[r]->expect_combined(round);
    }
  }
  /// The first rank's dispatch had no outcome.
  void expect_given_up(uint64_t seq) {
    ASSERT_EQ(cudaSuccess, cudaStreamSynchronize(streams_[0]));
    EXPECT_EQ(0u, ranks_[0]->counted());
    EXPECT_EQ(seq, ranks_[0]->word(EXPERTD_DOORBELL_OFFSET(slot_of(seq)))) << "a stream may wait for it";
    EXPECT_LT(ranks_[0]->word(EXPERTD_STEP_ENDED_OFFSET(slot_of(seq))), seq);
  }

  Sizes sizes_;
  std::array<std::unique_ptr<Rank>, kRanks> ranks_;
  cudaStream_t streams_[kRanks] = {};
  cudaStream_t chains_[kRanks] = {};
  cudaStream_t halves_[kRanks] = {};
  char* bounce_ = nullptr;
  uint64_t bounce_bytes_ = 0;
  uint32_t* go_ = nullptr;
};

TEST_F(ExchangeKernels, EndPairsOfAnySize) {
  const Sizes kSizes[] = {{128, 1024, {128, 128}}, {128, 7168, {128, 128}}, {128, 512, {0, 128}},
                          {128, 512, {0, 0}},      {16, 128, {1, 7}},       {2048, 2048, {2048, 3}}};
  for (const Sizes& sizes : kSizes) {
    SCOPED_TRACE(std::to_string(sizes.tokens[0]) + " and " + std::to_string(sizes.tokens[1]) + " tokens of " +
                 std::to_string(sizes.hidden));
    make_ranks(sizes);
    for (uint32_t round = 0; round < 3; ++round) {
      fill(round);
      run_pair(round);
      expect_pair(round);
    }
    cudaFreeHost(std::exchange(bounce_, nullptr));
  }
}

// More operations than there are sets of counters.
TEST_F(ExchangeKernels, EndManyPairsInFlight) {
  make_ranks({});
  fill(0);
  for (uint32_t round = 0; round < 400; ++round) {
    if (round % 8 == 0) {
      ASSERT_EQ(cudaSuccess, cudaDeviceSynchronize());
      fill(round / 8 * 8);
    }
    run_pair(round);
    if (round % 8 == 7) {
      ASSERT_EQ(cudaSuccess, cudaDeviceSynchronize());
      ranks_[0]->expect_combined(round / 8 * 8);
      ranks_[1]->expect_combined(round / 8 * 8);
    }
  }
}

TEST_F(ExchangeKernels, EndWhenTheOtherRankIsLate) {
  make_ranks({});
  for (uint32_t round = 0; round < 6; ++round) {
    fill(round);
    run_pair(round, std::chrono::milliseconds(round * round));
    expect_pair(round);
  }
}

TEST_F(ExchangeKernels, EndInHalves) {
  make_ranks({});
  for (uint32_t round = 0; round < 10; ++round) {
    fill(round);
    run_pair(round, std::chrono::milliseconds(round % 3), true);
    expect_pair(round);
  }
}

// The blocks of one rank have to leave before the other one's get a place at all.
TEST_F(ExchangeKernels, EndOnFewPlaces) {
  make_ranks({});
  for (const uint32_t places : {4u, 16u}) {
    const uint32_t round = places / 16;
    fill(round);
    *static_cast<volatile uint32_t*>(go_) = 0;
    ASSERT_EQ(cudaSuccess, fill_gpu(places, go_, halves_[0]));
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    run_pair(round);
    for (const cudaStream_t stream : streams_) {
      EXPECT_EQ(cudaSuccess, cudaStreamSynchronize(stream));
    }
    EXPECT_EQ(cudaErrorNotReady, cudaStreamQuery(halves_[0])) << "the places were taken for the whole time";
    *static_cast<volatile uint32_t*>(go_) = 1;
    expect_pair(round);
  }
}

TEST_F(ExchangeKernels, GiveUpAfterTheirLimit) {
  const uint64_t seq = 1;
  make_ranks({});
  fill(0);
  ExchangeParams params = ranks_[0]->params(ExchangeKernel::kDispatch, seq, 0);
  kernels_->begin_exchange(&params);
  params.stages = kBoth;
  params.limit_ns = 50'000'000;
  launch(ExchangeKernel::kDispatch, params, streams_[0]);
  expect_given_up(seq);
  EXPECT_EQ(uint64_t{EXPERTD_REASON_TIMEOUT}, ranks_[0]->word(EXPERTD_RESULT_WORD_OFFSET(slot_of(seq))));
  EXPECT_EQ(0u, ranks_[0]->word(EXPERTD_COMPLETION_WORD_OFFSET(slot_of(seq))));
}

TEST_F(ExchangeKernels, GiveUpWhenTheOperationIsAborted) {
  make_ranks({});
  fill(0);
  for (const ExchangeKernel kernel : {ExchangeKernel::kDispatch, ExchangeKernel::kCombine}) {
    const uint64_t seq = 1 + static_cast<uint64_t>(kernel);
    ExchangeParams params = ranks_[0]->params(kernel, seq, static_cast<uint32_t>(kernel));
    kernels_->begin_exchange(&params);
    params.stages = kBoth;
    launch(kernel, params, streams_[0]);
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    ASSERT_EQ(cudaErrorNotReady, cudaStreamQuery(streams_[0])) << "it waits";
    // As the daemon's rescue stream does, and then as it puts the words in order.
    for (const uint64_t value : {uint64_t{EXPERTD_ABORT_WORD}, seq}) {
      if (value == seq) {
        ASSERT_EQ(cudaSuccess, cudaStreamSynchronize(streams_[0]));
        write(0, EXPERTD_COMPLETION_WORD_OFFSET(slot_of(seq)), seq, chains_[0]);
      }
      for (uint32_t i = 0; i < 2 * kRanks; ++i) {
        write(0, EXPERTD_STEP_ARRIVED_OFFSET(slot_of(seq), i / kRanks, i % kRanks), value, chains_[0]);
      }
      ASSERT_EQ(cudaSuccess, cudaStreamSynchronize(chains_[0]));
    }
    expect_given_up(seq);
  }
}

TEST_F(ExchangeKernels, FindThatTheirOperationWasVoided) {
  const uint64_t seq = 1;
  make_ranks({});
  fill(0);
  ExchangeParams params = ranks_[0]->params(ExchangeKernel::kDispatch, seq, 0);
  kernels_->begin_exchange(&params);
  params.stages = kBoth;
  launch(ExchangeKernel::kDispatch, params, streams_[0]);
  write(0, EXPERTD_STEP_VOIDED_OFFSET(slot_of(seq)), seq, chains_[0]);
  write(0, EXPERTD_STEP_ARRIVED_OFFSET(slot_of(seq), 0, 0), seq, chains_[0]);
  write(0, EXPERTD_STEP_ARRIVED_OFFSET(slot_of(seq), 0, 1), seq, chains_[0]);
  expect_given_up(seq);
}

// A stream held them back meanwhile; the counters are those of a later operation, or will be.
TEST_F(ExchangeKernels, DoNothingWhenTheirOperationIsOver) {
  make_ranks({});
  for (const bool later : {false, true}) {
    fill(0);
    const uint64_t seq = later ? 2 : 1;
    ExchangeParams params = ranks_[0]->params(ExchangeKernel::kDispatch, seq, 0);
    kernels_->begin_exchange(&params);
    params.stages = kBoth;
    write(0, EXPERTD_COMPLETION_WORD_OFFSET(slot_of(seq)), seq, chains_[0]);
    ASSERT_EQ(cudaSuccess, cudaStreamSynchronize(chains_[0]));
    const std::vector<uint64_t> newer(client::kExchangeCounters, (params.number + client::kExchangeCounterSets) << 24);
    if (later) {
      ASSERT_EQ(cudaSuccess,
                cudaMemcpy(params.counters, newer.data(), newer.size() * sizeof(uint64_t), cudaMemcpyHostToDevice));
    }
    launch(ExchangeKernel::kDispatch, params, streams_[0]);
    expect_given_up(seq);
    if (later) {
      std::vector<uint64_t> found(newer.size());
      ASSERT_EQ(cudaSuccess,
                cudaMemcpy(found.data(), params.counters, found.size() * sizeof(uint64_t), cudaMemcpyDeviceToHost));
      EXPECT_EQ(newer, found) << "they are another operation's";
    }
  }
}

}  // namespace
}  // namespace expertd::device_test
