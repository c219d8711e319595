// SPDX-License-Identifier: Apache-2.0
// Calls to the peer services of other daemons for measurements. They wait for the answer, so a control thread of its
// own makes them, one at a time; cancel() may come from any other thread. A Status names the node that did not answer.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "daemon/base/status.h"
#include "daemon/fabric/bootstrap/probe_port.h"

namespace expertd::fabric {

class ProbeCalls {
 public:
  explicit ProbeCalls(std::string cluster_key);
  ~ProbeCalls();
  ProbeCalls(const ProbeCalls&) = delete;
  ProbeCalls& operator=(const ProbeCalls&) = delete;

  /// Deadlines are absolute, base::now_ns clock. The nodes come without lanes.
  base::Result<std::vector<group::NodeIdentity>> nodes(const std::string& rendezvous, uint64_t deadline_ns);
  /// Who answers, with its lanes.
  base::Result<group::NodeIdentity> open(const group::NodeIdentity& at, const ProbeOpening& opening,
                                         uint64_t deadline_ns);
  base::Result<std::vector<LaneSpeed>> measure(const group::NodeIdentity& at, const group::NodeIdentity& to,
                                               uint64_t timeout_ns, uint64_t deadline_ns);
  /// Ends the call that waits, and every later one.
  void cancel();

 private:
  struct Parts;  // what needs gRPC's headers

  std::unique_ptr<Parts> parts_;
};

}  // namespace expertd::fabric
