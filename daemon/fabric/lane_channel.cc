// SPDX-License-Identifier: Apache-2.0
// How a lane's channel comes to be, and what the ranks' threads call. Its turns are in lane_channel_turn.cc.
#include "daemon/fabric/lane_channel.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace expertd::fabric {

namespace {

constexpr uint64_t kBufferAlignment = 128;

uint64_t aligned(uint64_t bytes) {
  return (bytes + kBufferAlignment - 1) / kBufferAlignment * kBufferAlignment;
}

}  // namespace

LaneChannel::LaneChannel(const GroupLink& link, engine::FabricLane lane, const LaneSurroundings& surroundings,
                         Memory memory)
    : link_(link),
      lane_(lane),
      surroundings_(surroundings),
      entries_type_(memory.is_gpu ? UCS_MEMORY_TYPE_CUDA : UCS_MEMORY_TYPE_HOST) {
  make_send_slots(&memory);
  make_receive_slots(&memory);
}

uint64_t LaneChannel::bytes_needed(const GroupLink& link) {
  const uint64_t message = aligned(link.message_bytes);
  const uint64_t sends = uint64_t{link.placement.ranks_on(link.placement.own_node)} * link.send_buffers;
  const uint64_t sources = link.placement.nodes() - 1;
  return (sends + sources * link.receive_buffers) * message + sources * link.eager_messages * aligned(link.eager_bytes);
}

uint64_t LaneChannel::gpu_bytes_needed(const GroupLink& link) {
  const uint64_t sends = uint64_t{link.placement.ranks_on(link.placement.own_node)} * link.send_buffers;
  return (sends + uint64_t{link.placement.nodes() - 1} * link.receive_buffers) * aligned(link.message_bytes);
}

std::byte* LaneChannel::next_entries(Memory* memory) const {
  return memory->gpu == nullptr ? nullptr : std::exchange(memory->gpu, memory->gpu + aligned(link_.message_bytes));
}

void LaneChannel::make_send_slots(Memory* memory) {
  const uint32_t receive_slots = (link_.placement.nodes() - 1) * (link_.receive_buffers + link_.eager_messages);
  const uint32_t count = own_ranks() * link_.send_buffers;
  send_slots_.resize(count);
  sends_ended_.reserve(count);
  uint32_t id = 0;
  for (uint32_t index = 0; index < own_ranks(); ++index) {
    ranks_.push_back(std::make_unique<RankQueues>(link_.send_buffers, receive_slots));
    for (uint32_t i = 0; i < link_.send_buffers; ++i, ++id) {
      SendSlot& slot = send_slots_[id];
      slot.channel = this;
      slot.id = id;
      slot.rank_index = index;
      slot.data = memory->host;
      memory->host += aligned(link_.message_bytes);
      slot.entries = next_entries(memory);
      (void)ranks_.back()->free.push(id);
    }
  }
}

void LaneChannel::make_receive_slots(Memory* memory) {
  const engine::Placement& placement = link_.placement;
  const uint32_t per_link = link_.receive_buffers + link_.eager_messages;
  receive_slots_.resize(uint64_t{placement.nodes() - 1} * per_link);
  receives_ended_.reserve(receive_slots_.size());
  uint32_t id = 0;
  for (uint32_t node = 0; node < placement.nodes(); ++node) {
    links_.push_back(nullptr);
    if (node == placement.own_node) {
      continue;
    }
    links_.back() = std::make_unique<PeerLink>(placement.ranks_on(node) * link_.send_buffers);
    PeerLink& from = *links_.back();
    from.channel = this;
    from.node = node;
    from.credits = link_.eager_messages;
    from.weight = lane_ == engine::FabricLane::kThroughput ? link_.weight : 1;
    for (CreditSlot& slot : from.credit_slots) {
      slot.from = &from;
    }
    for (uint32_t i = 0; i < per_link; ++i, ++id) {
      ReceiveSlot& slot = receive_slots_[id];
      slot.channel = this;
      slot.id = id;
      slot.from = &from;
      slot.eager = i >= link_.receive_buffers;
      slot.data = memory->host;
      memory->host += aligned(slot.eager ? link_.eager_bytes : link_.message_bytes);
      slot.entries = slot.eager ? nullptr : next_entries(memory);
      (slot.eager ? from.free_eager : from.free).push_back(id);
    }
  }
}

engine::SendBuffer LaneChannel::take(uint32_t rank) {
  RankQueues& own = queues(rank);
  uint32_t id = 0;
  if (!own.dropped.empty()) {
    id = own.dropped.back();
    own.dropped.pop_back();
  } else if (!own.free.pop(&id)) {
    return {};
  }
  const SendSlot& slot = send_slots_[id];
  return {.data = slot.data, .capacity = link_.message_bytes, .lane = lane_, .id = id, .entries = slot.entries};
}

void LaneChannel::send(uint32_t rank, const engine::SendBuffer& buffer, const engine::MessageHeader& header,
                       uint64_t bytes) {
  SendSlot& slot = send_slots_[buffer.id];
  slot.node = header.node;
  slot.header = WireHeadedMessage{};
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
  slot.header.lane = static_cast<uint32_t>(lane_);
  slot.header.bytes = static_cast<uint32_t>(std::min(bytes, link_.message_bytes));
  if (slot.entries != nullptr && header.kind != engine::MessageKind::kCounts) {
    // The head goes with the header, since UCX sends from one kind of memory.
    slot.header.head_bytes = engine::kMessageHeadBytes;
    slot.header.bytes -= std::min(slot.header.bytes, engine::kMessageHeadBytes);
    std::memcpy(slot.header.head.data(), slot.data, engine::kMessageHeadBytes);
  }
  (void)queues(rank).submitted.push(buffer.id);  // has room for every buffer
  surroundings_.waker->wake();
}

bool LaneChannel::receive(uint32_t rank, engine::Arrival* arrival) {
  uint32_t id = 0;
  if (!queues(rank).arrived.pop(&id)) {
    return false;
  }
  // Nobody writes the slot between its push to the rank and the rank's release.
  const ReceiveSlot& slot = receive_slots_[id];
  arrival->header = {.kind = static_cast<engine::MessageKind>(slot.header.kind),
                     .lane = lane_,
                     .op = slot.header.op,
                     .source_rank = slot.header.source_rank,
                     .node = slot.from->node,
                     .targets = slot.header.targets,
                     .entries = slot.header.entries,
                     .sequence = slot.header.sequence,
                     .view = slot.header.view};
  arrival->data = slot.data;
  arrival->entries = slot.header.head_bytes != 0 ? slot.entries : nullptr;
  arrival->bytes = slot.header.bytes + slot.header.head_bytes;
  arrival->arrived_ns = slot.arrived_ns;
  arrival->id = id;
  return true;
}

void LaneChannel::release(uint32_t rank, const engine::Arrival& arrival) {
  (void)queues(rank).released.push(arrival.id);  // has room for every receive slot
  // Pairs with the lane's thread, which stores it before it looks at the queue for the last time and sleeps.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (wanted_.load(std::memory_order_seq_cst) != 0) {
    surroundings_.waker->wake();
  }
}

}  // namespace expertd::fabric
