// SPDX-License-Identifier: Apache-2.0
// GroupShared that goes on as another: the operation it stops at, and what is left of it then.
#include <algorithm>
#include <utility>

#include "daemon/engine/group_shared.h"
#include "daemon/engine/op_words.h"

namespace expertd::engine {

void GroupShared::go_over_to(std::shared_ptr<GroupShared> successor) {
  successor_ = std::move(successor);
  at_.store(0, std::memory_order_seq_cst);
  goes_over_.store(true, std::memory_order_seq_cst);
}

void GroupShared::stay() {
  goes_over_.store(false, std::memory_order_seq_cst);
}

uint64_t GroupShared::last_decided() const {
  uint64_t last = 0;
  for (const OpEntry& op : entries_) {
    last = std::max(last, number_of(op.verdict.load(std::memory_order_seq_cst)));
  }
  return last;
}

// All ranks of this node that take part submitted it as something that begins. A rank that is excluded by request is
// not in step, so nobody is moved while there is one.
bool GroupShared::begins(uint64_t number) const {
  const OpEntry& op = entry(number);
  const base::RankSet here = local_ranks() - lost();
  if (here.empty() || excluded().any()) {
    return false;
  }
  for (const uint32_t rank : here) {
    const uint32_t place = place_of(rank);
    if (op.posted[place].load(std::memory_order_seq_cst) != submitted(number) || !op.requests[place]->begins) {
      return false;
    }
  }
  return true;
}

// The caller has the claim on `number` and gives it back when this is true. Another rank may be deciding a later
// operation just now: it claims that before it looks at at_, and this looks for such a claim after at_ was set, so one
// of the two sees the other.
bool GroupShared::stops_at(uint64_t number) {
  if (!goes_over_.load(std::memory_order_seq_cst)) {
    return false;
  }
  if (const uint64_t at = at_.load(std::memory_order_seq_cst); at != 0) {
    return number >= at;
  }
  uint64_t none = 0;
  if (number < not_before_.load(std::memory_order_seq_cst) || !begins(number) ||
      !at_.compare_exchange_strong(none, number, std::memory_order_seq_cst)) {
    return false;
  }
  if (last_decided() > number) {
    at_.store(0, std::memory_order_seq_cst);
    return false;
  }
  if (!has_views()) {
    move_over(number);
  }
  return true;
}

// What is before it and not decided yet is decided in the view that was.
void GroupShared::move_over(uint64_t from) {
  at_.store(from, std::memory_order_seq_cst);
  moved_from_.store(from, std::memory_order_seq_cst);
  held_.store(false, std::memory_order_seq_cst);
}

void GroupShared::take_back(uint32_t rank) {
  gone_over_[place_of(rank)].store(true, std::memory_order_release);
  outstanding_[place_of(rank)].store(outstanding_[place_of(rank)].load(std::memory_order_relaxed) - 1,
                                     std::memory_order_release);
}

bool GroupShared::has_gone_over(uint32_t rank) const {
  return gone_over_[place_of(rank)].load(std::memory_order_acquire) &&
         outstanding_[place_of(rank)].load(std::memory_order_acquire) == 0;
}

}  // namespace expertd::engine
