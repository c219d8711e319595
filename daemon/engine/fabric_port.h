// SPDX-License-Identifier: Apache-2.0
// How the parts of a group on this node exchange with its parts on other nodes: who sits where, messages, and the port
// that carries them. Pure: UCX lives behind it (daemon/fabric). A message belongs to one operation of one group and
// goes from a rank to one or more ranks of one other node, whole or not at all; between two nodes the messages of a
// lane arrive in any order. Loops never block on it: what does not fit now is tried again with the next turn.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "daemon/base/ids.h"
#include "daemon/base/limits.h"
#include "daemon/engine/view_message.h"

namespace expertd::engine {

/// Where the ranks of a group sit. Nodes are numbered 0..nodes-1 in the order of their lowest rank, ranks of a node by
/// their own order; both are the same on every node. Immutable once the group is formed.
struct Placement {
  uint32_t own_node = 0;
  std::vector<std::vector<uint32_t>> ranks_of;  // per node, ascending
  std::vector<uint32_t> node_of;                // per rank
  std::vector<uint32_t> index_of;               // per rank: its place among those of its node

  uint32_t nodes() const { return static_cast<uint32_t>(ranks_of.size()); }
  uint32_t ranks() const { return static_cast<uint32_t>(node_of.size()); }
  uint32_t ranks_on(uint32_t node) const { return static_cast<uint32_t>(ranks_of[node].size()); }
  bool is_local(uint32_t rank) const { return node_of[rank] == own_node; }
  /// The local rank that does what concerns `rank` of another node as a whole: takes its counts, serves its pulls.
  uint32_t server_of(uint32_t rank) const {
    const std::vector<uint32_t>& own = ranks_of[own_node];
    return own[index_of[rank] % own.size()];
  }
};

/// What a message holds; layouts in daemon/kernels/host/node_ops.h.
enum class MessageKind : uint32_t {
  kCounts = 1,  // of every rank to every other node, once per operation: what it agreed to, its counts, its error
  kRows = 2,    // dispatch: rows of tokens, each once for the node
  kPulls = 3,   // combine: which rows of the node a token wants summed
  kSums = 4,    // combine: a node's partial sums, back to the rank that pulled
};

/// Which of the daemon's lanes carries it: what somebody waits for token by token goes ahead of what moves many rows.
enum class FabricLane : uint32_t { kLatency = 0, kThroughput = 1 };
inline constexpr uint32_t kFabricLanes = 2;

/// A message of rows, pulls or sums begins with a head of so many bytes, and entries follow.
inline constexpr uint32_t kMessageHeadBytes = 16;

struct MessageHeader {
  MessageKind kind = MessageKind::kCounts;
  FabricLane lane = FabricLane::kThroughput;
  uint64_t op = 0;           // operation number of the group, from 1
  uint32_t source_rank = 0;  // of the sender's node
  uint32_t node = 0;         // sent: where it goes; arrived: where it comes from
  uint64_t targets = 0;      // bit per place (Placement::index_of) at the destination: who gets it, at least one
  uint32_t entries = 0;      // how many entries the bytes hold
  uint32_t sequence = 0;     // the sender's counter within (op, source_rank, kind, node), from 0
  uint32_t view = 0;         // epoch of the membership that the sender has the operation in
};

/// Memory that a rank fills and sends. Valid from take() until send() or drop().
struct SendBuffer {
  std::byte* data = nullptr;                  // null: none is free
  uint64_t capacity = 0;                      // bytes
  FabricLane lane = FabricLane::kThroughput;  // that it goes by, which need not be the one asked for
  uint32_t id = 0;
  std::byte* entries = nullptr;  // not null: memory of a GPU, for entries in place of behind the head
};

/// A message that arrived for one local rank; several ranks of the node may be looking at the same bytes.
struct Arrival {
  MessageHeader header;
  const std::byte* data = nullptr;
  const std::byte* entries = nullptr;  // not null: memory of a GPU, where they lie in place of behind the head
  uint64_t bytes = 0;
  uint64_t arrived_ns = 0;  // base::now_ns clock: when it was whole, however late the rank looks
  uint32_t id = 0;          // for release()
};

/// The fabric as one group on this node sees it. Each function is called by the loop thread of `rank`, a local rank.
class FabricPort {
 public:
  virtual ~FabricPort() = default;
  /// Bytes that every message of the group may have: the capacity of each SendBuffer.
  virtual uint64_t message_bytes() const = 0;
  /// Whether entries lie in memory of a GPU.
  virtual bool has_gpu_memory() const { return false; }
  /// A buffer for a message to `node`; data is null while all of the rank's buffers for the lane are under way.
  virtual SendBuffer take(uint32_t rank, FabricLane lane) = 0;
  /// Sends the first `bytes` bytes. Never fails towards the caller: a node that is gone is told as a lost node.
  virtual void send(uint32_t rank, const SendBuffer& buffer, const MessageHeader& header, uint64_t bytes) = 0;
  /// Gives back a buffer that was not needed.
  virtual void drop(uint32_t rank, const SendBuffer& buffer) = 0;
  /// Takes the oldest message that arrived for the rank; false when there is none. The rank keeps it until release().
  virtual bool receive(uint32_t rank, Arrival* arrival) = 0;
  virtual void release(uint32_t rank, const Arrival& arrival) = 0;
  /// Tells the other nodes that a rank of this one takes no part any more: in operations behind `through`, all messages
  /// of which it has sent. This function and those below are not the loop thread's of a rank: any thread but a loop's.
  virtual void tell_gone(uint32_t /*rank*/, uint64_t /*through*/) {}
  /// No loop calls for the rank any more, which is gone: what arrived for it, and still does, holds no buffer.
  virtual void forget(uint32_t /*rank*/) {}
  /// Sends a message about views to another node; it may get lost when many wait. Any thread but a loop's.
  virtual void tell_view(uint32_t /*node*/, const ViewMessage& /*message*/) {}
};

}  // namespace expertd::engine
