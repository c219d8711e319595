// SPDX-License-Identifier: Apache-2.0
#include "daemon/control/convert.h"

#include <gtest/gtest.h>

#include "daemon/control/error_details.h"
#include "expertd/v1/error.pb.h"

namespace expertd::control {
namespace {

v1::GroupConfig good_config() {
  v1::GroupConfig config;
  config.set_expert_parallel_size(4);
  config.set_num_experts(64);
  config.set_hidden(7168);
  config.set_top_k(8);
  config.set_max_tokens(128);
  config.set_mode(v1::GROUP_MODE_INFERENCE);
  config.set_on_rank_loss(v1::ON_RANK_LOSS_MASK);
  config.set_op_timeout_ns(11);
  config.set_first_op_timeout_ns(12);
  config.set_dispatch_dtypes(5);
  return config;
}

TEST(ControlConvert, GroupConfigKeepsEveryField) {
  const Converted<session::GroupConfig> out = from_proto(good_config());
  ASSERT_TRUE(out.error.status.is_ok());
  const session::GroupConfig want{.expert_parallel_size = 4,
                                  .num_experts = 64,
                                  .hidden = 7168,
                                  .top_k = 8,
                                  .max_tokens = 128,
                                  .mode = session::GroupMode::kInference,
                                  .on_rank_loss = session::OnRankLoss::kMask,
                                  .op_timeout_ns = 11,
                                  .first_op_timeout_ns = 12,
                                  .dispatch_dtypes = 5,
                                  .communication = {}};
  EXPECT_EQ(out.value, want);
}

TEST(ControlConvert, UnknownEnumValuesAreNamed) {
  v1::GroupConfig config = good_config();
  config.set_mode(static_cast<v1::GroupMode>(17));
  Converted<session::GroupConfig> out = from_proto(config);
  EXPECT_EQ(out.error.status.reason(), EXPERTD_REASON_ARGUMENT_RANGE);
  EXPECT_EQ(out.error.field, "mode");
  EXPECT_EQ(out.error.value, "17");

  config.set_mode(v1::GROUP_MODE_UNSPECIFIED);
  EXPECT_EQ(from_proto(config).error.field, "mode");

  config = good_config();
  config.set_on_rank_loss(static_cast<v1::OnRankLoss>(-3));
  out = from_proto(config);
  EXPECT_EQ(out.error.field, "on_rank_loss");
  EXPECT_EQ(out.error.value, "-3");
}

TEST(ControlConvert, JoinNeedsNameAndConfig) {
  v1::JoinGroupRequest join;
  EXPECT_EQ(from_proto(join).error.field, "name");
  join.set_name(std::string(65, 'a'));
  EXPECT_EQ(from_proto(join).error.field, "name");
  join.set_name("line\nbreak");
  EXPECT_EQ(from_proto(join).error.field, "name");
  join.set_name("prefill");
  EXPECT_EQ(from_proto(join).error.status.reason(), EXPERTD_REASON_MISSING_ARGUMENT);
  *join.mutable_config() = good_config();
  join.set_rank(3);
  join.set_join_timeout_ns(5);
  const Converted<session::JoinRequest> out = from_proto(join);
  ASSERT_TRUE(out.error.status.is_ok());
  EXPECT_EQ(out.value.name, "prefill");
  EXPECT_EQ(out.value.rank, 3U);
  EXPECT_EQ(out.value.timeout_ns, 5U);
  EXPECT_EQ(out.value.config.hidden, 7168U);
}

TEST(ControlConvert, RegisterTakesExactlyOneSource) {
  v1::RegisterBufferRequest request;
  EXPECT_EQ(from_proto(request).error.field, "source");
  request.set_cuda_ipc_handle("short");
  EXPECT_EQ(from_proto(request).error.field, "cuda_ipc_handle");
  request.set_cuda_ipc_handle(std::string(64, '\xff'));
  EXPECT_TRUE(from_proto(request).error.status.is_ok());
  request.set_fd_token(0);
  EXPECT_EQ(from_proto(request).error.status.reason(), EXPERTD_REASON_NO_SUCH_TOKEN);
  request.set_fd_token(9);
  request.set_offset(16);
  request.set_size(32);
  request.set_allocation_size(64);
  const Converted<RegisterRequest> out = from_proto(request);
  ASSERT_TRUE(out.error.status.is_ok());
  EXPECT_EQ(out.value.fd_token, 9U);
  EXPECT_TRUE(out.value.ipc_handle.empty());
  EXPECT_EQ(out.value.allocation_size, 64U);
}

TEST(ControlConvert, OpenSessionTextsArePrintable) {
  v1::OpenSessionRequest request;
  EXPECT_EQ(from_proto(request).error.field, "client_id");
  request.set_client_id("vllm-0");
  EXPECT_TRUE(from_proto(request).error.status.is_ok());
  request.set_traceparent(std::string(129, 'x'));
  EXPECT_EQ(from_proto(request).error.field, "traceparent");
}

TEST(ControlConvert, StatusCarriesDevicesGroupsAndProcess) {
  session::StatusSnapshot snapshot;
  snapshot.state = "ready";
  snapshot.devices.resize(2);
  snapshot.devices[1].uuid = "GPU-1";
  snapshot.devices[1].peer_access_mask = 1;
  snapshot.groups.resize(1);
  snapshot.groups[0].config.mode = session::GroupMode::kAuto;
  snapshot.groups[0].config.dispatch_dtypes = 6;
  snapshot.groups[0].joined = base::RankSet(3);
  snapshot.groups[0].lost = base::RankSet::one(130);
  snapshot.groups[0].excluded = base::RankSet(4) | base::RankSet::one(64);
  v1::GetStatusResponse message;
  to_proto(snapshot, ProcessFacts{.pid = 7, .resident_bytes = 4096}, &message);
  EXPECT_EQ(message.abi_major(), 1U);
  ASSERT_EQ(message.devices_size(), 2);
  EXPECT_EQ(message.devices(1).uuid(), "GPU-1");
  EXPECT_EQ(message.groups(0).mode(), "auto");
  EXPECT_EQ(message.groups(0).dispatch_dtypes(), 6U);
  EXPECT_EQ(message.groups(0).joined(), 3U);
  EXPECT_EQ(message.groups(0).joined_more_size(), 0) << "no words without ranks";
  EXPECT_EQ(message.groups(0).lost(), 0U);
  ASSERT_EQ(message.groups(0).lost_more_size(), 2);
  EXPECT_EQ(message.groups(0).lost_more(1), 4U);
  EXPECT_EQ(message.groups(0).excluded(), 4U);
  ASSERT_EQ(message.groups(0).excluded_more_size(), 1);
  EXPECT_EQ(message.groups(0).excluded_more(0), 1U);
  EXPECT_EQ(message.pid(), 7U);
  EXPECT_EQ(message.resident_bytes(), 4096U);
}

TEST(ControlConvert, AMaskNamesRanksOfEveryWord) {
  v1::GroupMaskRequest request;
  request.set_group_id(9);
  request.set_exclude(1);
  request.add_exclude_more(2);
  for (int word = 1; word < static_cast<int>(base::RankSet::kWords); ++word) {
    request.add_readmit_more(word == 7 ? uint64_t{1} << 63 : 0);
  }
  const auto converted = from_proto(request);
  ASSERT_TRUE(converted.error.status.is_ok()) << converted.error.status.message();
  EXPECT_EQ(converted.value.group.value, 9U);
  EXPECT_EQ(converted.value.exclude, base::RankSet(1) | base::RankSet::one(65));
  EXPECT_EQ(converted.value.readmit, base::RankSet::one(511));
  request.add_readmit_more(1);
  EXPECT_EQ(from_proto(request).error.status.reason(), EXPERTD_REASON_ARGUMENT_RANGE);
  EXPECT_EQ(from_proto(request).error.field, "readmit_more");
}

TEST(ControlConvert, TheRuleOfAGroupIsInTheAnswersToJoinsAndPeople) {
  v1::GroupConfig config = good_config();
  config.set_copies(3);
  EXPECT_EQ(from_proto(config).value.copies, 3U);
  session::JoinGrant grant;
  grant.rule = {2, 1171};
  v1::JoinGroupResponse message;
  to_proto(grant, &message);
  ASSERT_TRUE(message.has_rule());
  EXPECT_EQ(message.rule().copies(), 2U);
  EXPECT_EQ(message.rule().ht_split_tokens(), 1171U);
  session::StatusSnapshot snapshot;
  snapshot.groups.emplace_back();
  snapshot.groups[0].executor = "ll sm, split copy_engine";
  snapshot.devices.emplace_back();
  snapshot.devices[0].lane_streams = 4;
  snapshot.devices[0].parked_streams_max = 28;
  v1::GetStatusResponse status;
  to_proto(snapshot, ProcessFacts{.pid = 7, .resident_bytes = 4096}, &status);
  EXPECT_EQ(status.groups(0).executor(), "ll sm, split copy_engine");
  EXPECT_EQ(status.devices(0).lane_streams(), 4U);
  EXPECT_EQ(status.devices(0).parked_streams_max(), 28U);
}

TEST(ControlConvert, OddBytesInNamesDoNotSpoilTheAnswer) {
  std::vector<session::SessionSnapshot> sessions(1);
  sessions[0].name = "a\xff\nb";
  v1::ListSessionsResponse message;
  to_proto(sessions, &message);
  EXPECT_EQ(message.sessions(0).name(), "a??b");
}

TEST(ControlErrorDetails, TextIsCutBetweenCharacters) {
  EXPECT_EQ(cut_text("abc", 3), "abc");
  EXPECT_EQ(cut_text("abcd", 3), "abc");
  EXPECT_EQ(cut_text("a\xc3\xa4", 2), "a");  // never half of a two-byte character
  EXPECT_EQ(cut_text("\x80\x80\x80", 2), "");
}

// The bytes of a fixed error, worked out by hand from the wire format.
TEST(ControlErrorDetails, GoldenBytes) {
  session::ErrorDetail error;
  error.status = base::Status(EXPERTD_REASON_PEER_LOST, "x");
  error.rank = 2;
  const std::string info = std::string("\x08\x04\x12\x09PEER_LOST\x18\x01\x20\x04", 17);
  std::string any = "\x0a\x28";
  any += std::string(kErrorInfoType) + "\x12\x11" + info;
  std::string want = "\x08\x0a\x12\x01x\x1a";
  want += static_cast<char>(any.size());
  want += any;
  ASSERT_EQ(kErrorInfoType.size(), 0x28U);
  EXPECT_EQ(encode_error_details(error), want);
}

}  // namespace
}  // namespace expertd::control
