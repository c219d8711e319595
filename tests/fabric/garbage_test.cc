// SPDX-License-Identifier: Apache-2.0
// What a daemon gets that no daemon sends: counted by its cause, never delivered, and where only a broken daemon sends
// it, the daemon it claims to be of is lost by name. Node 0 is the victim; a bare UCX program says it was node 1.
#include <gtest/gtest.h>

#include <cstring>
#include <functional>

#include "daemon/fabric/wire.h"
#include "tests/fabric/fabric_pair.h"
#include "tests/fabric/raw_sender.h"

namespace expertd::fabric_test {
namespace {

using fabric::DropCause;
using fabric::WireMessage;

constexpr auto kLatencyLane = static_cast<uint32_t>(fabric::LaneKind::kLatency);

class FabricGarbage : public testing::Test {
 protected:
  void SetUp() override {
    world_.create([](uint32_t node) { return options_for("tcp", "node" + std::to_string(node)); });
    ASSERT_NO_FATAL_FAILURE(world_.connect());
    ASSERT_NO_FATAL_FAILURE(world_.wait_up());
    ASSERT_NO_FATAL_FAILURE(world_.open());
    sender_ = std::make_unique<RawSender>(world_.node(0).fabric->identity().addresses[kLatencyLane][0]);
    ASSERT_TRUE(sender_->ready());
  }

  /// What node 1 could send to the second rank of node 0.
  WireMessage good() {
    WireMessage header;
    header.prefix.source_node = world_.node(1).fabric->identity().node_id;
    header.group_key = world_.link(0).key;
    header.epoch = world_.link(0).epoch;
    header.kind = 1;
    header.op = 1;
    header.targets = 2;
    header.source_rank = 2;
    header.lane = 0;
    header.bytes = sizeof(payload_);
    header.credited = 1;
    return header;
  }
  bool send(const WireMessage& header, uint32_t flags = UCP_AM_SEND_FLAG_EAGER) {
    return sender_->send(fabric::kWireMessage, &header, sizeof(header), payload_, sizeof(payload_), flags);
  }
  bool counted(DropCause cause, uint64_t count) {
    return world_.node(0).bell->wait([&] { return world_.snapshot(0).dropped[static_cast<uint32_t>(cause)] == count; });
  }
  bool nothing_arrived() {
    engine::Arrival arrival;
    return !world_.node(0).port->receive(0, &arrival) && !world_.node(0).port->receive(1, &arrival);
  }
  /// The message is dropped for `cause` and costs node 1 its connection, which is told with `word`.
  void expect_fatal(const WireMessage& header, DropCause cause, const std::string& word, uint32_t flags) {
    ASSERT_TRUE(send(header, flags));
    EXPECT_TRUE(counted(cause, 1));
    ASSERT_TRUE(world_.node(0).bell->wait([&] { return !world_.node(0).bell->lost().empty(); }));
    const Bell::Loss loss = world_.node(0).bell->lost()[0];
    EXPECT_EQ(loss.node_id, header.prefix.source_node);
    EXPECT_EQ(loss.cause, fabric::LossCause::kGarbage);
    EXPECT_NE(loss.detail.find(word), std::string::npos) << loss.detail;
    EXPECT_TRUE(nothing_arrived());
  }

  World world_{{2, 1}};
  std::unique_ptr<RawSender> sender_;
  char payload_[64] = {};
};

TEST_F(FabricGarbage, WhatNothingIsWrongWithArrives) {
  ASSERT_TRUE(send(good()));
  engine::Arrival arrival;
  ASSERT_TRUE(receive(world_.node(0), 1, &arrival));
  EXPECT_EQ(arrival.bytes, sizeof(payload_));
  world_.node(0).port->release(1, arrival);
  WireMessage by_rendezvous = good();
  by_rendezvous.credited = 0;
  ASSERT_TRUE(send(by_rendezvous, UCP_AM_SEND_FLAG_RNDV));
  ASSERT_TRUE(receive(world_.node(0), 1, &arrival));
  world_.node(0).port->release(1, arrival);
}

TEST_F(FabricGarbage, HeadersThatAreNoneAreCountedAndHurtNobody) {
  const std::vector<unsigned char> noise(300, 0xa5);
  uint64_t count = 0;
  for (const size_t bytes : {size_t{1}, size_t{8}, sizeof(WireMessage), size_t{300}}) {
    for (unsigned id = 1; id <= fabric::kWireTypes; ++id) {
      ASSERT_TRUE(sender_->send(id, noise.data(), bytes, payload_, sizeof(payload_), UCP_AM_SEND_FLAG_EAGER));
      ASSERT_TRUE(sender_->send(id, noise.data(), bytes, payload_, sizeof(payload_), UCP_AM_SEND_FLAG_RNDV));
      count += 2;
    }
  }
  EXPECT_TRUE(counted(DropCause::kMalformed, count));
  EXPECT_TRUE(nothing_arrived());
  EXPECT_TRUE(world_.node(0).bell->lost().empty());
}

TEST_F(FabricGarbage, AnotherProtocolVersionIsCounted) {
  WireMessage header = good();
  header.prefix.version = fabric::kWireVersion + 1;
  ASSERT_TRUE(send(header));
  EXPECT_TRUE(counted(DropCause::kVersion, 1));
  EXPECT_TRUE(nothing_arrived());
}

TEST_F(FabricGarbage, AnUnknownNodeIsCounted) {
  WireMessage header = good();
  ++header.prefix.source_node;
  ASSERT_TRUE(send(header));
  EXPECT_TRUE(counted(DropCause::kUnknownNode, 1));
  EXPECT_TRUE(nothing_arrived());
}

TEST_F(FabricGarbage, AnUnknownGroupAndAnotherEpochAreCountedAndEndAtTheSender) {
  WireMessage header = good();
  ++header.group_key;
  ASSERT_TRUE(send(header));
  EXPECT_TRUE(counted(DropCause::kUnknownGroup, 1));
  for (const uint32_t epoch : {0U, 2U}) {
    header = good();
    header.epoch = epoch;
    header.credited = 0;
    ASSERT_TRUE(send(header, UCP_AM_SEND_FLAG_RNDV)) << "a rendezvous that is dropped ends too";
  }
  EXPECT_TRUE(counted(DropCause::kEpoch, 2));
  EXPECT_TRUE(nothing_arrived());
  EXPECT_TRUE(world_.node(0).bell->lost().empty()) << "a node that is a little behind is no broken one";
}

struct BadField {
  std::string name;
  std::function<void(WireMessage*)> change;
  bool rendezvous = false;
};

class FabricGarbageField : public FabricGarbage, public testing::WithParamInterface<BadField> {};

INSTANTIATE_TEST_SUITE_P(Of, FabricGarbageField,
                         testing::Values(BadField{"lane", [](WireMessage* h) { h->lane = 1; }},
                                         BadField{"lane", [](WireMessage* h) { h->lane = 7; }, true},
                                         BadField{"kind", [](WireMessage* h) { h->kind = 0; }},
                                         BadField{"kind", [](WireMessage* h) { h->kind = 5; }, true},
                                         BadField{"source_rank", [](WireMessage* h) { h->source_rank = 0; }},
                                         BadField{"source_rank",
                                                  [](WireMessage* h) { h->source_rank = 4'000'000'000; }},
                                         BadField{"targets", [](WireMessage* h) { h->targets = 0; }},
                                         BadField{"targets", [](WireMessage* h) { h->targets = 4; }, true},
                                         BadField{"targets", [](WireMessage* h) { h->targets = ~uint64_t{0}; }},
                                         BadField{"bytes", [](WireMessage* h) { h->bytes = 63; }},
                                         BadField{"bytes", [](WireMessage* h) { h->bytes = 4'000'000'000; }},
                                         BadField{"bytes", [](WireMessage* h) { h->bytes = 65; }, true},
                                         BadField{"credited", [](WireMessage* h) { h->credited = 0; }},
                                         BadField{"credited", [](WireMessage* h) { h->credited = 1; }, true}),
                         [](const auto& of) { return of.param.name + "_" + std::to_string(of.index); });

TEST_P(FabricGarbageField, CostsItsNodeTheConnection) {
  WireMessage header = good();
  header.credited = GetParam().rendezvous ? 0 : 1;
  GetParam().change(&header);
  expect_fatal(header, DropCause::kBadField, GetParam().name,
               GetParam().rendezvous ? UCP_AM_SEND_FLAG_RNDV : UCP_AM_SEND_FLAG_EAGER);
}

TEST_F(FabricGarbage, MoreEagerMessagesThanCreditsCostTheConnection) {
  const uint32_t credits = world_.link(0).eager_messages;
  for (uint32_t i = 0; i < credits; ++i) {
    ASSERT_TRUE(send(good()));
  }
  engine::Arrival arrival;
  for (uint32_t i = 0; i < credits; ++i) {
    ASSERT_TRUE(receive(world_.node(0), 1, &arrival)) << "and is kept, so that no room comes free";
  }
  expect_fatal(good(), DropCause::kOverrun, "eager", UCP_AM_SEND_FLAG_EAGER);
}

TEST_F(FabricGarbage, CreditsThatWereNeverGivenOutCostTheConnection) {
  fabric::WireCredit header;
  header.prefix.source_node = good().prefix.source_node;
  header.group_key = good().group_key;
  header.epoch = good().epoch;
  header.credits = 1;
  ASSERT_TRUE(sender_->send(fabric::kWireCredit, &header, sizeof(header), nullptr, 0, UCP_AM_SEND_FLAG_EAGER));
  EXPECT_TRUE(counted(DropCause::kBadField, 1));
  EXPECT_TRUE(world_.node(0).bell->wait([&] { return !world_.node(0).bell->lost().empty(); }));
}

TEST_F(FabricGarbage, ARankThatIsGoneAgainOrIsNotItsOwnCostsTheConnection) {
  fabric::WireGone header;
  header.prefix.source_node = good().prefix.source_node;
  header.group_key = good().group_key;
  header.epoch = good().epoch + 1;
  header.rank = 2;
  header.through = 5;
  RawSender control(world_.node(0).fabric->identity().addresses[0][0]);
  ASSERT_TRUE(control.ready());
  const auto send_gone = [&] {
    return control.send(fabric::kWireGone, &header, sizeof(header), nullptr, 0, UCP_AM_SEND_FLAG_EAGER);
  };
  ASSERT_TRUE(send_gone());
  EXPECT_TRUE(counted(DropCause::kEpoch, 1));
  EXPECT_TRUE(world_.node(0).bell->gone().empty()) << "of another epoch";
  header.epoch = good().epoch;
  ASSERT_TRUE(send_gone());
  EXPECT_TRUE(world_.node(0).bell->wait([&] { return world_.node(0).bell->gone().size() == 1; }));
  EXPECT_TRUE(world_.node(0).bell->lost().empty());
  ASSERT_TRUE(send_gone());
  EXPECT_TRUE(counted(DropCause::kBadField, 1));
  EXPECT_TRUE(world_.node(0).bell->wait([&] { return !world_.node(0).bell->lost().empty(); }));
  EXPECT_EQ(world_.node(0).bell->gone().size(), 1U);
}

TEST_F(FabricGarbage, ARankOfAnotherNodeCannotBeGone) {
  fabric::WireGone header;
  header.prefix.source_node = good().prefix.source_node;
  header.group_key = good().group_key;
  header.epoch = good().epoch;
  header.rank = 0;
  RawSender control(world_.node(0).fabric->identity().addresses[0][0]);
  ASSERT_TRUE(control.ready());
  ASSERT_TRUE(control.send(fabric::kWireGone, &header, sizeof(header), nullptr, 0, UCP_AM_SEND_FLAG_EAGER));
  EXPECT_TRUE(counted(DropCause::kBadField, 1));
  EXPECT_TRUE(world_.node(0).bell->gone().empty());
}

TEST_F(FabricGarbage, AHeartbeatForAnotherIncarnationIsNoSignOfLife) {
  fabric::WireHeartbeat header;
  header.prefix.source_node = good().prefix.source_node;
  header.destination_node = world_.node(0).fabric->identity().node_id + 1;
  header.signal = fabric::kSignalPing;
  RawSender control(world_.node(0).fabric->identity().addresses[0][0]);
  ASSERT_TRUE(control.ready());
  ASSERT_TRUE(control.send(fabric::kWireHeartbeat, &header, sizeof(header), nullptr, 0, UCP_AM_SEND_FLAG_EAGER));
  EXPECT_TRUE(counted(DropCause::kUnknownNode, 1));
}

}  // namespace
}  // namespace expertd::fabric_test
