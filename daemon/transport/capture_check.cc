// SPDX-License-Identifier: Apache-2.0
#include "daemon/transport/capture_check.h"

namespace expertd::transport {

bool take_capture(const expertd_slot& slot, uint32_t lanes, TensorCheck* check, engine::Request* request) {
  if ((slot.flags & EXPERTD_SLOT_CAPTURED) == 0) {
    return slot.capture_lane == 0 ||
           check->refuse(EXPERTD_REASON_DESCRIPTOR_MALFORMED, EXPERTD_ARGUMENT_CAPTURE_LANE, slot.capture_lane, 0, 0);
  }
  // It runs when a graph is replayed, so it has no words of its slot, also when it is refused.
  request->captured = true;
  request->capture_lane = slot.capture_lane;
  if (slot.op != EXPERTD_OP_LL_DISPATCH && slot.op != EXPERTD_OP_LL_COMBINE) {
    return check->refuse(EXPERTD_REASON_UNSUPPORTED, EXPERTD_ARGUMENT_FLAGS, slot.flags, 0, EXPERTD_SLOT_FLAGS_ALL);
  }
  return slot.capture_lane < lanes || check->refuse(EXPERTD_REASON_UNSUPPORTED, EXPERTD_ARGUMENT_CAPTURE_LANE,
                                                    slot.capture_lane, 0, int64_t{lanes} - 1);
}

}  // namespace expertd::transport
