// SPDX-License-Identifier: Apache-2.0
#include "tests/device/serial_copies.h"

#include <algorithm>
#include <array>

namespace expertd::device_test {

using client::ExchangeKernel;
using client::ExchangeParams;
using client::ExchangePayload;
using client::HtKernel;
using client::HtParams;
using device::cuda::HtRow;
using device::cuda::HtRows;
using device::cuda::HtTable;
using kernels::OpShape;
using kernels::Payload;
using kernels::ScaleForm;

namespace {

constexpr uint64_t kSlot = 1;
constexpr uint64_t kLimitNs = 20'000'000'000;
constexpr uint64_t kWithWeights = uint64_t{1} << 31;  // of a rank's word of rows

bool is_dispatch(const OpShape& shape) {
  return shape.kind == OpKind::kDispatch || shape.kind == OpKind::kLlDispatch;
}

uint64_t side_bytes(const OpShape& shape) {
  if (shape.payload == Payload::kFp8) {
    return shape.hidden / 128 * (shape.scale == ScaleForm::kUe8m0 ? 1 : 4);
  }
  return uint64_t{shape.side_elements} * shape.side_element_bytes;
}

ExchangePayload payload_of(const OpShape& shape) {
  if (shape.payload != Payload::kFp8) {
    return ExchangePayload::kPlain;
  }
  return shape.scale == ScaleForm::kUe8m0     ? ExchangePayload::kUe8m0
         : shape.scale == ScaleForm::kRounded ? ExchangePayload::kFp8Rounded
                                              : ExchangePayload::kFp8;
}

void carry_bytes(void* to, const void* from, uint64_t bytes) {
  EXPECT_EQ(cudaSuccess, cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToDevice));
  // Such a copy may return before it has ended; it is the legacy stream's, as the kernels are.
}

void expect_launched(const client::Status& launched) {
  EXPECT_TRUE(launched.ok()) << launched.text;
  EXPECT_EQ(cudaSuccess, cudaDeviceSynchronize());
}

expertd_exchange_layout layout_of(const OpShape& shape) {
  const expertd_exchange_shape exchanged{shape.ranks, shape.experts, shape.hidden, shape.max_tokens, shape.top_k};
  return expertd_exchange_layout_of(&exchanged);
}

expertd_exchange_ht_layout ht_layout_of(const OpShape& shape) {
  const expertd_exchange_ht_shape exchanged{shape.ranks, shape.experts, shape.hidden, shape.max_tokens, shape.top_k};
  return expertd_exchange_ht_layout_of(&exchanged);
}

uint64_t place_of(uint32_t rank, uint32_t without) {
  return rank < without ? rank : rank - 1;
}

}  // namespace

void CopiesRank::set_word(uint64_t offset, uint64_t value) {
  EXPECT_EQ(cudaSuccess, cudaMemcpy(page.at(offset), &value, sizeof(value), cudaMemcpyHostToDevice));
}

// ---- Low latency ----

SerialLowLatency::SerialLowLatency(client::CudaKernels* kernels, const OpShape& shape)
    : kernels_(kernels), layout_(layout_of(shape)) {
  for (uint32_t rank = 0; rank < shape.ranks; ++rank) {
    ranks_.push_back(std::make_unique<CopiesRank>(EXPERTD_FLAG_PAGE_BYTES, layout_.total_bytes));
  }
}

bool SerialLowLatency::serves(const OpShape& shape) {
  return expertd_exchange_row_stride(shape.out_row_bytes, side_bytes(shape)) <= layout_of(shape).row_stride;
}

/// Blocks of a dispatch and of a combine overlap.
char* SerialLowLatency::buffer(const CaseStep& step, uint32_t rank) const {
  return ranks_[rank]->window.at((is_dispatch(step.made.shape) ? 0 : 1) * layout_.buffer_bytes);
}

ExchangeParams SerialLowLatency::params_of(const CaseStep& step, uint32_t rank) const {
  const OpShape& shape = step.gpu->params[rank].shape;
  const Tensors& tensors = ranks_[rank]->tensors;
  const Memory& page = ranks_[rank]->page;
  ExchangeParams p;
  p.steps = page.at<uint64_t>(EXPERTD_STEP_OFFSET(kSlot));
  p.doorbell = page.at<uint64_t>(EXPERTD_DOORBELL_OFFSET(kSlot));
  p.completion = page.at<uint64_t>(EXPERTD_COMPLETION_WORD_OFFSET(kSlot));
  p.result = page.at<uint64_t>(EXPERTD_RESULT_WORD_OFFSET(kSlot));
  p.seq = seq_;
  p.limit_ns = kLimitNs;
  p.buffer = buffer(step, rank);
  p.handle = ranks_[rank]->window.at(layout_.handles);
  p.layout = layout_;
  p.ranks = shape.ranks;
  p.rank = rank;
  p.experts = shape.experts;
  p.local_experts = shape.local_experts;
  p.hidden = shape.hidden;
  p.max_tokens = shape.max_tokens;
  p.table_top_k = p.top_k = shape.top_k;
  p.tokens = shape.tokens;
  p.idx_bytes = shape.topk_idx_bytes;
  p.payload = payload_of(shape);
  p.row_bytes = shape.row_bytes;
  p.out_row_bytes = shape.out_row_bytes;
  const bool side = is_dispatch(shape) && shape.payload == Payload::kBytes;
  p.side_elements = side ? shape.side_elements : 0;
  p.side_element_bytes = side ? shape.side_element_bytes : 1;
  p.side_row_stride = shape.side_row_stride;
  p.side_element_stride = shape.side_element_stride;
  p.row_stride = expertd_exchange_row_stride(shape.out_row_bytes, is_dispatch(shape) ? side_bytes(shape) : 0);
  p.x = tensors.get(EXPERTD_IN_X);
  p.topk_idx = tensors.get(EXPERTD_IN_TOPK_IDX);
  p.topk_weights = tensors.get<float>(EXPERTD_IN_TOPK_WEIGHTS);
  p.side = tensors.get(EXPERTD_IN_SIDE);
  p.out_x = tensors.get(EXPERTD_OUT_X);
  p.out_side = tensors.get(EXPERTD_OUT_SIDE);
  p.expert_counts = tensors.get<int32_t>(EXPERTD_OUT_EXPERT_COUNTS);
  p.src_info = tensors.get<int32_t>(EXPERTD_OUT_SRC_INFO);
  p.layout_range = tensors.get<int64_t>(EXPERTD_OUT_LAYOUT_RANGE);
  p.stats = tensors.get<int32_t>(EXPERTD_OUT_STATS);
  return p;
}

/// Those stages of the operation on every rank in turn.
void SerialLowLatency::launch(const CaseStep& step, uint32_t stages) {
  const ExchangeKernel kernel = is_dispatch(step.made.shape) ? ExchangeKernel::kDispatch : ExchangeKernel::kCombine;
  for (uint32_t rank = 0; rank < ranks_.size(); ++rank) {
    if ((stages & client::kExchangeSend) != 0) {
      params_[rank] = params_of(step, rank);
      kernels_->begin_exchange(&params_[rank]);
    }
    params_[rank].stages = stages;
    expect_launched(kernels_->launch_exchange(kernel, params_[rank], cudaStreamLegacy));
    if ((stages & client::kExchangeSend) != 0) {
      EXPECT_EQ(seq_, ranks_[rank]->word(EXPERTD_DOORBELL_OFFSET(kSlot)));
    }
  }
}

/// What the daemon's copies of the first step do.
void SerialLowLatency::carry(const CaseStep& step) {
  const bool dispatch = is_dispatch(step.made.shape);
  for (uint32_t s = 0; s < ranks_.size(); ++s) {
    const ExchangeParams& p = params_[s];
    for (uint32_t j = 0; j < ranks_.size(); ++j) {
      if (j == s) {
        continue;
      }
      char* to = buffer(step, j);
      if (dispatch) {
        carry_bytes(to + layout_.in_blocks + s * layout_.block_bytes, p.buffer + layout_.out_block,
                    expertd_exchange_block_copy(&layout_, p.tokens, p.row_stride));
      } else {
        carry_bytes(to + layout_.in_weights + s * layout_.weights_bytes, p.buffer + layout_.out_weights,
                    expertd_exchange_weights_copy(&layout_, p.tokens, p.top_k));
      }
    }
  }
}

/// And of the second one: this rank's sums for the tokens of the others.
void SerialLowLatency::carry_sums(const CaseStep& step) {
  const uint64_t sums = uint64_t{2} * step.made.shape.max_tokens * step.made.shape.hidden;
  for (uint32_t s = 0; s < ranks_.size(); ++s) {
    for (uint32_t j = 0; j < ranks_.size(); ++j) {
      const uint64_t bytes = uint64_t{2} * params_[j].tokens * params_[j].hidden;
      if (j != s && bytes != 0) {
        carry_bytes(buffer(step, j) + layout_.in_sums + s * sums, buffer(step, s) + layout_.out_sums + j * sums, bytes);
      }
    }
  }
}

/// The words of all steps, for all ranks.
void SerialLowLatency::hear() {
  const uint32_t count = static_cast<uint32_t>(ranks_.size());
  for (const auto& rank : ranks_) {
    rank->set_word(EXPERTD_STEP_ACTIVE_OFFSET(kSlot), (uint64_t{1} << count) - 1);
    for (uint32_t i = 0; i < 2 * count; ++i) {
      rank->set_word(EXPERTD_STEP_ARRIVED_OFFSET(kSlot, i / count, i % count), seq_);
    }
  }
}

void SerialLowLatency::run(const CaseStep& step, bool halves) {
  constexpr uint32_t kBoth = client::kExchangeSend | client::kExchangeReceive;
  params_.assign(ranks_.size(), {});
  for (uint32_t rank = 0; rank < ranks_.size(); ++rank) {
    ranks_[rank]->tensors = placed_.place(step, rank);
  }
  const bool dispatch = is_dispatch(step.made.shape);
  ++seq_;
  launch(step, client::kExchangeSend);
  carry(step);
  hear();
  if (!dispatch) {
    // Each rank's sums for the others do not depend on theirs for it, which are there only then.
    launch(step, client::kExchangeReceive);
    carry_sums(step);
  }
  if (!dispatch || !halves) {
    // Again, with all that the others send.
    ++seq_;
    hear();
    launch(step, halves ? client::kExchangeSend : kBoth);
  }
  if (halves) {
    launch(step, client::kExchangeReceive);
  }
  placed_.give_back(true);
}

uint64_t SerialLowLatency::result(uint32_t rank) const {
  return ranks_[rank]->word(EXPERTD_RESULT_WORD_OFFSET(kSlot));
}

bool SerialLowLatency::ended(uint32_t rank) const {
  return ranks_[rank]->word(EXPERTD_STEP_ENDED_OFFSET(kSlot)) == seq_ &&
         ranks_[rank]->word(EXPERTD_COMPLETION_WORD_OFFSET(kSlot)) == seq_;
}

// ---- High throughput ----

SerialHighThroughput::SerialHighThroughput(client::CudaKernels* kernels, const OpShape& shape)
    : kernels_(kernels), layout_(ht_layout_of(shape)), rows_(shape.ranks), tables_(shape.ranks) {
  for (uint32_t rank = 0; rank < shape.ranks; ++rank) {
    ranks_.push_back(std::make_unique<CopiesRank>(EXPERTD_HT_FLAG_PAGE_BYTES, layout_.total_bytes));
  }
}

bool SerialHighThroughput::serves(const OpShape& shape) {
  const expertd_exchange_ht_layout layout = ht_layout_of(shape);
  return shape.expanded == 0 && expertd_exchange_ht_fits(&layout, shape.row_bytes, side_bytes(shape)) != 0;
}

char* SerialHighThroughput::buffer(uint32_t rank) const {
  return ranks_[rank]->window.at(seq_ % EXPERTD_HT_BUFFERS * layout_.buffer_bytes);
}

HtParams SerialHighThroughput::params_of(const CaseStep& step, uint32_t rank) const {
  const OpShape& shape = step.gpu->params[rank].shape;
  const Tensors& tensors = ranks_[rank]->tensors;
  const bool dispatch = is_dispatch(shape);
  HtParams p;
  p.steps = ranks_[rank]->page.at<uint64_t>(EXPERTD_HT_STEP_OFFSET(kSlot));
  p.completion = ranks_[rank]->page.at<uint64_t>(EXPERTD_COMPLETION_WORD_OFFSET(kSlot));
  p.result = ranks_[rank]->page.at<uint64_t>(EXPERTD_RESULT_WORD_OFFSET(kSlot));
  p.seq = seq_;
  p.buffer = buffer(rank);
  p.handle = ranks_[rank]->window.at(layout_.handles);
  p.layout = layout_;
  p.ranks = shape.ranks;
  p.rank = rank;
  p.experts = shape.experts;
  p.local_experts = shape.local_experts;
  p.hidden = shape.hidden;
  p.max_tokens = shape.max_tokens;
  p.top_k = shape.top_k;
  p.tokens = shape.tokens;
  p.capacity_rows = dispatch ? shape.capacity_rows : (*step.in_rows)[rank];
  p.idx_bytes = shape.topk_idx_bytes;
  p.row_bytes = shape.row_bytes;
  const bool side = dispatch && shape.side_elements != 0;
  p.side_elements = side ? shape.side_elements : 0;
  p.side_element_bytes = side ? shape.side_element_bytes : 1;
  p.record_bytes = static_cast<uint32_t>(expertd_exchange_ht_record_bytes(
      uint64_t{p.side_elements} * p.side_element_bytes, p.top_k, shape.cached != 0 ? 1 : 0));
  p.side_row_stride = shape.side_row_stride;
  p.side_element_stride = shape.side_element_stride;
  p.cached = shape.cached != 0;
  p.zero_foreign = shape.zero_foreign_weights != 0;
  p.worst_tokens = shape.worst_tokens != 0;
  p.last_lane = shape.order_last_lane != 0;
  p.x = tensors.get(EXPERTD_IN_X);
  p.topk_idx = tensors.get(EXPERTD_IN_TOPK_IDX);
  p.topk_weights = tensors.get<float>(EXPERTD_IN_TOPK_WEIGHTS);
  p.side = side ? tensors.get(EXPERTD_IN_SIDE) : nullptr;
  p.token_rank_mask = tensors.get<uint8_t>(EXPERTD_IN_TOKEN_RANK_MASK);
  p.bias0 = tensors.get(EXPERTD_IN_BIAS0);
  p.bias1 = tensors.get(EXPERTD_IN_BIAS1);
  p.out_x = tensors.get(EXPERTD_OUT_X);
  p.out_side = tensors.get(EXPERTD_OUT_SIDE);
  p.out_topk_idx = tensors.get(EXPERTD_OUT_TOPK_IDX);
  p.out_topk_weights = tensors.get<float>(EXPERTD_OUT_TOPK_WEIGHTS);
  p.expert_counts = tensors.get<int32_t>(EXPERTD_OUT_EXPERT_COUNTS);
  p.rank_prefix = tensors.get<int32_t>(EXPERTD_OUT_RANK_PREFIX);
  p.src_info = tensors.get<int32_t>(EXPERTD_OUT_SRC_INFO);
  return p;
}

void SerialHighThroughput::launch(HtKernel kernel, HtParams* params) {
  expect_launched(kernels_->launch_ht(kernel, *params, cudaStreamLegacy));
}

/// The kernel counts, and this checks the counts as the daemon does.
void SerialHighThroughput::route(const CaseStep& step) {
  for (uint32_t rank = 0; rank < ranks_.size(); ++rank) {
    launch(HtKernel::kRoute, &params_[rank]);
    expertd_exchange_ht_counts said{};
    std::vector<int32_t> experts(size_t{EXPERTD_HT_SLICES} * params_[rank].experts);
    EXPECT_EQ(cudaSuccess, cudaMemcpy(&said, buffer(rank), sizeof(said), cudaMemcpyDeviceToHost));
    EXPECT_EQ(cudaSuccess,
              cudaMemcpy(experts.data(), buffer(rank) + sizeof(said), experts.size() * 4, cudaMemcpyDeviceToHost));
    device::cuda::ht_take_counts(said, experts.data(), step.gpu->params[rank].shape, &rows_[rank]);
  }
}

void SerialHighThroughput::tell(uint32_t rank, uint64_t verdict) {
  const uint64_t at = EXPERTD_HT_STEP_OFFSET(kSlot);
  ranks_[rank]->set_word(at + EXPERTD_HT_STEP_ACTIVE, (uint64_t{1} << ranks_.size()) - 1);
  ranks_[rank]->set_word(at + EXPERTD_HT_STEP_VERDICT, verdict);
  ranks_[rank]->set_word(at + EXPERTD_HT_STEP_PLAN, seq_);
}

/// One source's rows for one rank, and their records.
void SerialHighThroughput::carry_rows(const CaseStep& step, uint32_t source, uint32_t rank) {
  const uint64_t row_bytes = step.made.shape.row_bytes;
  const HtTable& table = tables_[source];
  const HtParams& to = params_[rank];
  const uint64_t row = table.base(source, rank);
  const uint64_t count = device::cuda::ht_rows_inside(row, table.rows[source][rank], to.capacity_rows);
  if (count == 0) {
    return;
  }
  const char* from = buffer(source);
  carry_bytes(static_cast<char*>(to.out_x) + row * row_bytes,
              from + layout_.rows + place_of(rank, source) * layout_.rows_bytes, count * row_bytes);
  if (to.record_bytes != 0) {
    carry_bytes(buffer(rank) + layout_.beside_in + place_of(source, rank) * layout_.beside_bytes,
                from + layout_.beside + place_of(rank, source) * layout_.beside_bytes,
                count * uint64_t{to.record_bytes});
  }
}

/// An owner's rows for the tokens of one origin.
void SerialHighThroughput::carry_inputs(const CaseStep& step, uint32_t owner, uint32_t origin) {
  const OpShape& shape = step.made.shape;
  const HtTable& table = tables_[owner];
  const HtParams& from = params_[owner];
  const uint64_t row = table.base(origin, owner);
  const uint64_t count = device::cuda::ht_rows_inside(row, table.rows[origin][owner], from.capacity_rows);
  const uint64_t place = place_of(owner, origin);
  const uint64_t bytes = uint64_t{2} * shape.hidden;
  const uint64_t weight_bytes = uint64_t{4} * shape.top_k;
  if (count == 0) {
    return;
  }
  carry_bytes(buffer(origin) + layout_.rows + place * layout_.rows_bytes,
              static_cast<const char*>(from.x) + row * bytes, count * bytes);
  if (from.topk_weights != nullptr && params_[origin].out_topk_weights != nullptr) {
    carry_bytes(buffer(origin) + layout_.weights + place * layout_.weights_bytes,
                reinterpret_cast<const char*>(from.topk_weights) + row * weight_bytes, count * weight_bytes);
  }
}

/// How many rows of each owner a rank may take.
void SerialHighThroughput::tell_rows(const CaseStep& step, uint32_t rank) {
  const HtTable& table = tables_[rank];
  for (uint32_t j = 0; j < ranks_.size(); ++j) {
    const uint64_t base = table.base(rank, j);
    uint64_t rows = device::cuda::ht_rows_inside(base, table.rows[rank][j], (*step.in_rows)[j]);
    rows |= rows != 0 && params_[j].topk_weights != nullptr ? kWithWeights : 0;
    ranks_[rank]->set_word(EXPERTD_HT_STEP_OFFSET(kSlot) + EXPERTD_HT_STEP_ROWS + uint64_t{j} * 8,
                           rows | (j == rank ? base << 32 : 0));
  }
  tell(rank, 0);
}

/// Behind the counts. All ranks come to the same end, each with its own Reason.
void SerialHighThroughput::dispatch(const CaseStep& step) {
  const uint64_t all = (uint64_t{1} << ranks_.size()) - 1;
  HtRows rows{};
  std::array<uint64_t, device::cuda::kHtRanks> capacities{};
  for (uint32_t rank = 0; rank < ranks_.size(); ++rank) {
    rows[rank] = &rows_[rank];
    capacities[rank] = params_[rank].capacity_rows;
  }
  bool goes = true;
  for (uint32_t rank = 0; rank < ranks_.size(); ++rank) {
    const OpShape& shape = step.gpu->params[rank].shape;
    if (shape.cached == 0) {
      tables_[rank] = device::cuda::ht_table(rows, shape, all);
    }
    kernels::OpReport report;
    goes = device::cuda::ht_decide(rows, &tables_[rank], capacities, shape, &report);
    expertd_exchange_ht_plan plan;
    device::cuda::ht_fill_plan(tables_[rank], shape, &plan);
    EXPECT_EQ(cudaSuccess, cudaMemcpy(buffer(rank) + layout_.plan, &plan, sizeof(plan), cudaMemcpyHostToDevice));
    tell(rank, report.reason);
    for (uint32_t piece = 0; piece < EXPERTD_HT_PIECES; ++piece) {
      client::set_ht_step(HtKernel::kMove, piece, &params_[rank]);
      launch(HtKernel::kMove, &params_[rank]);
    }
  }
  for (uint32_t rank = 0; rank < ranks_.size(); ++rank) {
    for (uint32_t source = 0; goes && source < ranks_.size(); ++source) {
      if (source != rank) {
        carry_rows(step, source, rank);
      }
    }
    client::set_ht_step(HtKernel::kMove, client::kHtPlace, &params_[rank]);
    launch(HtKernel::kMove, &params_[rank]);
  }
}

void SerialHighThroughput::run(const CaseStep& step) {
  ++seq_;
  params_.clear();
  for (uint32_t rank = 0; rank < ranks_.size(); ++rank) {
    ranks_[rank]->tensors = placed_.place(step, rank);
    params_.push_back(params_of(step, rank));
  }
  if (is_dispatch(step.made.shape)) {
    rows_.assign(ranks_.size(), {});
    if (step.made.shape.cached == 0) {
      route(step);
    }
    dispatch(step);
    placed_.give_back(true);
    return;
  }
  for (uint32_t owner = 0; owner < ranks_.size(); ++owner) {
    for (uint32_t origin = 0; origin < ranks_.size(); ++origin) {
      if (owner != origin) {
        carry_inputs(step, owner, origin);
      }
    }
  }
  for (uint32_t rank = 0; rank < ranks_.size(); ++rank) {
    tell_rows(step, rank);
    for (uint32_t chunk = 0; chunk < EXPERTD_HT_CHUNKS; ++chunk) {
      client::set_ht_step(HtKernel::kReduce, chunk, &params_[rank]);
      launch(HtKernel::kReduce, &params_[rank]);
    }
  }
  placed_.give_back(true);
}

uint64_t SerialHighThroughput::result(uint32_t rank) const {
  return ranks_[rank]->word(EXPERTD_RESULT_WORD_OFFSET(kSlot));
}

}  // namespace expertd::device_test
