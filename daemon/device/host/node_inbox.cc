// SPDX-License-Identifier: Apache-2.0
#include "daemon/device/host/node_inbox.h"

#include <algorithm>

namespace expertd::device {

namespace {
// Of each other rank the counts of the next operation come early. More than that only when operations were aborted here
// and not elsewhere; then what does not fit stays with the fabric until this rank has come further.
constexpr uint32_t kWaitingPerRank = 4;
}  // namespace

NodeInbox::NodeInbox(uint32_t ranks) : most_waiting_(ranks * kWaitingPerRank) {
  waiting_.reserve(most_waiting_);
}

void NodeInbox::open(engine::FabricPort* fabric, uint32_t rank, uint64_t number) {
  fabric_ = fabric;
  rank_ = rank;
  number_ = number;
  look_again_ = !waiting_.empty();
}

bool NodeInbox::next_waiting(engine::Arrival* arrival) {
  for (size_t i = 0; i < waiting_.size();) {
    if (waiting_[i].header.op > number_) {
      ++i;
      continue;
    }
    *arrival = waiting_[i];
    waiting_.erase(waiting_.begin() + static_cast<std::ptrdiff_t>(i));
    if (arrival->header.op == number_) {
      return true;
    }
    release(*arrival);
  }
  look_again_ = false;
  return false;
}

bool NodeInbox::next(engine::Arrival* arrival) {
  if (look_again_ && next_waiting(arrival)) {
    return true;
  }
  while (waiting_.size() < most_waiting_ && fabric_->receive(rank_, arrival)) {
    const uint64_t number = arrival->header.op;
    if (number == number_) {
      return true;
    }
    if (number > number_ && number <= number_ + engine::kExchangePages) {
      waiting_.push_back(*arrival);
    } else {
      release(*arrival);
    }
  }
  return false;
}

}  // namespace expertd::device
