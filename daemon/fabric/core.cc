// SPDX-License-Identifier: Apache-2.0
#include "daemon/fabric/core.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "daemon/base/clock.h"
#include "daemon/base/log.h"

namespace expertd::fabric {

std::string hex(uint64_t value) {
  std::array<char, 17> text{};
  std::snprintf(text.data(), text.size(), "%016llx", static_cast<unsigned long long>(value));
  return text.data();
}

const char* drop_cause_name(DropCause cause) {
  switch (cause) {
    case DropCause::kMalformed:
      return "malformed";
    case DropCause::kVersion:
      return "version";
    case DropCause::kUnknownNode:
      return "unknown_node";
    case DropCause::kUnknownGroup:
      return "unknown_group";
    case DropCause::kEpoch:
      return "epoch";
    case DropCause::kBadField:
      return "bad_field";
    case DropCause::kOverrun:
      return "overrun";
  }
  return "unknown";
}

Peer* Core::find_peer(uint64_t node_id) const {
  // The youngest first: older ones of the same daemon are lost.
  for (auto peer = peers_.rbegin(); peer != peers_.rend(); ++peer) {
    if ((*peer)->node_id() == node_id) {
      return peer->get();
    }
  }
  return nullptr;
}

bool Core::run_once(uint64_t now_ns) {
  ++turns_;
  bool moved = progress(LaneKind::kLatency);
  // A heartbeat announces no more to come soon, so that the thread need not spin for it.
  (void)progress(LaneKind::kControl);
  moved |= progress(LaneKind::kThroughput);
  for (RailLoads& loads : loads_) {
    loads.look(now_ns);
  }
  for (const std::unique_ptr<GroupChannel>& group : groups_) {
    moved |= group->begin_turn();
  }
  moved |= start_receives();
  for (const std::unique_ptr<GroupChannel>& group : groups_) {
    moved |= group->end_turn();
  }
  moved |= probes_.run_once(now_ns);
  if (attention_ || now_ns >= next_ns_) {
    attention_ = false;
    tend_peers(now_ns);
    moved |= lose_failed();
  }
  moved |= forget_closed();
  return moved;
}

bool Core::progress(LaneKind lane) {
  bool moved = false;
  for (const std::unique_ptr<Lane>& rail : lanes_[static_cast<uint32_t>(lane)]) {
    moved |= rail->progress();
  }
  return moved;
}

bool Core::start_receives() {
  if (std::none_of(groups_.begin(), groups_.end(), [](const auto& group) { return group->is_waiting(); })) {
    return false;
  }
  bool moved = false;
  for (const std::unique_ptr<Peer>& peer : peers_) {
    moved |= peer->share(engine::FabricLane::kLatency).run();
    moved |= peer->share(engine::FabricLane::kThroughput).run();
  }
  return moved;
}

void Core::tend_peers(uint64_t now_ns) {
  next_ns_ = UINT64_MAX;
  for (const std::unique_ptr<Peer>& peer : peers_) {
    if (!peer->lost()) {
      peer->tend(now_ns);
      next_ns_ = std::min(next_ns_, peer->next_ns());
    }
  }
}

bool Core::lose_failed() {
  bool moved = false;
  for (size_t i = 0; i < peers_.size(); ++i) {
    if (peers_[i]->failed() && !peers_[i]->lost()) {
      lose(*peers_[i]);
      moved = true;
    }
  }
  return moved;
}

void Core::lose(Peer& peer) {
  for (const std::unique_ptr<GroupChannel>& group : groups_) {
    group->lose(&peer);
  }
  probes_.lose(&peer);
  peer.lose();
  ++lost_[static_cast<uint32_t>(peer.cause())];
  if (stopping_) {
    return;
  }
  base::log_warn("a node is lost", {{"node", peer.name()},
                                    {"node_id", hex(peer.node_id())},
                                    {"cause", loss_cause_name(peer.cause())},
                                    {"detail", peer.detail()}});
  if (setting_.observer != nullptr) {
    setting_.observer->node_lost(peer.node_id(), peer.name(), peer.cause(), peer.detail());
  }
}

// A lost peer stays for the snapshot until the same daemon is connected anew; of restarted ones, whose id is another,
// the list keeps no more than kMaxNodes.
bool Core::forget_closed() {
  bool moved = false;
  for (size_t i = 0; i < groups_.size();) {
    if (!groups_[i]->drained()) {
      ++i;
      continue;
    }
    groups_[i]->let_peers_go();
    groups_.erase(groups_.begin() + static_cast<std::ptrdiff_t>(i));
    moved = true;
  }
  for (size_t i = 0; i < peers_.size();) {
    Peer& peer = *peers_[i];
    const bool gone = peer.lost() && peer.closed() && peer.groups == 0;
    if (gone && (peers_.size() > 2 * kMaxNodes || find_peer(peer.node_id()) != &peer)) {
      for (uint32_t lane = 0; lane < engine::kFabricLanes; ++lane) {
        forgotten_[lane] += peer.traffic()[lane];
      }
      peers_.erase(peers_.begin() + static_cast<std::ptrdiff_t>(i));
      moved = true;
    } else {
      ++i;
    }
  }
  return moved;
}

bool Core::prepare_sleep() {
  if (attention_ || std::any_of(groups_.begin(), groups_.end(), [](const auto& group) { return group->has_work(); })) {
    return false;
  }
  return std::all_of(lanes_.begin(), lanes_.end(), [](const auto& rails) {
    return std::all_of(rails.begin(), rails.end(), [](const std::unique_ptr<Lane>& lane) { return lane->arm(); });
  });
}

void Core::was_late(uint64_t gap_ns) {
  for (const std::unique_ptr<Peer>& peer : peers_) {
    peer->forgive(gap_ns);
  }
}

void Core::beat(uint64_t now_ns) {
  if (setting_.observer != nullptr) {
    setting_.observer->beat(now_ns);
  }
}

void Core::begin_stop() {
  stopping_ = true;
  stop_flush_until_ns_ = base::now_ns() + setting_.stop_flush_ns;
  open_groups_.clear();
  probes_.end_all();
  for (const std::unique_ptr<GroupChannel>& group : groups_) {
    group->begin_close();
  }
}

bool Core::quiet(uint64_t now_ns) {
  if (!groups_.empty() && now_ns < stop_flush_until_ns_) {
    return false;
  }
  if (!said_bye_) {
    said_bye_ = true;
    for (const std::unique_ptr<Peer>& peer : peers_) {
      if (!peer->lost()) {
        peer->say_bye();
      }
    }
    return false;
  }
  bool closed = groups_.empty() && probes_.quiet();
  for (const std::unique_ptr<Peer>& peer : peers_) {
    if (!peer->lost() && (!peer->signals_under_way() || now_ns >= stop_flush_until_ns_)) {
      peer->fail(LossCause::kDisconnected, "this daemon stops");
    }
    closed = peer->closed() && closed;
  }
  return closed;
}

// Counted, and told to nobody: whoever sends rubbish must not fill the log. `detail` says that only a broken daemon
// sends such a thing, which costs it the connection.
bool Core::drop(DropCause cause, Peer* from, const std::string& detail) {
  ++dropped_[static_cast<uint32_t>(cause)];
  if (from != nullptr) {
    from->fail(LossCause::kGarbage, "it sent a message that is " + std::string(drop_cause_name(cause)) + ": " + detail);
  }
  return false;
}

Peer* Core::sender(const Incoming& message, const WirePrefix& prefix, DropCause* cause) {
  *cause = DropCause::kMalformed;
  if (prefix.magic != kWireMagic) {
    return nullptr;
  }
  *cause = DropCause::kVersion;
  if (prefix.version != kWireVersion) {
    return nullptr;
  }
  *cause = DropCause::kMalformed;
  if (prefix.type != message.type) {
    return nullptr;
  }
  *cause = DropCause::kUnknownNode;
  Peer* peer = find_peer(prefix.source_node);
  return peer == nullptr || peer->lost() || peer->failed() ? nullptr : peer;
}

bool Core::incoming(const Incoming& message) {
  if (stopping_) {
    return false;
  }
  WirePrefix prefix;
  if (message.header_bytes < sizeof(prefix)) {
    return drop(DropCause::kMalformed);
  }
  std::memcpy(&prefix, message.header, sizeof(prefix));
  DropCause cause = DropCause::kMalformed;
  Peer* from = sender(message, prefix, &cause);
  if (from == nullptr) {
    return drop(cause);
  }
  switch (static_cast<WireType>(message.type)) {
    case kWireMessage:
      return take_message(message, from);
    case kWireCredit:
      return take_credit(message, from);
    case kWireHeartbeat:
      return take_heartbeat(message, from);
    case kWireGone:
      return take_gone(message, from);
    case kWireView:
      return take_view(message, from);
    case kWireProbe:
      return take_probe(message, from);
  }
  return drop(DropCause::kMalformed);
}

GroupChannel* Core::group_of(uint64_t key, uint32_t epoch, const Peer* from, uint32_t* node, DropCause* cause) {
  *cause = DropCause::kUnknownGroup;
  const auto found = open_groups_.find(key);
  if (found == open_groups_.end()) {
    return nullptr;
  }
  GroupChannel* group = found->second;
  *cause = DropCause::kEpoch;
  if (group->link().epoch != epoch) {
    return nullptr;
  }
  // A group of this key that the sender is no member of is unknown to it as well.
  *cause = DropCause::kUnknownGroup;
  const std::vector<Peer*>& peers = group->peers();
  const auto member = std::find(peers.begin(), peers.end(), from);
  *node = static_cast<uint32_t>(member - peers.begin());
  return member == peers.end() ? nullptr : group;
}

bool Core::take_message(const Incoming& message, Peer* from) {
  WireMessage header;
  if (message.header_bytes != sizeof(header)) {
    return drop(DropCause::kMalformed, from, "the header's size");
  }
  std::memcpy(&header, message.header, sizeof(header));
  uint32_t node = 0;
  DropCause cause = DropCause::kUnknownGroup;
  GroupChannel* group = group_of(header.group_key, header.epoch, from, &node, &cause);
  if (group == nullptr) {
    return drop(cause);
  }
  bool kept = false;
  const char* detail = nullptr;
  if (!group->accept(node, header, message, &kept, &cause, &detail)) {
    return drop(cause, from, detail);
  }
  return kept;
}

bool Core::take_credit(const Incoming& message, Peer* from) {
  WireCredit header;
  if (message.header_bytes != sizeof(header) || message.bytes != 0) {
    return drop(DropCause::kMalformed, from, "the header's size");
  }
  std::memcpy(&header, message.header, sizeof(header));
  uint32_t node = 0;
  DropCause cause = DropCause::kUnknownGroup;
  GroupChannel* group = group_of(header.group_key, header.epoch, from, &node, &cause);
  if (group == nullptr) {
    return drop(cause);
  }
  if (!group->credit(node, header) || lane_of(static_cast<engine::FabricLane>(header.lane)) != message.lane) {
    return drop(DropCause::kBadField, from, "credits that were never given out");
  }
  return false;
}

bool Core::take_gone(const Incoming& message, Peer* from) {
  WireGone header;
  if (message.header_bytes != sizeof(header) || message.bytes != 0 || message.lane != LaneKind::kControl) {
    return drop(DropCause::kMalformed, from, "the header's size");
  }
  std::memcpy(&header, message.header, sizeof(header));
  uint32_t node = 0;
  DropCause cause = DropCause::kUnknownGroup;
  GroupChannel* group = group_of(header.group_key, header.epoch, from, &node, &cause);
  if (group == nullptr) {
    return drop(cause);
  }
  if (!group->hear_gone(node, header)) {
    return drop(DropCause::kBadField, from, "a rank that is gone already, or is not its own");
  }
  if (setting_.observer != nullptr) {
    setting_.observer->rank_gone(header.group_key, header.rank, header.through);
  }
  return false;
}

bool Core::take_view(const Incoming& message, Peer* from) {
  WireView header;
  if (message.header_bytes != sizeof(header) || message.bytes != 0 || message.lane != LaneKind::kControl) {
    return drop(DropCause::kMalformed, from, "the header's size");
  }
  std::memcpy(&header, message.header, sizeof(header));
  uint32_t node = 0;
  DropCause cause = DropCause::kUnknownGroup;
  if (group_of(header.group_key, header.epoch, from, &node, &cause) == nullptr) {
    return drop(cause);
  }
  if (header.kind == 0 || header.kind > engine::kViewKinds) {
    return drop(DropCause::kBadField, from, "the kind of a message about views");
  }
  if (setting_.observer != nullptr) {
    setting_.observer->view_message(header.group_key, node, view_message_of(header));
  }
  return false;
}

bool Core::take_heartbeat(const Incoming& message, Peer* from) {
  WireHeartbeat header;
  if (message.header_bytes != sizeof(header) || message.bytes != 0 || message.lane != LaneKind::kControl) {
    return drop(DropCause::kMalformed, from, "the header's size");
  }
  std::memcpy(&header, message.header, sizeof(header));
  if (header.destination_node != setting_.node_id) {
    return drop(DropCause::kUnknownNode);
  }
  if (header.signal < kSignalPing || header.signal > kSignalBye) {
    return drop(DropCause::kBadField, from, "the signal");
  }
  const bool first = from->heard(header, base::now_ns());
  if (header.signal == kSignalPong && from->rtt_ns() != 0) {
    rtt_.observe(from->rtt_ns());
  }
  attention_ = true;  // an answer is due
  if (first) {
    base::log_info("a node is up", {{"node", from->name()}, {"node_id", hex(from->node_id())}});
    if (setting_.observer != nullptr) {
      setting_.observer->node_up(from->node_id(), from->name());
    }
  }
  return false;
}

FabricSnapshot Core::snapshot() const {
  FabricSnapshot snapshot{
      .peers = {}, .rails = {}, .dropped = dropped_, .lost = lost_, .traffic = forgotten_, .rtt = rtt_};
  for (const std::unique_ptr<Peer>& peer : peers_) {
    for (uint32_t lane = 0; lane < engine::kFabricLanes; ++lane) {
      snapshot.traffic[lane] += peer->traffic()[lane];
    }
    if (find_peer(peer->node_id()) == peer.get()) {
      snapshot.peers.push_back(peer->snapshot());
    }
  }
  for (const std::unique_ptr<GroupChannel>& group : groups_) {
    ++(group->closing() ? snapshot.groups_closing : snapshot.groups);
    snapshot.memory_bytes += group->memory_bytes();
  }
  for (const auto lane : {engine::FabricLane::kLatency, engine::FabricLane::kThroughput}) {
    const RailLoads& loads = loads_[static_cast<uint32_t>(lane)];
    for (uint32_t rail = 0; rail < loads.rails(); ++rail) {
      snapshot.rails.push_back({lane_of(lane), lanes_[static_cast<uint32_t>(lane_of(lane))][rail]->devices(),
                                loads.sent_messages(rail), loads.sent_bytes(rail), loads.under_way_bytes(rail)});
    }
  }
  snapshot.turns = turns_;
  return snapshot;
}

}  // namespace expertd::fabric
