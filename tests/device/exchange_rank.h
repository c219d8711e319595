// SPDX-License-Identifier: Apache-2.0
// A rank of the tests of the kernels of operations by copy engines: its flag page, window and tensors on the current
// GPU. Device tests only, one thread.
#pragma once

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

#include "client/src/local_kernels/exchange_params.h"
#include "proto/abi/exchange_v1.h"
#include "tests/device/device_memory.h"

namespace expertd::device_test {

inline constexpr uint32_t kRanks = 2;
inline constexpr uint32_t kExperts = 8;
inline constexpr uint32_t kLocalExperts = kExperts / kRanks;
inline constexpr uint32_t kTopK = 2;
inline constexpr uint64_t kSlots = 8;
inline constexpr uint64_t kLimitNs = 20'000'000'000;

inline uint64_t slot_of(uint64_t seq) {
  return seq % kSlots;
}

struct Sizes {
  uint32_t max_tokens = 128;
  uint32_t hidden = 1024;
  std::array<uint32_t, kRanks> tokens = {128, 128};
};

inline expertd_exchange_layout layout_of(const Sizes& sizes) {
  const expertd_exchange_shape shape = {kRanks, kExperts, sizes.hidden, sizes.max_tokens, kTopK};
  return expertd_exchange_layout_of(&shape);
}

/// A rank's memory. Token t has the experts (3t + rank) and (3t + rank + 4) modulo 8, one on each rank, and the second
/// one is not used by every fifth token.
class Rank {
 public:
  Rank(uint32_t rank, const Sizes& sizes)
      : rank_(rank),
        sizes_(sizes),
        layout_(layout_of(sizes)),
        page(EXPERTD_FLAG_PAGE_BYTES),
        window(layout_.total_bytes),
        x_(size_t{sizes.max_tokens} * sizes.hidden * 2),
        ids_(size_t{sizes.max_tokens} * kTopK * 8),
        weights_(size_t{sizes.max_tokens} * kTopK * 4),
        recv_x_(size_t{kLocalExperts} * kRanks * sizes.max_tokens * sizes.hidden * 2),
        counts_(kLocalExperts * 4),
        combined_(size_t{sizes.max_tokens} * sizes.hidden * 2) {
    std::vector<int64_t> ids;
    std::vector<float> weights;
    for (uint32_t t = 0; t < sizes.max_tokens; ++t) {
      ids.push_back(expert(t, 0));
      ids.push_back(expert(t, 1));
      weights.insert(weights.end(), {0.5f, 0.25f});
    }
    ids_.put(ids);
    weights_.put(weights);
  }

  void fill(uint32_t round) {
    std::vector<uint16_t> x(size_t{sizes_.max_tokens} * sizes_.hidden);
    for (size_t i = 0; i < x.size(); ++i) {
      x[i] = bf16_of(sent(round, i));
    }
    x_.put(x);
    // So that what an operation does not write is seen.
    EXPECT_EQ(cudaSuccess, cudaMemset(counts_.at(), 0x5a, kLocalExperts * 4));
    EXPECT_EQ(cudaSuccess, cudaMemset(combined_.at(), 0x5a, x.size() * 2));
  }

  client::ExchangeParams params(client::ExchangeKernel kernel, uint64_t seq, uint32_t buffer) const {
    const bool dispatch = kernel == client::ExchangeKernel::kDispatch;
    client::ExchangeParams p;
    p.steps = page.at<uint64_t>(EXPERTD_STEP_OFFSET(slot_of(seq)));
    p.doorbell = page.at<uint64_t>(EXPERTD_DOORBELL_OFFSET(slot_of(seq)));
    p.completion = page.at<uint64_t>(EXPERTD_COMPLETION_WORD_OFFSET(slot_of(seq)));
    p.result = page.at<uint64_t>(EXPERTD_RESULT_WORD_OFFSET(slot_of(seq)));
    p.seq = seq;
    p.limit_ns = kLimitNs;
    p.buffer = window.at(buffer * layout_.buffer_bytes);
    p.handle = window.at(layout_.handles);
    p.layout = layout_;
    p.row_stride = expertd_exchange_row_stride(2 * sizes_.hidden, 0);
    p.ranks = kRanks;
    p.rank = rank_;
    p.experts = kExperts;
    p.local_experts = kLocalExperts;
    p.hidden = sizes_.hidden;
    p.max_tokens = sizes_.max_tokens;
    p.table_top_k = p.top_k = kTopK;
    p.tokens = sizes_.tokens[rank_];
    p.row_bytes = p.out_row_bytes = 2 * sizes_.hidden;
    p.x = dispatch ? x_.at() : recv_x_.at();  // the experts give back what they got
    p.topk_idx = ids_.at();
    p.topk_weights = weights_.at<float>();
    p.out_x = dispatch ? recv_x_.at() : combined_.at();
    p.expert_counts = dispatch ? counts_.at<int32_t>() : nullptr;
    return p;
  }

  uint64_t word(uint64_t offset) const { return page.get<uint64_t>(1, offset)[0]; }
  std::vector<int32_t> counts() const { return counts_.get<int32_t>(kLocalExperts); }
  uint64_t counted() const {
    uint64_t sum = 0;
    for (const int32_t count : counts()) {
      sum += static_cast<uint64_t>(count);
    }
    return sum;
  }
  void expect_combined(uint32_t round) const {
    const auto out = combined_.get<uint16_t>(size_t{sizes_.tokens[rank_]} * sizes_.hidden);
    for (size_t i = 0; i < out.size(); ++i) {
      const float factor = expert(static_cast<uint32_t>(i / sizes_.hidden), 1) < 0 ? 0.5f : 0.75f;
      ASSERT_EQ(bf16_of(factor * sent(round, i)), out[i])
          << "rank " << rank_ << " token " << i / sizes_.hidden << " channel " << i % sizes_.hidden;
    }
  }
  int64_t expert(uint32_t token, uint32_t lane) const {
    return lane == 1 && token % 5 == 0 ? -1 : int64_t{(3 * token + rank_ + 4 * lane) % kExperts};
  }
  const expertd_exchange_layout& layout() const { return layout_; }

 private:
  static uint16_t bf16_of(float value) {
    uint32_t bits = 0;
    std::memcpy(&bits, &value, 4);
    return static_cast<uint16_t>(bits >> 16);
  }
  float sent(uint32_t round, size_t i) const { return static_cast<float>((round * 7 + rank_ * 5 + i) % 61); }

  const uint32_t rank_;
  const Sizes sizes_;
  const expertd_exchange_layout layout_;

 public:
  Memory page;
  Memory window;

 private:
  Memory x_, ids_, weights_, recv_x_, counts_, combined_;
};

}  // namespace expertd::device_test
