// SPDX-License-Identifier: Apache-2.0
// Label gpu. Low latency operations in CUDA graphs of real processes: replayed thousands of times in random order with
// changing inputs and token counts and eager operations between them, while the hosts sleep, and with a peer that dies.
#include "tests/device/process_fixture.h"

namespace expertd::device_test {
namespace {

class ProcessCapture : public ProcessTest {
 protected:
  ProcessCapture() : ProcessTest(2, seconds(120)) {}

  void SetUp() override {
    ProcessTest::SetUp();
    if (!IsSkipped() && machine().host) {
      GTEST_SKIP() << "host devices have no graphs";
    }
  }
  /// Two ranks with their graphs captured.
  bool open(const std::string& name, uint64_t op_ms = 20'000) {
    if (!start_daemon()) {
      return false;
    }
    for (uint32_t r = 0; r < 2; ++r) {
      clients_.push_back(make_client());
      both_.push_back(clients_.back().get());
      if (!attach(*clients_.back(), r, name + std::to_string(r))) {
        return false;
      }
    }
    return all_ok(both_, "join " + name + " # 2 captured " + std::to_string(op_ms)) && all_ok(both_, "capture");
  }

  std::vector<std::unique_ptr<FaultClient>> clients_;
  std::vector<FaultClient*> both_;
};

TEST_F(ProcessCapture, ReplaysInRandomOrderAreRight) {
  ASSERT_TRUE(open("graphs"));
  EXPECT_TRUE(all_ok(both_, "replay 1 2000", seconds(60)));
  EXPECT_TRUE(all_ok(both_, "replay 2 200 300", seconds(60)));
  EXPECT_TRUE(all_ok(both_, "rounds 20 4", seconds(30)));
  EXPECT_TRUE(all_ok(both_, "replay 3 500", seconds(60)));
  ASSERT_TRUE(all_ok(both_, "barrier"));
  clients_[0]->send("replay-time");
  clients_[1]->send("replay-time");
  const std::string first = clients_[0]->answer(seconds(30)).value_or("");
  const std::string second = clients_[1]->answer(seconds(30)).value_or("");
  ASSERT_TRUE(is_ok(first) && is_ok(second)) << first << "; " << second;
  figure("pair of 128 tokens x 1024 in a graph, back to back, us",
         {{"rank 0", {number_in(first, "pair_us")}}, {"rank 1", {number_in(second, "pair_us")}}});
  EXPECT_TRUE(all_ok(both_, "leave"));
  EXPECT_TRUE(all_ok(both_, "join again # 2 captured 20000"));
}

TEST_F(ProcessCapture, APeerThatDiesReleasesTheGraph) {
  ASSERT_TRUE(open("dies"));
  EXPECT_TRUE(all_ok(both_, "replay 4 50"));
  clients_[0]->send("replay-alone");
  clients_[1]->signal_kill();
  const std::string answer = clients_[0]->answer(seconds(20)).value_or("");
  EXPECT_TRUE(is_ok(answer)) << "the stream went on: " << answer;
  expect_ok(*clients_[0], "replay-alone");
  expect_ok(*clients_[0], "leave");
}

TEST_F(ProcessCapture, AClientThatDiesTakesItsArmsWithIt) {
  ASSERT_TRUE(start_daemon());
  const Ledger before = ledger();
  for (int i = 0; i < 5; ++i) {
    std::vector<std::unique_ptr<FaultClient>> clients;
    std::vector<FaultClient*> both;
    for (uint32_t r = 0; r < 2; ++r) {
      clients.push_back(make_client());
      both.push_back(clients.back().get());
      ASSERT_TRUE(attach(*clients.back(), r, "dying" + std::to_string(r)));
    }
    ASSERT_TRUE(all_ok(both, "join dying" + std::to_string(i) + " # 2 captured"));
    ASSERT_TRUE(all_ok(both, "capture"));
    ASSERT_TRUE(all_ok(both, "replay 5 20"));
    for (const auto& client : clients) {
      client->signal_kill();
    }
    EXPECT_TRUE(support::wait_until([&] { return ledger().holds_as_much_as(before); }, seconds(10)))
        << ledger().text() << " instead of " << before.text();
  }
}

}  // namespace
}  // namespace expertd::device_test
