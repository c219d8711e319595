// SPDX-License-Identifier: Apache-2.0
// What is seen of groups over two daemons: expertctl and metrics beside two real ones that exchange over loopback.
#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <nlohmann/json.hpp>

#include "daemon/base/fd.h"
#include "tests/integration/moe_case.h"
#include "tests/support/daemon_process.h"

namespace expertd::support {
namespace {

using nlohmann::json;
using std::chrono::seconds;

/// Nobody's at the moment of the call.
uint16_t free_port() {
  const base::ScopedFd fd(::socket(AF_INET, SOCK_STREAM, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  auto* const any = reinterpret_cast<sockaddr*>(&address);
  return ::bind(fd.get(), any, size) == 0 && ::getsockname(fd.get(), any, &size) == 0 ? ntohs(address.sin_port) : 0;
}

std::vector<std::string> node_flags(const std::string& name, uint16_t own_port, uint16_t rendezvous_port) {
  const std::string host = "127.0.0.1:";
  return {"--fabric-enabled=true", "--fabric-node-name=" + name, "--fabric-listen=" + host + std::to_string(own_port),
          "--fabric-rendezvous=" + host + std::to_string(rendezvous_port)};
}

json ctl(const std::string& verb, const DaemonProcess& daemon) {
  const RunResult result = run_program("expertctl", {verb, "--socket", daemon.control_socket(), "--json"}, seconds(60));
  EXPECT_EQ(result.exit_code, 0) << verb << ": " << result.output << result.error;
  return json::parse(result.output, nullptr, false);
}

/// Two daemons with two host devices each; the first hosts the rendezvous.
class NodesView : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(first_.start());
    ASSERT_TRUE(second_.start());
  }
  std::vector<Seat> seats() const {
    return {{first_.attach_socket(), "host:0"},
            {first_.attach_socket(), "host:1"},
            {second_.attach_socket(), "host:0"},
            {second_.attach_socket(), "host:1"}};
  }

  const uint16_t port_ = free_port();
  DaemonProcess first_{2, node_flags("node-a", port_, port_)};
  DaemonProcess second_{2, node_flags("node-b", 0, port_)};
};

TEST_F(NodesView, PeersAreSeenFromTheFirstGroupToTheirLoss) {
  EXPECT_EQ(ctl("peers", first_)["peers"].size(), 0U);
  EXPECT_TRUE(wait_until([&] { return ctl("status", second_)["fabric"]["rendezvous_node"] == "node-a"; }, seconds(10)));
  RankGroup group(seats(), "over");
  ASSERT_TRUE(group.ok()) << group.failure();
  group.run([](Rank& rank) { EXPECT_TRUE(barrier(rank.group).outcome.ok()) << expertd_last_message(); });

  const json status = ctl("status", first_)["fabric"];
  EXPECT_EQ(status["enabled"], true);
  EXPECT_EQ(status["backend"], "staged");
  EXPECT_NE(status["backend_cause"], "") << "why it is not direct";
  EXPECT_EQ(status["node"], "node-a");
  EXPECT_EQ(status["rendezvous_hosting"], true);
  EXPECT_EQ(status["peers_up"], 1);
  EXPECT_EQ(status["groups"], 1);
  const json list = ctl("peers", first_);
  ASSERT_EQ(list["peers"].size(), 1U) << list;
  const json& peer = list["peers"][0];
  EXPECT_EQ(peer["name"], "node-b");
  EXPECT_EQ(peer["state"], "up");
  EXPECT_NE(peer["address"], "");
  EXPECT_EQ(peer["node_id"], ctl("status", second_)["fabric"]["node_id"]);
  uint64_t sent = 0;
  uint64_t received = 0;
  for (const json& lane : peer["lanes"]) {
    sent += lane["sent_messages"].get<uint64_t>();
    received += lane["received_messages"].get<uint64_t>();
  }
  EXPECT_GE(sent, 2U) << "the counts of each rank";
  EXPECT_GE(received, 2U);

  second_.kill();
  EXPECT_TRUE(wait_until([&] { return ctl("peers", first_)["peers"][0]["state"] == "lost"; }, seconds(10)));
  const json lost = ctl("peers", first_)["peers"][0];
  EXPECT_NE(lost["cause"], "");
  EXPECT_NE(lost["detail"], "");
}

TEST(NodesBackend, DirectIsRefusedWhereItCannotBeProven) {
  std::vector<std::string> flags = node_flags("node-a", 0, free_port());
  flags.push_back("--fabric-require=direct");
  DaemonProcess daemon(1, flags);
  daemon.launch();
  EXPECT_EQ(daemon.wait_exit(seconds(20)), 69) << daemon.log();
  EXPECT_NE(daemon.log().find("fabric.require = direct"), std::string::npos) << daemon.log();
  EXPECT_NE(daemon.log().find("1.18"), std::string::npos) << "and what would do: " << daemon.log();
}

TEST(NodesLanes, KeysOfALaneAreShownAndThoseThatMeanNothingAreRefused) {
  std::vector<std::string> flags = node_flags("node-a", 0, free_port());
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
