// SPDX-License-Identifier: Apache-2.0
// What the control service may ask of sessions and groups, in domain terms: the seam between gRPC and the house.
// Control threads call it; everything is implemented behind it (session, group) without a gRPC type. Replies that wait
// for other ranks come through a callback, exactly once, from another thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "daemon/base/ids.h"
#include "daemon/base/rank_set.h"
#include "daemon/base/status.h"
#include "proto/abi/executor_v1.h"

namespace expertd::session {

struct BufferGrant {
  uint32_t buffer_id = 0;
  uint64_t fd_token = 0;  // windows: for GET_FD on the attach socket
  uint64_t size = 0;
};

enum class GroupMode : uint32_t { kUnspecified = 0, kNormal = 1, kInference = 2, kAuto = 3 };
/// Of the operations of a group; kAuto: a rule tells for each (proto/abi/executor_v1.h).
enum class Executor : uint32_t { kAuto = 0, kSm = 1, kCopyEngine = 2 };
enum class OnRankLoss : uint32_t { kUnspecified = 0, kFail = 1, kMask = 2 };

/// What a group uses of the links inside of a node and between nodes.
struct CommunicationPattern {
  bool use_nvlink = true;        // false: GPUs of a node exchange through memory of the host
  bool use_rdma = true;          // false: all ranks are on one node
  uint32_t virtual_lanes = 2;    // 1: everything between nodes goes by the throughput lane
  uint32_t bandwidth_ratio = 1;  // weight on the throughput lane beside other groups
  friend bool operator==(const CommunicationPattern&, const CommunicationPattern&) = default;
};

struct GroupConfig {
  uint32_t expert_parallel_size = 0;
  uint32_t num_experts = 0;
  uint32_t hidden = 0;
  uint32_t top_k = 0;
  uint32_t max_tokens = 0;
  GroupMode mode = GroupMode::kUnspecified;
  OnRankLoss on_rank_loss = OnRankLoss::kUnspecified;
  uint64_t op_timeout_ns = 0;
  uint64_t first_op_timeout_ns = 0;
  uint32_t dispatch_dtypes = 0;    // set of expertd_payload; 0: any
  uint32_t dynamic_ll_tokens = 0;  // not 0: dynamic; operations of at most this bound count as low latency
  uint32_t capture_lanes = 0;      // captured operations outstanding at once
  Executor executor = Executor::kAuto;
  bool copy_kernels = false;  // what the rank's client has: not one of the things that ranks have in common
  uint32_t copies = 0;        // nor is this: a set of expertd_copies that it evaluates a rule for
  CommunicationPattern communication;
  friend bool operator==(const GroupConfig&, const GroupConfig&) = default;
};

struct JoinRequest {
  std::string name;
  uint32_t rank = 0;
  GroupConfig config;
  uint64_t timeout_ns = 0;
  /// Becomes true when nobody waits for the answer any more: the join is then taken back. Null: it never does.
  std::shared_ptr<const std::atomic<bool>> cancelled = nullptr;
};

struct JoinGrant {
  base::GroupId group;
  uint64_t epoch = 0;
  BufferGrant window;                 // buffer_id 0: none
  Executor executor = Executor::kSm;  // of all low latency operations; kAuto: see the rule
  expertd_executor_rule rule{};
  BufferGrant exchange;  // where the rule has copies: descriptor and size, no buffer
  uint64_t op_timeout_ns = 0;
  uint64_t first_op_timeout_ns = 0;
};

/// An error with what ErrorInfo carries beside the Reason.
struct ErrorDetail {
  base::Status status;
  int32_t rank = -1;
  std::string field;
  std::string value;
  std::string other_value;
};

struct MaskReply {
  uint64_t epoch = 0;
  base::RankSet lost;
  base::RankSet excluded;
};

/// What a join takes for its rank, as it will be allocated (device/device.h: GroupMemory).
struct GroupPlan {
  uint64_t window_bytes = 0;
  uint64_t table_bytes = 0;
  uint64_t handle_bytes = 0;
  uint64_t worst_rows = 0;
  uint32_t handles = 0;
  uint64_t pinned_bytes = 0;
};

using JoinCallback = std::function<void(const ErrorDetail& error, const JoinGrant& grant)>;

/// Calls of one attached session. `session` is the identity that the connection carries.
class SessionApi {
 public:
  virtual ~SessionApi() = default;
  virtual base::Status open_session(base::SessionId session, const std::string& client_id,
                                    const std::string& traceparent) = 0;
  virtual base::Result<BufferGrant> register_ipc(base::SessionId session, const std::string& handle, uint64_t offset,
                                                 uint64_t size) = 0;
  virtual base::Result<BufferGrant> register_fd(base::SessionId session, uint64_t token, uint64_t offset, uint64_t size,
                                                uint64_t allocation_size) = 0;
  /// Blocks until nothing in flight uses the buffer, at most until deadline_ns (absolute, base::now_ns clock).
  virtual base::Status unregister(base::SessionId session, uint32_t buffer_id, uint64_t deadline_ns) = 0;
  virtual base::Result<BufferGrant> create_window(base::SessionId session, uint64_t size) = 0;
  virtual void join_group(base::SessionId session, const JoinRequest& request, JoinCallback done) = 0;
  virtual base::Status leave_group(base::SessionId session, base::GroupId group, uint64_t deadline_ns) = 0;
  virtual base::Result<MaskReply> group_mask(base::SessionId session, base::GroupId group, const base::RankSet& exclude,
                                             const base::RankSet& readmit) = 0;
  /// Asks the session's device; nothing is allocated. ARGUMENT_RANGE where a join would be refused with it.
  virtual base::Result<GroupPlan> plan_group(base::SessionId session, const GroupConfig& config) = 0;
};

struct DeviceSnapshot {
  uint32_t index = 0;
  std::string kind;
  std::string uuid;
  std::string name;
  bool healthy = true;
  bool mps_active = false;
  std::string doorbell_form;
  uint64_t context_bytes = 0;
  std::string context_source;     // "process", "device", or empty: context_bytes is not known
  uint64_t table_bytes = 0;       // the daemon's own allocations: part words, flag pages, tables of groups
  uint64_t window_bytes = 0;      // of attached sessions
  uint64_t registered_bytes = 0;  // clients' memory that is mapped for attached sessions
  uint64_t quarantined_bytes = 0;
  uint64_t pool_used_bytes = 0;  // of the daemon's allocations, windows of ended sessions included
  uint32_t sessions = 0;
  uint32_t armed_streams = 0;
  uint32_t armed_streams_max = 0;
  uint32_t lane_streams = 0;        // of capture lanes, beside the armed ones
  uint32_t parked_streams_max = 0;  // of both together
  uint64_t peer_access_mask = 0;
  std::string kernels;
};

struct GroupSnapshot {
  std::string name;
  base::GroupId id;
  GroupConfig config;
  uint64_t epoch = 0;
  base::RankSet joined;  // of this node
  base::RankSet lost;
  base::RankSet excluded;
  uint64_t ops = 0;
  std::string executor;                 // rule_text(), or "host"
  std::vector<std::string> rank_nodes;  // per rank the name of its node; empty: all are on this one
};

/// For whom one operation waited, as one of its ranks saw it.
struct WaitSnapshot {
  base::GroupId group;
  uint64_t number = 0;
  std::string op;
  uint32_t rank = 0;
  uint32_t last_rank = 0;
  uint64_t waited_ns = 0;
  bool counts = false;  // arrivals of counts were seen, and not submissions alone
};

struct WaitsSnapshot {
  std::string node;                   // of this daemon; empty without a fabric
  std::vector<GroupSnapshot> groups;  // that are there now
  std::vector<WaitSnapshot> waits;    // of these groups
};

struct SessionSnapshot {
  base::SessionId id;
  std::string name;
  uint32_t uid = 0;
  uint32_t pid = 0;
  std::string device;
  uint64_t age_ns = 0;
  uint32_t buffers = 0;
  uint64_t buffer_bytes = 0;
  uint32_t groups = 0;
  uint64_t ops_completed = 0;
  uint64_t ops_rejected = 0;
  uint32_t slots_used = 0;
  uint32_t slots = 0;
  uint64_t bytes_moved = 0;
  uint64_t p50_ns = 0;
  uint64_t p99_ns = 0;
  std::string state;
};

/// What the daemon has to do with daemons of other nodes; all empty where it is not enabled.
/// One device of a lane, and what left by it.
struct FabricRailSnapshot {
  std::string device;  // empty: UCX's choice
  uint64_t sent_messages = 0;
  uint64_t sent_bytes = 0;
  uint64_t under_way_bytes = 0;
};

struct FabricLaneSnapshot {
  std::string name;
  std::vector<std::string> options;  // "traffic_class=106"
  std::vector<FabricRailSnapshot> rails;
};

struct FabricStatusSnapshot {
  bool enabled = false;
  std::string backend;
  std::string transports;
  std::string node;
  uint64_t node_id = 0;
  std::string address;
  std::string rendezvous_address;  // empty: none is known; rendezvous_cause says why
  std::string rendezvous_node;
  std::string rendezvous_cause;
  bool rendezvous_hosting = false;  // by this daemon
  std::string rendezvous_source;    // how it is found: "list", "dns", "etcd"
  uint64_t rendezvous_term = 0;     // with etcd: of the host's election; 0: none is known
  std::string etcd_cause;           // with etcd: why it does not say who hosts
  uint32_t peers_connecting = 0;
  uint32_t peers_up = 0;
  uint32_t peers_lost = 0;
  uint32_t groups = 0;
  uint64_t memory_bytes = 0;
  std::string cause;          // why the fabric did not answer; the counts are then those of its last answer
  std::string backend_cause;  // why the backend is not direct
  std::string route;
  std::vector<FabricLaneSnapshot> lanes;
};

struct PeerLaneSnapshot {
  std::string lane;
  uint64_t sent_messages = 0;
  uint64_t sent_bytes = 0;
  uint64_t received_messages = 0;
  uint64_t received_bytes = 0;
  uint64_t in_flight = 0;
  uint64_t deferred = 0;
};

/// The daemon of another node.
struct PeerSnapshot {
  std::string name;
  uint64_t node_id = 0;
  std::string address;  // empty: not known
  std::string state;    // connecting, up, lost
  std::string cause;    // of a lost one
  std::string detail;
  uint64_t rtt_ns = 0;  // of the last heartbeat; 0: none yet
  uint64_t heard_ago_ns = 0;
  uint64_t sends_failed = 0;
  std::vector<PeerLaneSnapshot> lanes;
};

struct PeersSnapshot {
  bool enabled = false;  // fabric.enabled
  std::string node;      // name of this one
  std::vector<PeerSnapshot> peers;
};

struct StatusSnapshot {
  std::string version;
  std::string state;  // starting, ready, degraded, draining
  uint64_t generation = 0;
  uint64_t uptime_ns = 0;
  std::vector<DeviceSnapshot> devices;
  std::vector<GroupSnapshot> groups;
  uint32_t sessions = 0;
  uint32_t sessions_max = 0;
  std::string metrics_address;
  std::string schedule;  // engine.schedule
  std::string cuda_build;
  std::string cuda_driver;
  FabricStatusSnapshot fabric;
};

struct OpCounterSnapshot {
  std::string op;
  uint32_t device = 0;
  uint64_t ok = 0;
  uint64_t failed = 0;
  uint64_t tokens = 0;
  uint64_t local_bytes = 0;
  uint64_t remote_bytes = 0;
  uint64_t duration_ns = 0;
};

/// What operators see and may do.
/// A daemon of the cluster, as the rendezvous knows it.
struct NodePlace {
  std::string name;
  uint64_t id = 0;
  std::string address;
};

/// Of one lane of the fabric from one node to another.
struct PairLaneSnapshot {
  std::string lane;
  std::string device;           // empty: all of the lane, together
  uint64_t latency_p50_ns = 0;  // one way
  uint64_t latency_p99_ns = 0;
  uint64_t bytes_per_second = 0;
};

/// Measurements between nodes. Any thread; nothing waits, the callback comes once from a thread of the implementation.
class MeshApi {
 public:
  using Listed = std::function<void(const base::Status&, const std::vector<NodePlace>&)>;
  using Measured = std::function<void(const base::Status&, const std::vector<PairLaneSnapshot>&)>;

  virtual ~MeshApi() = default;
  virtual std::string node() const = 0;
  virtual void list_nodes(Listed done) = 0;
  /// BAD_STATE while another one is on.
  virtual void measure_pair(uint64_t source_id, uint64_t destination_id, uint64_t timeout_ns, Measured done) = 0;
};

class OperatorApi {
 public:
  virtual ~OperatorApi() = default;
  /// Null where the fabric is off.
  virtual MeshApi* mesh() { return nullptr; }
  virtual StatusSnapshot status() = 0;
  virtual std::vector<SessionSnapshot> sessions() = 0;
  virtual std::vector<OpCounterSnapshot> counters() = 0;
  /// The error is of a fabric that does not answer.
  virtual base::Result<PeersSnapshot> peers() = 0;
  /// Of each device the last operations of groups, at most `last`; 0: all that are kept.
  virtual WaitsSnapshot waits(uint32_t last) = 0;
  /// Starts the drain (main does the rest); returns the number of sessions told.
  virtual uint32_t drain(uint64_t timeout_ns) = 0;
  /// Returns the previous level, or CONFIG_BAD_VALUE.
  virtual base::Result<std::string> set_log_level(const std::string& level) = 0;
};

}  // namespace expertd::session
