// SPDX-License-Identifier: Apache-2.0
// Crossing: what the fabric's threads leave for each other about connections. The control lane's thread decides that a
// peer is lost; a data lane's thread says that it cannot go on with one, and when it has let a lost one go. Owned by
// Fabric, and outlives the threads.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <string>

#include "daemon/fabric/mailbox.h"
#include "daemon/fabric/options.h"
#include "daemon/fabric/waker.h"

namespace expertd::fabric {

/// A connection to a peer has a number of its own: the same daemon connected anew has another.
using ConnectionId = uint64_t;

/// Of a data lane. At most one of each kind per connection.
struct LaneReport {
  enum class Kind : uint32_t { kFailed, kLetGo };
  Kind kind = Kind::kFailed;
  ConnectionId connection = 0;
  LossCause cause = LossCause::kTransport;  // of kFailed, as `detail`
  std::string detail;
};

struct Crossing {
  Mailbox<LaneReport> reports;                                        // for the control lane's thread
  std::array<Mailbox<ConnectionId>, engine::kFabricLanes> to_let_go;  // for each data lane's: these are lost, once each
  std::array<Waker*, engine::kFabricLanes> lane_wakers{};
  Waker* control_waker = nullptr;
  std::atomic<uint32_t> lanes_flushed{0};  // data lanes that have sent what they had when the fabric was stopped

  void report(LaneReport report) {
    reports.put(std::move(report));
    control_waker->wake();
  }
  void let_go(ConnectionId connection) {
    for (uint32_t lane = 0; lane < engine::kFabricLanes; ++lane) {
      to_let_go[lane].put(connection);
      lane_wakers[lane]->wake();
    }
  }
};

}  // namespace expertd::fabric
