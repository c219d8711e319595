// SPDX-License-Identifier: Apache-2.0
// Where a rank that comes back to a running group may come in (engine/group_shared.h, go_over_to).
#pragma once

#include "daemon/engine/engine.h"
#include "proto/abi/ring_v1.h"

namespace expertd::transport {

/// Whether a rank that comes back may begin with the operation: a dispatch that makes a handle, or a barrier of ranks
/// that have never dispatched.
bool may_begin(const expertd_slot& slot, const engine::RankState& rank);

}  // namespace expertd::transport
