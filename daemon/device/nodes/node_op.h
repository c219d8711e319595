// SPDX-License-Identifier: Apache-2.0
// NodeOp: what the classes that exchange with other nodes know of a rank's operation while it runs. Loop threads.
#pragma once

#include <bit>
#include <cstdint>

#include "daemon/engine/ports.h"
#include "daemon/kernels/host/node_ops.h"
#include "daemon/kernels/node_message.h"
#include "daemon/kernels/op_params.h"

namespace expertd::device {

static_assert(sizeof(kernels::MessageHead) == engine::kMessageHeadBytes);

/// Where the entries of a message go, or lie: behind its head, or in memory of a GPU.
inline std::byte* message_entries(const engine::SendBuffer& buffer) {
  return buffer.entries != nullptr ? buffer.entries : buffer.data + engine::kMessageHeadBytes;
}
inline const std::byte* message_entries(const engine::Arrival& arrival) {
  return arrival.entries != nullptr ? arrival.entries : arrival.data + engine::kMessageHeadBytes;
}

struct NodeOp {
  engine::FabricPort* fabric = nullptr;
  const engine::Placement* placement = nullptr;
  kernels::host::NodeView nodes;
  uint64_t number = 0;
  uint32_t rank = 0;
  base::RankSet active;
  uint32_t view = 0;  // epoch of the membership that `active` is of
  engine::FabricLane lane = engine::FabricLane::kThroughput;
  uint64_t message_bytes = 0;
  const kernels::OpParams* params = nullptr;  // of the own rank
  const kernels::PeerView* peers = nullptr;   // of all ranks; those elsewhere have no memory here

  bool takes_part(uint32_t other) const { return other < placement->ranks() && active.contains(other); }
  bool is_elsewhere(uint32_t other) const { return takes_part(other) && !placement->is_local(other); }
  uint32_t node_ranks(uint32_t node) const { return placement->ranks_on(node); }
  /// How many ranks of a node take part.
  uint32_t active_on(uint32_t node) const {
    uint32_t count = 0;
    for (const uint32_t other : placement->ranks_of[node]) {
      count += takes_part(other) ? 1 : 0;
    }
    return count;
  }
  /// Another node with which there is something to exchange.
  bool exchanges_with(uint32_t node) const { return node != placement->own_node && active_on(node) != 0; }
  /// The rank of `node` that does there what concerns `other`, of another node, as a whole: Placement::server_of, but
  /// among the ranks that take part. All nodes reckon it alike.
  uint32_t server_at(uint32_t node, uint32_t other) const {
    uint32_t left = placement->index_of[other] % active_on(node);
    for (const uint32_t candidate : placement->ranks_of[node]) {
      if (takes_part(candidate) && left-- == 0) {
        return candidate;
      }
    }
    return placement->ranks_of[node].front();
  }
  bool serves(uint32_t other) const { return is_elsewhere(other) && server_at(placement->own_node, other) == rank; }
  uint64_t place_bit(uint32_t other) const { return uint64_t{1} << placement->index_of[other]; }
};

}  // namespace expertd::device
