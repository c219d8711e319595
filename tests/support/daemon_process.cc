// SPDX-License-Identifier: Apache-2.0
#include "tests/support/daemon_process.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <sstream>

#include "tests/support/child_process.h"

#ifndef EXPERTD_BINARY_DIR
#define EXPERTD_BINARY_DIR "build"
#endif

namespace expertd::support {
namespace {

// Of a killed process: a GPU's context is taken apart meanwhile.
constexpr std::chrono::seconds kReapLimit(30);

pid_t spawn(ChildOptions options, const std::string& out_path, const std::string& error_path) {
  options.output = ::open(out_path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  options.error = ::open(error_path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  const pid_t pid = start_child(options);
  ::close(options.output);
  ::close(options.error);
  return pid;
}

bool answers(const std::string& path, int type) {
  const int fd = ::socket(AF_UNIX, type | SOCK_CLOEXEC, 0);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::snprintf(address.sun_path, sizeof(address.sun_path), "%s", path.c_str());
  const bool connected = ::connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0;
  ::close(fd);
  return connected;
}

size_t count_entries(const std::string& directory) {
  size_t count = 0;
  std::error_code ignored;
  for (auto entry = std::filesystem::directory_iterator(directory, ignored);
       entry != std::filesystem::directory_iterator(); entry.increment(ignored)) {
    ++count;
  }
  return count;
}

}  // namespace

std::string binary_directory() {
  const char* given = std::getenv("EXPERTD_BIN_DIR");
  if (given != nullptr && *given != '\0') {
    return given;
  }
  std::error_code ignored;
  const auto beside = std::filesystem::read_symlink("/proc/self/exe", ignored).parent_path();
  const bool there = std::filesystem::exists(beside / "expertd", ignored);
  return there ? beside.string() : std::string(EXPERTD_BINARY_DIR) + "/bin";
}

RunResult run_child(ChildOptions options, std::chrono::milliseconds limit) {
  const TempDir directory;
  note_wait("the end of " + options.arguments.front());
  const pid_t pid = spawn(std::move(options), directory.file("stdout"), directory.file("stderr"));
  int status = 0;
  RunResult result;
  bool ended = pid > 0 && reap_child(pid, &status, limit);
  if (pid > 0 && !ended) {
    ::kill(pid, SIGKILL);
    ended = reap_child(pid, &status, kReapLimit);
  }
  result.exit_code = ended && WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  result.output = read_text(directory.file("stdout"));
  result.error = read_text(directory.file("stderr"));
  return result;
}

RunResult run_program(const std::vector<std::string>& arguments, std::chrono::milliseconds limit) {
  ChildOptions options;
  options.arguments = arguments;
  return run_child(std::move(options), limit);
}

RunResult run_program(const std::string& name, const std::vector<std::string>& arguments,
                      std::chrono::milliseconds limit) {
  std::vector<std::string> all = {binary_directory() + "/" + name};
  all.insert(all.end(), arguments.begin(), arguments.end());
  return run_program(all, limit);
}

RunResult run_daemon(const std::vector<std::string>& arguments, std::chrono::milliseconds limit) {
  return run_program("expertd", arguments, limit);
}

DaemonProcess::DaemonProcess(uint32_t hosts, std::vector<std::string> flags) {
  arguments_ = {binary_directory() + "/expertd", "--runtime-directory=" + directory_.path(), "--metrics-port=0",
                "--device-gpus=none", "--device-hosts=" + std::to_string(hosts)};
  arguments_.insert(arguments_.end(), flags.begin(), flags.end());
}

DaemonProcess::~DaemonProcess() {
  kill();
  if (::testing::Test::HasFailure()) {
    std::fprintf(stderr, "---- log of the daemon ----\n%s---- end of the log ----\n", log().c_str());
  }
}

bool DaemonProcess::start() {
  launch();
  const bool up = wait_ready();
  if (!up) {
    std::fprintf(stderr, "the daemon did not start:\n%s\n", log().c_str());
  }
  return up;
}

void DaemonProcess::launch() {
  std::filesystem::remove(directory_.file("stderr"));
  metrics_port_ = 0;
  ChildOptions options;
  options.arguments = arguments_;
  options.environment = environment_;
  options.network_namespace = network_namespace_;
  options.own_pid_namespace = own_pid_namespace_;
  pid_ = spawn(options, directory_.file("stdout"), directory_.file("stderr"));
}

bool DaemonProcess::wait_ready() {
  note_wait("the start of the daemon");
  return wait_until([this] { return !running() || ready(); }, start_limit_) && running();
}

bool DaemonProcess::ready() {
  const std::string text = log();
  const size_t line = text.find("msg=ready");
  const size_t begin = line == std::string::npos ? line : text.find("metrics=", line);
  if (begin == std::string::npos || text.find('\n', begin) == std::string::npos) {
    return false;
  }
  std::string address = text.substr(begin + 8, text.find_first_of(" \n", begin) - begin - 8);
  metrics_port_ = static_cast<uint16_t>(std::strtoul(address.substr(address.rfind(':') + 1).c_str(), nullptr, 10));
  return answers(attach_socket(), SOCK_SEQPACKET) && answers(control_socket(), SOCK_STREAM);
}

bool DaemonProcess::reap(int* status) {
  if (pid_ <= 0 || !reap_child(pid_, status, std::chrono::milliseconds(0))) {
    return false;
  }
  pid_ = -1;
  return true;
}

bool DaemonProcess::running() {
  int status = 0;
  return pid_ > 0 && !reap(&status);
}

int DaemonProcess::wait_exit(std::chrono::milliseconds limit) {
  note_wait("the end of the daemon");
  int status = 0;
  const bool ended = wait_until([&] { return reap(&status); }, limit);
  return ended && WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

void DaemonProcess::terminate() {
  ::kill(pid_, SIGTERM);
}

int DaemonProcess::stop(std::chrono::milliseconds limit) {
  terminate();
  return wait_exit(limit);
}

void DaemonProcess::kill() {
  if (pid_ > 0) {
    note_wait("the end of the killed daemon");
    ::kill(pid_, SIGKILL);
    if (!reap_child(pid_, nullptr, kReapLimit)) {
      ADD_FAILURE() << "the daemon, pid " << pid_ << ", has not ended after SIGKILL";
    }
    pid_ = -1;
  }
}

void DaemonProcess::pause() {
  ::kill(pid_, SIGSTOP);
  // The signal stops one thread after the other; each of them might still answer.
  const std::string tasks = "/proc/" + std::to_string(pid_) + "/task";
  note_wait("every thread of the daemon to stop");
  (void)wait_until(
      [&] {
        std::error_code gone;
        bool stopped = true;
        for (const auto& task : std::filesystem::directory_iterator(tasks, gone)) {
          const std::string stat = read_text(task.path() / "stat");
          const size_t name_end = stat.rfind(')');  // the state is the letter behind the name
          stopped = stopped && name_end != std::string::npos && stat.compare(name_end, 3, ") T") == 0;
        }
        return stopped;
      },
      std::chrono::seconds(5));
}

void DaemonProcess::resume() {
  ::kill(pid_, SIGCONT);
}

std::string DaemonProcess::scrape() const {
  return http_get(metrics_port_, "/metrics");
}

double DaemonProcess::metric(const std::string& prefix) const {
  std::istringstream lines(scrape());
  double sum = 0;
  for (std::string line; std::getline(lines, line);) {
    const char next = line.size() > prefix.size() ? line[prefix.size()] : '\0';
    const bool whole_name = prefix.find('{') != std::string::npos || next == '{' || next == ' ';
    if (line.compare(0, prefix.size(), prefix) == 0 && whole_name) {
      sum += std::strtod(line.c_str() + line.rfind(' '), nullptr);
    }
  }
  return sum;
}

bool DaemonProcess::metric_becomes(const std::string& prefix, double value) const {
  return wait_until([&] { return metric(prefix) == value; }, std::chrono::seconds(5));
}

size_t DaemonProcess::open_descriptors() const {
  return count_entries("/proc/" + std::to_string(pid_) + "/fd");
}

size_t DaemonProcess::mappings() const {
  const std::string maps = read_text("/proc/" + std::to_string(pid_) + "/maps");
  return static_cast<size_t>(std::count(maps.begin(), maps.end(), '\n'));
}

rlimit DaemonProcess::limit_descriptors(rlim_t limit) const {
  rlimit before{};
  (void)::prlimit(pid_, RLIMIT_NOFILE, nullptr, &before);
  const rlimit after{limit, before.rlim_max};
  (void)::prlimit(pid_, RLIMIT_NOFILE, &after, nullptr);
  return before;
}

std::string http_get(uint16_t port, const std::string& path) {
  const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  std::string reply;
  if (::connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0) {
    const timeval limit{5, 0};
    ::setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
    const std::string request = "GET " + path + " HTTP/1.0\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    (void)!::write(fd, request.data(), request.size());
    char buffer[16384];
    for (ssize_t got = ::read(fd, buffer, sizeof(buffer)); got > 0; got = ::read(fd, buffer, sizeof(buffer))) {
      reply.append(buffer, static_cast<size_t>(got));
    }
  }
  ::close(fd);
  const size_t body = reply.find("\r\n\r\n");
  return body == std::string::npos ? std::string() : reply.substr(body + 4);
}

}  // namespace expertd::support
