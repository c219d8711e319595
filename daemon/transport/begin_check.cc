// SPDX-License-Identifier: Apache-2.0
#include "daemon/transport/begin_check.h"

namespace expertd::transport {

bool may_begin(const expertd_slot& slot, const engine::RankState& rank) {
  return slot.op == EXPERTD_OP_LL_DISPATCH ||
         (slot.op == EXPERTD_OP_DISPATCH && (slot.flags & EXPERTD_SLOT_CACHED) == 0) ||
         (slot.op == EXPERTD_OP_BARRIER && !rank.has_dispatched);
}

}  // namespace expertd::transport
