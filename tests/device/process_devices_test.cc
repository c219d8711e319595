// SPDX-License-Identifier: Apache-2.0
// Label gpu. Which GPU a session is on: its UUID decides, whatever number the process gives it. What is idle on a GPU,
// and whether MPS is as the runner said. That slices of a GPU (MIG) are refused by name cannot be shown on whole GPUs;
// tests/unit/device_gpu_selection_test.cc asks the decision itself.
#include <algorithm>
#include <cmath>

#include "tests/device/process_fixture.h"

namespace expertd::device_test {
namespace {

class ProcessDevices : public ProcessTest {
 protected:
  ProcessDevices() : ProcessTest(2, seconds(90)) {}

  struct Place {
    const char* visible;   // CUDA_VISIBLE_DEVICES of the process
    uint32_t own_number;   // what the process calls its GPU
    uint32_t machine_gpu;  // which one that is
  };

  /// A rank per place, verified rounds, and the daemon's word on where the sessions are.
  void run(const std::string& name, const std::vector<Place>& places) {
    SCOPED_TRACE(name);
    std::vector<std::unique_ptr<FaultClient>> owned;
    std::vector<FaultClient*> clients;
    for (size_t i = 0; i < places.size(); ++i) {
      owned.push_back(make_client({std::string("CUDA_VISIBLE_DEVICES=") + places[i].visible}));
      clients.push_back(owned.back().get());
      const std::string session = name + "-" + std::to_string(i);
      const std::string answer = expect_ok(
          *clients[i], "attach " + daemon_->attach_socket() + " " + device(number_for(places[i])) + " " + session);
      EXPECT_EQ(text_in(answer, "uuid"), machine().uuids[places[i].machine_gpu]);
    }
    expect_sessions(name, places);
    const bool good = all_ok(clients, "memory malloc") &&
                      all_ok(clients, "join " + name + " # " + std::to_string(places.size()) + " normal") &&
                      all_ok(clients, "rounds 10 4");
    std::printf("%s: %s\n", name.c_str(), good ? "verified" : "FAILED");
  }
  /// Host devices have one name everywhere.
  static uint32_t number_for(const Place& place) { return machine().host ? place.machine_gpu : place.own_number; }

  void expect_sessions(const std::string& name, const std::vector<Place>& places) {
    const nlohmann::json sessions = ask_daemon("sessions");
    ASSERT_TRUE(sessions.is_object());
    for (size_t i = 0; i < places.size(); ++i) {
      const std::string wanted = name + "-" + std::to_string(i);
      const auto& list = sessions["sessions"];
      const auto found = std::find_if(list.begin(), list.end(), [&](const auto& it) { return it["name"] == wanted; });
      ASSERT_NE(found, list.end()) << wanted << " in " << sessions;
      EXPECT_EQ((*found)["device"], machine().uuids[places[i].machine_gpu]) << wanted;
    }
  }
};

TEST_F(ProcessDevices, AreFoundByUuidWhateverTheProcessCallsThem) {
  ASSERT_TRUE(start_daemon());
  const nlohmann::json status = ask_daemon("status");
  ASSERT_TRUE(status.is_object() && status["devices"].size() >= 2) << status;
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_EQ(status["devices"][i]["uuid"], machine().uuids[i]);
    std::printf("device %zu of the daemon: %s\n", i, status["devices"][i]["uuid"].get<std::string>().c_str());
  }
  run("straight", {{"0,1", 0, 0}, {"0,1", 1, 1}});
  run("reordered", {{"1,0", 0, 1}, {"1,0", 1, 0}});
  run("restricted", {{"1", 0, 1}, {"0", 0, 0}});
}

class ProcessMps : public ProcessTest {
 protected:
  ProcessMps() : ProcessTest(1, seconds(60)) {}
};

TEST_F(ProcessMps, IsAsTheRunnerSaid) {
  if (machine().host) {
    GTEST_SKIP() << "host devices know no MPS";
  }
  EXPECT_EQ(machine().mps, machine().mps_promised) << "of a process of the tests";
  ASSERT_TRUE(start_daemon());
  const nlohmann::json status = ask_daemon("status");
  ASSERT_TRUE(status.is_object() && !status["devices"].empty()) << status;
  EXPECT_EQ(status["devices"][0]["mps_active"], machine().mps_promised) << "of the daemon";
  const auto client = make_client();
  const std::string answer = expect_ok(*client, "attach " + daemon_->attach_socket() + " " + device(0) + " mps");
  EXPECT_EQ(number_in(answer, "mps") == 1, machine().mps_promised) << "of a session";
  std::printf("MPS: %s\n", machine().mps ? "active" : "not active");
}

class ProcessIdle : public ProcessTest {
 protected:
  ProcessIdle() : ProcessTest(1, seconds(90)) {}

  /// Bytes free once nothing changes any more: processes of before may still be going.
  std::vector<double> settled_bytes() {
    std::vector<double> before = free_bytes();
    uint64_t since = support::monotonic_ns();
    EXPECT_TRUE(support::wait_until(
        [&] {
          const std::vector<double> now = free_bytes();
          since = now == before ? since : support::monotonic_ns();
          before = now;
          return support::elapsed_ms(since) > 300;
        },
        seconds(15)));
    return before;
  }
};

TEST_F(ProcessIdle, ADaemonWithoutSessionsTakesLittleMemoryAndNoPool) {
  constexpr double kMostMib = 600;
  constexpr double kMib = 1 << 20;
  const std::vector<double> before = settled_bytes();
  ASSERT_TRUE(start_daemon());
  const std::vector<double> after = settled_bytes();
  const size_t served = std::min<size_t>(machine().uuids.size(), 2);
  Series taken;
  for (size_t i = 0; i < std::min(served, before.size()); ++i) {
    const double mib = (before[i] - after[i]) / kMib;
    EXPECT_LE(mib, kMostMib) << "GPU " << i;
    taken.push_back({"GPU " + std::to_string(i), {mib}});
  }
  figure("idle daemon, MiB", taken);
  const Ledger idle = ledger();
  std::printf("idle: %s\n", idle.text().c_str());
  EXPECT_EQ(idle.buffer_bytes, 0u);
  EXPECT_EQ(idle.quarantined_bytes, 0u);
  // Words of parts, in allocations of 2 MiB each.
  EXPECT_LE(idle.table_bytes, served * (4u << 20));
  const auto client = make_client();
  ASSERT_TRUE(attach(*client, 0, "first"));
  EXPECT_GT(ledger().buffer_bytes, 0u) << "the registration does not show";
}

}  // namespace
}  // namespace expertd::device_test
