// SPDX-License-Identifier: Apache-2.0
// What control threads ask of the core: its lane, connections, groups.
#include <algorithm>

#include "daemon/base/clock.h"
#include "daemon/fabric/core.h"
#include "daemon/fabric/lane_options.h"

namespace expertd::fabric {

base::Status Core::open_lane(const LaneOptionList& options) {
  base::Result<Rails> rails = open_rails(LaneKind::kControl, options, this);
  if (!rails.is_ok()) {
    return rails.status();
  }
  rails_ = std::move(rails).value();
  return base::Status::ok();
}

base::Status Core::check_new(const NodeIdentity& identity, bool* known) const {
  if (identity.node_id == 0 || identity.node_id == setting_.node_id) {
    return base::Status(EXPERTD_REASON_ARGUMENT_RANGE,
                        "node \"" + identity.name + "\" has no id or this daemon's own; every daemon makes its own");
  }
  for (const std::vector<std::string>& rails : identity.addresses) {
    const bool good = std::all_of(rails.begin(), rails.end(), [](const std::string& address) {
      return !address.empty() && address.size() <= kMaxAddressBytes;
    });
    if (rails.empty() || rails.size() > kMaxRails || !good) {
      return base::Status(EXPERTD_REASON_ARGUMENT_RANGE,
                          "node \"" + identity.name + "\" gave no address of a lane, or one that is too long");
    }
  }
  const Peer* last = find_peer(identity.node_id);
  *known = last != nullptr && !last->lost() && !last->failed();
  if (*known) {
    return base::Status::ok();
  }
  const auto living = std::count_if(peers_.begin(), peers_.end(), [](const auto& peer) { return !peer->lost(); });
  if (living + 1 >= kMaxNodes) {
    return base::Status(EXPERTD_REASON_ARGUMENT_RANGE, "node \"" + identity.name + "\" would be number " +
                                                           std::to_string(living + 2) + " of at most " +
                                                           std::to_string(kMaxNodes));
  }
  return base::Status::ok();
}

base::Status Core::connect(const NodeIdentity& identity, ConnectionId connection) {
  const Peer::Setting setting{
      .own_node_id = setting_.node_id, .heartbeat = setting_.heartbeat, .attention = &attention_};
  base::Result<std::unique_ptr<Peer>> peer = Peer::create(identity, connection, rails_, setting, base::now_ns());
  if (!peer.is_ok()) {
    return peer.status();
  }
  peers_.push_back(std::move(peer).value());
  settling_.stir(base::now_ns());
  next_ns_ = 0;
  return base::Status::ok();
}

base::Status Core::disconnect(uint64_t node_id) {
  Peer* peer = find_peer(node_id);
  if (peer == nullptr || peer->lost()) {
    return base::Status(EXPERTD_REASON_BAD_STATE, "node " + hex(node_id) + " is not connected");
  }
  peer->say_bye();
  peer->fail(LossCause::kDisconnected, "this daemon ended the connection");
  return base::Status::ok();
}

base::Status Core::open(const std::shared_ptr<GroupChannel>& channel) {
  const GroupLink& link = channel->link();
  if (open_groups_.contains(link.key)) {
    return base::Status(EXPERTD_REASON_BAD_STATE, "a group with this key is open already; close its old epoch first");
  }
  std::vector<Peer*> peers;
  for (uint32_t node = 0; node < link.placement.nodes(); ++node) {
    Peer* peer = node == link.placement.own_node ? nullptr : find_peer(link.node_ids[node]);
    if (node != link.placement.own_node && (peer == nullptr || peer->lost() || peer->failed())) {
      return not_connected(link, node);
    }
    if (peer != nullptr && std::find(peers.begin(), peers.end(), peer) != peers.end()) {
      return base::Status(EXPERTD_REASON_ARGUMENT_RANGE, "two nodes of the group have one id");
    }
    peers.push_back(peer);
  }
  channel->control().use_peers(std::move(peers));
  open_groups_.add(channel.get());
  groups_.push_back(channel);
  return base::Status::ok();
}

void Core::close(GroupChannel* channel) {
  if (open_groups_.remove(channel)) {
    channel->control().begin_close();
  }
}

}  // namespace expertd::fabric
