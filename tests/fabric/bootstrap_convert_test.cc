// SPDX-License-Identifier: Apache-2.0
// What daemons tell each other survives the way through messages, whole; and texts of addresses and keys.
#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>
#include <gtest/gtest.h>

#include <fstream>
#include <random>
#include <string>

#include "daemon/fabric/bootstrap/address.h"
#include "daemon/fabric/bootstrap/node_facts.h"
#include "daemon/fabric/bootstrap/peer_convert.h"
#include "tests/support/temp_dir.h"

namespace expertd::fabric {
namespace {

/// Fills every field of the message with a value of its own, so that one that a conversion forgets is missed.
void fill(google::protobuf::Message* message, uint32_t* next) {
  using Field = google::protobuf::FieldDescriptor;
  const google::protobuf::Descriptor* const type = message->GetDescriptor();
  const google::protobuf::Reflection* const reflection = message->GetReflection();
  for (int i = 0; i < type->field_count(); ++i) {
    const Field* const field = type->field(i);
    switch (field->cpp_type()) {
      case Field::CPPTYPE_UINT32:
        reflection->SetUInt32(message, field, (*next)++);
        break;
      case Field::CPPTYPE_UINT64:
        reflection->SetUInt64(message, field, (*next)++);
        break;
      case Field::CPPTYPE_BOOL:
        reflection->SetBool(message, field, true);
        break;
      case Field::CPPTYPE_ENUM:
        reflection->SetEnumValue(message, field, 1 + static_cast<int>((*next)++ % 2));
        break;
      case Field::CPPTYPE_MESSAGE:
        fill(reflection->MutableMessage(message, field), next);
        break;
      default:
        FAIL() << "this test does not know how to fill " << field->full_name();
    }
  }
}

TEST(BootstrapConvert, LosesNoFieldOfAConfiguration) {
  expertd::v1::GroupConfig message;
  uint32_t next = 3;
  fill(&message, &next);
  expertd::v1::GroupConfig back;
  to_proto(from_proto(message), &back);
  EXPECT_EQ(back.SerializeAsString(), message.SerializeAsString());
}

TEST(BootstrapConvert, LosesNothingOfAGroupThatIsKept) {
  group::KeptGroup kept{"moe", {}, {}, {1, 2}};
  kept.config.expert_parallel_size = 3;
  kept.placed.key = 7;
  kept.placed.epoch = 3;
  kept.placed.nodes = {{5, "a", "a:1", {}}, {6, "b", "b:1", {}}};
  kept.placed.ranks = {{0, {}, false, 0}, {1, {}, false, 0}, {1, {true, true, true}, true, 3}};
  kept.placed.predecessor = 4;
  kept.placed.returning = {2};
  kept.placed.lost = {1};
  peer::v1::AwaitSuccessorRequest message;
  to_proto(kept, {9, "c", "c:1", {{0, "x"}}}, &message);
  const base::Result<group::KeptGroup> back = from_proto(message);
  ASSERT_TRUE(back.is_ok()) << back.status().message();
  EXPECT_EQ(back.value().name, "moe");
  EXPECT_EQ(back.value().config, kept.config);
  EXPECT_EQ(back.value().gone, kept.gone);
  EXPECT_EQ(back.value().placed.key, 7U);
  EXPECT_EQ(back.value().placed.epoch, 3U);
  EXPECT_EQ(back.value().placed.nodes, kept.placed.nodes);
  EXPECT_EQ(back.value().placed.ranks.size(), 3U);
  EXPECT_EQ(back.value().placed.ranks[2].facts, kept.placed.ranks[2].facts);
  EXPECT_EQ(back.value().placed.predecessor, 4U);
  EXPECT_EQ(back.value().placed.returning, kept.placed.returning);
  EXPECT_EQ(back.value().placed.lost, kept.placed.lost);
  EXPECT_EQ(from_proto(message.node()), (group::NodeIdentity{9, "c", "c:1", {{0, "x"}}}));
  message.mutable_placed()->add_lost(3);
  EXPECT_EQ(from_proto(message).status().reason(), EXPERTD_REASON_BAD_MESSAGE);
}

TEST(BootstrapConvert, LosesNothingOfAJoin) {
  const group::NodeIdentity node{5, "a", "a:1", {{0, std::string("\0\xff", 2)}, {7, "x"}}};
  group::RankJoin join{"moe", 3, {}, {true, true, true}, 9, 10};
  join.config.expert_parallel_size = 4;
  peer::v1::JoinRankRequest message;
  to_proto(join, node, &message);
  const group::RankJoin back = from_proto(message);
  EXPECT_EQ(back.group, "moe");
  EXPECT_EQ(back.rank, 3U);
  EXPECT_EQ(back.config, join.config);
  EXPECT_EQ(back.facts, join.facts);
  EXPECT_EQ(back.attempt, 9U);
  EXPECT_EQ(back.timeout_ns, 10U);
  EXPECT_EQ(from_proto(message.node()), node);
  EXPECT_EQ(message.protocol_version(), kPeerProtocolVersion);
}

group::Placed placed_pair() {
  return {5,
          2,
          {{1, "a", "a:1", {{0, "x"}}}, {2, "b", "b:1", {}}},
          {{0, {}, true, 3}, {1, {true, false, true}, false, 0}},
          77};
}

TEST(BootstrapConvert, LosesNothingOfAPlacement) {
  const group::Placed placed = placed_pair();
  peer::v1::JoinRankResponse message;
  to_proto(placed, &message);
  const auto back = from_proto(message);
  ASSERT_TRUE(back.is_ok());
  const group::Placed& out = *back.value();
  EXPECT_EQ(out.key, placed.key);
  EXPECT_EQ(out.epoch, placed.epoch);
  EXPECT_EQ(out.nodes, placed.nodes);
  EXPECT_EQ(out.form_timeout_ns, placed.form_timeout_ns);
  ASSERT_EQ(out.ranks.size(), 2U);
  EXPECT_TRUE(out.ranks[0].copy_kernels);
  EXPECT_EQ(out.ranks[0].copies, 3U);
  EXPECT_EQ(out.ranks[1].node, 1U);
  EXPECT_EQ(out.ranks[1].facts, placed.ranks[1].facts);
}

TEST(BootstrapConvert, RefusesAPlacementThatIsNone) {
  void (*const spoils[])(peer::v1::JoinRankResponse*) = {
      [](auto* m) { m->set_group_key(0); },
      [](auto* m) { m->clear_nodes(); },
      [](auto* m) { m->clear_ranks(); },
      [](auto* m) { m->mutable_ranks(1)->set_node(2); },
      [](auto* m) {
        for (int i = 0; i < 600; ++i) {
          m->add_ranks();
        }
      },
      [](auto* m) {
        for (int i = 0; i < 64; ++i) {
          m->add_nodes();
          m->add_ranks();
        }
      },
  };
  for (const auto& spoil : spoils) {
    peer::v1::JoinRankResponse message;
    to_proto(placed_pair(), &message);
    spoil(&message);
    EXPECT_EQ(from_proto(message).status().reason(), EXPERTD_REASON_BAD_MESSAGE);
  }
}

TEST(BootstrapConvert, TakesRandomBytesForNoPlacementAndDoesNotFall) {
  for (uint32_t seed = 1; seed <= 2000; ++seed) {
    std::mt19937 random(seed);
    peer::v1::JoinRankResponse message;
    to_proto(placed_pair(), &message);
    std::string bytes = message.SerializeAsString();
    for (int i = 0; i < 4; ++i) {
      bytes[random() % bytes.size()] = static_cast<char>(random());
    }
    peer::v1::JoinRankResponse spoiled;
    if (spoiled.ParseFromString(bytes)) {
      const auto placed = from_proto(spoiled);
      if (placed.is_ok()) {
        const engine::Placement placement = group::placement_of(*placed.value(), 1);
        EXPECT_EQ(placement.ranks(), placed.value()->ranks.size()) << "seed " << seed;
      }
    }
  }
}

TEST(BootstrapConvert, CarriesAnErrorWithItsDetails) {
  session::ErrorDetail error;
  error.status = base::Status(EXPERTD_REASON_CONFIG_MISMATCH, "line\nend \xff" + std::string(2000, 'x'));
  error.rank = 4;
  error.field = "hidden";
  error.value = "1";
  error.other_value = "2";
  peer::v1::Refusal message;
  to_proto(error, &message);
  const session::ErrorDetail back = from_proto(message);
  EXPECT_EQ(back.status.reason(), EXPERTD_REASON_CONFIG_MISMATCH);
  EXPECT_EQ(back.status.message().substr(0, 10), "line?end ?");
  EXPECT_EQ(back.status.message().size(), 1024U);
  EXPECT_EQ(back.rank, 4);
  EXPECT_EQ(back.field, "hidden");
  EXPECT_EQ(back.value, "1");
  EXPECT_EQ(back.other_value, "2");
}

TEST(BootstrapConvert, AReasonOfALaterReleaseIsStillAnError) {
  peer::v1::Refusal message;
  message.set_message("what happened");
  message.mutable_info()->set_reason(4711);
  message.mutable_info()->set_reason_name("NEW_ONE");
  EXPECT_EQ(from_proto(message).status.message(), "NEW_ONE (4711, not known here): what happened");
  EXPECT_EQ(from_proto(peer::v1::Refusal{}).status.reason(), EXPERTD_REASON_INTERNAL);
}

TEST(BootstrapAddress, ReadsHostsAndPorts) {
  const base::Result<HostPort> name = parse_host_port("dns:expertd.svc:9465");
  ASSERT_TRUE(name.is_ok());
  EXPECT_EQ(name.value().host, "expertd.svc");
  EXPECT_EQ(name.value().port, "9465");
  EXPECT_TRUE(name.value().all_of_name);
  EXPECT_EQ(parse_host_port("[fd00::1]:1").value().host, "fd00::1");
  for (const char* text : {"", ":", "a", ":1", "a:", "a:x", "a:65536", "a:-1", "fd00::1:1", "[]:1", "a b:1", "dns:"}) {
    EXPECT_EQ(parse_host_port(text).status().reason(), EXPERTD_REASON_CONFIG_BAD_VALUE) << text;
  }
}

TEST(BootstrapAddress, KnowsItsOwnMachine) {
  EXPECT_TRUE(is_local(parse_literal("127.0.0.1:1").value()));
  EXPECT_TRUE(is_local(parse_literal("127.4.5.6:1").value()));
  EXPECT_TRUE(is_local(parse_literal("[::ffff:127.0.0.1]:1").value()));
  EXPECT_FALSE(is_local(parse_literal("192.0.2.1:1").value()));
  EXPECT_EQ(parse_literal("[fd00::1]:7").value().text(), "[fd00::1]:7");
  EXPECT_EQ(parse_literal("10.0.0.1:7").value().text(), "10.0.0.1:7");
}

TEST(BootstrapFacts, AdvertisesWhatOthersCanReach) {
  EXPECT_EQ(advertised_address("", "10.0.0.1:0", 7), "10.0.0.1:7");
  EXPECT_EQ(advertised_address("", "[fd00::1]:0", 7), "[fd00::1]:7");
  EXPECT_EQ(advertised_address("node-1.svc", "0.0.0.0:9", 9), "node-1.svc:9");
  EXPECT_EQ(advertised_address("fd00::2", "[::]:9", 9), "[fd00::2]:9");
  EXPECT_EQ(advertised_address("", "0.0.0.0:9", 9), node_name_or_host("") + ":9");
  EXPECT_EQ(node_name_or_host("rack 1"), "rack 1");
}

TEST(BootstrapFacts, ReadsTheKeyOfTheClusterAndTellsItNobody) {
  const support::TempDir directory;
  const std::string path = directory.file("key");
  EXPECT_EQ(read_cluster_key("").value(), "");
  EXPECT_EQ(read_cluster_key(path).status().reason(), EXPERTD_REASON_CONFIG_UNREADABLE);
  std::ofstream(path) << "0123456789abcdef\n";
  EXPECT_EQ(read_cluster_key(path).value(), "0123456789abcdef");
  for (const std::string& bad :
       {std::string("secret"), std::string(257, 's'), std::string("secret secret secret"),
        std::string("secret-secret-secret\nsecret"), std::string("secret-secret-\xff-secret")}) {
    std::ofstream(path, std::ios::trunc) << bad << "\r\n";
    const base::Status status = read_cluster_key(path).status();
    EXPECT_EQ(status.reason(), EXPERTD_REASON_CONFIG_BAD_VALUE) << bad;
    EXPECT_EQ(status.message().find("secret"), std::string::npos) << status.message();
  }
}

}  // namespace
}  // namespace expertd::fabric
