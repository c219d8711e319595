// SPDX-License-Identifier: Apache-2.0
// How a channel comes to be, and what the ranks' threads call. The fabric thread's side is in group_channel_fabric.cc.
#include "daemon/fabric/group_channel.h"

#include <algorithm>

namespace expertd::fabric {

namespace {

constexpr uint64_t kBufferAlignment = 128;

uint64_t aligned(uint64_t bytes) {
  return (bytes + kBufferAlignment - 1) / kBufferAlignment * kBufferAlignment;
}

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

base::Result<std::unique_ptr<GroupChannel>> GroupChannel::create(GroupLink link,
                                                                 const ChannelSurroundings& surroundings) {
  std::unique_ptr<GroupChannel> channel(new GroupChannel(std::move(link), surroundings));
  EXPERTD_RETURN_IF_ERROR(channel->check().with_context("opening a group on the fabric"));
  EXPERTD_RETURN_IF_ERROR(channel->take_memory().with_context("taking the buffers of a group on the fabric"));
  return channel;
}

GroupChannel::GroupChannel(GroupLink link, const ChannelSurroundings& surroundings)
    : link_(std::move(link)), surroundings_(surroundings) {}

GroupChannel::~GroupChannel() {
  if (memory_ != nullptr) {
    surroundings_.memory->free(memory_, memory_bytes_);
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
  return check_placement();
}

base::Status GroupChannel::check_placement() const {
  const engine::Placement& placement = link_.placement;
  const auto broken = [](const char* what) { return base::Status(EXPERTD_REASON_ARGUMENT_RANGE, what); };
  if (placement.own_node >= placement.nodes() || link_.node_ids.size() != placement.nodes()) {
    return broken("the placement's own node or the list of node ids does not fit its nodes");
  }
  if (link_.node_ids[placement.own_node] != surroundings_.own_node_id) {
    return broken("the own node's id in the list is not this daemon's");
  }
  if (placement.index_of.size() != placement.ranks() || link_.devices.size() != own_ranks()) {
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

uint64_t GroupChannel::bytes_needed() const {
  const uint64_t message = aligned(link_.message_bytes);
  const uint64_t sends = uint64_t{own_ranks()} * link_.lanes * link_.send_buffers;
  const uint64_t sources = uint64_t{link_.placement.nodes() - 1} * link_.lanes;
  return (sends + sources * link_.receive_buffers) * message +
         sources * link_.eager_messages * aligned(link_.eager_bytes);
}

base::Status GroupChannel::take_memory() {
  memory_bytes_ = bytes_needed();
  base::Result<std::byte*> memory = surroundings_.memory->allocate(memory_bytes_);
  if (!memory.is_ok()) {
    return memory.status();
  }
  memory_ = memory.value();
  std::byte* next = memory_;
  make_send_slots(&next);
  make_receive_slots(&next);
  return base::Status::ok();
}

void GroupChannel::make_send_slots(std::byte** memory) {
  const uint32_t sources = (link_.placement.nodes() - 1) * link_.lanes;
  const uint32_t receive_slots = sources * (link_.receive_buffers + link_.eager_messages);
  const uint32_t count = own_ranks() * link_.lanes * link_.send_buffers;
  send_slots_.resize(count);
  sends_ended_.reserve(count);
  uint32_t id = 0;
  for (uint32_t index = 0; index < own_ranks(); ++index) {
    ranks_.push_back(std::make_unique<RankQueues>(link_.send_buffers, receive_slots));
    for (uint32_t lane = 0; lane < engine::kFabricLanes; ++lane) {
      if (!uses(static_cast<engine::FabricLane>(lane))) {
        continue;
      }
      ranks_.back()->dropped[lane].reserve(link_.send_buffers);
      for (uint32_t i = 0; i < link_.send_buffers; ++i, ++id) {
        SendSlot& slot = send_slots_[id];
        slot.channel = this;
        slot.id = id;
        slot.rank_index = index;
        slot.lane = static_cast<engine::FabricLane>(lane);
        slot.data = *memory;
        *memory += aligned(link_.message_bytes);
        (void)ranks_.back()->free[lane].push(id);
      }
    }
  }
}

void GroupChannel::make_receive_slots(std::byte** memory) {
  const engine::Placement& placement = link_.placement;
  const uint32_t per_link = link_.receive_buffers + link_.eager_messages;
  receive_slots_.resize(uint64_t{placement.nodes() - 1} * link_.lanes * per_link);
  receives_ended_.reserve(receive_slots_.size());
  uint32_t id = 0;
  for (uint32_t node = 0; node < placement.nodes(); ++node) {
    for (uint32_t lane = 0; lane < engine::kFabricLanes; ++lane) {
      links_.push_back(nullptr);
      if (node == placement.own_node || !uses(static_cast<engine::FabricLane>(lane))) {
        continue;
      }
      links_.back() = std::make_unique<PeerLink>(placement.ranks_on(node) * link_.send_buffers);
      PeerLink& from = *links_.back();
      from.channel = this;
      from.node = node;
      from.lane = static_cast<engine::FabricLane>(lane);
      from.credits = link_.eager_messages;
      from.weight = from.lane == engine::FabricLane::kThroughput ? link_.weight : 1;
      for (CreditSlot& slot : from.credit_slots) {
        slot.from = &from;
      }
      for (uint32_t i = 0; i < per_link; ++i, ++id) {
        ReceiveSlot& slot = receive_slots_[id];
        slot.channel = this;
        slot.id = id;
        slot.from = &from;
        slot.eager = i >= link_.receive_buffers;
        slot.data = *memory;
        *memory += aligned(slot.eager ? link_.eager_bytes : link_.message_bytes);
        (slot.eager ? from.free_eager : from.free).push_back(id);
      }
    }
  }
}

engine::SendBuffer GroupChannel::take(uint32_t rank, engine::FabricLane wanted) {
  RankQueues& own = queues(rank);
  const engine::FabricLane lane = uses(wanted) ? wanted : engine::FabricLane::kThroughput;
  std::vector<uint32_t>& dropped = own.dropped[static_cast<uint32_t>(lane)];
  uint32_t id = 0;
  if (!dropped.empty()) {
    id = dropped.back();
    dropped.pop_back();
  } else if (!own.free[static_cast<uint32_t>(lane)].pop(&id)) {
    return {};
  }
  return {.data = send_slots_[id].data, .capacity = link_.message_bytes, .id = id};
}

void GroupChannel::send(uint32_t rank, const engine::SendBuffer& buffer, const engine::MessageHeader& header,
                        uint64_t bytes) {
  SendSlot& slot = send_slots_[buffer.id];
  slot.node = header.node;
  slot.header = WireMessage{};
  slot.header.prefix.source_node = surroundings_.own_node_id;
  slot.header.group_key = link_.key;
  slot.header.epoch = link_.epoch;
  slot.header.kind = static_cast<uint32_t>(header.kind);
  slot.header.op = header.op;
  slot.header.targets = header.targets;
  slot.header.source_rank = rank;
  slot.header.entries = header.entries;
  slot.header.sequence = header.sequence;
  slot.header.view = header.view;
  slot.header.lane = static_cast<uint32_t>(slot.lane);
  slot.header.bytes = static_cast<uint32_t>(std::min(bytes, link_.message_bytes));
  (void)queues(rank).submitted[static_cast<uint32_t>(slot.lane)].push(buffer.id);  // has room for every buffer
  surroundings_.waker->wake();
}

void GroupChannel::drop(uint32_t rank, const engine::SendBuffer& buffer) {
  queues(rank).dropped[static_cast<uint32_t>(send_slots_[buffer.id].lane)].push_back(buffer.id);
}

bool GroupChannel::receive(uint32_t rank, engine::Arrival* arrival) {
  uint32_t id = 0;
  if (!queues(rank).arrived.pop(&id)) {
    return false;
  }
  // Nobody writes the slot between its push to the rank and the rank's release.
  const ReceiveSlot& slot = receive_slots_[id];
  arrival->header = {.kind = static_cast<engine::MessageKind>(slot.header.kind),
                     .lane = static_cast<engine::FabricLane>(slot.header.lane),
                     .op = slot.header.op,
                     .source_rank = slot.header.source_rank,
                     .node = slot.from->node,
                     .targets = slot.header.targets,
                     .entries = slot.header.entries,
                     .sequence = slot.header.sequence,
                     .view = slot.header.view};
  arrival->data = slot.data;
  arrival->bytes = slot.header.bytes;
  arrival->arrived_ns = slot.arrived_ns;
  arrival->id = id;
  return true;
}

void GroupChannel::release(uint32_t rank, const engine::Arrival& arrival) {
  (void)queues(rank).released.push(arrival.id);  // has room for every receive slot
  // Pairs with the fabric thread, which stores it before it looks at the queue for the last time and sleeps.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (wanted_.load(std::memory_order_seq_cst) != 0) {
    surroundings_.waker->wake();
  }
}

}  // namespace expertd::fabric
