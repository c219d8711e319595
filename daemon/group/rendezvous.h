// SPDX-License-Identifier: Apache-2.0
// Rendezvous: the embedded one, as the daemon that hosts it keeps it. Collects the ranks of groups over all nodes by
// name, holds them to the first one's configuration, places a complete group, and waits until every node has formed its
// part. Nodes hold their places by being seen. Pure: no gRPC, no thread, times are arguments; any thread calls it, and
// it calls back outside of its lock, exactly once per call.
//
// A name goes through: waiting (ranks missing) -> forming (placed, nodes' reports missing) -> formed -> gone, and back
// to waiting once a rank of the formed group is gone. All ranks of a name join together; a rank that joins into a
// running group under a mask would enter at formed, with the key kept and the epoch advanced.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "daemon/group/rendezvous_port.h"

namespace expertd::group {

struct RendezvousOptions {
  uint32_t max_nodes = kMaxNodes;
  uint32_t max_joins = 16384;  // waiting at once
  uint32_t max_groups = 4096;  // forming or formed
  uint64_t form_timeout_ns = 60'000'000'000;
  uint64_t node_timeout_ns = 15'000'000'000;  // a node not seen for so long is gone
};

/// Limits of what comes over the wire; names the first field out of range.
session::ErrorDetail check_identity(const NodeIdentity& node);
session::ErrorDetail check_join(const RankJoin& join);

/// One waiting call, for dropped(): which of several for the same rank ended.
using CallId = uint64_t;

class Rendezvous {
 public:
  /// `random` gives group keys; it must not repeat itself and is called under the lock.
  Rendezvous(const RendezvousOptions& options, std::function<uint64_t()> random);

  /// Refuses (done is called here), waits, or places the group. A repetition (same node, rank and attempt) takes the
  /// place of the earlier call, or is answered with the placement where there is one already.
  CallId join(const RankJoin& join, const NodeIdentity& node, uint64_t now_ns, PlacedCallback done);
  /// The call has nobody any more who waits for it: its rank is taken out, done is not called. Nothing for others.
  void dropped(CallId call);
  void withdraw(const std::string& group, uint32_t rank, uint64_t node_id, uint64_t attempt);
  void report_formed(const FormedReport& report, uint64_t node_id, uint64_t now_ns, FormedCallback done);
  /// The node tells of its own ranks or, having lost sight of them, of others'. Unknown keys and ranks are ignored: the
  /// group ended meanwhile, or this rendezvous began after it.
  void report_gone(uint64_t key, uint64_t node_id, const std::vector<uint32_t>& ranks);
  /// The node is there. NODE_LIMIT for one too many, NODE_REPLACED when a later daemon of its name was seen.
  session::ErrorDetail seen(const NodeIdentity& node, uint64_t now_ns);
  /// Ends what is past its deadline: joins, formations, nodes not seen.
  void expire(uint64_t now_ns);
  /// When expire() has something to do next; UINT64_MAX: nothing.
  uint64_t next_deadline_ns() const;
  /// Answers every waiting call with the error and forgets everything: this daemon does not host any more.
  void close(const base::Status& status);

  struct NodeSnapshot {
    std::string name;
    std::string address;
    uint64_t id = 0;
    uint64_t seen_ns = 0;
  };
  std::vector<NodeSnapshot> nodes() const;

 private:
  using Answers = std::vector<std::function<void()>>;
  struct Node {
    std::string name;
    std::string address;
    uint64_t seen_ns = 0;
  };
  struct Waiter {
    RankJoin join;
    NodeIdentity node;
    uint64_t deadline_ns = 0;
    CallId call = 0;
    PlacedCallback done;
  };
  struct Waiting {
    std::map<uint32_t, Waiter> ranks;  // never empty
    uint64_t epoch = 1;                // that the group will have
  };
  enum class Phase { kForming, kFormed, kFailed };
  struct Holder {
    uint64_t node_id = 0;
    uint64_t attempt = 0;
    bool gone = false;
  };
  struct Report {
    bool formed = false;  // the node reported that its part stands
    FormedCallback done;  // null: no call waits
  };
  struct Group {
    std::string name;
    Phase phase = Phase::kForming;
    uint64_t deadline_ns = 0;  // kForming: to be formed; kFailed: to be forgotten
    Placed placed;             // with all lanes while forming
    std::vector<Holder> holders;
    std::map<uint64_t, Report> reports;  // by node id, one for each node
    session::ErrorDetail failure;        // kFailed
  };

  session::ErrorDetail admit_node(const NodeIdentity& node, uint64_t now_ns, Answers* answers);
  session::ErrorDetail make_room(const RankJoin& join, const NodeIdentity& node, uint64_t* epoch, Answers* answers);
  session::ErrorDetail check_waiting(const RankJoin& join, const NodeIdentity& node, Answers* answers);
  const Group* placed_before(const RankJoin& join, const NodeIdentity& node) const;
  void place(const std::string& name, uint64_t now_ns, Answers* answers);
  void fail_group(Group* group, const session::ErrorDetail& failure, Answers* answers);
  void node_gone(uint64_t node_id, const std::string& why, Answers* answers);
  void expire_waiting(const std::string& name, Waiting* waiting, uint64_t now_ns, Answers* answers);
  void forget_gone();
  std::string name_of(uint64_t node_id) const;
  static std::shared_ptr<const Placed> placed_for(const Group& group, uint32_t rank, uint64_t left_ns);

  const RendezvousOptions options_;
  const std::function<uint64_t()> random_;
  mutable std::mutex mutex_;  // everything below
  CallId next_call_ = 1;
  std::map<uint64_t, Node> nodes_;  // by id
  std::vector<uint64_t> replaced_;  // ids that a later daemon of the same name took the place of, the oldest first
  std::map<std::string, Waiting> waiting_;
  std::map<CallId, std::pair<std::string, uint32_t>> calls_;  // of waiting_
  std::map<uint64_t, Group> groups_;                          // by key
};

}  // namespace expertd::group
