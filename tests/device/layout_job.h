// SPDX-License-Identifier: Apache-2.0
// Layouts by the client library's kernel, with memory and with what the reference makes of them. Device tests only, one
// thread.
#pragma once

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "client/src/local_kernels/layout_params.h"
#include "tests/support/random_case.h"
#include "tests/support/reference_moe.h"

namespace expertd::device_test {

using client::LayoutParams;
using support::LayoutResult;
using support::Random;

struct Ids {
  kernels::OpShape shape;
  std::vector<int64_t> values;
  bool narrow = false;
};

inline Ids make_ids(Random* random, uint32_t tokens, uint32_t ranks) {
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

}  // namespace expertd::device_test
