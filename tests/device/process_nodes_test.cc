// SPDX-License-Identifier: Apache-2.0
// Label gpu. Two daemons with a GPU each, or with the same one, as two nodes: their ranks exchange through pinned
// memory and the fabric. Every result is that of the reference, and a peer that dies or stays away ends an operation.
#include "tests/device/process_fixture.h"
#include "tests/support/daemon_cluster.h"

namespace expertd::device_test {
namespace {

constexpr seconds kDaemonStart(60);

class ProcessNodes : public ProcessTest {
 protected:
  ProcessNodes() : ProcessTest(1, seconds(180)) {}

  void SetUp() override {
    ProcessTest::SetUp();
    if (IsSkipped()) {
      return;
    }
    const bool host = machine().host;
    cluster_ = std::make_unique<support::DaemonCluster>(2, host ? 2 : 0);
    cluster_->set_start_limit(kDaemonStart);
    for (uint32_t node = 0; node < 2 && !host; ++node) {
      cluster_->add_flags(node, {"--device-gpus=" + std::to_string(gpu_of(node))});
    }
    ASSERT_TRUE(cluster_->start());
    first_ = make_client();
    second_ = make_client();
    ASSERT_TRUE(attach_to(*first_, 0));
    ASSERT_TRUE(attach_to(*second_, 1));
  }

  static uint32_t gpu_of(uint32_t node) { return machine().uuids.size() > 1 ? node : 0; }
  bool attach_to(FaultClient& client, uint32_t node) {
    const std::string to =
        "attach " + cluster_->node(node).attach_socket() + " " + device(gpu_of(node)) + " rank" + std::to_string(node);
    return is_ok(expect_ok(client, to)) && is_ok(expect_ok(client, "memory malloc"));
  }
  std::vector<FaultClient*> both() { return {first_.get(), second_.get()}; }

  std::unique_ptr<support::DaemonCluster> cluster_;
  std::unique_ptr<FaultClient> first_;
  std::unique_ptr<FaultClient> second_;
};

TEST_F(ProcessNodes, RandomLowLatencyEqualsTheReference) {
  if (machine().host) {
    GTEST_SKIP() << "these cases have memory of GPUs";
  }
  for (int seed = 1; seed < 60; seed += 20) {
    ASSERT_TRUE(all_ok(both(), "exchange " + std::to_string(seed) + " 20 # nodes", seconds(60)))
        << "seeds " << seed << " to " << seed + 19;
  }
}

TEST_F(ProcessNodes, RandomHighThroughputEqualsTheReference) {
  if (machine().host) {
    GTEST_SKIP() << "these cases have memory of GPUs";
  }
  for (int seed = 1; seed < 60; seed += 20) {
    ASSERT_TRUE(all_ok(both(), "exchange-ht " + std::to_string(seed) + " 20 # nodes", seconds(60)))
        << "seeds " << seed << " to " << seed + 19;
  }
}

TEST_F(ProcessNodes, RoundsInFlightTogether) {
  ASSERT_TRUE(all_ok(both(), "join rounds # 2 ll"));
  EXPECT_TRUE(all_ok(both(), "rounds 50 1", seconds(60)));
  EXPECT_TRUE(all_ok(both(), "rounds 50 8", seconds(60)));
  EXPECT_TRUE(all_ok(both(), "leave"));
  ASSERT_TRUE(all_ok(both(), "join rounds # 2 normal"));
  EXPECT_TRUE(all_ok(both(), "rounds 50 4", seconds(60)));
}

// A client's graph rings, and the loops run what crosses nodes; each replay is checked.
TEST_F(ProcessNodes, CapturedOperationsReplay) {
  if (machine().host) {
    GTEST_SKIP() << "host devices capture nothing";
  }
  ASSERT_TRUE(all_ok(both(), "join captured # 2 captured"));
  ASSERT_TRUE(all_ok(both(), "capture", seconds(60)));
  for (int seed = 1; seed <= 3; ++seed) {
    EXPECT_TRUE(all_ok(both(), "replay " + std::to_string(seed) + " 40", seconds(60))) << "seed " << seed;
  }
  EXPECT_TRUE(all_ok(both(), "replay 9 5 200000", seconds(60)));  // with pauses
  first_->send("replay-time");
  second_->send("replay-time");
  const std::string time = first_->answer(seconds(60)).value_or("no answer");
  EXPECT_TRUE(is_ok(time)) << time;
  EXPECT_TRUE(is_ok(second_->answer(seconds(60)).value_or("no answer")));
  figure("captured over nodes", {{"pair_us", {number_in(time, "pair_us")}}});
  EXPECT_TRUE(all_ok(both(), "rounds 10 2", seconds(60)));
  EXPECT_TRUE(all_ok(both(), "leave"));
}

TEST_F(ProcessNodes, APeerThatIsKilledEndsReplays) {
  if (machine().host) {
    GTEST_SKIP() << "host devices capture nothing";
  }
  ASSERT_TRUE(all_ok(both(), "join killed # 2 captured"));
  ASSERT_TRUE(all_ok(both(), "capture", seconds(60)));
  ASSERT_TRUE(all_ok(both(), "replay 1 5", seconds(60)));
  second_->signal_kill();
  // The stream goes on, and the daemon says why.
  EXPECT_TRUE(is_ok(expect_ok(*first_, "replay-alone")));
  EXPECT_NE(cluster_->node(0).log().find("captured operations of the group end"), std::string::npos)
      << cluster_->node(0).log();
}

TEST_F(ProcessNodes, APeerThatIsKilledEndsTheOperation) {
  ASSERT_TRUE(all_ok(both(), "join killed # 2 ll"));
  EXPECT_TRUE(all_ok(both(), "loop 4", seconds(60)));
  second_->signal_kill();
  const std::string answer = first_->answer(seconds(30)).value_or("no answer");
  EXPECT_NE(answer.find("PEER_LOST"), std::string::npos) << answer;
}

// What the nodes find out about each other ends the operation on both: no end of a chain takes it for a good one.
TEST_F(ProcessNodes, OperationsThatDifferEndOnBothNodes) {
  ASSERT_TRUE(all_ok(both(), "join differ # 2 normal 1000"));
  for (int i = 0; i < 10; ++i) {
    second_->send("rounds 1 1");  // two operations
    for (int op = 0; op < 2; ++op) {
      const std::string answer = first_->ask("barrier", seconds(20));
      // The combine of a dispatch that failed is refused before it is compared.
      EXPECT_NE(answer.find(op == 0 ? "failed OP_MISMATCH" : "failed "), std::string::npos) << answer;
    }
    const std::string answer = second_->answer(seconds(20)).value_or("no answer");
    EXPECT_NE(answer.find("failed OP_MISMATCH"), std::string::npos) << answer;
  }
  EXPECT_TRUE(all_ok(both(), "rounds 10 2", seconds(20)));
}

TEST_F(ProcessNodes, ADaemonThatIsKilledEndsTheOperation) {
  ASSERT_TRUE(all_ok(both(), "join daemon # 2 ll"));
  EXPECT_TRUE(all_ok(both(), "loop 4", seconds(60)));
  cluster_->node(1).kill();
  const std::string answer = first_->answer(seconds(30)).value_or("no answer");
  EXPECT_NE(answer.find("PEER_LOST"), std::string::npos) << answer;
}

TEST_F(ProcessNodes, APeerThatStaysAwayEndsItAtItsDeadline) {
  ASSERT_TRUE(all_ok(both(), "join away # 2 ll 500"));
  EXPECT_TRUE(all_ok(both(), "rounds 5 2", seconds(60)));
  const std::string answer = first_->ask("rounds 1 1", seconds(30));
  EXPECT_NE(answer.find("failed TIMEOUT"), std::string::npos) << answer;
  EXPECT_NE(answer.find("rank=1"), std::string::npos) << answer;
}

}  // namespace
}  // namespace expertd::device_test
