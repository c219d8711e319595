// SPDX-License-Identifier: Apache-2.0
// What the lane's thread does in a channel. Callbacks of UCX put what ended into a list; the turn acts on it.
#include <algorithm>
#include <bit>
#include <cstring>

#include "daemon/base/clock.h"
#include "daemon/fabric/lane_channel.h"

namespace expertd::fabric {

void LaneChannel::use_peers(std::vector<LanePeer*> peers) {
  peers_ = std::move(peers);
  for (size_t node = 0; node < peers_.size(); ++node) {
    if (peers_[node] != nullptr) {
      links_[node]->peer = peers_[node];
      peers_[node]->share().join(links_[node].get());
      ++peers_[node]->users;
    }
  }
}

void LaneChannel::let_peers_go() {
  for (size_t node = 0; node < peers_.size(); ++node) {
    if (peers_[node] != nullptr) {
      peers_[node]->share().leave(links_[node].get());
      --peers_[node]->users;
    }
  }
}

const char* LaneChannel::bad_field(uint32_t node, const WireHeadedMessage& header, const Incoming& incoming) const {
  const engine::Placement& placement = link_.placement;
  if (header.lane != static_cast<uint32_t>(lane_)) {
    return "lane";
  }
  if (header.kind < static_cast<uint32_t>(engine::MessageKind::kCounts) ||
      header.kind > static_cast<uint32_t>(engine::MessageKind::kSums)) {
    return "kind";
  }
  if (header.source_rank >= placement.ranks() || placement.node_of[header.source_rank] != node) {
    return "source_rank";
  }
  const uint32_t ranks = own_ranks();
  if (header.targets == 0 || (ranks < 64 && header.targets >> ranks != 0)) {
    return "targets";
  }
  if (header.credited != (incoming.rendezvous ? 0U : 1U)) {
    return "credited";
  }
  if (header.head_bytes != 0 &&
      (!incoming.rendezvous || header.kind == static_cast<uint32_t>(engine::MessageKind::kCounts) ||
       link_.message_bytes < header.head_bytes)) {
    return "head_bytes";
  }
  const uint64_t most = incoming.rendezvous ? link_.message_bytes - header.head_bytes : link_.eager_bytes;
  const uint64_t carried = incoming.rendezvous ? std::max(header.bytes, 1U) : header.bytes;
  return header.bytes > most || incoming.bytes != carried ? "bytes" : nullptr;
}

bool LaneChannel::accept(uint32_t node, const WireHeadedMessage& header, const Incoming& incoming, bool* kept,
                         DropCause* cause, const char** detail) {
  *detail = bad_field(node, header, incoming);
  if (*detail != nullptr) {
    *cause = DropCause::kBadField;
    return false;
  }
  PeerLink& from = *links_[node];
  *cause = DropCause::kOverrun;
  if (incoming.rendezvous) {
    // Received in a turn, so that nothing of UCX is called while it calls.
    if (from.deferred_count == from.deferred_max || !from.deferred.push({header, incoming.data, incoming.worker})) {
      *detail = "deferred messages";
      return false;
    }
    from.peer->traffic().deferred += from.deferred_count >= from.free.size() ? 1 : 0;
    ++from.deferred_count;
    ++deferred_;
    *kept = true;
    return true;
  }
  if (from.free_eager.empty()) {
    *detail = "eager messages";
    return false;
  }
  ReceiveSlot& slot = receive_slots_[from.free_eager.back()];
  from.free_eager.pop_back();
  slot.header = header;
  if (header.bytes != 0) {
    std::memcpy(slot.data, incoming.data, header.bytes);
  }
  from.peer->share().charge(from, header.bytes);
  deliver(slot);
  return true;
}

bool LaneChannel::credit(uint32_t node, const WireCredit& header) {
  PeerLink& from = *links_[node];
  if (header.lane != static_cast<uint32_t>(lane_) || header.credits > link_.eager_messages - from.credits) {
    return false;
  }
  from.credits += header.credits;
  return true;
}

void LaneChannel::forget(uint32_t rank) {
  RankQueues& own = queues(rank);
  own.forgotten = true;
  for (uint32_t id = 0; own.arrived.pop(&id);) {
    ReceiveSlot& slot = receive_slots_[id];
    if (--slot.holders == 0) {
      give_back(slot);
    }
  }
}

bool LaneChannel::begin_turn() {
  bool moved = end_receives();
  moved |= end_sends();
  moved |= pump_released();
  moved |= pump_submitted();
  return moved;
}

bool LaneChannel::end_turn() {
  bool moved = end_receives();                          // those that were there at once
  wanted_.store(deferred_, std::memory_order_seq_cst);  // pairs with the load in release()
  moved |= send_credits();
  wake_ranks();
  return moved;
}

bool LaneChannel::has_work() const {
  return std::any_of(ranks_.begin(), ranks_.end(), [](const std::unique_ptr<RankQueues>& rank) {
    return !rank->submitted.empty() || !rank->released.empty();
  });
}

bool LaneChannel::pump_released() {
  bool moved = false;
  for (const std::unique_ptr<RankQueues>& rank : ranks_) {
    uint32_t id = 0;
    while (rank->released.pop(&id)) {
      moved = true;
      ReceiveSlot& slot = receive_slots_[id];
      if (--slot.holders == 0) {
        give_back(slot);
      }
    }
  }
  return moved;
}

void LaneChannel::give_back(ReceiveSlot& slot) {
  if (slot.eager) {
    slot.from->free_eager.push_back(slot.id);
    ++slot.from->credits_owed;
  } else {
    slot.from->free.push_back(slot.id);
  }
}

bool LaneChannel::pump_submitted() {
  bool moved = false;
  for (const std::unique_ptr<RankQueues>& rank : ranks_) {
    uint32_t id = 0;
    while (rank->submitted.pop(&id)) {
      moved = true;
      start_send(send_slots_[id]);
    }
  }
  return moved;
}

void LaneChannel::start_send(SendSlot& slot) {
  LanePeer* peer = slot.node < peers_.size() ? peers_[slot.node] : nullptr;
  if (peer == nullptr || peer->lost()) {
    end_send(slot, UCS_ERR_NOT_CONNECTED);
    return;
  }
  PeerLink& to = *links_[slot.node];
  const bool headed = slot.header.head_bytes != 0;
  const bool eager = !headed && slot.header.bytes <= link_.eager_bytes && to.credits > 0;
  slot.header.credited = eager ? 1 : 0;
  to.credits -= eager ? 1 : 0;
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS |
                       UCP_OP_ATTR_FIELD_MEMORY_TYPE;
  param.flags = eager ? UCP_AM_SEND_FLAG_EAGER : UCP_AM_SEND_FLAG_RNDV;
  param.memory_type = headed ? entries_type_ : UCS_MEMORY_TYPE_HOST;
  param.cb.send = on_sent;
  param.user_data = &slot;
  const size_t bytes = eager ? slot.header.bytes : std::max(slot.header.bytes, 1U);
  RailLoads& loads = *surroundings_.loads;
  slot.rail = loads.choose(link_.devices[slot.rank_index].value, bytes);
  loads.started(slot.rail, bytes);
  LaneTraffic& traffic = peer->traffic();
  ++traffic.sent_messages;
  traffic.sent_bytes += slot.header.bytes;
  ++traffic.in_flight;
  ++sends_in_flight_;
  const ucs_status_ptr_t sent =
      ucp_am_send_nbx(peer->endpoint(slot.rail), kWireMessage, &slot.header,
                      sizeof(WireMessage) + slot.header.head_bytes, headed ? slot.entries : slot.data, bytes, &param);
  if (!UCS_PTR_IS_PTR(sent)) {
    --sends_in_flight_;
    --traffic.in_flight;
    loads.ended(slot.rail, bytes);
    end_send(slot, UCS_PTR_RAW_STATUS(sent));
  }
}

void LaneChannel::on_sent(void* request, ucs_status_t status, void* slot) {
  SendSlot* of = static_cast<SendSlot*>(slot);
  of->status = status;
  of->channel->sends_ended_.push_back(of);
  ucp_request_free(request);
}

bool LaneChannel::end_sends() {
  // end_send() starts nothing, so the list does not grow under the loop.
  for (SendSlot* slot : sends_ended_) {
    --sends_in_flight_;
    --peers_[slot->node]->traffic().in_flight;
    const uint64_t bytes = slot->header.credited != 0 ? slot->header.bytes : std::max(slot->header.bytes, 1U);
    surroundings_.loads->ended(slot->rail, bytes);
    end_send(*slot, slot->status);
  }
  const bool moved = !sends_ended_.empty();
  sends_ended_.clear();
  return moved;
}

void LaneChannel::end_send(SendSlot& slot, ucs_status_t status) {
  LanePeer* peer = slot.node < peers_.size() ? peers_[slot.node] : nullptr;
  if (status != UCS_OK && peer != nullptr) {
    peer->count_failed_send();
    // A lane that loses one message loses the operation with it, so the peer cannot stay.
    peer->fail(LossCause::kTransport, std::string("a send to it failed: ") + ucs_status_string(status));
  }
  (void)ranks_[slot.rank_index]->free.push(slot.id);  // has room for every buffer
  wake_rank(slot.rank_index);
}

uint64_t LaneChannel::PeerLink::waiting_bytes() const {
  if (deferred_count == 0 || free.empty()) {
    return 0;
  }
  return std::max(deferred.front()->header.bytes, 1U);
}

void LaneChannel::PeerLink::start_waiting() {
  Deferred next;
  (void)deferred.pop(&next);
  --deferred_count;
  --channel->deferred_;
  channel->start_receive(*this, next);
}

void LaneChannel::start_receive(PeerLink& from, const Deferred& deferred) {
  ReceiveSlot& slot = receive_slots_[from.free.back()];
  from.free.pop_back();
  slot.header = deferred.header;
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_MEMORY_TYPE;
  std::byte* target = slot.data;
  if (slot.header.head_bytes != 0) {
    std::memcpy(slot.data, slot.header.head.data(), slot.header.head_bytes);
    target = slot.entries != nullptr ? slot.entries : slot.data + slot.header.head_bytes;
  }
  param.memory_type = target == slot.entries ? entries_type_ : UCS_MEMORY_TYPE_HOST;
  param.cb.recv_am = on_received;
  param.user_data = &slot;
  ++receives_in_flight_;
  const ucs_status_ptr_t received =
      ucp_am_recv_data_nbx(deferred.worker, deferred.descriptor, target, std::max(slot.header.bytes, 1U), &param);
  if (!UCS_PTR_IS_PTR(received)) {
    slot.status = UCS_PTR_RAW_STATUS(received);
    receives_ended_.push_back(&slot);
  }
}

void LaneChannel::on_received(void* request, ucs_status_t status, size_t /*bytes*/, void* slot) {
  ReceiveSlot* of = static_cast<ReceiveSlot*>(slot);
  of->status = status;
  of->channel->receives_ended_.push_back(of);
  ucp_request_free(request);
}

bool LaneChannel::end_receives() {
  for (ReceiveSlot* slot : receives_ended_) {
    --receives_in_flight_;
    slot->from->peer->share().ended(std::max(slot->header.bytes, 1U));
    end_receive(*slot, slot->status);
  }
  const bool moved = !receives_ended_.empty();
  receives_ended_.clear();
  return moved;
}

void LaneChannel::end_receive(ReceiveSlot& slot, ucs_status_t status) {
  if (status == UCS_OK && !closing_) {
    deliver(slot);
    return;
  }
  if (status != UCS_OK) {
    slot.from->peer->fail(LossCause::kTransport,
                          std::string("a message of it could not be received: ") + ucs_status_string(status));
  }
  slot.from->free.push_back(slot.id);
}

void LaneChannel::deliver(ReceiveSlot& slot) {
  LaneTraffic& traffic = slot.from->peer->traffic();
  ++traffic.received_messages;
  traffic.received_bytes += slot.header.bytes;
  slot.arrived_ns = base::now_ns();
  slot.holders = static_cast<uint32_t>(std::popcount(slot.header.targets));
  for (uint64_t targets = slot.header.targets; targets != 0; targets &= targets - 1) {
    const uint32_t index = static_cast<uint32_t>(std::countr_zero(targets));
    if (ranks_[index]->forgotten) {
      --slot.holders;
      continue;
    }
    (void)ranks_[index]->arrived.push(slot.id);  // has room for every receive slot
    wake_rank(index);
  }
  if (slot.holders == 0) {
    give_back(slot);
  }
}

bool LaneChannel::send_credits() {
  bool moved = false;
  const uint32_t worth_telling = std::max(link_.eager_messages / 2, 1U);
  for (const std::unique_ptr<PeerLink>& link : links_) {
    if (link == nullptr || link->credits_owed < worth_telling || link->peer->lost() || closing_) {
      continue;
    }
    for (CreditSlot& slot : link->credit_slots) {
      if (!slot.under_way) {
        send_credit(*link, slot);
        moved = true;
        break;
      }
    }
  }
  return moved;
}

void LaneChannel::send_credit(PeerLink& to, CreditSlot& slot) {
  slot.header = WireCredit{};
  slot.header.prefix.source_node = surroundings_.own_node_id;
  slot.header.group_key = link_.key;
  slot.header.epoch = link_.epoch;
  slot.header.lane = static_cast<uint32_t>(lane_);
  slot.header.credits = to.credits_owed;
  to.credits_owed = 0;
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS;
  param.flags = UCP_AM_SEND_FLAG_EAGER;
  param.cb.send = on_credit_sent;
  param.user_data = &slot;
  const ucs_status_ptr_t sent =
      ucp_am_send_nbx(to.peer->endpoint(), kWireCredit, &slot.header, sizeof(slot.header), nullptr, 0, &param);
  if (UCS_PTR_IS_PTR(sent)) {
    slot.under_way = true;
    ++credits_in_flight_;
  } else if (UCS_PTR_IS_ERR(sent)) {
    to.peer->fail(LossCause::kTransport,
                  std::string("credits could not be sent to it: ") + ucs_status_string(UCS_PTR_STATUS(sent)));
  }
}

void LaneChannel::on_credit_sent(void* request, ucs_status_t status, void* slot) {
  CreditSlot& of = *static_cast<CreditSlot*>(slot);
  of.under_way = false;
  --of.from->channel->credits_in_flight_;
  if (status != UCS_OK) {
    of.from->peer->fail(LossCause::kTransport,
                        std::string("credits could not be sent to it: ") + ucs_status_string(status));
  }
  ucp_request_free(request);
}

void LaneChannel::lose(const LanePeer* peer) {
  for (const std::unique_ptr<PeerLink>& link : links_) {
    if (link == nullptr || (peer != nullptr && link->peer != peer)) {
      continue;
    }
    Deferred next;
    while (link->deferred.pop(&next)) {
      --link->deferred_count;
      --deferred_;
      ucp_am_data_release(next.worker, next.descriptor);
    }
  }
  wanted_.store(deferred_, std::memory_order_seq_cst);
}

void LaneChannel::begin_close() {
  closing_ = true;
  lose(nullptr);
}

bool LaneChannel::drained() const {
  return closing_ && sends_in_flight_ == 0 && receives_in_flight_ == 0 && credits_in_flight_ == 0 && !has_work();
}

void LaneChannel::wake_ranks() {
  for (; wake_ != 0; wake_ &= wake_ - 1) {
    if (!closing_) {
      surroundings_.wake->wake(link_.devices[static_cast<uint32_t>(std::countr_zero(wake_))]);
    }
  }
}

}  // namespace expertd::fabric
