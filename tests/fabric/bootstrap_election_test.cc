// SPDX-License-Identifier: Apache-2.0
// The rendezvous of a host that is elected: who serves in which term, for how long, and what clients do when another
// one is elected. The election is the test's own word.
#include <mutex>

#include "tests/fabric/bootstrap_fixture.h"
#include "tests/support/temp_dir.h"

namespace expertd::fabric {
namespace {

bool has(const base::Status& status, const std::string& text) {
  return status.message().find(text) != std::string::npos;
}

/// What an election would tell; threads of the nodes ask it.
class Word {
 public:
  std::function<group::Elected()> asked() {
    return [this] {
      const std::lock_guard lock(mutex_);
      return elected_;
    };
  }
  void say(uint64_t term, const TestNode& host) {
    const std::lock_guard lock(mutex_);
    elected_ = {term, {host.identity().id, host.identity().name, host.address()}, false, 0, {}};
  }
  void say_nothing(const std::string& cause) {
    const std::lock_guard lock(mutex_);
    elected_.cause = cause;
  }

 private:
  std::mutex mutex_;
  group::Elected elected_;
};

struct BootstrapElection : testing::Test {
  Word word;
  TestNode first{{.name = "a", .id = 11, .hosts_by_list = false}};
  TestNode second{{.name = "b", .id = 22, .hosts_by_list = false}};

  void elect(uint64_t term, TestNode* host) {
    host->server().set_elected(term, base::now_ns() + 600 * kSecond);
    word.say(term, *host);
  }
};

TEST_F(BootstrapElection, GroupsFormAtTheElectedHostWithoutAList) {
  elect(5, &second);
  TestNode one({.name = "c", .id = 33, .rendezvous = {"http://etcd"}, .elected = word.asked()});
  TestNode two({.name = "d", .id = 44, .rendezvous = {"http://etcd"}, .elected = word.asked()});
  std::future<JoinEnd> rank0 = one.join("moe", 0, config_of(2));
  const JoinEnd rank1 = take(two.join("moe", 1, config_of(2)));
  ASSERT_NE(rank1.placed, nullptr) << rank1.error.status.message();
  EXPECT_EQ(take(std::move(rank0)).placed->key, rank1.placed->key);
  EXPECT_EQ(one.client().state().source, "etcd");
  EXPECT_EQ(one.client().state().term, 5U);
  EXPECT_EQ(one.client().state().node, "b");
  const JoinEnd twice = take(two.join("moe", 0, config_of(2)));
  EXPECT_EQ(twice.error.status.reason(), EXPERTD_REASON_DUPLICATE_RANK) << twice.error.status.message();
}

TEST_F(BootstrapElection, AJoinThatWaitsMovesToTheNextHost) {
  elect(5, &first);
  TestNode one({.name = "c", .id = 33, .rendezvous = {"http://etcd"}, .elected = word.asked()});
  TestNode two({.name = "d", .id = 44, .rendezvous = {"http://etcd"}, .elected = word.asked()});
  std::future<JoinEnd> rank0 = one.join("moe", 0, config_of(2));
  ASSERT_TRUE(support::wait_until([&] { return !first.server().nodes().empty(); }, kPatience));
  // The first one has not heard of it yet and goes on.
  elect(6, &second);
  one.client().host_elected(6);
  two.client().host_elected(6);
  const JoinEnd rank1 = take(two.join("moe", 1, config_of(2)));
  ASSERT_NE(rank1.placed, nullptr) << rank1.error.status.message();
  EXPECT_EQ(take(std::move(rank0)).placed->key, rank1.placed->key);
  EXPECT_EQ(one.client().state().node, "b");
  EXPECT_EQ(second.server().nodes().size(), 2U);
}

/// The former host has not heard of the next one and places a join that waited there; the answer comes when the client
/// knows better. To order the two, the client's thread is held in the answer to another join.
TEST_F(BootstrapElection, APlaceFromTheFormerHostIsNotTaken) {
  elect(5, &first);
  TestNode one({.name = "c", .id = 33, .rendezvous = {"http://etcd"}, .elected = word.asked()});
  TestNode behind({.name = "d", .id = 44, .rendezvous = {"http://etcd"}, .elected = word.asked()});
  EXPECT_NE(take(behind.join("warm", 0, config_of(1))).placed, nullptr);
  std::future<JoinEnd> rank0 = one.join("moe", 0, config_of(2));
  std::promise<void> held;
  std::promise<void> go_on;
  one.client().join_rank({"gate", 0, config_of(1), {}, 99, 15 * kSecond},
                         [&](const session::ErrorDetail&, const std::shared_ptr<const group::Placed>&) {
                           held.set_value();
                           go_on.get_future().wait();
                         });
  ASSERT_EQ(held.get_future().wait_for(kPatience), std::future_status::ready);
  second.server().set_elected(6, base::now_ns() + 600 * kSecond);
  word.say(6, second);
  one.client().host_elected(6);
  const JoinEnd former = take(behind.join("moe", 1, config_of(2)));
  ASSERT_NE(former.placed, nullptr) << former.error.status.message();
  EXPECT_NE(take(behind.join("after", 0, config_of(1))).placed, nullptr) << "the other answer has been sent by now";
  go_on.set_value();
  TestNode knows({.name = "e", .id = 55, .rendezvous = {"http://etcd"}, .elected = word.asked()});
  const JoinEnd rank1 = take(knows.join("moe", 1, config_of(2)));
  ASSERT_NE(rank1.placed, nullptr) << rank1.error.status.message();
  EXPECT_EQ(take(std::move(rank0)).placed->key, rank1.placed->key);
  EXPECT_NE(former.placed->key, rank1.placed->key);
  // What was placed there never forms: the node that holds it reports to the next host, which does not know of it.
  behind.client().host_elected(6);
  EXPECT_EQ(take(behind.report(former.placed->key)).status.reason(), EXPERTD_REASON_NO_SUCH_GROUP);
}

TEST_F(BootstrapElection, AnEarlierTermIsRefusedOnBothSides) {
  // The host is of a later term than the caller knows.
  elect(5, &first);
  first.server().set_elected(7, base::now_ns() + 600 * kSecond);
  TestNode behind({.name = "c", .id = 33, .rendezvous = {"http://etcd"}, .elected = word.asked()});
  const JoinEnd early = take(behind.join("moe", 0, config_of(1), kSecond / 2));
  EXPECT_EQ(early.error.status.reason(), EXPERTD_REASON_RENDEZVOUS_UNAVAILABLE);
  EXPECT_TRUE(has(early.error.status, "in term 7")) << early.error.status.message();
  // The caller knows of a later one than the host's.
  word.say(7, first);
  behind.client().host_elected(9);
  const JoinEnd late = take(behind.join("moe", 0, config_of(1), kSecond / 2));
  EXPECT_EQ(late.error.status.reason(), EXPERTD_REASON_RENDEZVOUS_UNAVAILABLE);
  EXPECT_TRUE(has(late.error.status, "term 7, not 9")) << late.error.status.message();
  elect(9, &first);
  EXPECT_NE(take(behind.join("moe", 0, config_of(1))).placed, nullptr);
}

TEST_F(BootstrapElection, AHostWhoseTimeIsOverServesNobodyUntilItIsRenewed) {
  elect(5, &first);
  TestNode one({.name = "c", .id = 33, .rendezvous = {"http://etcd"}, .elected = word.asked()});
  EXPECT_NE(take(one.join("before", 0, config_of(1))).placed, nullptr);
  first.server().set_elected(5, base::now_ns());
  EXPECT_FALSE(first.server().hosting());
  word.say_nothing("etcd http://etcd: connection refused");
  const JoinEnd over = take(one.join("moe", 0, config_of(1), kSecond / 2));
  EXPECT_EQ(over.error.status.reason(), EXPERTD_REASON_RENDEZVOUS_UNAVAILABLE);
  EXPECT_TRUE(has(over.error.status, "rendezvous http://etcd does not answer")) << over.error.status.message();
  EXPECT_TRUE(has(over.error.status, "connection refused")) << over.error.status.message();
  EXPECT_EQ(one.client().state().etcd_cause, "etcd http://etcd: connection refused");
  EXPECT_FALSE(first.server().nodes().empty()) << "its state is still that of the term";
  elect(5, &first);
  EXPECT_NE(take(one.join("moe", 0, config_of(1))).placed, nullptr);
}

TEST_F(BootstrapElection, AnotherTermBeginsEmpty) {
  elect(5, &first);
  TestNode one({.name = "c", .id = 33, .rendezvous = {"http://etcd"}, .elected = word.asked()});
  EXPECT_NE(take(one.join("moe", 0, config_of(1))).placed, nullptr);
  EXPECT_EQ(first.server().nodes().size(), 1U);
  first.server().set_elected(6, base::now_ns() + 600 * kSecond);
  EXPECT_TRUE(first.server().nodes().empty());
}

TEST_F(BootstrapElection, ANodeWithAListIsToldWhatTheOthersHave) {
  elect(5, &first);
  TestNode listed({.name = "c", .id = 33, .rendezvous = {first.address()}});
  const JoinEnd end = take(listed.join("moe", 0, config_of(1), kSecond / 2));
  EXPECT_EQ(end.error.status.reason(), EXPERTD_REASON_RENDEZVOUS_UNAVAILABLE);
  EXPECT_TRUE(has(end.error.status, "give every node the same fabric.etcd")) << end.error.status.message();
  EXPECT_EQ(listed.client().state().source, "list");
}

TEST_F(BootstrapElection, WithoutAHostTheCauseOfTheElectionIsSaid) {
  word.say_nothing("etcd http://etcd: connection refused");
  TestNode one({.name = "c", .id = 33, .rendezvous = {"http://etcd"}, .elected = word.asked()});
  const JoinEnd end = take(one.join("moe", 0, config_of(1), kSecond / 2));
  EXPECT_EQ(end.error.status.reason(), EXPERTD_REASON_RENDEZVOUS_UNAVAILABLE);
  EXPECT_TRUE(has(end.error.status, "etcd http://etcd: connection refused")) << end.error.status.message();
}

}  // namespace
}  // namespace expertd::fabric
