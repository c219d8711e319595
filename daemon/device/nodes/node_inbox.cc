// SPDX-License-Identifier: Apache-2.0
#include "daemon/device/nodes/node_inbox.h"

namespace expertd::device {

namespace {
// Of each other rank the counts of the next operation come early. More than that only when operations were aborted
// there and not here; what has no place is lost then, and costs an operation its deadline.
constexpr uint32_t kEarlyPerRank = 2;
// A rank that was told of a loss first has done with all it had submitted, and so may another have before it.
constexpr uint64_t kMostAhead = uint64_t{2} * EXPERTD_RING_SLOTS_MAX;
}  // namespace

NodeInbox::NodeInbox(uint32_t ranks, uint64_t counts_bytes)
    : early_(size_t{ranks} * kEarlyPerRank), memory_(early_.size(), counts_bytes) {}

void NodeInbox::open(engine::FabricPort* fabric, uint32_t rank, uint64_t number) {
  fabric_ = fabric;
  rank_ = rank;
  number_ = number;
  look_again_ = true;
}

void NodeInbox::share(std::vector<NodeInbox*> by_order, engine::FabricPort* fabric, uint32_t rank) {
  fabric_ = fabric;
  rank_ = rank;
  for (uint32_t order = 0; order < by_order.size(); ++order) {
    number_ = by_order[order] == this ? in_order(order, 0) : number_;
  }
  by_order_ = std::move(by_order);
  held_.reserve(kMostHeld);
}

void NodeInbox::release(const engine::Arrival& arrival) {
  if (!is_copy_) {
    fabric_->release(rank_, arrival);
  }
}

bool NodeInbox::next_early(engine::Arrival* arrival) {
  for (engine::Arrival& early : early_) {
    const uint64_t number = early.header.op;
    if (number == 0 || number > number_) {
      continue;
    }
    early.header.op = 0;
    if (number == number_) {
      *arrival = early;
      arrival->header.op = number;
      return true;
    }
  }
  look_again_ = false;
  return false;
}

void NodeInbox::keep_early(engine::Arrival arrival) {
  if (arrival.header.kind != engine::MessageKind::kCounts || arrival.header.op > number_ + kMostAhead) {
    return;
  }
  for (size_t place = 0; place < early_.size(); ++place) {
    if (early_[place].header.op == 0) {
      if (memory_.keep(place, &arrival)) {
        early_[place] = arrival;
      }
      return;
    }
  }
}

void NodeInbox::hand(const engine::Arrival& arrival) {
  if (arrival.header.op == number_ && held_.size() < held_.capacity()) {
    held_.push_back(arrival);
    return;
  }
  if (arrival.header.op > number_) {
    keep_early(arrival);
  }
  fabric_->release(rank_, arrival);
}

bool NodeInbox::next_held(engine::Arrival* arrival) {
  while (!held_.empty()) {
    *arrival = held_.front();
    held_.erase(held_.begin());
    if (arrival->header.op == number_) {
      return true;
    }
    fabric_->release(rank_, *arrival);
  }
  return false;
}

bool NodeInbox::next(engine::Arrival* arrival) {
  is_copy_ = look_again_ && next_early(arrival);
  if (is_copy_ || next_held(arrival)) {
    return true;
  }
  while (fabric_->receive(rank_, arrival)) {
    const uint32_t order = NodeInbox::order(arrival->header.op);
    if (order != NodeInbox::order(number_)) {
      if (order < by_order_.size()) {
        by_order_[order]->hand(*arrival);
      } else {
        release(*arrival);
      }
      continue;
    }
    if (arrival->header.op == number_) {
      return true;
    }
    if (arrival->header.op > number_) {
      keep_early(*arrival);
    }
    release(*arrival);
  }
  return false;
}

}  // namespace expertd::device
