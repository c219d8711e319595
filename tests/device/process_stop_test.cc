// SPDX-License-Identifier: Apache-2.0
// Label gpu. Clients that stop for a while: their peers' operations end at the deadline and name them, and everybody
// goes on afterwards.
#include "tests/device/process_fixture.h"

namespace expertd::device_test {
namespace {

constexpr double kDeadlineMs = 500;

class ProcessStop : public ProcessTest {
 protected:
  ProcessStop() : ProcessTest(2, seconds(80)) {}

  bool prepare() {
    bool good = start_daemon();
    for (uint32_t i = 0; i < 2 && good; ++i) {
      clients_[i] = make_client();
      good = attach(*clients_[i], i, "stop-" + std::to_string(i));
    }
    // The first operations are without the short deadline: they may set things up.
    return good && all_ok(both(), "join warm # 2 normal") && all_ok(both(), "rounds 5 4") && all_ok(both(), "leave") &&
           all_ok(both(), "join stopped # 2 normal " + std::to_string(static_cast<int>(kDeadlineMs)));
  }
  std::vector<FaultClient*> both() { return {clients_[0].get(), clients_[1].get()}; }

  /// The peer's end in time, naming rank 1.
  void expect_timeout(const std::string& end, double ms, const char* what) {
    EXPECT_EQ(end.rfind("failed TIMEOUT rank=1 ", 0), 0u) << end;
    figure(std::string(what) + " to TIMEOUT at the peer, deadline 500 ms", {{"ms", {ms}}});
    EXPECT_GE(ms, kDeadlineMs - 50);
    EXPECT_LT(ms, support::bound_ms(kDeadlineMs + 150));
    std::printf("%s: %s\n", what, end.c_str());
    EXPECT_EQ(gauges(*daemon_).sessions, 2) << "a client that is late is not lost";
  }
  void expect_working() {
    EXPECT_TRUE(all_ok(both(), "sync"));
    EXPECT_TRUE(all_ok(both(), "rounds 20 4"));
  }

  std::unique_ptr<FaultClient> clients_[2];
};

TEST_F(ProcessStop, InTheMiddleOfOperationsEndsThePeerAtItsDeadline) {
  ASSERT_TRUE(prepare());
  ASSERT_TRUE(all_ok(both(), "loop"));
  clients_[1]->pause();
  const uint64_t begin = support::monotonic_ns();
  const std::string end = clients_[0]->answer(seconds(10)).value_or("no answer");
  expect_timeout(end, support::elapsed_ms(begin), "SIGSTOP in a loop");
  clients_[1]->resume();
  const std::string own = clients_[1]->answer(seconds(10)).value_or("no answer");
  EXPECT_EQ(own.rfind("failed TIMEOUT", 0), 0u) << own;
  expect_working();
}

TEST_F(ProcessStop, BesideItsParkedOperationEndsThePeerAtItsDeadline) {
  if (machine().host) {
    GTEST_SKIP() << "host devices have no streams to hold back";
  }
  ASSERT_TRUE(prepare());
  // The operation is known to the daemon and launched on both GPUs, but its doorbell lies behind work that waits for a
  // thread which is stopped.
  ASSERT_TRUE(is_ok(expect_ok(*clients_[1], "hold")));
  ASSERT_TRUE(is_ok(expect_ok(*clients_[1], "submit 500")));
  clients_[1]->pause();
  const uint64_t begin = support::monotonic_ns();
  const std::string end = clients_[0]->ask("barrier 500", seconds(10));
  expect_timeout(end, support::elapsed_ms(begin), "SIGSTOP beside a parked operation");
  clients_[1]->resume();
  const std::string own = clients_[1]->ask("wait 5000", seconds(10));
  EXPECT_EQ(own.rfind("failed TIMEOUT", 0), 0u) << own;
  EXPECT_TRUE(is_ok(expect_ok(*clients_[1], "open")));
  expect_working();
}

}  // namespace
}  // namespace expertd::device_test
