// SPDX-License-Identifier: Apache-2.0
// The values that cross the edge of the fabric: how it is set up, who it is to others, what a group needs of it, what
// it tells. Value types without UCX, for the composition root and the control plane.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "daemon/base/ids.h"
#include "daemon/base/limits.h"
#include "daemon/base/status.h"
#include "daemon/engine/fabric_port.h"
#include "daemon/fabric/heartbeat.h"

namespace expertd::fabric {

inline constexpr uint32_t kMaxNodes = 64;

/// The UCX workers of a daemon; what goes over one does not queue behind what goes over another.
enum class LaneKind : uint32_t { kControl = 0, kLatency = 1, kThroughput = 2 };
inline constexpr uint32_t kLanes = 3;
inline constexpr std::array<const char*, kLanes> kLaneNames = {"control", "latency", "throughput"};

inline constexpr LaneKind lane_of(engine::FabricLane lane) {
  return lane == engine::FabricLane::kLatency ? LaneKind::kLatency : LaneKind::kThroughput;
}

/// A lane with several devices has a rail for each: a worker and endpoints of its own.
inline constexpr uint32_t kMaxRails = 8;

/// By which rail a message of a rank leaves: by that of its device's number, by the one with the least to carry, or by
/// its own as long as that has not much more to carry than another.
enum class Route : uint32_t { kAuto = 0, kRail = 1, kSpread = 2 };
inline constexpr std::array<const char*, 3> kRouteNames = {"auto", "rail", "spread"};

/// Options of one lane by name and value; lane_options.h has the list. Unknown names and values are refused.
using LaneOptionList = std::vector<std::pair<std::string, std::string>>;

/// Where the fabric's buffers lie; a GPU's staging wants pinned memory. Any control thread; both may block.
class MemoryPort {
 public:
  virtual ~MemoryPort() = default;
  /// Page-aligned and zeroed.
  virtual base::Result<std::byte*> allocate(uint64_t bytes) = 0;
  virtual void free(std::byte* data, uint64_t bytes) = 0;
  /// UCX is told so of it. Else it is the host's.
  virtual bool is_gpu_memory() const { return false; }
};

struct FabricOptions {
  std::string name;  // of this node, for people
  /// Several devices of the latency and of the throughput lane become rails; the control lane has one worker.
  std::array<LaneOptionList, kLanes> lanes;
  Route route = Route::kAuto;
  /// Bytes of rendezvous on the throughput lane that move at once from one peer by one rail; one message at least.
  uint64_t window_bytes = 1024 * 1024;
  HeartbeatOptions heartbeat;
  /// Nothing under way on a lane for so long, and what its rails took counts no more for the choice of one.
  uint64_t rail_idle_ns = 20'000'000;
  uint64_t spin_ns = 50'000;               // a thread spins so long after the last work, then sleeps
  uint64_t task_limit_ns = 5'000'000'000;  // a control thread waits so long for a thread of the fabric
  uint64_t stop_limit_ns = 1'000'000'000;  // stop() waits so long for what is in flight
  MemoryPort* memory = nullptr;            // null: anonymous memory of the process
  MemoryPort* gpu_memory = nullptr;        // of groups with GroupLink::gpu_memory; null: there are none
};

/// What another daemon needs to reach this one. It stays the same as long as the daemon runs.
struct NodeIdentity {
  uint64_t node_id = 0;  // random, of this run of the daemon; never 0
  std::string name;
  /// Of the lanes' workers by rail, opaque bytes, at most kMaxAddressBytes each.
  std::array<std::vector<std::string>, kLanes> addresses;
};
inline constexpr size_t kMaxAddressBytes = 4096;

/// A group as this node takes part in it. `key`, `epoch`, the numbers and `node_ids` are the same on every node of it.
struct GroupLink {
  uint64_t key = 0;  // random, of this group; never 0
  uint32_t epoch = 0;
  engine::Placement placement;
  std::vector<uint64_t> node_ids;          // per node of the placement, the own one too; the others are connected
  std::vector<base::DeviceIndex> devices;  // of the local ranks, in the order of Placement::ranks_of[own_node]
  uint64_t message_bytes = 256 * 1024;
  uint32_t send_buffers = 4;              // per (local rank, lane), message_bytes each
  uint32_t receive_buffers = 4;           // per (node, lane), message_bytes each
  uint64_t eager_bytes = 8 * 1024;        // a message up to this size goes at once while the receiver has credits
  uint32_t eager_messages = 16;           // per (node, lane): these credits, eager_bytes each
  uint32_t lanes = engine::kFabricLanes;  // 1: the throughput lane alone, and no buffers for the other
  bool gpu_memory = false;                // entries of rows, pulls and sums lie in memory of FabricOptions::gpu_memory
  uint32_t weight = 1;                    // on the throughput lane beside other groups, 1..kMaxWeight
};
inline constexpr uint32_t kMaxWeight = base::kMaxBandwidthRatio;
inline constexpr uint32_t kMaxBuffersPerLane = 64;
inline constexpr uint64_t kMaxMessageBytes = 16 * 1024 * 1024;

enum class PeerState : uint32_t { kConnecting, kUp, kLost };

enum class LossCause : uint32_t {
  kTransport,      // UCX reported its connection broken
  kSilent,         // no sign of life, or no answer, for so many intervals
  kNeverAnswered,  // never a sign of life
  kGarbage,        // it sent what no daemon sends
  kLeft,           // it said that it stops
  kDisconnected,   // this side ended it
};
inline constexpr uint32_t kLossCauses = 6;
const char* loss_cause_name(LossCause cause);

/// Why a message was not taken.
enum class DropCause : uint32_t {
  kMalformed,     // wrong size, magic, type
  kVersion,       // another protocol version
  kUnknownNode,   // of a daemon that is not connected, or no more
  kUnknownGroup,  // of a group that is not open here
  kEpoch,         // of another epoch of the group
  kBadField,      // a field of it is out of range
  kOverrun,       // more than the buffers agreed on
};
inline constexpr uint32_t kDropCauses = 7;
const char* drop_cause_name(DropCause cause);

struct LaneTraffic {
  uint64_t sent_messages = 0;
  uint64_t sent_bytes = 0;
  uint64_t received_messages = 0;
  uint64_t received_bytes = 0;
  uint64_t in_flight = 0;  // sends that have not ended
  uint64_t deferred = 0;   // arrivals that found no buffer, ever

  LaneTraffic& operator+=(const LaneTraffic& other) {
    sent_messages += other.sent_messages;
    sent_bytes += other.sent_bytes;
    received_messages += other.received_messages;
    received_bytes += other.received_bytes;
    in_flight += other.in_flight;
    deferred += other.deferred;
    return *this;
  }
};

struct PeerSnapshot {
  uint64_t node_id = 0;
  std::string name;
  PeerState state = PeerState::kConnecting;
  LossCause cause = LossCause::kTransport;  // of a lost one
  std::string detail;
  uint64_t rtt_ns = 0;    // of the last heartbeat; 0: none yet
  uint64_t heard_ns = 0;  // when it last gave a sign of life
  uint64_t sends_failed = 0;
  std::array<LaneTraffic, engine::kFabricLanes> lanes{};
};

/// What left by one rail, to all peers since the start.
struct RailSnapshot {
  LaneKind lane = LaneKind::kThroughput;
  std::string device;  // empty: UCX's choice
  uint64_t sent_messages = 0;
  uint64_t sent_bytes = 0;
  uint64_t under_way_bytes = 0;
};

/// How long heartbeats took there and back, of all peers since the start.
inline constexpr std::array<uint64_t, 10> kRttBoundsNs = {20'000,    50'000,    100'000,    200'000,     500'000,
                                                          1'000'000, 5'000'000, 20'000'000, 100'000'000, 500'000'000};
struct RttHistogram {
  std::array<uint64_t, kRttBoundsNs.size() + 1> buckets{};  // by bound; the last is beyond all
  uint64_t sum_ns = 0;

  void observe(uint64_t rtt_ns) {
    size_t bucket = 0;
    for (const uint64_t bound : kRttBoundsNs) {
      bucket += rtt_ns > bound ? 1 : 0;
    }
    ++buckets[bucket];
    sum_ns += rtt_ns;
  }
};

struct FabricSnapshot {
  std::vector<PeerSnapshot> peers;  // connected ones and the last incarnation of lost ones
  std::vector<RailSnapshot> rails;  // by lane and rail; the control lane has none
  std::array<uint64_t, kDropCauses> dropped{};
  std::array<uint64_t, kLossCauses> lost{};
  std::array<LaneTraffic, engine::kFabricLanes> traffic{};  // with all peers ever, forgotten ones too
  RttHistogram rtt;
  uint32_t groups = 0;
  uint32_t groups_closing = 0;  // closed, and something of them is still in flight
  uint64_t memory_bytes = 0;    // of the groups' buffers
  uint64_t turns = 0;           // of the thread
};

/// Sees what happens to peers. On the control lane's thread but for beat(): must not block and must not call the
/// fabric.
class FabricObserver {
 public:
  virtual ~FabricObserver() = default;
  /// The first sign of life of a peer.
  virtual void node_up(uint64_t node_id, const std::string& name) = 0;
  /// Once per peer that was connected. Messages of it that arrived before are still delivered, none after.
  virtual void node_lost(uint64_t node_id, const std::string& name, LossCause cause, const std::string& detail) = 0;
  /// A rank of another node takes no part in operations of the group behind `through` any more. Once per rank.
  virtual void rank_gone(uint64_t group_key, uint32_t rank, uint64_t through) = 0;
  /// A message about views of a group that is open here, of its node `node`.
  virtual void view_message(uint64_t group_key, uint32_t node, const engine::ViewMessage& message) = 0;
  /// For the watchdog: at least twice a second, of each lane's thread on that.
  virtual void beat(LaneKind lane, uint64_t now_ns) = 0;
};

}  // namespace expertd::fabric
