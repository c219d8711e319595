// SPDX-License-Identifier: Apache-2.0
// The way to the rendezvous through a relay (support/relay.h): slow, silent, cut in the middle of a join, half-open. A
// join is placed or ends by name at its deadline, and no join waits for another one's connection.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "tests/fabric/bootstrap_fixture.h"
#include "tests/support/relay.h"
#include "tests/support/temp_dir.h"

namespace expertd::fabric {
namespace {

using support::Relay;
using support::Way;

/// The host of the rendezvous, and nodes that reach it through a relay each.
class BootstrapRelay : public ::testing::Test {
 protected:
  void SetUp() override {
    relay_.set_target(host_.address());
    other_relay_.set_target(host_.address());
  }
  /// Rank 0 at the host and rank 1 at `node`: both placed in the same group. Milliseconds.
  double expect_group(TestNode* node, const std::string& name, uint64_t timeout_ns = 15 * kSecond) {
    const uint64_t begin = support::monotonic_ns();
    std::future<JoinEnd> first = host_.join(name, 0, config_of(2), timeout_ns);
    std::future<JoinEnd> second = node->join(name, 1, config_of(2), timeout_ns);
    const JoinEnd ends[] = {take(std::move(first)), take(std::move(second))};
    for (const JoinEnd& end : ends) {
      EXPECT_NE(end.placed, nullptr) << name << ": " << end.error.status.message();
    }
    if (ends[0].placed != nullptr && ends[1].placed != nullptr) {
      EXPECT_EQ(ends[0].placed->key, ends[1].placed->key);
    }
    return support::elapsed_ms(begin);
  }
  /// A join of half a second at `node` ends at its deadline, by name; returns the message.
  static std::string expect_unavailable(TestNode* node, const std::string& name) {
    const uint64_t begin = support::monotonic_ns();
    const JoinEnd end = take(node->join(name, 1, config_of(2), kSecond / 2));
    const double ms = support::elapsed_ms(begin);
    EXPECT_EQ(end.placed, nullptr);
    EXPECT_EQ(end.error.status.reason(), EXPERTD_REASON_RENDEZVOUS_UNAVAILABLE) << end.error.status.message();
    std::printf("%s: %.0f ms: %s\n", name.c_str(), ms, end.error.status.message().c_str());
    EXPECT_GE(ms, 499);
    EXPECT_LT(ms, support::worst_bound_ms(1000));
    return end.error.status.message();
  }
  /// Where nothing answered, what was expected and what to look at.
  void expect_silent(const std::string& message, const std::string& call) const {
    EXPECT_NE(message.find(relay_.address() + ": "), std::string::npos) << message;
    EXPECT_NE(message.find("no answer to " + call), std::string::npos) << message;
    EXPECT_NE(message.find("fabric.listen"), std::string::npos) << message;
  }

  TestNode host_{{.name = "a", .id = 11}};
  Relay relay_;
  Relay other_relay_;
  TestNode second_{{.name = "b", .id = 22, .rendezvous = {relay_.address()}}};
  TestNode third_{{.name = "c", .id = 33, .rendezvous = {other_relay_.address()}}};
};

TEST_F(BootstrapRelay, JoinsWorkOverALongWay) {
  relay_.set_rule(Way::kToDaemon, {.delay_ms = 50});
  relay_.set_rule(Way::kToCaller, {.delay_ms = 50});
  const double first_ms = expect_group(&second_, "first");
  const double next_ms = expect_group(&second_, "next");
  std::printf("50 ms each way: first group %.0f ms, next group %.0f ms\n", first_ms, next_ms);
  EXPECT_GE(next_ms, 99);
  EXPECT_LT(std::max(first_ms, next_ms), support::worst_bound_ms(1000));
}

TEST_F(BootstrapRelay, JoinsWorkOverANarrowWay) {
  relay_.set_rule(Way::kToDaemon, {.bytes_per_s = 8000});
  relay_.set_rule(Way::kToCaller, {.bytes_per_s = 8000});
  std::printf("8000 bytes per second: %.0f ms\n", expect_group(&second_, "narrow"));
}

TEST_F(BootstrapRelay, WaysOfUnlikeLengthPlaceTheSameGroups) {
  relay_.set_rule(Way::kToDaemon, {.delay_ms = 40});
  other_relay_.set_rule(Way::kToCaller, {.delay_ms = 25});
  constexpr uint32_t kGroups = 16;
  std::vector<std::future<JoinEnd>> joins;
  for (uint32_t index = 0; index < kGroups; ++index) {
    const std::string name = "group" + std::to_string(index);
    TestNode* const nodes[] = {&host_, &second_, &third_};
    for (uint32_t rank = 0; rank < 3; ++rank) {
      joins.push_back(nodes[(index + rank) % 3]->join(name, rank, config_of(3)));
    }
  }
  for (uint32_t index = 0; index < kGroups; ++index) {
    uint64_t key = 0;
    for (uint32_t rank = 0; rank < 3; ++rank) {
      const JoinEnd end = take(std::move(joins[index * 3 + rank]));
      ASSERT_NE(end.placed, nullptr) << index << ": " << end.error.status.message();
      EXPECT_TRUE(rank == 0 || end.placed->key == key) << index;
      key = end.placed->key;
    }
  }
}

TEST_F(BootstrapRelay, AJoinWhoseConnectionIsCutIsSentAgain) {
  expect_group(&second_, "before");
  std::future<JoinEnd> waiting = second_.join("cut", 1, config_of(2));
  const uint64_t begin = support::monotonic_ns();
  for (int times = 0; times < 3; ++times) {
    const uint64_t connections = relay_.accepted();
    relay_.cut();
    EXPECT_TRUE(support::wait_until([&] { return relay_.accepted() > connections; }, kPatience));
  }
  EXPECT_EQ(waiting.wait_for(std::chrono::milliseconds(0)), std::future_status::timeout);
  const JoinEnd first = take(host_.join("cut", 0, config_of(2)));
  const JoinEnd second = take(std::move(waiting));
  ASSERT_NE(first.placed, nullptr) << first.error.status.message();
  ASSERT_NE(second.placed, nullptr) << second.error.status.message();
  EXPECT_EQ(first.placed->key, second.placed->key);
  std::printf("a join that was cut three times: placed after %.0f ms\n", support::elapsed_ms(begin));
}

/// Wherever in the bytes of a request or an answer it happens: one placement, the same for both.
TEST_F(BootstrapRelay, ACutAtAnyByteOfAJoinLosesNothing) {
  const char* const given = std::getenv("EXPERTD_SEED");
  const char* const base = std::getenv("EXPERTD_TEST_SEED");
  const uint64_t from = given != nullptr  ? std::strtoull(given, nullptr, 10)
                        : base != nullptr ? std::strtoull(base, nullptr, 10) * 1000
                                          : 1;
  const uint64_t cases = given != nullptr ? 1 : 24;
  double worst_ms = 0;
  for (uint64_t seed = from; seed < from + cases && !HasFailure(); ++seed) {
    std::mt19937_64 random(seed);
    const Way way = random() % 2 == 0 ? Way::kToDaemon : Way::kToCaller;
    relay_.cut_after(way, 1 + random() % 600);
    worst_ms = std::max(worst_ms, expect_group(&second_, "seed" + std::to_string(seed)));
    if (HasFailure()) {
      std::printf("EXPERTD_SEED=%llu expertd_bootstrap_tests --gtest_filter=*ACutAtAnyByte*\n",
                  static_cast<unsigned long long>(seed));
    }
  }
  std::printf("%llu cuts at random bytes: a group after at most %.0f ms\n",
              static_cast<unsigned long long>(relay_.cuts()), worst_ms);
  EXPECT_GT(relay_.cuts(), 0U);
}

TEST_F(BootstrapRelay, AConnectionThatIsAlwaysCutEndsTheJoinAtItsDeadline) {
  relay_.set_target("127.0.0.1:0");  // from now on every connection is reset as it comes
  relay_.cut();
  expect_unavailable(&second_, "always cut");
  relay_.set_target(host_.address());
  expect_group(&second_, "afterwards");
}

/// A daemon that has long looked in vain looks anew when somebody wants to join.
TEST_F(BootstrapRelay, AJoinDoesNotWaitForTheRestBetweenSearches) {
  Relay relay;
  TestNode rested({.name = "d",
                   .id = 44,
                   .rendezvous = {relay.address()},
                   .backoff_min_ns = 60 * kSecond,
                   .backoff_max_ns = 60 * kSecond});
  EXPECT_TRUE(support::wait_until([&] { return !rested.client().state().cause.empty(); }, kPatience));
  relay.set_target(host_.address());
  const double ms = expect_group(&rested, "rested");
  std::printf("a join in the middle of a rest: placed after %.0f ms\n", ms);
  EXPECT_LT(ms, support::worst_bound_ms(1000));
}

TEST_F(BootstrapRelay, HalfOpenConnectionsHoldUpNoOtherJoin) {
  relay_.set_mute(true);
  relay_.cut();
  const uint64_t connections = relay_.accepted();
  EXPECT_TRUE(support::wait_until([&] { return relay_.accepted() > connections; }, kPatience));
  std::future<JoinEnd> stuck = second_.join("stuck", 1, config_of(2), 60 * kSecond);
  double worst_ms = 0;
  for (int index = 0; index < 5; ++index) {
    worst_ms = std::max(worst_ms, expect_group(&third_, "beside" + std::to_string(index)));
  }
  std::printf("groups beside a half-open connection: at most %.0f ms\n", worst_ms);
  EXPECT_LT(worst_ms, support::worst_bound_ms(500));
  expect_silent(expect_unavailable(&second_, "half-open"), "the greeting");
  EXPECT_EQ(stuck.wait_for(std::chrono::milliseconds(0)), std::future_status::timeout);
  relay_.set_mute(false);
  relay_.cut();
  const JoinEnd first = take(host_.join("stuck", 0, config_of(2)));
  EXPECT_NE(first.placed, nullptr) << first.error.status.message();
  EXPECT_NE(take(std::move(stuck)).placed, nullptr);
}

TEST_F(BootstrapRelay, AnOpenConnectionThatFallsSilentEndsTheJoinAtItsDeadline) {
  expect_group(&second_, "before");
  relay_.set_rule(Way::kToDaemon, {.held = true});
  relay_.set_rule(Way::kToCaller, {.held = true});
  expect_silent(expect_unavailable(&second_, "silent"), "this call");
  expect_group(&third_, "beside");
  relay_.set_rule(Way::kToDaemon, {});
  relay_.set_rule(Way::kToCaller, {});
  std::printf("silence over to a group: %.0f ms\n", expect_group(&second_, "afterwards"));
}

TEST_F(BootstrapRelay, ConnectsThatHangEndTheJoinAtItsDeadline) {
  relay_.stop_accepting();
  relay_.cut();
  expect_unavailable(&second_, "connect hangs");
  expect_group(&third_, "beside");
  const uint64_t begin = support::monotonic_ns();
  relay_.go_on_accepting();
  expect_group(&second_, "afterwards");
  std::printf("connects possible again to a group: %.0f ms\n", support::elapsed_ms(begin));
}

}  // namespace
}  // namespace expertd::fabric
