// SPDX-License-Identifier: Apache-2.0
// Ranks that come back to a running group, as the rendezvous and the directory see it: when a successor is placed, for
// whom, and what is said when it is not.
#include <gtest/gtest.h>

#include <map>
#include <vector>

#include "daemon/group/directory.h"
#include "tests/unit/group_rendezvous_fixture.h"

namespace expertd::group {
namespace {

constexpr uint64_t kLong = 1'000'000'000'000;

session::GroupConfig masked(uint32_t ranks) {
  session::GroupConfig config = config_of(ranks);
  config.on_rank_loss = session::OnRankLoss::kMask;
  return config;
}

class Rejoin : public ::testing::Test {
 protected:
  using AnswerRef = std::shared_ptr<Answer>;

  PlacedCallback into(const AnswerRef& answer) {
    return [answer](const session::ErrorDetail& error, const std::shared_ptr<const Placed>& placed) {
      ++answer->count;
      answer->error = error;
      answer->placed = placed;
    };
  }
  AnswerRef join(uint32_t rank, const NodeIdentity& node, const session::GroupConfig& config) {
    auto answer = std::make_shared<Answer>();
    (void)host_->join({"moe", rank, config, {}, next_attempt_++, 500}, node, now_, into(answer));
    return answer;
  }
  AnswerRef join(uint32_t rank, uint64_t node) { return join(rank, node_of(node), masked(4)); }
  AnswerRef await(const Placed& placed, uint64_t node, const std::vector<uint32_t>& gone = {}) {
    auto answer = std::make_shared<Answer>();
    await_call_ = host_->await_successor({"moe", masked(4), placed, gone}, node_of(node), now_, into(answer));
    return answer;
  }
  base::Reason report(uint64_t key, uint64_t node, base::Reason reason = EXPERTD_REASON_NONE) {
    auto answer = std::make_shared<Answer>();
    const base::Status status = reason == EXPERTD_REASON_NONE ? base::Status::ok() : base::Status(reason, "it broke");
    host_->report_formed({key, status, -1}, node, now_, [answer](const session::ErrorDetail& error) {
      ++answer->count;
      answer->error = error;
    });
    reports_.push_back(answer);
    return answer->reason();
  }
  /// Ranks 0 and 1 on node 1, 2 on node 2, 3 on node 3, all formed.
  std::shared_ptr<const Placed> formed() {
    std::vector<AnswerRef> answers{join(0, 1), join(1, 1), join(2, 2), join(3, 3)};
    for (const uint64_t node : {1, 2, 3}) {
      (void)report(answers[0]->placed->key, node);
    }
    return answers[0]->placed;
  }
  void start_anew() {
    host_ = std::make_unique<Rendezvous>(options_, [this] { return next_key_++; });
  }

  uint64_t now_ = 1000;
  uint64_t next_attempt_ = 1;
  uint64_t next_key_ = 100;
  CallId await_call_ = 0;
  RendezvousOptions options_{.max_nodes = 8,
                             .max_joins = 8,
                             .max_groups = 4,
                             .form_timeout_ns = 200,
                             .node_timeout_ns = kLong,
                             .collect_ns = 50};
  std::unique_ptr<Rendezvous> host_ = std::make_unique<Rendezvous>(options_, [this] { return next_key_++; });
  std::vector<AnswerRef> reports_;
};

TEST_F(Rejoin, PlacesASuccessorOfTheRanksThatAreLeftAndTheOneThatJoins) {
  const auto group = formed();
  const auto first = await(*group, 1);
  const auto second = await(*group, 2);
  host_->report_gone(group->key, 1, {3}, now_);
  EXPECT_EQ(first->count + second->count, 0);
  const auto back = join(3, node_of(9, "n3"), masked(4));  // started again
  ASSERT_EQ(back->count, 1);
  ASSERT_NE(back->placed, nullptr) << back->text();
  EXPECT_EQ(back->placed->predecessor, group->key);
  EXPECT_NE(back->placed->key, group->key);
  EXPECT_EQ(back->placed->epoch, group->epoch + 1);
  EXPECT_EQ(back->placed->returning, std::vector<uint32_t>{3});
  EXPECT_TRUE(back->placed->lost.empty());
  ASSERT_EQ(back->placed->nodes.size(), 3U);
  EXPECT_EQ(back->placed->nodes[2].id, 9U);
  for (const NodeIdentity& node : back->placed->nodes) {
    EXPECT_FALSE(node.lanes.empty());
  }
  ASSERT_EQ(first->count, 1);
  EXPECT_EQ(first->placed->key, back->placed->key);
  ASSERT_EQ(second->count, 1);
  EXPECT_EQ(second->placed->key, back->placed->key);
}

TEST_F(Rejoin, WaitsUntilEveryNodeThatIsLeftAwaitsIt) {
  const auto group = formed();
  (void)await(*group, 1);
  host_->report_gone(group->key, 1, {3}, now_);
  const auto back = join(3, 3);
  EXPECT_EQ(back->count, 0) << back->text();
  const auto second = await(*group, 2);
  EXPECT_EQ(back->count, 1);
  EXPECT_EQ(second->count, 1);
}

TEST_F(Rejoin, NamesTheNodeThatDidNotAwaitAtTheDeadline) {
  const auto group = formed();
  (void)await(*group, 1);
  host_->report_gone(group->key, 1, {3}, now_);
  const auto back = join(3, 3);
  now_ += 500;
  host_->expire(now_);
  EXPECT_EQ(back->reason(), EXPERTD_REASON_JOIN_TIMEOUT);
  EXPECT_NE(back->text().find("node \"n2\" with rank 2 had not said that it takes ranks back"), std::string::npos)
      << back->text();
}

TEST_F(Rejoin, RefusesARankThatLives) {
  const auto group = formed();
  host_->report_gone(group->key, 1, {3}, now_);
  const auto other = join(2, 7);
  EXPECT_EQ(other->reason(), EXPERTD_REASON_DUPLICATE_RANK);
  EXPECT_NE(other->text().find("rank 2 is on node \"n2\"; it is running"), std::string::npos) << other->text();
}

TEST_F(Rejoin, RanksThatNobodyHasBeginLost) {
  const auto group = formed();
  (void)await(*group, 1);
  host_->report_gone(group->key, 1, {2, 3}, now_);
  const auto back = join(3, 3);
  EXPECT_EQ(back->count, 0) << "rank 2 may come as well";
  EXPECT_EQ(host_->next_deadline_ns(), now_ + 50);
  now_ += 50;
  host_->expire(now_);
  ASSERT_EQ(back->count, 1);
  ASSERT_NE(back->placed, nullptr);
  EXPECT_EQ(back->placed->lost, std::vector<uint32_t>{2});
  ASSERT_EQ(back->placed->nodes.size(), 2U);
  EXPECT_EQ(back->placed->nodes[back->placed->ranks[2].node].id, 1U);
  // The next one comes back to the successor, which need not have taken the group's place for that.
  const auto next = join(2, 2);
  EXPECT_EQ(next->count, 0);
  EXPECT_EQ(report(back->placed->key, 1), EXPERTD_REASON_NONE);
  EXPECT_EQ(report(back->placed->key, 3), EXPERTD_REASON_NONE);
  EXPECT_EQ(next->count, 0);
  (void)await(*back->placed, 1, {2});
  (void)await(*back->placed, 3, {2});
  ASSERT_EQ(next->count, 1);
  EXPECT_EQ(next->placed->predecessor, back->placed->key);
  EXPECT_EQ(next->placed->returning, std::vector<uint32_t>{2});
}

TEST_F(Rejoin, AFormationThatFailsLeavesTheGroupAndTheNextOneIsPlaced) {
  const auto group = formed();
  const auto first = await(*group, 1);
  (void)await(*group, 2);
  host_->report_gone(group->key, 1, {3}, now_);
  const auto back = join(3, 3);
  ASSERT_NE(back->placed, nullptr);
  (void)report(back->placed->key, 1);
  (void)report(back->placed->key, 2, EXPERTD_REASON_SYSTEM);
  EXPECT_EQ(reports_[3]->reason(), EXPERTD_REASON_SYSTEM);
  const auto again = join(3, 3);
  EXPECT_EQ(again->count, 0);
  (void)await(*group, 1, {3});
  (void)await(*group, 2, {3});
  ASSERT_EQ(again->count, 1);
  ASSERT_NE(again->placed, nullptr) << again->text();
  EXPECT_EQ(again->placed->predecessor, group->key);
  EXPECT_NE(again->placed->key, back->placed->key);
}

TEST_F(Rejoin, ASuccessorThatIsLetGoLeavesTheGroupToTheNext) {
  const auto group = formed();
  (void)await(*group, 1);
  (void)await(*group, 2);
  host_->report_gone(group->key, 1, {3}, now_);
  const auto back = join(3, 3);
  ASSERT_NE(back->placed, nullptr);
  for (const uint64_t node : {1, 2, 3}) {
    EXPECT_EQ(report(back->placed->key, node), EXPERTD_REASON_NONE);
  }
  for (const uint64_t node : {1, 2, 3}) {
    host_->report_gone(back->placed->key, node, {0, 1, 2, 3}, now_);
  }
  (void)await(*group, 1, {3});
  (void)await(*group, 2, {3});
  const auto again = join(3, 3);
  ASSERT_EQ(again->count, 1) << "it waits";
  ASSERT_NE(again->placed, nullptr) << again->text();
  EXPECT_EQ(again->placed->predecessor, group->key);
}

TEST_F(Rejoin, ARendezvousThatBeganLaterLearnsOfTheGroup) {
  const auto group = formed();
  start_anew();
  const auto back = join(3, node_of(9, "n3"), masked(4));
  (void)await(*group, 2);
  EXPECT_EQ(back->count, 0);
  const auto first = await(*group, 1, {3});
  ASSERT_EQ(back->count, 1);
  ASSERT_NE(back->placed, nullptr) << back->text();
  EXPECT_EQ(back->placed->predecessor, group->key);
  EXPECT_EQ(back->placed->epoch, group->epoch + 1);
  EXPECT_EQ(first->count, 1);
}

TEST_F(Rejoin, ALaterCallOfANodeTakesTheEarlierOnesPlace) {
  const auto group = formed();
  const auto earlier = await(*group, 1);
  const CallId call = await_call_;
  const auto later = await(*group, 1, {3});
  EXPECT_EQ(earlier->reason(), EXPERTD_REASON_CANCELLED);
  host_->dropped(call);
  EXPECT_EQ(later->count, 0);
  host_->report_gone(group->key, 1, {0, 1}, now_);
  EXPECT_EQ(later->reason(), EXPERTD_REASON_NO_SUCH_GROUP);
}

TEST_F(Rejoin, AnotherConfigurationIsNamedAtTheDeadline) {
  const auto group = formed();
  (void)await(*group, 1);
  (void)await(*group, 2);
  host_->report_gone(group->key, 1, {3}, now_);
  session::GroupConfig other = masked(4);
  other.hidden = 1024;
  const auto back = join(3, node_of(3), other);
  EXPECT_EQ(back->count, 0);
  now_ += 500;
  host_->expire(now_);
  EXPECT_EQ(back->reason(), EXPERTD_REASON_JOIN_TIMEOUT);
  EXPECT_NE(back->text().find("hidden"), std::string::npos) << back->text();
}

TEST_F(Rejoin, AGroupThatFailsIsJoinedByAllAnew) {
  std::vector<AnswerRef> answers;
  for (const uint32_t rank : {0U, 1U}) {
    answers.push_back(join(rank, node_of(rank + 1), config_of(2)));
  }
  (void)report(answers[0]->placed->key, 1);
  (void)report(answers[0]->placed->key, 2);
  const auto waits = await(*answers[0]->placed, 1);
  host_->report_gone(answers[0]->placed->key, 1, {1}, now_);
  EXPECT_EQ(join(1, node_of(2), config_of(2))->count, 0);
}

/// On one node without a rendezvous.
class RejoinHere : public ::testing::Test {
 protected:
  session::ErrorDetail join(uint32_t rank, uint64_t session, std::unique_ptr<Formation>* formation) {
    Member member;
    member.session = base::SessionId{session};
    member.device = base::DeviceIndex{rank};
    member.deadline_ns = kLong;
    member.done = [this, rank](const session::ErrorDetail&, const session::JoinGrant&) { ++answers_[rank]; };
    return directory_.join({"moe", rank, masked(3), kLong}, member, formation);
  }
  std::unique_ptr<Formation> formed() {
    std::unique_ptr<Formation> formation;
    for (const uint32_t rank : {0U, 1U, 2U}) {
      EXPECT_TRUE(join(rank, 10 + rank, &formation).status.is_ok());
    }
    directory_.describe(formation->shared->settings().shape.id, "host");
    return formation;
  }

  Directory directory_{Defaults{}};
  std::map<uint32_t, int> answers_;
};

TEST_F(RejoinHere, TheRanksThatAreLeftGoOverWithoutAJoin) {
  const auto group = formed();
  EXPECT_TRUE(directory_.session_ended(base::SessionId{11}).empty());
  std::unique_ptr<Formation> none;
  EXPECT_TRUE(join(1, 20, &none).status.is_ok());
  EXPECT_EQ(none, nullptr);
  const auto formations = directory_.rejoins();
  ASSERT_EQ(formations.size(), 1U);
  const Formation& next = *formations.front();
  EXPECT_EQ(next.predecessor, group->shared);
  ASSERT_EQ(next.members.size(), 3U);
  EXPECT_EQ(next.members[0].session.value, 10U);
  EXPECT_EQ(next.members[0].done, nullptr);
  EXPECT_EQ(next.members[1].session.value, 20U);
  EXPECT_NE(next.members[1].done, nullptr);
  EXPECT_EQ(next.shared->lost(), base::RankSet());
  EXPECT_NE(next.shared->settings().epoch_base, 0U);
}

TEST_F(RejoinHere, ARankThatLivesIsRefusedAndOneThatNobodyHasBeginsLost) {
  const auto group = formed();
  (void)directory_.session_ended(base::SessionId{11});
  (void)directory_.session_ended(base::SessionId{12});
  std::unique_ptr<Formation> none;
  EXPECT_EQ(join(0, 20, &none).status.reason(), EXPERTD_REASON_DUPLICATE_RANK);
  EXPECT_TRUE(join(2, 21, &none).status.is_ok());
  const auto formations = directory_.rejoins();
  ASSERT_EQ(formations.size(), 1U);
  EXPECT_EQ(formations.front()->shared->lost(), base::RankSet(0b010));
  // The next one comes back to the successor.
  directory_.describe(formations.front()->shared->settings().shape.id, "host");
  EXPECT_TRUE(join(1, 22, &none).status.is_ok());
  const auto next = directory_.rejoins();
  ASSERT_EQ(next.size(), 1U);
  EXPECT_EQ(next.front()->predecessor, formations.front()->shared);
  EXPECT_EQ(next.front()->shared->lost(), base::RankSet());
}

}  // namespace
}  // namespace expertd::group
