// SPDX-License-Identifier: Apache-2.0
#include "tests/support/daemon_cluster.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <utility>

namespace expertd::support {
namespace {

constexpr int kTries = 3;

/// So many different ports that nobody has: all are held until each is known.
std::vector<uint16_t> free_ports(uint32_t count) {
  std::vector<int> sockets;
  std::vector<uint16_t> ports;
  for (uint32_t i = 0; i < count; ++i) {
    const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address{};
    socklen_t size = sizeof(address);
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (::bind(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0 &&
        ::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size) == 0) {
      ports.push_back(ntohs(address.sin_port));
    } else {
      ports.push_back(0);  // its daemon fails to start, which is tried again
    }
    sockets.push_back(fd);
  }
  std::for_each(sockets.begin(), sockets.end(), ::close);
  return ports;
}

}  // namespace

DaemonCluster::DaemonCluster(uint32_t nodes, uint32_t devices, std::vector<std::string> flags)
    : devices_(devices), flags_(std::move(flags)), own_flags_(nodes), nodes_(nodes) {
  make();  // addresses are asked for before the start
}

void DaemonCluster::make() {
  addresses_.clear();
  for (const uint16_t port : free_ports(nodes())) {
    addresses_.push_back("127.0.0.1:" + std::to_string(port));
  }
  for (uint32_t index = 0; index < nodes(); ++index) {
    std::vector<std::string> flags = {"--fabric-enabled=true",
                                      "--fabric-listen=" + address(index),
                                      "--fabric-node-name=" + name(index),
                                      "--fabric-rendezvous=" + address(0),
                                      "--fabric-transports=tcp",
                                      "--fabric-devices=lo"};
    flags.insert(flags.end(), flags_.begin(), flags_.end());
    flags.insert(flags.end(), own_flags_[index].begin(), own_flags_[index].end());
    nodes_[index] = std::make_unique<DaemonProcess>(devices_, std::move(flags));
    if (start_limit_.count() != 0) {
      nodes_[index]->set_start_limit(start_limit_);
    }
  }
}

void DaemonCluster::add_flags(uint32_t node, std::vector<std::string> flags) {
  own_flags_[node].insert(own_flags_[node].end(), flags.begin(), flags.end());
}

bool DaemonCluster::start() {
  make();
  for (int attempt = 1;; ++attempt) {
    std::for_each(nodes_.begin(), nodes_.end(), [](const auto& node) { node->launch(); });
    const auto failed =
        std::find_if(nodes_.begin(), nodes_.end(), [](const auto& node) { return !node->wait_ready(); });
    if (failed == nodes_.end()) {
      return true;
    }
    const bool taken = (*failed)->log().find("in use") != std::string::npos;
    if (!taken || attempt == kTries) {
      std::fprintf(stderr, "a daemon did not start:\n%s\n", (*failed)->log().c_str());
      return false;
    }
    make();
  }
}

std::vector<Seat> DaemonCluster::seats(uint32_t ranks, uint32_t nodes_used, uint32_t first_device) const {
  std::vector<Seat> seats;
  for (uint32_t node = 0; node < (nodes_used == 0 ? nodes() : nodes_used); ++node) {
    for (uint32_t device = first_device; device < first_device + ranks; ++device) {
      seats.push_back({nodes_[node]->attach_socket(), "host:" + std::to_string(device)});
    }
  }
  return seats;
}

}  // namespace expertd::support
