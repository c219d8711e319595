// SPDX-License-Identifier: Apache-2.0
// Label gpu. Operations by copy engines, in processes of their own: every result is that of the reference,
// and a peer that dies or stays away ends an operation as it does by kernels.
#include <signal.h>

#include <thread>

#include "tests/device/process_fixture.h"

namespace expertd::device_test {
namespace {

class ProcessCopy : public ProcessTest {
 protected:
  ProcessCopy() : ProcessTest(2, seconds(180)) {}

  void SetUp() override {
    ProcessTest::SetUp();
    if (!IsSkipped() && machine().host) {
      GTEST_SKIP() << "host devices have no copy engines";
    }
    if (!IsSkipped()) {
      ASSERT_TRUE(start_daemon());
      first_ = make_client();
      second_ = make_client();
      ASSERT_TRUE(attach(*first_, 0, "first"));
      ASSERT_TRUE(attach(*second_, 1, "second"));
    }
  }
  bool join(const std::string& mode, const std::string& ms = "") {
    return all_ok({first_.get(), second_.get()}, "join copies # 2 " + mode + " " + ms);
  }

  /// The first one issues a round whose kernels wait for the second one.
  void begin_alone() {
    first_->send("rounds 1 1");
    std::this_thread::sleep_for(milliseconds(200));
  }
  /// Nothing on its stream waits any more.
  void expect_released(FaultClient& client) {
    ASSERT_EQ(client.ask("block", seconds(10)), "ok blocking");
    const std::string end = client.answer(seconds(10)).value_or("no answer");
    EXPECT_NE(end.find("error=cudaSuccess"), std::string::npos) << end;
  }

  std::unique_ptr<FaultClient> first_;
  std::unique_ptr<FaultClient> second_;
};

TEST_F(ProcessCopy, RandomCasesEqualTheReference) {
  for (int seed = 1; seed < 120; seed += 20) {
    ASSERT_TRUE(all_ok({first_.get(), second_.get()}, "exchange " + std::to_string(seed) + " 20 #", seconds(60)))
        << "seeds " << seed << " to " << seed + 19;
  }
}

TEST_F(ProcessCopy, RoundsInFlightTogether) {
  ASSERT_TRUE(join("copy"));
  EXPECT_TRUE(all_ok({first_.get(), second_.get()}, "rounds 50 1", seconds(60)));
  EXPECT_TRUE(all_ok({first_.get(), second_.get()}, "rounds 100 8", seconds(60)));
}

TEST_F(ProcessCopy, ByKernelsWhereThatIsAskedFor) {
  ASSERT_TRUE(join("sm"));
  EXPECT_TRUE(all_ok({first_.get(), second_.get()}, "rounds 20 4", seconds(60)));
}

// What is asked for by nobody is what the rule says: without MPS all of it by copy engines, under MPS what is split.
// Every second round is, so operations of both kinds follow each other, and use staging and exchange window in turn.
TEST_F(ProcessCopy, EachOperationHasTheExecutorOfTheRule) {
  const nlohmann::json before = ask_daemon("status");
  for (const nlohmann::json& device : before["devices"]) {
    if (device.value("kernels", std::string()) != "bulk") {
      GTEST_SKIP() << "GPUs without the bulk-copy kernels have one executor only where it is asked for";
    }
  }
  ASSERT_TRUE(join(machine().mps ? "mixed-sm" : "mixed-copy"));
  const nlohmann::json status = ask_daemon("status");
  ASSERT_EQ(status["groups"].size(), 1U) << status;
  EXPECT_EQ(status["groups"][0]["executor"], machine().mps ? "ll sm, split copy_engine" : "ll copy_engine") << status;
  EXPECT_TRUE(all_ok({first_.get(), second_.get()}, "rounds 50 1", seconds(60)));
  EXPECT_TRUE(all_ok({first_.get(), second_.get()}, "rounds 50 2", seconds(60)));
  EXPECT_TRUE(all_ok({first_.get(), second_.get()}, "rounds 50 7", seconds(60)));
}

TEST_F(ProcessCopy, APeerThatIsKilledEndsTheOperation) {
  ASSERT_TRUE(join("copy"));
  EXPECT_TRUE(all_ok({first_.get(), second_.get()}, "loop 4", seconds(60)));
  second_->signal_kill();
  const std::string answer = first_->ask("state", seconds(30));  // the line ends the loop, whose end comes first
  EXPECT_NE(answer.find("PEER_LOST"), std::string::npos) << answer;
}

TEST_F(ProcessCopy, APeerThatStaysAwayEndsItAtItsDeadline) {
  ASSERT_TRUE(join("copy", "500"));
  EXPECT_TRUE(all_ok({first_.get(), second_.get()}, "rounds 5 2", seconds(60)));
  const std::string answer = first_->ask("rounds 1 1", seconds(30));
  EXPECT_NE(answer.find("failed TIMEOUT"), std::string::npos) << answer;
  EXPECT_NE(answer.find("rank=1"), std::string::npos) << answer;
  expect_released(*first_);
}

TEST_F(ProcessCopy, APeerThatIsLateIsWaitedFor) {
  ASSERT_TRUE(join("copy"));
  for (int i = 0; i < 3; ++i) {
    begin_alone();
    EXPECT_TRUE(is_ok(second_->ask("rounds 1 1", seconds(30))));
    const std::string answer = first_->answer(seconds(30)).value_or("no answer");
    EXPECT_TRUE(is_ok(answer)) << answer;
    EXPECT_TRUE(all_ok({first_.get(), second_.get()}, "rounds 5 4", seconds(60)));
  }
}

TEST_F(ProcessCopy, ADaemonThatIsKilledLetsAKernelThatWaitsGo) {
  ASSERT_TRUE(join("copy"));
  EXPECT_TRUE(all_ok({first_.get(), second_.get()}, "rounds 5 2", seconds(60)));
  begin_alone();
  ::kill(daemon_->pid(), SIGKILL);
  const std::string answer = first_->answer(seconds(30)).value_or("no answer");
  EXPECT_NE(answer.find("UNAVAILABLE"), std::string::npos) << answer;
  expect_released(*first_);
  daemon_->kill();  // waits for its end
}

TEST_F(ProcessCopy, RandomHighThroughputEqualsTheReference) {
  for (int seed = 1; seed < 40; seed += 10) {
    ASSERT_TRUE(all_ok({first_.get(), second_.get()}, "exchange-ht " + std::to_string(seed) + " 10 #", seconds(90)))
        << "seeds " << seed << " to " << seed + 9;
  }
}

TEST_F(ProcessCopy, HighThroughputRoundsInFlightTogether) {
  ASSERT_TRUE(join("copy-normal"));
  EXPECT_TRUE(all_ok({first_.get(), second_.get()}, "rounds 50 1", seconds(60)));
  EXPECT_TRUE(all_ok({first_.get(), second_.get()}, "rounds 100 8", seconds(60)));
}

// Rounds of 128 tokens are too small for copies under MPS, split or not, so that no window is taken for them there.
TEST_F(ProcessCopy, HighThroughputHasTheExecutorOfTheRule) {
  const nlohmann::json before = ask_daemon("status");
  for (const nlohmann::json& device : before["devices"]) {
    if (device.value("kernels", std::string()) != "bulk") {
      GTEST_SKIP() << "GPUs without the bulk-copy kernels have one executor only where it is asked for";
    }
  }
  ASSERT_TRUE(join(machine().mps ? "auto-sm-normal" : "auto-copy-normal"));
  const nlohmann::json status = ask_daemon("status");
  ASSERT_EQ(status["groups"].size(), 1U) << status;
  EXPECT_EQ(status["groups"][0]["executor"], machine().mps ? "ht sm" : "ht copy_engine") << status;
  EXPECT_TRUE(all_ok({first_.get(), second_.get()}, "rounds 50 1", seconds(60)));
  EXPECT_TRUE(all_ok({first_.get(), second_.get()}, "rounds 50 7", seconds(60)));
}

TEST_F(ProcessCopy, AKilledPeerEndsHighThroughput) {
  ASSERT_TRUE(join("copy-normal"));
  EXPECT_TRUE(all_ok({first_.get(), second_.get()}, "loop 4", seconds(60)));
  second_->signal_kill();
  const std::string answer = first_->ask("state", seconds(30));  // the line ends the loop, whose end comes first
  EXPECT_NE(answer.find("PEER_LOST"), std::string::npos) << answer;
}

TEST_F(ProcessCopy, APeerThatStaysAwayEndsHighThroughputAtItsDeadline) {
  ASSERT_TRUE(join("copy-normal", "500"));
  EXPECT_TRUE(all_ok({first_.get(), second_.get()}, "rounds 5 2", seconds(60)));
  const std::string answer = first_->ask("rounds 1 1", seconds(30));
  EXPECT_NE(answer.find("failed TIMEOUT"), std::string::npos) << answer;
  EXPECT_NE(answer.find("rank=1"), std::string::npos) << answer;
}

// The descriptors are there, but what stands in front of them on the peer's stream does not end.
TEST_F(ProcessCopy, CountsThatNeverComeEndHighThroughputAtItsDeadline) {
  ASSERT_TRUE(join("copy-normal", "1000"));
  EXPECT_TRUE(all_ok({first_.get(), second_.get()}, "rounds 5 2", seconds(60)));
  ASSERT_TRUE(all_ok({second_.get()}, "hold"));
  ASSERT_TRUE(all_ok({second_.get()}, "issue"));
  const std::string answer = first_->ask("rounds 1 1", seconds(30));
  EXPECT_NE(answer.find("failed TIMEOUT"), std::string::npos) << answer;
  EXPECT_NE(answer.find("rank=1"), std::string::npos) << answer;
  EXPECT_TRUE(all_ok({second_.get()}, "open"));
  EXPECT_TRUE(all_ok({first_.get(), second_.get()}, "sync", seconds(60)));
  EXPECT_TRUE(all_ok({first_.get(), second_.get()}, "rounds 5 2", seconds(60)));
}

}  // namespace
}  // namespace expertd::device_test
