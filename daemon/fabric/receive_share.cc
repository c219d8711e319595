// SPDX-License-Identifier: Apache-2.0
#include "daemon/fabric/receive_share.h"

#include <algorithm>

namespace expertd::fabric {

bool ReceiveShare::run() {
  bool moved = false;
  while (in_flight_bytes_ < window_bytes_) {
    ShareMember* next = nullptr;
    uint64_t next_bytes = 0;
    uint64_t next_due = 0;
    for (ShareMember* member : members_) {
      const uint64_t bytes = member->waiting_bytes();
      const uint64_t due = due_of(*member);
      if (bytes != 0 && (next == nullptr || due < next_due)) {
        next = member;
        next_bytes = bytes;
        next_due = due;
      }
    }
    if (next == nullptr || (in_flight_bytes_ != 0 && next_bytes > window_bytes_ - in_flight_bytes_)) {
      return moved;
    }
    now_ = std::max(now_, next_due);
    next->due_ = next_due + cost(*next, next_bytes);
    in_flight_bytes_ += next_bytes;
    next->start_waiting();
    moved = true;
  }
  return moved;
}

}  // namespace expertd::fabric
