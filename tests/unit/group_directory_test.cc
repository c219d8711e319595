// SPDX-License-Identifier: Apache-2.0
// The rendezvous of a node: joining, refusing, expiring, leaving and joining again.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "daemon/group/directory.h"
#include "proto/abi/ring_v1.h"

namespace expertd::group {
namespace {

session::GroupConfig config_of(uint32_t ranks) {
  session::GroupConfig config;
  config.expert_parallel_size = ranks;
  config.num_experts = ranks * 4;
  config.hidden = 512;
  config.top_k = 4;
  config.max_tokens = 64;
  config.mode = session::GroupMode::kAuto;
  config.on_rank_loss = session::OnRankLoss::kFail;
  return config;
}

class DirectoryTest : public testing::Test {
 protected:
  /// Joins as session and device rank + 1 unless told otherwise.
  session::ErrorDetail join(uint32_t rank, const session::GroupConfig& config, uint64_t session = 0,
                            uint32_t device = ~0U) {
    Member member;
    member.session = base::SessionId{session == 0 ? rank + 1 : session};
    member.device = base::DeviceIndex{device == ~0U ? rank : device};
    member.deadline_ns = 100 + rank;
    member.cancelled = cancelled_;
    member.done = [this](const session::ErrorDetail& ended, const session::JoinGrant&) {
      answers_.push_back(ended.status.reason());
    };
    formation_.reset();
    return directory_.join({"moe", rank, config, 0, nullptr}, std::move(member), &formation_);
  }

  Directory directory_{Defaults{70, 90}};
  std::unique_ptr<Formation> formation_;
  std::shared_ptr<std::atomic<bool>> cancelled_;  // of the next join
  std::vector<base::Reason> answers_;
};

TEST_F(DirectoryTest, FormsAGroupWhenItsLastRankJoins) {
  for (const uint32_t rank : {2U, 0U}) {
    EXPECT_TRUE(join(rank, config_of(3)).status.is_ok());
    EXPECT_EQ(formation_, nullptr);
  }
  EXPECT_TRUE(join(1, config_of(3)).status.is_ok());
  ASSERT_NE(formation_, nullptr);
  ASSERT_EQ(formation_->members.size(), 3U);
  for (uint32_t rank = 0; rank < 3; ++rank) {
    EXPECT_EQ(formation_->members[rank].rank, rank);
    EXPECT_EQ(formation_->shared->settings().shape.devices[rank].value, rank);
  }
  EXPECT_EQ(formation_->shared->ranks(), 3U);
}

TEST_F(DirectoryTest, TakesTimeoutsFromTheFirstRankOrTheDefaults) {
  (void)join(0, config_of(1));
  EXPECT_EQ(formation_->shared->settings().op_timeout_ns, 70U);
  EXPECT_EQ(formation_->shared->settings().first_op_timeout_ns, 90U);
  formation_.reset();
  session::GroupConfig config = config_of(1);
  config.op_timeout_ns = 5;
  (void)join(0, config);
  EXPECT_EQ(formation_->shared->settings().op_timeout_ns, 5U);
  EXPECT_EQ(formation_->shared->settings().first_op_timeout_ns, 5U);
}

struct Difference {
  const char* field;
  void (*change)(session::GroupConfig& config);
  const char* first;
  const char* other;
};

class DirectoryMismatch : public DirectoryTest, public testing::WithParamInterface<Difference> {};

TEST_P(DirectoryMismatch, NamesTheFieldAndBothValues) {
  ASSERT_TRUE(join(0, config_of(2)).status.is_ok());
  session::GroupConfig config = config_of(2);
  GetParam().change(config);
  const session::ErrorDetail error = join(1, config);
  EXPECT_EQ(error.status.reason(), EXPERTD_REASON_CONFIG_MISMATCH);
  EXPECT_EQ(error.field, GetParam().field);
  EXPECT_EQ(error.other_value, GetParam().first);
  EXPECT_EQ(error.value, GetParam().other);
  EXPECT_EQ(error.rank, 1);
  EXPECT_NE(error.status.message().find(GetParam().field), std::string::npos);
  EXPECT_TRUE(join(1, config_of(2)).status.is_ok()) << "the refused rank may come again";
}

INSTANTIATE_TEST_SUITE_P(
    EveryField, DirectoryMismatch,
    testing::Values(
        Difference{"expert_parallel_size", [](auto& c) { c.expert_parallel_size = 4; }, "2", "4"},
        Difference{"num_experts", [](auto& c) { c.num_experts = 16; }, "8", "16"},
        Difference{"hidden", [](auto& c) { c.hidden = 640; }, "512", "640"},
        Difference{"top_k", [](auto& c) { c.top_k = 2; }, "4", "2"},
        Difference{"max_tokens", [](auto& c) { c.max_tokens = 65; }, "64", "65"},
        Difference{"mode", [](auto& c) { c.mode = session::GroupMode::kNormal; }, "3", "1"},
        Difference{"communication.use_nvlink", [](auto& c) { c.communication.use_nvlink = false; }, "1", "0"},
        Difference{"communication.use_rdma", [](auto& c) { c.communication.use_rdma = false; }, "1", "0"},
        Difference{"communication.virtual_lanes", [](auto& c) { c.communication.virtual_lanes = 1; }, "2", "1"},
        Difference{"communication.bandwidth_ratio", [](auto& c) { c.communication.bandwidth_ratio = 3; }, "1", "3"},
        Difference{"on_rank_loss", [](auto& c) { c.on_rank_loss = session::OnRankLoss::kMask; }, "1", "2"},
        Difference{"op_timeout_ns", [](auto& c) { c.op_timeout_ns = 9; }, "0", "9"},
        Difference{"first_op_timeout_ns", [](auto& c) { c.first_op_timeout_ns = 9; }, "0", "9"},
        Difference{"dispatch_dtypes", [](auto& c) { c.dispatch_dtypes = 5; }, "0", "5"},
        Difference{"capture_lanes", [](auto& c) { c.capture_lanes = 2; }, "0", "2"},
        Difference{"executor", [](auto& c) { c.executor = session::Executor::kSm; }, "0", "1"}),
    [](const auto& row) {
      std::string name = row.param.field;
      std::replace(name.begin(), name.end(), '.', '_');
      return name;
    });

TEST_F(DirectoryTest, HoldsTheRanksOfADynamicGroupToOneThreshold) {
  session::GroupConfig config = config_of(2);
  config.mode = session::GroupMode::kInference;
  config.dynamic_ll_tokens = 8;
  ASSERT_TRUE(join(0, config).status.is_ok());
  config.dynamic_ll_tokens = 9;
  const session::ErrorDetail error = join(1, config);
  EXPECT_EQ(error.status.reason(), EXPERTD_REASON_CONFIG_MISMATCH);
  EXPECT_EQ(error.field, "dynamic_ll_tokens");
  EXPECT_EQ(error.value + " after " + error.other_value, "9 after 8");
  config.dynamic_ll_tokens = 8;
  ASSERT_TRUE(join(1, config).status.is_ok());
  EXPECT_EQ(formation_->shared->settings().dynamic_ll_tokens, 8U);
}

struct Limit {
  const char* field;
  void (*change)(session::GroupConfig& config);
};

class DirectoryLimit : public DirectoryTest, public testing::WithParamInterface<Limit> {};

TEST_P(DirectoryLimit, NamesTheFieldOutOfRange) {
  session::GroupConfig config = config_of(2);
  GetParam().change(config);
  const session::ErrorDetail error = join(0, config);
  EXPECT_EQ(error.status.reason(), EXPERTD_REASON_ARGUMENT_RANGE);
  EXPECT_EQ(error.field, std::string(GetParam().field).substr(0, std::string(GetParam().field).find("__")));
  EXPECT_FALSE(error.other_value.empty());
}

INSTANTIATE_TEST_SUITE_P(
    EveryField, DirectoryLimit,
    testing::Values(Limit{"expert_parallel_size", [](auto& c) { c.expert_parallel_size = 0; }},
                    Limit{"expert_parallel_size__513", [](auto& c) { c.expert_parallel_size = 513; }},
                    Limit{"num_experts__few", [](auto& c) { c.num_experts = 1; }},
                    Limit{"num_experts__many", [](auto& c) { c.num_experts = 2050; }},
                    Limit{"num_experts__uneven", [](auto& c) { c.num_experts = 7; }},
                    Limit{"num_experts__local", [](auto& c) { c.num_experts = 514; }},
                    Limit{"hidden__small", [](auto& c) { c.hidden = 64; }},
                    Limit{"hidden__odd", [](auto& c) { c.hidden = 200; }},
                    Limit{"hidden__large", [](auto& c) { c.hidden = 16512; }},
                    Limit{"top_k__none", [](auto& c) { c.top_k = 0; }},
                    Limit{"top_k__many", [](auto& c) { c.top_k = 33; }},
                    Limit{"max_tokens__none", [](auto& c) { c.max_tokens = 0; }},
                    Limit{"max_tokens__many", [](auto& c) { c.max_tokens = 4097; }},
                    Limit{"mode", [](auto& c) { c.mode = session::GroupMode::kUnspecified; }},
                    Limit{"on_rank_loss", [](auto& c) { c.on_rank_loss = session::OnRankLoss::kUnspecified; }},
                    Limit{"dispatch_dtypes", [](auto& c) { c.dispatch_dtypes = 8; }},
                    Limit{"dynamic_ll_tokens", [](auto& c) { c.dynamic_ll_tokens = 65; }},
                    Limit{"mode__of_a_dynamic_group", [](auto& c) { c.dynamic_ll_tokens = 8; }},
                    Limit{"capture_lanes", [](auto& c) { c.capture_lanes = 3; }},
                    Limit{"capture_lanes__without_low_latency",
                          [](auto& c) {
                            c.mode = session::GroupMode::kNormal;
                            c.capture_lanes = 1;
                          }},
                    Limit{"executor", [](auto& c) { c.executor = static_cast<session::Executor>(3); }},
                    Limit{"dispatch_dtypes__none_of_the_mode",
                          [](auto& c) {
                            c.mode = session::GroupMode::kNormal;
                            c.dispatch_dtypes = EXPERTD_PAYLOAD_FP8;
                          }}),
    [](const auto& row) { return std::string(row.param.field); });

TEST_F(DirectoryTest, GivesTheGroupTheDtypesOfItsConfiguration) {
  (void)join(0, config_of(1));
  EXPECT_EQ(formation_->shared->settings().dispatch_dtypes, 0U);
  formation_.reset();
  session::GroupConfig config = config_of(1);
  config.mode = session::GroupMode::kNormal;
  config.dispatch_dtypes = EXPERTD_PAYLOAD_FP8 | EXPERTD_PAYLOAD_BF16;  // FP8 finds no use there, and does no harm
  (void)join(0, config);
  ASSERT_NE(formation_, nullptr);
  EXPECT_EQ(formation_->shared->settings().dispatch_dtypes, 5U);
  EXPECT_EQ(directory_.snapshot().front().config.dispatch_dtypes, 5U);
}

TEST_F(DirectoryTest, GivesTheGroupTheCaptureLanesOfItsConfiguration) {
  session::GroupConfig config = config_of(1);
  config.capture_lanes = 2;
  (void)join(0, config);
  ASSERT_NE(formation_, nullptr);
  EXPECT_EQ(formation_->shared->settings().shape.capture_lanes, 2U);
  EXPECT_EQ(directory_.snapshot().front().config.capture_lanes, 2U);
}

TEST_F(DirectoryTest, HandsOnHowTheGroupCommunicatesAndBoundsIt) {
  session::GroupConfig config = config_of(1);
  config.communication = {.use_nvlink = false, .use_rdma = true, .virtual_lanes = 1, .bandwidth_ratio = 64};
  EXPECT_TRUE(join(0, config).status.is_ok());
  ASSERT_NE(formation_, nullptr);
  EXPECT_FALSE(formation_->shared->settings().shape.peer_access);
  EXPECT_EQ(formation_->shared->settings().fabric_lanes, 1U);
  EXPECT_EQ(formation_->shared->settings().fabric_weight, 64U);
  const auto refused = [&](auto change) {
    session::GroupConfig other = config_of(1);
    change(&other);
    return check_config(other, 0).field;
  };
  EXPECT_EQ(refused([](auto* c) { c->communication.virtual_lanes = 3; }), "communication.virtual_lanes");
  EXPECT_EQ(refused([](auto* c) { c->communication.virtual_lanes = 0; }), "communication.virtual_lanes");
  EXPECT_EQ(refused([](auto* c) { c->communication.bandwidth_ratio = 65; }), "communication.bandwidth_ratio");
  EXPECT_EQ(refused([](auto* c) {
              c->communication.use_nvlink = false;
              c->executor = session::Executor::kCopyEngine;
            }),
            "communication.use_nvlink");
  EXPECT_EQ(refused([](auto* c) {
              c->communication.use_nvlink = false;
              c->capture_lanes = 1;
            }),
            "communication.use_nvlink");
}

TEST_F(DirectoryTest, RefusesARankBeyondTheGroup) {
  EXPECT_EQ(join(2, config_of(2)).field, "rank");
}

TEST_F(DirectoryTest, RefusesARankThatAnotherSessionTook) {
  (void)join(0, config_of(2));
  const session::ErrorDetail error = join(0, config_of(2), 9, 5);
  EXPECT_EQ(error.status.reason(), EXPERTD_REASON_DUPLICATE_RANK);
  EXPECT_EQ(error.rank, 0);
}

TEST_F(DirectoryTest, RefusesARankOfACompleteGroup) {
  (void)join(0, config_of(1));
  const std::unique_ptr<Formation> complete = std::move(formation_);
  EXPECT_EQ(join(0, config_of(1), 9).status.reason(), EXPERTD_REASON_DUPLICATE_RANK);
}

TEST_F(DirectoryTest, RefusesADeviceThatHasARankOfTheGroup) {
  (void)join(0, config_of(2));
  const session::ErrorDetail error = join(1, config_of(2), 2, 0);
  EXPECT_EQ(error.status.reason(), EXPERTD_REASON_DEVICE_TAKEN);
  EXPECT_EQ(error.rank, 0);
}

TEST_F(DirectoryTest, LetsARankAskAgain) {
  (void)join(0, config_of(2));
  EXPECT_TRUE(join(0, config_of(2)).status.is_ok());
  EXPECT_TRUE(join(1, config_of(2)).status.is_ok());
  ASSERT_NE(formation_, nullptr);
  EXPECT_EQ(formation_->members.size(), 2U);
}

TEST_F(DirectoryTest, NamesTheMissingRanksWhenAJoinExpires) {
  (void)join(1, config_of(4));
  (void)join(2, config_of(4));
  EXPECT_TRUE(directory_.expire(100).empty());
  auto expired = directory_.expire(102);
  ASSERT_EQ(expired.size(), 2U);
  EXPECT_EQ(expired[0].status.reason(), EXPERTD_REASON_JOIN_TIMEOUT);
  EXPECT_NE(expired[0].status.message().find("rank(s) 0, 3"), std::string::npos) << expired[0].status.message();
  EXPECT_TRUE(directory_.expire(1'000).empty());
}

TEST_F(DirectoryTest, KeepsTheJoinsWhoseDeadlineHasNotPassed) {
  (void)join(0, config_of(3));
  (void)join(2, config_of(3));
  EXPECT_EQ(directory_.expire(100).size(), 1U);
  (void)join(0, config_of(3));
  EXPECT_TRUE(join(1, config_of(3)).status.is_ok());
  EXPECT_NE(formation_, nullptr);
}

TEST_F(DirectoryTest, TheFlagOfACancelledJoinFreesItsPlaceForAnother) {
  cancelled_ = std::make_shared<std::atomic<bool>>(false);
  (void)join(0, config_of(2));
  const auto flag = std::exchange(cancelled_, nullptr);
  EXPECT_EQ(join(0, config_of(2), 9, 5).status.reason(), EXPERTD_REASON_DUPLICATE_RANK);
  *flag = true;
  session::GroupConfig other = config_of(2);
  other.top_k = 2;
  EXPECT_TRUE(join(0, other, 9, 5).status.is_ok()) << "nothing of the cancelled join is left, nor its configuration";
  EXPECT_EQ(answers_, std::vector<base::Reason>{EXPERTD_REASON_CANCELLED});
}

TEST_F(DirectoryTest, ACancelledJoinDoesNotCompleteAGroup) {
  cancelled_ = std::make_shared<std::atomic<bool>>(false);
  (void)join(0, config_of(3));
  const auto flag = std::exchange(cancelled_, nullptr);
  (void)join(1, config_of(3));
  *flag = true;
  EXPECT_TRUE(join(2, config_of(3)).status.is_ok());
  EXPECT_EQ(formation_, nullptr);
  EXPECT_TRUE(join(0, config_of(3)).status.is_ok());
  EXPECT_NE(formation_, nullptr);
}

TEST_F(DirectoryTest, CancelledJoinsEndBeforeTheirDeadline) {
  cancelled_ = std::make_shared<std::atomic<bool>>(true);
  (void)join(0, config_of(2));
  const auto ended = directory_.expire(1);
  ASSERT_EQ(ended.size(), 1U);
  EXPECT_EQ(ended[0].status.reason(), EXPERTD_REASON_CANCELLED);
  EXPECT_TRUE(directory_.expire(1'000).empty());
}

TEST_F(DirectoryTest, DropsThePendingJoinsOfASessionThatEnds) {
  (void)join(0, config_of(2));
  const std::vector<Member> dropped = directory_.session_ended(base::SessionId{1});
  ASSERT_EQ(dropped.size(), 1U);
  EXPECT_EQ(dropped[0].rank, 0U);
  EXPECT_TRUE(join(0, config_of(2), 7).status.is_ok()) << "the place is free again";
}

TEST_F(DirectoryTest, OneNodeHasAtMost64Ranks) {
  EXPECT_TRUE(join(0, config_of(64)).status.is_ok());
  const session::ErrorDetail error = join(0, config_of(65));
  EXPECT_EQ(error.status.reason(), EXPERTD_REASON_ARGUMENT_RANGE);
  EXPECT_EQ(error.field, "expert_parallel_size");
  EXPECT_EQ(check_config(config_of(512), 511).status.reason(), EXPERTD_REASON_NONE) << "over several nodes";
  EXPECT_EQ(check_config(config_of(513), 0).status.reason(), EXPERTD_REASON_ARGUMENT_RANGE);
}

TEST_F(DirectoryTest, MarksTheRanksOfAnEndedSessionLost) {
  (void)join(0, config_of(2));
  (void)join(1, config_of(2));
  EXPECT_TRUE(directory_.session_ended(base::SessionId{2}).empty());
  EXPECT_EQ(formation_->shared->lost(), base::RankSet(2U));
  const auto groups = directory_.snapshot();
  ASSERT_EQ(groups.size(), 1U);
  EXPECT_EQ(groups[0].joined, base::RankSet(1));
  EXPECT_EQ(groups[0].lost, base::RankSet(2));
}

TEST_F(DirectoryTest, LetsTheRanksJoinAnewAfterALoss) {
  (void)join(0, config_of(2));
  (void)join(1, config_of(2));
  const std::unique_ptr<Formation> old = std::move(formation_);
  (void)directory_.session_ended(base::SessionId{2});
  EXPECT_TRUE(join(0, config_of(2)).status.is_ok());
  EXPECT_TRUE(join(1, config_of(2), 9).status.is_ok());
  ASSERT_NE(formation_, nullptr);
  EXPECT_NE(formation_->shared->settings().shape.id, old->shared->settings().shape.id);
  EXPECT_EQ(formation_->shared->lost(), base::RankSet(0U));
}

TEST_F(DirectoryTest, ForgetsAGroupThatEveryRankLeft) {
  (void)join(0, config_of(2));
  (void)join(1, config_of(2));
  const base::GroupId id = formation_->shared->settings().shape.id;
  directory_.left(id, 0);
  EXPECT_EQ(directory_.snapshot().size(), 1U);
  directory_.left(id, 1);
  EXPECT_TRUE(directory_.snapshot().empty());
}

}  // namespace
}  // namespace expertd::group
