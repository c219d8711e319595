// SPDX-License-Identifier: Apache-2.0
#include "tests/bench/table/layer.h"

#include <algorithm>
#include <array>
#include <utility>

#include "client/ctl/bench_weighted_sum.h"
#include "tests/bench/cuda_check.h"
#include "tests/bench/table/experts.h"

namespace expertd::bench {

namespace {

using ctl::BenchBytes;
using ctl::BenchCase;
using ctl::BenchRouting;
using ctl::BenchRow;
using ctl::BenchShape;
using ctl::BenchStream;
using ctl::BenchTensor;
using ctl::BenchTerm;

/// Expert starts of the expanded rows, as grouped GEMMs want them.
constexpr uint32_t kAlignment = 128;
/// Rows of an expert in a batch are a multiple of this.
constexpr uint32_t kBatchRows = 8;

uint32_t rounded(uint64_t value, uint32_t step) {
  return static_cast<uint32_t>((value + step - 1) / step * step);
}

class Layer : public LayerOperation {
 public:
  Layer(const BenchCase& it, const Cublas& cublas, uint64_t rows)
      : case_(it),
        check_(it.name, it.rank->index()),
        input_(it.input(0)),
        capacity_(rows),
        experts_(cublas, it.shape.local_experts(), it.shape.hidden, rows),
        x_(it.rank, it.shape.tokens, row_bytes()),
        topk_idx_(it.rank, it.shape.tokens, it.shape.top_k * sizeof(int64_t)),
        recv_x_(it.rank, rows, row_bytes()),
        expert_x_(it.rank, rows, row_bytes()),
        combined_x_(it.rank, it.shape.tokens + 1ull, row_bytes()) {}

  void prepare(uint32_t iteration) override {
    check_.set_iteration(iteration);
    input_ = case_.input(iteration);
    routing_ = std::make_unique<BenchRouting>(case_.shape, input_);
    ctl::write_tokens(case_, input_, &x_);
    ctl::write_routing(case_, *routing_, &topk_idx_);
    expert_rows_ = place_experts();
    // cuBLAS chooses kernels by size, and loads one that it did not use before.
    compute();
    check_cuda(cudaStreamSynchronize(stream()), "the first GEMMs of a layer");
  }
  void poison() override {
    for (BenchTensor* tensor : {&recv_x_, &expert_x_, &combined_x_}) {
      tensor->fill(ctl::kPoison);
    }
  }
  void compute() override { experts_.enqueue(recv_x_.data(), expert_x_.data(), expert_rows_, stream()); }
  void verify(const expertd_op_result_t&) override {
    ctl::check_weighted_sums(check_, combined_x_, case_.shape.tokens,
                             [this](uint64_t token) { return terms_of(token); });
  }
  BenchBytes bytes() const override;

 protected:
  uint64_t row_bytes() const { return case_.shape.hidden * 2ull; }
  cudaStream_t stream() const { return static_cast<cudaStream_t>(case_.rank->stream()); }
  virtual std::vector<ExpertRows> place_experts() const = 0;
  virtual float weight(uint64_t token, uint32_t lane) const = 0;
  std::vector<BenchTerm> terms_of(uint64_t token) const;

  const BenchCase case_;
  ctl::BenchCheck check_;
  ctl::BenchInput input_;
  const uint64_t capacity_;
  std::unique_ptr<BenchRouting> routing_;
  std::vector<ExpertRows> expert_rows_;
  const Experts experts_;
  BenchTensor x_, topk_idx_, recv_x_, expert_x_, combined_x_;
};

/// Every expert returns the first channels of the token.
std::vector<BenchTerm> Layer::terms_of(uint64_t token) const {
  const uint32_t own = case_.rank->index();
  std::vector<uint16_t> row(case_.shape.hidden);
  input_.bf16_row(BenchStream::kTokens, own, token, row);
  std::fill(row.begin() + std::min<std::ptrdiff_t>(Experts::kInner, std::ssize(row)), row.end(), uint16_t{0});
  std::vector<BenchTerm> terms;
  for (uint32_t lane = 0; lane < case_.shape.top_k; ++lane) {
    if (routing_->expert(own, token, lane) >= 0) {
      terms.push_back({weight(token, lane), row});
    }
  }
  return terms;
}

/// A row for each lane there and one back.
BenchBytes Layer::bytes() const {
  BenchBytes bytes;
  const auto own = static_cast<int32_t>(case_.rank->index());
  for (uint64_t token = 0; token < case_.shape.tokens; ++token) {
    for (uint32_t lane = 0; lane < case_.shape.top_k; ++lane) {
      const int32_t rank = routing_->rank(case_.rank->index(), token, lane);
      bytes.logical += rank >= 0 ? 2 * row_bytes() : 0;
      bytes.remote += rank >= 0 && rank != own ? 2 * row_bytes() : 0;
    }
  }
  return bytes;
}

/// Slots of fixed places: all experts are one batch with the rows of the one that has most.
class DecodeLayer final : public Layer {
 public:
  DecodeLayer(const BenchCase& it, const Cublas& cublas)
      : Layer(it, cublas, it.shape.local_experts() * it.shape.worst_rows()),
        weights_(it.rank, it.shape.tokens, it.shape.top_k * sizeof(float)),
        counts_(it.rank, it.shape.local_experts(), sizeof(int32_t)),
        src_info_(it.rank, it.shape.local_experts() * it.shape.worst_rows(), sizeof(int32_t)),
        layout_range_(it.rank, it.shape.local_experts(), it.shape.ranks * sizeof(int64_t)) {}

  void prepare(uint32_t iteration) override {
    Layer::prepare(iteration);
    weights_.write_rows(0, case_.shape.tokens, [&](uint64_t token, std::span<uint8_t> row) {
      for (uint32_t lane = 0; lane < case_.shape.top_k; ++lane) {
        ctl::elements<float>(row)[lane] = weight(token, lane);
      }
    });
  }
  void issue(expertd_event_t* event) override;

 private:
  std::vector<ExpertRows> place_experts() const override {
    uint64_t most = 1;
    for (const std::vector<BenchRow>& rows : routing_->expert_rows(case_.rank->index())) {
      most = std::max<uint64_t>(most, rows.size());
    }
    const uint64_t slots = case_.shape.worst_rows();
    std::vector<ExpertRows> places;
    for (uint32_t expert = 0; expert < case_.shape.local_experts(); ++expert) {
      places.push_back({expert * slots, static_cast<uint32_t>(std::min<uint64_t>(rounded(most, kBatchRows), slots))});
    }
    return places;
  }
  float weight(uint64_t token, uint32_t lane) const override {
    return input_.weight(BenchStream::kWeights, case_.rank->index(), token, lane);
  }

  BenchTensor weights_, counts_, src_info_, layout_range_;
};

void DecodeLayer::issue(expertd_event_t* event) {
  ctl::BenchRank* const rank = case_.rank;
  auto there = EXPERTD_INIT(expertd_ll_dispatch_args_t);
  there.x = x_.data();
  there.dtype = EXPERTD_BF16;
  there.topk_idx = topk_idx_.data();
  there.idx_type = EXPERTD_I64;
  there.tokens = case_.shape.tokens;
  there.recv_x = recv_x_.data();
  there.expert_counts = counts_.as<int32_t>();
  there.recv_src_info = src_info_.as<int32_t>();
  there.layout_range = layout_range_.as<int64_t>();
  there.timeout_ns = rank->timeout_ns();
  expertd_handle_t handle{};
  rank->check(expertd_ll_dispatch(rank->group(), &there, rank->stream(), &handle, event), "dispatch of " + case_.name);
  compute();
  auto back = EXPERTD_INIT(expertd_ll_combine_args_t);
  back.x = expert_x_.data();
  back.topk_idx = topk_idx_.data();
  back.idx_type = EXPERTD_I64;
  back.topk_weights = weights_.as<float>();
  back.handle = handle;
  back.tokens = case_.shape.tokens;
  back.combined_x = combined_x_.data();
  back.timeout_ns = rank->timeout_ns();
  rank->check(expertd_ll_combine(rank->group(), &back, rank->stream(), event), "combine of " + case_.name);
}

/// Room for what both sets of inputs bring to any rank.
uint64_t expanded_capacity(const BenchCase& it) {
  uint64_t most = 0;
  for (const uint32_t iteration : it.verified_iterations()) {
    const BenchRouting routing(it.shape, it.input(iteration));
    for (uint32_t rank = 0; rank < it.shape.ranks; ++rank) {
      most = std::max<uint64_t>(most, routing.expanded_rows(rank, kAlignment).size());
    }
  }
  return most;
}

/// Rows in the order of experts, each of which gets GEMMs of its own size.
class PrefillLayer final : public Layer {
 public:
  PrefillLayer(const BenchCase& it, const Cublas& cublas)
      : Layer(it, cublas, expanded_capacity(it)),
        recv_idx_(it.rank, capacity_, sizeof(int64_t)),
        src_info_(it.rank, capacity_, sizeof(int32_t)),
        counts_(it.rank, it.shape.local_experts(), sizeof(int32_t)),
        prefix_(it.rank, uint64_t{it.shape.ranks} * it.shape.ranks, sizeof(int32_t)) {}
  ~PrefillLayer() override {
    if (handle_.generation != 0) {
      // A failure means that the session ended, and the handle with it.
      static_cast<void>(expertd_handle_free(case_.rank->group(), handle_));
    }
  }

  void issue(expertd_event_t* event) override {
    send_dispatch(0, event);
    compute();
    send_combine(0, event);
  }
  /// `flags`: EXPERTD_ASYNC or none.
  void send_dispatch(uint32_t flags, expertd_event_t* event);
  void send_combine(uint32_t flags, expertd_event_t* event);
  void finish() override {
    if (handle_.generation != 0) {
      case_.rank->check(expertd_handle_free(case_.rank->group(), std::exchange(handle_, {})), "free of a handle");
    }
  }

 private:
  std::vector<ExpertRows> place_experts() const override {
    std::vector<ExpertRows> places;
    uint64_t first = 0;
    for (const std::vector<BenchRow>& rows : routing_->expert_rows(case_.rank->index())) {
      places.push_back({first, static_cast<uint32_t>(rows.size())});
      first += rounded(rows.size(), kAlignment);
    }
    return places;
  }
  /// A high throughput combine adds what experts return as it is.
  float weight(uint64_t, uint32_t) const override { return 1.0f; }

  expertd_handle_t handle_{};
  BenchTensor recv_idx_, src_info_, counts_, prefix_;
};

void PrefillLayer::send_dispatch(uint32_t flags, expertd_event_t* event) {
  ctl::BenchRank* const rank = case_.rank;
  auto there = EXPERTD_INIT(expertd_dispatch_args_t);
  there.x = x_.data();
  there.dtype = EXPERTD_BF16;
  there.topk_idx = topk_idx_.data();
  there.idx_type = EXPERTD_I64;
  there.tokens = case_.shape.tokens;
  there.capacity_rows = static_cast<uint32_t>(capacity_);
  there.expert_alignment = kAlignment;
  there.recv_x = recv_x_.data();
  there.recv_topk_idx = recv_idx_.data();
  there.recv_src_info = src_info_.as<int32_t>();
  there.expert_counts = counts_.as<int32_t>();
  there.rank_prefix = prefix_.as<int32_t>();
  there.flags = EXPERTD_EXPANDED | flags;
  there.timeout_ns = rank->timeout_ns();
  rank->check(expertd_dispatch(rank->group(), &there, rank->stream(), &handle_, event), "dispatch of " + case_.name);
}

void PrefillLayer::send_combine(uint32_t flags, expertd_event_t* event) {
  ctl::BenchRank* const rank = case_.rank;
  auto back = EXPERTD_INIT(expertd_combine_args_t);
  back.x = expert_x_.data();
  back.rows = static_cast<uint32_t>(capacity_);
  back.handle = handle_;
  back.tokens = case_.shape.tokens;
  back.combined_x = combined_x_.data();
  back.flags = EXPERTD_EXPANDED | flags;
  back.timeout_ns = rank->timeout_ns();
  rank->check(expertd_combine(rank->group(), &back, rank->stream(), event), "combine of " + case_.name);
}

ctl::BenchOptions with_other_seed(const ctl::BenchOptions& options) {
  constexpr uint64_t kStep = 7919;  // beyond any seed that is likely to be asked for beside this one
  ctl::BenchOptions other = options;
  other.seed += kStep;
  return other;
}

/// Half of a case's tokens, with inputs of `options`.
BenchCase half_of(const BenchCase& it, const ctl::BenchOptions& options) {
  BenchShape shape = it.shape;
  shape.tokens /= 2;
  return {options, shape, it.rank, it.name, it.extra_flags};
}

/// Two micro-batches with inputs of their own: the rows of one travel while the experts work on the other's.
class PrefillPair final : public LayerOperation {
 public:
  PrefillPair(const BenchCase& it, const Cublas& cublas)
      : rank_(it.rank),
        other_options_(with_other_seed(it.options)),
        halves_{PrefillLayer(half_of(it, it.options), cublas), PrefillLayer(half_of(it, other_options_), cublas)} {}

  void prepare(uint32_t iteration) override {
    each([&](PrefillLayer& it) { it.prepare(iteration); });
  }
  void poison() override {
    each([](PrefillLayer& it) { it.poison(); });
  }
  void compute() override {
    each([](PrefillLayer& it) { it.compute(); });
  }
  void finish() override {
    each([](PrefillLayer& it) { it.finish(); });
  }
  void verify(const expertd_op_result_t& result) override {
    each([&](PrefillLayer& it) { it.verify(result); });
  }
  BenchBytes bytes() const override {
    BenchBytes sum;
    for (const PrefillLayer& half : halves_) {
      const BenchBytes bytes = half.bytes();
      sum.logical += bytes.logical;
      sum.remote += bytes.remote;
    }
    return sum;
  }
  void issue(expertd_event_t* event) override {
    std::array<expertd_event_t, 2> sent{};
    for (size_t i = 0; i < halves_.size(); ++i) {
      halves_[i].send_dispatch(EXPERTD_ASYNC, &sent[i]);
    }
    for (size_t i = 0; i < halves_.size(); ++i) {
      receive(sent[i]);
      halves_[i].compute();
      halves_[i].send_combine(EXPERTD_ASYNC, &sent[i]);
    }
    for (const expertd_event_t& last : sent) {
      receive(last);
    }
    *event = sent.back();
  }

 private:
  template <typename Body>
  void each(Body body) {
    for (PrefillLayer& half : halves_) {
      body(half);
    }
  }
  void receive(const expertd_event_t& event) {
    rank_->check(expertd_event_stream_wait(event, rank_->stream()), "receive half of a layer");
  }

  ctl::BenchRank* const rank_;
  const ctl::BenchOptions other_options_;
  std::array<PrefillLayer, 2> halves_;
};

}  // namespace

std::unique_ptr<LayerOperation> make_layer(const BenchCase& it, bool low_latency, const Cublas& cublas) {
  if (low_latency) {
    return std::make_unique<DecodeLayer>(it, cublas);
  }
  return std::make_unique<PrefillPair>(it, cublas);
}

}  // namespace expertd::bench
