// SPDX-License-Identifier: Apache-2.0
#include "tests/device/serial_group.h"

#include <algorithm>
#include <string>

namespace expertd::device_test {

using namespace kernels::cuda;
using kernels::OpShape;

namespace {

bool is_active(uint64_t mask, uint32_t rank) {
  return ((mask >> rank) & 1) != 0;
}

bool is_dispatch(const OpShape& shape) {
  return shape.kind == OpKind::kDispatch || shape.kind == OpKind::kLlDispatch;
}

bool is_combine(const OpShape& shape) {
  return shape.kind == OpKind::kCombine || shape.kind == OpKind::kLlCombine;
}

bool is_low_latency(const OpShape& shape) {
  return shape.kind == OpKind::kLlDispatch || shape.kind == OpKind::kLlCombine;
}

size_t matrix_ints(const OpShape& shape) {
  return size_t{shape.ranks} * kernels::count_row_ints(shape.ranks, shape.experts);
}

OpShape widest_of(const OpShape& shape) {
  OpShape widest;
  widest.ranks = shape.ranks;
  widest.hidden = shape.hidden;
  widest.max_tokens = shape.max_tokens;
  return widest;
}

}  // namespace

SerialRank::SerialRank(const OpShape& shape)
    : page(sizeof(SyncPage)),
      sent_page(sizeof(SyncPage)),
      matrix(matrix_ints(shape) * 4),
      sent_matrix(matrix_ints(shape) * 4),
      token_rank(size_t{shape.max_tokens} * shape.ranks * 4),
      token_expert(size_t{shape.max_tokens} * shape.top_k * 4),
      topk(size_t{shape.max_tokens} * shape.top_k * 4),
      counts(matrix_ints(shape) * 4),
      plan(sizeof(Plan)),
      plan_work(sizeof(PlanWork)),
      block_rows(kMostLinkSms * sizeof(BlockRows)),
      chunk_counts(size_t{route_chunks(shape.max_tokens)} * (shape.ranks + shape.experts) * 4),
      chunk_errors(size_t{route_chunks(shape.max_tokens)} * 4),
      rows(size_t{shape.max_tokens} * shape.ranks * 4),
      left_blocks(kMostLinkSms * sizeof(uint64_t)),
      state(sizeof(PartState)),
      facts(sizeof(PartFacts)),
      progress(sizeof(Progress)),
      words(4 * sizeof(uint64_t)),
      staging(low_latency_layout(widest_of(shape), shape.top_k).bytes),
      relay(kernels::cuda::relay_bytes(widest_of(shape), shape.top_k)),
      lane(sizeof(LaneState)),
      entry(sizeof(PartParams)) {}

void SerialRank::set_tables(PartParams* params) const {
  params->op.routing = {token_rank.at<int32_t>(), token_expert.at<int32_t>(), topk.at<int32_t>(), counts.at<int32_t>()};
  params->op.counts = matrix.at<int32_t>();
  params->words.state = state.at<PartState>();
  params->words.facts = facts.at<PartFacts>();
  params->words.progress = progress.at<Progress>();
  params->words.completion = words.at<uint64_t>();
  params->words.result = words.at<uint64_t>(sizeof(uint64_t));
  params->scratch = {plan.at<Plan>(),
                     plan_work.at<PlanWork>(),
                     block_rows.at<BlockRows>(),
                     chunk_counts.at<int32_t>(),
                     chunk_errors.at<uint32_t>(),
                     rows.at<int32_t>(),
                     left_blocks.at<uint64_t>()};
}

void set_tensors_of(const OpShape& shape, const Tensors& tensors, kernels::PeerView* view) {
  if (is_combine(shape)) {
    view->in_x = tensors.get(EXPERTD_IN_X);
    view->in_topk_weights = shape.kind == OpKind::kCombine ? tensors.get<float>(EXPERTD_IN_TOPK_WEIGHTS) : nullptr;
    return;
  }
  view->out_x = tensors.get(EXPERTD_OUT_X);
  view->out_side = tensors.get(EXPERTD_OUT_SIDE);
  view->out_topk_idx = tensors.get(EXPERTD_OUT_TOPK_IDX);
  view->out_topk_weights = tensors.get<float>(EXPERTD_OUT_TOPK_WEIGHTS);
  view->out_src_info = tensors.get<int32_t>(EXPERTD_OUT_SRC_INFO);
}

SerialGroup::SerialGroup(const OpShape& shape, Kernels which) : shape_(shape), which_(which) {
  EXPECT_EQ(cudaSuccess, cudaStreamCreate(&stream_));  // a blocking one: copies are in order with its kernels
  for (uint32_t rank = 0; rank < shape.ranks; ++rank) {
    ranks_.push_back(std::make_unique<SerialRank>(shape));
  }
  load();
}

SerialGroup::~SerialGroup() {
  cudaStreamDestroy(stream_);
}

void SerialGroup::ran(const char* what, cudaError_t launched) {
  EXPECT_EQ(cudaSuccess, launched) << what << ": " << cudaGetErrorString(launched);
  const cudaError_t ended = cudaStreamSynchronize(stream_);
  EXPECT_EQ(cudaSuccess, ended) << what << ": " << cudaGetErrorString(ended);
}

/// The launches that let kernels have their shared memory. Only those that this group runs: under the sanitizer the
/// first launch of a kernel is what takes longest.
void SerialGroup::load() {
  Params null{};
  null.null_operation = 1;
  null.bulk_copies = 1;
  if (which_ == Kernels::kLinked && shape_.kind == OpKind::kDispatch) {
    ran("null link_dispatch", launch_link_dispatch(null, Entry::kWaits, stream_));
    ran("null link_combine", launch_link_combine(null, Entry::kWaits, stream_));
  } else if (which_ == Kernels::kLinked && shape_.kind == OpKind::kLlDispatch) {
    ran("null link_ll_dispatch", launch_link_ll_dispatch(null, Entry::kWaits, stream_));
  } else if (which_ == Kernels::kCaptured) {
    ArmParams no_arm;
    no_arm.null_operation = 1;
    ran("null link_ll_captured", launch_link_ll_captured(no_arm, LowLatencyEntry::kWaits, stream_));
  }
}

/// The numbers of the next operation, its words as before it. In every second one kernels do the waiting.
void SerialGroup::begin(uint64_t active_ranks) {
  ++part_;
  ++group_op_;
  ++seq_;
  active_ = active_ranks;
  by_kernels_ = seq_ % 2 == 0;
  params_.assign(shape_.ranks, {});
  aborted_ = false;
  SyncPage before{};
  for (auto* words : {before.routed, before.moved, before.counted}) {
    std::fill_n(words, base::kMaxGpuRanks, group_op_ - 1);
  }
  for (const auto& rank : ranks_) {
    rank->facts.put(std::vector<PartFacts>(1));
    rank->words.put(std::vector<uint64_t>(4, 0));
    rank->page.put(std::vector<SyncPage>{before});
  }
}

SerialGroup::Params SerialGroup::params_of(uint32_t rank, const OpParams& host) {
  const SerialRank& own = *ranks_[rank];
  Params params{};
  params.op = host;
  params.op.in = {};
  params.op.out = {};
  own.set_tables(&params);
  params.words.part = part_;
  params.words.group_op = group_op_;
  params.words.seq = seq_;
  params.table_top_k = shape_.top_k;
  params.multiprocessors = kSerialMultiprocessors;
  params.bulk_copies = which_ == Kernels::kLinked || which_ == Kernels::kCaptured ? 1 : 0;
  params.link_sms = seq_ % 3 == 0 ? kSerialMultiprocessors : 4 * (1 + static_cast<uint32_t>(seq_ % 3) % 2);
  for (uint32_t j = 0; j < shape_.ranks; ++j) {
    if (is_active(active_, j)) {
      params.peers.pages[j] = (j == rank ? own.page : own.sent_page).at<SyncPage>();
      params.peers.views[j].counts = (j == rank ? own.matrix : own.sent_matrix).at<int32_t>();
    }
  }
  return params;
}

void SerialGroup::set_peers(const CaseStep& step, const std::vector<Tensors>& tensors, Params* params) {
  const OpShape& shape = params->op.shape;
  for (uint32_t j = 0; j < shape_.ranks; ++j) {
    if (!is_active(active_, j)) {
      continue;
    }
    kernels::PeerView& view = params->peers.views[j];
    view.capacity_rows = step.gpu->params[j].shape.capacity_rows;
    view.in_rows = is_combine(shape) ? (*step.in_rows)[j] : 0;
    if (which_ == Kernels::kRelay && j != shape.rank) {
      continue;
    }
    set_tensors_of(shape, tensors[j], &view);
  }
}

void SerialGroup::set_relay(const CaseStep& step, Params* params) {
  const OpShape& shape = params->op.shape;
  params->relay.own = ranks_[shape.rank]->relay.at();
  params->relay.layout = relay_layout(shape, shape_.top_k);
  params->relay.ranks = active_ & ~(uint64_t{1} << shape.rank);
  for (uint32_t j = 0; j < shape_.ranks; ++j) {
    const OpParams& other = step.gpu->params[j];
    RelayPeer& peer = params->relay.peers[j];
    if (!is_active(params->relay.ranks, j)) {
      continue;
    }
    peer.base = ranks_[j]->relay.at();
    peer.tokens = is_dispatch(shape) ? other.shape.tokens : 0;
    peer.side_elements = is_dispatch(shape) && other.in.side != nullptr ? other.shape.side_elements : 0;
    peer.has_weights = shape.kind != OpKind::kLlCombine && other.in.topk_weights != nullptr ? 1 : 0;
  }
}

void SerialGroup::set_low_latency(const CaseStep& step, const std::vector<Tensors>& tensors, Params* params) {
  const OpShape& shape = params->op.shape;
  params->low_latency.layout = low_latency_layout(widest_of(shape_), shape_.top_k);
  if (!fits_low_latency(shape, params->low_latency.layout)) {
    return;
  }
  for (uint32_t j = 0; j < shape_.ranks; ++j) {
    if (!is_active(active_, j)) {
      continue;
    }
    const SerialRank& other = *ranks_[j];
    const OpShape& given = step.gpu->params[j].shape;
    params->low_latency.staging[j] = other.staging.at();
    params->low_latency.tokens[j] = std::min(given.tokens, shape.max_tokens);
    params->low_latency.lanes[j] = {other.topk.at<int32_t>(),
                                    other.token_expert.at<int32_t>(),
                                    tensors[j].get<const uint32_t>(EXPERTD_IN_TOPK_IDX),
                                    tensors[j].get<const float>(EXPERTD_IN_TOPK_WEIGHTS),
                                    given.top_k,
                                    given.topk_idx_bytes / 4};
  }
  if (which_ == Kernels::kCaptured) {
    params->captured.number = 7 + group_op_;
    params->captured.blocks = is_dispatch(shape) ? link_ll_dispatch_blocks(*params) : link_ll_combine_blocks(*params);
  }
}

/// The rows of the others in the count matrix, as they hand them over before their words.
void SerialGroup::hear_counts(const CaseStep& step, uint32_t rank) {
  const auto row = static_cast<std::ptrdiff_t>(kernels::count_row_ints(shape_.ranks, shape_.experts));
  std::vector<int32_t> matrix(matrix_ints(shape_), 0x2b2b2b2b);
  ranks_[rank]->sent_matrix.put(matrix);
  for (uint32_t s = 0; s < shape_.ranks && is_dispatch(step.made.shape) && step.made.shape.cached == 0; ++s) {
    if (s != rank && is_active(active_, s)) {
      std::copy_n(step.host.matrix.begin() + s * row, row, matrix.begin() + s * row);
    }
  }
  ranks_[rank]->matrix.put(matrix);
}

/// The words of a link dispatch that hold a source's rows for every rank, from the matrix that this rank heard.
void SerialGroup::hear_rows(uint32_t rank, uint32_t source, SyncPage* page) {
  // As kRowWordOpShift and kRowWordRejects of link_rows.cuh, which is for devices.
  constexpr uint32_t kOpShift = 18;
  constexpr uint64_t kRejects = uint64_t{1} << 17;
  const OpShape& shape = params_[rank].op.shape;
  if (aborted_ || shape.kind != OpKind::kDispatch || shape.cached != 0) {
    return;
  }
  const uint32_t row = kernels::count_row_ints(shape.ranks, shape.experts);
  const std::vector<int32_t> counts = ranks_[rank]->matrix.get<int32_t>(row, uint64_t{4} * source * row);
  const uint64_t rejects = counts[shape.ranks + shape.experts] != 0 ? kRejects : 0;
  for (uint32_t j = 0; j < shape.ranks; ++j) {
    page->rows[source][j] = group_op_ << kOpShift | rejects | static_cast<uint32_t>(counts[j]);
  }
}

void SerialGroup::hear(uint32_t rank, bool moved) {
  const Memory& memory = ranks_[rank]->page;
  SyncPage page = memory.get<SyncPage>(1)[0];
  const uint64_t value = aborted_ ? EXPERTD_ABORT_WORD : group_op_;
  for (uint32_t s = 0; s < shape_.ranks; ++s) {
    if (s == rank || !is_active(active_, s)) {
      continue;
    }
    page.routed[s] = page.counted[s] = value;
    page.moved[s] = moved ? value : page.moved[s];
    page.captured[s] = params_[rank].captured.number;
    hear_rows(rank, s, &page);
  }
  ranks_[rank]->page.put(std::vector<SyncPage>{page});
}

/// What this rank handed to the others.
void SerialGroup::expect_told(const CaseStep& step, uint32_t rank) {
  const OpShape& shape = step.made.shape;
  if (active_ == uint64_t{1} << rank) {
    return;
  }
  EXPECT_EQ(group_op_, ranks_[rank]->sent_page.get<SyncPage>(1)[0].moved[rank]);
  if (!is_dispatch(shape) || shape.cached != 0) {
    return;
  }
  const uint32_t row = kernels::count_row_ints(shape.ranks, shape.experts);
  const std::vector<int32_t> sent = ranks_[rank]->sent_matrix.get<int32_t>(row, uint64_t{4} * rank * row);
  const int32_t* wanted = step.host.matrix.data() + size_t{rank} * row;
  // Rows per rank are of high throughput alone; behind the experts comes the Reason, with which nobody counts.
  const uint32_t reason = shape.ranks + shape.experts;
  for (uint32_t i = wanted[reason] != 0 ? reason : is_low_latency(shape) ? shape.ranks : 0; i <= reason; ++i) {
    EXPECT_EQ(wanted[i], sent[i]) << "column " << i << " of the count matrix";
  }
}

void SerialGroup::abort_part(uint32_t rank) {
  uint64_t* word = &params_[rank].words.state->aborted_part;
  EXPECT_EQ(cudaSuccess, cudaMemcpy(word, &part_, sizeof(part_), cudaMemcpyHostToDevice));
}

/// Everything that the kernels of a step are given.
void SerialGroup::fill(const CaseStep& step) {
  std::vector<Tensors> tensors;
  for (uint32_t rank = 0; rank < shape_.ranks; ++rank) {
    tensors.push_back(placed_.place(step, rank));
    hear_counts(step, rank);
  }
  for (uint32_t rank = 0; rank < shape_.ranks; ++rank) {
    Params& params = params_[rank];
    params = params_of(rank, step.gpu->params[rank]);
    OpShape& shape = params.op.shape;
    shape.capacity_rows = step.in_rows == nullptr ? shape.capacity_rows : (*step.in_rows)[rank];
    set_tensors(tensors[rank], &params.op);
    set_peers(step, tensors, &params);
    if (which_ == Kernels::kRelay) {
      set_relay(step, &params);
    } else if (which_ != Kernels::kGeneric && is_low_latency(shape)) {
      set_low_latency(step, tensors, &params);
    }
    const char* wrong = validate(params);
    EXPECT_EQ(nullptr, wrong) << wrong;
  }
}

void SerialGroup::run_layout(const RandomCase& made, GroupMemory* gpu) {
  begin(1);
  const GroupMemory nothing;
  const Tensors tensors = placed_.place({made, nullptr, nullptr, nothing, gpu}, 0);
  Params& params = params_[0];
  params = params_of(0, gpu->params[0]);
  params.peers = {};
  params.words.progress = nullptr;
  set_tensors(tensors, &params.op);
  const char* wrong = validate(params);
  EXPECT_EQ(nullptr, wrong) << wrong;
  ran("layout_clear", launch_layout_clear(params, stream_));
  ran("layout_count", launch_layout_count(params, stream_));
  ran("finish", launch_finish(params, stream_));
  placed_.give_back(!aborted_);
}

PartFacts SerialGroup::facts(uint32_t rank) const {
  return ranks_[rank]->facts.get<PartFacts>(1)[0];
}

std::array<uint64_t, 3> SerialGroup::words(uint32_t rank) const {
  const std::vector<uint64_t> words = ranks_[rank]->words.get<uint64_t>(3);
  return {words[0], words[1], words[2]};
}

uint64_t SerialGroup::seq() const {
  return which_ == Kernels::kCaptured ? 1 : seq_;
}

}  // namespace expertd::device_test
