// SPDX-License-Identifier: Apache-2.0
// What is seen of groups over two daemons: expertctl and metrics beside two real ones that exchange over loopback.
#include <gtest/gtest.h>

#include <atomic>
#include <nlohmann/json.hpp>

#include "tests/integration/moe_case.h"
#include "tests/support/daemon_cluster.h"

namespace expertd::support {
namespace {

using nlohmann::json;
using std::chrono::seconds;

json ctl(const std::string& verb, const DaemonProcess& daemon) {
  const RunResult result = run_program("expertctl", {verb, "--socket", daemon.control_socket(), "--json"}, seconds(60));
  EXPECT_EQ(result.exit_code, 0) << verb << ": " << result.output << result.error;
  return json::parse(result.output, nullptr, false);
}

/// Two daemons with two host devices each; the first hosts the rendezvous.
class NodesView : public ::testing::Test {
 protected:
  void SetUp() override { ASSERT_TRUE(cluster_.start()); }
  DaemonProcess& first() { return cluster_.node(0); }
  DaemonProcess& second() { return cluster_.node(1); }
  std::vector<Seat> seats() const { return cluster_.seats(2); }

  DaemonCluster cluster_{2, 2};
};

TEST_F(NodesView, PeersAreSeenFromTheFirstGroupToTheirLoss) {
  EXPECT_EQ(ctl("peers", first())["peers"].size(), 0U);
  EXPECT_TRUE(wait_until([&] { return ctl("status", second())["fabric"]["rendezvous_node"] == "n1"; }, seconds(10)));
  RankGroup group(seats(), "over");
  ASSERT_TRUE(group.ok()) << group.failure();
  group.run([](Rank& rank) { EXPECT_TRUE(barrier(rank.group).outcome.ok()) << expertd_last_message(); });

  const json status = ctl("status", first())["fabric"];
  EXPECT_EQ(status["enabled"], true);
  EXPECT_EQ(status["backend"], "staged");
  EXPECT_NE(status["backend_cause"], "") << "why it is not direct";
  EXPECT_EQ(status["node"], "n1");
  EXPECT_EQ(status["rendezvous_hosting"], true);
  EXPECT_EQ(status["peers_up"], 1);
  EXPECT_EQ(status["groups"], 1);
  const json list = ctl("peers", first());
  ASSERT_EQ(list["peers"].size(), 1U) << list;
  const json& peer = list["peers"][0];
  EXPECT_EQ(peer["name"], "n2");
  EXPECT_EQ(peer["state"], "up");
  EXPECT_NE(peer["address"], "");
  EXPECT_EQ(peer["node_id"], ctl("status", second())["fabric"]["node_id"]);
  uint64_t sent = 0;
  uint64_t received = 0;
  for (const json& lane : peer["lanes"]) {
    sent += lane["sent_messages"].get<uint64_t>();
    received += lane["received_messages"].get<uint64_t>();
  }
  EXPECT_GE(sent, 2U) << "the counts of each rank";
  EXPECT_GE(received, 2U);

  second().kill();
  EXPECT_TRUE(wait_until([&] { return ctl("peers", first())["peers"][0]["state"] == "lost"; }, seconds(10)));
  const json lost = ctl("peers", first())["peers"][0];
  EXPECT_NE(lost["cause"], "");
  EXPECT_NE(lost["detail"], "");
}

/// Of a daemon with a fabric whose rendezvous is nowhere.
std::vector<std::string> lonely_flags() {
  return {"--fabric-enabled=true", "--fabric-node-name=n1", "--fabric-listen=127.0.0.1:0",
          "--fabric-rendezvous=127.0.0.1:1"};
}

TEST(NodesBackend, DirectIsRefusedWhereItCannotBeProven) {
  std::vector<std::string> flags = lonely_flags();
  flags.push_back("--fabric-require=direct");
  DaemonProcess daemon(1, flags);
  daemon.launch();
  EXPECT_EQ(daemon.wait_exit(seconds(20)), 69) << daemon.log();
  EXPECT_NE(daemon.log().find("fabric.require = direct"), std::string::npos) << daemon.log();
  EXPECT_NE(daemon.log().find("1.18"), std::string::npos) << "and what would do: " << daemon.log();
}

TEST(NodesLanes, KeysOfALaneAreShownAndThoseThatMeanNothingAreRefused) {
  std::vector<std::string> flags = lonely_flags();
  flags.insert(flags.end(), {"--fabric-transports=tcp", "--fabric-devices=lo", "--fabric-route=spread"});
  DaemonProcess daemon(1, flags);
  ASSERT_TRUE(daemon.start());
  const json status = ctl("status", daemon)["fabric"];
  EXPECT_EQ(status["route"], "spread");
  ASSERT_EQ(status["lanes"].size(), 3U) << status;
  EXPECT_EQ(status["lanes"][2]["name"], "throughput");
  EXPECT_EQ(status["lanes"][2]["rails"][0]["device"], "lo");

  flags.push_back("--fabric-latency-traffic-class=106");
  DaemonProcess refused(1, flags);
  refused.launch();
  EXPECT_EQ(refused.wait_exit(seconds(20)), 78) << refused.log();
  EXPECT_NE(refused.log().find("latency"), std::string::npos) << refused.log();
  EXPECT_NE(refused.log().find("traffic_class"), std::string::npos) << refused.log();
}

TEST_F(NodesView, MetricsCountWhatCrosses) {
  for (const DaemonProcess* daemon : {&first(), &second()}) {
    EXPECT_EQ(daemon->metric("expertd_fabric_backend_info{backend=\"staged\""), 1);
    EXPECT_EQ(daemon->metric("expertd_fabric_messages_total"), 0);
    EXPECT_EQ(daemon->metric("expertd_fabric_peers"), 0);
    EXPECT_TRUE(daemon->metric_becomes("expertd_rendezvous_up", 1));
  }
  Wish wish;
  wish.ranks = 4;
  const RandomCase random_case = make_case(kernels::OpKind::kDispatch, wish);
  RankGroup group(seats(), "counted", [&](expertd_group_options_t* options) { configure(random_case, options); });
  ASSERT_TRUE(group.ok()) << group.failure();
  EXPECT_EQ(run_high_throughput(&group, random_case, Place::kRegistered), "");
  for (const DaemonProcess* daemon : {&first(), &second()}) {
    EXPECT_EQ(daemon->metric("expertd_fabric_peers{state=\"up\"}"), 1);
    EXPECT_EQ(daemon->metric("expertd_groups_spanning"), 1);
    EXPECT_GT(daemon->metric("expertd_fabric_messages_total{lane=\"throughput\",direction=\"sent\"}"), 0);
    EXPECT_GT(daemon->metric("expertd_fabric_bytes_total{lane=\"throughput\",direction=\"received\"}"), 0);
    EXPECT_GT(daemon->metric("expertd_op_bytes_total{op=\"dispatch\",gpu=\"host\",path=\"fabric\"}"), 0);
    EXPECT_GT(daemon->metric("expertd_op_bytes_total{op=\"combine\",gpu=\"host\",path=\"fabric\"}"), 0);
    EXPECT_TRUE(
        wait_until([&] { return daemon->metric("expertd_fabric_heartbeat_rtt_seconds_count") > 0; }, seconds(10)));
    // Signs of life of a daemon that connected first are of a node not known yet; nothing else is dropped.
    const std::string dropped = "expertd_fabric_dropped_total";
    EXPECT_EQ(daemon->metric(dropped), daemon->metric(dropped + "{cause=\"unknown_node\"}"));
  }
  second().kill();
  EXPECT_TRUE(first().metric_becomes("expertd_fabric_peers{state=\"lost\"}", 1));
  EXPECT_EQ(first().metric("expertd_fabric_peer_failures_total"), 1);
  EXPECT_GT(first().metric("expertd_fabric_bytes_total"), 0) << "what went to a lost peer went";
}

// A rank of the other node issues after all others every time; both nodes say so.
TEST_F(NodesView, SlowestNamesTheRankThatIsAlwaysLate) {
  constexpr uint32_t kRounds = 20;
  constexpr uint32_t kLate = 3;
  constexpr uint64_t kLateNs = 20'000'000;  // more than a busy machine makes of the others
  RankGroup group(seats(), "held");
  ASSERT_TRUE(group.ok()) << group.failure();
  std::atomic<uint32_t> issued{0};
  for (uint32_t round = 1; round <= kRounds; ++round) {
    group.run([&](Rank& rank) {
      uint64_t begin_ns = 0;
      EXPECT_TRUE(wait_until(
          [&] {
            const bool others = rank.rank != kLate || issued.load() == round * 3;
            begin_ns = others && begin_ns == 0 ? monotonic_ns() : begin_ns;
            return others && (rank.rank != kLate || monotonic_ns() - begin_ns > kLateNs);
          },
          seconds(10)));
      expertd_event_t event{};
      EXPECT_TRUE(outcome_of(expertd_barrier(rank.group, nullptr, 0, 0, &event)).ok()) << expertd_last_message();
      issued += rank.rank == kLate ? 0 : 1;
      EXPECT_TRUE(finish(event).outcome.ok()) << expertd_last_message();
    });
  }
  for (const DaemonProcess* daemon : {&first(), &second()}) {
    // The daemon keeps it just after the client has seen the operation end.
    json slowest;
    EXPECT_TRUE(wait_until(
        [&] {
          slowest = ctl("slowest", *daemon);
          return !slowest["ranks"].empty() && slowest["ranks"][0]["seen"] == kRounds;
        },
        seconds(10)))
        << slowest;
    ASSERT_GE(slowest["ranks"].size(), 1U) << slowest;
    EXPECT_EQ(slowest["submissions_alone"], false);
    const json& rank = slowest["ranks"][0];
    EXPECT_EQ(rank["group"], "held");
    EXPECT_EQ(rank["node"], "n2") << slowest;
    EXPECT_GT(rank["p50_ns"], kLateNs / 2) << slowest;
    ASSERT_GE(slowest["nodes"].size(), 1U) << slowest;
    EXPECT_EQ(slowest["nodes"][0]["name"], "n2") << slowest;
    EXPECT_GT(slowest["nodes"][0]["share"], 0.5) << slowest;
    // The first node sees the counts of both ranks of the second come together, once the late one has issued.
    EXPECT_TRUE(daemon == &first() || (rank["rank"] == kLate && rank["share"] > 0.5)) << slowest;
  }
}

TEST(NodesOff, PeersSayThatTheFabricIsOff) {
  DaemonProcess daemon(1);
  ASSERT_TRUE(daemon.start());
  EXPECT_EQ(ctl("status", daemon)["fabric"]["enabled"], false);
  EXPECT_EQ(ctl("peers", daemon)["enabled"], false);
  const RunResult text = run_program("expertctl", {"peers", "--socket", daemon.control_socket()}, seconds(60));
  EXPECT_EQ(text.exit_code, 0) << text.error;
  EXPECT_NE(text.output.find("off (fabric.enabled = false)"), std::string::npos) << text.output;
}

}  // namespace
}  // namespace expertd::support
