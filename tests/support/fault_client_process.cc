// SPDX-License-Identifier: Apache-2.0
// The parent's side of a fault client.
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <stdexcept>

#include "tests/support/child_process.h"
#include "tests/support/daemon_process.h"
#include "tests/support/fault_client.h"

namespace expertd::support {
namespace {

constexpr const char* kName = "expertd_fault_client";

// Beside the test when it is there, else among the binaries of the build.
std::string executable() {
  std::error_code ignored;
  const auto beside = std::filesystem::read_symlink("/proc/self/exe", ignored).parent_path() / kName;
  return std::filesystem::exists(beside, ignored) ? beside.string() : binary_directory() + "/" + kName;
}

}  // namespace

FaultClient::FaultClient() : FaultClient(ClientProgram{{executable()}, {}, false}) {}

FaultClient::FaultClient(const ClientProgram& program) {
  int to_child[2] = {-1, -1};
  int from_child[2] = {-1, -1};
  ::signal(SIGPIPE, SIG_IGN);  // of commands for a client that has ended
  if (::pipe2(to_child, O_CLOEXEC) != 0 || ::pipe2(from_child, O_CLOEXEC) != 0) {
    throw std::runtime_error("pipe2");
  }
  ChildOptions options;
  options.arguments = program.arguments;
  options.environment = program.environment;
  options.own_pid_namespace = program.own_pid_namespace;
  options.input = to_child[0];
  options.output = from_child[1];
  pid_ = start_child(options);
  ::close(to_child[0]);
  ::close(from_child[1]);
  in_ = to_child[1];
  out_ = from_child[0];
}

FaultClient::~FaultClient() {
  kill();
  ::close(in_);
  ::close(out_);
}

// A client that has ended takes no commands; its end shows in the answer.
void FaultClient::send(const std::string& command) {
  last_command_ = command;
  const std::string line = command + "\n";
  (void)!::write(in_, line.data(), line.size());
}

std::optional<std::string> FaultClient::answer(std::chrono::milliseconds limit) {
  const auto deadline = std::chrono::steady_clock::now() + limit;
  note_wait("the answer of client " + std::to_string(pid_) + " to '" + last_command_ + "'");
  for (;;) {
    if (const size_t end = pending_.find('\n'); end != std::string::npos) {
      std::string line = pending_.substr(0, end);
      pending_.erase(0, end + 1);
      return line;
    }
    const auto left =
        std::chrono::duration_cast<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
    pollfd entry{out_, POLLIN, 0};
    if (left.count() <= 0 || ::poll(&entry, 1, static_cast<int>(left.count())) <= 0) {
      return std::nullopt;
    }
    char buffer[4096];
    const ssize_t got = ::read(out_, buffer, sizeof(buffer));
    if (got <= 0) {
      return std::nullopt;
    }
    pending_.append(buffer, static_cast<size_t>(got));
  }
}

std::string FaultClient::ask(const std::string& command, std::chrono::milliseconds limit) {
  send(command);
  return answer(limit).value_or("");
}

bool FaultClient::attach(const std::string& socket, uint32_t device) {
  return is_ok(ask("attach " + socket + " host:" + std::to_string(device)));
}

void FaultClient::signal_kill() {
  ::kill(pid_, SIGKILL);
}

bool FaultClient::wait_end_of_file(std::chrono::milliseconds limit) {
  const auto deadline = std::chrono::steady_clock::now() + limit;
  for (;;) {
    const auto left =
        std::chrono::duration_cast<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
    pollfd entry{out_, POLLIN, 0};
    char buffer[4096];
    if (left.count() <= 0 || ::poll(&entry, 1, static_cast<int>(left.count())) <= 0) {
      return false;
    }
    if (::read(out_, buffer, sizeof(buffer)) <= 0) {
      return true;
    }
  }
}

void FaultClient::kill() {
  if (pid_ > 0) {
    signal_kill();
    if (!reap()) {
      std::fprintf(stderr, "client %d has not ended after SIGKILL\n", pid_);
      pid_ = -1;
    }
  }
}

bool FaultClient::reap(std::chrono::milliseconds limit) {
  note_wait("the end of client " + std::to_string(pid_));
  const bool ended = pid_ <= 0 || reap_child(pid_, nullptr, limit);
  pid_ = ended ? -1 : pid_;
  return ended;
}

void FaultClient::pause() {
  ::kill(pid_, SIGSTOP);
}
void FaultClient::resume() {
  ::kill(pid_, SIGCONT);
}

bool is_ok(const std::string& answer) {
  return answer.compare(0, 2, "ok") == 0;
}

double number_in(const std::string& answer, const std::string& name) {
  const size_t at = answer.find(" " + name + "=");
  return at == std::string::npos ? -1 : std::strtod(answer.c_str() + at + name.size() + 2, nullptr);
}

}  // namespace expertd::support
