// SPDX-License-Identifier: Apache-2.0
// SessionService: every session of the daemon, from attach to reclaim: memory, groups, quotas, state. Control threads
// and the attach listener call it; on a device loop run only the short tasks that change a session's tables and the
// callback that tells of its last operation. The housekeeper thread sets complete groups up, ends joins, and reclaims a
// session that ended when the engines reported that nothing in flight can touch its memory (daemon/README.md, "Who owns
// memory").
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "daemon/base/fd.h"
#include "daemon/device/device.h"
#include "daemon/group/directory.h"
#include "daemon/session/api.h"
#include "daemon/session/attach_api.h"
#include "daemon/session/descriptor_closer.h"
#include "daemon/session/executor_choice.h"
#include "daemon/session/group_fabric.h"
#include "daemon/session/group_views.h"
#include "daemon/session/last_word.h"
#include "daemon/session/loop_port.h"

namespace expertd::session {

struct ServiceOptions {
  uint64_t generation = 0;
  uint32_t max_sessions = 64;
  uint32_t max_sessions_per_uid = 64;
  uint32_t max_buffers = 256;
  uint32_t max_groups = 8;
  uint64_t max_window_bytes = 0;      // per session; 0 = no limit
  uint64_t max_registered_bytes = 0;  // per session; 0 = no limit
  uint32_t ring_slots = 64;
  uint32_t handles_per_session = 512;
  uint64_t op_timeout_ns = 0;
  uint64_t first_op_timeout_ns = 0;
};

/// For metrics and the log; any thread but a loop's.
class SessionObserver {
 public:
  virtual ~SessionObserver() = default;
  virtual void opened(const SessionSnapshot& session) = 0;
  virtual void ended(base::SessionId session, const std::string& cause) = 0;
  virtual void reclaimed(base::SessionId session, uint64_t duration_ns) = 0;
};

struct DeviceEntry {
  device::Device* device = nullptr;
  LoopPort* loop = nullptr;
};

class SessionService final : public SessionApi, public AttachApi {
 public:
  SessionService(const ServiceOptions& options, std::vector<DeviceEntry> devices, SessionObserver* observer);
  ~SessionService() override;
  SessionService(const SessionService&) = delete;
  SessionService& operator=(const SessionService&) = delete;

  /// Groups are formed with other nodes from now on: both outlive the service. Before start().
  void use_nodes(group::RendezvousPort* rendezvous, GroupFabric* fabric);
  /// A rank of a group over several nodes takes no part in operations behind `through`; or a whole node is lost. Any
  /// thread but a loop's.
  void remote_rank_gone(uint64_t group_key, uint32_t rank, uint64_t through);
  void node_lost(uint64_t node_id);
  /// A message about views of a group, of its node `node`. Any thread but a loop's.
  void view_message(uint64_t group_key, uint32_t node, const engine::ViewMessage& message) {
    views_.receive(group_key, node, message);
  }
  /// Advances what the nodes of groups agree on; when to be called next, UINT64_MAX: after views_changed().
  uint64_t tend_views(uint64_t now_ns) { return views_.tend(now_ns); }

  base::Status start();
  /// Ends every session and waits until all are reclaimed, at most until deadline_ns.
  void stop(uint64_t deadline_ns);
  /// Refuses new sessions from now on and raises the draining flag in every ring.
  uint32_t begin_drain();
  uint32_t outstanding_operations();
  /// Tells every session, and those to come, why the process ends. Any thread, and it waits for none: neither for a
  /// loop nor for anything that holds a lock over a call of a device.
  void say_last_word(base::Reason reason) { last_word_.say(reason); }

  base::Result<AttachGrant> attach(const AttachRequest& request) override;
  void session_ended(base::SessionId session, const std::string& cause) override;
  base::Result<uint64_t> put_fd(base::SessionId session, base::ScopedFd fd) override;
  base::Result<TakenFd> take_fd(base::SessionId session, uint64_t token) override;
  void discard_fd(base::ScopedFd fd) override { closer_.close(std::move(fd)); }
  bool discards_full() const override { return closer_.full(); }

  base::Status open_session(base::SessionId session, const std::string& client_id,
                            const std::string& traceparent) override;
  base::Result<BufferGrant> register_ipc(base::SessionId session, const std::string& handle, uint64_t offset,
                                         uint64_t size) override;
  base::Result<BufferGrant> register_fd(base::SessionId session, uint64_t token, uint64_t offset, uint64_t size,
                                        uint64_t allocation_size) override;
  base::Status unregister(base::SessionId session, uint32_t buffer_id, uint64_t deadline_ns) override;
  base::Result<BufferGrant> create_window(base::SessionId session, uint64_t size) override;
  void join_group(base::SessionId session, const JoinRequest& request, JoinCallback done) override;
  base::Status leave_group(base::SessionId session, base::GroupId group, uint64_t deadline_ns) override;
  base::Result<MaskReply> group_mask(base::SessionId session, base::GroupId group, const base::RankSet& exclude,
                                     const base::RankSet& readmit) override;
  base::Result<GroupPlan> plan_group(base::SessionId session, const GroupConfig& config) override;

  std::vector<SessionSnapshot> sessions();
  std::vector<GroupSnapshot> groups() const { return directory_.snapshot(); }
  std::vector<DeviceSnapshot> devices();

 private:
  struct Session;
  using SessionRef = std::shared_ptr<Session>;

  base::Result<SessionRef> find(base::SessionId session);
  base::Result<SessionRef> create_session(const AttachRequest& request, size_t device);
  base::Status check_quota(const AttachRequest& request);
  base::Result<uint64_t> keep_fd(base::SessionId session, base::ScopedFd* fd);
  /// A window comes with its descriptor and with the bytes that were reserved for it, which end here in any case.
  base::Result<BufferGrant> install(const SessionRef& session, std::unique_ptr<device::HeldMemory> memory,
                                    base::ScopedFd fd, uint64_t reserved);
  base::Status check_registered(const Session& session, uint64_t bytes) const;
  base::Status reserve_window(Session& session, uint64_t size);
  static std::unique_ptr<device::HeldMemory> take_buffer(Session& session, uint32_t buffer_id);
  base::Status remove_buffer(const SessionRef& session, uint32_t buffer_id, uint64_t deadline_ns);
  base::Status take_ticket(Session& session, uint64_t* ticket);
  void answer_ended_joins();
  void drop_joins(base::SessionId session);
  bool needs_relay(const group::Formation& formation) const;
  void form_group(std::unique_ptr<group::Formation> formation);
  /// What was set up of a formation, until all its members were answered.
  struct Formed {
    std::unique_ptr<group::Formation> formation;
    std::vector<JoinGrant> grants;
    ErrorDetail error;
  };
  void answer_formation(Formed formed);
  // service_nodes.cc: groups over several nodes.
  struct Placement {
    std::string name;
    uint32_t rank = 0;
    uint64_t attempt = 0;
    std::shared_ptr<const group::Placed> placed;
  };
  static uint64_t random_attempt();
  static uint64_t join_timeout_ns(const JoinRequest& request);
  void ask_rendezvous(const JoinRequest& request, uint64_t attempt, const device::DeviceInfo& info);
  void join_placed(const std::string& name, uint32_t rank, uint64_t attempt, const ErrorDetail& error,
                   const std::shared_ptr<const group::Placed>& placed);
  void place(const Placement& placement);
  void refuse_placed(const Placement& placement);
  void answer_rest();
  ErrorDetail open_fabric(const group::Formation& formation);
  base::Status open_port(const group::Formation& formation);
  void report_formed(Formed formed);
  GroupConfig with_defaults(GroupConfig config) const;
  // service_rejoin.cc: ranks that come back to running groups.
  struct Leaving {
    base::GroupId id;
    std::shared_ptr<engine::GroupShared> group;
    uint32_t rank = 0;
  };
  /// A group that is to go over to its successor, or has, with ranks of this node that are still in both.
  struct GoingOver {
    std::string name;
    std::shared_ptr<engine::GroupShared> from;
    std::shared_ptr<engine::GroupShared> to;
    std::vector<std::pair<base::SessionId, uint32_t>> ranks;
    bool begun = false;           // those that come back have submitted something, and the group may go over
    uint64_t apart_since_ns = 0;  // a rank left the successor alone; 0: none did
  };
  struct Kept {
    group::KeptGroup group;
    base::RankSet local_ranks;
    uint64_t successor = 0;  // the key of the one that was placed last, so that it is formed once
    uint64_t again_ns = 0;   // when to await anew; 0: it is awaited, or not to be
  };
  static std::vector<Leaving> parts_of(Session& session, base::GroupId named);
  void begin_leaving(const Leaving& part);
  static base::Status add_coming(Session& session, const group::Formation& formation, uint32_t rank);
  void drop_coming(base::SessionId id, base::GroupId group);
  bool join_again(const group::Formation& formation, const group::Member& member, const ErrorDetail& error);
  void after_formation(const group::Formation& formation, const ErrorDetail& error);
  void keep(const group::Formation& formation);
  void await_successor(uint64_t key);
  void successor_answered(uint64_t key, const ErrorDetail& error, const std::shared_ptr<const group::Placed>& placed);
  void await_later(uint64_t key);
  void place_successor(const std::shared_ptr<const group::Placed>& placed);
  void note_gone(uint64_t key, const std::vector<uint32_t>& ranks);
  bool tend_rejoins(uint64_t now_ns);
  bool tend_going_over(GoingOver* going, uint64_t now_ns);
  bool have_returned(const engine::GroupShared& group);
  void begin_going_over(GoingOver* going);
  bool stay(const GoingOver& going, const std::string& cause);
  bool finish_going_over(const GoingOver& going, base::SessionId id, uint32_t rank);
  void await_again(uint64_t now_ns);
  void tell_gone(const engine::GroupShared& group, uint32_t rank);
  static void forget(const engine::GroupShared& group, uint32_t rank);
  static void mark_formed(Session& session, base::GroupId group);
  ExecutorChoice executor_of(const group::Formation& formation) const;
  base::Status grant_exchange(const group::Formation& formation, const group::Member& member, JoinGrant* grant);
  base::Status form_member(const group::Formation& formation, const group::Member& member, JoinGrant* grant);
  base::Status remove_membership(const SessionRef& session, base::GroupId group, uint64_t deadline_ns);
  void wake_group(const engine::GroupShared& group);
  bool try_reclaim(const SessionRef& session);
  void housekeeper_main();
  SessionSnapshot describe(Session& session) const;

  ServiceOptions options_;
  std::vector<DeviceEntry> devices_;
  SessionObserver* observer_;
  group::Directory directory_;
  GroupViews views_;
  group::RendezvousPort* rendezvous_ = nullptr;  // null: this node is the only one
  GroupFabric* fabric_ = nullptr;
  DescriptorCloser closer_;
  LastWord last_word_;
  std::mutex mutex_;
  std::condition_variable housekeeper_signal_;
  std::map<uint64_t, SessionRef> sessions_;
  std::deque<std::unique_ptr<group::Formation>> formations_;  // complete groups to set up; each has a join of a session
  std::deque<Placement> placements_;                          // answers of the rendezvous to joins that wait here
  std::deque<Formed> formed_;                                 // groups whose other nodes have reported
  std::vector<GoingOver> going_over_;                         // at most one for each group
  std::mutex kept_mutex_;                                     // kept_
  std::map<uint64_t, Kept> kept_;                             // groups with ranks here that take others back, by key
  std::deque<SessionRef> ended_;  // waiting for their last operations; bounded by max_sessions
  uint64_t next_session_ = 1;
  bool draining_ = false;
  bool stop_ = false;
  bool housekeeper_ended_ = false;
  std::thread housekeeper_;
};

}  // namespace expertd::session
