// SPDX-License-Identifier: Apache-2.0
// Who hosts the rendezvous when a store says so: elections, leases that end, stores that do not answer, several daemons
// at once under random faults. The store and the clock are fakes; a failing seed is named as the call that repeats it.
#include <gtest/gtest.h>

#include <array>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "daemon/group/candidacy.h"
#include "daemon/group/election.h"

namespace expertd::group {
namespace {

constexpr uint64_t kMs = 1'000'000;
constexpr uint64_t kLeaseNs = 5'000 * kMs;

Host host_of(uint32_t index) {
  return {index + 1, "n" + std::to_string(index + 1), "10.0.0." + std::to_string(index + 1) + ":9465"};
}

/// One key, its leases and a clock.
struct World {
  uint64_t now_ns = 1;
  int64_t revision = 7;
  int64_t last_lease = 0;
  std::map<int64_t, uint64_t> leases;  // when each ends
  std::optional<ElectionStore::Record> record;

  void pass(uint64_t time_ns) {
    now_ns += time_ns;
    std::erase_if(leases, [this](const auto& lease) { return lease.second <= now_ns; });
    if (record.has_value() && !leases.contains(record->lease)) {
      remove();
    }
  }
  void remove() {
    revision += record.has_value() ? 1 : 0;
    record.reset();
  }
};

/// The way of one daemon to the world; `fault` says what becomes of each call.
class FakeStore final : public ElectionStore {
 public:
  enum class Fault { kNone, kAway, kAnswerLost };

  explicit FakeStore(World* world) : world_(*world) {}

  base::Result<Lease> grant(uint64_t ttl_ns) override {
    if (!arrives()) {
      return away();
    }
    const int64_t id = ++world_.last_lease;
    world_.leases[id] = world_.now_ns + ttl_ns;
    return answered() ? base::Result<Lease>(Lease{id, ttl_ns}) : away();
  }
  base::Result<Lease> keep_alive(int64_t lease) override {
    if (!arrives()) {
      return away();
    }
    const auto found = world_.leases.find(lease);
    const uint64_t ttl_ns = found == world_.leases.end() ? 0 : kLeaseNs;
    if (ttl_ns != 0) {
      found->second = world_.now_ns + ttl_ns;
    }
    return answered() ? base::Result<Lease>(Lease{lease, ttl_ns}) : away();
  }
  base::Status revoke(int64_t lease) override {
    ++revoked;
    if (!arrives()) {
      return away();
    }
    world_.leases.erase(lease);
    world_.pass(0);
    return answered() ? base::Status::ok() : away();
  }
  base::Result<Look> look() override {
    if (!arrives()) {
      return away();
    }
    const Look seen{world_.record, world_.revision};
    return answered() ? base::Result<Look>(seen) : away();
  }
  base::Result<Look> claim(const std::string& value, int64_t lease) override {
    if (!arrives()) {
      return away();
    }
    if (!world_.leases.contains(lease)) {
      return base::Status(EXPERTD_REASON_RENDEZVOUS_UNAVAILABLE, "requested lease not found");
    }
    if (!world_.record.has_value()) {
      ++world_.revision;
      world_.record = Record{value, static_cast<uint64_t>(world_.revision), lease};
    }
    const Look seen{world_.record, world_.revision};
    return answered() ? base::Result<Look>(seen) : away();
  }
  base::Status wait_change(int64_t, uint64_t) override { return base::Status::ok(); }
  void interrupt() override {}

  std::function<Fault()> fault = [] { return Fault::kNone; };
  std::function<uint64_t()> takes_ns = [] { return 0; };  // each way of a call
  uint32_t revoked = 0;

 private:
  static base::Status away() { return base::Status(EXPERTD_REASON_RENDEZVOUS_UNAVAILABLE, "connection refused"); }
  bool arrives() {
    now_ = fault();
    world_.pass(takes_ns());
    return now_ != Fault::kAway;
  }
  bool answered() {
    world_.pass(takes_ns());
    return now_ == Fault::kNone;
  }

  World& world_;
  Fault now_ = Fault::kNone;
};

class Daemon {
 public:
  Daemon(World* world, uint32_t index)
      : store(world),
        candidacy({.self = host_of(index), .where = "the key", .lease_ns = kLeaseNs}, &store,
                  [world] { return world->now_ns; }),
        world_(*world) {}

  /// As the peer server sees it.
  bool hosts() const { return candidacy.elected().here && world_.now_ns < candidacy.elected().until_ns; }
  uint64_t term() const { return candidacy.elected().term; }

  FakeStore store;
  Candidacy candidacy;

 private:
  World& world_;
};

TEST(ElectionHost, IsWrittenAndReadBack) {
  const Host host{0xffffffffffffffff, "rack 7, node 3", "[fd00::1]:9465"};
  EXPECT_EQ(host_from(to_text(host)).value(), host);
  for (const char* text :
       {"", "expertd-host-1", "expertd-host-1 5", "expertd-host-1 5 a:1", "expertd-host-1 5 a:1 ",
        "expertd-host-1 0 a:1 n", "expertd-host-1 x a:1 n", "expertd-host-1 5  n", "expertd-host-2 5 a:1 n",
        "expertd-host-1 5 a:1 n\n", "elsewhere", "expertd-host-1 99999999999999999999 a:1 n"}) {
    EXPECT_FALSE(host_from(text).is_ok()) << text;
  }
  EXPECT_FALSE(host_from(to_text({1, std::string(65, 'n'), "a:1"})).is_ok());
}

TEST(Candidacy, TheFirstHostsAndTheOthersFollow) {
  World world;
  Daemon first(&world, 0);
  Daemon second(&world, 1);
  EXPECT_EQ(first.candidacy.elected().term, 0U);
  first.candidacy.turn();
  second.candidacy.turn();
  EXPECT_TRUE(first.hosts());
  EXPECT_FALSE(second.hosts());
  EXPECT_EQ(second.candidacy.elected().host, host_of(0));
  EXPECT_EQ(second.term(), first.term());
  EXPECT_EQ(second.candidacy.elected().cause, "");
  EXPECT_EQ(world.leases.size(), 1U) << "who follows holds no lease";
  EXPECT_LT(first.candidacy.elected().until_ns, world.leases.begin()->second) << "it stops before its lease ends";
  for (int i = 0; i < 100; ++i) {
    world.pass(first.candidacy.idle_ns());
    first.candidacy.turn();
    EXPECT_TRUE(first.hosts());
  }
}

TEST(Candidacy, AnotherTakesOverInALaterTermWhenTheHostIsSilent) {
  World world;
  Daemon first(&world, 0);
  Daemon second(&world, 1);
  first.candidacy.turn();
  second.candidacy.turn();
  const uint64_t term = first.term();
  world.pass(kLeaseNs - 1);
  EXPECT_FALSE(first.hosts()) << "by itself, without having looked";
  second.candidacy.turn();
  EXPECT_FALSE(second.hosts()) << "the lease has not ended";
  world.pass(1);
  second.candidacy.turn();
  EXPECT_TRUE(second.hosts());
  EXPECT_GT(second.term(), term);
  // The silent one goes on.
  first.candidacy.turn();
  EXPECT_FALSE(first.hosts());
  EXPECT_EQ(first.candidacy.idle_ns(), 0U) << "it looks again at once, having told of its loss";
  first.candidacy.turn();
  EXPECT_EQ(first.candidacy.elected().host, host_of(1));
  EXPECT_EQ(first.term(), second.term());
  EXPECT_EQ(world.leases.size(), 1U);
}

TEST(Candidacy, AHostWhoseLeaseIsRevokedStopsWithItsNextLook) {
  World world;
  Daemon host(&world, 0);
  host.candidacy.turn();
  const uint64_t term = host.term();
  world.leases.clear();
  world.pass(0);
  host.candidacy.turn();
  EXPECT_FALSE(host.hosts());
  EXPECT_EQ(host.candidacy.idle_ns(), 0U);
  host.candidacy.turn();
  EXPECT_TRUE(host.hosts());
  EXPECT_GT(host.term(), term) << "what it hosted before is of an earlier term";
}

TEST(Candidacy, AStoreThatIsAwayEndsHostingWithTheLeaseAndIsTriedAgain) {
  World world;
  Daemon host(&world, 0);
  host.candidacy.turn();
  host.store.fault = [] { return FakeStore::Fault::kAway; };
  world.pass(kLeaseNs / 2);
  host.candidacy.turn();
  EXPECT_TRUE(host.hosts()) << "its lease lasts";
  EXPECT_EQ(host.candidacy.elected().cause, "connection refused");
  EXPECT_FALSE(host.candidacy.reachable());
  uint64_t longest_ns = 0;
  for (int i = 0; i < 10; ++i) {
    world.pass(host.candidacy.idle_ns());
    host.candidacy.turn();
    longest_ns = std::max(longest_ns, host.candidacy.idle_ns());
  }
  EXPECT_EQ(longest_ns, 1'000 * kMs);
  EXPECT_FALSE(host.hosts());
  const uint64_t term = host.term();
  host.store.fault = [] { return FakeStore::Fault::kNone; };
  host.candidacy.turn();
  host.candidacy.turn();
  EXPECT_TRUE(host.hosts());
  EXPECT_GT(host.term(), term);
}

TEST(Candidacy, AStoreThatStoodStillKeepsTheTerm) {
  World world;
  Daemon host(&world, 0);
  host.candidacy.turn();
  const uint64_t term = host.term();
  world.now_ns += 2 * kLeaseNs;
  world.leases.begin()->second += 2 * kLeaseNs;  // none ends meanwhile, as in an etcd that was down
  EXPECT_FALSE(host.hosts());
  host.candidacy.turn();
  EXPECT_TRUE(host.hosts());
  EXPECT_EQ(host.term(), term) << "nobody else can have hosted";
}

TEST(Candidacy, AClaimWhoseAnswerIsLostIsItsOwn) {
  World world;
  Daemon host(&world, 0);
  int call = 0;
  host.store.fault = [&call] { return ++call == 3 ? FakeStore::Fault::kAnswerLost : FakeStore::Fault::kNone; };
  host.candidacy.turn();
  EXPECT_FALSE(host.hosts());
  ASSERT_TRUE(world.record.has_value());
  host.candidacy.turn();
  EXPECT_TRUE(host.hosts());
}

TEST(Candidacy, WhatIsNoHostIsSaidWithWhatToDo) {
  World world;
  world.leases[99] = UINT64_MAX;
  world.record = ElectionStore::Record{"somebody else's", 5, 99};
  Daemon host(&world, 0);
  host.candidacy.turn();
  EXPECT_EQ(host.term(), 0U);
  EXPECT_EQ(host.candidacy.elected().cause,
            "the key does not hold what a daemon writes there; delete the key, or choose another fabric.etcd_prefix");
}

TEST(Candidacy, AStoreThatWentBackIsNotFollowed) {
  World world;
  Daemon host(&world, 0);
  Daemon other(&world, 1);
  world.revision = 100;
  other.candidacy.turn();
  host.candidacy.turn();
  EXPECT_EQ(host.term(), 101U);
  other.candidacy.resign();
  world.revision = 10;
  host.candidacy.turn();
  EXPECT_FALSE(host.hosts());
  EXPECT_NE(host.candidacy.elected().cause.find("restart the daemons"), std::string::npos);
  EXPECT_FALSE(world.record.has_value()) << "it keeps the place from nobody";
}

TEST(Candidacy, WhoResignsGivesItsPlaceToTheNextAtOnce) {
  World world;
  Daemon first(&world, 0);
  Daemon second(&world, 1);
  first.candidacy.turn();
  first.candidacy.resign();
  EXPECT_FALSE(first.hosts());
  second.candidacy.turn();
  EXPECT_TRUE(second.hosts());
}

/// Three daemons take turns in any order, with calls that take their time, get lost or lose their answers, pauses, and
/// leases and keys that somebody takes away. Whatever happens terms only grow and no two host in the same one; without
/// the interference no two host at the same time. When all is well again one hosts and all know it.
void run_random(uint32_t seed, bool interference) {
  std::mt19937 random(seed);
  const auto below = [&random](uint64_t bound) { return random() % bound; };
  World world;
  std::vector<std::unique_ptr<Daemon>> daemons;
  std::array<uint64_t, 3> terms{};
  bool calm = false;
  for (uint32_t i = 0; i < terms.size(); ++i) {
    daemons.push_back(std::make_unique<Daemon>(&world, i));
    daemons.back()->store.fault = [&] {
      return calm || below(5) != 0 ? FakeStore::Fault::kNone
             : below(2) == 0       ? FakeStore::Fault::kAway
                                   : FakeStore::Fault::kAnswerLost;
    };
    daemons.back()->store.takes_ns = [&] { return calm ? 0 : below(4) == 0 ? below(3'000) * kMs : below(5) * kMs; };
  }
  const auto check = [&] {
    uint32_t hosting = 0;
    for (uint32_t i = 0; i < terms.size(); ++i) {
      EXPECT_GE(daemons[i]->term(), terms[i]);
      terms[i] = daemons[i]->term();
      hosting += daemons[i]->hosts() ? 1 : 0;
      for (uint32_t j = 0; j < i; ++j) {
        EXPECT_FALSE(daemons[i]->hosts() && daemons[j]->hosts() && terms[i] == terms[j]);
      }
    }
    EXPECT_TRUE(interference || hosting <= 1);
  };
  for (int step = 0; step < 200; ++step) {
    world.pass(below(1'500) * kMs);
    daemons[below(3)]->candidacy.turn();
    if (interference && below(20) == 0 && world.record.has_value()) {
      below(2) == 0 ? world.leases.erase(world.record->lease) : 0U;
      world.remove();
    }
    check();
  }
  calm = true;
  for (int round = 0; round < 12; ++round) {
    world.pass(1'000 * kMs);
    for (const auto& daemon : daemons) {
      daemon->candidacy.turn();
      check();
    }
  }
  uint32_t hosting = 0;
  for (const auto& daemon : daemons) {
    hosting += daemon->hosts() ? 1 : 0;
    EXPECT_EQ(daemon->term(), world.record.has_value() ? world.record->term : 0);
    EXPECT_EQ(daemon->candidacy.elected().cause, "");
  }
  EXPECT_EQ(hosting, 1U);
}

TEST(CandidacyRandom, NoTwoHostWhateverHappens) {
  for (uint32_t seed = 1; seed <= 300 && !testing::Test::HasFailure(); ++seed) {
    SCOPED_TRACE("run_random(" + std::to_string(seed) + ", false)");
    run_random(seed, false);
  }
}

TEST(CandidacyRandom, NoTwoHostInOneTermWhoeverTakesKeysAndLeasesAway) {
  for (uint32_t seed = 1; seed <= 300 && !testing::Test::HasFailure(); ++seed) {
    SCOPED_TRACE("run_random(" + std::to_string(seed) + ", true)");
    run_random(seed, true);
  }
}

/// Waits for changes until it is interrupted.
class WaitingStore final : public ElectionStore {
 public:
  explicit WaitingStore(bool* revoked) : revoked_(*revoked) {}

  base::Result<Lease> grant(uint64_t ttl_ns) override { return Lease{1, ttl_ns}; }
  base::Result<Lease> keep_alive(int64_t lease) override { return Lease{lease, kLeaseNs}; }
  base::Status revoke(int64_t) override {
    revoked_ = true;
    return base::Status::ok();
  }
  base::Result<Look> look() override { return seen_; }
  base::Result<Look> claim(const std::string& value, int64_t lease) override {
    seen_ = {Record{value, 3, lease}, 3};
    return seen_;
  }
  base::Status wait_change(int64_t, uint64_t limit_ns) override {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, std::chrono::nanoseconds(limit_ns), [this] { return interrupted_; });
    return base::Status(EXPERTD_REASON_CANCELLED);
  }
  void interrupt() override {
    const std::lock_guard lock(mutex_);
    interrupted_ = true;
    changed_.notify_all();
  }

 private:
  bool& revoked_;
  Look seen_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool interrupted_ = false;
};

TEST(Election, TellsThatItHostsAndThatItStops) {
  bool revoked = false;
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<Elected> told;
  Election election({.self = host_of(0), .where = "the key", .lease_ns = 60'000 * kMs},
                    std::make_unique<WaitingStore>(&revoked));
  EXPECT_NE(election.elected().cause, "");
  ASSERT_TRUE(election
                  .start([&](const Elected& elected) {
                    const std::lock_guard lock(mutex);
                    told.push_back(elected);
                    changed.notify_all();
                  })
                  .is_ok());
  {
    std::unique_lock lock(mutex);
    ASSERT_TRUE(changed.wait_for(lock, std::chrono::seconds(20), [&] { return !told.empty(); }));
    EXPECT_TRUE(told.front().here);
    EXPECT_EQ(told.front().term, 3U);
  }
  EXPECT_EQ(election.elected().host, host_of(0));
  election.stop();
  EXPECT_FALSE(told.back().here);
  EXPECT_TRUE(revoked);
}

}  // namespace
}  // namespace expertd::group
