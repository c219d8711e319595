// SPDX-License-Identifier: Apache-2.0
// NodeServer: sums rows of this node for ranks of other nodes that combine. Copies of their pulls wait here, at most
// kWindows per rank from an honest one, until there is a buffer for the sums. Loop thread of the serving rank; nothing
// allocates.
#pragma once

#include <cstdint>
#include <vector>

#include "daemon/device/host/node_pulls.h"
#include "daemon/device/nodes/node_memory.h"
#include "daemon/device/nodes/node_outbox.h"

namespace expertd::device {

class NodeServer {
 public:
  explicit NodeServer(uint32_t ranks);
  void open(const NodeOp* op, NodeOutbox* outbox);
  bool ok() const { return memory_.ok(); }
  /// Keeps no buffer any more.
  void close();

  /// Pulls that arrived, of which a copy is kept. False: no honest rank sends them.
  bool take(const engine::Arrival& arrival, const kernels::MessageHead& head);
  /// Sums up to `entries` entries. False: nothing moved. A rank whose pulls were bad is left in `bad`.
  bool advance(uint32_t entries, int32_t* bad);
  /// Nothing more of the rank is served.
  void give_up(uint32_t source);
  /// Everything that ranks of other nodes pull from this one has been sent.
  bool finished() const;
  /// Ranks that have not pulled all.
  base::RankSet missing() const;

 private:
  bool awaits(uint32_t rank) const;
  static constexpr uint32_t kPullsPerRank = kWindows;
  struct Source {
    uint32_t waiting = 0;  // messages
    uint32_t taken = 0;
    uint32_t served = 0;
    uint32_t messages = 0;  // in all; 0: not known yet
    bool given_up = false;
  };
  void end_front();

  const NodeOp* op_ = nullptr;
  NodeOutbox* outbox_ = nullptr;
  std::vector<Source> sources_;           // per rank
  std::vector<engine::Arrival> waiting_;  // a ring
  NodeMemory memory_;                     // places of a rank's pulls, used in turn
  uint32_t first_ = 0;
  uint32_t count_ = 0;
  engine::SendBuffer sums_;  // of the front
  uint32_t done_ = 0;        // entries of it
};

}  // namespace expertd::device
