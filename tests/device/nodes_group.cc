// SPDX-License-Identifier: Apache-2.0
#include "tests/device/nodes_group.h"

#include <algorithm>
#include <cstring>
#include <string>

namespace expertd::device_test {

using namespace kernels::cuda;
using kernels::OpShape;

namespace {

constexpr uint8_t kPoison = 0xab;
constexpr size_t kTensorGuardBytes = 256;

bool is_dispatch(const OpShape& shape) {
  return shape.kind == OpKind::kDispatch || shape.kind == OpKind::kLlDispatch;
}

size_t matrix_ints(const OpShape& shape) {
  return size_t{shape.ranks} * kernels::count_row_ints(shape.ranks, shape.experts);
}

bool all_poison(const char* begin, size_t bytes) {
  return std::all_of(begin, begin + bytes, [](char byte) { return static_cast<uint8_t>(byte) == kPoison; });
}

}  // namespace

Pinned::Pinned(size_t bytes) : bytes_(bytes) {
  void* data = nullptr;
  EXPECT_EQ(cudaSuccess, cudaHostAlloc(&data, bytes + 2 * kGuardBytes, cudaHostAllocPortable));
  data_ = static_cast<char*>(data);
  std::memset(data_, kPoison, bytes + 2 * kGuardBytes);
}

Pinned::~Pinned() {
  cudaFreeHost(data_);
}

bool Pinned::guards_intact() const {
  return all_poison(data_, kGuardBytes) && all_poison(data_ + kGuardBytes + bytes_, kGuardBytes);
}

bool Pinned::untouched() const {
  return all_poison(data_, bytes_ + 2 * kGuardBytes);
}

NodesGroup::NodesGroup(const OpShape& shape, const engine::Placement& placement, support::Random* random)
    : shape_(shape), placement_(placement), random_(random), nodes_(placement.nodes()), placed_(kTensorGuardBytes) {
  EXPECT_EQ(cudaSuccess, cudaStreamCreate(&stream_));  // a blocking one: copies are in order with its kernels
  for (uint32_t rank = 0; rank < shape.ranks; ++rank) {
    ranks_.push_back(std::make_unique<SerialRank>(shape));
    positions_.push_back(std::make_unique<Memory>(size_t{shape.max_tokens} * nodes_ * sizeof(int32_t)));
  }
}

NodesGroup::~NodesGroup() {
  cudaStreamDestroy(stream_);
}

void NodesGroup::ran(const char* what, cudaError_t launched) {
  EXPECT_EQ(cudaSuccess, launched) << what << ": " << cudaGetErrorString(launched);
  const cudaError_t ended = cudaStreamSynchronize(stream_);
  EXPECT_EQ(cudaSuccess, ended) << what << ": " << cudaGetErrorString(ended);
}

template <typename Launch>
void NodesGroup::each(const char* what, const Launch& launch) {
  for (uint32_t rank = 0; rank < shape_.ranks; ++rank) {
    if (active(rank)) {
      ran(what, launch(params_[rank]));
    }
  }
}

void NodesGroup::each_of(const char* what, cudaError_t (*launch)(const Params&, cudaStream_t)) {
  each(what, [&](const Params& params) { return launch(params, stream_); });
}

void NodesGroup::signal(SignalStep step) {
  each("signal", [&](const Params& params) { return launch_signal(params, step, stream_); });
}

char* NodesGroup::take_pinned(size_t bytes) {
  return pinned_.emplace_back(bytes).at();
}

NodeTable NodesGroup::table_of(uint32_t rank) const {
  NodeTable table;
  table.nodes = nodes_;
  table.own_node = placement_.node_of[rank];
  for (uint32_t j = 0; j < shape_.ranks; ++j) {
    table.node_of[j] = static_cast<uint8_t>(placement_.node_of[j]);
    table.index_of[j] = static_cast<uint8_t>(placement_.index_of[j]);
  }
  return table;
}

/// What a rank knows of another: of one of its own node its memory, of the others how many rows they take or give.
void NodesGroup::set_view(const CaseStep& step, const std::vector<Tensors>& tensors, uint32_t peer, Params* params) {
  const uint32_t rank = params->op.shape.rank;
  kernels::PeerView& view = params->peers.views[peer];
  const bool combines = !is_dispatch(params->op.shape);
  view.capacity_rows = step.gpu->params[peer].shape.capacity_rows;
  view.in_rows = combines ? (*step.in_rows)[peer] : 0;
  if (placement_.node_of[peer] != placement_.node_of[rank]) {
    return;
  }
  const SerialRank& own = *ranks_[rank];
  params->peers.pages[peer] = (peer == rank ? own.page : own.sent_page).at<SyncPage>();
  view.counts = (peer == rank ? own.matrix : own.sent_matrix).at<int32_t>();
  set_tensors_of(params->op.shape, tensors[peer], &view);
}

NodesGroup::Params NodesGroup::params_of(uint32_t rank, const CaseStep& step, const std::vector<Tensors>& tensors) {
  const SerialRank& own = *ranks_[rank];
  Params params{};
  params.op.shape = step.gpu->params[rank].shape;
  params.op.shape.capacity_rows = step.in_rows == nullptr ? params.op.shape.capacity_rows : (*step.in_rows)[rank];
  set_tensors(tensors[rank], &params.op);
  own.set_tables(&params);
  params.words.part = part_;
  params.words.group_op = group_op_;
  params.words.seq = group_op_;
  params.table_top_k = shape_.top_k;
  params.multiprocessors = kSerialMultiprocessors;
  for (uint32_t j = 0; j < shape_.ranks; ++j) {
    if (active(j)) {
      set_view(step, tensors, j, &params);
    }
  }
  return params;
}

/// Rows of the count matrix that the others wrote.
void NodesGroup::hear_counts(const CaseStep& step, uint32_t rank) {
  const uint32_t row = kernels::count_row_ints(shape_.ranks, shape_.experts);
  std::vector<int32_t> matrix(matrix_ints(shape_), 0x2b2b2b2b);
  for (uint32_t s = 0; s < shape_.ranks && is_dispatch(step.made.shape) && step.made.shape.cached == 0; ++s) {
    if (s != rank && active(s)) {
      std::copy_n(matrix_.begin() + s * row, row, matrix.begin() + s * row);
    }
  }
  ranks_[rank]->matrix.put(matrix);
}

void NodesGroup::fill(const CaseStep& step) {
  ++part_;
  ++group_op_;
  active_ = step.made.shape.active_ranks.low();
  std::vector<Tensors> tensors;
  for (uint32_t rank = 0; rank < shape_.ranks; ++rank) {
    tensors.push_back(placed_.place(step, rank));
    ranks_[rank]->facts.put(std::vector<PartFacts>(1));
    ranks_[rank]->words.put(std::vector<uint64_t>(4, 0));
    hear_counts(step, rank);
  }
  params_.clear();
  for (uint32_t rank = 0; rank < shape_.ranks; ++rank) {
    params_.push_back(params_of(rank, step, tensors));
    const char* wrong = validate(params_.back());
    EXPECT_EQ(nullptr, wrong) << wrong;
  }
}

void NodesGroup::run(const CaseStep& step, const std::vector<int32_t>& matrix) {
  matrix_ = matrix;
  messages_.clear();
  pulls_.clear();
  pinned_.clear();
  fill(step);
  if (is_dispatch(step.made.shape)) {
    run_dispatch();
  } else {
    run_combine(step);
  }
  for (const Pinned& pinned : pinned_) {
    EXPECT_TRUE(pinned.guards_intact()) << "memory around a message was written";
  }
  placed_.give_back(true);
}

PartFacts NodesGroup::facts(uint32_t rank) const {
  return ranks_[rank]->facts.get<PartFacts>(1)[0];
}

bool NodesGroup::exchanges(uint32_t rank, uint32_t node) const {
  const std::vector<uint32_t>& ranks = placement_.ranks_of[node];
  return node != placement_.node_of[rank] &&
         std::any_of(ranks.begin(), ranks.end(), [this](uint32_t other) { return active(other); });
}

// Dispatch.

void NodesGroup::run_dispatch() {
  const bool fresh = params_[0].op.shape.cached == 0;
  if (fresh) {
    each_of("route_count", launch_route_count);
    each_of("route_scan", launch_route_scan);
  }
  signal(SignalStep::kRouted);
  if (fresh) {
    each_of("route_number", launch_route_number);
  }
  each_of("plan", launch_plan);
  each_of("dispatch_move", launch_dispatch_move);
  for (uint32_t rank = 0; rank < shape_.ranks; ++rank) {
    if (active(rank)) {
      pack_rows(rank);
    }
  }
  for (uint32_t rank = 0; rank < shape_.ranks; ++rank) {
    if (active(rank)) {
      SCOPED_TRACE("rank " + std::to_string(rank));
      spread_rows(rank);
    }
  }
  signal(SignalStep::kMoved);
  each_of("finish", launch_finish);
}

/// Buffers for some tokens from `begin` on, of as many messages as a launch takes or fewer; returns behind which token.
uint32_t NodesGroup::fill_pack_job(uint32_t rank, uint32_t begin, PackRowsJob* job) {
  const Params& params = params_[rank];
  const OpShape& shape = params.op.shape;
  job->head.flags = shape.cached == 0 && params.op.in.topk_weights != nullptr ? kernels::kMessageWeights : 0;
  job->head.flags |= shape.zero_foreign_weights != 0 ? kernels::kMessageZeroForeign : 0;
  if (shape.payload != kernels::Payload::kFp8 && params.op.in.side != nullptr) {
    job->head.side_elements = shape.side_elements;
    job->head.side_element_bytes = shape.side_element_bytes;
  }
  const uint32_t per_message = random_->chance(30) ? random_->between(1, 4) : random_->between(20, 200);
  const uint32_t most = per_message * (kPackBuffers / (nodes_ - 1));
  job->begin = begin;
  job->end = std::min(shape.tokens, begin + (random_->chance(50) ? most : random_->between(1, most)));
  const uint32_t buffers = (job->end - job->begin + per_message - 1) / per_message;
  uint32_t place = 0;
  for (uint32_t node = 0; node < nodes_; ++node) {
    if (!exchanges(rank, node)) {
      continue;
    }
    job->layout[node] = kernels::rows_layout(shape, job->head, node_ranks(node));
    job->per_message[node] = per_message;
    job->first_buffer[node] = place;
    for (uint32_t i = 0; i < buffers; ++i) {
      job->buffers[place++] = take_pinned(size_t{per_message} * job->layout[node].stride);
    }
  }
  return job->end;
}

void NodesGroup::pack_rows(uint32_t rank) {
  const Memory counters((nodes_ + 1) * sizeof(uint32_t));
  uint32_t begin = 0;
  do {
    PackRowsJob job;
    begin = fill_pack_job(rank, begin, &job);
    job.packed = reinterpret_cast<uint32_t*>(take_pinned(nodes_ * sizeof(uint32_t)));
    job.counters = counters.at<uint32_t>();
    ran("node_pack_rows", launch_node_pack_rows(params_[rank], table_of(rank), job, stream_));
    for (const uint32_t left : counters.get<uint32_t>(nodes_ + 1)) {
      EXPECT_EQ(0u, left) << "a counter behind its launch";
    }
    for (uint32_t node = 0; node < nodes_; ++node) {
      ASSERT_LE(job.packed[node], job.end - job.begin);
      ASSERT_TRUE(exchanges(rank, node) || job.packed[node] == 0) << "rows for a node that takes none";
      for (uint32_t done = 0, i = 0; done < job.packed[node]; ++i) {
        const uint32_t count = std::min(job.per_message[node], job.packed[node] - done);
        messages_.push_back({rank, node, count, job.head, job.buffers[job.first_buffer[node] + i]});
        done += count;
      }
    }
  } while (begin < params_[rank].op.shape.tokens);
}

NodeTotals NodesGroup::spread(uint32_t rank, const std::vector<Message>& messages) {
  const Memory totals(sizeof(NodeTotals));
  for (size_t next = 0; next < messages.size();) {
    SpreadRowsJob job;
    job.totals = totals.at<NodeTotals>();
    for (uint32_t most = random_->between(1, kNodeMessages); job.messages < most && next < messages.size(); ++next) {
      const Message& from = messages[next];
      job.message[job.messages++] = {
          from.entries, from.count, from.source, from.head,
          kernels::rows_layout(params_[rank].op.shape, from.head, node_ranks(placement_.node_of[rank]))};
    }
    ran("node_spread_rows", launch_node_spread_rows(params_[rank], table_of(rank), job, stream_));
  }
  return totals.get<NodeTotals>(1)[0];
}

/// Row numbers that a source has for a rank, as the matrix says.
uint64_t NodesGroup::landing_rows(uint32_t source, uint32_t rank) const {
  const OpShape& shape = params_[rank].op.shape;
  const int32_t* row = matrix_.data() + size_t{source} * kernels::count_row_ints(shape.ranks, shape.experts);
  if (shape.kind == OpKind::kDispatch && shape.expanded == 0) {
    return static_cast<uint64_t>(row[rank]);
  }
  uint64_t rows = 0;
  for (uint32_t local = 0; local < shape.local_experts; ++local) {
    rows += static_cast<uint64_t>(row[shape.ranks + rank * shape.local_experts + local]);
  }
  return rows;
}

void NodesGroup::spread_rows(uint32_t rank) {
  std::vector<Message> messages;
  std::copy_if(messages_.begin(), messages_.end(), std::back_inserter(messages),
               [&](const Message& message) { return message.node == placement_.node_of[rank]; });
  for (size_t i = messages.size(); i > 1; --i) {
    std::swap(messages[i - 1], messages[random_->below(static_cast<uint32_t>(i))]);
  }
  const NodeTotals totals = spread(rank, messages);
  EXPECT_EQ(0u, totals.bad_ranks);
  const bool runs = ranks_[rank]->plan.get<Plan>(1)[0].reason == 0;
  EXPECT_TRUE(runs || messages.empty()) << "rows of an operation that does not run";
  for (uint32_t source = 0; runs && source < shape_.ranks; ++source) {
    const bool sends = active(source) && placement_.node_of[source] != placement_.node_of[rank];
    EXPECT_EQ(sends ? landing_rows(source, rank) : 0, totals.landed[source]) << "rows of rank " << source;
  }
  spread_bad_entries(rank, messages);
  if (garbage) {
    spread_garbage(rank, messages);
  }
}

/// Entries with one thing wrong: their source is marked, and nothing lands, as the comparison of the outputs shows.
void NodesGroup::spread_bad_entries(uint32_t rank, const std::vector<Message>& messages) {
  const OpShape& shape = params_[rank].op.shape;
  const bool by_lane = shape.kind == OpKind::kLlDispatch || shape.expanded != 0;
  const bool bounded = shape.cached == 0 && params_[rank].peers.views[rank].out_x != nullptr;
  const uint32_t limit = shape.kind == OpKind::kLlDispatch ? shape.slots_per_expert : shape.capacity_rows;
  for (uint32_t wrong = 0; !messages.empty() && wrong < (bounded ? 5u : 4u); ++wrong) {
    Message message = messages[random_->below(static_cast<uint32_t>(messages.size()))];
    const kernels::EntryLayout layout = kernels::rows_layout(shape, message.head, node_ranks(placement_.node_of[rank]));
    const char* from = message.entries + size_t{random_->below(message.count)} * layout.stride;
    message.count = 1;
    message.entries = take_pinned(layout.stride);
    std::memcpy(message.entries, from, layout.stride);
    auto* words = reinterpret_cast<int32_t*>(message.entries);
    int32_t* topk = words + layout.topk_at / 4;
    int32_t* rows = words + layout.rows_at / 4;
    if (wrong < 2) {
      topk[random_->below(shape.top_k)] = wrong == 0 ? static_cast<int32_t>(shape.experts) : -2;
    } else if (wrong < 4) {
      words[0] = wrong == 2 ? static_cast<int32_t>(shape.max_tokens) : -1;
    } else {
      topk[0] = static_cast<int32_t>(rank * shape.local_experts);
      rows[by_lane ? 0 : placement_.index_of[rank]] = static_cast<int32_t>(limit);
    }
    const NodeTotals totals = spread(rank, {message});
    EXPECT_EQ(1u << message.source, totals.bad_ranks) << "bad entry " << wrong;
    EXPECT_EQ(0u, totals.landed[message.source]) << "bad entry " << wrong;
  }
}

void NodesGroup::spread_garbage(uint32_t rank, const std::vector<Message>& messages) {
  const OpShape& shape = params_[rank].op.shape;
  for (const Message& from : messages) {
    Message message = from;
    const kernels::EntryLayout layout = kernels::rows_layout(shape, message.head, node_ranks(placement_.node_of[rank]));
    message.entries = take_pinned(size_t{message.count} * layout.stride);
    std::memcpy(message.entries, from.entries, size_t{message.count} * layout.stride);
    for (uint32_t i = 0; i < message.count; ++i) {
      auto* words = reinterpret_cast<int32_t*>(message.entries + size_t{i} * layout.stride);
      words[0] = static_cast<int32_t>(random_->below(shape.max_tokens));
      for (uint32_t row = 0; row < layout.rows; ++row) {
        words[layout.rows_at / 4 + row] = static_cast<int32_t>(
            random_->chance(70) ? random_->below(shape.capacity_rows + 4) : static_cast<uint32_t>(random_->next()));
      }
      for (uint32_t lane = 0; lane < shape.top_k; ++lane) {
        words[layout.topk_at / 4 + lane] =
            static_cast<int32_t>(random_->below(shape.experts + (random_->chance(5) ? 3 : 0))) -
            (random_->chance(5) ? 2 : 0);
      }
    }
    (void)spread(rank, {message});
  }
}

}  // namespace expertd::device_test
