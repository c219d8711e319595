// SPDX-License-Identifier: Apache-2.0
#include "daemon/device/host/node_pulls.h"

#include <algorithm>
#include <cstring>

namespace expertd::device {

namespace host = kernels::host;

namespace {
// Routing of so many tokens is read per node in one go, some 50 us with 64 nodes.
constexpr uint32_t kMostWindowTokens = 256;
}  // namespace

NodePulls::NodePulls(uint32_t nodes)
    : memory_(uint64_t{nodes} * kWindows, kSumsBytes), messages_(nodes), partials_(nodes) {
  for (Window& window : windows_) {
    window.asked.resize(nodes);
  }
}

void NodePulls::open(const NodeOp* op, NodeOutbox* outbox) {
  op_ = op;
  outbox_ = outbox;
  oldest_ = 0;
  in_flight_ = 0;
  pulled_bytes_ = 0;
  opening_ = false;
  sent_tokens_ = 0;
  all_sent_ = true;
  given_up_ = 0;
  std::fill(messages_.begin(), messages_.end(), 0);
}

void NodePulls::begin(std::span<const uint32_t> capacities) {
  const kernels::OpParams& params = *op_->params;
  capacities_ = capacities;
  all_sent_ = false;
  head_ = kernels::MessageHead{};
  head_.flags = params.out.topk_weights != nullptr ? kernels::kMessageWeights : 0;
  head_.flags |= params.shape.order_last_lane != 0 ? kernels::kMessageLastLane : 0;
  sums_ = kernels::sums_layout(params.shape, head_);
  uint64_t fitting = (std::min(op_->message_bytes, kSumsBytes) - sizeof(head_)) / sums_.stride;
  for (uint32_t node = 0; node < op_->placement->nodes(); ++node) {
    const kernels::EntryLayout pulls = kernels::pulls_layout(params.shape, op_->node_ranks(node));
    fitting = std::min(fitting, (std::min(op_->message_bytes, kPullsBytes) - sizeof(head_)) / pulls.stride);
  }
  most_windows_ = op_->lane == engine::FabricLane::kLatency ? kWindows : kThroughputWindows;
  if (op_->lane == engine::FabricLane::kLatency) {
    fitting = std::min<uint64_t>(fitting, params.shape.tokens / kWindows);  // so that all of them are used
  }
  window_tokens_ = static_cast<uint32_t>(std::clamp<uint64_t>(fitting, 1, kMostWindowTokens));
}

bool NodePulls::advance(uint32_t tokens, kernels::OpReport* report) {
  bool moved = false;
  if (in_flight_ < most_windows_ && !all_sent_) {
    Window& window = windows_[(oldest_ + in_flight_) % windows_.size()];
    if (!opening_) {
      const uint32_t end = std::min(op_->params->shape.tokens, sent_tokens_ + window_tokens_);
      window.tokens = {sent_tokens_, end};
      window.done = sent_tokens_;
      window.waits = 0;
      window.gathered = false;
      // Also of nodes that are not asked any more, because none of their ranks takes part now.
      std::fill(window.asked.begin(), window.asked.end(), Asked{});
      opening_ = true;
      next_node_ = 0;
    }
    const uint32_t before = next_node_;
    if (send_window(&window, report)) {
      opening_ = false;
      sent_tokens_ = window.tokens.end;
      all_sent_ = sent_tokens_ == op_->params->shape.tokens;
      ++in_flight_;
    }
    moved = !opening_ || next_node_ != before;
  }
  return (in_flight_ != 0 && finish_tokens(&windows_[oldest_], tokens, report)) || moved;
}

// False: not all nodes have been sent theirs, for want of a buffer.
bool NodePulls::send_window(Window* window, kernels::OpReport* report) {
  engine::SendBuffer buffer;
  for (; next_node_ < op_->placement->nodes(); ++next_node_) {
    if (!op_->exchanges_with(next_node_)) {
      continue;
    }
    if (buffer.data == nullptr) {
      buffer = op_->fabric->take(op_->rank, op_->lane);
    }
    if (buffer.data == nullptr) {
      return false;
    }
    if (send_pulls(window, next_node_, &buffer, report)) {
      buffer = engine::SendBuffer{};
    }
  }
  if (buffer.data != nullptr) {
    op_->fabric->drop(op_->rank, buffer);
  }
  return true;
}

// False: there was nothing to send.
bool NodePulls::send_pulls(Window* window, uint32_t node, engine::SendBuffer* buffer, kernels::OpReport* report) {
  const kernels::OpParams& params = *op_->params;
  const kernels::EntryLayout layout = kernels::pulls_layout(params.shape, op_->node_ranks(node));
  const bool last = window->tokens.end == params.shape.tokens;
  Asked& asked = window->asked[node];
  asked = Asked{};
  uint64_t bytes = sizeof(head_);
  for (uint32_t token = window->tokens.begin; token < window->tokens.end; ++token) {
    const uint32_t rows = host::pack_pull(params, op_->nodes, node, capacities_, token, buffer->data + bytes);
    report->remote_bytes += uint64_t{rows} * params.shape.hidden * 2;
    pulled_bytes_ += uint64_t{rows} * params.shape.hidden * 2;
    asked.entries += rows != 0 ? 1 : 0;
    bytes += rows != 0 ? layout.stride : 0;
  }
  if (asked.entries == 0 && !last) {
    return false;
  }
  kernels::MessageHead head = head_;
  ++messages_[node];
  head.last = last ? messages_[node] : 0;
  std::memcpy(buffer->data, &head, sizeof(head));
  if (asked.entries != 0 && (given_up_ >> node & 1) == 0) {
    window->waits |= uint64_t{1} << node;
  }
  engine::MessageHeader header;
  header.kind = engine::MessageKind::kPulls;
  header.node = node;
  header.targets = op_->place_bit(op_->server_at(node, op_->rank));
  header.entries = asked.entries;
  outbox_->send(*buffer, header, bytes);
  return true;
}

bool NodePulls::finish_tokens(Window* window, uint32_t tokens, kernels::OpReport* report) {
  if (window->waits != 0) {
    return false;
  }
  if (!window->gathered) {
    window->gathered = true;
    partial_count_ = 0;
    for (uint32_t node = 0; node < op_->placement->nodes(); ++node) {
      const engine::Arrival& sums = window->asked[node].sums;
      if (sums.data != nullptr) {
        partials_[partial_count_++] = {{sums.data + sizeof(head_), sums.bytes - sizeof(head_), sums.header.entries}, 0};
      }
    }
  }
  const host::TokenRange range{window->done, std::min(window->tokens.end, window->done + tokens)};
  host::NodePartials partials{sums_, {partials_.data(), partial_count_}};
  if (op_->params->shape.kind == kernels::OpKind::kLlCombine) {
    host::ll_combine_range(*op_->params, op_->peers, range, &partials, report);
  } else {
    host::combine_range(*op_->params, op_->peers, range, &partials, report);
  }
  window->done = range.end;
  if (window->done == window->tokens.end) {
    oldest_ = (oldest_ + 1) % static_cast<uint32_t>(windows_.size());
    --in_flight_;
  }
  return true;
}

// Whether these can be the sums of what was asked for: as many, of tokens of the window in their order.
bool NodePulls::fits(const Window& window, const Asked& asked, const host::Entries& entries) const {
  if (entries.count != asked.entries) {
    return false;
  }
  uint32_t least = window.tokens.begin;
  for (uint32_t i = 0; i < entries.count; ++i) {
    const uint32_t token = host::entry_token(entries.at(sums_, i));
    if (token < least || token >= window.tokens.end) {
      return false;
    }
    least = token + 1;
  }
  return true;
}

bool NodePulls::take(const engine::Arrival& arrival, const kernels::MessageHead& head) {
  const uint32_t node = arrival.header.node;
  const host::Entries entries{arrival.data + sizeof(head), arrival.bytes - sizeof(head), arrival.header.entries};
  if (head.flags != (head_.flags & kernels::kMessageWeights) || !entries.well_formed(op_->params->shape, sums_)) {
    return false;
  }
  for (uint32_t i = 0; i < in_flight_ + (opening_ ? 1 : 0); ++i) {
    Window& window = windows_[(oldest_ + i) % windows_.size()];
    Asked& asked = window.asked[node];
    if ((window.waits >> node & 1) != 0 && fits(window, asked, entries)) {
      engine::Arrival sums = arrival;
      if (!memory_.keep(uint64_t{(oldest_ + i) % kWindows} * partials_.size() + node, &sums)) {
        return false;
      }
      window.waits &= ~(uint64_t{1} << node);
      asked.sums = sums;
      return true;
    }
  }
  return false;
}

void NodePulls::give_up(uint32_t node) {
  given_up_ |= uint64_t{1} << node;
  for (Window& window : windows_) {
    window.waits &= ~given_up_;
  }
}

uint64_t NodePulls::missing_nodes() const {
  return op_ == nullptr || in_flight_ == 0 ? 0 : windows_[oldest_].waits;
}

}  // namespace expertd::device
