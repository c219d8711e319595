// SPDX-License-Identifier: Apache-2.0
#include "daemon/fabric/group_channel.h"

#include <algorithm>

namespace expertd::fabric {

namespace {

base::Status out_of_range(const std::string& what, uint64_t value, uint64_t minimum, uint64_t maximum) {
  return base::Status(EXPERTD_REASON_ARGUMENT_RANGE, what + " is " + std::to_string(value) + ", allowed are " +
                                                         std::to_string(minimum) + " to " + std::to_string(maximum));
}

struct Bound {
  const char* name;
  uint64_t value;
  uint64_t minimum;
  uint64_t maximum;
};

}  // namespace

base::Status not_connected(const GroupLink& link, uint32_t node) {
  return base::Status(EXPERTD_REASON_PEER_LOST, "node " + std::to_string(node) + " of the group (id " +
                                                    hex(link.node_ids[node]) + ") is not connected; connect it first");
}

base::Result<std::shared_ptr<GroupChannel>> GroupChannel::create(GroupLink link,
                                                                 const ChannelSurroundings& surroundings) {
  std::shared_ptr<GroupChannel> channel(new GroupChannel(std::move(link), surroundings));
  EXPERTD_RETURN_IF_ERROR(channel->check().with_context("opening a group on the fabric"));
  EXPERTD_RETURN_IF_ERROR(
      channel->take_memory(surroundings).with_context("taking the buffers of a group on the fabric"));
  return channel;
}

GroupChannel::GroupChannel(GroupLink link, const ChannelSurroundings& surroundings)
    : link_(std::move(link)),
      own_node_id_(surroundings.lanes[0].own_node_id),
      memory_port_(surroundings.memory),
      gpu_memory_port_(surroundings.gpu_memory),
      control_(link_, own_node_id_) {}

GroupChannel::~GroupChannel() {
  if (memory_ != nullptr) {
    memory_port_->free(memory_, memory_bytes_);
  }
  if (gpu_memory_ != nullptr) {
    gpu_memory_port_->free(gpu_memory_, gpu_memory_bytes_);
  }
}

base::Status GroupChannel::check() const {
  const uint64_t nodes = link_.placement.nodes();
  const std::array<Bound, 8> bounds = {{
      {"the number of nodes", nodes, 2, kMaxNodes},
      {"message_bytes", link_.message_bytes, 1, kMaxMessageBytes},
      {"send_buffers", link_.send_buffers, 1, kMaxBuffersPerLane},
      {"receive_buffers", link_.receive_buffers, 1, kMaxBuffersPerLane},
      {"eager_messages", link_.eager_messages, 0, 1024},
      {"eager_bytes", link_.eager_bytes, 0, link_.message_bytes},
      {"lanes", link_.lanes, 1, engine::kFabricLanes},
      {"weight", link_.weight, 1, kMaxWeight},
  }};
  for (const Bound& bound : bounds) {
    if (bound.value < bound.minimum || bound.value > bound.maximum) {
      return out_of_range(bound.name, bound.value, bound.minimum, bound.maximum);
    }
  }
  if (link_.key == 0) {
    return base::Status(EXPERTD_REASON_ARGUMENT_RANGE, "the key of the group is 0; make a random one");
  }
  if (link_.gpu_memory && gpu_memory_port_ == nullptr) {
    return base::Status(EXPERTD_REASON_UNSUPPORTED, "the fabric has no memory of a GPU; open it with such");
  }
  return check_placement();
}

base::Status GroupChannel::check_placement() const {
  const engine::Placement& placement = link_.placement;
  const auto broken = [](const char* what) { return base::Status(EXPERTD_REASON_ARGUMENT_RANGE, what); };
  if (placement.own_node >= placement.nodes() || link_.node_ids.size() != placement.nodes()) {
    return broken("the placement's own node or the list of node ids does not fit its nodes");
  }
  if (link_.node_ids[placement.own_node] != own_node_id_) {
    return broken("the own node's id in the list is not this daemon's");
  }
  if (placement.index_of.size() != placement.ranks() ||
      link_.devices.size() != placement.ranks_on(placement.own_node)) {
    return broken("the placement's tables or the list of devices do not fit its ranks");
  }
  uint64_t ranks = 0;
  for (uint32_t node = 0; node < placement.nodes(); ++node) {
    if (placement.ranks_of[node].empty() || placement.ranks_of[node].size() > base::kMaxLocalRanks) {
      return broken("a node of the placement has no rank or more than 64");
    }
    ranks += placement.ranks_of[node].size();
    for (uint32_t i = 0; i < placement.ranks_of[node].size(); ++i) {
      const uint32_t rank = placement.ranks_of[node][i];
      if (rank >= placement.ranks() || placement.node_of[rank] != node || placement.index_of[rank] != i) {
        return broken("the placement's tables contradict each other");
      }
    }
  }
  const bool all_devices = std::all_of(link_.devices.begin(), link_.devices.end(),
                                       [](base::DeviceIndex device) { return device.value < base::kMaxDevices; });
  return ranks == placement.ranks() && all_devices ? base::Status::ok() : broken("a rank or a device does not exist");
}

base::Status GroupChannel::take_memory(const ChannelSurroundings& surroundings) {
  const uint64_t lane_bytes = LaneChannel::bytes_needed(link_);
  memory_bytes_ = lane_bytes * link_.lanes;
  base::Result<std::byte*> memory = memory_port_->allocate(memory_bytes_);
  if (!memory.is_ok()) {
    return memory.status();
  }
  memory_ = memory.value();
  if (link_.gpu_memory) {
    gpu_memory_bytes_ = LaneChannel::gpu_bytes_needed(link_) * link_.lanes;
    base::Result<std::byte*> gpu_memory = gpu_memory_port_->allocate(gpu_memory_bytes_);
    if (!gpu_memory.is_ok()) {
      return gpu_memory.status();
    }
    gpu_memory_ = gpu_memory.value();
  }
  LaneChannel::Memory next{memory_, gpu_memory_, link_.gpu_memory && gpu_memory_port_->is_gpu_memory()};
  for (const auto lane : {engine::FabricLane::kLatency, engine::FabricLane::kThroughput}) {
    if (uses(lane)) {
      const auto i = static_cast<uint32_t>(lane);
      lanes_[i] = std::make_unique<LaneChannel>(link_, lane, surroundings.lanes[i], next);
      next.host += lane_bytes;
      next.gpu += link_.gpu_memory ? LaneChannel::gpu_bytes_needed(link_) : 0;
    }
  }
  return base::Status::ok();
}

bool GroupChannel::receive(uint32_t rank, engine::Arrival* arrival) {
  return std::any_of(lanes_.begin(), lanes_.end(),
                     [&](const auto& lane) { return lane != nullptr && lane->receive(rank, arrival); });
}

}  // namespace expertd::fabric
