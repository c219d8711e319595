// SPDX-License-Identifier: Apache-2.0
// From what the fabric tells to what operators read: facts of this node, messages, tables and JSON.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "client/ctl/render.h"
#include "client/ctl/render_nodes.h"
#include "client/ctl/slowest.h"
#include "daemon/app/node_view.h"
#include "daemon/control/convert.h"

namespace expertd::ctl {
namespace {

app::NodeFacts three_peers() {
  app::NodeFacts facts;
  facts.enabled = true;
  facts.name = "node-a";
  facts.id = 0xa1;
  facts.address = "10.0.0.1:9465";
  facts.transports = "tcp";
  facts.rendezvous.address = "10.0.0.9:9465";
  facts.rendezvous.node = "node-z";
  facts.addresses[2] = "10.0.0.2:9465";
  facts.now_ns = 5'000'000'000;
  facts.fabric.groups = 2;
  facts.fabric.peers.resize(3);
  facts.fabric.peers[0] = {.node_id = 3,
                           .name = "node-c",
                           .state = fabric::PeerState::kLost,
                           .cause = fabric::LossCause::kSilent,
                           .detail = "no sign of life for 512 ms",
                           .heard_ns = 1'000'000'000};
  facts.fabric.peers[1] = {.node_id = 2,
                           .name = "node-b",
                           .state = fabric::PeerState::kUp,
                           .detail = {},
                           .rtt_ns = 42'000,
                           .heard_ns = 4'950'000'000,
                           .sends_failed = 1};
  facts.fabric.peers[1].lanes[static_cast<size_t>(engine::FabricLane::kLatency)] = {.sent_messages = 1500,
                                                                                    .sent_bytes = 3ULL << 20,
                                                                                    .received_messages = 7,
                                                                                    .received_bytes = 9,
                                                                                    .in_flight = 2,
                                                                                    .deferred = 4};
  facts.fabric.peers[2] = {.node_id = 4, .name = "node-d", .detail = {}, .heard_ns = 6'000'000'000};
  return facts;
}

v1::FabricStatus status_of(const app::NodeFacts& facts) {
  session::StatusSnapshot snapshot;
  snapshot.fabric = app::fabric_status(facts);
  v1::GetStatusResponse message;
  control::to_proto(snapshot, {}, &message);
  return message.fabric();
}

v1::ListPeersResponse peers_of(const app::NodeFacts& facts) {
  v1::ListPeersResponse message;
  control::to_proto(app::peers_snapshot(facts), &message);
  return message;
}

TEST(NodesView, StatusHasOneLineForTheFabric) {
  const v1::FabricStatus fabric = status_of(three_peers());
  EXPECT_EQ(fabric_line(fabric),
            "fabric staged over tcp, node node-a at 10.0.0.1:9465, rendezvous 10.0.0.9:9465 on node-z, peers 1 up "
            "1 connecting 1 LOST, groups over nodes 2");
  const nlohmann::json json = fabric_json(fabric);
  EXPECT_EQ(json["node_id"], "00000000000000a1");
  EXPECT_EQ(json["peers_lost"], 1);
  EXPECT_EQ(json["rendezvous_hosting"], false);
  v1::GetStatusResponse status;
  *status.mutable_fabric() = fabric;
  EXPECT_NE(status_text(status).find("\n  fabric staged over tcp"), std::string::npos) << status_text(status);
  EXPECT_EQ(status_json(status)["fabric"]["groups"], 2);
}

TEST(NodesView, HowTheRendezvousIsFoundIsSaid) {
  app::NodeFacts facts = three_peers();
  facts.rendezvous.source = "list";
  EXPECT_NE(fabric_line(status_of(facts)).find("rendezvous 10.0.0.9:9465 on node-z by list, "), std::string::npos);
  facts.rendezvous.source = "etcd";
  facts.rendezvous.term = 42;
  EXPECT_NE(fabric_line(status_of(facts)).find("on node-z by etcd term 42, peers"), std::string::npos);
  facts.rendezvous.etcd_cause = "etcd http://a:2379: connection refused";
  const v1::FabricStatus fabric = status_of(facts);
  EXPECT_NE(fabric_line(fabric).find("term 42, ETCD DOES NOT SAY WHO HOSTS (etcd http://a:2379: connection refused), "),
            std::string::npos)
      << fabric_line(fabric);
  const nlohmann::json json = fabric_json(fabric);
  EXPECT_EQ(json["rendezvous_source"], "etcd");
  EXPECT_EQ(json["rendezvous_term"], 42);
  EXPECT_EQ(json["etcd_cause"], "etcd http://a:2379: connection refused");
}

TEST(NodesView, WhatTheFabricLacksIsSaid) {
  app::NodeFacts facts = three_peers();
  facts.rendezvous = {};
  facts.rendezvous.cause = "node-z: connection refused";
  facts.answered = base::Status(EXPERTD_REASON_TIMEOUT, "the fabric thread did not answer");
  const std::string line = fabric_line(status_of(facts));
  EXPECT_NE(line.find("NO RENDEZVOUS (node-z: connection refused)"), std::string::npos) << line;
  EXPECT_NE(line.find("DOES NOT ANSWER (the fabric thread did not answer)"), std::string::npos) << line;
  facts.hosting = true;
  EXPECT_NE(fabric_line(status_of(facts)).find("rendezvous hosted here"), std::string::npos);
}

TEST(NodesView, WithoutAFabricItIsSaidToBeOff) {
  const v1::FabricStatus fabric = status_of({});
  EXPECT_NE(fabric_line(fabric).find("off (fabric.enabled = false)"), std::string::npos) << fabric_line(fabric);
  EXPECT_EQ(fabric_json(fabric), (nlohmann::json{{"enabled", false}}));
  EXPECT_NE(peers_text(peers_of({})).find("off (fabric.enabled = false)"), std::string::npos);
  EXPECT_EQ(peers_json(peers_of({}))["enabled"], false);
}

TEST(NodesView, PeersAreShownByNameWithWhatCameOfThem) {
  const nlohmann::json json = peers_json(peers_of(three_peers()));
  ASSERT_EQ(json["peers"].size(), 3U);
  const nlohmann::json& up = json["peers"][0];
  EXPECT_EQ(up["name"], "node-b");
  EXPECT_EQ(up["node_id"], "0000000000000002");
  EXPECT_EQ(up["address"], "10.0.0.2:9465");
  EXPECT_EQ(up["state"], "up");
  EXPECT_EQ(up["cause"], "");
  EXPECT_EQ(up["rtt_ns"], 42'000);
  EXPECT_EQ(up["heard_ago_ns"], 50'000'000);
  EXPECT_EQ(up["sends_failed"], 1);
  ASSERT_EQ(up["lanes"].size(), 2U);
  EXPECT_EQ(up["lanes"][0]["lane"], "latency");
  EXPECT_EQ(up["lanes"][0]["sent_messages"], 1500);
  EXPECT_EQ(up["lanes"][0]["sent_bytes"], 3 << 20);
  EXPECT_EQ(up["lanes"][0]["received_messages"], 7);
  EXPECT_EQ(up["lanes"][0]["received_bytes"], 9);
  EXPECT_EQ(up["lanes"][0]["in_flight"], 2);
  EXPECT_EQ(up["lanes"][0]["deferred"], 4);
  const nlohmann::json& lost = json["peers"][1];
  EXPECT_EQ(lost["state"], "lost");
  EXPECT_EQ(lost["cause"], "silent");
  EXPECT_EQ(lost["heard_ago_ns"], 4'000'000'000);
  EXPECT_EQ(json["peers"][2]["state"], "connecting");
  EXPECT_EQ(json["peers"][2]["heard_ago_ns"], 0) << "heard after the look began";
}

TEST(NodesView, ThePeersTableHasARowPerLane) {
  const std::string text = peers_text(peers_of(three_peers()));
  EXPECT_NE(text.find("1.5 k / 3.0 MiB"), std::string::npos) << text;
  EXPECT_NE(text.find("50.0 ms ago"), std::string::npos) << text;
  EXPECT_NE(text.find("silent: no sign of life for 512 ms"), std::string::npos) << text;
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 7) << text;
  app::NodeFacts alone = three_peers();
  alone.fabric.peers.clear();
  EXPECT_EQ(peers_text(peers_of(alone)), "no peers: node node-a has joined no group with another node\n");
}

TEST(NodesView, LabelsOfMetricsAreTheNamesOfTheFabric) {
  for (uint32_t i = 0; i < fabric::kLossCauses; ++i) {
    EXPECT_EQ(metrics::kPeerFailureNames[i], fabric::loss_cause_name(static_cast<fabric::LossCause>(i)));
  }
  for (uint32_t i = 0; i < fabric::kDropCauses; ++i) {
    EXPECT_EQ(metrics::kDropNames[i], fabric::drop_cause_name(static_cast<fabric::DropCause>(i)));
  }
  for (uint32_t i = 0; i < metrics::kPeerStateNames.size(); ++i) {
    EXPECT_EQ(metrics::kPeerStateNames[i], app::peer_state_name(static_cast<fabric::PeerState>(i)));
  }
  const nlohmann::json lanes = peers_json(peers_of(three_peers()))["peers"][0]["lanes"];
  for (size_t i = 0; i < metrics::kLaneNames.size(); ++i) {
    EXPECT_EQ(lanes[i]["lane"], metrics::kLaneNames[i]);
  }
}

TEST(NodesView, MetricsCountPeersByStateAndKeepWhatWent) {
  app::NodeFacts facts = three_peers();
  facts.fabric.lost[1] = 3;
  facts.fabric.dropped[2] = 4;
  facts.fabric.traffic[0].sent_bytes = 99;
  facts.fabric.rtt.observe(42'000);
  const metrics::FabricGauges gauges = app::fabric_gauges(facts);
  EXPECT_TRUE(gauges.enabled);
  EXPECT_TRUE(gauges.rendezvous_up);
  EXPECT_EQ(gauges.groups, 2U);
  EXPECT_EQ(gauges.peers, (std::array<uint64_t, 3>{1, 1, 1}));
  EXPECT_EQ(gauges.failures[1], 3U);
  EXPECT_EQ(gauges.dropped[2], 4U);
  EXPECT_EQ(gauges.lanes[0].sent_bytes, 99U) << "with peers that are in the list no more";
  EXPECT_EQ(gauges.rtt[1], 1U);
  EXPECT_EQ(gauges.rtt_sum_ns, 42'000U);
  EXPECT_FALSE(app::fabric_gauges({}).enabled);
  EXPECT_FALSE(app::fabric_gauges({}).rendezvous_up);
}

session::WaitsSnapshot waits_of_two_nodes() {
  session::WaitsSnapshot waits;
  waits.node = "node-a";
  waits.groups.resize(1);
  waits.groups[0].id = {5};
  waits.groups[0].name = "decode";
  waits.groups[0].rank_nodes = {"node-a", "node-b"};
  for (uint64_t number = 1; number <= 4; ++number) {
    const bool own = number == 4;
    waits.waits.push_back({.group = {5},
                           .number = number,
                           .op = "ll_dispatch",
                           .rank = 0,
                           .last_rank = own ? 0U : 1U,
                           .waited_ns = own ? 0 : number * 10'000,
                           .counts = true});
  }
  return waits;
}

v1::ListWaitsResponse message_of(const session::WaitsSnapshot& waits) {
  v1::ListWaitsResponse message;
  control::to_proto(waits, &message);
  return message;
}

TEST(Slowest, WhoWasWaitedForLongestComesFirst) {
  session::WaitsSnapshot waits = waits_of_two_nodes();
  for (uint64_t number = 5; number <= 14; ++number) {  // more often the last, and by a hair
    waits.waits.push_back(
        {.group = {5}, .number = number, .op = "dispatch", .rank = 1, .last_rank = 0, .waited_ns = 2'000});
  }
  const Slowest slowest = slowest_of(message_of(waits));
  const std::vector<SlowRank>& ranks = slowest.ranks;
  ASSERT_EQ(ranks.size(), 2U);
  EXPECT_EQ(ranks[0].group, "decode");
  EXPECT_EQ(ranks[0].rank, 1U);
  EXPECT_EQ(ranks[0].node, "node-b");
  EXPECT_EQ(ranks[0].last, 3U);
  EXPECT_EQ(ranks[0].seen, 14U);
  EXPECT_EQ(ranks[0].held_ns, 60'000U);
  EXPECT_DOUBLE_EQ(ranks[0].share, 0.75);
  EXPECT_EQ(ranks[0].waits, 3U);
  EXPECT_EQ(ranks[0].p50_ns, 20'000U);
  EXPECT_EQ(ranks[0].p99_ns, 30'000U);
  EXPECT_EQ(ranks[1].rank, 0U);
  EXPECT_EQ(ranks[1].last, 11U);
  EXPECT_EQ(ranks[1].waits, 10U) << "it did not wait for itself";
  ASSERT_EQ(slowest.nodes.size(), 2U);
  EXPECT_EQ(slowest.nodes[0].name, "node-b");
  EXPECT_DOUBLE_EQ(slowest.nodes[0].share, 0.75);
  ASSERT_EQ(slowest.lanes.size(), 2U);
  EXPECT_EQ(slowest.lanes[0].name, "latency");
  EXPECT_EQ(slowest.lanes[1].held_ns, 20'000U);
}

TEST(Slowest, AGroupOfOneNodeHasNeitherNodesNorLanes) {
  session::WaitsSnapshot waits = waits_of_two_nodes();
  waits.groups[0].rank_nodes.clear();
  const Slowest slowest = slowest_of(message_of(waits));
  EXPECT_EQ(slowest.ranks.size(), 2U);
  EXPECT_TRUE(slowest.nodes.empty() && slowest.lanes.empty());
}

TEST(Slowest, OfAnOperationTheLongestWaitCounts) {
  session::WaitsSnapshot waits = waits_of_two_nodes();
  // A second rank here, which came last in the second operation and waited a little for the other node then.
  waits.waits.push_back({.group = {5}, .number = 2, .op = "ll_dispatch", .rank = 2, .last_rank = 0, .waited_ns = 100});
  waits.waits.push_back(
      {.group = {5}, .number = 1, .op = "ll_dispatch", .rank = 2, .last_rank = 3, .waited_ns = 90'000});
  const std::vector<SlowRank> ranks = slowest_of(message_of(waits)).ranks;
  ASSERT_EQ(ranks.size(), 3U);
  EXPECT_EQ(ranks[0].rank, 3U);
  EXPECT_EQ(ranks[0].p50_ns, 90'000U);
  EXPECT_EQ(ranks[1].rank, 1U);
  EXPECT_EQ(ranks[1].last, 2U);
  EXPECT_EQ(ranks[1].seen, 4U);
  EXPECT_EQ(ranks[2].rank, 0U);
}

TEST(Slowest, WhatIsNotSeenIsSaid) {
  session::WaitsSnapshot waits = waits_of_two_nodes();
  const std::string all = slowest_text(message_of(waits));
  EXPECT_NE(all.find("By node: node-b 100 %\n"), std::string::npos) << all;
  EXPECT_NE(all.find("20.0 µs"), std::string::npos) << all;
  EXPECT_EQ(all.find("GPUs"), std::string::npos) << all;
  EXPECT_EQ(slowest_json(message_of(waits))["submissions_alone"], false);
  waits.waits[0].counts = false;
  EXPECT_NE(slowest_text(message_of(waits)).find("GPUs: who submitted last"), std::string::npos);
  EXPECT_EQ(slowest_json(message_of(waits))["submissions_alone"], true);
  EXPECT_EQ(slowest_text({}), "no operations of groups yet\n");
}

}  // namespace
}  // namespace expertd::ctl
