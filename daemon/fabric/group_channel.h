// SPDX-License-Identifier: Apache-2.0
// GroupChannel: one group on the fabric of this node: its memory, and its part of each lane: of the data lanes a
// LaneChannel, of the control lane a ControlChannel, each of its lane's thread. Every thread of a lane that has it
// keeps a reference until its part is drained, so its memory goes when nothing in flight may touch it any more.
#pragma once

#include <array>
#include <atomic>
#include <memory>

#include "daemon/engine/fabric_port.h"
#include "daemon/fabric/control_channel.h"
#include "daemon/fabric/lane_channel.h"
#include "daemon/fabric/options.h"

namespace expertd::fabric {

/// What the channel uses of its surroundings; all outlive it.
struct ChannelSurroundings {
  std::array<LaneSurroundings, engine::kFabricLanes> lanes;  // by engine::FabricLane
  MemoryPort* memory = nullptr;
  MemoryPort* gpu_memory = nullptr;  // of groups whose link says so
};

/// PEER_LOST: a node of a group is not connected.
base::Status not_connected(const GroupLink& link, uint32_t node);

class GroupChannel {
 public:
  /// Takes all memory that the group will ever use. Control thread. ARGUMENT_RANGE names a field of the link.
  static base::Result<std::shared_ptr<GroupChannel>> create(GroupLink link, const ChannelSurroundings& surroundings);
  ~GroupChannel();
  GroupChannel(const GroupChannel&) = delete;
  GroupChannel& operator=(const GroupChannel&) = delete;

  const GroupLink& link() const { return link_; }
  uint64_t memory_bytes() const { return memory_bytes_; }
  /// Whether the group has buffers for the lane; without, its messages go by the throughput lane.
  bool uses(engine::FabricLane lane) const {
    return lane == engine::FabricLane::kThroughput || link_.lanes == engine::kFabricLanes;
  }
  /// Of a lane that it uses.
  LaneChannel& lane(engine::FabricLane lane) { return *lanes_[static_cast<uint32_t>(lane)]; }
  ControlChannel& control() { return control_; }
  /// Closed by the control plane; parts of it may not be drained. Any thread.
  bool closing() const { return closing_.load(std::memory_order_relaxed); }
  void set_closing() { closing_.store(true, std::memory_order_relaxed); }

  // As of engine::FabricPort.
  engine::SendBuffer take(uint32_t rank, engine::FabricLane wanted) {
    return lane(uses(wanted) ? wanted : engine::FabricLane::kThroughput).take(rank);
  }
  void send(uint32_t rank, const engine::SendBuffer& buffer, const engine::MessageHeader& header, uint64_t bytes) {
    lane(buffer.lane).send(rank, buffer, header, bytes);
  }
  void drop(uint32_t rank, const engine::SendBuffer& buffer) { lane(buffer.lane).drop(rank, buffer); }
  bool receive(uint32_t rank, engine::Arrival* arrival);
  void release(uint32_t rank, const engine::Arrival& arrival) { lane(arrival.header.lane).release(rank, arrival); }

 private:
  GroupChannel(GroupLink link, const ChannelSurroundings& surroundings);
  base::Status check() const;
  base::Status check_placement() const;
  base::Status take_memory(const ChannelSurroundings& surroundings);

  const GroupLink link_;
  const uint64_t own_node_id_;
  MemoryPort* const memory_port_;
  MemoryPort* const gpu_memory_port_;
  std::byte* memory_ = nullptr;
  std::byte* gpu_memory_ = nullptr;
  uint64_t memory_bytes_ = 0;
  uint64_t gpu_memory_bytes_ = 0;
  std::array<std::unique_ptr<LaneChannel>, engine::kFabricLanes> lanes_;
  ControlChannel control_;
  std::atomic<bool> closing_{false};
};

}  // namespace expertd::fabric
