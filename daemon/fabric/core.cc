// SPDX-License-Identifier: Apache-2.0
#include "daemon/fabric/core.h"

#include <algorithm>
#include <cstring>

#include "daemon/base/clock.h"
#include "daemon/base/log.h"

namespace expertd::fabric {

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
  now_ns_ = now_ns;
  // A heartbeat announces no more to come soon, so that the thread need not spin for it.
  const uint64_t arrived_before = arrived_;
  if (rails_.front()->progress() && arrived_ == arrived_before) {
    settling_.stir(now_ns);
  }
  bool moved = hear_lanes();
  for (const std::shared_ptr<GroupChannel>& group : groups_) {
    moved |= group->control().run_once();
  }
  if (attention_ || now_ns >= next_ns_) {
    attention_ = false;
    tend_peers(now_ns);
    moved |= lose_failed();
  }
  moved |= forget_closed();
  return moved;
}

bool Core::hear_lanes() {
  if (setting_.crossing->reports.empty()) {
    return false;
  }
  const std::vector<LaneReport> reports = setting_.crossing->reports.take();
  // A peer that stops says so before it closes the endpoints of its lanes: what it said is here by now, and is heard
  // before what became of the endpoints.
  while (rails_.front()->progress()) {
  }
  for (const LaneReport& report : reports) {
    hear(report);
  }
  return true;
}

void Core::hear(const LaneReport& report) {
  for (const std::unique_ptr<Peer>& peer : peers_) {
    if (peer->connection() != report.connection) {
      continue;
    }
    if (report.kind == LaneReport::Kind::kFailed) {
      peer->fail(report.cause, report.detail);
    } else if (peer->lanes_to_let_go > 0 && --peer->lanes_to_let_go == 0) {
      tell_lost(*peer);
    }
  }
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
  peer.lose();
  peer.lanes_to_let_go = engine::kFabricLanes;
  setting_.crossing->let_go(peer.connection());
}

// Not before no lane takes anything of it any more.
void Core::tell_lost(const Peer& peer) {
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
    if (!groups_[i]->control().drained()) {
      ++i;
      continue;
    }
    groups_[i]->control().let_peers_go();
    groups_.erase(groups_.begin() + static_cast<std::ptrdiff_t>(i));
    moved = true;
  }
  for (size_t i = 0; i < peers_.size();) {
    Peer& peer = *peers_[i];
    const bool gone = peer.lost() && peer.closed() && peer.users == 0 && peer.lanes_to_let_go == 0;
    if (gone && (peers_.size() > 2 * kMaxNodes || find_peer(peer.node_id()) != &peer)) {
      peers_.erase(peers_.begin() + static_cast<std::ptrdiff_t>(i));
      moved = true;
    } else {
      ++i;
    }
  }
  return moved;
}

bool Core::prepare_sleep() {
  return !attention_ && setting_.crossing->reports.empty() && rails_.front()->arm();
}

void Core::was_late(uint64_t gap_ns) {
  for (const std::unique_ptr<Peer>& peer : peers_) {
    peer->forgive(gap_ns);
  }
}

void Core::beat(uint64_t now_ns) {
  if (setting_.observer != nullptr) {
    setting_.observer->beat(LaneKind::kControl, now_ns);
  }
}

void Core::begin_stop() {
  stopping_ = true;
  stop_flush_until_ns_ = base::now_ns() + setting_.stop_flush_ns;
  open_groups_.clear();
  for (const std::shared_ptr<GroupChannel>& group : groups_) {
    group->control().begin_close();
  }
}

bool Core::quiet(uint64_t now_ns) {
  const bool flushed =
      groups_.empty() && setting_.crossing->lanes_flushed.load(std::memory_order_seq_cst) == engine::kFabricLanes;
  if (!flushed && now_ns < stop_flush_until_ns_) {
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
  bool closed = groups_.empty();
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

bool Core::incoming(const Incoming& message) {
  ++arrived_;
  if (stopping_) {
    return false;
  }
  WirePrefix prefix;
  DropCause cause = DropCause::kMalformed;
  if (!read_prefix(message, &prefix, &cause)) {
    return drop(cause);
  }
  Peer* from = find_peer(prefix.source_node);
  if (from == nullptr || from->lost() || from->failed()) {
    return drop(DropCause::kUnknownNode);
  }
  switch (static_cast<WireType>(message.type)) {
    case kWireHeartbeat:
      return take_heartbeat(message, from);
    case kWireGone:
      return take_gone(message, from);
    case kWireView:
      return take_view(message, from);
    case kWireMessage:
    case kWireCredit:
    case kWireProbe:
      break;
  }
  return drop(DropCause::kMalformed, from, "a kind of message that goes by the data lanes alone");
}

GroupChannel* Core::group_of(uint64_t key, uint32_t epoch, const Peer* from, uint32_t* node, DropCause* cause) {
  const auto peers_of = [](GroupChannel& group) -> const std::vector<Peer*>& { return group.control().peers(); };
  return open_groups_.find(key, epoch, from, peers_of, node, cause);
}

bool Core::take_gone(const Incoming& message, Peer* from) {
  WireGone header;
  if (!read_header(message, &header) || message.bytes != 0) {
    return drop(DropCause::kMalformed, from, "the header's size");
  }
  uint32_t node = 0;
  DropCause cause = DropCause::kUnknownGroup;
  GroupChannel* group = group_of(header.group_key, header.epoch, from, &node, &cause);
  if (group == nullptr) {
    return drop(cause);
  }
  if (!group->control().hear_gone(node, header)) {
    return drop(DropCause::kBadField, from, "a rank that is gone already, or is not its own");
  }
  if (setting_.observer != nullptr) {
    setting_.observer->rank_gone(header.group_key, header.rank, header.through);
  }
  return false;
}

bool Core::take_view(const Incoming& message, Peer* from) {
  WireView header;
  if (!read_header(message, &header) || message.bytes != 0) {
    return drop(DropCause::kMalformed, from, "the header's size");
  }
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
  if (!read_header(message, &header) || message.bytes != 0) {
    return drop(DropCause::kMalformed, from, "the header's size");
  }
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

ControlSnapshot Core::snapshot() const {
  ControlSnapshot snapshot{.peers = {}, .dropped = dropped_, .lost = lost_, .rtt = rtt_, .turns = turns_};
  for (const std::unique_ptr<Peer>& peer : peers_) {
    if (find_peer(peer->node_id()) == peer.get()) {
      snapshot.peers.emplace_back(peer->connection(), peer->snapshot());
    }
  }
  return snapshot;
}

}  // namespace expertd::fabric
