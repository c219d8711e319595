// SPDX-License-Identifier: Apache-2.0
// Turns of a data lane and what arrives on it. What control threads ask of it is in lane_core_control.cc.
#include "daemon/fabric/lane_core.h"

#include <algorithm>
#include <cstring>

#include "daemon/base/clock.h"

namespace expertd::fabric {

namespace {
constexpr uint64_t kClosingNs = 5'000'000;  // an endpoint that closes is looked at this often
}  // namespace

LanePeer* LaneCore::find_peer(uint64_t node_id) const {
  // The youngest first: older ones of the same daemon are lost.
  for (auto peer = peers_.rbegin(); peer != peers_.rend(); ++peer) {
    if ((*peer)->node_id() == node_id) {
      return peer->get();
    }
  }
  return nullptr;
}

bool LaneCore::run_once(uint64_t now_ns) {
  ++turns_;
  now_ns_ = now_ns;
  bool moved = let_lost_go();
  const uint64_t arrived_before = arrived_;
  bool progressed = false;
  for (const std::unique_ptr<Lane>& rail : rails_) {
    progressed |= rail->progress();
  }
  if (progressed && arrived_ == arrived_before) {
    settling_.stir(now_ns);
  }
  moved |= progressed;
  loads_.look(now_ns);
  for (const std::shared_ptr<GroupChannel>& group : groups_) {
    moved |= part(group).begin_turn();
  }
  moved |= start_receives();
  for (const std::shared_ptr<GroupChannel>& group : groups_) {
    moved |= part(group).end_turn();
  }
  moved |= probes_.run_once(now_ns);
  moved |= forget_closed();
  return moved;
}

bool LaneCore::start_receives() {
  if (std::none_of(groups_.begin(), groups_.end(), [this](const auto& group) { return part(group).is_waiting(); })) {
    return false;
  }
  bool moved = false;
  for (const std::unique_ptr<LanePeer>& peer : peers_) {
    moved |= peer->share().run();
  }
  return moved;
}

bool LaneCore::let_lost_go() {
  Mailbox<ConnectionId>& lost = setting_.crossing->to_let_go[static_cast<uint32_t>(setting_.lane)];
  if (lost.empty()) {
    return false;
  }
  for (const ConnectionId connection : lost.take()) {
    for (const std::unique_ptr<LanePeer>& peer : peers_) {
      if (peer->connection() == connection && !peer->lost()) {
        let_go(*peer);
      }
    }
    setting_.crossing->report({.kind = LaneReport::Kind::kLetGo, .connection = connection, .detail = {}});
  }
  return true;
}

void LaneCore::let_go(LanePeer& peer) {
  for (const std::shared_ptr<GroupChannel>& group : groups_) {
    part(group).lose(&peer);
  }
  probes_.lose(&peer);
  peer.let_go();
  closing_ = true;
}

// A lost peer stays for the snapshot until the same daemon is connected anew; of restarted ones, whose id is another,
// the list keeps no more than kMaxNodes.
bool LaneCore::forget_closed() {
  bool moved = false;
  for (size_t i = 0; i < groups_.size();) {
    if (!part(groups_[i]).drained()) {
      ++i;
      continue;
    }
    part(groups_[i]).let_peers_go();
    groups_.erase(groups_.begin() + static_cast<std::ptrdiff_t>(i));
    moved = true;
  }
  closing_ = false;
  for (size_t i = 0; i < peers_.size();) {
    LanePeer& peer = *peers_[i];
    const bool closed = peer.lost() && peer.closed();
    closing_ = closing_ || (peer.lost() && !closed);
    if (closed && peer.users == 0 && (peers_.size() > 2 * kMaxNodes || find_peer(peer.node_id()) != &peer)) {
      forgotten_ += peer.traffic();
      peers_.erase(peers_.begin() + static_cast<std::ptrdiff_t>(i));
      moved = true;
    } else {
      ++i;
    }
  }
  return moved;
}

bool LaneCore::prepare_sleep() {
  if (!setting_.crossing->to_let_go[static_cast<uint32_t>(setting_.lane)].empty() ||
      std::any_of(groups_.begin(), groups_.end(), [this](const auto& group) { return part(group).has_work(); })) {
    return false;
  }
  return std::all_of(rails_.begin(), rails_.end(), [](const std::unique_ptr<Lane>& rail) { return rail->arm(); });
}

uint64_t LaneCore::next_ns() {
  const uint64_t closing_ns = closing_ ? now_ns_ + kClosingNs : UINT64_MAX;
  return std::min({probes_.next_ns(), closing_ns, settling_.next_ns(now_ns_)});
}

void LaneCore::beat(uint64_t now_ns) {
  if (setting_.observer != nullptr) {
    setting_.observer->beat(kind(), now_ns);
  }
}

void LaneCore::begin_stop() {
  stopping_ = true;
  stop_flush_until_ns_ = base::now_ns() + setting_.stop_flush_ns;
  open_groups_.clear();
  probes_.end_all();
  for (const std::shared_ptr<GroupChannel>& group : groups_) {
    part(group).begin_close();
  }
}

// The control lane says bye when all lanes are flushed, and then loses its peers, which this one hears: a peer that saw
// this lane's endpoints close before it would take them for broken.
bool LaneCore::quiet(uint64_t now_ns) {
  if (!groups_.empty() && now_ns < stop_flush_until_ns_) {
    return false;
  }
  if (!flushed_) {
    flushed_ = true;
    setting_.crossing->lanes_flushed.fetch_add(1, std::memory_order_seq_cst);
  }
  return groups_.empty() && probes_.quiet() &&
         std::all_of(peers_.begin(), peers_.end(), [](const auto& peer) { return peer->lost() && peer->closed(); });
}

// Counted, and told to nobody: whoever sends rubbish must not fill the log. `detail` says that only a broken daemon
// sends such a thing, which costs it the connection.
bool LaneCore::drop(DropCause cause, LanePeer* from, const std::string& detail) {
  ++dropped_[static_cast<uint32_t>(cause)];
  if (from != nullptr) {
    from->fail(LossCause::kGarbage, "it sent a message that is " + std::string(drop_cause_name(cause)) + ": " + detail);
  }
  return false;
}

bool LaneCore::incoming(const Incoming& message) {
  ++arrived_;
  if (stopping_) {
    return false;
  }
  WirePrefix prefix;
  DropCause cause = DropCause::kMalformed;
  if (!read_prefix(message, &prefix, &cause)) {
    return drop(cause);
  }
  LanePeer* from = find_peer(prefix.source_node);
  if (from == nullptr || from->lost() || from->failed()) {
    return drop(DropCause::kUnknownNode);
  }
  switch (static_cast<WireType>(message.type)) {
    case kWireMessage:
      return take_message(message, from);
    case kWireCredit:
      return take_credit(message, from);
    case kWireProbe:
      return take_probe(message, from);
    case kWireHeartbeat:
    case kWireGone:
    case kWireView:
      break;
  }
  return drop(DropCause::kMalformed, from, "a kind of message that goes by the control lane alone");
}

GroupChannel* LaneCore::group_of(uint64_t key, uint32_t epoch, const LanePeer* from, uint32_t* node, DropCause* cause) {
  const auto peers_of = [this](GroupChannel& group) -> const std::vector<LanePeer*>& {
    return group.lane(setting_.lane).peers();
  };
  return open_groups_.find(key, epoch, from, peers_of, node, cause);
}

bool LaneCore::take_message(const Incoming& message, LanePeer* from) {
  WireHeadedMessage header;
  if (message.header_bytes != sizeof(WireMessage) && message.header_bytes != sizeof(header)) {
    return drop(DropCause::kMalformed, from, "the header's size");
  }
  std::memcpy(static_cast<void*>(&header), message.header, message.header_bytes);
  if (header.head_bytes != message.header_bytes - sizeof(WireMessage)) {
    return drop(DropCause::kMalformed, from, "the size of the head");
  }
  uint32_t node = 0;
  DropCause cause = DropCause::kUnknownGroup;
  GroupChannel* group = group_of(header.group_key, header.epoch, from, &node, &cause);
  if (group == nullptr) {
    return drop(cause);
  }
  bool kept = false;
  const char* detail = nullptr;
  if (!group->lane(setting_.lane).accept(node, header, message, &kept, &cause, &detail)) {
    return drop(cause, from, detail);
  }
  return kept;
}

bool LaneCore::take_credit(const Incoming& message, LanePeer* from) {
  WireCredit header;
  if (!read_header(message, &header) || message.bytes != 0) {
    return drop(DropCause::kMalformed, from, "the header's size");
  }
  uint32_t node = 0;
  DropCause cause = DropCause::kUnknownGroup;
  GroupChannel* group = group_of(header.group_key, header.epoch, from, &node, &cause);
  if (group == nullptr) {
    return drop(cause);
  }
  if (!group->lane(setting_.lane).credit(node, header)) {
    return drop(DropCause::kBadField, from, "credits that were never given out");
  }
  return false;
}

}  // namespace expertd::fabric
