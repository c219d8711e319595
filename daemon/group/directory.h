// SPDX-License-Identifier: Apache-2.0
// Directory: the embedded rendezvous of one node. Collects the ranks of a group by name, holds every rank to the first
// one's configuration, and hands a complete group over for formation. Control threads call it; it takes a lock of its
// own and calls back outside of it. Times are arguments.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "daemon/engine/group_shared.h"
#include "daemon/group/rendezvous_port.h"
#include "daemon/session/api.h"

namespace expertd::group {

struct Member {
  std::string group;  // its name
  base::SessionId session;
  base::DeviceIndex device;
  uint32_t rank = 0;
  session::JoinCallback done;
  uint64_t deadline_ns = 0;
  bool copy_kernels = false;                                     // as in GroupConfig
  uint32_t copies = 0;                                           // as in GroupConfig
  uint64_t ticket = 0;                                           // the service's name for the join
  std::shared_ptr<const std::atomic<bool>> cancelled = nullptr;  // as in JoinRequest
  /// Not 0: waits for a placement over several nodes under this name of the join (RankJoin::attempt).
  uint64_t attempt = 0;
  std::shared_ptr<std::atomic<uint64_t>> attempt_now = nullptr;  // the same, where `done` sees it
  std::shared_ptr<const Placed> placed = nullptr;                // the placement, once it is known
  bool is_cancelled() const { return cancelled != nullptr && cancelled->load(std::memory_order_acquire); }
};

/// A join that did not become a group, and why.
struct EndedJoin {
  Member member;
  base::Status status;
};

/// A group whose ranks are all here, or whose ranks of this node are, in rank order, ready to be formed.
struct Formation {
  std::string name;
  session::GroupConfig config;
  std::shared_ptr<engine::GroupShared> shared;
  std::vector<Member> members;           // of this node; those that go over from the predecessor have no `done`
  std::shared_ptr<const Placed> placed;  // null: nobody but this node knows of it
  std::shared_ptr<engine::GroupShared> predecessor;  // that runs and has ranks of this node; null: there is none
};

struct Defaults {
  uint64_t op_timeout_ns = 0;
  uint64_t first_op_timeout_ns = 0;
};

/// The sizes of a checked configuration; who the ranks are and where is left open.
engine::GroupShape shape_of(const session::GroupConfig& config);
/// Limits of semantics.md; names the first field out of range.
session::ErrorDetail check_config(const session::GroupConfig& config, uint32_t rank);
/// Field by field; an empty field when equal.
session::ErrorDetail compare_configs(const session::GroupConfig& first, const session::GroupConfig& other);

class Directory {
 public:
  explicit Directory(const Defaults& defaults) : defaults_(defaults) {}

  /// Adds a rank. An error is returned here (done is not called); otherwise `formation` is filled when the group became
  /// complete, and empty while ranks are missing. A rank that asks again replaces its own earlier request, and places
  /// of cancelled joins are free.
  session::ErrorDetail join(const session::JoinRequest& request, Member member, std::unique_ptr<Formation>* formation);
  /// The rank that joined with `attempt` was placed by a rendezvous; `formation` is filled when all ranks of this node
  /// have been. A rank that does not wait any more is ignored: its withdrawal makes the group fail to form.
  void placed(const std::string& name, uint32_t rank, uint64_t attempt, uint64_t node_id,
              const std::shared_ptr<const Placed>& placed, std::unique_ptr<Formation>* formation);
  /// A successor of the group with the key was placed for this node's ranks of it. `formation` is filled when all ranks
  /// that come back to this node have been placed as well. PEER_LOST: a rank that was to go over is gone.
  session::ErrorDetail succeed(const std::shared_ptr<const Placed>& placed, uint64_t node_id,
                               std::unique_ptr<Formation>* formation);
  /// Groups of this node alone whose lost ranks wait to come back, ready to be formed beside the running ones.
  [[nodiscard]] std::vector<std::unique_ptr<Formation>> rejoins();
  /// The rendezvous refused the rank that joined with `attempt`: takes it out. Empty when it does not wait any more.
  [[nodiscard]] std::vector<Member> take(const std::string& name, uint32_t rank, uint64_t attempt);
  /// The groups, formed here, that have ranks on another node, with their placements.
  std::vector<std::pair<std::shared_ptr<engine::GroupShared>, std::shared_ptr<const Placed>>> spanning() const;
  /// A session ended: its formed ranks are marked lost; its pending joins are dropped and returned to be answered.
  [[nodiscard]] std::vector<Member> session_ended(base::SessionId session);
  void left(base::GroupId group, uint32_t rank);
  /// Takes out the joins that were cancelled or whose deadline passed; the caller answers them.
  [[nodiscard]] std::vector<EndedJoin> expire(uint64_t now_ns);
  /// What executes the operations of a group that is being formed, for snapshots.
  void describe(base::GroupId group, const std::string& executor);
  std::vector<session::GroupSnapshot> snapshot() const;

 private:
  struct Pending {
    session::GroupConfig config;
    std::map<uint32_t, Member> members;
  };
  struct Formed {
    std::string name;
    session::GroupConfig config;
    std::weak_ptr<engine::GroupShared> shared;
    base::RankSet present;  // ranks of this node that neither left nor ended
    std::shared_ptr<const Placed> placed;
    std::string executor;
  };
  using Groups = std::map<uint64_t, Formed>;  // by id
  /// The group of the name that takes ranks back, on this node alone; null: there is none.
  const Formed* running(const std::string& name) const;
  bool may_rejoin(const Formed& group, const Pending& pending) const;
  bool add_carried(const Formed& group, uint32_t rank, const std::string& name, Pending* pending) const;
  session::ErrorDetail complete(const std::string& name, const std::shared_ptr<const Placed>& placed, uint64_t node_id,
                                std::unique_ptr<Formation>* formation);
  session::ErrorDetail check_place(const session::JoinRequest& request, const Member& member, const Pending* pending);
  std::unique_ptr<Formation> form(const std::string& name, Pending&& pending,
                                  std::shared_ptr<const engine::Placement> placement = nullptr,
                                  std::shared_ptr<const Placed> placed = nullptr, const Formed* predecessor = nullptr);
  static void take_cancelled(std::map<uint32_t, Member>* members, std::vector<EndedJoin>* ended);
  session::ErrorDetail place(const session::JoinRequest& request, Member&& member,
                             std::unique_ptr<Formation>* formation, std::vector<EndedJoin>* ended);

  Defaults defaults_;
  mutable std::mutex mutex_;
  uint64_t next_group_ = 1;
  std::map<std::string, Pending> pending_;
  Groups formed_;
  std::map<uint64_t, std::shared_ptr<const Placed>> successors_;  // placed for ranks that are here, by predecessor
  std::map<uint64_t, std::vector<std::pair<uint64_t, uint32_t>>> by_session_;  // session -> (group, rank)
};

}  // namespace expertd::group
