// SPDX-License-Identifier: Apache-2.0
// Daemons of several nodes that cannot have their address, or whose way to the rendezvous is wrong or long: exit codes
// and what they say, and joins that work in spite of it.
#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <cstdio>
#include <string>
#include <vector>

#include "daemon/base/fd.h"
#include "tests/support/daemon_cluster.h"
#include "tests/support/relay.h"

namespace expertd::support {
namespace {

using std::chrono::seconds;

constexpr int kExitUnavailable = 69;
constexpr int kExitConfig = 78;

/// A daemon with this peer address that is expected to end by itself.
RunResult refused_start(const std::string& listen) {
  const TempDir directory;
  return run_daemon({"--runtime-directory=" + directory.path(), "--metrics-port=0", "--device-gpus=none",
                     "--device-hosts=1", "--fabric-enabled=true", "--fabric-listen=" + listen,
                     "--fabric-rendezvous=127.0.0.1:1", "--fabric-transports=tcp", "--fabric-devices=lo"},
                    seconds(20));
}

void expect_words(const RunResult& result, const std::vector<std::string>& words) {
  for (const std::string& word : words) {
    EXPECT_NE(result.error.find(word), std::string::npos) << word << " is not in: " << result.error;
  }
}

TEST(NodeStart, ThePeerPortInUseIsNamed) {
  const base::ScopedFd taken(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  ASSERT_EQ(::bind(taken.get(), reinterpret_cast<const sockaddr*>(&address), size), 0);
  ASSERT_EQ(::listen(taken.get(), 1), 0);
  ASSERT_EQ(::getsockname(taken.get(), reinterpret_cast<sockaddr*>(&address), &size), 0);
  const std::string listen = "127.0.0.1:" + std::to_string(ntohs(address.sin_port));
  const RunResult result = refused_start(listen);
  EXPECT_EQ(result.exit_code, kExitUnavailable) << result.error;
  expect_words(result, {"ADDRESS_IN_USE", listen});
}

TEST(NodeStart, APeerAddressOfAnotherMachineIsNamed) {
  const RunResult result = refused_start("192.0.2.1:0");
  EXPECT_EQ(result.exit_code, kExitConfig) << result.error;
  expect_words(result, {"CONFIG_BAD_VALUE", "192.0.2.1"});
}

/// Its own devices serve all the same; a join says why it ends.
TEST(NodeStart, ARendezvousThatDoesNotResolveIsNamedByJoins) {
  DaemonCluster cluster(1);
  cluster.set_rendezvous(0, "no-such-host.invalid:9465");
  ASSERT_TRUE(cluster.start());
  Outcome joined;
  EXPECT_TRUE(wait_until(
      [&] {  // a name server may take its time
        RankGroup group(cluster.seats(1), "alone",
                        [](expertd_group_options_t* options) { options->join_timeout_ns = 300'000'000; });
        joined = group.rank(0).joined;
        return joined.message.find("does not resolve") != std::string::npos;
      },
      seconds(60)))
      << describe(joined);
  EXPECT_EQ(joined.status.reason, EXPERTD_REASON_RENDEZVOUS_UNAVAILABLE) << describe(joined);
  EXPECT_NE(joined.message.find("no-such-host.invalid"), std::string::npos) << describe(joined);
}

TEST(NodeStart, JoinsAndOperationsWorkWithALongWayToTheRendezvous) {
  Relay relay;
  DaemonCluster cluster(2);
  cluster.set_rendezvous(1, relay.address());
  ASSERT_TRUE(cluster.start());
  relay.set_rule(Way::kToDaemon, {.delay_ms = 50});
  relay.set_rule(Way::kToCaller, {.delay_ms = 50});
  relay.set_target(cluster.address(0));
  for (int time = 0; time < 3; ++time) {
    const uint64_t begin = monotonic_ns();
    RankGroup group(cluster.seats(2), "long way");
    ASSERT_TRUE(group.ok()) << group.failure();
    const double joined_ms = elapsed_ms(begin);
    group.run([](Rank& rank) {
      for (int round = 0; round < 20; ++round) {
        const OpEnd end = barrier(rank.group);
        ASSERT_TRUE(end.outcome.ok()) << describe(end.outcome);
      }
    });
    std::printf("50 ms each way to the rendezvous: attached and joined in %.0f ms, 20 barriers later %.0f ms\n",
                joined_ms, elapsed_ms(begin));
    EXPECT_GE(joined_ms, 100);
    EXPECT_LT(joined_ms, worst_bound_ms(2000));
    // The fabric does not go that way.
    EXPECT_LT(elapsed_ms(begin) - joined_ms, worst_bound_ms(500));
  }
}

}  // namespace
}  // namespace expertd::support
