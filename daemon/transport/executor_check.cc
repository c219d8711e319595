// SPDX-License-Identifier: Apache-2.0
#include "daemon/transport/executor_check.h"

#include "proto/abi/exchange_v1.h"

namespace expertd::transport {

bool check_executor(const expertd_slot& slot, const engine::GroupShared* group, uint64_t number, TensorCheck* check) {
  const bool low_latency = slot.op == EXPERTD_OP_LL_DISPATCH || slot.op == EXPERTD_OP_LL_COMBINE;
  const bool captured = (slot.flags & EXPERTD_SLOT_CAPTURED) != 0;  // those are the daemon's kernels
  const bool expected = group != nullptr && group->settings().shape.copy_engine && low_latency && !captured;
  // Neither the client's kernels nor the daemon's copies do anything without the other.
  if (((slot.flags & EXPERTD_SLOT_COPY_ENGINE) != 0) != expected) {
    return check->refuse(EXPERTD_REASON_UNSUPPORTED, EXPERTD_ARGUMENT_FLAGS, slot.flags, 0, EXPERTD_SLOT_FLAGS_ALL);
  }
  const uint64_t buffer = expected ? number % EXPERTD_EXCHANGE_BUFFERS : 0;
  return slot.exchange_buffer == buffer ||
         check->refuse(expected ? EXPERTD_REASON_BAD_STATE : EXPERTD_REASON_DESCRIPTOR_MALFORMED,
                       EXPERTD_ARGUMENT_EXCHANGE_BUFFER, slot.exchange_buffer, buffer, buffer);
}

}  // namespace expertd::transport
