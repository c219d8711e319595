// SPDX-License-Identifier: Apache-2.0
// Fabric: how this daemon exchanges with the daemons of other nodes, over UCX; one per daemon, owned by the composition
// root. Its functions are for control threads and wait for threads of lanes, a few microseconds as a rule; what the
// loops of devices call is in the FabricPort that open_group() gives. Without UCX in it, so that others may include it.
#pragma once

#include <memory>

#include "daemon/base/status.h"
#include "daemon/engine/fabric_port.h"
#include "daemon/engine/ports.h"
#include "daemon/fabric/options.h"
#include "daemon/fabric/probe_plan.h"

namespace expertd::fabric {

class Fabric {
 public:
  /// Opens the lanes and starts their threads. `wake` and `observer` (may be null) outlive it. CONFIG_BAD_VALUE names
  /// an option that is wrong, UNAVAILABLE the transports or devices that are not there.
  static base::Result<std::unique_ptr<Fabric>> create(const FabricOptions& options, engine::WakePort* wake,
                                                      FabricObserver* observer);
  /// Stops it. The ports it gave are gone before.
  ~Fabric();
  Fabric(const Fabric&) = delete;
  Fabric& operator=(const Fabric&) = delete;

  const NodeIdentity& identity() const;

  /// Opens the endpoints to another daemon; both sides do that, in any order, and what is sent meanwhile waits. It is
  /// up when FabricObserver::node_up says so, or lost after HeartbeatOptions::connect_limit_ns. Does nothing for one
  /// that is connected. A lost one may be connected again, with the same identity if it never stopped. Addresses are
  /// taken from whom the control plane trusts: UCX does not check them.
  base::Status connect(const NodeIdentity& identity);
  /// Ends a connection; node_lost() is told with kDisconnected.
  base::Status disconnect(uint64_t node_id);

  /// Takes the group's memory and lets its messages in: messages that arrive before are dropped, so nobody sends before
  /// every node has opened it. Every other node of it must be connected and not lost (PEER_LOST). The port is destroyed
  /// after the last call of any of its ranks; the memory is freed when nothing in flight may touch it any more.
  base::Result<std::unique_ptr<engine::FabricPort>> open_group(const GroupLink& link);

  /// Answers the probe of another daemon, which is connected, until it ends it or its time is over. BAD_STATE while
  /// this daemon asks or answers another one, ARGUMENT_RANGE names what is too large. Takes memory.
  base::Status open_probe(const ProbeOffer& offer);
  /// Measures the way to another daemon, which has opened the probe. Groups go on beside it; at most kProbeWindow
  /// messages are under way. An error as above, and then `done` is never called.
  base::Status begin_probe(const ProbePlan& plan, ProbeDone done);

  /// For status and metrics.
  base::Result<FabricSnapshot> snapshot();

  /// Lets what is under way end, tells the peers, and ends the threads; at most FabricOptions::stop_limit_ns.
  void stop();

 private:
  struct State;
  class Port;
  explicit Fabric(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace expertd::fabric
