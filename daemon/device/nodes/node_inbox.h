// SPDX-License-Identifier: Apache-2.0
// NodeInbox: messages from other nodes for one rank of a group. Counts of operations that the rank has not come to yet
// wait here as copies, a bounded number of them; no honest node sends anything else before it has this rank's counts.
// Messages of operations that the rank is through with are let go. A rank that has operations in several orders
// (capture lanes) has an inbox for each; whichever looks hands the others what is theirs. Loop thread of the rank.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "daemon/device/nodes/node_memory.h"
#include "daemon/engine/ports.h"

namespace expertd::device {

class NodeInbox {
 public:
  NodeInbox(uint32_t ranks, uint64_t counts_bytes);
  bool ok() const { return memory_.ok(); }
  /// This inbox and the others of the rank, by order(); all there as long as any is used.
  void share(std::vector<NodeInbox*> by_order, engine::FabricPort* fabric, uint32_t rank);
  /// Operations are numbered in orders of their own: 0 is that of the group's calls.
  static uint64_t in_order(uint32_t order, uint64_t number) { return uint64_t{order} << kOrderShift | number; }
  static uint32_t order(uint64_t number) { return static_cast<uint32_t>(number >> kOrderShift); }
  /// From now on next() gives the messages of operation `number`.
  void open(engine::FabricPort* fabric, uint32_t rank, uint64_t number);
  /// The next message of the operation, valid until release(), which comes before the next call; false: none is there.
  bool next(engine::Arrival* arrival);
  void release(const engine::Arrival& arrival);

 private:
  static constexpr uint32_t kOrderShift = 56;
  static constexpr size_t kMostHeld = 128;  // more than a rank has buffers to come in
  /// A message that another inbox of the rank found.
  void hand(const engine::Arrival& arrival);
  /// The oldest that was handed here; false: there is none.
  bool next_held(engine::Arrival* arrival);
  /// A copy of counts that came early, in the place of its index; op 0: the place is free.
  bool next_early(engine::Arrival* arrival);
  void keep_early(engine::Arrival arrival);

  engine::FabricPort* fabric_ = nullptr;
  uint32_t rank_ = 0;
  uint64_t number_ = 0;
  std::vector<engine::Arrival> early_;
  NodeMemory memory_;
  std::vector<NodeInbox*> by_order_;
  std::vector<engine::Arrival> held_;
  bool look_again_ = false;  // some of the copies may be of this operation
  bool is_copy_ = false;     // the message that next() gave
};

}  // namespace expertd::device
