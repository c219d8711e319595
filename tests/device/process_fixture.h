// SPDX-License-Identifier: Apache-2.0
// What every process test stands on: the GPUs of the machine as a client process sees them (this process makes no CUDA
// call, so that a fault anywhere leaves it whole), a daemon of its own, clients as processes, a watchdog, and figures.
//
// EXPERTD_TEST_MPS=1: the runner has started MPS, and says so. EXPERTD_TEST_DEVICES=host: the same cases on host
// devices, as far as they make sense there, to try the tests themselves where there is no GPU.
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "tests/support/case_watchdog.h"
#include "tests/support/child_process.h"
#include "tests/support/daemon_process.h"
#include "tests/support/fault_client.h"
#include "tests/support/temp_dir.h"

namespace expertd::device_test {

using std::chrono::milliseconds;
using std::chrono::seconds;
using support::FaultClient;
using support::is_ok;
using support::number_in;

struct Machine {
  bool host = false;  // EXPERTD_TEST_DEVICES=host
  bool mps = false;   // as CUDA says
  bool mps_promised = false;
  std::vector<std::string> uuids;  // in PCI order
  std::string problem;             // why there are none
};
/// Looked up once.
const Machine& machine();

/// A client in a process of its own.
std::unique_ptr<FaultClient> make_client(std::vector<std::string> environment = {}, bool own_pid_namespace = false);

/// The text behind "name=" in an answer.
std::string text_in(const std::string& answer, const std::string& name);

/// Prints a line that a summary picks up: "figure NAME (N): WHAT p50/max, WHAT p50/max".
using Series = std::vector<std::pair<std::string, std::vector<double>>>;
void figure(const std::string& name, const Series& series);

/// What a daemon holds, as its metrics say, in one look.
struct Gauges {
  double sessions = 0;
  double used_bytes = 0;
  double quarantined_bytes = 0;
  double reaped = 0;  // sessions, since the start
  double reap_seconds = 0;
  bool there = false;  // the page could be had
};
Gauges gauges(const support::DaemonProcess& daemon);

/// What it holds on its devices, as expertctl says: equal before and after means that nothing stayed.
struct Ledger {
  uint64_t buffer_bytes = 0;  // windows and registered memory
  uint64_t quarantined_bytes = 0;
  uint64_t table_bytes = 0;  // tables of groups, flag pages
  uint64_t armed_streams = 0;
  uint64_t sessions = 0;
  size_t descriptors = 0;
  /// In everything but descriptors, of which some come and go.
  bool holds_as_much_as(const Ledger& other) const;
  std::string text() const;
};

class ProcessTest : public testing::Test {
 protected:
  ProcessTest(uint32_t gpus_needed, seconds limit) : gpus_needed_(gpus_needed), limit_(limit) {}
  void SetUp() override;

  /// Starts daemon_ with all devices that the case may use.
  bool start_daemon(std::vector<std::string> flags = {}, bool own_pid_namespace = false);
  /// "cuda:1", or "host:1".
  static std::string device(uint32_t index);
  /// expertctl's answer as JSON, null when there is none.
  nlohmann::json ask_daemon(const std::string& verb);
  Ledger ledger();
  /// Free bytes of every GPU, from a process that stays for the whole case; empty on host devices.
  std::vector<double> free_bytes();

  /// Asks and expects "ok ..."; the answer.
  static std::string expect_ok(FaultClient& client, const std::string& command, milliseconds limit = seconds(30));
  /// The same command for several at once, as collective calls need it; a '#' in it becomes the client's place.
  static bool all_ok(const std::vector<FaultClient*>& clients, const std::string& command,
                     milliseconds limit = seconds(40));
  /// Attaches on the device and has memory for rounds.
  bool attach(FaultClient& client, uint32_t device_index, const std::string& name, const std::string& kind = "malloc");
  /// Ends the loops of both ranks of a group; what they came to.
  static std::vector<std::string> stop_loops(FaultClient& first, FaultClient& second, const std::string& batch);

  std::unique_ptr<support::CaseWatchdog> watchdog_;  // the first, so that it outlasts everything below
  std::unique_ptr<support::DaemonProcess> daemon_;

 private:
  const uint32_t gpus_needed_;
  const seconds limit_;
  std::unique_ptr<FaultClient> memory_watcher_;
};

}  // namespace expertd::device_test
