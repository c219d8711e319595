// SPDX-License-Identifier: Apache-2.0
#include "daemon/device/nodes/node_outbox.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace expertd::device {

namespace {
constexpr uint32_t kKinds = 4;
// Rows of low latency leave in so many messages per node, none smaller than so many bytes: what is under way, the
// copies that are still to be made here and the spreading of what arrived overlap.
constexpr uint64_t kPieces = 4;
constexpr uint64_t kLeastPieceBytes = uint64_t{16} * 1024;
}  // namespace

NodeOutbox::NodeOutbox(uint32_t ranks) : open_(ranks), sequences_(size_t{ranks} * kKinds) {}

void NodeOutbox::open(const NodeOp* op) {
  op_ = op;
  std::fill(sequences_.begin(), sequences_.end(), 0);
  pending_ = 0;
  landing_ = 0;
}

void NodeOutbox::close() {
  for (uint32_t node = 0; op_ != nullptr && node < op_->placement->nodes(); ++node) {
    if (open_[node].buffer.data != nullptr) {
      op_->fabric->drop(op_->rank, open_[node].buffer);
      open_[node] = Open{};
    }
  }
  op_ = nullptr;
}

void NodeOutbox::send(const engine::SendBuffer& buffer, engine::MessageHeader header, uint64_t bytes) {
  header.lane = op_->lane;
  header.op = op_->number;
  header.view = op_->view;
  header.source_rank = op_->rank;
  const uint32_t kind = static_cast<uint32_t>(header.kind) - 1;
  header.sequence = sequences_[size_t{kind} * open_.size() + header.node]++;
  op_->fabric->send(op_->rank, buffer, header, bytes);
}

void NodeOutbox::begin_rows(std::span<const uint32_t> capacities) {
  const kernels::OpParams& params = *op_->params;
  capacities_ = capacities;
  head_ = kernels::MessageHead{};
  if (params.shape.cached == 0 && params.in.topk_weights != nullptr) {
    head_.flags = kernels::kMessageWeights;
  }
  if (params.shape.zero_foreign_weights != 0) {
    head_.flags |= kernels::kMessageZeroForeign;
  }
  if (params.shape.payload != kernels::Payload::kFp8 && params.in.side != nullptr) {
    head_.side_elements = params.shape.side_elements;
    head_.side_element_bytes = params.shape.side_element_bytes;
  }
  for (uint32_t node = 0; node < op_->placement->nodes(); ++node) {
    open_[node].layout = kernels::rows_layout(params.shape, head_, op_->node_ranks(node));
    const uint64_t all_bytes = uint64_t{params.shape.tokens} * open_[node].layout.stride;
    open_[node].most_bytes = op_->lane == engine::FabricLane::kLatency
                                 ? std::max(all_bytes / kPieces + sizeof(head_), kLeastPieceBytes)
                                 : UINT64_MAX;
  }
}

bool NodeOutbox::start(Open* open) {
  open->buffer = op_->fabric->take(op_->rank, op_->lane);
  if (open->buffer.data == nullptr) {
    return false;
  }
  std::memcpy(open->buffer.data, &head_, sizeof(head_));
  open->bytes = sizeof(head_);
  open->targets = 0;
  open->entries = 0;
  return true;
}

void NodeOutbox::send_open(uint32_t node) {
  Open& open = open_[node];
  engine::MessageHeader header;
  header.kind = engine::MessageKind::kRows;
  header.node = node;
  header.targets = open.targets;
  header.entries = open.entries;
  send(open.buffer, header, open.bytes);
  open.buffer = engine::SendBuffer{};
}

// With no buffer left, those that are open would wait for each other when there are fewer of them than nodes.
void NodeOutbox::send_fullest() {
  uint32_t fullest = 0;
  uint64_t bytes = 0;
  for (uint32_t node = 0; node < op_->placement->nodes(); ++node) {
    if (open_[node].buffer.data != nullptr && open_[node].bytes > bytes) {
      fullest = node;
      bytes = open_[node].bytes;
    }
  }
  if (bytes != 0) {
    send_open(fullest);
  }
}

bool NodeOutbox::pack(const kernels::host::LandingRow& row) {
  const kernels::OpParams& params = *op_->params;
  if (!resumes(row.token)) {
    token_ = row.token;
    pending_ = kernels::host::row_nodes(params, op_->nodes, row.token);
    landing_ += pending_ == 0 ? 0 : kernels::host::landing_rows(params, op_->nodes, capacities_, row.token);
  }
  for (; pending_ != 0; pending_ &= pending_ - 1) {
    const auto node = static_cast<uint32_t>(std::countr_zero(pending_));
    Open& open = open_[node];
    if (open.buffer.data == nullptr && !start(&open)) {
      send_fullest();
      return false;
    }
    open.targets |= kernels::host::pack_row(params, op_->nodes, node, open.layout, row, open.buffer.data + open.bytes);
    open.bytes += open.layout.stride;
    ++open.entries;
    if (open.bytes >= open.most_bytes || open.bytes + open.layout.stride > open.buffer.capacity) {
      send_open(node);
    }
  }
  return true;
}

void NodeOutbox::flush() {
  for (uint32_t node = 0; node < op_->placement->nodes(); ++node) {
    if (open_[node].buffer.data != nullptr) {
      send_open(node);
    }
  }
}

}  // namespace expertd::device
