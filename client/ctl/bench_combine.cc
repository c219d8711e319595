// SPDX-License-Identifier: Apache-2.0
// High throughput combine in its forms. The rows that experts return are inputs of their own, not what was dispatched,
// so that a wrong dispatch does not hide in a right combine.
#include <algorithm>
#include <cmath>
#include <utility>

#include "client/ctl/bench_numerics.h"
#include "client/ctl/bench_operation.h"
#include "client/ctl/bench_weighted_sum.h"

namespace expertd::ctl {

namespace {

constexpr uint64_t kSpareRows = 16;
/// Of a weight that several daemons add up in float32.
constexpr float kWeightErrorMax = 1e-5f;

struct CombineForm {
  bool bias = false;
  bool weights = false;
  bool expanded = false;
};

class Combine final : public BenchOperation {
 public:
  Combine(const BenchCase& it, const CombineForm& form);
  ~Combine() override {
    if (handle_.generation != 0) {
      // A failure means that the session ended, and the handle with it.
      static_cast<void>(expertd_handle_free(case_.rank->group(), handle_));
    }
  }

  void prepare(uint32_t iteration) override;
  void poison() override {
    combined_x_.fill(kPoison);
    combined_weights_.fill(kPoison);
  }
  void issue(expertd_event_t* event) override;
  void verify(const expertd_op_result_t&) override;
  BenchBytes bytes() const override;

 private:
  uint32_t lanes_in() const { return form_.expanded ? 1 : case_.shape.top_k; }
  uint64_t row_bytes() const { return case_.shape.hidden * 2ull; }
  std::vector<BenchRow> rows_at(const BenchRouting& routing, uint32_t rank) const {
    return form_.expanded ? routing.expanded_rows(rank, alignment_) : routing.plain_rows(rank);
  }
  void route();
  void write_expert_rows();
  void find_places();
  void expected_row(uint64_t token, std::span<uint16_t> row, std::span<float> weights) const;
  void add_rank(uint32_t rank, uint64_t token, std::span<float> sum, std::span<float> weights) const;
  std::vector<BenchTerm> terms_of(uint64_t token) const;
  void verify_weights(const std::vector<float>& expected) const;

  const BenchCase case_;
  const CombineForm form_;
  const uint32_t alignment_;
  BenchCheck check_;
  BenchInput input_;
  std::unique_ptr<BenchRouting> routing_;
  uint64_t capacity_ = 0;
  expertd_handle_t handle_{};
  std::vector<int64_t> places_;  // [T,R], expanded [T,K]: row of a token at a rank, of a lane at its owner, or -1
  BenchTensor topk_idx_, bias0_, bias1_, x_, weights_, combined_x_, combined_weights_;
};

Combine::Combine(const BenchCase& it, const CombineForm& form)
    : case_(it),
      form_(form),
      alignment_(form.expanded ? expanded_alignment(it.shape) : 1),
      check_(it.name, it.rank->index()),
      input_(it.input(0)) {
  const BenchShape& shape = it.shape;
  for (const uint32_t iteration : it.verified_iterations()) {
    const BenchRouting routing(shape, it.input(iteration));
    for (uint32_t rank = 0; rank < shape.ranks; ++rank) {
      capacity_ = std::max<uint64_t>(capacity_, rows_at(routing, rank).size() + kSpareRows);
    }
  }
  topk_idx_ = BenchTensor(it.rank, shape.tokens, shape.top_k * sizeof(int64_t));
  bias0_ = BenchTensor(it.rank, form.bias ? shape.tokens : 0, row_bytes());
  bias1_ = BenchTensor(it.rank, form.bias ? shape.tokens : 0, row_bytes());
  x_ = BenchTensor(it.rank, capacity_, row_bytes());
  weights_ = BenchTensor(it.rank, capacity_, lanes_in() * sizeof(float));
  // One row more than is written.
  combined_x_ = BenchTensor(it.rank, shape.tokens + 1ull, row_bytes());
  combined_weights_ = BenchTensor(it.rank, shape.tokens + 1ull, shape.top_k * sizeof(float));
}

/// The dispatch whose handle is combined; its payload does not matter.
void Combine::route() {
  BenchRank* const rank = case_.rank;
  if (handle_.generation != 0) {
    rank->check(expertd_handle_free(rank->group(), std::exchange(handle_, {})), "free of a handle");
  }
  auto args = EXPERTD_INIT(expertd_dispatch_args_t);
  args.x = combined_x_.data();
  args.dtype = EXPERTD_BF16;
  args.topk_idx = topk_idx_.data();
  args.idx_type = EXPERTD_I64;
  args.tokens = case_.shape.tokens;
  args.capacity_rows = static_cast<uint32_t>(capacity_);
  args.expert_alignment = alignment_;
  args.recv_x = x_.data();
  args.flags = flag(EXPERTD_EXPANDED, form_.expanded);
  args.timeout_ns = rank->timeout_ns();
  expertd_event_t event{};
  rank->check(expertd_dispatch(rank->group(), &args, rank->stream(), &handle_, &event), "routing of " + case_.name);
  rank->wait(event, "routing of " + case_.name);
}

void Combine::write_expert_rows() {
  const uint32_t own = case_.rank->index();
  const std::vector<BenchRow> rows = rows_at(*routing_, own);
  x_.write_rows(0, capacity_, [&](uint64_t at, std::span<uint8_t> row) {
    if (at < rows.size() && rows[at].source >= 0) {
      input_.bf16_row(BenchStream::kExperts, own, at, elements<uint16_t>(row));
    } else {
      std::fill(row.begin(), row.end(), kForbidden);
    }
  });
  weights_.write_rows(0, capacity_, [&](uint64_t at, std::span<uint8_t> row) {
    for (uint32_t lane = 0; lane < lanes_in(); ++lane) {
      elements<float>(row)[lane] = input_.weight(BenchStream::kRowWeights, own, at, lane);
    }
  });
}

void Combine::find_places() {
  const BenchShape& shape = case_.shape;
  const uint64_t columns = form_.expanded ? shape.top_k : shape.ranks;
  places_.assign(shape.tokens * columns, -1);
  for (uint32_t rank = 0; rank < shape.ranks; ++rank) {
    const std::vector<BenchRow> rows = rows_at(*routing_, rank);
    for (uint64_t at = 0; at < rows.size(); ++at) {
      if (rows[at].source == static_cast<int32_t>(case_.rank->index())) {
        const uint64_t column = form_.expanded ? static_cast<uint64_t>(rows[at].lane) : rank;
        places_[static_cast<uint64_t>(rows[at].token) * columns + column] = static_cast<int64_t>(at);
      }
    }
  }
}

void Combine::prepare(uint32_t iteration) {
  check_.set_iteration(iteration);
  input_ = case_.input(iteration);
  routing_ = std::make_unique<BenchRouting>(case_.shape, input_);
  write_routing(case_, *routing_, &topk_idx_);
  combined_x_.fill(0);
  route();
  write_expert_rows();
  find_places();
  const uint32_t own = case_.rank->index();
  bias0_.write_rows(0, bias0_.rows(), [&](uint64_t token, std::span<uint8_t> row) {
    input_.bf16_row(BenchStream::kBias0, own, token, elements<uint16_t>(row));
  });
  bias1_.write_rows(0, bias1_.rows(), [&](uint64_t token, std::span<uint8_t> row) {
    input_.bf16_row(BenchStream::kBias1, own, token, elements<uint16_t>(row));
  });
}

void Combine::issue(expertd_event_t* event) {
  auto args = EXPERTD_INIT(expertd_combine_args_t);
  args.x = x_.data();
  args.rows = static_cast<uint32_t>(capacity_);
  args.topk_weights = form_.weights ? weights_.as<float>() : nullptr;
  args.bias0 = form_.bias ? bias0_.data() : nullptr;
  args.bias1 = form_.bias ? bias1_.data() : nullptr;
  args.handle = handle_;
  args.tokens = case_.shape.tokens;
  args.combined_x = combined_x_.data();
  args.combined_topk_weights = form_.weights ? combined_weights_.as<float>() : nullptr;
  args.flags = flag(EXPERTD_EXPANDED, form_.expanded);
  args.timeout_ns = case_.rank->timeout_ns();
  case_.rank->check(expertd_combine(case_.rank->group(), &args, case_.rank->stream(), event), case_.name);
}

/// What one rank's rows add to a token: in float32; rows of an expanded combine in lane order, rounded once per rank.
void Combine::add_rank(uint32_t rank, uint64_t token, std::span<float> sum, std::span<float> weights) const {
  const BenchShape& shape = case_.shape;
  std::vector<uint16_t> row(shape.hidden);
  std::vector<float> partial(shape.hidden, 0.0f);
  const uint64_t own = case_.rank->index();
  bool any = false;
  for (uint32_t lane = 0; lane < (form_.expanded ? shape.top_k : 1); ++lane) {
    if (form_.expanded && routing_->rank(own, token, lane) != static_cast<int32_t>(rank)) {
      continue;
    }
    const int64_t place = form_.expanded ? places_[token * shape.top_k + lane] : places_[token * shape.ranks + rank];
    if (place < 0) {
      continue;
    }
    any = true;
    input_.bf16_row(BenchStream::kExperts, rank, static_cast<uint64_t>(place), row);
    for (uint32_t i = 0; i < shape.hidden; ++i) {
      partial[i] += bf16_to_float(row[i]);
    }
    for (uint32_t k = form_.expanded ? lane : 0; k < (form_.expanded ? lane + 1 : shape.top_k); ++k) {
      const uint32_t column = form_.expanded ? 0 : k;
      weights[k] += input_.weight(BenchStream::kRowWeights, rank, static_cast<uint64_t>(place), column);
    }
  }
  for (uint32_t i = 0; any && i < shape.hidden; ++i) {
    sum[i] += form_.expanded ? bf16_to_float(float_to_bf16(partial[i])) : partial[i];
  }
}

void Combine::expected_row(uint64_t token, std::span<uint16_t> row, std::span<float> weights) const {
  std::vector<float> sum(case_.shape.hidden, 0.0f);
  std::fill(weights.begin(), weights.end(), 0.0f);
  const uint32_t own = case_.rank->index();
  for (const BenchStream bias : {BenchStream::kBias0, BenchStream::kBias1}) {
    if (form_.bias) {
      input_.bf16_row(bias, own, token, row);
      for (size_t i = 0; i < sum.size(); ++i) {
        sum[i] += bf16_to_float(row[i]);
      }
    }
  }
  for (uint32_t rank = 0; rank < case_.shape.ranks; ++rank) {
    add_rank(rank, token, sum, weights);
  }
  std::transform(sum.begin(), sum.end(), row.begin(), float_to_bf16);
}

/// Everything that is added to a token's row.
std::vector<BenchTerm> Combine::terms_of(uint64_t token) const {
  std::vector<BenchTerm> terms;
  const uint32_t own = case_.rank->index();
  const auto add = [&](BenchStream stream, uint32_t rank, uint64_t row) {
    terms.push_back({1.0f, std::vector<uint16_t>(case_.shape.hidden)});
    input_.bf16_row(stream, rank, row, terms.back().row);
  };
  if (form_.bias) {
    add(BenchStream::kBias0, own, token);
    add(BenchStream::kBias1, own, token);
  }
  const uint64_t columns = form_.expanded ? case_.shape.top_k : case_.shape.ranks;
  for (uint64_t column = 0; column < columns; ++column) {
    const int64_t place = places_[token * columns + column];
    if (place >= 0) {
      const auto rank =
          form_.expanded ? static_cast<uint32_t>(routing_->rank(own, token, column)) : static_cast<uint32_t>(column);
      add(BenchStream::kExperts, rank, static_cast<uint64_t>(place));
    }
  }
  return terms;
}

void Combine::verify(const expertd_op_result_t&) {
  const uint64_t tokens = case_.shape.tokens;
  const uint32_t top_k = case_.shape.top_k;
  std::vector<uint16_t> expected(case_.shape.hidden);
  std::vector<float> weights(tokens * top_k);
  const bool exact = !case_.options.spans_daemons();
  combined_x_.read_rows(0, tokens, [&](uint64_t token, const uint8_t* got) {
    expected_row(token, expected, {weights.data() + token * top_k, top_k});
    if (exact) {
      check_.row("combined_x", token, got, expected.data(), row_bytes(), sizeof(uint16_t));
    }
  });
  if (exact) {
    check_.untouched("combined_x", combined_x_, tokens, 1);
  } else {
    check_weighted_sums(
        check_, combined_x_, tokens, [this](uint64_t token) { return terms_of(token); }, kBenchRoundingsOverDaemons);
  }
  verify_weights(weights);
}

void Combine::verify_weights(const std::vector<float>& expected) const {
  const uint64_t tokens = case_.shape.tokens;
  const uint32_t top_k = case_.shape.top_k;
  combined_weights_.read_rows(0, form_.weights ? tokens : 0, [&](uint64_t token, const uint8_t* got) {
    const float* row = expected.data() + token * top_k;
    const auto* values = reinterpret_cast<const float*>(got);
    const bool near = case_.options.spans_daemons() && std::equal(row, row + top_k, values, [](float a, float b) {
                        return std::fabs(a - b) <= kWeightErrorMax;  // false for a NaN
                      });
    if (!near) {
      check_.row("combined_topk_weights", token, got, row, combined_weights_.row_bytes(), sizeof(float));
    }
  });
  check_.untouched("combined_topk_weights", combined_weights_, tokens, 1);
}

BenchBytes Combine::bytes() const {
  BenchBytes bytes;
  const uint64_t columns = form_.expanded ? case_.shape.top_k : case_.shape.ranks;
  for (uint64_t at = 0; at < places_.size(); ++at) {
    if (places_[at] >= 0) {
      const int32_t rank = form_.expanded ? routing_->rank(case_.rank->index(), at / columns, at % columns)
                                          : static_cast<int32_t>(at % columns);
      bytes.logical += row_bytes();
      bytes.remote += rank == static_cast<int32_t>(case_.rank->index()) ? 0 : row_bytes();
    }
  }
  return bytes;
}

BenchRowSpec spec(const std::string& flags, const CombineForm& form) {
  return {"combine", flags, false, true, [form](const BenchCase& it) { return std::make_unique<Combine>(it, form); }};
}

}  // namespace

std::vector<BenchRowSpec> combine_rows(const BenchShape& shape) {
  return {
      spec("bf16", {}),
      spec("bf16 bias0 + bias1", {.bias = true}),
      spec("bf16 weights", {.weights = true}),
      spec("bf16 expanded align=" + std::to_string(expanded_alignment(shape)), {.weights = true, .expanded = true}),
  };
}

}  // namespace expertd::ctl
