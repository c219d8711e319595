// SPDX-License-Identifier: Apache-2.0
#include "tests/device/process_fixture.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <sstream>

#include "tests/device/process_client.h"

namespace expertd::device_test {
namespace {

constexpr seconds kFirstCudaLimit(90);  // a machine's first use of a GPU
constexpr seconds kDaemonStartLimit(60);
constexpr seconds kToolLimit(15);

bool environment_is(const char* name, const char* value) {
  const char* found = std::getenv(name);
  return found != nullptr && std::string(found) == value;
}

Machine look_up() {
  Machine found;
  found.mps_promised = environment_is("EXPERTD_TEST_MPS", "1");
  if (environment_is("EXPERTD_TEST_DEVICES", "host")) {
    found.host = true;
    found.uuids = {"host:0", "host:1"};
    return found;
  }
  const std::string answer = make_client()->ask("gpus", kFirstCudaLimit);
  if (!is_ok(answer)) {
    const size_t message = answer.find(": ");
    found.problem =
        message == std::string::npos ? "a process that asks for them gives no answer" : answer.substr(message + 2);
    return found;
  }
  const auto count = static_cast<uint32_t>(std::max(0.0, number_in(answer, "count")));
  found.mps = number_in(answer, "mps") == 1;
  for (uint32_t i = 0; i < count; ++i) {
    found.uuids.push_back(text_in(answer, "uuid" + std::to_string(i)));
  }
  return found;
}

}  // namespace

const Machine& machine() {
  static const Machine found = look_up();
  return found;
}

std::unique_ptr<FaultClient> make_client(std::vector<std::string> environment, bool own_pid_namespace) {
  std::error_code ignored;
  support::ClientProgram program;
  program.arguments = {std::filesystem::read_symlink("/proc/self/exe", ignored).string(), kClientMode};
  program.environment = std::move(environment);
  program.environment.push_back("CUDA_DEVICE_ORDER=PCI_BUS_ID");  // as the daemon has it
  program.own_pid_namespace = own_pid_namespace;
  return std::make_unique<FaultClient>(program);
}

std::string text_in(const std::string& answer, const std::string& name) {
  const size_t at = answer.find(" " + name + "=");
  if (at == std::string::npos) {
    return {};
  }
  const size_t begin = at + name.size() + 2;
  return answer.substr(begin, answer.find_first_of(" \n", begin) - begin);
}

void figure(const std::string& name, const Series& series) {
  std::string line = "figure " + name;
  const char* before = ": ";
  for (const auto& [what, values] : series) {
    std::vector<double> sorted = values;
    std::sort(sorted.begin(), sorted.end());
    char text[64] = "none";
    if (sorted.size() == 1) {
      std::snprintf(text, sizeof(text), "%.2f", sorted.front());
    } else if (!sorted.empty()) {
      std::snprintf(text, sizeof(text), "%.2f/%.2f", sorted[sorted.size() / 2], sorted.back());
    }
    line += (what == "->" ? " " : before) + what + " " + text;
    before = ", ";
  }
  std::printf("%s\n", line.c_str());
  std::fflush(stdout);
}

Gauges gauges(const support::DaemonProcess& daemon) {
  std::istringstream lines(daemon.scrape());
  Gauges found;
  for (std::string line; std::getline(lines, line);) {
    const size_t space = line.rfind(' ');
    if (space == std::string::npos || line.front() == '#') {
      continue;
    }
    const std::string series = line.substr(0, space);
    const double value = std::strtod(line.c_str() + space, nullptr);
    const bool pool = series.rfind("expertd_pool_bytes{", 0) == 0;
    found.there = found.there || series == "expertd_sessions";
    found.sessions += series == "expertd_sessions" ? value : 0;
    found.used_bytes += pool && series.find("state=\"used\"") != std::string::npos ? value : 0;
    found.quarantined_bytes += pool && series.find("state=\"quarantined\"") != std::string::npos ? value : 0;
    found.reaped += series == "expertd_lease_reap_duration_seconds_count" ? value : 0;
    found.reap_seconds += series == "expertd_lease_reap_duration_seconds_sum" ? value : 0;
  }
  return found;
}

bool Ledger::holds_as_much_as(const Ledger& other) const {
  return buffer_bytes == other.buffer_bytes && quarantined_bytes == other.quarantined_bytes &&
         table_bytes == other.table_bytes && armed_streams == other.armed_streams && sessions == other.sessions;
}

std::string Ledger::text() const {
  std::ostringstream text;
  text << "windows and buffers " << buffer_bytes << ", quarantined " << quarantined_bytes << ", tables " << table_bytes
       << ", armed streams " << armed_streams << ", sessions " << sessions << ", descriptors " << descriptors;
  return text.str();
}

void ProcessTest::SetUp() {
  const testing::TestInfo* info = testing::UnitTest::GetInstance()->current_test_info();
  watchdog_ =
      std::make_unique<support::CaseWatchdog>(std::string(info->test_suite_name()) + "." + info->name(), limit_);
  const Machine& here = machine();
  if (!here.problem.empty()) {
    GTEST_SKIP() << "no GPU: " << here.problem;
  }
  if (here.uuids.size() < gpus_needed_) {
    GTEST_SKIP() << "needs " << gpus_needed_ << " GPUs, there are " << here.uuids.size();
  }
}

bool ProcessTest::start_daemon(std::vector<std::string> flags, bool own_pid_namespace) {
  const Machine& here = machine();
  if (!here.host) {
    flags.insert(flags.begin(), std::string("--device-gpus=") + (here.uuids.size() > 1 ? "0,1" : "0"));
  }
  daemon_ = std::make_unique<support::DaemonProcess>(here.host ? 2 : 0, flags);
  daemon_->set_start_limit(kDaemonStartLimit);
  if (own_pid_namespace) {
    daemon_->use_own_pid_namespace();
  }
  const uint64_t begin = support::monotonic_ns();
  const bool started = daemon_->start();
  EXPECT_TRUE(started);
  std::printf("the daemon was ready after %.0f ms\n", support::elapsed_ms(begin));
  return started;
}

std::string ProcessTest::device(uint32_t index) {
  return (machine().host ? "host:" : "cuda:") + std::to_string(index);
}

nlohmann::json ProcessTest::ask_daemon(const std::string& verb) {
  const support::RunResult result = support::run_program(
      {support::binary_directory() + "/expertctl", "--socket", daemon_->control_socket(), "--json", verb}, kToolLimit);
  EXPECT_EQ(result.exit_code, 0) << "expertctl " << verb << ": " << result.output << result.error;
  return nlohmann::json::parse(result.output, nullptr, false);
}

Ledger ProcessTest::ledger() {
  Ledger now;
  const nlohmann::json status = ask_daemon("status");
  if (!status.is_object()) {
    return now;
  }
  for (const nlohmann::json& device : status.value("devices", nlohmann::json::array())) {
    now.buffer_bytes += device.value("window_bytes", uint64_t{0}) + device.value("registered_bytes", uint64_t{0});
    now.quarantined_bytes += device.value("quarantined_bytes", uint64_t{0});
    now.table_bytes += device.value("table_bytes", uint64_t{0});
    now.armed_streams += device.value("armed_streams", uint64_t{0});
  }
  now.sessions = status.value("sessions", uint64_t{0});
  now.descriptors = daemon_->open_descriptors();
  return now;
}

std::vector<double> ProcessTest::free_bytes() {
  std::vector<double> free;
  if (machine().host) {
    return free;
  }
  if (memory_watcher_ == nullptr) {
    memory_watcher_ = make_client();
  }
  const std::string answer = expect_ok(*memory_watcher_, "free");
  for (size_t i = 0; i < machine().uuids.size(); ++i) {
    free.push_back(number_in(answer, "free" + std::to_string(i)));
  }
  return free;
}

std::string ProcessTest::expect_ok(FaultClient& client, const std::string& command, milliseconds limit) {
  const std::string answer = client.ask(command, limit);
  EXPECT_TRUE(is_ok(answer)) << command << ": " << (answer.empty() ? "no answer" : answer);
  return answer;
}

bool ProcessTest::all_ok(const std::vector<FaultClient*>& clients, const std::string& command, milliseconds limit) {
  for (size_t i = 0; i < clients.size(); ++i) {
    std::string own = command;
    if (const size_t at = own.find('#'); at != std::string::npos) {
      own.replace(at, 1, std::to_string(i));
    }
    clients[i]->send(own);
  }
  bool good = true;
  for (size_t i = 0; i < clients.size(); ++i) {
    const std::string answer = clients[i]->answer(limit).value_or("no answer");
    EXPECT_TRUE(is_ok(answer)) << "client " << i << ", " << command << ": " << answer;
    good = good && is_ok(answer);
  }
  return good;
}

bool ProcessTest::attach(FaultClient& client, uint32_t device_index, const std::string& name, const std::string& kind) {
  const std::string to = "attach " + daemon_->attach_socket() + " " + device(device_index) + " " + name;
  return is_ok(expect_ok(client, to)) && is_ok(expect_ok(client, "memory " + kind));
}

// One of the two may be a batch ahead, for which it waits: the other does that batch too.
std::vector<std::string> ProcessTest::stop_loops(FaultClient& first, FaultClient& second, const std::string& batch) {
  FaultClient* clients[2] = {&first, &second};
  std::vector<std::string> ends(2);
  for (FaultClient* client : clients) {
    client->send("state");
  }
  for (size_t i = 0; i < 2; ++i) {
    ends[i] = clients[i]->answer(milliseconds(500)).value_or("");
  }
  for (const size_t ahead : {size_t{0}, size_t{1}}) {
    if (ends[ahead].empty() && !ends[1 - ahead].empty()) {
      clients[1 - ahead]->send(batch);
      ends[ahead] = clients[ahead]->answer(seconds(30)).value_or("no answer");
    }
  }
  return ends;
}

}  // namespace expertd::device_test
