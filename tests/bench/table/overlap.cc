// SPDX-License-Identifier: Apache-2.0
#include "tests/bench/table/overlap.h"

#include <array>

#include "client/ctl/bench_weighted_sum.h"
#include "tests/bench/table/exchange.h"
#include "tests/bench/table/fixed_work.h"

namespace expertd::bench {

namespace {

using ctl::BenchBytes;
using ctl::BenchCase;
using ctl::BenchRouting;
using ctl::BenchStream;
using ctl::BenchTensor;
using ctl::BenchTerm;

constexpr uint32_t kBatches = 2;
constexpr uint32_t kFirstRounds = 2000;
constexpr uint64_t kSinkBytes = 4096;

/// A micro-batch: low-latency dispatch of BF16 rows and the combine of what came, as it came.
class MicroBatch {
 public:
  /// `which` chooses inputs of its own.
  MicroBatch(const BenchCase& it, uint32_t which)
      : case_(it),
        which_(which),
        check_(it.name + " micro-batch " + std::to_string(which), it.rank->index()),
        input_(it.input(which)),
        x_(it.rank, it.shape.tokens, row_bytes()),
        topk_idx_(it.rank, it.shape.tokens, it.shape.top_k * sizeof(int64_t)),
        weights_(it.rank, it.shape.tokens, it.shape.top_k * sizeof(float)),
        recv_x_(it.rank, rows(), row_bytes()),
        counts_(it.rank, it.shape.local_experts(), sizeof(int32_t)),
        src_info_(it.rank, rows(), sizeof(int32_t)),
        layout_range_(it.rank, it.shape.local_experts(), it.shape.ranks * sizeof(int64_t)),
        combined_x_(it.rank, it.shape.tokens + 1ull, row_bytes()) {}

  void prepare(uint32_t iteration);
  void poison() {
    recv_x_.fill(ctl::kPoison);
    combined_x_.fill(ctl::kPoison);
  }
  void dispatch(uint32_t flags, expertd_event_t* event);
  void combine(uint32_t flags, expertd_event_t* event);
  void verify() {
    ctl::check_weighted_sums(check_, combined_x_, case_.shape.tokens,
                             [this](uint64_t token) { return terms_of(token); });
  }
  BenchBytes bytes() const;

 private:
  uint64_t row_bytes() const { return case_.shape.hidden * 2ull; }
  uint64_t rows() const { return case_.shape.local_experts() * case_.shape.worst_rows(); }
  std::vector<BenchTerm> terms_of(uint64_t token) const;

  const BenchCase case_;
  const uint32_t which_;
  ctl::BenchCheck check_;
  ctl::BenchInput input_;
  std::unique_ptr<BenchRouting> routing_;
  expertd_handle_t handle_{};  // of the low latency rotation: not to be freed
  BenchTensor x_, topk_idx_, weights_, recv_x_, counts_, src_info_, layout_range_, combined_x_;
};

void MicroBatch::prepare(uint32_t iteration) {
  check_.set_iteration(iteration);
  input_ = case_.input(iteration * kBatches + which_);
  routing_ = std::make_unique<BenchRouting>(case_.shape, input_);
  ctl::write_tokens(case_, input_, &x_);
  ctl::write_routing(case_, *routing_, &topk_idx_);
  weights_.write_rows(0, case_.shape.tokens, [&](uint64_t token, std::span<uint8_t> row) {
    for (uint32_t lane = 0; lane < case_.shape.top_k; ++lane) {
      ctl::elements<float>(row)[lane] = input_.weight(BenchStream::kWeights, case_.rank->index(), token, lane);
    }
  });
}

void MicroBatch::dispatch(uint32_t flags, expertd_event_t* event) {
  auto args = EXPERTD_INIT(expertd_ll_dispatch_args_t);
  args.x = x_.data();
  args.dtype = EXPERTD_BF16;
  args.topk_idx = topk_idx_.data();
  args.idx_type = EXPERTD_I64;
  args.tokens = case_.shape.tokens;
  args.recv_x = recv_x_.data();
  args.expert_counts = counts_.as<int32_t>();
  args.recv_src_info = src_info_.as<int32_t>();
  args.layout_range = layout_range_.as<int64_t>();
  args.flags = flags;
  args.timeout_ns = case_.rank->timeout_ns();
  case_.rank->check(expertd_ll_dispatch(case_.rank->group(), &args, case_.rank->stream(), &handle_, event),
                    "dispatch of " + case_.name);
}

void MicroBatch::combine(uint32_t flags, expertd_event_t* event) {
  auto args = EXPERTD_INIT(expertd_ll_combine_args_t);
  args.x = recv_x_.data();
  args.topk_idx = topk_idx_.data();
  args.idx_type = EXPERTD_I64;
  args.topk_weights = weights_.as<float>();
  args.handle = handle_;
  args.tokens = case_.shape.tokens;
  args.combined_x = combined_x_.data();
  args.flags = flags;
  args.timeout_ns = case_.rank->timeout_ns();
  case_.rank->check(expertd_ll_combine(case_.rank->group(), &args, case_.rank->stream(), event),
                    "combine of " + case_.name);
}

/// Every expert returns the token.
std::vector<BenchTerm> MicroBatch::terms_of(uint64_t token) const {
  const uint32_t own = case_.rank->index();
  std::vector<uint16_t> row(case_.shape.hidden);
  input_.bf16_row(BenchStream::kTokens, own, token, row);
  std::vector<BenchTerm> terms;
  for (uint32_t lane = 0; lane < case_.shape.top_k; ++lane) {
    if (routing_->expert(own, token, lane) >= 0) {
      terms.push_back({input_.weight(BenchStream::kWeights, own, token, lane), row});
    }
  }
  return terms;
}

/// A row for each lane there and one back.
BenchBytes MicroBatch::bytes() const {
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

class Overlap final : public OverlapOperation {
 public:
  Overlap(const BenchCase& it, uint32_t sms)
      : case_(it), sms_(sms), sink_(kSinkBytes), batches_{MicroBatch(it, 0), MicroBatch(it, 1)} {}

  void prepare(uint32_t iteration) override {
    each([&](MicroBatch& batch) { batch.prepare(iteration); });
  }
  void poison() override {
    each([](MicroBatch& batch) { batch.poison(); });
  }
  void verify(const expertd_op_result_t&) override {
    each([](MicroBatch& batch) { batch.verify(); });
  }
  BenchBytes bytes() const override;

  void issue(expertd_event_t* event) override;
  void issue_serial(expertd_event_t* event) override;
  void issue_single(expertd_event_t* event) override;
  void issue_communication(expertd_event_t* event) override;
  void compute() override;
  void set_rounds(uint32_t rounds) override { rounds_ = rounds; }
  uint32_t rounds() const override { return rounds_; }
  uint32_t compute_sms() const override { return sms_; }

 private:
  template <typename Body>
  void each(Body body) {
    for (MicroBatch& batch : batches_) {
      body(batch);
    }
  }
  void work() { enqueue_multiply_adds(stream(), sms_, rounds_, sink_.as<float>()); }
  void receive(const expertd_event_t& event) {
    case_.rank->check(expertd_event_stream_wait(event, case_.rank->stream()), "receive half of " + case_.name);
  }
  void whole_layer(MicroBatch* batch, expertd_event_t* event);
  cudaStream_t stream() const { return static_cast<cudaStream_t>(case_.rank->stream()); }

  const BenchCase case_;
  const uint32_t sms_;
  uint32_t rounds_ = kFirstRounds;
  DeviceBuffer sink_;
  std::array<MicroBatch, kBatches> batches_;
};

/// Each batch's two computations stand where the other's operation travels.
void Overlap::issue(expertd_event_t* event) {
  std::array<expertd_event_t, kBatches> sent{};
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    for (uint32_t i = 0; i < kBatches; ++i) {
      if (layer > 0) {
        receive(sent[i]);
      }
      work();
      batches_[i].dispatch(EXPERTD_ASYNC, &sent[i]);
    }
    for (uint32_t i = 0; i < kBatches; ++i) {
      receive(sent[i]);
      work();
      batches_[i].combine(EXPERTD_ASYNC, &sent[i]);
    }
  }
  for (const expertd_event_t& last : sent) {
    receive(last);
  }
  *event = sent.back();
}

void Overlap::whole_layer(MicroBatch* batch, expertd_event_t* event) {
  work();
  batch->dispatch(0, event);
  work();
  batch->combine(0, event);
}

void Overlap::issue_serial(expertd_event_t* event) {
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    each([&](MicroBatch& batch) { whole_layer(&batch, event); });
  }
}

void Overlap::issue_single(expertd_event_t* event) {
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    whole_layer(&batches_.front(), event);
  }
}

void Overlap::issue_communication(expertd_event_t* event) {
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    batches_.front().dispatch(0, event);
    batches_.front().combine(0, event);
  }
}

void Overlap::compute() {
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    work();
    work();
  }
}

BenchBytes Overlap::bytes() const {
  BenchBytes sum;
  for (const MicroBatch& batch : batches_) {
    const BenchBytes bytes = batch.bytes();
    sum.logical += kLayers * bytes.logical;
    sum.remote += kLayers * bytes.remote;
  }
  return sum;
}

}  // namespace

std::unique_ptr<OverlapOperation> make_overlap(const ctl::BenchCase& it, uint32_t multiprocessors) {
  return std::make_unique<Overlap>(it, multiprocessors / 2);
}

}  // namespace expertd::bench
