// SPDX-License-Identifier: Apache-2.0
// Daemons of several nodes on this machine: real processes that reach each other over loopback TCP and form groups
// together. The first hosts the rendezvous, or whom an etcd elects. Processes end with the object; one thread; tests
// only.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "tests/support/daemon_process.h"
#include "tests/support/node_network.h"
#include "tests/support/rank_threads.h"

namespace expertd::support {

class DaemonCluster {
 public:
  /// `devices` host devices each; `flags` go to every daemon. With --fabric-etcd among them there is no list.
  explicit DaemonCluster(uint32_t nodes, uint32_t devices = 2, std::vector<std::string> flags = {});

  /// Before start(): flags of one daemon alone, and how long each may take.
  void add_flags(uint32_t node, std::vector<std::string> flags);
  /// Before start(): another address at which one daemon finds the rendezvous.
  void set_rendezvous(uint32_t node, const std::string& address) { rendezvous_[node] = address; }
  /// Before start(): the network of the daemons in place of loopback; it outlives the object.
  void use_network(const NodeNetwork* network) { network_ = network; }
  /// Before start(): "NAME=value" for every daemon.
  void set_environment(std::vector<std::string> variables) { environment_ = std::move(variables); }
  void set_start_limit(std::chrono::milliseconds limit) { start_limit_ = limit; }
  /// Starts all at once; with other ports when somebody took one of these meanwhile. False with their logs.
  bool start();

  uint32_t nodes() const { return static_cast<uint32_t>(nodes_.size()); }
  DaemonProcess& node(uint32_t index) { return *nodes_[index]; }
  /// "n1" is node 0.
  static std::string name(uint32_t index) { return "n" + std::to_string(index + 1); }
  /// "127.0.0.1:PORT" or as in the network, known since start(): where other daemons reach it.
  const std::string& address(uint32_t index) const { return addresses_[index]; }

  /// `ranks` devices of each of the first `nodes` daemons (0: of all), in the order of nodes; those of another group
  /// at the same time begin at another device.
  std::vector<Seat> seats(uint32_t ranks, uint32_t nodes = 0, uint32_t first_device = 0) const;

 private:
  void make();

  const uint32_t devices_;
  const std::vector<std::string> flags_;
  std::vector<std::vector<std::string>> own_flags_;
  std::vector<std::string> rendezvous_;  // empty: that of all
  const NodeNetwork* network_ = nullptr;
  std::vector<std::string> environment_;
  std::chrono::milliseconds start_limit_{0};  // 0: that of every daemon
  std::vector<std::unique_ptr<DaemonProcess>> nodes_;
  std::vector<std::string> addresses_;
};

}  // namespace expertd::support
