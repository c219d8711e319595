// SPDX-License-Identifier: Apache-2.0
// What the rows share, the barrier and the layout.
#include <cstring>

#include "client/ctl/bench_operation.h"

namespace expertd::ctl {

namespace {

constexpr uint32_t kLargeAlignment = 128;
constexpr uint32_t kSmallAlignment = 16;
constexpr uint32_t kLargeTokens = 1024;

class Barrier final : public BenchOperation {
 public:
  explicit Barrier(const BenchCase& it) : case_(it) {}

  void prepare(uint32_t) override {}
  void poison() override {}
  void issue(expertd_event_t* event) override {
    case_.rank->check(expertd_barrier(case_.rank->group(), case_.rank->stream(), 0, 0, event), case_.name);
  }
  void verify(const expertd_op_result_t&) override {}
  BenchBytes bytes() const override { return {}; }

 private:
  const BenchCase case_;
};

class Layout final : public BenchOperation {
 public:
  explicit Layout(const BenchCase& it)
      : case_(it),
        check_(it.name, it.rank->index()),
        topk_idx_(it.rank, it.shape.tokens, it.shape.top_k * sizeof(int64_t)),
        per_rank_(it.rank, it.shape.ranks, sizeof(int32_t)),
        per_node_(it.rank, 1, sizeof(int32_t)),
        per_expert_(it.rank, it.shape.experts, sizeof(int32_t)),
        mask_(it.rank, it.shape.tokens, it.shape.ranks) {}

  void prepare(uint32_t iteration) override;
  void poison() override {
    for (BenchTensor* tensor : {&per_rank_, &per_node_, &per_expert_, &mask_}) {
      tensor->fill(kPoison);
    }
  }
  void issue(expertd_event_t* event) override;
  void verify(const expertd_op_result_t&) override;
  BenchBytes bytes() const override { return {}; }

 private:
  const BenchCase case_;
  BenchCheck check_;
  std::vector<int32_t> expected_ranks_, expected_nodes_, expected_experts_;
  std::vector<uint8_t> expected_mask_;
  BenchTensor topk_idx_, per_rank_, per_node_, per_expert_, mask_;
};

void Layout::prepare(uint32_t iteration) {
  check_.set_iteration(iteration);
  const BenchShape& shape = case_.shape;
  const BenchRouting routing(shape, case_.input(iteration));
  write_routing(case_, routing, &topk_idx_);
  expected_ranks_.assign(shape.ranks, 0);
  expected_nodes_.assign(1, 0);
  expected_experts_.assign(shape.experts, 0);
  expected_mask_.assign(shape.worst_rows(), 0);
  const uint32_t own = case_.rank->index();
  for (uint32_t token = 0; token < shape.tokens; ++token) {
    bool anywhere = false;
    for (uint32_t rank = 0; rank < shape.ranks; ++rank) {
      const bool there = routing.delivered(own, token, rank);
      expected_mask_[uint64_t{token} * shape.ranks + rank] = there ? 1 : 0;
      expected_ranks_[rank] += there ? 1 : 0;
      anywhere = anywhere || there;
    }
    expected_nodes_[0] += anywhere ? 1 : 0;
    for (uint32_t lane = 0; lane < shape.top_k; ++lane) {
      const int32_t expert = routing.expert(own, token, lane);
      if (expert >= 0) {
        ++expected_experts_[static_cast<size_t>(expert)];
      }
    }
  }
}

void Layout::issue(expertd_event_t* event) {
  auto args = EXPERTD_INIT(expertd_layout_args_t);
  args.topk_idx = topk_idx_.data();
  args.idx_type = EXPERTD_I64;
  args.tokens = case_.shape.tokens;
  args.top_k = case_.shape.top_k;
  args.num_experts = case_.shape.experts;
  args.num_ranks = case_.shape.ranks;
  args.tokens_per_rank = per_rank_.as<int32_t>();
  args.tokens_per_node = per_node_.as<int32_t>();
  args.tokens_per_expert = per_expert_.as<int32_t>();
  args.token_rank_mask = mask_.as<uint8_t>();
  args.timeout_ns = case_.rank->timeout_ns();
  case_.rank->check(expertd_layout(case_.rank->session(), &args, case_.rank->stream(), event), case_.name);
}

void Layout::verify(const expertd_op_result_t&) {
  check_.all("tokens_per_rank", per_rank_, expected_ranks_, 1);
  check_.all("tokens_per_node", per_node_, expected_nodes_, 1);
  check_.all("tokens_per_expert", per_expert_, expected_experts_, 1);
  check_.all("token_rank_mask", mask_, expected_mask_, case_.shape.ranks);
}

}  // namespace

const char* executor_name(uint32_t executor) {
  switch (executor) {
    case EXPERTD_EXECUTOR_HOST:
      return "host";
    case EXPERTD_EXECUTOR_SM:
      return "sm";
    case EXPERTD_EXECUTOR_COPY_ENGINE:
      return "copy_engine";
    default:
      return "none";  // also of a daemon newer than this
  }
}

std::vector<BenchRowSpec> common_rows(bool low_latency) {
  return {
      {"barrier", "-", low_latency, false, [](const BenchCase& it) { return std::make_unique<Barrier>(it); }},
      {"layout", "int64", low_latency, true, [](const BenchCase& it) { return std::make_unique<Layout>(it); }},
  };
}

uint32_t expanded_alignment(const BenchShape& shape) {
  return shape.tokens >= kLargeTokens ? kLargeAlignment : kSmallAlignment;
}

void write_tokens(const BenchCase& it, const BenchInput& input, BenchTensor* x) {
  x->write_rows(0, it.shape.tokens, [&](uint64_t token, std::span<uint8_t> row) {
    input.bf16_row(BenchStream::kTokens, it.rank->index(), token, elements<uint16_t>(row));
  });
}

void put_integer(uint8_t* place, int64_t value, uint32_t bytes) {
  std::memcpy(place, &value, bytes);
}

void write_routing(const BenchCase& it, const BenchRouting& routing, BenchTensor* topk_idx) {
  const auto id_bytes = static_cast<uint32_t>(topk_idx->row_bytes() / it.shape.top_k);
  topk_idx->write_rows(0, it.shape.tokens, [&](uint64_t token, std::span<uint8_t> row) {
    for (uint32_t lane = 0; lane < it.shape.top_k; ++lane) {
      put_integer(row.data() + lane * id_bytes, routing.expert(it.rank->index(), token, lane), id_bytes);
    }
  });
}

}  // namespace expertd::ctl
