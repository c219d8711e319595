// SPDX-License-Identifier: Apache-2.0
// ViewChange of a group that is to go on as its successor: where the nodes hold, and whether they can move over there.
#include <algorithm>

#include "daemon/engine/view_change.h"

namespace expertd::engine {

void ViewChange::ready(uint64_t at, uint64_t last, uint64_t now_ns) {
  Readiness& own = ready_of_[placement_.own_node];
  tell_ready_ns_ = own.at != at || !ready_ ? now_ns : tell_ready_ns_;
  ready_ = true;
  own = {true, at, last};
  advance(now_ns);
}

void ViewChange::tell_returned() {
  send_to(~uint64_t{0}, message_of(ViewKind::kReady));
}

// The coordinator hears where the others hold, also those that hold nowhere, and begins the change.
void ViewChange::tend_ready(uint64_t now_ns) {
  if (!ready_) {
    return;
  }
  const uint32_t own = placement_.own_node;
  if (coordinator() == own) {
    const uint64_t at = ready_of_[own].at;
    asked_ = (at != 0 && all_hold_at(living(), at)) || hold_apart();
    tell_ready_ns_ = now_ns + options_.retry_ns;
  } else if (now_ns >= tell_ready_ns_) {
    tell_ready_ns_ = now_ns + options_.retry_ns;
    ViewMessage message = message_of(ViewKind::kReady);
    message.ballot = ready_of_[own].last;
    message.accepted = ready_of_[own].at;
    send_to(uint64_t{1} << coordinator(), message);
  }
}

bool ViewChange::all_hold_at(uint64_t nodes, uint64_t at) const {
  for (uint32_t node = 0; node < placement_.nodes(); ++node) {
    if ((nodes >> node & 1) != 0 && (!ready_of_[node].told || ready_of_[node].at != at)) {
      return false;
    }
  }
  return true;
}

// One holds at an operation that another is through with: it would wait for this node's part for ever.
bool ViewChange::hold_apart() const {
  uint64_t lowest = UINT64_MAX;
  uint64_t last = 0;
  for (uint32_t node = 0; node < placement_.nodes(); ++node) {
    const Readiness& told = ready_of_[node];
    lowest = told.at != 0 ? std::min(lowest, told.at) : lowest;
    last = std::max(last, told.last);
  }
  return last >= lowest;
}

// What was accepted, or else the operation that this node holds at: it stays there until the change has ended.
ViewValue ViewChange::promised_value() const {
  ViewValue value = accepted_value_;
  if (accepted_ == 0) {
    value = ViewValue{};
    value.made = ready_ ? ready_of_[placement_.own_node].at : 0;
  }
  return value;
}

bool ViewChange::promised_to_move(uint64_t nodes, uint64_t from) const {
  for (uint32_t node = 0; node < placement_.nodes(); ++node) {
    const Promise& promise = promise_of_[node];
    if ((nodes >> node & 1) != 0 && (promise.accepted != 0 || promise.value.made != from)) {
      return false;
    }
  }
  return true;
}

}  // namespace expertd::engine
