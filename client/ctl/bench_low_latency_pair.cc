// SPDX-License-Identifier: Apache-2.0
// An FP8 low latency dispatch and the combine of its handle, issued one behind the other as a layer does. Nothing
// computes in between: what an expert returns is the same for all its rows and written before, because the order of the
// rows is free.
#include <algorithm>

#include "client/ctl/bench_operation.h"
#include "client/ctl/bench_weighted_sum.h"

namespace expertd::ctl {

namespace {

BenchRowSpec dispatch_of_pair(const BenchShape& shape) {
  std::vector<BenchRowSpec> rows = low_latency_dispatch_rows(shape);
  return *std::find_if(rows.begin(), rows.end(),
                       [](const BenchRowSpec& row) { return row.flags == "fp8 float32 scales"; });
}

class LowLatencyPair final : public BenchOperation {
 public:
  explicit LowLatencyPair(const BenchCase& it)
      : case_(it),
        check_(it.name, it.rank->index()),
        input_(it.input(0)),
        dispatch_(dispatch_of_pair(it.shape).make(it)),
        topk_idx_(it.rank, it.shape.tokens, it.shape.top_k * sizeof(int64_t)),
        weights_(it.rank, it.shape.tokens, it.shape.top_k * sizeof(float)),
        expert_x_(it.rank, it.shape.local_experts() * it.shape.worst_rows(), row_bytes()),
        combined_x_(it.rank, it.shape.tokens + 1ull, row_bytes()) {}

  void prepare(uint32_t iteration) override;
  void poison() override {
    dispatch_->poison();
    combined_x_.fill(kPoison);
  }
  void issue(expertd_event_t* event) override;
  void verify(const expertd_op_result_t& result) override;
  BenchBytes bytes() const override;

 private:
  uint64_t row_bytes() const { return case_.shape.hidden * 2ull; }
  void write_expert_rows();
  std::vector<BenchTerm> terms_of(uint64_t token) const;

  const BenchCase case_;
  BenchCheck check_;
  BenchInput input_;
  std::unique_ptr<BenchRouting> routing_;
  std::unique_ptr<BenchOperation> dispatch_;
  expertd_event_t dispatched_{};
  BenchTensor topk_idx_, weights_, expert_x_, combined_x_;
};

/// An expert's rows lie behind one another, as the dispatch's own check says.
void LowLatencyPair::write_expert_rows() {
  const BenchShape& shape = case_.shape;
  const uint32_t own = case_.rank->index();
  expert_x_.fill(kForbidden);
  uint64_t local = 0;
  for (const std::vector<BenchRow>& rows : routing_->expert_rows(own)) {
    const uint64_t expert = uint64_t{own} * shape.local_experts() + local;
    expert_x_.write_rows(local * shape.worst_rows(), rows.size(), [&](uint64_t, std::span<uint8_t> row) {
      input_.bf16_row(BenchStream::kExperts, expert, 0, elements<uint16_t>(row));
    });
    ++local;
  }
}

void LowLatencyPair::prepare(uint32_t iteration) {
  check_.set_iteration(iteration);
  input_ = case_.input(iteration);
  routing_ = std::make_unique<BenchRouting>(case_.shape, input_);
  dispatch_->prepare(iteration);
  write_routing(case_, *routing_, &topk_idx_);
  const uint32_t own = case_.rank->index();
  weights_.write_rows(0, case_.shape.tokens, [&](uint64_t token, std::span<uint8_t> row) {
    for (uint32_t lane = 0; lane < case_.shape.top_k; ++lane) {
      elements<float>(row)[lane] = input_.weight(BenchStream::kWeights, own, token, lane);
    }
  });
  write_expert_rows();
}

void LowLatencyPair::issue(expertd_event_t* event) {
  dispatch_->issue(&dispatched_);
  auto args = EXPERTD_INIT(expertd_ll_combine_args_t);
  args.x = expert_x_.data();
  args.topk_idx = topk_idx_.data();
  args.idx_type = EXPERTD_I64;
  args.topk_weights = weights_.as<float>();
  args.handle = dispatch_->handle();
  args.tokens = case_.shape.tokens;
  args.combined_x = combined_x_.data();
  args.timeout_ns = case_.rank->timeout_ns();
  case_.rank->check(expertd_ll_combine(case_.rank->group(), &args, case_.rank->stream(), event), case_.name);
}

std::vector<BenchTerm> LowLatencyPair::terms_of(uint64_t token) const {
  const uint32_t own = case_.rank->index();
  std::vector<BenchTerm> terms;
  for (uint32_t lane = 0; lane < case_.shape.top_k; ++lane) {
    const int32_t expert = routing_->expert(own, token, lane);
    if (expert >= 0) {
      BenchTerm term{input_.weight(BenchStream::kWeights, own, token, lane), std::vector<uint16_t>(case_.shape.hidden)};
      input_.bf16_row(BenchStream::kExperts, static_cast<uint64_t>(expert), 0, term.row);
      terms.push_back(std::move(term));
    }
  }
  return terms;
}

void LowLatencyPair::verify(const expertd_op_result_t& result) {
  dispatch_->verify(case_.captured ? result : case_.rank->wait(dispatched_, "dispatch of " + case_.name));
  check_weighted_sums(
      check_, combined_x_, case_.shape.tokens, [this](uint64_t token) { return terms_of(token); },
      case_.options.spans_daemons() ? kBenchRoundingsOverDaemons : kBenchRoundings);
}

BenchBytes LowLatencyPair::bytes() const {
  BenchBytes bytes = dispatch_->bytes();
  const uint32_t own = case_.rank->index();
  for (uint64_t token = 0; token < case_.shape.tokens; ++token) {
    for (uint32_t lane = 0; lane < case_.shape.top_k; ++lane) {
      const int32_t rank = routing_->rank(own, token, lane);
      bytes.logical += rank >= 0 ? row_bytes() : 0;
      bytes.remote += rank >= 0 && rank != static_cast<int32_t>(own) ? row_bytes() : 0;
    }
  }
  return bytes;
}

}  // namespace

BenchRowSpec low_latency_pair_row() {
  return {"ll_pair", "fp8 float32 scales", true, true,
          [](const BenchCase& it) { return std::make_unique<LowLatencyPair>(it); }};
}

}  // namespace expertd::ctl
