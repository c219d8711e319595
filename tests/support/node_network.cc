// SPDX-License-Identifier: Apache-2.0
#include "tests/support/node_network.h"

#include <fcntl.h>
#include <sched.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <thread>

#include "tests/support/daemon_process.h"

namespace expertd::support {
namespace {

constexpr std::chrono::seconds kToolLimit(10);

/// A new namespace, which lives as long as the descriptor or a process in it; none with errno.
base::ScopedFd new_namespace(int* error) {
  base::ScopedFd made;
  // A thread of its own, because a namespace is that of a thread and this one is to stay where it is.
  std::thread([&] {
    if (::unshare(CLONE_NEWNET) == 0) {
      made.reset(::open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC));
    }
    *error = errno;
  }).join();
  return made;
}

std::string port_of(uint32_t node) {
  return "port" + std::to_string(node);
}

}  // namespace

NodeNetwork::NodeNetwork(uint32_t nodes) {
  if (!make(nodes) && problem_.empty()) {
    problem_ = "there is no network namespace";
  }
  if (!problem_.empty()) {
    problem_ += "; run it as root with CAP_NET_ADMIN and CAP_SYS_ADMIN, or by `unshare -Ur`, with iproute2 installed";
  }
}

bool NodeNetwork::make(uint32_t nodes) {
  for (uint32_t made = 0; made < nodes + 1; ++made) {
    int error = 0;
    base::ScopedFd space = new_namespace(&error);
    if (!space.valid()) {
      problem_ = std::string("no network namespace can be made here: ") + std::strerror(error);
      return false;
    }
    if (made == 0) {
      hub_ = std::move(space);
    } else {
      nodes_.push_back(std::move(space));
    }
  }
  std::string lines = "link add hub type bridge\nlink set hub up\n";
  for (uint32_t node = 0; node < nodes; ++node) {
    const std::string place = "/proc/" + std::to_string(::getpid()) + "/fd/" + std::to_string(descriptor(node));
    lines += "link add " + port_of(node) + " type veth peer name eth0 netns " + place + "\n";
    lines += "link set " + port_of(node) + " master hub up\n";
  }
  bool good = tell(hub_, "ip", lines);
  for (uint32_t node = 0; node < nodes && good; ++node) {
    good = tell(nodes_[node], "ip", "link set lo up\naddr add " + address(node) + "/24 dev eth0\nlink set eth0 up\n");
  }
  return good;
}

bool NodeNetwork::set_link(uint32_t node, bool up) {
  return tell(nodes_[node], "ip", std::string("link set eth0 ") + (up ? "up" : "down") + "\n");
}

bool NodeNetwork::set_port_state(uint32_t node, const std::string& state) {
  return tell(hub_, "bridge", "link set dev " + port_of(node) + " state " + state + "\n");
}

bool NodeNetwork::lose(uint32_t from, uint32_t to) {
  // To an address that no link has: the bridge brings it to everybody, and nobody takes it.
  return tell(nodes_[from], "ip",
              "neigh replace " + address(to) + " lladdr 02:00:00:00:00:fe nud permanent dev eth0\n");
}

bool NodeNetwork::lose_no_more(uint32_t from, uint32_t to) {
  return tell(nodes_[from], "ip", "neigh del " + address(to) + " dev eth0\n");
}

bool NodeNetwork::tell(const base::ScopedFd& where, const std::string& program, const std::string& lines) {
  const TempDir directory;
  write_text(directory.file("lines"), lines);
  ChildOptions options;
  options.arguments = {"/usr/bin/env", program, "-batch", directory.file("lines")};
  options.network_namespace = where.get();
  const RunResult result = run_child(std::move(options), kToolLimit);
  if (result.exit_code != 0) {
    problem_ = "`" + program + "` of iproute2 failed in a network namespace: " + result.error;
  }
  return result.exit_code == 0;
}

}  // namespace expertd::support
