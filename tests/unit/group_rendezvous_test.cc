// SPDX-License-Identifier: Apache-2.0
// The rendezvous of several nodes without any network: joining, refusing, forming, expiring, nodes that go and come.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "tests/unit/group_rendezvous_fixture.h"

namespace expertd::group {
namespace {

constexpr uint64_t kLong = 1'000'000;

class RendezvousTest : public testing::Test {
 protected:
  std::shared_ptr<Answer> join(uint32_t rank, uint64_t node, uint32_t ranks = 2) {
    return join(rank, node_of(node), config_of(ranks));
  }
  std::shared_ptr<Answer> join(uint32_t rank, const NodeIdentity& node, const session::GroupConfig& config,
                               uint64_t attempt = 0, const std::string& name = "moe") {
    auto answer = std::make_shared<Answer>();
    call_ = rendezvous_.join({name, rank, config, {}, attempt != 0 ? attempt : next_attempt_++, timeout_}, node, now_,
                             [answer](const session::ErrorDetail& error, const std::shared_ptr<const Placed>& placed) {
                               ++answer->count;
                               answer->error = error;
                               answer->placed = placed;
                             });
    return answer;
  }
  std::shared_ptr<Answer> report(uint64_t key, uint64_t node, base::Reason reason = EXPERTD_REASON_NONE,
                                 int32_t rank = -1) {
    auto answer = std::make_shared<Answer>();
    const base::Status status = reason == EXPERTD_REASON_NONE ? base::Status::ok() : base::Status(reason, "it broke");
    rendezvous_.report_formed({key, status, rank}, node, now_, [answer](const session::ErrorDetail& error) {
      ++answer->count;
      answer->error = error;
    });
    return answer;
  }
  /// Ranks 0 and 1 on nodes 1 and 2; the key.
  uint64_t placed_pair() {
    const auto first = join(0, 1);
    (void)join(1, 2);
    return first->placed->key;
  }
  uint64_t formed_pair() {
    const uint64_t key = placed_pair();
    (void)report(key, 1);
    EXPECT_EQ(report(key, 2)->count, 1);
    return key;
  }

  uint64_t now_ = 1000;
  uint64_t timeout_ = 500;
  uint64_t next_attempt_ = 1;
  uint64_t next_key_ = 100;
  CallId call_ = 0;
  RendezvousOptions options_{
      .max_nodes = 3, .max_joins = 4, .max_groups = 3, .form_timeout_ns = 200, .node_timeout_ns = kLong};
  Rendezvous rendezvous_{options_, [this] { return next_key_++; }};
};

TEST_F(RendezvousTest, PlacesAGroupWhenItsLastRankJoins) {
  const auto rank2 = join(2, 7, 3);
  const auto rank0 = join(0, 7, 3);
  EXPECT_EQ(rank0->count + rank2->count, 0);
  const auto rank1 = join(1, 5, 3);
  for (const auto& answer : {rank0, rank1, rank2}) {
    ASSERT_EQ(answer->count, 1);
    ASSERT_NE(answer->placed, nullptr);
    EXPECT_EQ(answer->placed->key, 100U);
    EXPECT_EQ(answer->placed->epoch, 1U);
    EXPECT_EQ(answer->placed->form_timeout_ns, 200U);
    ASSERT_EQ(answer->placed->nodes.size(), 2U);
    EXPECT_EQ(answer->placed->nodes[0].id, 7U);  // that of rank 0 comes first
    EXPECT_EQ(answer->placed->nodes[1].id, 5U);
  }
}

TEST_F(RendezvousTest, GivesLanesToTheLowestRankOfEachNodeAlone) {
  const auto rank0 = join(0, 7, 3);
  const auto rank1 = join(1, 5, 3);
  const auto rank2 = join(2, 7, 3);
  EXPECT_EQ(rank0->placed->nodes[1].lanes, node_of(5).lanes);
  EXPECT_EQ(rank1->placed->nodes[0].lanes, node_of(7).lanes);
  EXPECT_TRUE(rank2->placed->nodes[0].lanes.empty());
  EXPECT_EQ(rank2->placed->nodes[0].name, "n7");
}

TEST_F(RendezvousTest, PlacementNumbersNodesAndRanksAlikeEverywhere) {
  const auto rank0 = join(0, 7, 4);
  (void)join(1, 5, 4);
  (void)join(2, 7, 4);
  (void)join(3, 5, 4);
  const engine::Placement at5 = placement_of(*rank0->placed, 5);
  EXPECT_EQ(at5.own_node, 1U);
  EXPECT_EQ(placement_of(*rank0->placed, 7).own_node, 0U);
  EXPECT_EQ(at5.ranks_of, (std::vector<std::vector<uint32_t>>{{0, 2}, {1, 3}}));
  EXPECT_EQ(at5.node_of, (std::vector<uint32_t>{0, 1, 0, 1}));
  EXPECT_EQ(at5.index_of, (std::vector<uint32_t>{0, 0, 1, 1}));
}

TEST_F(RendezvousTest, CarriesWhatIsARanksOwn) {
  session::GroupConfig config = config_of(2);
  config.copies = 3;
  config.copy_kernels = true;
  const auto first = join(0, node_of(1), config);
  (void)join(1, 2);  // others of these do not count as another configuration
  ASSERT_NE(first->placed, nullptr);
  EXPECT_EQ(first->placed->ranks[0].copies, 3U);
  EXPECT_TRUE(first->placed->ranks[0].copy_kernels);
  EXPECT_EQ(first->placed->ranks[1].copies, 0U);
}

TEST_F(RendezvousTest, NamesRankFieldAndBothValuesOfAnotherConfiguration) {
  const auto first = join(0, 1);
  session::GroupConfig config = config_of(2);
  config.hidden = 1024;
  const auto second = join(1, node_of(2), config);
  EXPECT_EQ(second->reason(), EXPERTD_REASON_CONFIG_MISMATCH);
  EXPECT_EQ(second->error.rank, 1);
  EXPECT_EQ(second->error.field, "hidden");
  EXPECT_EQ(second->error.value, "1024");
  EXPECT_EQ(second->error.other_value, "512");
  EXPECT_NE(second->text().find("node \"n2\""), std::string::npos) << second->text();
  EXPECT_EQ(first->count, 0);  // it goes on waiting
  EXPECT_EQ(join(1, 2)->count, 1);
  EXPECT_EQ(first->reason(), EXPERTD_REASON_NONE);
}

TEST_F(RendezvousTest, TakesAnotherConfigurationOfARankThatWaitsAlone) {
  const auto before = join(0, 1);
  const auto after = join(0, node_of(1), config_of(1));
  EXPECT_EQ(before->reason(), EXPERTD_REASON_CANCELLED);
  EXPECT_NE(after->placed, nullptr);
}

TEST_F(RendezvousTest, RefusesARankThatWaitsOnAnotherNode) {
  const auto first = join(0, 1);
  const auto second = join(0, 2);
  EXPECT_EQ(second->reason(), EXPERTD_REASON_DUPLICATE_RANK);
  EXPECT_NE(second->text().find("\"n1\""), std::string::npos) << second->text();
  EXPECT_EQ(first->count, 0);
}

TEST_F(RendezvousTest, ARepetitionTakesThePlaceOfTheEarlierCall) {
  const auto first = join(0, node_of(1), config_of(2), 77);
  const auto again = join(0, node_of(1), config_of(2), 77);
  EXPECT_EQ(first->reason(), EXPERTD_REASON_CANCELLED);
  (void)join(1, 2);
  EXPECT_NE(again->placed, nullptr);
}

TEST_F(RendezvousTest, ARepetitionAfterPlacingGetsThePlacementAgain) {
  const auto first = join(0, node_of(1), config_of(2), 77);
  (void)join(1, 2);
  now_ += 50;
  const auto again = join(0, node_of(1), config_of(2), 77);
  ASSERT_NE(again->placed, nullptr);
  EXPECT_EQ(again->placed->key, first->placed->key);
  EXPECT_EQ(again->placed->nodes, first->placed->nodes);
  EXPECT_EQ(again->placed->form_timeout_ns, 150U);
}

struct BadJoin {
  const char* field;
  void (*spoil)(RankJoin* join, NodeIdentity* node);
};

TEST_F(RendezvousTest, RefusesWhatIsOutOfRangeByName) {
  const BadJoin cases[] = {
      {"group", [](RankJoin* j, NodeIdentity*) { j->group = ""; }},
      {"group", [](RankJoin* j, NodeIdentity*) { j->group = std::string(65, 'x'); }},
      {"group", [](RankJoin* j, NodeIdentity*) { j->group = "a\nb"; }},
      {"rank", [](RankJoin* j, NodeIdentity*) { j->rank = 2; }},
      {"expert_parallel_size", [](RankJoin* j, NodeIdentity*) { j->config.expert_parallel_size = 0; }},
      {"expert_parallel_size", [](RankJoin* j, NodeIdentity*) { j->config.expert_parallel_size = 513; }},
      {"attempt", [](RankJoin* j, NodeIdentity*) { j->attempt = 0; }},
      {"timeout_ns", [](RankJoin* j, NodeIdentity*) { j->timeout_ns = 0; }},
      {"timeout_ns", [](RankJoin* j, NodeIdentity*) { j->timeout_ns = kMaxJoinNs + 1; }},
      {"node.id", [](RankJoin*, NodeIdentity* n) { n->id = 0; }},
      {"node.name", [](RankJoin*, NodeIdentity* n) { n->name = ""; }},
      {"node.name", [](RankJoin*, NodeIdentity* n) { n->name = "\x80"; }},
      {"node.address", [](RankJoin*, NodeIdentity* n) { n->address = std::string(301, 'x'); }},
      {"node.lanes.lane", [](RankJoin*, NodeIdentity* n) { n->lanes[0].lane = 24; }},
      {"node.lanes.lane", [](RankJoin*, NodeIdentity* n) { n->lanes.push_back(n->lanes[0]); }},
      {"node.lanes.address", [](RankJoin*, NodeIdentity* n) { n->lanes[0].bytes = ""; }},
      {"node.lanes.address", [](RankJoin*, NodeIdentity* n) { n->lanes[0].bytes = std::string(4097, 'x'); }},
  };
  for (const BadJoin& bad : cases) {
    RankJoin join{"moe", 0, config_of(2), {}, 1, 500};
    NodeIdentity node = node_of(1);
    bad.spoil(&join, &node);
    Answer answer;
    rendezvous_.join(join, node, now_, [&answer](const session::ErrorDetail& error, const auto&) {
      ++answer.count;
      answer.error = error;
    });
    EXPECT_EQ(answer.count, 1) << bad.field;
    EXPECT_EQ(answer.reason(), EXPERTD_REASON_ARGUMENT_RANGE) << bad.field;
    EXPECT_EQ(answer.error.field, bad.field);
  }
  EXPECT_TRUE(rendezvous_.nodes().empty());
}

TEST_F(RendezvousTest, RefusesOneNodeTooManyByName) {
  for (uint64_t id = 1; id <= 3; ++id) {
    EXPECT_TRUE(rendezvous_.seen(node_of(id), now_).status.is_ok());
  }
  const session::ErrorDetail fourth = rendezvous_.seen(node_of(4), now_);
  EXPECT_EQ(fourth.status.reason(), EXPERTD_REASON_NODE_LIMIT);
  EXPECT_NE(fourth.status.message().find("\"n4\""), std::string::npos) << fourth.status.message();
  EXPECT_EQ(join(0, 5)->reason(), EXPERTD_REASON_NODE_LIMIT);
  EXPECT_TRUE(rendezvous_.seen(node_of(6, "n2"), now_).status.is_ok());  // takes n2's place
}

TEST_F(RendezvousTest, BoundsJoinsThatWait) {
  for (uint32_t rank = 0; rank < 4; ++rank) {
    EXPECT_EQ(join(rank, 1, 9)->count, 0);
  }
  EXPECT_EQ(join(4, 1, 9)->reason(), EXPERTD_REASON_GROUP_LIMIT);
  EXPECT_EQ(join(3, 1, 9)->count, 0);  // in the place of its earlier one
}

TEST_F(RendezvousTest, BoundsGroups) {
  for (const char* name : {"a", "b", "c"}) {
    EXPECT_NE(join(0, node_of(1), config_of(1), 0, name)->placed, nullptr);
  }
  EXPECT_EQ(join(0, node_of(1), config_of(1), 0, "d")->reason(), EXPERTD_REASON_GROUP_LIMIT);
}

TEST_F(RendezvousTest, TimesOutNamingTheMissingRanks) {
  const auto first = join(1, 1, 4);
  timeout_ = 5000;
  const auto second = join(3, 1, 4);
  EXPECT_EQ(rendezvous_.next_deadline_ns(), 1500U);
  rendezvous_.expire(1499);
  EXPECT_EQ(first->count, 0);
  rendezvous_.expire(1500);
  EXPECT_EQ(first->reason(), EXPERTD_REASON_JOIN_TIMEOUT);
  EXPECT_EQ(first->error.rank, 0);
  EXPECT_NE(first->text().find("rank(s) 0, 2 had not joined"), std::string::npos) << first->text();
  EXPECT_EQ(second->count, 0);
}

TEST_F(RendezvousTest, NamesNoMoreThanAFewOfManyMissingRanks) {
  const auto first = join(511, 1, 512);
  rendezvous_.expire(now_ + timeout_);
  EXPECT_NE(first->text().find("15 and 495 more had not"), std::string::npos) << first->text();
}

TEST_F(RendezvousTest, ADroppedCallLeavesItsPlaceFree) {
  const auto first = join(0, 1);
  rendezvous_.dropped(call_);
  rendezvous_.dropped(call_);
  EXPECT_EQ(first->count, 0);
  EXPECT_EQ(join(0, 2)->count, 0);
  EXPECT_EQ(join(1, 2)->count, 1);
}

TEST_F(RendezvousTest, ADroppedCallThatWasRepeatedChangesNothing) {
  (void)join(0, node_of(1), config_of(2), 77);
  const CallId earlier = call_;
  const auto again = join(0, node_of(1), config_of(2), 77);
  rendezvous_.dropped(earlier);
  (void)join(1, 2);
  EXPECT_NE(again->placed, nullptr);
}

TEST_F(RendezvousTest, AWithdrawnRankIsAnsweredAndItsPlaceFree) {
  const auto first = join(0, node_of(1), config_of(2), 77);
  rendezvous_.withdraw("moe", 0, 1, 76);  // another attempt
  rendezvous_.withdraw("moe", 0, 2, 77);  // another node
  rendezvous_.withdraw("moe", 1, 1, 77);
  rendezvous_.withdraw("eom", 0, 1, 77);
  EXPECT_EQ(first->count, 0);
  rendezvous_.withdraw("moe", 0, 1, 77);
  EXPECT_EQ(first->reason(), EXPERTD_REASON_CANCELLED);
  EXPECT_EQ(join(0, 2)->count, 0);
}

TEST_F(RendezvousTest, TellsAllNodesThatTheGroupIsFormed) {
  const uint64_t key = placed_pair();
  const auto first = report(key, 1);
  EXPECT_EQ(first->count, 0);
  const auto second = report(key, 2);
  EXPECT_EQ(first->count, 1);
  EXPECT_EQ(second->count, 1);
  EXPECT_EQ(first->reason(), EXPERTD_REASON_NONE);
  EXPECT_EQ(report(key, 1)->reason(), EXPERTD_REASON_NONE);  // repeated: the same answer
  EXPECT_EQ(report(key, 3)->reason(), EXPERTD_REASON_NO_SUCH_GROUP);
  EXPECT_EQ(report(key + 1, 1)->reason(), EXPERTD_REASON_NO_SUCH_GROUP);
}

TEST_F(RendezvousTest, TellsAllNodesTheFirstFailureWithNodeAndRank) {
  const uint64_t key = placed_pair();
  const auto first = report(key, 1);
  const auto second = report(key, 2, EXPERTD_REASON_POOL_EXHAUSTED, 1);
  for (const auto& answer : {first, second, report(key, 1)}) {
    EXPECT_EQ(answer->count, 1);
    EXPECT_EQ(answer->reason(), EXPERTD_REASON_POOL_EXHAUSTED);
    EXPECT_EQ(answer->error.rank, 1);
    EXPECT_NE(answer->text().find("node \"n2\", rank 1: it broke"), std::string::npos) << answer->text();
  }
  EXPECT_NE(join(0, 1)->reason(), EXPERTD_REASON_DUPLICATE_RANK);  // the name is free at once
}

TEST_F(RendezvousTest, ARepeatedReportTakesThePlaceOfTheEarlier) {
  const uint64_t key = placed_pair();
  const auto first = report(key, 1);
  const auto again = report(key, 1);
  EXPECT_EQ(first->reason(), EXPERTD_REASON_CANCELLED);
  EXPECT_EQ(again->count, 0);
  (void)report(key, 2);
  EXPECT_EQ(again->count, 1);
}

TEST_F(RendezvousTest, NamesTheNodeThatDidNotReportInTime) {
  const uint64_t key = placed_pair();
  const auto first = report(key, 1);
  EXPECT_EQ(rendezvous_.next_deadline_ns(), 1200U);
  rendezvous_.expire(1200);
  EXPECT_EQ(first->reason(), EXPERTD_REASON_JOIN_TIMEOUT);
  EXPECT_EQ(first->error.rank, 1);
  EXPECT_NE(first->text().find("\"n2\""), std::string::npos) << first->text();
  EXPECT_EQ(report(key, 2)->reason(), EXPERTD_REASON_JOIN_TIMEOUT);  // late, but told
  rendezvous_.expire(1400);
  EXPECT_EQ(report(key, 2)->reason(), EXPERTD_REASON_NO_SUCH_GROUP);
}

TEST_F(RendezvousTest, AWithdrawalWhileFormingFailsTheGroup) {
  (void)join(0, node_of(1), config_of(2), 77);
  const uint64_t key = join(1, 2)->placed->key;
  const auto other = report(key, 2);
  rendezvous_.withdraw("moe", 0, 1, 77);
  EXPECT_EQ(other->reason(), EXPERTD_REASON_CANCELLED);
  EXPECT_EQ(other->error.rank, 0);
  EXPECT_NE(other->text().find("\"n1\""), std::string::npos) << other->text();
}

TEST_F(RendezvousTest, ARankThatJoinsAnewWhileFormingFailsTheGroup) {
  const uint64_t key = placed_pair();
  const auto other = report(key, 2);
  EXPECT_EQ(join(0, 1)->count, 0);
  EXPECT_EQ(other->reason(), EXPERTD_REASON_CANCELLED);
}

TEST_F(RendezvousTest, KeepsTheNameOfAWholeGroup) {
  (void)placed_pair();
  EXPECT_EQ(join(0, 2)->reason(), EXPERTD_REASON_DUPLICATE_RANK);  // while forming
  rendezvous_.expire(now_ + 200);
  (void)formed_pair();
  const auto taken = join(0, 2);
  EXPECT_EQ(taken->reason(), EXPERTD_REASON_DUPLICATE_RANK);
  EXPECT_NE(taken->text().find("rank 0 is on node \"n1\""), std::string::npos) << taken->text();
  EXPECT_EQ(join(5, 2, 9)->reason(), EXPERTD_REASON_DUPLICATE_RANK);  // of another size
}

TEST_F(RendezvousTest, AGroupWhoseRankIsGoneMayBeJoinedAnewInALaterEpoch) {
  const uint64_t key = formed_pair();
  rendezvous_.report_gone(key, 3, {1}, now_);      // not of the group
  rendezvous_.report_gone(key, 1, {2, 99}, now_);  // no such ranks
  EXPECT_EQ(join(1, 3)->reason(), EXPERTD_REASON_DUPLICATE_RANK);
  rendezvous_.report_gone(key, 1, {1}, now_);  // of the other node
  const auto moved = join(1, 3);
  EXPECT_EQ(moved->count, 0);
  const auto stayed = join(0, 1);  // its own node says that it joins anew
  ASSERT_NE(moved->placed, nullptr);
  EXPECT_EQ(moved->placed->epoch, 2U);
  EXPECT_NE(moved->placed->key, key);
  EXPECT_EQ(stayed->placed->key, moved->placed->key);
}

TEST_F(RendezvousTest, ANodeMayJoinItsOwnRankAnewWithoutTellingThatItLeft) {
  (void)formed_pair();
  EXPECT_EQ(join(0, 1)->count, 0);
  EXPECT_EQ(join(1, 2)->count, 1);
}

TEST_F(RendezvousTest, ForgetsAGroupThatAllRanksLeft) {
  const uint64_t key = formed_pair();
  rendezvous_.report_gone(key, 1, {0}, now_);
  rendezvous_.report_gone(key, 2, {1}, now_);
  EXPECT_EQ(report(key, 1)->reason(), EXPERTD_REASON_NO_SUCH_GROUP);
}

TEST_F(RendezvousTest, ANodeThatIsNotSeenLosesItsPlaces) {
  const uint64_t key = placed_pair();
  timeout_ = 10 * kLong;
  const auto waiting = join(0, node_of(1), config_of(2), 0, "other");
  now_ += kLong / 2;
  EXPECT_TRUE(rendezvous_.seen(node_of(2), now_).status.is_ok());
  const auto report2 = report(key, 2);
  rendezvous_.expire(1000 + 150);  // forming still
  rendezvous_.expire(1000 + kLong);
  EXPECT_EQ(waiting->reason(), EXPERTD_REASON_PEER_LOST);
  EXPECT_EQ(report2->count, 1);
  EXPECT_EQ(rendezvous_.nodes().size(), 1U);
  EXPECT_EQ(rendezvous_.nodes()[0].name, "n2");
}

TEST_F(RendezvousTest, ANodeThatStartsAgainTakesItsOwnPlace) {
  const uint64_t key = placed_pair();
  const auto report1 = report(key, 1);
  const auto waiting = join(1, node_of(2), config_of(2), 0, "other");
  EXPECT_TRUE(rendezvous_.seen(node_of(22, "n2"), now_).status.is_ok());
  EXPECT_EQ(waiting->reason(), EXPERTD_REASON_PEER_LOST);
  EXPECT_EQ(report1->reason(), EXPERTD_REASON_PEER_LOST);
  EXPECT_EQ(report1->error.rank, 1);
  EXPECT_NE(report1->text().find("node \"n2\" was started again"), std::string::npos) << report1->text();
  const auto earlier = join(1, 2);  // the earlier daemon is there after all
  EXPECT_EQ(earlier->reason(), EXPERTD_REASON_NODE_REPLACED);
  EXPECT_NE(earlier->text().find("fabric.node_name"), std::string::npos) << earlier->text();
  EXPECT_EQ(join(1, node_of(22, "n2"), config_of(2))->count, 0);
}

TEST_F(RendezvousTest, AFormedGroupOfARestartedNodeMayBeJoinedAnew) {
  (void)formed_pair();
  const auto back = join(1, node_of(22, "n2"), config_of(2));
  EXPECT_EQ(back->count, 0);
  (void)join(0, 1);
  ASSERT_NE(back->placed, nullptr);
  EXPECT_EQ(back->placed->epoch, 2U);
}

TEST_F(RendezvousTest, ClosingAnswersWhoeverWaits) {
  const uint64_t key = placed_pair();
  const auto formed = report(key, 1);
  const auto waiting = join(0, node_of(1), config_of(2), 0, "other");
  rendezvous_.close(base::Status(EXPERTD_REASON_RENDEZVOUS_UNAVAILABLE, "elsewhere"));
  EXPECT_EQ(formed->reason(), EXPERTD_REASON_RENDEZVOUS_UNAVAILABLE);
  EXPECT_EQ(waiting->reason(), EXPERTD_REASON_RENDEZVOUS_UNAVAILABLE);
  EXPECT_EQ(rendezvous_.next_deadline_ns(), UINT64_MAX);
  EXPECT_TRUE(rendezvous_.nodes().empty());
}

TEST_F(RendezvousTest, ACallbackMayJoinAgain) {
  auto again = std::make_shared<Answer>();
  rendezvous_.join({"moe", 0, config_of(2), {}, 5, 10}, node_of(1), now_,
                   [&](const session::ErrorDetail&, const auto&) { again = join(0, 1); });
  rendezvous_.expire(now_ + 10);
  (void)join(1, 2);
  EXPECT_NE(again->placed, nullptr);
}

}  // namespace
}  // namespace expertd::group
