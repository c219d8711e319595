// SPDX-License-Identifier: Apache-2.0
// Three real daemons that elect at a real etcd who hosts the rendezvous: groups form without a list; hosts die and are
// stopped, etcd dies and comes late. Each test prints what it measured.
#include <gtest/gtest.h>
#include <signal.h>

#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "tests/integration/pending_join.h"
#include "tests/support/daemon_cluster.h"
#include "tests/support/etcd_process.h"
#include "tests/support/free_ports.h"

namespace expertd::support {
namespace {

using nlohmann::json;
using std::chrono::seconds;

constexpr uint32_t kNodes = 3;
constexpr double kLeaseMs = 2000;
constexpr double kRecoveryMs = 2000;  // until a group has formed where nothing is in its way any more

class Etcd : public ::testing::Test {
 protected:
  std::vector<std::string> flags() const {
    // The first is never there: what it costs is part of every test.
    return {"--fabric-etcd=http://no-such-host.invalid:2379," + etcd_.url(), "--fabric-etcd-lease=2s",
            "--fabric-etcd-prefix=/clusters/test"};
  }
  json fabric(uint32_t node) {
    const RunResult result =
        run_program("expertctl", {"status", "--socket", cluster_.node(node).control_socket(), "--json"}, seconds(60));
    EXPECT_EQ(result.exit_code, 0) << result.output << result.error;
    return json::parse(result.output, nullptr, false)["fabric"];
  }
  /// The node that hosts, once all of `nodes` know it; not `former`.
  std::optional<uint32_t> host(const std::vector<uint32_t>& nodes, std::optional<uint32_t> former = std::nullopt) {
    std::optional<uint32_t> found;
    const bool agreed = wait_until(
        [&] {
          found.reset();
          uint32_t hosting = 0;
          std::vector<std::string> names;
          for (const uint32_t node : nodes) {
            const json seen = fabric(node);
            hosting += seen["rendezvous_hosting"] == true ? 1 : 0;
            found = seen["rendezvous_hosting"] == true ? node : found;
            names.push_back(seen["rendezvous_node"]);
          }
          return hosting == 1 && found != former &&
                 std::all_of(names.begin(), names.end(),
                             [&](const std::string& name) { return name == DaemonCluster::name(*found); });
        },
        seconds(20));
    EXPECT_TRUE(agreed) << "no host that all know";
    return agreed ? found : std::nullopt;
  }
  static std::vector<uint32_t> others_than(uint32_t node) {
    return node == 0   ? std::vector<uint32_t>{1, 2}
           : node == 1 ? std::vector<uint32_t>{0, 2}
                       : std::vector<uint32_t>{0, 1};
  }
  std::vector<Seat> seats(const std::vector<uint32_t>& nodes, uint32_t device) {
    std::vector<Seat> all;
    for (const uint32_t node : nodes) {
      all.push_back({cluster_.node(node).attach_socket(), "host:" + std::to_string(device)});
    }
    return all;
  }
  static void expect_rounds(RankGroup* group) {
    ASSERT_TRUE(group->ok()) << group->failure();
    group->run([](Rank& rank) {
      for (int round = 0; round < 20; ++round) {
        const OpEnd end = barrier(rank.group);
        ASSERT_TRUE(end.outcome.ok()) << describe(end.outcome);
      }
    });
  }
  /// A join of one second that cannot succeed; its outcome.
  Outcome refused_join(uint32_t node) {
    const ClientSession session(cluster_.node(node).attach_socket(), "host:2");
    expertd_group_options_t options = small_group("refused", 0, 2);
    options.join_timeout_ns = 1'000'000'000;
    expertd_group_t* group = nullptr;
    return outcome_of(expertd_group_join(session.get(), &options, &group));
  }

  const std::vector<uint16_t> ports_ = free_ports(2);
  EtcdProcess etcd_{ports_[0], ports_[1]};
  DaemonCluster cluster_{kNodes, 3, flags()};
};

TEST_F(Etcd, AnotherDaemonHostsWhenTheHostIsKilled) {
  ASSERT_TRUE(etcd_.start());
  ASSERT_TRUE(cluster_.start());
  const std::optional<uint32_t> first = host({0, 1, 2});
  ASSERT_TRUE(first.has_value());
  const std::vector<uint32_t> left = others_than(*first);
  const json before = fabric(left[0]);
  EXPECT_EQ(before["rendezvous_source"], "etcd");
  EXPECT_EQ(before["etcd_cause"], "");
  RankGroup over_all(seats({0, 1, 2}, 0), "all");
  expect_rounds(&over_all);
  RankGroup running(seats(left, 1), "running");
  expect_rounds(&running);

  cluster_.node(*first).kill();
  const uint64_t begin = monotonic_ns();
  expect_rounds(&running);
  RankGroup formed(seats(left, 2), "new");
  const double formed_ms = elapsed_ms(begin);
  std::printf("SIGKILL of the host to a new group: %.0f ms with a lease of %.0f ms\n", formed_ms, kLeaseMs);
  EXPECT_LT(formed_ms, worst_bound_ms(2 * kLeaseMs));
  expect_rounds(&formed);
  expect_rounds(&running);
  const std::optional<uint32_t> second = host(left, first);
  ASSERT_TRUE(second.has_value());
  EXPECT_GT(fabric(left[0])["rendezvous_term"], before["rendezvous_term"]);

  // The new one refuses as the first did.
  const ClientSession one(cluster_.node(left[0]).attach_socket(), "host:0");
  const ClientSession other(cluster_.node(left[1]).attach_socket(), "host:0");
  PendingJoin waiting(one, small_group("twice", 0, 2));
  Outcome twice;
  EXPECT_TRUE(wait_until(
      [&] {
        expertd_group_options_t options = small_group("twice", 0, 2);
        options.join_timeout_ns = 100'000'000;
        expertd_group_t* group = nullptr;
        twice = outcome_of(expertd_group_join(other.get(), &options, &group));
        return twice.status.reason == EXPERTD_REASON_DUPLICATE_RANK;
      },
      seconds(10)))
      << describe(twice);
  EXPECT_NE(twice.message.find(DaemonCluster::name(left[0])), std::string::npos) << twice.message;
  PendingJoin completes(other, small_group("twice", 1, 2));
  EXPECT_TRUE(completes.outcome().ok()) << describe(completes.outcome());

  // The killed one comes back and follows.
  ASSERT_TRUE(cluster_.node(*first).start());
  RankGroup again(seats({0, 1, 2}, 1), "again");
  expect_rounds(&again);
  EXPECT_EQ(fabric(*first)["rendezvous_hosting"], false);
}

TEST_F(Etcd, AHostThatIsToldToEndIsFollowedAtOnce) {
  ASSERT_TRUE(etcd_.start());
  ASSERT_TRUE(cluster_.start());
  const std::optional<uint32_t> first = host({0, 1, 2});
  ASSERT_TRUE(first.has_value());
  EXPECT_EQ(cluster_.node(*first).stop(), 0);
  const uint64_t begin = monotonic_ns();
  RankGroup formed(seats(others_than(*first), 0), "new");
  std::printf("exit of the host to a new group: %.0f ms\n", elapsed_ms(begin));
  expect_rounds(&formed);
  EXPECT_LT(elapsed_ms(begin), worst_bound_ms(kRecoveryMs));
}

TEST_F(Etcd, RunningGroupsOutliveAnEtcdThatIsKilledAndJoinsSaySo) {
  ASSERT_TRUE(etcd_.start());
  ASSERT_TRUE(cluster_.start());
  const std::optional<uint32_t> first = host({0, 1, 2});
  ASSERT_TRUE(first.has_value());
  RankGroup running(seats({0, 1, 2}, 0), "running");
  expect_rounds(&running);
  etcd_.kill();
  const uint64_t begin = monotonic_ns();
  EXPECT_TRUE(wait_until([&] { return fabric(*first)["rendezvous_hosting"] == false; }, seconds(20)));
  std::printf("death of etcd to the end of hosting: %.0f ms with a lease of %.0f ms\n", elapsed_ms(begin), kLeaseMs);
  EXPECT_LT(elapsed_ms(begin), worst_bound_ms(kLeaseMs));
  expect_rounds(&running);
  const Outcome refused = refused_join(others_than(*first)[0]);
  EXPECT_EQ(refused.status.reason, EXPERTD_REASON_RENDEZVOUS_UNAVAILABLE) << describe(refused);
  EXPECT_NE(refused.message.find("etcd"), std::string::npos) << refused.message;
  std::printf("%s\n", describe(refused).c_str());
  EXPECT_NE(fabric(*first)["etcd_cause"], "");

  ASSERT_TRUE(etcd_.start());
  const uint64_t ready = monotonic_ns();
  RankGroup formed(seats({0, 1, 2}, 1), "new");
  std::printf("etcd back to a new group: %.0f ms\n", elapsed_ms(ready));
  expect_rounds(&formed);
  EXPECT_LT(elapsed_ms(ready), worst_bound_ms(kRecoveryMs));
  expect_rounds(&running);
}

TEST_F(Etcd, DaemonsStartWithoutItAndJoinsWaitForIt) {
  ASSERT_TRUE(cluster_.start());
  const auto says = [&](const std::string& what) {
    return wait_until([&] { return fabric(0)["etcd_cause"].get<std::string>().find(what) != std::string::npos; },
                      seconds(20));
  };
  EXPECT_TRUE(says("no-such-host.invalid"));
  EXPECT_TRUE(says(etcd_.url()));
  EXPECT_NE(cluster_.node(0).log().find("who hosts the rendezvous cannot be seen"), std::string::npos);
  const Outcome refused = refused_join(0);
  EXPECT_EQ(refused.status.reason, EXPERTD_REASON_RENDEZVOUS_UNAVAILABLE) << describe(refused);
  EXPECT_NE(refused.message.find(etcd_.url()), std::string::npos) << refused.message;
  std::printf("%s\n", describe(refused).c_str());

  const ClientSession one(cluster_.node(0).attach_socket(), "host:0");
  const ClientSession other(cluster_.node(1).attach_socket(), "host:0");
  PendingJoin waiting(one, small_group("late", 0, 2));
  PendingJoin completes(other, small_group("late", 1, 2));
  ASSERT_TRUE(etcd_.start());
  const uint64_t ready = monotonic_ns();
  EXPECT_TRUE(waiting.outcome().ok()) << describe(waiting.outcome());
  EXPECT_TRUE(completes.outcome().ok()) << describe(completes.outcome());
  std::printf("etcd ready to the group: %.0f ms\n", elapsed_ms(ready));
  EXPECT_LT(elapsed_ms(ready), worst_bound_ms(kRecoveryMs));
}

/// While it is stopped its lease ends and another one hosts; awake it is asked by nobody, and hosts no more.
TEST_F(Etcd, AHostThatWasStoppedForLongerThanItsLeaseHostsNoMore) {
  ASSERT_TRUE(etcd_.start());
  ASSERT_TRUE(cluster_.start());
  const std::optional<uint32_t> first = host({0, 1, 2});
  ASSERT_TRUE(first.has_value());
  const std::vector<uint32_t> left = others_than(*first);
  // Waits at the host that is going to be stopped, and moves to the next.
  const ClientSession one(cluster_.node(left[0]).attach_socket(), "host:0");
  const ClientSession other(cluster_.node(left[1]).attach_socket(), "host:0");
  PendingJoin waiting(one, small_group("moves", 0, 2));
  cluster_.node(*first).pause();
  const uint64_t begin = monotonic_ns();
  const std::optional<uint32_t> second = host(left, first);
  ASSERT_TRUE(second.has_value());
  std::printf("SIGSTOP of the host to the next that all know: %.0f ms\n", elapsed_ms(begin));
  PendingJoin completes(other, small_group("moves", 1, 2));
  EXPECT_TRUE(waiting.outcome().ok()) << describe(waiting.outcome());
  EXPECT_TRUE(completes.outcome().ok()) << describe(completes.outcome());

  cluster_.node(*first).resume();
  EXPECT_EQ(fabric(*first)["rendezvous_hosting"], false) << "from its first moment on";
  EXPECT_TRUE(
      wait_until([&] { return fabric(*first)["rendezvous_node"] == DaemonCluster::name(*second); }, seconds(20)));
  EXPECT_NE(cluster_.node(*first).log().find("hosts the rendezvous no more"), std::string::npos);
  RankGroup formed(seats({0, 1, 2}, 1), "new");
  expect_rounds(&formed);
  EXPECT_EQ(host({0, 1, 2}), second);
}

}  // namespace
}  // namespace expertd::support
