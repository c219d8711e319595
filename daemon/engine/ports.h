// SPDX-License-Identifier: Apache-2.0
// The engine's outlets and the values that cross them. Pure: no CUDA, UCX, gRPC, sockets, clocks or threads. A request
// moves right (admit -> Request -> engine -> LaunchSpec -> device), a completion moves left (device facts -> Outcome ->
// completion slot). Everything here is used by the thread of one device loop, except where "any thread" is said.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>

#include "daemon/base/atomic_rank_set.h"
#include "daemon/base/ids.h"
#include "daemon/base/limits.h"
#include "daemon/base/rank_set.h"
#include "daemon/engine/fabric_port.h"
#include "daemon/kernels/op_params.h"
#include "proto/abi/expertd_reason.h"
#include "proto/abi/ring_v1.h"

namespace expertd::engine {

/// Memory of a session as the devices see it: one base address per device that may touch it (null where it may not).
/// Owned by the session's table; outlives every operation that names it (architecture: who owns memory).
struct Mapping {
  uint64_t bytes = 0;
  base::DeviceIndex home;
  std::array<void*, base::kMaxDevices> base{};
};

/// A validated tensor: inside its mapping, aligned, large enough. mapping == nullptr: not given.
struct TensorView {
  const Mapping* mapping = nullptr;
  uint64_t offset = 0;
  void* on(base::DeviceIndex device) const {
    return mapping == nullptr ? nullptr : static_cast<char*>(mapping->base[device.value]) + offset;
  }
};

/// How the schedule sees an operation: what somebody waits for token by token, or what moves many rows.
enum class Traffic : uint32_t { kLatency = 0, kThroughput = 1 };

/// One admitted operation of one rank: the slot's values after validation, with ids resolved. Lives in the loop's fixed
/// request pool from admission to completion.
struct Request {
  base::SessionId session;
  uint32_t slot = 0;  // ring slot, where its completion goes
  uint64_t seq = 0;
  kernels::OpShape shape;  // rank, ranks, experts, max_tokens come from the group, active_ranks at launch
  std::array<TensorView, EXPERTD_TENSOR_COUNT> tensors{};
  uint32_t handle_index = 0;
  uint32_t handle_generation = 0;
  bool doorbell_rung = false;
  uint32_t token_bound = 0;  // most tokens that any rank passes, the same on all; 0: not given
  Traffic traffic = Traffic::kThroughput;
  bool with_weights = false;   // top-k weights travel; all ranks alike, also those with no tokens
  bool without_words = false;  // refused by the client, which rang no doorbell and has nothing waiting
  bool copies = false;         // by copy engines; its routing is in the exchange windows
  bool captured = false;       // kept for replays of a CUDA graph; nothing runs now, and there are no words
  bool begins = false;         // a rank that comes back may begin with it: no combine is outstanding before it
  uint64_t handle_made = 0;    // the group's operation that made the handle it uses; 0: it uses none
  uint32_t capture_lane = 0;
  uint32_t rejected_reason = 0;  // refused, at admission or by the client, but counted as this rank's operation
  uint32_t rejected_argument = 0;
  int64_t rejected_value = 0;
  int64_t rejected_minimum = 0;
  int64_t rejected_maximum = 0;
  uint64_t submit_ns = 0;
  uint64_t admit_ns = 0;
  uint64_t deadline_ns = 0;  // absolute
};

/// The doorbell and completion of a slot on devices whose words live in device memory.
struct SlotWords {
  void* flag_page = nullptr;  // as the executing device sees it
  uint32_t slot = 0;
  uint64_t seq = 0;
};

/// For whom a part waited, and what it sent to other nodes, as far as its device knows.
struct Exchanged {
  int32_t last_rank = -1;     // whose counts came last; -1: not known
  uint64_t waited_ns = 0;     // from the own counts to the last
  uint64_t fabric_bytes = 0;  // of OpReport::remote_bytes, those to other nodes
};

/// For whom an operation of a group waited, as one of its ranks saw it: last_rank submitted last or was the last whose
/// counts came, whichever took longer.
struct HeldUp {
  base::GroupId group;
  uint32_t rank = 0;       // who saw it
  int32_t last_rank = -1;  // -1: not known
  uint64_t waited_ns = 0;
  bool counts = false;  // arrivals of counts were seen, and not submissions alone
  uint64_t fabric_bytes = 0;
};

/// Facts of one finished or failed rank part.
struct Outcome {
  kernels::OpReport report;
  uint32_t missing = 0;        // expertd_missing, with TIMEOUT
  uint32_t peer_reason = 0;    // with PEER_REJECTED by a rank of another node: its Reason
  uint32_t executor = 0;       // expertd_completion_executor
  uint32_t sms = 0;            // multiprocessors that its largest kernel takes
  uint32_t capture_entry = 0;  // captured: what the graph writes into the doorbell, and whose words it uses
  uint32_t capture_words = 0;
  uint64_t launch_ns = 0;
  uint64_t start_ns = 0;
  uint64_t end_ns = 0;
  Exchanged exchanged;
};

/// Exchange flags of one operation of a group on one node: a rank sets its bit after `route` and after `move`. Host
/// devices use them directly; CUDA devices have words of their own and leave these alone.
struct ExchangeFlags {
  base::AtomicRankSet routed;      // ranks of all nodes
  std::atomic<uint64_t> moved{0};  // those of this one, by place
  /// By rank: when the counts of each in `routed` were there, base::now_ns clock; written before its bit. For people.
  std::unique_ptr<std::atomic<uint64_t>[]> routed_ns;

  ExchangeFlags() = default;
  explicit ExchangeFlags(uint32_t ranks) { size_for(ranks); }
  void size_for(uint32_t ranks) { routed_ns = std::make_unique<std::atomic<uint64_t>[]>(ranks); }
  /// Before an operation is published.
  void clear() {
    routed.store({}, std::memory_order_relaxed);
    moved.store(0, std::memory_order_relaxed);
  }
};

/// Where the ranks of a group are, as LaunchSpec and GroupShape have it: places are Placement::index_of, and the ranks
/// themselves where all are on one node.
inline bool is_local_rank(const Placement* placement, uint32_t rank) {
  return placement == nullptr || placement->is_local(rank);
}
inline uint32_t place_of_rank(const Placement* placement, uint32_t rank) {
  return placement == nullptr ? rank : placement->index_of[rank];
}

/// Everything a device needs for its rank's part. `requests` has the Request of each rank of this node by place (null
/// for inactive ranks); the pointers stay valid until every participating device has reported the part finished.
struct LaunchSpec {
  base::GroupId group;    // 0 for local operations (layout)
  uint64_t group_op = 0;  // operation number of the group, from 1
  uint32_t ranks = 0;
  uint32_t rank = 0;
  base::RankSet active_ranks;
  uint32_t epoch = 0;  // of the group's membership that active_ranks is of
  uint32_t page = 0;   // exchange page of the group (kExchangePages), free again when all parts finished
  ExchangeFlags* flags = nullptr;
  const Request* own = nullptr;
  std::array<const Request*, base::kMaxLocalRanks> requests{};
  std::array<base::DeviceIndex, base::kMaxLocalRanks> devices{};  // by place
  /// Of a group over several nodes, whose other ranks have neither request nor device here; null: all are on this one.
  const Placement* placement = nullptr;
  FabricPort* fabric = nullptr;

  bool is_local(uint32_t other) const { return is_local_rank(placement, other); }
  uint32_t place_of(uint32_t other) const { return place_of_rank(placement, other); }
  /// Null for ranks of other nodes, too.
  const Request* request_of(uint32_t other) const { return is_local(other) ? requests[place_of(other)] : nullptr; }
};

inline constexpr uint32_t kExchangePages = 8;
/// Captured operations of a group that may be outstanding at once: both halves of a double batch.
inline constexpr uint32_t kMostCaptureLanes = 2;

/// Sizes of the tables a device keeps for one rank of a group.
struct GroupShape {
  base::GroupId id;
  uint32_t ranks = 0;
  uint32_t rank = 0;
  uint32_t experts = 0;
  uint32_t hidden = 0;
  uint32_t top_k = 0;
  uint32_t max_tokens = 0;
  bool low_latency = false;    // low latency operations are allowed: some devices keep memory for them
  uint32_t capture_lanes = 0;  // how many captured operations may be outstanding at once; 0: none is captured
  uint32_t copies = 0;         // operations executed by copy engines and kernels of the clients: set of expertd_copies
  bool peer_access = true;     // false: ranks exchange through memory of the host whatever links their GPUs have
  std::array<base::DeviceIndex, base::kMaxLocalRanks> devices{};  // of ranks on this node, by place
  base::SessionId session;
  /// Of a group over several nodes: who sits where and what carries its messages, both there until the tables are
  /// destroyed. Null: all ranks are on this node.
  const Placement* placement = nullptr;
  FabricPort* fabric = nullptr;
  const base::AtomicRankSet* lost = nullptr;

  bool is_local(uint32_t other) const { return is_local_rank(placement, other); }
  uint32_t place_of(uint32_t other) const { return place_of_rank(placement, other); }
  uint32_t rank_at(uint32_t place) const {
    return placement == nullptr ? place : placement->ranks_of[placement->own_node][place];
  }
  uint32_t local_ranks() const { return placement == nullptr ? ranks : placement->ranks_on(placement->own_node); }
  /// Of a rank on this node.
  base::DeviceIndex device_of(uint32_t other) const { return devices[place_of(other)]; }
};

/// A part in flight on a device, numbered by the device; 0 is never used.
using PartId = uint64_t;

/// One device as its engine drives it. All calls from the device's loop thread, none blocks or can synchronise.
class DevicePort {
 public:
  virtual ~DevicePort() = default;
  /// Takes a part; false when its queues are full (try again later). The device copies what it needs of the spec. The
  /// parts of a session take effect in the order of their launch.
  virtual bool launch(const LaunchSpec& spec, const SlotWords& words, PartId* part) = 0;
  /// Advances what can be advanced and says how a part stands; true when it ended and `outcome` is filled.
  virtual bool poll(PartId part, Outcome* outcome) = 0;
  /// Whether poll() itself does the work of parts, in chunks: then the engine chooses whose part is polled.
  virtual bool works_in_poll() const { return false; }
  /// With works_in_poll(): whether the next poll() of the part does a chunk, whatever others do.
  virtual bool works(PartId /*part*/) const { return false; }
  /// Ends a part early: nothing of it writes client memory after poll() reports it, and poll() reports it soon. The
  /// outcome's report keeps `reason` unless the part had already finished.
  virtual void abort(PartId part, uint32_t reason) = 0;
  /// Called for a part that poll() reported ended by abort(), when the parts of all its peers have ended too: lets the
  /// caller's stream go. True when nothing of the part is under way any more; until then it is called again.
  virtual bool settle(PartId part) = 0;
  /// What a part that is not finished waits for, for TIMEOUT: expertd_missing and the ranks not yet there.
  virtual uint32_t missing(PartId part, base::RankSet* ranks) = 0;
  /// True while a part may advance without an event from outside, so that the loop should not sleep.
  virtual bool busy() const = 0;
  /// True while a part may advance without anybody waking the loop (a GPU works on it): the loop then looks again after
  /// a while, rarer the longer nothing moved.
  virtual bool polls() const { return false; }
  /// Advances what the device does without a part, such as replays of captured operations; true when something moved.
  virtual bool tend(uint64_t now_ns) {
    (void)now_ns;
    return false;
  }
  /// Takes the next replay that ended: of which captured request, and how. False when there is none.
  virtual bool next_replay(const Request** request, Outcome* outcome) {
    (void)request;
    (void)outcome;
    return false;
  }
  /// Whether a captured operation names the mapping.
  virtual bool captured(const Mapping* mapping) const {
    (void)mapping;
    return false;
  }
  /// The session leaves the group (0: ends, and leaves all of its groups): ends its captured operations. Called again
  /// until it returns true, which says that nothing of them, nor of the other ranks', touches its memory any more.
  virtual bool end_captures(base::SessionId session, base::GroupId group) {
    (void)session;
    (void)group;
    return true;
  }
  /// Releases a slot's stream waiters for an operation that was never launched (rejected, failed while gathering).
  virtual void release_words(const SlotWords& words, uint32_t reason) = 0;
};

/// Wakes the loop of another device after a flag it waits for was set. Any thread; cheap when that loop is awake.
class WakePort {
 public:
  virtual ~WakePort() = default;
  virtual void wake(base::DeviceIndex device) = 0;
};

/// Sees every completion for metrics; never acts. Loop thread of `device`; must not block or allocate.
class OpObserver {
 public:
  virtual ~OpObserver() = default;
  virtual void completed(base::DeviceIndex device, const Request& request, const expertd_completion& completion,
                         const HeldUp& held_up) = 0;
  /// A low-latency operation ended before a high-throughput one of another session that was complete earlier.
  virtual void overtook(base::DeviceIndex /*device*/) {}
};

/// Where completions go; implemented by the ring server of the session, on the loop thread.
class CompletionPort {
 public:
  virtual ~CompletionPort() = default;
  virtual void complete(const Request& request, const expertd_completion& completion) = 0;
};

}  // namespace expertd::engine
