// SPDX-License-Identifier: Apache-2.0
// Low latency dispatch in its forms. Rows of an expert may come in any order of sources and tokens, so each row is
// looked up by layout_range and recv_src_info, which are checked first.
#include <algorithm>
#include <cstring>

#include "client/ctl/bench_numerics.h"
#include "client/ctl/bench_operation.h"

namespace expertd::ctl {

namespace {

enum class Form { kBf16, kFp8, kFp8Rounded, kFp8Ue8m0, kBytes };

constexpr uint32_t kSideChannels = 32;  // of the byte rows: a one-byte scale for 32 channels
constexpr uint32_t kPackedGroups = 4;   // exponent bytes in an int32

class LowLatencyDispatch final : public BenchOperation {
 public:
  LowLatencyDispatch(const BenchCase& it, Form form);

  void prepare(uint32_t iteration) override;
  void poison() override;
  void issue(expertd_event_t* event) override;
  void verify(const expertd_op_result_t& result) override;
  BenchBytes bytes() const override;
  expertd_handle_t handle() const override { return handle_; }

 private:
  /// A token as it must arrive.
  struct Token {
    std::vector<uint8_t> payload;
    std::vector<uint8_t> side;     // of byte rows
    std::vector<uint32_t> scales;  // per group
  };

  bool quantised() const { return form_ != Form::kBf16 && form_ != Form::kBytes; }
  uint64_t in_row_bytes() const { return form_ == Form::kBytes ? case_.shape.hidden : case_.shape.hidden * 2ull; }
  uint64_t out_row_bytes() const { return form_ == Form::kBf16 ? case_.shape.hidden * 2ull : case_.shape.hidden; }
  uint32_t id_bytes() const { return form_ == Form::kBytes ? 4 : 8; }
  uint32_t side_bytes() const { return form_ == Form::kBytes ? case_.shape.hidden / kSideChannels : 0; }
  /// int32 columns of the scales.
  uint32_t scale_columns() const;
  Token expected_token(uint64_t source, uint64_t token) const;
  uint32_t scale_word(const Token& token, uint32_t column) const;
  const Token& token(const BenchRow& row) const {
    return tokens_[static_cast<uint64_t>(row.source) * case_.shape.tokens + static_cast<uint64_t>(row.token)];
  }
  std::vector<BenchRow> order_of(uint32_t local, const std::vector<BenchRow>& expected) const;
  void verify_expert(uint32_t local, const std::vector<BenchRow>& order) const;
  void verify_scales(uint32_t local, const std::vector<BenchRow>& order) const;

  const BenchCase case_;
  const Form form_;
  BenchCheck check_;
  BenchInput input_;
  std::vector<std::vector<BenchRow>> rows_;  // of each local expert
  std::vector<Token> tokens_;                // [R,T]
  expertd_handle_t handle_{};                // of the low latency rotation: not to be freed
  BenchTensor x_, side_, topk_idx_;
  BenchTensor recv_x_, recv_scales_, counts_, src_info_, layout_range_, stats_;
};

LowLatencyDispatch::LowLatencyDispatch(const BenchCase& it, Form form)
    : case_(it), form_(form), check_(it.name, it.rank->index()), input_(it.input(0)) {
  const BenchShape& shape = it.shape;
  const uint64_t rows = shape.local_experts() * shape.worst_rows();
  x_ = BenchTensor(it.rank, shape.tokens, in_row_bytes());
  side_ = BenchTensor(it.rank, shape.tokens, side_bytes());
  topk_idx_ = BenchTensor(it.rank, shape.tokens, uint64_t{shape.top_k} * id_bytes());
  recv_x_ = BenchTensor(it.rank, rows, out_row_bytes());
  if (form == Form::kBytes) {
    recv_scales_ = BenchTensor(it.rank, rows, side_bytes());
  } else {
    recv_scales_ =
        BenchTensor(it.rank, uint64_t{shape.local_experts()} * scale_columns(), shape.worst_rows() * sizeof(uint32_t));
  }
  counts_ = BenchTensor(it.rank, shape.local_experts(), sizeof(int32_t));
  src_info_ = BenchTensor(it.rank, rows, sizeof(int32_t));
  layout_range_ = BenchTensor(it.rank, shape.local_experts(), shape.ranks * sizeof(int64_t));
  stats_ = BenchTensor(it.rank, shape.local_experts(), sizeof(int32_t));
}

uint32_t LowLatencyDispatch::scale_columns() const {
  const uint32_t groups = quantised() ? case_.shape.hidden / kScaleChannels : 0;
  return form_ == Form::kFp8Ue8m0 ? groups / kPackedGroups : groups;
}

LowLatencyDispatch::Token LowLatencyDispatch::expected_token(uint64_t source, uint64_t token) const {
  Token made;
  made.payload.resize(out_row_bytes());
  if (form_ == Form::kBytes) {
    made.side.resize(side_bytes());
    input_.byte_row(BenchStream::kTokens, source, token, made.payload);
    input_.byte_row(BenchStream::kSide, source, token, made.side);
    return made;
  }
  if (form_ == Form::kBf16) {
    input_.bf16_row(BenchStream::kTokens, source, token, elements<uint16_t>(made.payload));
    return made;
  }
  std::vector<uint16_t> row(case_.shape.hidden);
  input_.bf16_row(BenchStream::kTokens, source, token, row);
  made.scales.resize(case_.shape.hidden / kScaleChannels);
  const ScaleKind kind = form_ == Form::kFp8          ? ScaleKind::kFloat
                         : form_ == Form::kFp8Rounded ? ScaleKind::kRounded
                                                      : ScaleKind::kUe8m0;
  quantise_row(row, kind, made.payload, made.scales);
  return made;
}

uint32_t LowLatencyDispatch::scale_word(const Token& token, uint32_t column) const {
  if (form_ != Form::kFp8Ue8m0) {
    return token.scales[column];
  }
  uint32_t word = 0;
  for (uint32_t byte = 0; byte < kPackedGroups; ++byte) {
    word |= token.scales[column * kPackedGroups + byte] << (8 * byte);
  }
  return word;
}

void LowLatencyDispatch::prepare(uint32_t iteration) {
  check_.set_iteration(iteration);
  input_ = case_.input(iteration);
  const BenchRouting routing(case_.shape, input_);
  rows_ = routing.expert_rows(case_.rank->index());
  tokens_.clear();
  for (uint64_t at = 0; at < case_.shape.worst_rows(); ++at) {
    tokens_.push_back(expected_token(at / case_.shape.tokens, at % case_.shape.tokens));
  }
  write_routing(case_, routing, &topk_idx_);
  if (form_ != Form::kBytes) {
    return write_tokens(case_, input_, &x_);
  }
  const Token* const own = tokens_.data() + uint64_t{case_.rank->index()} * case_.shape.tokens;
  x_.write_rows(0, case_.shape.tokens, [&](uint64_t token, std::span<uint8_t> row) {
    std::copy(own[token].payload.begin(), own[token].payload.end(), row.begin());
  });
  side_.write_rows(0, case_.shape.tokens, [&](uint64_t token, std::span<uint8_t> row) {
    std::copy(own[token].side.begin(), own[token].side.end(), row.begin());
  });
}

void LowLatencyDispatch::poison() {
  for (BenchTensor* tensor : {&recv_x_, &recv_scales_, &counts_, &src_info_, &layout_range_}) {
    tensor->fill(kPoison);
  }
  stats_.fill(0);  // rows are added to it
}

void LowLatencyDispatch::issue(expertd_event_t* event) {
  auto args = EXPERTD_INIT(expertd_ll_dispatch_args_t);
  args.x = x_.data();
  args.dtype = form_ == Form::kBytes ? EXPERTD_BYTES : EXPERTD_BF16;
  if (form_ == Form::kBytes) {
    args.row_bytes = static_cast<uint32_t>(in_row_bytes());
    args.side = side_.data();
    args.side_elements = side_bytes();
    args.side_element_bytes = 1;
  }
  args.topk_idx = topk_idx_.data();
  args.idx_type = form_ == Form::kBytes ? EXPERTD_I32 : EXPERTD_I64;
  args.tokens = case_.shape.tokens;
  args.recv_x = recv_x_.data();
  args.recv_scales = form_ == Form::kBf16 ? nullptr : recv_scales_.data();
  args.expert_counts = counts_.as<int32_t>();
  args.recv_src_info = src_info_.as<int32_t>();
  args.layout_range = layout_range_.as<int64_t>();
  args.stats = stats_.as<int32_t>();
  args.flags = flag(EXPERTD_USE_FP8, quantised()) |
               flag(EXPERTD_ROUND_SCALE, form_ == Form::kFp8Rounded || form_ == Form::kFp8Ue8m0) |
               flag(EXPERTD_UE8M0, form_ == Form::kFp8Ue8m0) | case_.extra_flags;
  args.timeout_ns = case_.rank->timeout_ns();
  case_.rank->check(expertd_ll_dispatch(case_.rank->group(), &args, case_.rank->stream(), &handle_, event), case_.name);
}

/// Checks that every expected row of an expert is there once, and tells in which order.
std::vector<BenchRow> LowLatencyDispatch::order_of(uint32_t local, const std::vector<BenchRow>& expected) const {
  const BenchShape& shape = case_.shape;
  std::vector<int64_t> ranges(shape.ranks);
  std::vector<int32_t> sources(shape.worst_rows());
  case_.rank->read(layout_range_.as<int64_t>() + uint64_t{local} * shape.ranks, ranges.data(), shape.ranks * 8ull);
  case_.rank->read(src_info_.as<int32_t>() + local * shape.worst_rows(), sources.data(), sources.size() * 4);
  const std::string place = " of local expert " + std::to_string(local);
  std::vector<BenchRow> order(expected.size());
  std::vector<bool> seen(shape.worst_rows());
  for (const BenchRow& row : expected) {
    seen[static_cast<uint64_t>(row.source) * shape.tokens + static_cast<uint64_t>(row.token)] = true;
  }
  for (uint32_t source = 0; source < shape.ranks; ++source) {
    const auto begin = static_cast<uint64_t>(ranges[source]) >> 32;
    const auto count = static_cast<uint64_t>(ranges[source]) & 0xffffffff;
    const auto wanted = static_cast<uint64_t>(std::count_if(expected.begin(), expected.end(), [&](const BenchRow& row) {
      return row.source == static_cast<int32_t>(source);
    }));
    check_.number(("count in layout_range" + place + ", source " + std::to_string(source)).c_str(), count, wanted);
    if (count != 0 && begin + count > expected.size()) {
      check_.fail("layout_range" + place + ", source " + std::to_string(source) + ": begins at " +
                  std::to_string(begin) + " with " + std::to_string(count) + " rows, expected to end at or before " +
                  std::to_string(expected.size()));
    }
    for (uint64_t row = begin; row < begin + count; ++row) {
      const int32_t token = sources[row];
      const bool known = token >= 0 && static_cast<uint32_t>(token) < shape.tokens;
      if (!known || order[row].source >= 0 || !seen[uint64_t{source} * shape.tokens + static_cast<uint32_t>(token)]) {
        check_.fail("recv_src_info" + place + " row " + std::to_string(row) + ": got token " + std::to_string(token) +
                    " of rank " + std::to_string(source) + ", expected each routed token once");
      }
      seen[uint64_t{source} * shape.tokens + static_cast<uint32_t>(token)] = false;
      order[row] = {static_cast<int32_t>(source), token, -1, -1};
    }
  }
  for (uint64_t row = order.size(); row < sources.size(); ++row) {
    check_.untouched_row("recv_src_info", local * shape.worst_rows() + row,
                         reinterpret_cast<const uint8_t*>(&sources[row]), sizeof(int32_t));
  }
  return order;
}

void LowLatencyDispatch::verify_expert(uint32_t local, const std::vector<BenchRow>& order) const {
  const uint64_t slots = case_.shape.worst_rows();
  const uint64_t first = local * slots;
  recv_x_.read_rows(first, order.size(), [&](uint64_t at, const uint8_t* got) {
    const Token& expected = token(order[at - first]);
    check_.row("recv_x", at, got, expected.payload.data(), out_row_bytes(), form_ == Form::kBf16 ? 2 : 1);
  });
  check_.untouched("recv_x", recv_x_, first + order.size(), slots - order.size());
  if (form_ != Form::kBytes) {
    return verify_scales(local, order);
  }
  recv_scales_.read_rows(first, order.size(), [&](uint64_t at, const uint8_t* got) {
    check_.row("recv_side", at, got, token(order[at - first]).side.data(), side_bytes(), 1);
  });
  check_.untouched("recv_side", recv_scales_, first + order.size(), slots - order.size());
}

/// Rows of the tensor are columns of the scales: a scale of every slot.
void LowLatencyDispatch::verify_scales(uint32_t local, const std::vector<BenchRow>& order) const {
  const uint64_t first = uint64_t{local} * scale_columns();
  std::vector<uint32_t> expected(order.size());
  recv_scales_.read_rows(first, scale_columns(), [&](uint64_t at, const uint8_t* got) {
    std::transform(order.begin(), order.end(), expected.begin(),
                   [&](const BenchRow& row) { return scale_word(token(row), static_cast<uint32_t>(at - first)); });
    const uint64_t written = order.size() * sizeof(uint32_t);
    check_.row("recv_scales (expert, group)", at, got, expected.data(), written, sizeof(uint32_t));
    check_.untouched_row("recv_scales (expert, group)", at, got + written, recv_scales_.row_bytes() - written);
  });
}

void LowLatencyDispatch::verify(const expertd_op_result_t& result) {
  std::vector<int32_t> counts;
  std::transform(rows_.begin(), rows_.end(), std::back_inserter(counts),
                 [](const std::vector<BenchRow>& rows) { return static_cast<int32_t>(rows.size()); });
  check_.all("expert_counts", counts_, counts, 1);
  check_.all("stats", stats_, counts, 1);
  if (!case_.captured) {
    const std::vector<uint32_t> reported(counts.begin(), counts.end());
    check_.same("expert counts of the result",
                std::span<const uint32_t>(result.expert_counts, result.expert_count_entries),
                std::span<const uint32_t>(reported), 1);
  }
  for (uint32_t local = 0; local < case_.shape.local_experts(); ++local) {
    verify_expert(local, order_of(local, rows_[local]));
  }
}

BenchBytes LowLatencyDispatch::bytes() const {
  BenchBytes bytes;
  const uint64_t per_row = out_row_bytes() + side_bytes() + scale_columns() * sizeof(uint32_t);
  for (const std::vector<BenchRow>& rows : rows_) {
    for (const BenchRow& row : rows) {
      bytes.logical += per_row;
      bytes.remote += row.source == static_cast<int32_t>(case_.rank->index()) ? 0 : per_row;
    }
  }
  return bytes;
}

BenchRowSpec spec(const char* flags, Form form) {
  return {"ll_dispatch", flags, true, true,
          [form](const BenchCase& it) { return std::make_unique<LowLatencyDispatch>(it, form); }};
}

}  // namespace

std::vector<BenchRowSpec> low_latency_dispatch_rows(const BenchShape& shape) {
  std::vector<BenchRowSpec> rows = {spec("bf16", Form::kBf16), spec("fp8 float32 scales", Form::kFp8),
                                    spec("fp8 rounded scales", Form::kFp8Rounded)};
  if (shape.hidden % (kScaleChannels * kPackedGroups) == 0) {
    rows.push_back(spec("fp8 ue8m0 scales", Form::kFp8Ue8m0));
  }
  rows.push_back(spec("bytes + side, int32", Form::kBytes));
  return rows;
}

}  // namespace expertd::ctl
