// SPDX-License-Identifier: Apache-2.0
#include "tests/support/etcd_process.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <sstream>

#include "tests/support/child_process.h"

namespace expertd::support {
namespace {

constexpr std::chrono::seconds kLimit(20);

std::string program() {
  const char* const path = std::getenv("PATH");
  std::istringstream folders(path == nullptr ? "/usr/bin" : path);
  for (std::string folder; std::getline(folders, folder, ':');) {
    if (::access((folder + "/etcd").c_str(), X_OK) == 0) {
      return folder + "/etcd";
    }
  }
  return "";
}

}  // namespace

bool EtcdProcess::start() {
  const std::string etcd = program();
  if (etcd.empty()) {
    ADD_FAILURE() << "there is no etcd on PATH; apt-get install etcd-server (make check does)";
    return false;
  }
  const std::string peer_url = "http://127.0.0.1:" + std::to_string(peer_port_);
  const std::string log = directory_.file("log" + std::to_string(starts_++));
  ChildOptions options;
  options.arguments = {etcd,
                       "--name=one",
                       "--data-dir=" + directory_.file("data"),
                       "--listen-client-urls=" + url(),
                       "--advertise-client-urls=" + url(),
                       "--listen-peer-urls=" + peer_url,
                       "--initial-advertise-peer-urls=" + peer_url,
                       "--initial-cluster=one=" + peer_url};
  options.output = ::open(log.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  options.error = options.output;
  pid_ = start_child(options);
  ::close(options.output);
  note_wait("the start of etcd");
  const bool serves = wait_until(
      [&] {
        return read_text(log).find("ready to serve client requests") != std::string::npos ||
               reap_child(pid_, nullptr, std::chrono::milliseconds(0));
      },
      kLimit);
  if (!serves || read_text(log).find("ready to serve client requests") == std::string::npos) {
    ADD_FAILURE() << "etcd did not start:\n" << read_text(log);
    return false;
  }
  return true;
}

void EtcdProcess::kill() {
  if (pid_ > 0) {
    ::kill(pid_, SIGKILL);
    if (!reap_child(pid_, nullptr, kLimit)) {
      ADD_FAILURE() << "etcd, pid " << pid_ << ", has not ended after SIGKILL";
    }
    pid_ = -1;
  }
}

}  // namespace expertd::support
