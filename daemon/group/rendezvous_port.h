// SPDX-License-Identifier: Apache-2.0
// How this node finds the other nodes of a group: what it asks of a rendezvous, whoever provides one (the embedded one
// of daemon/fabric/bootstrap, or a store of the cluster). Any thread calls it; nothing blocks; every callback comes
// exactly once, from a thread of the provider, and must not block either.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "daemon/base/limits.h"
#include "daemon/engine/fabric_port.h"
#include "daemon/session/api.h"

namespace expertd::group {

inline constexpr uint32_t kMaxNodes = base::kMaxNodes;       // of a rendezvous; fabric.max_nodes is at most this
inline constexpr uint32_t kMaxGroupRanks = base::kMaxRanks;  // of a group over all nodes
inline constexpr uint32_t kMaxLanes = 24;                    // of a node, with rails
inline constexpr size_t kMaxLaneBytes = 4096;                // address of one lane
inline constexpr size_t kMaxLanesBytes = 16384;              // addresses of a node
inline constexpr size_t kMaxNameBytes = 64;                  // of groups and nodes, printable ASCII
inline constexpr size_t kMaxAddressBytes = 300;              // "host:port"
inline constexpr uint64_t kMaxJoinNs = 3'600'000'000'000;

struct LaneAddress {
  uint32_t lane = 0;
  std::string bytes;  // of the lane's UCX worker, opaque here
  friend bool operator==(const LaneAddress&, const LaneAddress&) = default;
};

struct NodeIdentity {
  uint64_t id = 0;      // random, anew at each start of the daemon, never 0
  std::string name;     // fabric.node_name
  std::string address;  // "host:port" of its peer services
  std::vector<LaneAddress> lanes;
  friend bool operator==(const NodeIdentity&, const NodeIdentity&) = default;
};

/// What a rank and its device can, beside the copy_kernels and copies of its GroupConfig.
struct RankFacts {
  bool cuda = false;
  bool mps_active = false;
  bool bulk_kernels = false;
  friend bool operator==(const RankFacts&, const RankFacts&) = default;
};

struct RankJoin {
  std::string group;
  uint32_t rank = 0;
  session::GroupConfig config;
  RankFacts facts;
  uint64_t attempt = 0;     // random, never 0; a repetition of the same join has the same
  uint64_t timeout_ns = 0;  // 1..kMaxJoinNs
};

struct PlacedRank {
  uint32_t node = 0;  // index into Placed::nodes
  RankFacts facts;
  bool copy_kernels = false;
  uint32_t copies = 0;
};

/// A complete group: who sits where, the same for every rank but for the lanes.
struct Placed {
  uint64_t key = 0;                 // random; the fabric's messages of the group carry it
  uint64_t epoch = 0;               // from 1, more than that of the group that had the name before
  std::vector<NodeIdentity> nodes;  // in the order of their lowest ranks; lanes for the lowest rank of a node alone
  std::vector<PlacedRank> ranks;    // by rank
  uint64_t form_timeout_ns = 0;     // within which every node must report it formed
  /// Of a group that follows a running one: the key of that one, which ranks join it anew, and which ones nobody has,
  /// so that it begins without them. Lanes are there for every rank.
  uint64_t predecessor = 0;
  std::vector<uint32_t> returning;
  std::vector<uint32_t> lost;
};

/// A formed group that takes lost ranks back, as its nodes tell of it: enough for a rendezvous that began after it.
struct KeptGroup {
  std::string name;
  session::GroupConfig config;
  Placed placed;  // without lanes
  std::vector<uint32_t> gone;
};

/// The engine's view of it from the node `node_id`, which must be one of the nodes.
engine::Placement placement_of(const Placed& placed, uint64_t node_id);

struct FormedReport {
  uint64_t key = 0;
  base::Status status;  // of this node's part of the group
  int32_t rank = -1;    // that failed; -1: the whole node
};

/// `placed` is null with an error. `error.rank` is the rank the error is about.
using PlacedCallback = std::function<void(const session::ErrorDetail& error, const std::shared_ptr<const Placed>&)>;
/// Ok when all nodes reported that their parts stand; else the first failure, which names node and rank.
using FormedCallback = std::function<void(const session::ErrorDetail& error)>;

class RendezvousPort {
 public:
  virtual ~RendezvousPort() = default;
  /// Waits for the other ranks, at most timeout_ns. Refusals: CONFIG_MISMATCH with field and both values,
  /// DUPLICATE_RANK with the holder's node, NODE_LIMIT, JOIN_TIMEOUT with the missing ranks, RENDEZVOUS_UNAVAILABLE
  /// with the cause, CLUSTER_KEY, PROTOCOL_VERSION.
  virtual void join_rank(const RankJoin& join, PlacedCallback done) = 0;
  /// Takes a join of this node back: it ends with CANCELLED. One that was placed already makes its group fail to form,
  /// one of a formed group counts as gone.
  virtual void withdraw(const std::string& group, uint32_t rank, uint64_t attempt) = 0;
  /// This node has ranks in the group, which runs; waits until lost ranks of it have joined anew, and a successor is
  /// placed whose part this node is to form as for a join. A later call for the same group takes the earlier one's
  /// place, which ends with CANCELLED. NO_SUCH_GROUP: the group is not to be waited for any more; UNSUPPORTED: the
  /// rendezvous is of a release that takes no ranks back. Other ends: to be called again.
  virtual void await_successor(const KeptGroup& group, PlacedCallback done) = 0;
  /// To be called once per node for every placed group; waits for the other nodes' reports.
  virtual void report_formed(const FormedReport& report, FormedCallback done) = 0;
  /// Ranks of a formed group left or were lost. Repeated in the background while the rendezvous is away.
  virtual void report_gone(uint64_t key, const std::vector<uint32_t>& ranks) = 0;
};

}  // namespace expertd::group
