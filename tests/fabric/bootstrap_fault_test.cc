// SPDX-License-Identifier: Apache-2.0
// The rendezvous that is away, comes back or moves, and strangers at its port.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>

#include "daemon/fabric/bootstrap/peer_listener.h"
#include "tests/fabric/bootstrap_fixture.h"

namespace expertd::fabric {
namespace {

bool has(const base::Status& status, const std::string& text) {
  return status.message().find(text) != std::string::npos;
}

/// A TCP connection that speaks no gRPC.
class Stranger {
 public:
  explicit Stranger(uint16_t port) : fd_(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(connect(fd_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)), 0);
  }
  void say(const std::string& bytes) { (void)send(fd_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL); }
  /// Reads until the other side ends the connection.
  bool ended() {
    const uint64_t deadline_ns = base::now_ns() + 20 * kSecond;
    while (base::now_ns() < deadline_ns) {
      pollfd polled{fd_.get(), POLLIN, 0};
      char bytes[256];
      if (poll(&polled, 1, 1000) > 0 && recv(fd_.get(), bytes, sizeof(bytes), 0) <= 0) {
        return true;
      }
    }
    return false;
  }

 private:
  base::ScopedFd fd_;
};

/// A port on which nobody listens for as long as this lives.
class ClosedPort {
 public:
  ClosedPort() : fd_(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof(address);
    EXPECT_EQ(bind(fd_.get(), reinterpret_cast<const sockaddr*>(&address), size), 0);
    EXPECT_EQ(getsockname(fd_.get(), reinterpret_cast<sockaddr*>(&address), &size), 0);
    port_ = ntohs(address.sin_port);
  }
  std::string address() const { return "127.0.0.1:" + std::to_string(port_); }
  /// From now on connections are taken and nothing is said on them.
  void listen_mute() { EXPECT_EQ(listen(fd_.get(), 16), 0); }

 private:
  base::ScopedFd fd_;
  uint16_t port_ = 0;
};

TEST(BootstrapFault, AJoinSaysThatTheRendezvousDoesNotAnswerAndWhy) {
  const ClosedPort nobody;
  TestNode node({.name = "b", .id = 22, .rendezvous = {nobody.address()}});
  const JoinEnd end = take(node.join("moe", 0, config_of(1), kSecond / 2));
  EXPECT_EQ(end.error.status.reason(), EXPERTD_REASON_RENDEZVOUS_UNAVAILABLE);
  EXPECT_TRUE(has(end.error.status, "rendezvous " + nobody.address() + " does not answer"))
      << end.error.status.message();
  EXPECT_TRUE(has(end.error.status, "refused")) << end.error.status.message();
  EXPECT_FALSE(node.client().state().cause.empty());
}

TEST(BootstrapFault, AJoinNamesAHostThatDoesNotResolve) {
  TestNode node({.name = "b", .id = 22, .rendezvous = {"no-such-host.invalid:9465"}});
  JoinEnd end;
  const uint64_t deadline_ns = base::now_ns() + 60 * kSecond;  // a name server may take its time
  while (base::now_ns() < deadline_ns && !has(end.error.status, "does not resolve")) {
    end = take(node.join("moe", 0, config_of(1), kSecond / 2));
    EXPECT_EQ(end.error.status.reason(), EXPERTD_REASON_RENDEZVOUS_UNAVAILABLE);
  }
  EXPECT_TRUE(has(end.error.status, "\"no-such-host.invalid\" does not resolve")) << end.error.status.message();
}

TEST(BootstrapFault, AMutePortDelaysNoDeadline) {
  ClosedPort mute;
  mute.listen_mute();
  TestNode node({.name = "b", .id = 22, .rendezvous = {mute.address()}});
  const uint64_t before_ns = base::now_ns();
  const JoinEnd end = take(node.join("moe", 0, config_of(1), kSecond));
  EXPECT_EQ(end.error.status.reason(), EXPERTD_REASON_RENDEZVOUS_UNAVAILABLE);
  EXPECT_LT(base::now_ns() - before_ns, 4 * kSecond);
}

TEST(BootstrapFault, JoinsOutliveARestartOfTheRendezvous) {
  TestNode host({.name = "a", .id = 11});
  TestNode second({.name = "b", .id = 22, .rendezvous = {host.address()}});
  std::future<JoinEnd> rank0 = second.join("moe", 0, config_of(3), 60 * kSecond);
  std::future<JoinEnd> rank1 = second.join("moe", 1, config_of(3), 60 * kSecond);
  host.stop_server();
  EXPECT_EQ(rank0.wait_for(std::chrono::milliseconds(300)), std::future_status::timeout);
  host.restart_server();
  const JoinEnd rank2 = take(host.join("moe", 2, config_of(3)));
  ASSERT_NE(rank2.placed, nullptr) << rank2.error.status.message();
  EXPECT_EQ(take(std::move(rank0)).placed->key, rank2.placed->key);
  EXPECT_EQ(take(std::move(rank1)).placed->key, rank2.placed->key);
}

TEST(BootstrapFault, AReportToARestartedRendezvousSaysThatItKnowsNothing) {
  TestNode host({.name = "a", .id = 11});
  TestNode second({.name = "b", .id = 22, .rendezvous = {host.address()}});
  std::future<JoinEnd> rank0 = host.join("moe", 0, config_of(2));
  const uint64_t key = take(second.join("moe", 1, config_of(2))).placed->key;
  host.stop_server();
  std::future<session::ErrorDetail> formed = second.report(key);
  host.restart_server();
  EXPECT_EQ(take(std::move(formed)).status.reason(), EXPERTD_REASON_NO_SUCH_GROUP);
}

TEST(BootstrapFault, JoinsMoveToTheDaemonThatHostsFromNowOn) {
  TestNode first({.name = "a", .id = 11, .hosts_by_list = false});
  TestNode second({.name = "b", .id = 22, .rendezvous = {first.address()}, .hosts_by_list = false});
  TestNode third({.name = "c", .id = 33, .rendezvous = {first.address(), second.address()}});
  first.server().set_hosting(true);
  std::future<JoinEnd> waiting = third.join("moe", 0, config_of(2), 60 * kSecond);
  EXPECT_EQ(waiting.wait_for(std::chrono::milliseconds(200)), std::future_status::timeout);
  second.server().set_hosting(true);
  first.server().set_hosting(false);
  std::future<JoinEnd> rank1 = third.join("moe", 1, config_of(2), 60 * kSecond);
  EXPECT_NE(take(std::move(rank1)).placed, nullptr);
  EXPECT_NE(take(std::move(waiting)).placed, nullptr);
  EXPECT_EQ(third.client().state().node, "b");
}

TEST(BootstrapFault, TheFirstOfTheListHostsAndTheOthersDoNot) {
  TestNode first({.name = "a", .id = 11});
  TestNode second({.name = "b", .id = 22, .rendezvous = {first.address(), "127.0.0.1:1"}});
  EXPECT_NE(take(second.join("moe", 0, config_of(1))).placed, nullptr);
  EXPECT_TRUE(first.server().hosting());
  EXPECT_FALSE(second.server().hosting());
  EXPECT_EQ(second.client().state().address, first.address());
}

TEST(BootstrapFault, ANodeThatDiedGivesItsPlaceBack) {
  group::RendezvousOptions options;
  options.max_nodes = 2;
  options.node_timeout_ns = kSecond;
  TestNode host({.name = "a", .id = 11, .options = options});
  {
    TestNode second({.name = "b", .id = 22, .rendezvous = {host.address()}});
    std::future<JoinEnd> rank0 = host.join("moe", 0, config_of(2));
    const uint64_t key = take(second.join("moe", 1, config_of(2))).placed->key;
    std::future<session::ErrorDetail> formed = host.report(key);
    EXPECT_TRUE(take(second.report(key)).status.is_ok());
    EXPECT_TRUE(take(std::move(formed)).status.is_ok());
  }
  TestNode third({.name = "c", .id = 33, .rendezvous = {host.address()}});
  const uint64_t deadline_ns = base::now_ns() + 15 * kSecond;
  JoinEnd rank1;
  std::future<JoinEnd> rank0;
  while (base::now_ns() < deadline_ns && rank1.placed == nullptr) {
    if (!rank0.valid()) {
      rank0 = host.join("moe", 0, config_of(2), 30 * kSecond);
    }
    rank1 = take(third.join("moe", 1, config_of(2)));  // NODE_LIMIT until then, and told at once
  }
  ASSERT_NE(rank1.placed, nullptr) << rank1.error.status.message();
  EXPECT_NE(take(std::move(rank0)).placed, nullptr);
}

TEST(BootstrapFault, TheEndOfADaemonEndsItsJoins) {
  auto node = std::make_unique<TestNode>(TestNode::Settings{.name = "a", .id = 11});
  std::future<JoinEnd> waiting = node->join("moe", 0, config_of(2), 60 * kSecond);
  std::future<JoinEnd> other = node->join("moe", 1, config_of(3), 60 * kSecond);
  node.reset();
  EXPECT_EQ(waiting.wait_for(std::chrono::seconds(0)), std::future_status::ready);
  EXPECT_FALSE(waiting.get().error.status.is_ok());
  EXPECT_EQ(other.wait_for(std::chrono::seconds(0)), std::future_status::ready);
}

TEST(BootstrapFault, GarbageOnThePortIsCutOffAndHarmless) {
  TestNode node({.name = "a", .id = 11, .first_bytes_ns = kSecond / 2});
  const uint16_t port = node.server().port();
  Stranger http(port);
  http.say("GET / HTTP/1.1\r\nHost: here\r\n\r\n");
  Stranger noise(port);
  noise.say(std::string(4096, '\xa5'));
  Stranger broken(port);
  broken.say("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + std::string(64, '\xff'));
  Stranger silent(port);
  Stranger partial(port);
  partial.say("PRI * HT");
  EXPECT_NE(take(node.join("moe", 0, config_of(1))).placed, nullptr);
  EXPECT_TRUE(http.ended());
  EXPECT_TRUE(noise.ended());
  EXPECT_TRUE(broken.ended());
  EXPECT_TRUE(silent.ended());
  EXPECT_TRUE(partial.ended());
  EXPECT_NE(take(node.join("moe2", 0, config_of(1))).placed, nullptr);
}

TEST(BootstrapFault, ConnectionsThatSayNothingMakeWayForOthers) {
  TestNode node({.name = "a", .id = 11, .first_bytes_ns = 600 * kSecond, .connections_max = 4});
  std::vector<std::unique_ptr<Stranger>> strangers;
  for (int i = 0; i < 12; ++i) {
    strangers.push_back(std::make_unique<Stranger>(node.server().port()));
  }
  TestNode second({.name = "b", .id = 22, .rendezvous = {node.address()}});
  EXPECT_NE(take(second.join("moe", 0, config_of(1))).placed, nullptr);
  EXPECT_TRUE(strangers.front()->ended());
}

base::Status listening_at(const std::string& address) {
  PeerServerOptions options;
  options.listen = address;
  options.identity = {1, "x", "", {}};
  return PeerServer::create(options).status();
}

TEST(BootstrapFault, APortInUseIsNamed) {
  TestNode node({.name = "a", .id = 11});
  const base::Status status = listening_at(node.address());
  EXPECT_EQ(status.reason(), EXPERTD_REASON_ADDRESS_IN_USE);
  EXPECT_TRUE(has(status, node.address())) << status.message();
}

TEST(BootstrapFault, AnAddressOfAnotherMachineOrNoneIsNamed) {
  for (const char* address : {"192.0.2.1:0", "localhost:0", "127.0.0.1", "127.0.0.1:70000", "[::1:0", "dns:x:1"}) {
    const base::Status status = listening_at(address);
    EXPECT_EQ(status.reason(), EXPERTD_REASON_CONFIG_BAD_VALUE) << address << ": " << status.message();
    EXPECT_TRUE(has(status, address)) << status.message();
  }
}

TEST(BootstrapFault, RefusesAListThatNamesNoDaemon) {
  for (const std::vector<std::string>& list : {std::vector<std::string>{}, {"noport"}, {"a:1", ":2"}}) {
    RendezvousClientOptions options;
    options.identity = {1, "x", "", {}};
    options.rendezvous = list;
    EXPECT_EQ(RendezvousClient::create(options, nullptr).status().reason(), EXPERTD_REASON_CONFIG_BAD_VALUE);
  }
}

}  // namespace
}  // namespace expertd::fabric
