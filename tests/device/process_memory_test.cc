// SPDX-License-Identifier: Apache-2.0
// Label gpu. How memory of a client process comes to the daemon: every form carries verified rounds, and what cannot be
// handed over is refused by name.
#include "tests/device/process_fixture.h"

namespace expertd::device_test {
namespace {

class ProcessMemory : public ProcessTest {
 protected:
  ProcessMemory() : ProcessTest(1, seconds(100)) {}
  /// As many ranks as there are GPUs, at most two.
  static uint32_t ranks() { return machine().uuids.size() > 1 ? 2 : 1; }

  /// One kind of memory, from attaching to detaching, in both modes.
  void carry(const std::vector<FaultClient*>& clients, const std::string& kind) {
    SCOPED_TRACE(kind);
    const uint64_t begin = support::monotonic_ns();
    for (uint32_t i = 0; i < clients.size(); ++i) {
      expect_ok(*clients[i], "attach " + daemon_->attach_socket() + " " + device(i) + " " + kind);
    }
    bool good = all_ok(clients, "memory " + kind);
    for (const char* mode : {"normal", "ll"}) {
      const std::string join = "join " + kind + "-" + mode + " # " + std::to_string(clients.size()) + " " + mode;
      good = good && all_ok(clients, join) && all_ok(clients, "rounds 5") && all_ok(clients, "rounds 5 8") &&
             all_ok(clients, "leave");
    }
    good = all_ok(clients, "release") && all_ok(clients, "detach") && good;
    std::printf("%s memory: %s, from attach to detach %.0f ms\n", kind.c_str(), good ? "verified" : "FAILED",
                support::elapsed_ms(begin));
  }
};

TEST_F(ProcessMemory, EveryFormCarriesVerifiedRounds) {
  ASSERT_TRUE(start_daemon());
  const double used_before = gauges(*daemon_).used_bytes;
  std::vector<std::unique_ptr<FaultClient>> owned;
  std::vector<FaultClient*> clients;
  for (uint32_t i = 0; i < ranks(); ++i) {
    owned.push_back(make_client());
    clients.push_back(owned.back().get());
  }
  // cudaMalloc as an IPC handle, the same in small pieces of a shared block, unregistered (the library registers it
  // when it is first used), cuMemCreate as a descriptor, and a window.
  for (const char* kind : {"malloc", "small", "automatic", "vmm", "window"}) {
    carry(clients, kind);
  }
  EXPECT_TRUE(support::wait_until([&] { return gauges(*daemon_).used_bytes == used_before; }, seconds(10)));
}

TEST_F(ProcessMemory, WithoutAnExportableHandleIsRefusedAndTheSessionGoesOn) {
  if (machine().host) {
    GTEST_SKIP() << "host devices have no such memory";
  }
  ASSERT_TRUE(start_daemon());
  const auto client = make_client();
  expect_ok(*client, "attach " + daemon_->attach_socket() + " " + device(0) + " private");
  const std::string refused = client->ask("memory private");
  EXPECT_EQ(refused.rfind("failed IPC_HANDLE_VMM", 0), 0u) << refused;
  std::printf("memory that cannot be exported: %s\n", refused.c_str());
  expect_ok(*client, "memory window");
  expect_ok(*client, "join after-refusal 0 1 normal");
  expect_ok(*client, "rounds 5");
}

TEST_F(ProcessMemory, EqualLocalProcessIdsAreRefusedAndAWindowWorks) {
  if (machine().mps_promised) {
    GTEST_SKIP() << "an MPS server knows its clients by process id: namespaces are tried without MPS";
  }
  const std::string problem = support::pid_namespace_problem();
  if (!problem.empty()) {
    GTEST_SKIP() << problem;
  }
  // Both are process 1 of a namespace of their own, as in two containers.
  ASSERT_TRUE(start_daemon({}, true));
  const auto client = make_client({}, true);
  const std::string attached =
      expect_ok(*client, "attach " + daemon_->attach_socket() + " " + device(0) + " twin", seconds(60));
  EXPECT_EQ(number_in(attached, "pid"), 1);
  if (!machine().host) {
    const std::string refused = client->ask("memory malloc");
    EXPECT_EQ(refused.rfind("failed IPC_SAME_PID", 0), 0u) << refused;
    std::printf("an IPC handle between equal process ids: %s\n", refused.c_str());
    // A descriptor is not bound to a process id.
    expect_ok(*client, "memory vmm");
    expect_ok(*client, "join twin-vmm 0 1 normal");
    expect_ok(*client, "rounds 5");
    expect_ok(*client, "leave");
  }
  expect_ok(*client, "memory window");
  expect_ok(*client, "join twin 0 1 normal");
  expect_ok(*client, "rounds 5");
}

}  // namespace
}  // namespace expertd::device_test
