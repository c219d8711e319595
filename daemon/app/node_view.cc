// SPDX-License-Identifier: Apache-2.0
#include "daemon/app/node_view.h"

#include <algorithm>

#include "daemon/app/fabric_setup.h"

namespace expertd::app {

namespace {

constexpr std::array<const char*, engine::kFabricLanes> kLaneLabels = [] {
  std::array<const char*, engine::kFabricLanes> names{};
  for (uint32_t lane = 0; lane < names.size(); ++lane) {
    names[lane] = fabric::kLaneNames[static_cast<size_t>(fabric::lane_of(static_cast<engine::FabricLane>(lane)))];
  }
  return names;
}();

session::PeerSnapshot peer_of(const fabric::PeerSnapshot& from, const NodeFacts& facts) {
  session::PeerSnapshot peer;
  peer.name = from.name;
  peer.node_id = from.node_id;
  const auto address = facts.addresses.find(from.node_id);
  peer.address = address == facts.addresses.end() ? std::string() : address->second;
  peer.state = peer_state_name(from.state);
  if (from.state == fabric::PeerState::kLost) {
    peer.cause = fabric::loss_cause_name(from.cause);
    peer.detail = from.detail;
  }
  peer.rtt_ns = from.rtt_ns;
  // What is heard after the look began is heard now.
  peer.heard_ago_ns = facts.now_ns - std::min(facts.now_ns, from.heard_ns);
  peer.sends_failed = from.sends_failed;
  for (uint32_t lane = 0; lane < engine::kFabricLanes; ++lane) {
    const fabric::LaneTraffic& traffic = from.lanes[lane];
    peer.lanes.push_back({kLaneLabels[lane], traffic.sent_messages, traffic.sent_bytes, traffic.received_messages,
                          traffic.received_bytes, traffic.in_flight, traffic.deferred});
  }
  return peer;
}

std::vector<session::FabricLaneSnapshot> lanes_of(const NodeFacts& facts) {
  std::vector<session::FabricLaneSnapshot> lanes;
  for (uint32_t lane = 0; lane < fabric::kLanes; ++lane) {
    session::FabricLaneSnapshot out{fabric::kLaneNames[lane], option_texts(facts.options.lanes[lane]), {}};
    for (const fabric::RailSnapshot& rail : facts.fabric.rails) {
      if (static_cast<uint32_t>(rail.lane) == lane) {
        out.rails.push_back({rail.device, rail.sent_messages, rail.sent_bytes, rail.under_way_bytes});
      }
    }
    lanes.push_back(std::move(out));
  }
  return lanes;
}

}  // namespace

const char* peer_state_name(fabric::PeerState state) {
  switch (state) {
    case fabric::PeerState::kConnecting:
      return "connecting";
    case fabric::PeerState::kUp:
      return "up";
    case fabric::PeerState::kLost:
      return "lost";
  }
  return "unknown";
}

session::FabricStatusSnapshot fabric_status(const NodeFacts& facts) {
  session::FabricStatusSnapshot status;
  if (!facts.enabled) {
    return status;
  }
  status.enabled = true;
  status.backend = facts.backend;
  status.backend_cause = facts.backend_cause;
  status.route = fabric::kRouteNames[static_cast<size_t>(facts.options.route)];
  status.lanes = lanes_of(facts);
  status.transports = facts.transports;
  status.node = facts.name;
  status.node_id = facts.id;
  status.address = facts.address;
  status.rendezvous_address = facts.rendezvous.address;
  status.rendezvous_node = facts.rendezvous.node;
  status.rendezvous_cause = facts.rendezvous.cause;
  status.rendezvous_hosting = facts.hosting;
  status.rendezvous_source = facts.rendezvous.source;
  status.rendezvous_term = facts.rendezvous.term;
  status.etcd_cause = facts.rendezvous.etcd_cause;
  for (const fabric::PeerSnapshot& peer : facts.fabric.peers) {
    status.peers_connecting += peer.state == fabric::PeerState::kConnecting ? 1 : 0;
    status.peers_up += peer.state == fabric::PeerState::kUp ? 1 : 0;
    status.peers_lost += peer.state == fabric::PeerState::kLost ? 1 : 0;
  }
  status.groups = facts.fabric.groups;
  status.memory_bytes = facts.fabric.memory_bytes;
  status.cause = facts.answered.is_ok() ? std::string() : facts.answered.message();
  return status;
}

session::PeersSnapshot peers_snapshot(const NodeFacts& facts) {
  session::PeersSnapshot peers;
  peers.enabled = facts.enabled;
  peers.node = facts.name;
  for (const fabric::PeerSnapshot& peer : facts.fabric.peers) {
    peers.peers.push_back(peer_of(peer, facts));
  }
  std::sort(peers.peers.begin(), peers.peers.end(), [](const auto& left, const auto& right) {
    return left.name != right.name ? left.name < right.name : left.node_id < right.node_id;
  });
  return peers;
}

metrics::FabricGauges fabric_gauges(const NodeFacts& facts) {
  static_assert(metrics::kPeerFailureNames.size() == fabric::kLossCauses);
  static_assert(metrics::kDropNames.size() == fabric::kDropCauses);
  static_assert(metrics::kLaneNames.size() == engine::kFabricLanes);
  static_assert(metrics::kRttBoundsNs == fabric::kRttBoundsNs);
  metrics::FabricGauges gauges;
  gauges.enabled = facts.enabled;
  gauges.backend = facts.backend;
  gauges.transports = facts.transports;
  gauges.rendezvous_up = facts.hosting || !facts.rendezvous.address.empty();
  gauges.groups = facts.fabric.groups;
  for (const fabric::PeerSnapshot& peer : facts.fabric.peers) {
    ++gauges.peers[static_cast<size_t>(peer.state)];
  }
  gauges.failures = facts.fabric.lost;
  gauges.dropped = facts.fabric.dropped;
  for (uint32_t lane = 0; lane < engine::kFabricLanes; ++lane) {
    const fabric::LaneTraffic& traffic = facts.fabric.traffic[lane];
    gauges.lanes[lane] = {traffic.sent_messages,  traffic.sent_bytes, traffic.received_messages,
                          traffic.received_bytes, traffic.in_flight,  traffic.deferred};
  }
  for (const auto& [node, speeds] : facts.measured) {
    for (const fabric::LaneSpeed& speed : speeds) {
      if (speed.lane < fabric::kLanes) {
        gauges.mesh.push_back({node, fabric::kLaneNames[speed.lane], speed.device, speed.latency_p50_ns,
                               speed.latency_p99_ns, speed.bytes_per_second});
      }
    }
  }
  gauges.rtt = facts.fabric.rtt.buckets;
  gauges.rtt_sum_ns = facts.fabric.rtt.sum_ns;
  return gauges;
}

}  // namespace expertd::app
