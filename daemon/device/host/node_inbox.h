// SPDX-License-Identifier: Apache-2.0
// NodeInbox: messages from other nodes for one rank of a group. Counts of operations that the rank has not come to yet
// wait here as copies, a bounded number of them; no honest node sends anything else before it has this rank's counts.
// Messages of operations that the rank is through with are let go. Loop thread of the rank.
#pragma once

#include <cstdint>
#include <vector>

#include "daemon/device/host/node_memory.h"
#include "daemon/engine/ports.h"

namespace expertd::device {

class NodeInbox {
 public:
  NodeInbox(uint32_t ranks, uint64_t counts_bytes);
  bool ok() const { return memory_.ok(); }
  /// From now on next() gives the messages of operation `number`.
  void open(engine::FabricPort* fabric, uint32_t rank, uint64_t number);
  /// The next message of the operation, valid until release(), which comes before the next call; false: none is there.
  bool next(engine::Arrival* arrival);
  void release(const engine::Arrival& arrival);

 private:
  /// A copy of counts that came early, in the place of its index; op 0: the place is free.
  bool next_early(engine::Arrival* arrival);
  void keep_early(engine::Arrival arrival);

  engine::FabricPort* fabric_ = nullptr;
  uint32_t rank_ = 0;
  uint64_t number_ = 0;
  std::vector<engine::Arrival> early_;
  NodeMemory memory_;
  bool look_again_ = false;  // some of the copies may be of this operation
  bool is_copy_ = false;     // the message that next() gave
};

}  // namespace expertd::device
