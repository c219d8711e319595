// SPDX-License-Identifier: Apache-2.0
// Rendezvous: the embedded one, as the daemon that hosts it keeps it. Collects the ranks of groups over all nodes by
// name, holds them to the first one's configuration, places a complete group, and waits until every node has formed its
// part. Nodes hold their places by being seen. Pure: no gRPC, no thread, times are arguments; any thread calls it, and
// it calls back outside of its lock, exactly once per call.
//
// A name goes through: waiting (ranks missing) -> forming (placed, nodes' reports missing) -> formed -> gone, and back
// to waiting once a rank of the formed group is gone. All ranks of a name join together, but for those of a running
// group under a mask: when all that wait are ranks that it has lost, and every node with ranks that are left awaits its
// successor, that is placed: the same ranks under a new key and the next epoch, which goes the same way. The group goes
// on beside it until its nodes have agreed to move over. By what they say when they await, a rendezvous that began
// later knows the group as well (rendezvous_successor.cc).
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
  uint64_t collect_ns = 250'000'000;          // ranks that come back wait so long for others that are lost as well
};

/// Limits of what comes over the wire; names the first field out of range.
session::ErrorDetail check_identity(const NodeIdentity& node);
session::ErrorDetail check_join(const RankJoin& join);
session::ErrorDetail check_kept(const KeptGroup& group);

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
  CallId await_successor(const KeptGroup& group, const NodeIdentity& node, uint64_t now_ns, PlacedCallback done);
  void report_formed(const FormedReport& report, uint64_t node_id, uint64_t now_ns, FormedCallback done);
  /// The node tells of its own ranks or, having lost sight of them, of others'. Unknown keys and ranks are ignored: the
  /// group ended meanwhile, or this rendezvous began after it.
  void report_gone(uint64_t key, uint64_t node_id, const std::vector<uint32_t>& ranks, uint64_t now_ns);
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
    std::vector<LaneAddress> lanes;
  };
  struct Waiter {
    RankJoin join;
    NodeIdentity node;
    uint64_t deadline_ns = 0;
    CallId call = 0;
    PlacedCallback done;
    uint64_t since_ns = 0;
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
  struct Await {
    CallId call = 0;
    PlacedCallback done;
  };
  struct Group {
    std::string name;
    session::GroupConfig config;
    Phase phase = Phase::kForming;
    uint64_t deadline_ns = 0;  // kForming: to be formed; kFailed: to be forgotten
    Placed placed;             // with all lanes while forming
    std::vector<Holder> holders;
    std::map<uint64_t, Report> reports;  // by node id, one for each node
    session::ErrorDetail failure;        // kFailed
    std::map<uint64_t, Await> awaits;    // kFormed, by node id
    bool followed = false;               // its successor was formed
  };

  session::ErrorDetail admit_node(const NodeIdentity& node, uint64_t now_ns, Answers* answers);
  session::ErrorDetail make_room(const RankJoin& join, const NodeIdentity& node, uint64_t* epoch, Answers* answers);
  session::ErrorDetail check_waiting(const RankJoin& join, const NodeIdentity& node, Answers* answers);
  const Group* placed_before(const RankJoin& join, const NodeIdentity& node) const;
  void place(const std::string& name, uint64_t now_ns, Answers* answers);
  void fail_group(Group* group, const session::ErrorDetail& failure, Answers* answers);
  void node_gone(uint64_t node_id, const std::string& why, Answers* answers);
  void expire_waiting(const std::string& name, Waiting* waiting, uint64_t now_ns, Answers* answers);
  void forget_gone(Answers* answers);
  Group* adopt(const KeptGroup& kept, session::ErrorDetail* error);
  Group* running(const std::string& name);
  const Group* running(const std::string& name) const;
  const Group* successor_of(uint64_t key) const;
  static bool takes_back(const Group& group);
  std::string what_is_missing(const Group& group, const Waiting& waiting) const;
  uint64_t collected_ns(const Group& group, const Waiting& waiting) const;
  void rejoin(const std::string& name, uint64_t now_ns, Answers* answers);
  void place_successor(Group* before, uint64_t now_ns, Answers* answers);
  void fail_successor_without(const Group& group, const std::vector<uint32_t>& ranks, Answers* answers);
  uint64_t new_key();
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
  std::map<CallId, std::pair<uint64_t, uint64_t>> awaits_;    // group key and node
  std::map<uint64_t, Group> groups_;                          // by key
};

}  // namespace expertd::group
