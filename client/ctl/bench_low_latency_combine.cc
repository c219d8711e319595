// SPDX-License-Identifier: Apache-2.0
// Low latency combine from a tensor and, without a copy, from the group's window. What experts return for a row is a
// function of (expert, source rank, token), because the order of rows is free.
#include <algorithm>

#include "client/ctl/bench_operation.h"
#include "client/ctl/bench_weighted_sum.h"

namespace expertd::ctl {

namespace {

class LowLatencyCombine final : public BenchOperation {
 public:
  LowLatencyCombine(const BenchCase& it, bool zero_copy);

  void prepare(uint32_t iteration) override;
  void poison() override { combined_x_.fill(kPoison); }
  void issue(expertd_event_t* event) override;
  void verify(const expertd_op_result_t&) override;
  BenchBytes bytes() const override;

 private:
  uint64_t row_bytes() const { return case_.shape.hidden * 2ull; }
  void route();
  void write_expert_rows(const expertd_ll_outputs_t& outputs);
  std::vector<BenchTerm> terms_of(uint64_t token) const;

  const BenchCase case_;
  const bool zero_copy_;
  BenchCheck check_;
  BenchInput input_;
  std::unique_ptr<BenchRouting> routing_;
  expertd_handle_t handle_{};  // of the low latency rotation: not to be freed
  BenchTensor x_, topk_idx_, weights_, expert_x_, combined_x_;
};

LowLatencyCombine::LowLatencyCombine(const BenchCase& it, bool zero_copy)
    : case_(it), zero_copy_(zero_copy), check_(it.name, it.rank->index()), input_(it.input(0)) {
  const BenchShape& shape = it.shape;
  x_ = BenchTensor(it.rank, shape.tokens, row_bytes());
  topk_idx_ = BenchTensor(it.rank, shape.tokens, shape.top_k * sizeof(int64_t));
  weights_ = BenchTensor(it.rank, shape.tokens, shape.top_k * sizeof(float));
  expert_x_ = BenchTensor(it.rank, zero_copy ? 0 : shape.local_experts() * shape.worst_rows(), row_bytes());
  combined_x_ = BenchTensor(it.rank, shape.tokens + 1ull, row_bytes());
}

/// The dispatch whose handle is combined; its outputs lie in the group's window.
void LowLatencyCombine::route() {
  BenchRank* const rank = case_.rank;
  auto args = EXPERTD_INIT(expertd_ll_dispatch_args_t);
  args.x = x_.data();
  args.dtype = EXPERTD_BF16;
  args.topk_idx = topk_idx_.data();
  args.idx_type = EXPERTD_I64;
  args.tokens = case_.shape.tokens;
  args.timeout_ns = rank->timeout_ns();
  expertd_event_t event{};
  rank->check(expertd_ll_dispatch(rank->group(), &args, rank->stream(), &handle_, &event), "routing of " + case_.name);
  rank->wait(event, "routing of " + case_.name);
  auto outputs = EXPERTD_INIT(expertd_ll_outputs_t);
  rank->check(expertd_ll_handle_outputs(rank->group(), handle_, &outputs), "outputs of " + case_.name);
  check_.number("rows per expert of the window", outputs.rows_per_expert, case_.shape.worst_rows());
  write_expert_rows(outputs);
}

void LowLatencyCombine::write_expert_rows(const expertd_ll_outputs_t& outputs) {
  const BenchShape& shape = case_.shape;
  const uint64_t rows = shape.local_experts() * shape.worst_rows();
  std::vector<int32_t> tokens(rows);
  std::vector<int64_t> ranges(uint64_t{shape.local_experts()} * shape.ranks);
  case_.rank->read(outputs.recv_src_info, tokens.data(), rows * sizeof(int32_t));
  case_.rank->read(outputs.layout_range, ranges.data(), ranges.size() * sizeof(int64_t));
  BenchTensor window = BenchTensor::view(case_.rank, outputs.combine_x, rows, row_bytes());
  BenchTensor& target = zero_copy_ ? window : expert_x_;
  target.fill(kForbidden);
  const uint64_t first_expert = uint64_t{case_.rank->index()} * shape.local_experts();
  for (uint64_t at = 0; at < ranges.size(); ++at) {
    const auto begin = static_cast<uint64_t>(ranges[at]) >> 32;
    const auto count = static_cast<uint64_t>(ranges[at]) & 0xffffffff;
    const uint64_t local = at / shape.ranks;
    if (begin + count > shape.worst_rows()) {
      check_.fail("layout_range of local expert " + std::to_string(local) + ": outside its slots");
    }
    target.write_rows(local * shape.worst_rows() + begin, count, [&](uint64_t slot, std::span<uint8_t> row) {
      const uint64_t origin = at % shape.ranks * shape.tokens + static_cast<uint64_t>(tokens[slot]);
      input_.bf16_row(BenchStream::kExperts, first_expert + local, origin, elements<uint16_t>(row));
    });
  }
}

void LowLatencyCombine::prepare(uint32_t iteration) {
  check_.set_iteration(iteration);
  input_ = case_.input(iteration);
  routing_ = std::make_unique<BenchRouting>(case_.shape, input_);
  write_tokens(case_, input_, &x_);
  write_routing(case_, *routing_, &topk_idx_);
  const uint32_t own = case_.rank->index();
  weights_.write_rows(0, case_.shape.tokens, [&](uint64_t token, std::span<uint8_t> row) {
    for (uint32_t lane = 0; lane < case_.shape.top_k; ++lane) {
      elements<float>(row)[lane] = input_.weight(BenchStream::kWeights, own, token, lane);
    }
  });
  route();
}

void LowLatencyCombine::issue(expertd_event_t* event) {
  auto args = EXPERTD_INIT(expertd_ll_combine_args_t);
  args.x = zero_copy_ ? nullptr : expert_x_.data();
  args.topk_idx = topk_idx_.data();
  args.idx_type = EXPERTD_I64;
  args.topk_weights = weights_.as<float>();
  args.handle = handle_;
  args.tokens = case_.shape.tokens;
  args.combined_x = combined_x_.data();
  args.flags = case_.extra_flags;
  args.timeout_ns = case_.rank->timeout_ns();
  case_.rank->check(expertd_ll_combine(case_.rank->group(), &args, case_.rank->stream(), event), case_.name);
}

std::vector<BenchTerm> LowLatencyCombine::terms_of(uint64_t token) const {
  const uint32_t own = case_.rank->index();
  std::vector<BenchTerm> terms;
  for (uint32_t lane = 0; lane < case_.shape.top_k; ++lane) {
    const int32_t expert = routing_->expert(own, token, lane);
    if (expert >= 0) {
      BenchTerm term{input_.weight(BenchStream::kWeights, own, token, lane), std::vector<uint16_t>(case_.shape.hidden)};
      input_.bf16_row(BenchStream::kExperts, static_cast<uint64_t>(expert), uint64_t{own} * case_.shape.tokens + token,
                      term.row);
      terms.push_back(std::move(term));
    }
  }
  return terms;
}

void LowLatencyCombine::verify(const expertd_op_result_t&) {
  check_weighted_sums(
      check_, combined_x_, case_.shape.tokens, [this](uint64_t token) { return terms_of(token); },
      case_.options.spans_daemons() ? kBenchRoundingsOverDaemons : kBenchRoundings);
}

BenchBytes LowLatencyCombine::bytes() const {
  BenchBytes bytes;
  for (uint64_t token = 0; token < case_.shape.tokens; ++token) {
    for (uint32_t lane = 0; lane < case_.shape.top_k; ++lane) {
      const int32_t rank = routing_->rank(case_.rank->index(), token, lane);
      bytes.logical += rank >= 0 ? row_bytes() : 0;
      bytes.remote += rank >= 0 && rank != static_cast<int32_t>(case_.rank->index()) ? row_bytes() : 0;
    }
  }
  return bytes;
}

BenchRowSpec spec(const char* flags, bool zero_copy) {
  return {"ll_combine", flags, true, true,
          [zero_copy](const BenchCase& it) { return std::make_unique<LowLatencyCombine>(it, zero_copy); }};
}

}  // namespace

std::vector<BenchRowSpec> low_latency_combine_rows() {
  return {spec("bf16", false), spec("bf16 zero copy", true)};
}

}  // namespace expertd::ctl
