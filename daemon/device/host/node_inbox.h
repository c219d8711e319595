// SPDX-License-Identifier: Apache-2.0
// NodeInbox: messages from other nodes for one rank of a group. Those of operations that the rank has not come to yet
// wait here, a bounded number of them; those of operations that it is through with are let go. Loop thread of the rank.
#pragma once

#include <cstdint>
#include <vector>

#include "daemon/engine/ports.h"

namespace expertd::device {

class NodeInbox {
 public:
  explicit NodeInbox(uint32_t ranks);
  /// From now on next() gives the messages of operation `number`.
  void open(engine::FabricPort* fabric, uint32_t rank, uint64_t number);
  /// The next message of the operation, kept until release(); false: none is there.
  bool next(engine::Arrival* arrival);
  void release(const engine::Arrival& arrival) { fabric_->release(rank_, arrival); }

 private:
  bool next_waiting(engine::Arrival* arrival);

  engine::FabricPort* fabric_ = nullptr;
  uint32_t rank_ = 0;
  uint64_t number_ = 0;
  std::vector<engine::Arrival> waiting_;  // of later operations, or found to be of this one; never grows
  uint32_t most_waiting_;
  bool look_again_ = false;  // some of them may be of this operation
};

}  // namespace expertd::device
