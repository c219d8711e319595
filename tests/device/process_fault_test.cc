// SPDX-License-Identifier: Apache-2.0
// Label gpu. An access of a client to memory that nobody has. Without MPS it must not reach anybody else. Under MPS it
// reaches everybody, the daemon too, which then ends so that it is restarted; that case is for a run of its own,
// because the MPS server is not the same afterwards.
//
// EXPERTD_TEST_MPS_RESTART=1: the MPS of $CUDA_MPS_PIPE_DIRECTORY may be ended and started anew, and nobody else uses
// it. Without it the case ends with the daemon.
#include <cstdlib>

#include "tests/device/process_fixture.h"

namespace expertd::device_test {
namespace {

class ProcessFault : public ProcessTest {
 protected:
  explicit ProcessFault(seconds limit = seconds(90)) : ProcessTest(2, limit) {}

  using Pair = std::unique_ptr<FaultClient>[2];
  static std::vector<FaultClient*> both(const Pair& pair) { return {pair[0].get(), pair[1].get()}; }

  bool start(Pair& pair, const std::string& name) {
    bool good = true;
    for (uint32_t i = 0; i < 2 && good; ++i) {
      pair[i] = make_client();
      good = attach(*pair[i], i, name + "-" + std::to_string(i));
    }
    return good && all_ok(both(pair), "join " + name + " # 2 normal");
  }
  /// A neighbour pair in a loop, and a group of a survivor and the culprit.
  bool prepare() {
    return start_daemon() && start(neighbours_, "neighbours") && all_ok(both(neighbours_), "loop 4") &&
           start(pair_, "pair") && all_ok(both(pair_), "rounds 5 4");
  }

  Pair neighbours_;
  Pair pair_;  // the second one is the culprit
};

TEST_F(ProcessFault, AnIllegalAccessOfAClientReachesNobodyElse) {
  if (machine().host) {
    GTEST_SKIP() << "host devices have no kernels of clients";
  }
  if (machine().mps_promised) {
    GTEST_SKIP() << "under MPS it reaches everybody: ProcessFaultUnderMps";
  }
  ASSERT_TRUE(prepare());
  pair_[0]->send("barrier 20000");
  const std::string error = expect_ok(*pair_[1], "illegal");
  EXPECT_EQ(text_in(error, "error"), "cudaErrorIllegalAddress") << error;
  pair_[1]->signal_kill();
  const std::string lost = pair_[0]->answer(seconds(25)).value_or("no answer");
  EXPECT_EQ(lost.rfind("failed PEER_LOST rank=1 ", 0), 0u) << lost;
  std::printf("the culprit's peer: %s\n", lost.c_str());
  // The neighbours have to do batches after the fault, and not only before it.
  EXPECT_TRUE(is_ok(expect_ok(*pair_[0], "leave")));
  expect_ok(*pair_[0], "join alone 0 1 normal");
  expect_ok(*pair_[0], "rounds 100 4");
  EXPECT_TRUE(daemon_->running());
  EXPECT_EQ(daemon_->metric("expertd_gpu_context_lost_total"), 0);
  Series series;
  for (const std::string& end : stop_loops(*neighbours_[0], *neighbours_[1], "rounds 1 4")) {
    EXPECT_TRUE(is_ok(end) && number_in(end, "batches") > 0) << "a neighbour: " << end;
    series.push_back({text_in(end, "batches") + " verified batches of a neighbour, us p50/max",
                      {number_in(end, "p50_us"), number_in(end, "p50_us"), number_in(end, "max_us")}});
  }
  figure("illegal access without MPS, nobody else notices", series);
}

class ProcessFaultUnderMps : public ProcessFault {
 protected:
  ProcessFaultUnderMps() : ProcessFault(seconds(150)) {}

  void fault();
  void expect_lost(FaultClient& client, const char* who);
  bool restart_mps();
  void reattach_lost_processes();
  void come_back();

  Pair parked_;  // the second one's doorbell never rings
  Pair fresh_;   // processes of after the fault
};

// One that was not issued yet may find the context of its own process lost first.
void ProcessFaultUnderMps::expect_lost(FaultClient& client, const char* who) {
  const std::string end = client.answer(seconds(10)).value_or("no answer");
  const bool named = end.rfind("failed GPU_LOST ", 0) == 0 || end.rfind("failed CUDA ", 0) == 0;
  EXPECT_TRUE(named) << who << ": " << end;
  std::printf("%s: %s\n", who, end.c_str());
}

void ProcessFaultUnderMps::fault() {
  constexpr int kExitTryAgain = 75;
  constexpr double kEndMs = 1'000;
  ASSERT_TRUE(start(parked_, "parked"));
  ASSERT_TRUE(is_ok(expect_ok(*parked_[1], "hold")) && is_ok(expect_ok(*parked_[1], "submit 600000")) &&
              is_ok(expect_ok(*parked_[0], "submit 600000")));
  for (const auto& client : parked_) {
    client->send("wait 60000");
  }
  const uint64_t begin = support::monotonic_ns();
  const std::string error = pair_[1]->ask("illegal", seconds(10));
  const double seen_ms = support::elapsed_ms(begin);
  std::printf("the culprit: %s\n", error.c_str());
  // A call in flight ends with the loss, on either GPU: the loop of one of them may be stuck in the driver.
  for (size_t gpu = 0; gpu < 2; ++gpu) {
    const std::string end = parked_[gpu]->answer(seconds(20)).value_or("no answer");
    std::printf("figure a call in flight on GPU %zu when it was lost, %.0f ms after the access: %s\n", gpu,
                support::elapsed_ms(begin), end.c_str());
    EXPECT_EQ(end.rfind("failed GPU_LOST ", 0), 0u) << "GPU " << gpu << ": " << end;
  }
  const double told_ms = support::elapsed_ms(begin);
  const int code = daemon_->wait_exit(seconds(30));
  const double gone_ms = support::elapsed_ms(begin);
  EXPECT_EQ(code, kExitTryAgain);
  const std::string log = daemon_->log();
  const size_t line = log.find("GPU context lost; the process ends for a restart");
  ASSERT_NE(line, std::string::npos) << log;
  // The daemon's own share. How long the driver then holds a process with contexts is not the daemon's to say.
  const double own_ms = number_in(log.substr(line), "since_seen_ms");
  figure("illegal access under MPS, ms", {{"to the culprit's error", {seen_ms}},
                                          {"to the end of both calls in flight", {told_ms}},
                                          {"seen by the daemon to its own end", {own_ms}},
                                          {"to the process gone", {gone_ms}}});
  EXPECT_GE(own_ms, 0);
  EXPECT_LT(own_ms, support::bound_ms(kEndMs));
  for (const auto& neighbour : neighbours_) {
    expect_lost(*neighbour, "a neighbour");
  }
}

/// Ends the server, which takes no new process while one of those with lost contexts is there, and starts another.
bool ProcessFaultUnderMps::restart_mps() {
  const char* const allowed = std::getenv("EXPERTD_TEST_MPS_RESTART");
  if (allowed == nullptr || std::string(allowed) != "1") {
    return false;
  }
  const uint64_t begin = support::monotonic_ns();
  const auto shell = [](const std::string& command) {
    const support::RunResult result = support::run_program({"/bin/sh", "-c", command}, seconds(30));
    EXPECT_EQ(result.exit_code, 0) << command << ": " << result.output << result.error;
    return result.exit_code == 0;
  };
  // The control daemon is gone some time after it took the word; another one finds the lock of the first until then.
  const std::string gone =
      "for try in $(seq 200); do echo get_server_list | nvidia-cuda-mps-control >/dev/null 2>&1 || "
      "exit 0; sleep 0.05; done; exit 1";
  const bool good =
      shell("echo 'quit -t 1' | nvidia-cuda-mps-control") && shell(gone) && shell("nvidia-cuda-mps-control -d");
  figure("MPS torn down and started anew, ms", {{"both", {support::elapsed_ms(begin)}}});
  return good;
}

// What CUDA lets a process do whose context was lost is a fact of the driver, and no promise of ours.
void ProcessFaultUnderMps::reattach_lost_processes() {
  for (const auto& neighbour : neighbours_) {
    const std::string end = neighbour->ask("reattach 5000", seconds(8));
    std::printf("fact a process that lost its own context re-attaches: %s\n", end.empty() ? "no answer" : end.c_str());
  }
}

void ProcessFaultUnderMps::come_back() {
  constexpr double kBackMs = 5'000;
  const uint64_t begin = support::monotonic_ns();
  for (uint32_t i = 0; i < 2; ++i) {
    fresh_[i] = make_client();
    fresh_[i]->send("cuda " + std::to_string(i));
  }
  ASSERT_TRUE(daemon_->start());
  const double ready_ms = support::elapsed_ms(begin);
  bool good = true;
  for (uint32_t i = 0; i < 2; ++i) {
    good = is_ok(fresh_[i]->answer(seconds(30)).value_or("")) && good;
    good = good && attach(*fresh_[i], i, "neighbours-" + std::to_string(i));
  }
  good = good && all_ok(both(fresh_), "join neighbours # 2 normal") && all_ok(both(fresh_), "rounds 5 4");
  const double back_ms = support::elapsed_ms(begin);
  EXPECT_TRUE(good);
  figure("restart after a lost GPU, ms",
         {{"daemon ready", {ready_ms}}, {"verified operations of new processes", {back_ms}}});
  EXPECT_LT(back_ms, support::bound_ms(kBackMs));
}

TEST_F(ProcessFaultUnderMps, EndsTheDaemonForARestart) {
  if (machine().host || !machine().mps_promised) {
    GTEST_SKIP() << "without MPS it reaches nobody: ProcessFault";
  }
  ASSERT_TRUE(prepare());
  fault();
  if (HasFatalFailure()) {
    return;
  }
  for (const Pair* pair : {&pair_, &parked_}) {
    for (const auto& client : *pair) {
      client->kill();
    }
  }
  if (!restart_mps()) {
    std::printf("the MPS is not ours to restart: what comes back afterwards is not tried\n");
    return;
  }
  come_back();
  reattach_lost_processes();
}

}  // namespace
}  // namespace expertd::device_test
