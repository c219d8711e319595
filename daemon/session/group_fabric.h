// SPDX-License-Identifier: Apache-2.0
// What sessions ask of the fabric for a group over several nodes. Implemented by the composition root, because sessions
// do not know UCX.
#pragma once

#include <functional>
#include <memory>

#include "daemon/base/status.h"
#include "daemon/engine/group_shared.h"
#include "daemon/group/rendezvous_port.h"

namespace expertd::session {

class GroupFabric {
 public:
  virtual ~GroupFabric() = default;
  /// This node's identity in placements.
  virtual uint64_t node_id() const = 0;
  /// Connects to the placement's nodes, as far as they are not connected yet, and opens this node's part of the group.
  /// It closes with the last reference; what is under way then is ended first. Blocks, at most until deadline_ns. A
  /// node that cannot be reached is named.
  virtual base::Result<std::shared_ptr<engine::FabricPort>> open(const group::Placed& placed,
                                                                 const engine::GroupSettings& settings,
                                                                 uint64_t deadline_ns) = 0;
  /// SessionService::tend_views() may have something to do earlier than it said. Any thread; does not block.
  virtual void views_changed() = 0;
};

}  // namespace expertd::session
