// SPDX-License-Identifier: Apache-2.0
#include "daemon/device/host/node_exchange.h"

#include <algorithm>
#include <cstring>

#include "daemon/kernels/host/tables.h"
#include "proto/abi/expertd_reason.h"

namespace expertd::device {

namespace host = kernels::host;

namespace {
// Of a turn, some 50 us: bytes that are spread, and bytes that are summed for others.
constexpr uint64_t kTurnBytes = uint64_t{512} * 1024;
constexpr uint64_t kLeastCost = 1024;  // of an arrival
}  // namespace

NodeExchange::NodeExchange(uint32_t ranks, uint32_t experts)
    : inbox_(ranks, counts_message_bytes(ranks, experts)),
      outbox_(ranks),
      pulls_(std::min(ranks, base::kMaxNodes)),
      server_(ranks),
      spread_(ranks),
      expected_(ranks),
      capacities_(ranks) {}

bool NodeExchange::dispatches() const {
  return host::is_dispatch(params_->shape);
}

bool NodeExchange::combines() const {
  return params_->shape.kind == kernels::OpKind::kCombine || params_->shape.kind == kernels::OpKind::kLlCombine;
}

bool NodeExchange::open(const NodePart& part) {
  params_ = part.params;
  peers_ = part.peers;
  notices_ = part.notices;
  flags_ = part.flags;
  op_ = NodeOp{};
  op_.fabric = part.fabric;
  op_.placement = part.placement;
  op_.nodes = {part.placement->own_node, part.placement->node_of, part.placement->index_of, part.placement->ranks_of};
  op_.number = part.number;
  op_.rank = part.rank;
  op_.active = part.active;
  op_.view = part.view;
  op_.lane =
      part.own->traffic == engine::Traffic::kLatency ? engine::FabricLane::kLatency : engine::FabricLane::kThroughput;
  op_.message_bytes = part.fabric->message_bytes();
  op_.params = params_;
  op_.peers = peers_;
  const kernels::OpShape& shape = params_->shape;
  const uint32_t row_ints =
      part.routes ? kernels::count_row_ints(shape.ranks, shape.experts) : kernels::kCountRowErrorInts;
  notices_[op_.rank] = make_notice(*part.own, op_.active, row_ints);
  inbox_.open(op_.fabric, op_.rank, op_.number);
  outbox_.open(&op_);
  pulls_.open(&op_, &outbox_);
  server_.open(&op_, &outbox_);
  counts_for_ = 0;
  for (uint32_t node = 0; node < op_.placement->nodes(); ++node) {
    counts_for_ |= uint64_t{op_.exchanges_with(node) ? 1U : 0U} << node;
  }
  announcing_ = false;
  moving_ = false;
  flushed_ = false;
  counted_ = {};
  landed_bytes_ = 0;
  bad_rank_ = -1;
  spoiled_ = {};
  std::fill(spread_.begin(), spread_.end(), 0);
  return messages_suffice();
}

bool NodeExchange::messages_suffice() const {
  const kernels::OpShape& shape = params_->shape;
  uint64_t bytes = counts_message_bytes(shape.ranks, shape.experts);
  // As if all that may travel beside a row did.
  const kernels::MessageHead head{.flags = kernels::kMessageWeights,
                                  .side_elements = shape.side_elements,
                                  .side_element_bytes = shape.side_element_bytes};
  for (uint32_t node = 0; node < op_.placement->nodes(); ++node) {
    if (dispatches()) {
      bytes = std::max<uint64_t>(bytes, sizeof(head) + kernels::rows_layout(shape, head, op_.node_ranks(node)).stride);
    }
    if (combines()) {
      bytes = std::max<uint64_t>(bytes, sizeof(head) + kernels::pulls_layout(shape, op_.node_ranks(node)).stride);
      bytes = std::max<uint64_t>(bytes, sizeof(head) + kernels::sums_layout(shape, head).stride);
    }
  }
  return bytes <= op_.message_bytes;
}

void NodeExchange::close() {
  if (is_open()) {
    pulls_.close();
    server_.close();
    outbox_.close();
    op_.fabric = nullptr;
  }
}

void NodeExchange::announce() {
  announcing_ = true;
}

bool NodeExchange::send_counts() {
  bool moved = false;
  for (uint32_t node = 0; announcing_ && counts_for_ != 0 && node < op_.placement->nodes(); ++node) {
    if ((counts_for_ >> node & 1) == 0) {
      continue;
    }
    const engine::SendBuffer buffer = op_.fabric->take(op_.rank, op_.lane);
    if (buffer.data == nullptr) {
      break;
    }
    const NodeNotice& notice = notices_[op_.rank];
    const uint32_t row_ints = kernels::count_row_ints(params_->shape.ranks, params_->shape.experts);
    const int32_t* row = host::matrix_row(params_->shape, params_->counts, op_.rank);
    const uint64_t bytes = uint64_t{notice.row_ints} * sizeof(int32_t);
    std::memcpy(buffer.data, &notice, sizeof(notice));
    std::memcpy(buffer.data + sizeof(notice), row + row_ints - notice.row_ints, bytes);
    engine::MessageHeader header;
    header.kind = engine::MessageKind::kCounts;
    header.node = node;
    header.targets = op_.place_bit(op_.server_at(node, op_.rank));
    header.entries = 1;
    outbox_.send(buffer, header, sizeof(notice) + bytes);
    counts_for_ &= ~(uint64_t{1} << node);
    moved = true;
  }
  return moved;
}

bool NodeExchange::turn() {
  bool moved = send_counts();
  uint64_t cost = 0;
  engine::Arrival arrival;
  while (cost < kTurnBytes && inbox_.next(&arrival)) {
    cost += std::max(arrival.bytes, kLeastCost);
    handle(arrival);
    moved = true;
  }
  const uint64_t sum_cost = uint64_t{params_->shape.hidden} * 2 * (op_.node_ranks(op_.placement->own_node) + 1);
  int32_t bad = -1;
  moved |= server_.advance(static_cast<uint32_t>(kTurnBytes / std::max<uint64_t>(sum_cost, 1) + 1), &bad);
  if (bad >= 0) {
    spoil(static_cast<uint32_t>(bad));
  }
  return moved;
}

bool NodeExchange::from_a_member(const engine::MessageHeader& header) const {
  return op_.is_elsewhere(header.source_rank) && op_.placement->node_of[header.source_rank] == header.node;
}

// Nothing keeps the arrival: the fabric's buffers are shared by all ranks of the node.
void NodeExchange::handle(const engine::Arrival& arrival) {
  const engine::MessageHeader& header = arrival.header;
  // What comes of another view is of a node that the others have left out, or of one of its ranks.
  if (!from_a_member(header) || header.view != op_.view || spoiled(header.source_rank)) {
    inbox_.release(arrival);
    return;
  }
  bool good = false;
  kernels::MessageHead head;
  if (header.kind == engine::MessageKind::kCounts) {
    good = take_counts(arrival);
  } else if (arrival.bytes >= sizeof(head)) {
    std::memcpy(&head, arrival.data, sizeof(head));
    if (header.kind == engine::MessageKind::kRows) {
      good = take_rows(arrival);
    } else if (header.kind == engine::MessageKind::kPulls) {
      good = op_.serves(header.source_rank) && server_.take(arrival, head);
    } else if (header.kind == engine::MessageKind::kSums) {
      good = combines() && pulls_.take(arrival, head);
    }
  }
  inbox_.release(arrival);
  if (!good) {
    spoil(header.source_rank);
  }
}

// The rank's word is not taken any more, and what it owes is not waited for.
void NodeExchange::spoil(uint32_t source) {
  bad_rank_ = bad_rank_ < 0 ? static_cast<int32_t>(source) : bad_rank_;
  spoiled_.add(source);
  server_.give_up(source);
  pulls_.give_up(op_.placement->node_of[source]);
}

bool NodeExchange::take_counts(const engine::Arrival& arrival) {
  const kernels::OpShape& shape = params_->shape;
  const uint32_t source = arrival.header.source_rank;
  // Whichever rank of this node the source has chosen: with another mask it may have chosen another.
  if (counted_.contains(source) || flags_->routed.contains(source, std::memory_order_acquire)) {
    return false;
  }
  const uint32_t row_ints = kernels::count_row_ints(shape.ranks, shape.experts);
  int32_t* row = params_->counts + size_t{source} * row_ints;
  NodeNotice& notice = notices_[source];
  const bool good = read_counts(arrival, row, &notice);
  if (!good) {
    // Then all ranks of this node end as if the source had been refused.
    std::fill_n(row, row_ints, 0);
    notice = notices_[op_.rank];
    notice.reason = EXPERTD_REASON_INTERNAL;
  }
  flags_->routed_ns[source].store(arrival.arrived_ns, std::memory_order_relaxed);  // published with its bit
  counted_.add(source);
  return good;
}

bool NodeExchange::read_counts(const engine::Arrival& arrival, int32_t* row, NodeNotice* notice) const {
  const uint32_t row_ints = kernels::count_row_ints(params_->shape.ranks, params_->shape.experts);
  const uint32_t counts = row_ints - kernels::kCountRowErrorInts;
  if (arrival.bytes < sizeof(*notice)) {
    return false;
  }
  std::memcpy(notice, arrival.data, sizeof(*notice));
  const bool whole = notice->row_ints == row_ints;
  if ((!whole && notice->row_ints != kernels::kCountRowErrorInts) ||
      arrival.bytes != sizeof(*notice) + uint64_t{notice->row_ints} * sizeof(int32_t)) {
    return false;
  }
  std::memcpy(row + row_ints - notice->row_ints, arrival.data + sizeof(*notice), arrival.bytes - sizeof(*notice));
  if (!whole) {
    std::fill_n(row, counts, 0);
  }
  // No source sends more rows than its tokens have lanes or ranks, and sums of such numbers stay far from overflowing.
  const int64_t most = int64_t{base::kMaxTokens} * base::kMaxTopK;
  return std::all_of(row, row + counts, [most](int32_t rows) { return rows >= 0 && rows <= most; });
}

base::RankSet NodeExchange::take_counted() {
  const base::RankSet fresh = counted_;
  counted_ = {};
  return fresh;
}

// Rows may come before this rank knows that the operation runs: the source knows it, and all decide alike.
bool NodeExchange::take_rows(const engine::Arrival& arrival) {
  kernels::MessageHead head;
  std::memcpy(&head, arrival.data, sizeof(head));
  const host::Entries entries{arrival.data + sizeof(head), arrival.bytes - sizeof(head), arrival.header.entries};
  return host::spread_rows(*params_, op_.nodes, peers_[op_.rank], head, entries, &spread_[arrival.header.source_rank]);
}

bool NodeExchange::decide(const Verdict& verdict) {
  for (uint32_t rank = 0; rank < op_.placement->ranks(); ++rank) {
    capacities_[rank] = op_.takes_part(rank) ? notices_[rank].capacity_rows : 0;
    if (op_.is_elsewhere(rank)) {
      peers_[rank].capacity_rows = capacities_[rank];
    }
  }
  return notices_agree(notices_, params_->shape, verdict);
}

void NodeExchange::expect_rows() {
  const kernels::OpShape& shape = params_->shape;
  const int32_t* matrix = host::matrix_of(*params_);
  for (uint32_t source = 0; source < shape.ranks; ++source) {
    const int32_t* row = host::matrix_row(shape, matrix, source);
    uint64_t rows = 0;
    for (uint32_t local = 0; host::rows_by_expert(shape) && local < shape.local_experts; ++local) {
      rows += static_cast<uint32_t>(row[shape.ranks + shape.rank * shape.local_experts + local]);
    }
    rows = host::rows_by_expert(shape) ? rows : static_cast<uint32_t>(row[shape.rank]);
    expected_[source] = op_.is_elsewhere(source) ? rows : 0;
  }
}

void NodeExchange::begin_moving() {
  moving_ = true;
  if (dispatches()) {
    expect_rows();
    outbox_.begin_rows(capacities_);
  }
  if (combines()) {
    pulls_.begin(capacities_);
  }
}

bool NodeExchange::move(uint64_t* progress, uint32_t tokens, kernels::OpReport* report) {
  const uint32_t all = params_->shape.tokens;
  if (combines()) {
    const bool moved = pulls_.advance(tokens, report);
    *progress = pulls_.finished() ? all : 0;
    return moved;
  }
  if (*progress == all && flushed_) {
    return false;
  }
  const auto begin = static_cast<uint32_t>(*progress);
  const uint64_t landing = outbox_.landing_rows();
  *progress = host::dispatch_range(*params_, peers_, {begin, std::min(all, begin + tokens)}, &outbox_, report);
  const uint64_t landed_bytes = (outbox_.landing_rows() - landing) * host::landed_row_bytes(params_->shape);
  report->remote_bytes += landed_bytes;
  landed_bytes_ += landed_bytes;
  if (*progress == all) {
    outbox_.flush();
    flushed_ = true;
    return true;
  }
  return *progress != begin;
}

bool NodeExchange::moved(uint64_t progress) const {
  if (!moving_) {
    return true;
  }
  return combines() ? pulls_.finished() && server_.finished() : progress == params_->shape.tokens && flushed_;
}

bool NodeExchange::complete() {
  for (uint32_t source = 0; moving_ && dispatches() && source < op_.placement->ranks(); ++source) {
    if (spread_[source] > expected_[source] && !spoiled(source)) {
      spoil(source);
    }
    if (spread_[source] < expected_[source] && !spoiled(source)) {
      return false;
    }
  }
  return true;
}

base::RankSet NodeExchange::missing() const {
  base::RankSet ranks;
  if (!is_open() || !moving_) {
    return ranks;
  }
  const uint64_t nodes = combines() ? pulls_.missing_nodes() : 0;
  for (uint32_t rank = 0; rank < op_.placement->ranks(); ++rank) {
    const bool rows = dispatches() && spread_[rank] < expected_[rank];
    const bool sums = (nodes >> op_.placement->node_of[rank] & 1) != 0 &&
                      op_.server_at(op_.placement->node_of[rank], op_.rank) == rank;
    if ((rows || sums) && !spoiled(rank)) {
      ranks.add(rank);
    }
  }
  return combines() ? ranks | server_.missing() : ranks;
}

}  // namespace expertd::device
