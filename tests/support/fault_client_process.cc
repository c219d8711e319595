// SPDX-License-Identifier: Apache-2.0
// The parent's side of a fault client.
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <stdexcept>

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

FaultClient::FaultClient() {
  int to_child[2] = {-1, -1};
  int from_child[2] = {-1, -1};
  if (::pipe2(to_child, O_CLOEXEC) != 0 || ::pipe2(from_child, O_CLOEXEC) != 0) {
    throw std::runtime_error("pipe2");
  }
  const std::string path = executable();
  pid_ = ::fork();
  if (pid_ == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    ::dup2(to_child[0], STDIN_FILENO);
    ::dup2(from_child[1], STDOUT_FILENO);
    ::execl(path.c_str(), path.c_str(), nullptr);
    ::_exit(127);
  }
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

void FaultClient::send(const std::string& command) {
  const std::string line = command + "\n";
  (void)!::write(in_, line.data(), line.size());
}

std::optional<std::string> FaultClient::answer(std::chrono::milliseconds limit) {
  const auto deadline = std::chrono::steady_clock::now() + limit;
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
    reap();
  }
}

void FaultClient::reap() {
  ::waitpid(pid_, nullptr, 0);
  pid_ = -1;
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
