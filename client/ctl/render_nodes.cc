// SPDX-License-Identifier: Apache-2.0
#include "client/ctl/render_nodes.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <string>

#include "client/ctl/format.h"

namespace expertd::ctl {

namespace {

using nlohmann::json;

constexpr const char* kOff = "off (fabric.enabled = false): groups stay on this node";

std::string or_dash(const std::string& text) {
  return text.empty() ? "-" : text;
}

std::string host_text(const v1::FabricStatus& fabric) {
  if (fabric.rendezvous_hosting()) {
    return "rendezvous hosted here";
  }
  if (fabric.rendezvous_address().empty()) {
    return "NO RENDEZVOUS (" + (fabric.rendezvous_cause().empty() ? "none found yet" : fabric.rendezvous_cause()) + ")";
  }
  return "rendezvous " + fabric.rendezvous_address() +
         (fabric.rendezvous_node().empty() ? "" : " on " + fabric.rendezvous_node());
}

std::string rendezvous_text(const v1::FabricStatus& fabric) {
  std::string out = host_text(fabric);
  if (!fabric.rendezvous_source().empty()) {
    out += " by " + fabric.rendezvous_source();
  }
  if (fabric.rendezvous_term() != 0) {
    out += " term " + std::to_string(fabric.rendezvous_term());
  }
  return fabric.etcd_cause().empty() ? out : out + ", ETCD DOES NOT SAY WHO HOSTS (" + fabric.etcd_cause() + ")";
}

/// Of all lanes; messages and bytes in one cell because a table has to fit a terminal.
std::string traffic_text(uint64_t messages, uint64_t bytes) {
  return messages == 0 ? "-" : count_text(static_cast<double>(messages)) + " / " + size_text(bytes);
}

json lane_json(const v1::PeerLane& lane) {
  return {{"lane", lane.lane()},
          {"sent_messages", lane.sent_messages()},
          {"sent_bytes", lane.sent_bytes()},
          {"received_messages", lane.received_messages()},
          {"received_bytes", lane.received_bytes()},
          {"in_flight", lane.in_flight()},
          {"deferred", lane.deferred()}};
}

json lanes_json(const v1::FabricStatus& fabric) {
  json lanes = json::array();
  for (const v1::FabricLane& lane : fabric.lanes()) {
    json rails = json::array();
    for (const v1::FabricRail& rail : lane.rails()) {
      rails.push_back({{"device", rail.device()},
                       {"sent_messages", rail.sent_messages()},
                       {"sent_bytes", rail.sent_bytes()},
                       {"under_way_bytes", rail.under_way_bytes()}});
    }
    lanes.push_back({{"name", lane.name()},
                     {"options", std::vector<std::string>(lane.options().begin(), lane.options().end())},
                     {"rails", rails}});
  }
  return lanes;
}

/// What differs from lanes that are left to UCX: "throughput traffic_class=106 by mlx5_0:1 mlx5_1:1"; empty: nothing.
std::string lanes_text(const v1::FabricStatus& fabric) {
  std::string text;
  for (const v1::FabricLane& lane : fabric.lanes()) {
    std::string options;
    for (const std::string& option : lane.options()) {
      options += " " + option;
    }
    std::string devices;
    for (const v1::FabricRail& rail : lane.rails()) {
      devices += rail.device().empty() ? "" : " " + rail.device();
    }
    if (!options.empty() || !devices.empty()) {
      text += (text.empty() ? "" : "; ") + lane.name() + options + (devices.empty() ? "" : " by" + devices);
    }
  }
  return text.empty() ? text : ", lanes: " + text + ", route " + fabric.route();
}

}  // namespace

std::string fabric_line(const v1::FabricStatus& fabric) {
  if (!fabric.enabled()) {
    return std::string("fabric ") + kOff;
  }
  std::string out = "fabric " + fabric.backend() + " over " + fabric.transports() + ", node " + or_dash(fabric.node()) +
                    " at " + or_dash(fabric.address()) + ", " + rendezvous_text(fabric) + ", peers " +
                    std::to_string(fabric.peers_up()) + " up";
  if (fabric.peers_connecting() != 0) {
    out += " " + std::to_string(fabric.peers_connecting()) + " connecting";
  }
  if (fabric.peers_lost() != 0) {
    out += " " + std::to_string(fabric.peers_lost()) + " LOST";
  }
  out += ", groups over nodes " + std::to_string(fabric.groups()) + lanes_text(fabric);
  return fabric.cause().empty() ? out : out + ", DOES NOT ANSWER (" + fabric.cause() + ")";
}

json fabric_json(const v1::FabricStatus& fabric) {
  if (!fabric.enabled()) {
    return {{"enabled", false}};
  }
  return {{"enabled", true},
          {"backend", fabric.backend()},
          {"transports", fabric.transports()},
          {"node", fabric.node()},
          {"node_id", fabric.node_id()},
          {"address", fabric.address()},
          {"rendezvous_address", fabric.rendezvous_address()},
          {"rendezvous_node", fabric.rendezvous_node()},
          {"rendezvous_cause", fabric.rendezvous_cause()},
          {"rendezvous_hosting", fabric.rendezvous_hosting()},
          {"rendezvous_source", fabric.rendezvous_source()},
          {"rendezvous_term", fabric.rendezvous_term()},
          {"etcd_cause", fabric.etcd_cause()},
          {"peers_connecting", fabric.peers_connecting()},
          {"peers_up", fabric.peers_up()},
          {"peers_lost", fabric.peers_lost()},
          {"groups", fabric.groups()},
          {"memory_bytes", fabric.memory_bytes()},
          {"cause", fabric.cause()},
          {"backend_cause", fabric.backend_cause()},
          {"route", fabric.route()},
          {"lanes", lanes_json(fabric)}};
}

std::string peers_text(const v1::ListPeersResponse& peers) {
  if (!peers.enabled()) {
    return std::string("fabric ") + kOff + "\n";
  }
  if (peers.peers().empty()) {
    return "no peers: node " + or_dash(peers.node()) + " has joined no group with another node\n";
  }
  Table table({{"NODE"},
               {"ID"},
               {"ADDRESS"},
               {"STATE"},
               {"RTT", Align::kRight},
               {"HEARD", Align::kRight},
               {"LANE"},
               {"SENT", Align::kRight},
               {"RECEIVED", Align::kRight},
               {"IN FLIGHT", Align::kRight},
               {"DEFERRED", Align::kRight},
               {"FAILED", Align::kRight},
               {"WHY"}});
  for (const v1::PeerStatus& peer : peers.peers()) {
    const std::string why = peer.cause().empty() ? "" : peer.cause() + ": " + peer.detail();
    for (int i = 0; i < std::max(peer.lanes_size(), 1); ++i) {
      const v1::PeerLane lane = i < peer.lanes_size() ? peer.lanes(i) : v1::PeerLane();
      std::vector<std::string> row(6);
      if (i == 0) {
        row = {or_dash(peer.name()),
               peer.node_id(),
               or_dash(peer.address()),
               peer.state() == "lost" ? "LOST" : peer.state(),
               peer.rtt_ns() == 0 ? "-" : duration_text(peer.rtt_ns()),
               duration_text(peer.heard_ago_ns()) + " ago"};
      }
      row.insert(row.end(), {or_dash(lane.lane()), traffic_text(lane.sent_messages(), lane.sent_bytes()),
                             traffic_text(lane.received_messages(), lane.received_bytes()),
                             std::to_string(lane.in_flight()), std::to_string(lane.deferred()),
                             i == 0 ? std::to_string(peer.sends_failed()) : "", i == 0 ? why : ""});
      table.add(std::move(row));
    }
  }
  return table.text();
}

json peers_json(const v1::ListPeersResponse& peers) {
  json list = json::array();
  for (const v1::PeerStatus& peer : peers.peers()) {
    json lanes = json::array();
    for (const v1::PeerLane& lane : peer.lanes()) {
      lanes.push_back(lane_json(lane));
    }
    list.push_back({{"name", peer.name()},
                    {"node_id", peer.node_id()},
                    {"address", peer.address()},
                    {"state", peer.state()},
                    {"cause", peer.cause()},
                    {"detail", peer.detail()},
                    {"rtt_ns", peer.rtt_ns()},
                    {"heard_ago_ns", peer.heard_ago_ns()},
                    {"sends_failed", peer.sends_failed()},
                    {"lanes", std::move(lanes)}});
  }
  return {{"enabled", peers.enabled()}, {"node", peers.node()}, {"peers", std::move(list)}};
}

}  // namespace expertd::ctl
