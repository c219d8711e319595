// SPDX-License-Identifier: Apache-2.0
// What the rendezvous refuses, as the rank that asked hears of it on its own node.
#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>

#include "daemon/fabric/bootstrap/peer_convert.h"
#include "expertd/peer/v1/peer.grpc.pb.h"
#include "tests/fabric/bootstrap_fixture.h"

namespace expertd::fabric {
namespace {

bool has(const base::Status& status, const std::string& text) {
  return status.message().find(text) != std::string::npos;
}

/// The services as a program of another release may call them.
class RawPeer {
 public:
  explicit RawPeer(const std::string& address)
      : channel_(grpc::CreateChannel(address, grpc::InsecureChannelCredentials())),
        peer_(peer::v1::Peer::NewStub(channel_)),
        rendezvous_(peer::v1::Rendezvous::NewStub(channel_)) {}

  static void set_deadline(grpc::ClientContext* context) {
    context->set_deadline(std::chrono::system_clock::now() + kPatience);
  }
  grpc::Status hello(const peer::v1::HelloRequest& request, peer::v1::HelloResponse* response, bool deadline = true) {
    grpc::ClientContext context;
    if (deadline) {
      set_deadline(&context);
    }
    return peer_->Hello(&context, request, response);
  }
  grpc::Status join(const peer::v1::JoinRankRequest& request, peer::v1::JoinRankResponse* response) {
    grpc::ClientContext context;
    set_deadline(&context);
    return rendezvous_->JoinRank(&context, request, response);
  }

 private:
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<peer::v1::Peer::Stub> peer_;
  std::unique_ptr<peer::v1::Rendezvous::Stub> rendezvous_;
};

TEST(BootstrapRefusal, NamesRankFieldAndBothValuesOfAnotherConfiguration) {
  TestNode first({.name = "a", .id = 11});
  TestNode second({.name = "b", .id = 22, .rendezvous = {first.address()}});
  std::future<JoinEnd> waiting = first.join("moe", 0, config_of(2));
  session::GroupConfig config = config_of(2);
  config.max_tokens = 128;
  // Which of the two comes first is open: the other one is refused, and says so with the values turned round.
  std::future<JoinEnd> other = second.join("moe", 1, config);
  JoinEnd end;
  for (int turn = 0; turn < 2000 && end.error.status.is_ok(); ++turn) {
    std::future<JoinEnd>& one = turn % 2 == 0 ? waiting : other;
    if (one.valid() && one.wait_for(std::chrono::milliseconds(10)) == std::future_status::ready) {
      end = one.get();
    }
  }
  EXPECT_EQ(end.error.status.reason(), EXPERTD_REASON_CONFIG_MISMATCH);
  EXPECT_EQ(end.error.field, "max_tokens");
  EXPECT_EQ(end.error.rank == 1 ? end.error.value : end.error.other_value, "128");
  EXPECT_EQ(end.error.rank == 1 ? end.error.other_value : end.error.value, "64");
}

TEST(BootstrapRefusal, NamesTheNodeThatHasTheRank) {
  TestNode first({.name = "a", .id = 11});
  TestNode second({.name = "b", .id = 22, .rendezvous = {first.address()}});
  std::future<JoinEnd> one = first.join("moe", 0, config_of(1));
  ASSERT_NE(take(std::move(one)).placed, nullptr);
  const JoinEnd end = take(second.join("moe", 0, config_of(1)));
  EXPECT_EQ(end.error.status.reason(), EXPERTD_REASON_DUPLICATE_RANK);
  EXPECT_EQ(end.error.rank, 0);
  EXPECT_TRUE(has(end.error.status, "\"a\"")) << end.error.status.message();
}

TEST(BootstrapRefusal, NamesTheRanksThatDidNotJoin) {
  TestNode node({.name = "a", .id = 11});
  const JoinEnd end = take(node.join("moe", 1, config_of(3), kSecond / 2));
  EXPECT_EQ(end.error.status.reason(), EXPERTD_REASON_JOIN_TIMEOUT);
  EXPECT_TRUE(has(end.error.status, "rank(s) 0, 2 had not joined")) << end.error.status.message();
}

TEST(BootstrapRefusal, AWithdrawnJoinEndsAndItsPlaceIsFree) {
  TestNode first({.name = "a", .id = 11});
  TestNode second({.name = "b", .id = 22, .rendezvous = {first.address()}});
  std::future<JoinEnd> withdrawn = first.join("moe", 0, config_of(2), 15 * kSecond, 77);
  first.client().withdraw("moe", 0, 77);
  EXPECT_EQ(take(std::move(withdrawn)).error.status.reason(), EXPERTD_REASON_CANCELLED);
  std::future<JoinEnd> rank0 = second.join("moe", 0, config_of(2));
  EXPECT_NE(take(second.join("moe", 1, config_of(2))).placed, nullptr);
  EXPECT_NE(take(std::move(rank0)).placed, nullptr);
}

TEST(BootstrapRefusal, AWithdrawalOfAPlacedRankFailsTheFormationElsewhere) {
  TestNode first({.name = "a", .id = 11});
  TestNode second({.name = "b", .id = 22, .rendezvous = {first.address()}});
  std::future<JoinEnd> rank0 = first.join("moe", 0, config_of(2), 15 * kSecond, 77);
  const JoinEnd rank1 = take(second.join("moe", 1, config_of(2)));
  ASSERT_NE(rank1.placed, nullptr);
  ASSERT_NE(take(std::move(rank0)).placed, nullptr);
  std::future<session::ErrorDetail> formed = second.report(rank1.placed->key);
  first.client().withdraw("moe", 0, 77);
  const session::ErrorDetail end = take(std::move(formed));
  EXPECT_EQ(end.status.reason(), EXPERTD_REASON_CANCELLED);
  EXPECT_TRUE(has(end.status, "rank 0 of node \"a\"")) << end.status.message();
}

TEST(BootstrapRefusal, AFailureOfOneNodeIsHeardOnAll) {
  TestNode first({.name = "a", .id = 11});
  TestNode second({.name = "b", .id = 22, .rendezvous = {first.address()}});
  std::future<JoinEnd> rank0 = first.join("moe", 0, config_of(2));
  const uint64_t key = take(second.join("moe", 1, config_of(2))).placed->key;
  ASSERT_NE(take(std::move(rank0)).placed, nullptr);
  std::future<session::ErrorDetail> formed = first.report(key);
  (void)second.report(key, base::Status(EXPERTD_REASON_POOL_EXHAUSTED, "no \xff memory"), 1).wait_for(kPatience);
  const session::ErrorDetail end = take(std::move(formed));
  EXPECT_EQ(end.status.reason(), EXPERTD_REASON_POOL_EXHAUSTED);
  EXPECT_EQ(end.rank, 1);
  EXPECT_TRUE(has(end.status, "node \"b\", rank 1: no ? memory")) << end.status.message();
}

TEST(BootstrapRefusal, OneNodeTooManyIsToldAtOnce) {
  group::RendezvousOptions options;
  options.max_nodes = 2;
  TestNode first({.name = "a", .id = 11, .options = options});
  TestNode second({.name = "b", .id = 22, .rendezvous = {first.address()}});
  std::future<JoinEnd> rank0 = first.join("moe", 0, config_of(2));
  ASSERT_NE(take(second.join("moe", 1, config_of(2))).placed, nullptr);
  TestNode third({.name = "c", .id = 33, .rendezvous = {first.address()}});
  const JoinEnd end = take(third.join("other", 0, config_of(1)));
  EXPECT_EQ(end.error.status.reason(), EXPERTD_REASON_NODE_LIMIT);
  EXPECT_TRUE(has(end.error.status, "\"c\"")) << end.error.status.message();
}

struct Keys {
  const char* of_host;
  const char* of_node;
  const char* says;
};

TEST(BootstrapRefusal, AnotherClusterKeyIsToldAtOnce) {
  for (const Keys& keys :
       {Keys{"key-of-the-cluster", "key-of-another-one", "another cluster key"},
        Keys{"key-of-the-cluster", "", "was given none"}, Keys{"", "key-of-the-cluster", "no cluster key"},
        Keys{"key-of-the-cluster", "key-of-the-clusterx", "another cluster key"}}) {
    TestNode host({.name = "a", .id = 11, .key = keys.of_host});
    TestNode node({.name = "b", .id = 22, .rendezvous = {host.address()}, .key = keys.of_node});
    const JoinEnd end = take(node.join("moe", 0, config_of(1)));
    EXPECT_EQ(end.error.status.reason(), EXPERTD_REASON_CLUSTER_KEY);
    EXPECT_TRUE(has(end.error.status, keys.says)) << end.error.status.message();
    EXPECT_FALSE(has(end.error.status, "key-of-the-cluster")) << "a key is a secret";
  }
}

TEST(BootstrapRefusal, TheSameClusterKeyIsTaken) {
  TestNode host({.name = "a", .id = 11, .key = "key-of-the-cluster"});
  TestNode node({.name = "b", .id = 22, .rendezvous = {host.address()}, .key = "key-of-the-cluster"});
  EXPECT_NE(take(node.join("moe", 0, config_of(1))).placed, nullptr);
}

TEST(BootstrapRefusal, NamesBothVersionsToACallerOfAnother) {
  TestNode node({.name = "a", .id = 11});
  ASSERT_NE(take(node.join("moe", 0, config_of(1))).placed, nullptr);  // it hosts by now
  RawPeer raw(node.address());
  peer::v1::JoinRankRequest request;
  to_proto(group::RankJoin{"moe", 0, config_of(1), {}, 5, kSecond}, group::NodeIdentity{9, "z", "", {}}, &request);
  request.set_protocol_version(kPeerProtocolVersion + 6);
  peer::v1::JoinRankResponse response;
  ASSERT_TRUE(raw.join(request, &response).ok());
  const session::ErrorDetail error = from_proto(response.refusal());
  EXPECT_EQ(error.status.reason(), EXPERTD_REASON_PROTOCOL_VERSION);
  EXPECT_TRUE(has(error.status, "speaks version " + std::to_string(kPeerProtocolVersion) + " "))
      << error.status.message();
  EXPECT_TRUE(has(error.status, "the caller version " + std::to_string(kPeerProtocolVersion + 6)))
      << error.status.message();
  EXPECT_EQ(response.protocol_version(), kPeerProtocolVersion);
}

class OtherRelease final : public peer::v1::Peer::Service {
  grpc::Status Hello(grpc::ServerContext*, const peer::v1::HelloRequest*, peer::v1::HelloResponse* response) override {
    response->set_protocol_version(9);
    response->set_hosts_rendezvous(true);
    return grpc::Status::OK;
  }
};

TEST(BootstrapRefusal, NamesBothVersionsOfAHostOfAnother) {
  OtherRelease service;
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(&service);
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  TestNode node({.name = "b", .id = 22, .rendezvous = {"127.0.0.1:" + std::to_string(port)}});
  const JoinEnd end = take(node.join("moe", 0, config_of(1)));
  EXPECT_EQ(end.error.status.reason(), EXPERTD_REASON_PROTOCOL_VERSION);
  EXPECT_TRUE(has(end.error.status, "it speaks version 9")) << end.error.status.message();
  EXPECT_TRUE(has(end.error.status, "this daemon version " + std::to_string(kPeerProtocolVersion)))
      << end.error.status.message();
}

TEST(BootstrapRefusal, ACallMustCarryADeadline) {
  TestNode node({.name = "a", .id = 11});
  RawPeer raw(node.address());
  peer::v1::HelloRequest request;
  request.set_protocol_version(kPeerProtocolVersion);
  peer::v1::HelloResponse response;
  ASSERT_TRUE(raw.hello(request, &response, false).ok());
  EXPECT_EQ(from_proto(response.refusal()).status.reason(), EXPERTD_REASON_DEADLINE_MISSING);
}

TEST(BootstrapRefusal, ADaemonThatDoesNotHostSaysSo) {
  TestNode host({.name = "a", .id = 11});
  TestNode node({.name = "b", .id = 22, .rendezvous = {host.address()}});
  RawPeer raw(node.address());
  peer::v1::JoinRankRequest request;
  to_proto(group::RankJoin{"moe", 0, config_of(1), {}, 5, kSecond}, group::NodeIdentity{9, "z", "", {}}, &request);
  peer::v1::JoinRankResponse response;
  ASSERT_TRUE(raw.join(request, &response).ok());
  EXPECT_EQ(from_proto(response.refusal()).status.reason(), EXPERTD_REASON_RENDEZVOUS_UNAVAILABLE);
}

TEST(BootstrapRefusal, AHelloOfANodeOutOfRangeIsRefused) {
  TestNode node({.name = "a", .id = 11});
  RawPeer raw(node.address());
  peer::v1::HelloRequest request;
  request.set_protocol_version(kPeerProtocolVersion);
  request.mutable_node()->set_id(5);
  request.mutable_node()->set_name("z");
  request.mutable_node()->add_lanes()->set_address(std::string(5000, 'x'));
  peer::v1::HelloResponse response;
  ASSERT_TRUE(raw.hello(request, &response).ok());
  EXPECT_EQ(from_proto(response.refusal()).status.reason(), EXPERTD_REASON_ARGUMENT_RANGE);
  request.mutable_node()->mutable_lanes(0)->set_address(std::string(100'000, 'x'));
  EXPECT_EQ(raw.hello(request, &response).error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
}

TEST(BootstrapRefusal, RefusesWhatAJoinMayNotBeWithoutAsking) {
  TestNode node({.name = "a", .id = 11, .rendezvous = {"127.0.0.1:1"}});
  const JoinEnd end = take(node.join("moe", 4, config_of(2)));
  EXPECT_EQ(end.error.status.reason(), EXPERTD_REASON_ARGUMENT_RANGE);
  EXPECT_EQ(end.error.field, "rank");
}

}  // namespace
}  // namespace expertd::fabric
