// SPDX-License-Identifier: Apache-2.0
#include "tests/bench/bench_daemon.h"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <mutex>
#include <stdexcept>

#include "client/ctl/daemon_client.h"

namespace expertd::bench {

namespace {

constexpr std::chrono::milliseconds kTick{50};
constexpr std::chrono::seconds kStartMax{60};
constexpr uint64_t kCallTimeoutNs = 5'000'000'000;

/// The environment without settings that are meant for another daemon.
std::vector<char*> plain_environment() {
  constexpr std::string_view kSettings = "EXPERTD_";
  std::vector<char*> plain;
  for (char** variable = environ; *variable != nullptr; ++variable) {
    if (std::string_view(*variable).substr(0, kSettings.size()) != kSettings) {
      plain.push_back(*variable);
    }
  }
  plain.push_back(nullptr);
  return plain;
}

}  // namespace

void idle_for(std::chrono::milliseconds time) {
  std::mutex mutex;
  std::condition_variable nobody_signals;
  std::unique_lock lock(mutex);
  nobody_signals.wait_for(lock, time, [] { return false; });
}

BenchDaemon::BenchDaemon(const std::string& runtime_directory, uint32_t host_devices)
    : BenchDaemon(runtime_directory, {"--device-gpus=none", "--device-hosts=" + std::to_string(host_devices)}) {}

BenchDaemon::BenchDaemon(const std::string& runtime_directory, const std::vector<std::string>& arguments)
    : directory_(runtime_directory) {
  if (directory_.empty()) {
    start(arguments);
  }
  try {
    wait_until_ready();
  } catch (...) {
    stop();
    throw;
  }
}

BenchDaemon::~BenchDaemon() {
  stop();
}

void BenchDaemon::start(const std::vector<std::string>& arguments) {
  const char* const programs = std::getenv("EXPERTD_BIN_DIR");
  if (programs == nullptr) {
    throw std::runtime_error("give --runtime-directory of a running daemon, or $EXPERTD_BIN_DIR to start one");
  }
  std::string pattern = std::filesystem::temp_directory_path() / "expertd-bench.XXXXXX";
  if (mkdtemp(pattern.data()) == nullptr) {
    throw std::runtime_error("mkdtemp " + pattern + ": " + std::strerror(errno));
  }
  directory_ = pattern;
  scratch_ = pattern;
  std::vector<std::string> words = {std::string(programs) + "/expertd", "--runtime-directory=" + directory_,
                                    "--metrics-port=0"};
  words.insert(words.end(), arguments.begin(), arguments.end());
  std::vector<char*> argv;
  for (std::string& word : words) {
    argv.push_back(word.data());
  }
  argv.push_back(nullptr);
  const std::string log = log_file();
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, log.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
  posix_spawn_file_actions_adddup2(&actions, STDOUT_FILENO, STDERR_FILENO);
  std::vector<char*> environment = plain_environment();
  const int error = posix_spawn(&child_, argv[0], &actions, nullptr, argv.data(), environment.data());
  posix_spawn_file_actions_destroy(&actions);
  if (error != 0) {
    child_ = 0;
    stop();
    throw std::runtime_error(words[0] + ": " + std::strerror(error));
  }
}

void BenchDaemon::wait_until_ready() {
  const auto end = std::chrono::steady_clock::now() + kStartMax;
  ctl::DaemonClient client(control_socket(), kCallTimeoutNs);
  // gRPC backs off between attempts, so that the socket is looked for first.
  while (child_ != 0 && !ctl::socket_problem(control_socket()).empty()) {
    if (waitpid(child_, nullptr, WNOHANG) == child_) {
      child_ = 0;
      throw std::runtime_error("the daemon ended while it started");
    }
    if (std::chrono::steady_clock::now() > end) {
      throw std::runtime_error("the daemon was not ready in time");
    }
    idle_for(kTick);
  }
  const auto reply = client.status();
  if (!reply.ok) {
    throw std::runtime_error(reply.error.message);
  }
  pid_ = static_cast<pid_t>(reply.value.pid());
  version_ = reply.value.version();
}

void BenchDaemon::stop() noexcept {
  if (child_ != 0) {
    kill(child_, SIGTERM);
    waitpid(child_, nullptr, 0);  // its drain timeout bounds this
    child_ = 0;
  }
  if (!scratch_.empty()) {
    std::error_code ignored;  // a directory left behind harms nobody
    std::filesystem::remove_all(scratch_, ignored);
  }
}

}  // namespace expertd::bench
