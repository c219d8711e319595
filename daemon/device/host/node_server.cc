// SPDX-License-Identifier: Apache-2.0
#include "daemon/device/host/node_server.h"

#include <algorithm>
#include <cstring>

namespace expertd::device {

namespace host = kernels::host;

NodeServer::NodeServer(uint32_t ranks)
    : sources_(ranks), waiting_(size_t{ranks} * kPullsPerRank), memory_(waiting_.size(), kPullsBytes) {}

void NodeServer::open(const NodeOp* op, NodeOutbox* outbox) {
  op_ = op;
  outbox_ = outbox;
  std::fill(sources_.begin(), sources_.end(), Source{});
  first_ = 0;
  count_ = 0;
  done_ = 0;
}

void NodeServer::close() {
  while (op_ != nullptr && count_ != 0) {
    end_front();
  }
  op_ = nullptr;
}

void NodeServer::end_front() {
  if (sums_.data != nullptr) {
    op_->fabric->drop(op_->rank, sums_);
    sums_ = engine::SendBuffer{};
  }
  --sources_[waiting_[first_].header.source_rank].waiting;
  first_ = (first_ + 1) % static_cast<uint32_t>(waiting_.size());
  --count_;
  done_ = 0;
}

bool NodeServer::take(const engine::Arrival& arrival, const kernels::MessageHead& head) {
  const kernels::OpShape& shape = op_->params->shape;
  const uint32_t entries = arrival.header.entries;
  Source& source = sources_[arrival.header.source_rank];
  const kernels::EntryLayout pulls = kernels::pulls_layout(shape, op_->node_ranks(op_->placement->own_node));
  const uint64_t sum_bytes = sizeof(head) + uint64_t{entries} * kernels::sums_layout(shape, head).stride;
  const bool combine = shape.kind == kernels::OpKind::kCombine || shape.kind == kernels::OpKind::kLlCombine;
  const host::Entries given{arrival.data + sizeof(head), arrival.bytes - sizeof(head), entries};
  if (!combine || (head.flags & ~(kernels::kMessageWeights | kernels::kMessageLastLane)) != 0 ||
      !given.well_formed(shape, pulls) || sum_bytes > op_->message_bytes || source.waiting == kPullsPerRank ||
      (head.last != 0 && source.messages != 0) || (head.last == 0 && entries == 0)) {
    return false;
  }
  engine::Arrival copy = arrival;
  const uint64_t place = uint64_t{arrival.header.source_rank} * kPullsPerRank + source.taken % kPullsPerRank;
  if (!memory_.keep(place, &copy)) {
    return false;
  }
  ++source.taken;
  source.messages = head.last != 0 ? head.last : source.messages;
  waiting_[(first_ + count_) % waiting_.size()] = copy;
  ++count_;
  ++source.waiting;
  return true;
}

bool NodeServer::advance(uint32_t entries, int32_t* bad) {
  if (count_ == 0) {
    return false;
  }
  const engine::Arrival& front = waiting_[first_];
  const kernels::OpShape& shape = op_->params->shape;
  Source& source = sources_[front.header.source_rank];
  if (source.given_up || front.header.entries == 0) {
    ++source.served;
    end_front();
    return true;
  }
  kernels::MessageHead asked;
  std::memcpy(&asked, front.data, sizeof(asked));
  if (sums_.data == nullptr) {
    sums_ = op_->fabric->take(op_->rank, op_->lane);
    if (sums_.data == nullptr) {
      return false;
    }
    const kernels::MessageHead head{.flags = asked.flags & kernels::kMessageWeights};
    std::memcpy(sums_.data, &head, sizeof(head));
  }
  const kernels::EntryLayout pulls = kernels::pulls_layout(shape, op_->node_ranks(op_->placement->own_node));
  const kernels::EntryLayout sums = kernels::sums_layout(shape, asked);
  const host::Entries given{front.data + sizeof(asked), front.bytes - sizeof(asked), front.header.entries};
  const auto sum_at = [&](uint32_t index) { return sums_.data + sizeof(asked) + uint64_t{index} * sums.stride; };
  for (const uint32_t end = std::min(front.header.entries, done_ + entries); done_ < end; ++done_) {
    if (!host::serve_pull(shape, op_->nodes, op_->peers, asked, given.at(pulls, done_), sum_at(done_))) {
      *bad = static_cast<int32_t>(front.header.source_rank);
      end_front();
      return true;
    }
  }
  if (done_ == front.header.entries) {
    engine::MessageHeader header;
    header.kind = engine::MessageKind::kSums;
    header.node = front.header.node;
    header.targets = op_->place_bit(front.header.source_rank);
    header.entries = done_;
    outbox_->send(sums_, header, sizeof(asked) + uint64_t{done_} * sums.stride);
    sums_ = engine::SendBuffer{};
    ++source.served;
    end_front();
  }
  return true;
}

void NodeServer::give_up(uint32_t source) {
  sources_[source].given_up = true;
}

// Whether there is more to come from the rank, or to be sent to it.
bool NodeServer::awaits(uint32_t rank) const {
  const Source& source = sources_[rank];
  const bool done = source.given_up || (source.messages != 0 && source.served >= source.messages);
  return !done && op_->serves(rank);
}

bool NodeServer::finished() const {
  for (uint32_t rank = 0; op_ != nullptr && rank < op_->placement->ranks(); ++rank) {
    if (awaits(rank)) {
      return false;
    }
  }
  return true;
}

base::RankSet NodeServer::missing() const {
  base::RankSet ranks;
  for (uint32_t rank = 0; op_ != nullptr && rank < op_->placement->ranks(); ++rank) {
    if (awaits(rank)) {
      ranks.add(rank);
    }
  }
  return ranks;
}

}  // namespace expertd::device
