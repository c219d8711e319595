// SPDX-License-Identifier: Apache-2.0
// What control threads ask of a data lane: rails, connections, groups, figures.
#include <algorithm>

#include "daemon/base/clock.h"
#include "daemon/fabric/lane_core.h"

namespace expertd::fabric {

base::Status LaneCore::open_rails(const LaneOptionList& options) {
  base::Result<Rails> rails = fabric::open_rails(kind(), options, this);
  if (!rails.is_ok()) {
    return rails.status();
  }
  rails_ = std::move(rails).value();
  loads_.use_rails(static_cast<uint32_t>(rails_.size()));
  return base::Status::ok();
}

base::Status LaneCore::connect(const NodeIdentity& identity, ConnectionId connection) {
  base::Result<std::unique_ptr<LanePeer>> peer = LanePeer::create(
      identity, connection, rails_,
      {.kind = kind(), .window_bytes = setting_.window_bytes * rails_.size(), .crossing = setting_.crossing});
  if (!peer.is_ok()) {
    return peer.status();
  }
  peers_.push_back(std::move(peer).value());
  settling_.stir(base::now_ns());
  return base::Status::ok();
}

void LaneCore::tell_again(ConnectionId connection) {
  for (const std::unique_ptr<LanePeer>& peer : peers_) {
    if (peer->connection() == connection && peer->failed()) {
      peer->fail_again();
    }
  }
}

base::Status LaneCore::open(const std::shared_ptr<GroupChannel>& channel) {
  const GroupLink& link = channel->link();
  std::vector<LanePeer*> peers;
  for (uint32_t node = 0; node < link.placement.nodes(); ++node) {
    LanePeer* peer = node == link.placement.own_node ? nullptr : find_peer(link.node_ids[node]);
    if (node != link.placement.own_node && (peer == nullptr || peer->lost() || peer->failed())) {
      return not_connected(link, node);
    }
    peers.push_back(peer);
  }
  part(channel).use_peers(std::move(peers));
  open_groups_.add(channel.get());
  groups_.push_back(channel);
  return base::Status::ok();
}

void LaneCore::close(GroupChannel* channel) {
  if (open_groups_.remove(channel)) {
    channel->lane(setting_.lane).begin_close();
  }
}

LaneSnapshot LaneCore::snapshot() const {
  LaneSnapshot snapshot{.peers = {}, .traffic = forgotten_, .rails = {}, .dropped = dropped_, .turns = turns_};
  for (const std::unique_ptr<LanePeer>& peer : peers_) {
    snapshot.traffic += peer->traffic();
    snapshot.peers.push_back({peer->connection(), peer->traffic(), peer->sends_failed()});
  }
  for (uint32_t rail = 0; rail < loads_.rails(); ++rail) {
    snapshot.rails.push_back({kind(), rails_[rail]->devices(), loads_.sent_messages(rail), loads_.sent_bytes(rail),
                              loads_.under_way_bytes(rail)});
  }
  return snapshot;
}

}  // namespace expertd::fabric
