// SPDX-License-Identifier: Apache-2.0
// A network of its own for each daemon of a test: namespaces of this machine, each with one link ("eth0") to a bridge
// in another namespace, and what can happen to such links. Everything the daemons exchange goes over it, also what UCX
// carries. Needs root (or the root of a user namespace) and iproute2; nothing of it outlives the object and its
// processes. One thread; tests only.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "daemon/base/fd.h"

namespace expertd::support {

class NodeNetwork {
 public:
  explicit NodeNetwork(uint32_t nodes);

  /// Why there is none here, in a sentence with what to do; empty when all is up.
  const std::string& problem() const { return problem_; }
  /// Of the node's namespace.
  int descriptor(uint32_t node) const { return nodes_[node].get(); }
  /// "10.79.0.1" is node 0.
  std::string address(uint32_t node) const { return "10.79.0." + std::to_string(node + 1); }

  // False when the machine refused.
  /// Blackhole: all that goes to or from the node is lost without a sign to anybody; its link stays up.
  bool isolate(uint32_t node) { return set_port_state(node, "0"); }
  bool reconnect(uint32_t node) { return set_port_state(node, "3"); }
  /// The node's own link is switched off: sending there is an error of the system call, and all that comes is lost.
  bool set_link(uint32_t node, bool up);
  /// One direction: what `from` sends to `to` is lost, the answers are not.
  bool lose(uint32_t from, uint32_t to);
  bool lose_no_more(uint32_t from, uint32_t to);

 private:
  bool make(uint32_t nodes);
  bool set_port_state(uint32_t node, const std::string& state);
  /// Lines of `ip` or `bridge` in the namespace; false with problem_.
  bool tell(const base::ScopedFd& where, const std::string& program, const std::string& lines);

  base::ScopedFd hub_;
  std::vector<base::ScopedFd> nodes_;
  std::string problem_;
};

}  // namespace expertd::support
