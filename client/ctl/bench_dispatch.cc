// SPDX-License-Identifier: Apache-2.0
// High throughput dispatch in its forms.
#include <algorithm>
#include <cstring>
#include <utility>

#include "client/ctl/bench_operation.h"

namespace expertd::ctl {

namespace {

/// Rows behind the last that must stay as they are.
constexpr uint64_t kSpareRows = 16;

struct DispatchForm {
  bool weights = false;
  bool worst = false;
  bool cached = false;
  bool expanded = false;
  bool bytes = false;   // with int32 ids and a column-major side tensor of 4-byte elements
  bool scales = false;  // of byte rows: the side tensor is row-major, as float32 scales are; with int64 ids
};

class Dispatch final : public BenchOperation {
 public:
  Dispatch(const BenchCase& it, const DispatchForm& form);
  ~Dispatch() override {
    if (handle_.generation != 0) {
      // A failure means that the session ended, and the handle with it.
      static_cast<void>(expertd_handle_free(case_.rank->group(), handle_));
    }
  }

  void prepare(uint32_t iteration) override;
  void poison() override;
  void issue(expertd_event_t* event) override;
  void finish() override;
  void verify(const expertd_op_result_t& result) override;
  BenchBytes bytes() const override;

 private:
  static constexpr uint32_t kSideBytes = 4;

  uint32_t id_bytes() const { return form_.bytes && !form_.scales ? 4 : 8; }
  uint32_t lanes_out() const { return form_.expanded ? 1 : case_.shape.top_k; }
  uint32_t side_elements() const { return form_.bytes ? case_.shape.hidden / 128 : 0; }
  uint64_t row_bytes() const { return form_.bytes ? case_.shape.hidden : case_.shape.hidden * 2ull; }
  std::vector<BenchRow> rows_at(const BenchRouting& routing, uint32_t rank) const {
    return form_.expanded ? routing.expanded_rows(rank, alignment_) : routing.plain_rows(rank);
  }
  expertd_dispatch_args_t arguments() const;
  void write_side(const BenchInput& input);
  void expected_payload(uint64_t source, uint64_t token, std::span<uint8_t> row) const;
  void verify_payload();
  void verify_lanes();
  void verify_counts(const expertd_op_result_t& result);

  const BenchCase case_;
  const DispatchForm form_;
  const uint32_t alignment_;
  BenchCheck check_;
  BenchInput input_;
  std::unique_ptr<BenchRouting> routing_;
  std::vector<BenchRow> rows_;
  uint64_t capacity_ = 0;
  expertd_handle_t handle_{};
  BenchTensor x_, side_, topk_idx_, weights_;
  BenchTensor recv_x_, recv_side_, recv_idx_, recv_weights_, src_info_, counts_, prefix_;
};

Dispatch::Dispatch(const BenchCase& it, const DispatchForm& form)
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
  capacity_ = form.worst ? shape.worst_rows() : capacity_;
  x_ = BenchTensor(it.rank, shape.tokens, row_bytes());
  topk_idx_ = BenchTensor(it.rank, shape.tokens, uint64_t{shape.top_k} * id_bytes());
  weights_ = BenchTensor(it.rank, shape.tokens, shape.top_k * sizeof(float));
  side_ = BenchTensor(it.rank, side_elements(), uint64_t{shape.tokens} * kSideBytes);
  recv_x_ = BenchTensor(it.rank, capacity_, row_bytes());
  recv_side_ = BenchTensor(it.rank, capacity_, uint64_t{side_elements()} * kSideBytes);
  recv_idx_ = BenchTensor(it.rank, capacity_, uint64_t{lanes_out()} * id_bytes());
  recv_weights_ = BenchTensor(it.rank, capacity_, lanes_out() * sizeof(float));
  src_info_ = BenchTensor(it.rank, capacity_, sizeof(int32_t));
  counts_ = BenchTensor(it.rank, shape.local_experts(), sizeof(int32_t));
  prefix_ = BenchTensor(it.rank, uint64_t{shape.ranks} * shape.ranks, sizeof(int32_t));
}

void Dispatch::expected_payload(uint64_t source, uint64_t token, std::span<uint8_t> row) const {
  if (form_.bytes) {
    input_.byte_row(BenchStream::kTokens, source, token, row);
  } else {
    input_.bf16_row(BenchStream::kTokens, source, token, elements<uint16_t>(row));
  }
}

void Dispatch::write_side(const BenchInput& input) {
  const uint64_t elements_per_row = side_elements();
  std::vector<uint32_t> columns(elements_per_row * case_.shape.tokens);
  std::vector<uint8_t> row(elements_per_row * kSideBytes);
  for (uint64_t token = 0; token < case_.shape.tokens && !row.empty(); ++token) {
    input.byte_row(BenchStream::kSide, case_.rank->index(), token, row);
    for (uint64_t element = 0; element < elements_per_row; ++element) {
      const uint64_t at = form_.scales ? token * elements_per_row + element : element * case_.shape.tokens + token;
      std::memcpy(&columns[at], &row[element * kSideBytes], kSideBytes);
    }
  }
  side_.write_all(columns);
}

void Dispatch::prepare(uint32_t iteration) {
  finish();
  if (form_.cached && handle_.generation != 0) {
    case_.rank->check(expertd_handle_free(case_.rank->group(), std::exchange(handle_, {})), "free of a handle");
  }
  check_.set_iteration(iteration);
  input_ = case_.input(iteration);
  routing_ = std::make_unique<BenchRouting>(case_.shape, input_);
  rows_ = rows_at(*routing_, case_.rank->index());
  const uint32_t own = case_.rank->index();
  x_.write_rows(0, case_.shape.tokens,
                [&](uint64_t token, std::span<uint8_t> row) { expected_payload(own, token, row); });
  write_side(input_);
  write_routing(case_, *routing_, &topk_idx_);
  weights_.write_rows(0, case_.shape.tokens, [&](uint64_t token, std::span<uint8_t> row) {
    for (uint32_t lane = 0; lane < case_.shape.top_k; ++lane) {
      elements<float>(row)[lane] = input_.weight(BenchStream::kWeights, own, token, lane);
    }
  });
  if (form_.cached) {
    const expertd_dispatch_args_t args = arguments();
    expertd_event_t event{};
    case_.rank->check(expertd_dispatch(case_.rank->group(), &args, case_.rank->stream(), &handle_, &event),
                      "routing of " + case_.name);
    case_.rank->wait(event, "routing of " + case_.name);
  }
}

void Dispatch::poison() {
  for (BenchTensor* tensor : {&recv_x_, &recv_side_, &recv_idx_, &recv_weights_, &src_info_, &counts_, &prefix_}) {
    tensor->fill(kPoison);
  }
}

expertd_dispatch_args_t Dispatch::arguments() const {
  auto args = EXPERTD_INIT(expertd_dispatch_args_t);
  args.x = x_.data();
  args.dtype = form_.bytes ? EXPERTD_BYTES : EXPERTD_BF16;
  if (form_.bytes) {
    args.row_bytes = static_cast<uint32_t>(row_bytes());
    args.side = side_.data();
    args.side_elements = side_elements();
    args.side_element_bytes = kSideBytes;
    if (!form_.scales) {
      args.side_row_stride = kSideBytes;
      args.side_element_stride = int64_t{case_.shape.tokens} * kSideBytes;
    }
    args.recv_side = recv_side_.data();
  }
  args.idx_type = id_bytes() == 4 ? EXPERTD_I32 : EXPERTD_I64;
  args.tokens = case_.shape.tokens;
  args.capacity_rows = static_cast<uint32_t>(capacity_);
  args.recv_x = recv_x_.data();
  args.timeout_ns = case_.rank->timeout_ns();
  args.cached = handle_;
  if (handle_.generation != 0) {
    return args;
  }
  args.topk_idx = topk_idx_.data();
  args.topk_weights = form_.weights ? weights_.as<float>() : nullptr;
  args.expert_alignment = alignment_;
  args.recv_topk_idx = recv_idx_.data();
  args.recv_topk_weights = form_.weights ? recv_weights_.as<float>() : nullptr;
  args.recv_src_info = src_info_.as<int32_t>();
  args.expert_counts = counts_.as<int32_t>();
  args.rank_prefix = prefix_.as<int32_t>();
  args.flags = flag(EXPERTD_WORST_TOKENS, form_.worst) | flag(EXPERTD_EXPANDED, form_.expanded);
  return args;
}

void Dispatch::issue(expertd_event_t* event) {
  const expertd_dispatch_args_t args = arguments();
  expertd_handle_t* const handle = form_.cached ? nullptr : &handle_;
  case_.rank->check(expertd_dispatch(case_.rank->group(), &args, case_.rank->stream(), handle, event), case_.name);
}

void Dispatch::finish() {
  if (!form_.cached && handle_.generation != 0) {
    case_.rank->check(expertd_handle_free(case_.rank->group(), std::exchange(handle_, {})), "free of a handle");
  }
}

void Dispatch::verify(const expertd_op_result_t& result) {
  verify_payload();
  if (!form_.cached) {
    verify_lanes();
    verify_counts(result);
  }
}

void Dispatch::verify_payload() {
  std::vector<uint8_t> expected(row_bytes());
  recv_x_.read_rows(0, capacity_, [&](uint64_t at, const uint8_t* got) {
    if (at >= rows_.size()) {
      check_.untouched_row("recv_x", at, got, row_bytes());
    } else if (rows_[at].source >= 0) {
      expected_payload(static_cast<uint64_t>(rows_[at].source), static_cast<uint64_t>(rows_[at].token), expected);
      check_.row("recv_x", at, got, expected.data(), expected.size(), form_.bytes ? 1 : 2);
    }
  });
  if (!form_.bytes) {
    return;
  }
  expected.resize(recv_side_.row_bytes());
  recv_side_.read_rows(0, capacity_, [&](uint64_t at, const uint8_t* got) {
    if (at >= rows_.size()) {
      check_.untouched_row("recv_side", at, got, recv_side_.row_bytes());
    } else if (rows_[at].source >= 0) {
      input_.byte_row(BenchStream::kSide, static_cast<uint64_t>(rows_[at].source),
                      static_cast<uint64_t>(rows_[at].token), expected);
      check_.row("recv_side", at, got, expected.data(), expected.size(), kSideBytes);
    }
  });
}

void Dispatch::verify_lanes() {
  const uint32_t own = case_.rank->index();
  const int32_t first_expert = static_cast<int32_t>(own * case_.shape.local_experts());
  const uint64_t end = form_.worst ? capacity_ : rows_.size();
  std::vector<uint8_t> ids(recv_idx_.row_bytes());
  std::vector<std::vector<float>> weights(capacity_);
  recv_idx_.read_rows(0, capacity_, [&](uint64_t at, const uint8_t* got) {
    if (at >= end) {
      return check_.untouched_row("recv_topk_idx", at, got, ids.size());
    }
    const BenchRow row = at < rows_.size() ? rows_[at] : BenchRow{};
    for (uint32_t lane = 0; lane < lanes_out(); ++lane) {
      const auto source = static_cast<uint64_t>(row.source);
      const auto token = static_cast<uint64_t>(row.token);
      const uint64_t from = form_.expanded ? static_cast<uint64_t>(row.lane) : lane;
      const bool local = row.source >= 0 && routing_->rank(source, token, from) == static_cast<int32_t>(own);
      put_integer(ids.data() + lane * id_bytes(), local ? routing_->expert(source, token, from) - first_expert : -1,
                  id_bytes());
      weights[at].push_back(local ? input_.weight(BenchStream::kWeights, source, token, from) : 0.0f);
    }
    check_.row("recv_topk_idx", at, got, ids.data(), ids.size(), id_bytes());
  });
  recv_weights_.read_rows(0, form_.weights ? capacity_ : 0, [&](uint64_t at, const uint8_t* got) {
    if (at >= end) {
      return check_.untouched_row("recv_topk_weights", at, got, recv_weights_.row_bytes());
    }
    check_.row("recv_topk_weights", at, got, weights[at].data(), recv_weights_.row_bytes(), sizeof(float));
  });
  src_info_.read_rows(0, form_.worst ? rows_.size() : capacity_, [&](uint64_t at, const uint8_t* got) {
    if (at >= rows_.size()) {
      check_.untouched_row("recv_src_info", at, got, sizeof(int32_t));
    } else if (rows_[at].source >= 0) {
      check_.row("recv_src_info", at, got, &rows_[at].token, sizeof(int32_t), sizeof(int32_t));
    }
  });
}

void Dispatch::verify_counts(const expertd_op_result_t& result) {
  std::vector<int32_t> counts;
  std::vector<uint32_t> reported;
  for (const auto& rows : routing_->expert_rows(case_.rank->index())) {
    const auto count = static_cast<uint32_t>(rows.size());
    counts.push_back(static_cast<int32_t>(count));
    reported.push_back((count + alignment_ - 1) / alignment_ * alignment_);
  }
  check_.all("expert_counts", counts_, counts, 1);
  check_.all("rank_prefix", prefix_, routing_->rank_prefix(), case_.shape.ranks);
  check_.number("received rows of the result", result.recv_rows, rows_.size());
  check_.same("expert counts of the result",
              std::span<const uint32_t>(result.expert_counts, result.expert_count_entries),
              std::span<const uint32_t>(reported), 1);
}

BenchBytes Dispatch::bytes() const {
  BenchBytes bytes;
  const uint64_t per_row = row_bytes() + recv_side_.row_bytes();
  for (const BenchRow& row : rows_) {
    const bool remote = row.source >= 0 && row.source != static_cast<int32_t>(case_.rank->index());
    bytes.logical += row.source >= 0 ? per_row : 0;
    bytes.remote += remote ? per_row : 0;
  }
  return bytes;
}

BenchRowSpec spec(const char* flags, const DispatchForm& form) {
  return {"dispatch", flags, false, true, [form](const BenchCase& it) { return std::make_unique<Dispatch>(it, form); }};
}

}  // namespace

BenchRowSpec quantised_dispatch_row() {
  return spec("bytes + float32 scales", {.bytes = true, .scales = true});
}

std::vector<BenchRowSpec> dispatch_rows(const BenchShape& shape) {
  const std::string expanded = "bf16 expanded align=" + std::to_string(expanded_alignment(shape));
  return {
      spec("bf16 exact", {}),
      spec("bf16 weights", {.weights = true}),
      spec("bf16 worst_tokens", {.weights = true, .worst = true}),
      spec("bf16 cached", {.cached = true}),
      spec(expanded.c_str(), {.weights = true, .expanded = true}),
      spec("bytes + side, int32", {.bytes = true}),
  };
}

}  // namespace expertd::ctl
