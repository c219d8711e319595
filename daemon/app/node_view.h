// SPDX-License-Identifier: Apache-2.0
// What operators and scrapes are shown of the other nodes, from what the fabric and the rendezvous tell of themselves.
// Pure functions, any thread.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "daemon/base/status.h"
#include "daemon/fabric/backend.h"
#include "daemon/fabric/bootstrap/probe_port.h"
#include "daemon/fabric/bootstrap/rendezvous_client.h"
#include "daemon/fabric/options.h"
#include "daemon/metrics/collector.h"
#include "daemon/session/api.h"

namespace expertd::app {

/// One look at this node's part in the fabric; `enabled` false: it has none, and nothing else is set.
struct NodeFacts {
  bool enabled = false;
  std::string name;
  uint64_t id = 0;
  std::string address;
  std::string backend = fabric::backend_name(fabric::Backend::kStaged);
  std::string backend_cause;  // why it is not direct
  std::string transports;     // separated by commas
  fabric::FabricOptions options;
  fabric::RendezvousState rendezvous;
  bool hosting = false;                       // the rendezvous, by this daemon
  std::map<uint64_t, std::string> addresses;  // of other nodes by id, where they are known
  base::Status answered;                      // error: the fabric did not, and `fabric` is its last answer
  fabric::FabricSnapshot fabric;
  std::map<std::string, std::vector<fabric::LaneSpeed>> measured;  // ways from here by node (Mesh::measured)
  uint64_t now_ns = 0;
};

/// connecting, up, lost.
const char* peer_state_name(fabric::PeerState state);
session::FabricStatusSnapshot fabric_status(const NodeFacts& facts);
session::PeersSnapshot peers_snapshot(const NodeFacts& facts);
metrics::FabricGauges fabric_gauges(const NodeFacts& facts);

}  // namespace expertd::app
