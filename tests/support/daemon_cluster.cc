// SPDX-License-Identifier: Apache-2.0
#include "tests/support/daemon_cluster.h"

#include <algorithm>
#include <cstdio>
#include <utility>

#include "tests/support/free_ports.h"

namespace expertd::support {
namespace {

constexpr int kTries = 3;

}  // namespace

DaemonCluster::DaemonCluster(uint32_t nodes, uint32_t devices, std::vector<std::string> flags)
    : devices_(devices), flags_(std::move(flags)), own_flags_(nodes), rendezvous_(nodes), nodes_(nodes) {
  make();  // addresses are asked for before the start
}

void DaemonCluster::make() {
  const bool elected = std::any_of(flags_.begin(), flags_.end(),
                                   [](const std::string& flag) { return flag.rfind("--fabric-etcd=", 0) == 0; });
  const std::vector<uint16_t> ports = free_ports(nodes());
  addresses_.clear();
  for (uint32_t index = 0; index < nodes(); ++index) {
    const std::string host = network_ == nullptr ? "127.0.0.1" : network_->address(index);
    addresses_.push_back(host + ":" + std::to_string(ports[index]));
  }
  for (uint32_t index = 0; index < nodes(); ++index) {
    std::vector<std::string> flags = {"--fabric-enabled=true", "--fabric-listen=" + address(index),
                                      "--fabric-node-name=" + name(index), "--fabric-transports=tcp",
                                      network_ == nullptr ? "--fabric-devices=lo" : "--fabric-devices=eth0"};
    if (!elected) {
      flags.push_back("--fabric-rendezvous=" + (rendezvous_[index].empty() ? address(0) : rendezvous_[index]));
    }
    flags.insert(flags.end(), flags_.begin(), flags_.end());
    flags.insert(flags.end(), own_flags_[index].begin(), own_flags_[index].end());
    nodes_[index] = std::make_unique<DaemonProcess>(devices_, std::move(flags));
    nodes_[index]->set_environment(environment_);
    if (network_ != nullptr) {
      nodes_[index]->use_network_namespace(network_->descriptor(index));
    }
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
    const bool taken = (*failed)->log().find("ADDRESS_IN_USE") != std::string::npos;
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
