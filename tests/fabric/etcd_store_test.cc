// SPDX-License-Identifier: Apache-2.0
// What is said to an etcd and what comes of it, against a real one; and what is none, or is not there.
#include "daemon/group/etcd/etcd_store.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <condition_variable>
#include <future>
#include <mutex>

#include "daemon/base/fd.h"
#include "daemon/group/election.h"
#include "tests/fabric/bootstrap_fixture.h"
#include "tests/support/etcd_process.h"
#include "tests/support/free_ports.h"

namespace expertd::group {
namespace {

constexpr uint64_t kSecond = 1'000'000'000;
constexpr const char* kKey = "/expertd/rendezvous";

std::unique_ptr<EtcdStore> store_at(std::vector<std::string> endpoints, uint64_t call_ns = 10 * kSecond) {
  base::Result<std::unique_ptr<EtcdStore>> made = EtcdStore::create({std::move(endpoints), kKey, call_ns});
  EXPECT_TRUE(made.is_ok()) << made.status().message();
  return made.is_ok() ? std::move(made).value() : nullptr;
}

struct EtcdStoreReal : testing::Test {
  const std::vector<uint16_t> ports = support::free_ports(2);
  support::EtcdProcess etcd{ports[0], ports[1]};

  void SetUp() override { ASSERT_TRUE(etcd.start()); }
};

TEST_F(EtcdStoreReal, TheKeyIsOfTheFirstUntilItsLeaseGoes) {
  const auto first = store_at({etcd.url()});
  const auto second = store_at({etcd.url()});
  EXPECT_FALSE(first->look().value().record.has_value());
  const ElectionStore::Lease lease = first->grant(2 * kSecond).value();
  EXPECT_NE(lease.id, 0);
  EXPECT_EQ(lease.ttl_ns, 2 * kSecond);
  const ElectionStore::Look mine = first->claim("mine", lease.id).value();
  ASSERT_TRUE(mine.record.has_value());
  EXPECT_EQ(mine.record->lease, lease.id);

  const ElectionStore::Lease other = second->grant(2 * kSecond).value();
  const ElectionStore::Look seen = second->claim("another's", other.id).value();
  ASSERT_TRUE(seen.record.has_value());
  EXPECT_EQ(seen.record->value, "mine");
  EXPECT_EQ(seen.record->term, mine.record->term);
  EXPECT_EQ(seen.record->lease, lease.id);
  EXPECT_EQ(first->keep_alive(lease.id).value().ttl_ns, 2 * kSecond);

  // Nothing changes; then it does, while somebody waits, and had changed before one waits.
  const uint64_t before_ns = base::now_ns();
  EXPECT_TRUE(second->wait_change(seen.revision, kSecond / 10).is_ok());
  EXPECT_GE(base::now_ns() - before_ns, kSecond / 10);
  std::future<base::Status> waits =
      std::async(std::launch::async, [&] { return second->wait_change(seen.revision, 20 * kSecond); });
  EXPECT_TRUE(first->revoke(lease.id).is_ok());
  EXPECT_TRUE(waits.get().is_ok());
  EXPECT_TRUE(first->wait_change(seen.revision, 20 * kSecond).is_ok());
  EXPECT_LT(base::now_ns() - before_ns, 15 * kSecond);
  EXPECT_EQ(first->keep_alive(lease.id).value().ttl_ns, 0U);
  EXPECT_FALSE(first->claim("mine", lease.id).is_ok()) << "of a lease that is gone";
  const ElectionStore::Look later = second->claim("another's", other.id).value();
  ASSERT_TRUE(later.record.has_value());
  EXPECT_GT(later.record->term, mine.record->term);
}

TEST_F(EtcdStoreReal, OneThatIsAwayIsNamedAndTheNextOneAsked) {
  const auto store = store_at({"http://127.0.0.1:1", etcd.url()});
  const base::Status refused = store->look().status();
  EXPECT_EQ(refused.reason(), EXPERTD_REASON_RENDEZVOUS_UNAVAILABLE);
  EXPECT_NE(refused.message().find("etcd http://127.0.0.1:1: "), std::string::npos) << refused.message();
  EXPECT_TRUE(store->look().is_ok());
  etcd.kill();
  EXPECT_NE(store->look().status().message().find(etcd.url()), std::string::npos);
}

TEST_F(EtcdStoreReal, AnInterruptEndsTheCallUnderWayAndAllLaterOnesButARevocation) {
  const auto store = store_at({etcd.url()});
  const int64_t lease = store->grant(20 * kSecond).value().id;
  const int64_t revision = store->look().value().revision;
  const uint64_t before_ns = base::now_ns();
  std::future<base::Status> waits =
      std::async(std::launch::async, [&] { return store->wait_change(revision, 60 * kSecond); });
  store->interrupt();
  EXPECT_EQ(waits.get().reason(), EXPERTD_REASON_CANCELLED);
  EXPECT_EQ(store->look().status().reason(), EXPERTD_REASON_CANCELLED);
  EXPECT_TRUE(store->revoke(lease).is_ok());
  EXPECT_LT(base::now_ns() - before_ns, 30 * kSecond);
}

/// What elections of several daemons tell, in the order in which they tell it.
class Told {
 public:
  Election::Told by(uint32_t daemon) {
    return [this, daemon](const Elected& elected) {
      const std::lock_guard lock(mutex_);
      latest_[daemon] = elected;
      changed_.notify_all();
    };
  }
  bool becomes(const std::function<bool(const Elected& first, const Elected& second)>& wanted) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, std::chrono::seconds(20), [&] { return wanted(latest_[0], latest_[1]); });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  Elected latest_[2];
};

TEST_F(EtcdStoreReal, ElectionsFollowARevokedLeaseAtOnce) {
  Told told;
  const auto options = [](uint64_t id) {
    return CandidacyOptions{
        .self = {id, "n" + std::to_string(id), "a:1"}, .where = "the key", .lease_ns = 60 * kSecond};
  };
  Election first(options(1), store_at({etcd.url()}));
  Election second(options(2), store_at({etcd.url()}));
  ASSERT_TRUE(first.start(told.by(0)).is_ok());
  ASSERT_TRUE(told.becomes([](const Elected& one, const Elected&) { return one.here; }));
  const uint64_t term = first.elected().term;
  ASSERT_TRUE(second.start(told.by(1)).is_ok());
  ASSERT_TRUE(told.becomes([&](const Elected&, const Elected& two) { return two.term == term && !two.here; }));
  // Nobody would look again for 20 s.
  const uint64_t before_ns = base::now_ns();
  const auto operators = store_at({etcd.url()});
  ASSERT_TRUE(operators->revoke(operators->look().value().record->lease).is_ok());
  EXPECT_TRUE(told.becomes([&](const Elected& one, const Elected& two) {
    return one.term > term && one.term == two.term && one.here != two.here;
  }));
  // And the one that hosts now says goodbye.
  Election& host = first.elected().here ? first : second;
  Election& other = first.elected().here ? second : first;
  host.stop();
  EXPECT_FALSE(host.elected().here);
  EXPECT_TRUE(told.becomes([&](const Elected&, const Elected&) { return other.elected().here; }));
  EXPECT_LT(base::now_ns() - before_ns, 15 * kSecond);
}

TEST(EtcdStore, WhatIsNoEtcdIsSaid) {
  fabric::TestNode node({.name = "a", .id = 11});
  const auto store = store_at({"http://" + node.address()});
  EXPECT_NE(store->look().status().message().find("what listens there is no etcd v3"), std::string::npos)
      << store->look().status().message();
}

TEST(EtcdStore, AMutePortCostsNoMoreThanTheLongestCall) {
  const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const base::ScopedFd mute(fd);
  ASSERT_EQ(::listen(fd, 16), 0);
  sockaddr_in address{};
  socklen_t size = sizeof(address);
  ASSERT_EQ(::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size), 0);
  const auto store = store_at({"http://127.0.0.1:" + std::to_string(ntohs(address.sin_port))}, kSecond / 5);
  const uint64_t before_ns = base::now_ns();
  EXPECT_FALSE(store->look().is_ok());
  EXPECT_FALSE(store->grant(kSecond).is_ok());
  EXPECT_FALSE(store->keep_alive(1).is_ok());
  EXPECT_FALSE(store->claim("mine", 1).is_ok());
  EXPECT_FALSE(store->revoke(1).is_ok());
  EXPECT_LT(base::now_ns() - before_ns, 10 * kSecond);
}

TEST(EtcdStore, RefusesWhatIsNoEndpoint) {
  EXPECT_EQ(EtcdStore::create({{"https://a:1"}, kKey}).status().reason(), EXPERTD_REASON_CONFIG_BAD_VALUE);
  EXPECT_FALSE(EtcdStore::create({{"http://"}, kKey}).is_ok());
  EXPECT_FALSE(EtcdStore::create({{}, kKey}).is_ok());
}

}  // namespace
}  // namespace expertd::group
