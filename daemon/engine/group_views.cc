// SPDX-License-Identifier: Apache-2.0
// GroupShared where masks are agreed on with other nodes: which view an operation belongs to, and deciding it in that.
#include <algorithm>

#include "daemon/engine/group_shared.h"
#include "daemon/engine/op_words.h"

namespace expertd::engine {

View GroupShared::read(const KeptView& kept) {
  return {kept.epoch.load(std::memory_order_relaxed), kept.from.load(std::memory_order_relaxed),
          kept.lost.load(std::memory_order_relaxed), kept.excluded.load(std::memory_order_relaxed)};
}

// The latest is there as long as no 64 others are installed while it is read; then it is read anew.
View GroupShared::view() const {
  for (;;) {
    const uint64_t there = views_there_.load(std::memory_order_acquire);
    const KeptView& kept = views_[(there - 1) % kViewsKept];
    const View view = read(kept);
    std::atomic_thread_fence(std::memory_order_acquire);
    if (views_begun_.load(std::memory_order_relaxed) < there + kViewsKept) {
      return view;
    }
  }
}

// An operation of a view that is not kept any more has nobody.
View GroupShared::view_of(uint64_t number) const {
  const uint64_t there = views_there_.load(std::memory_order_acquire);
  for (uint64_t at = there; at != 0 && at + kViewsKept > there; --at) {
    const KeptView& kept = views_[(at - 1) % kViewsKept];
    const View view = read(kept);
    std::atomic_thread_fence(std::memory_order_acquire);
    if (views_begun_.load(std::memory_order_relaxed) >= at + kViewsKept) {
      break;
    }
    if (view.from <= number) {
      return view;
    }
  }
  return {.epoch = 0, .from = 0, .lost = all_ranks(), .excluded = {}};
}

uint64_t GroupShared::hold() {
  held_.store(true, std::memory_order_seq_cst);
  uint64_t last = 0;
  for (const OpEntry& op : entries_) {
    last = std::max(last, number_of(op.verdict.load(std::memory_order_seq_cst)));
  }
  return last;
}

void GroupShared::install(const View& view, bool held) {
  const uint64_t there = views_there_.load(std::memory_order_relaxed) + 1;
  views_begun_.store(there, std::memory_order_relaxed);
  std::atomic_thread_fence(std::memory_order_release);
  KeptView& kept = views_[(there - 1) % kViewsKept];
  kept.epoch.store(view.epoch, std::memory_order_relaxed);
  kept.from.store(view.from, std::memory_order_relaxed);
  kept.lost.store(view.lost, std::memory_order_relaxed);
  kept.excluded.store(view.excluded, std::memory_order_relaxed);
  views_there_.store(there, std::memory_order_release);
  epoch_.store(view.epoch, std::memory_order_release);
  not_before_.store(view.from, std::memory_order_seq_cst);  // some node may have passed what this one held at
  at_.store(0, std::memory_order_seq_cst);
  lost_.add(view.lost, std::memory_order_seq_cst);
  held_.store(false, std::memory_order_seq_cst);
  if (held || (lost() - view.lost).any() || views_ended_.load(std::memory_order_seq_cst)) {
    held_.store(true, std::memory_order_seq_cst);
  }
}

void GroupShared::end_views() {
  views_ended_.store(true, std::memory_order_seq_cst);
  held_.store(true, std::memory_order_seq_cst);
  lost_.add(all_ranks() - local_ranks_, std::memory_order_seq_cst);
}

base::RankSet GroupShared::doomed_by(uint64_t number) const {
  if (!has_views()) {
    return settings_.mask_on_loss ? base::RankSet() : lost();
  }
  if (views_ended_.load(std::memory_order_seq_cst)) {
    return lost();
  }
  // As long as no later view is there the next one may leave out whoever is lost.
  return number < view().from ? lost_behind(number, all_ranks() - view_of(number).out()) : base::RankSet();
}

// The claim is given back while operations are held, and to a rank that the view of a moment ago did not wait for.
Verdict GroupShared::decide_in_view(uint64_t number, uint64_t before) {
  OpEntry& op = entry(number);
  if (held_.load(std::memory_order_seq_cst) || not_posted(number).any()) {
    op.verdict.store(before, std::memory_order_seq_cst);
    return Verdict::kOpen;
  }
  const View view = view_of(number);
  const base::RankSet active = all_ranks() - view.out();
  const base::RankSet lost_ranks = view.epoch == 0 ? view.lost : lost_behind(number, active);
  bool anybody_here = false;
  int32_t withdrew = -1;  // the lowest that did, by a deadline, while it was excluded or too far ahead
  for (uint32_t place = 0; place < places(); ++place) {
    if (active.contains(rank_at(place))) {
      anybody_here = true;
      const bool out = op.posted[place].load(std::memory_order_seq_cst) > submitted(number);
      withdrew = withdrew < 0 && out ? static_cast<int32_t>(rank_at(place)) : withdrew;
    }
  }
  Failure failure;
  if (lost_ranks.any()) {
    failure = {.reason = EXPERTD_REASON_PEER_LOST, .rank = lost_ranks.lowest()};
  } else if (!anybody_here) {
    failure = {.reason = EXPERTD_REASON_BAD_STATE};
  } else if (withdrew >= 0) {
    failure = {.reason = EXPERTD_REASON_TIMEOUT, .missing = EXPERTD_MISSING_SUBMISSION, .rank = withdrew};
  }
  if (failure.reason != 0) {
    return publish_failure(&op, number, active, failure);
  }
  publish(&op, number, active, view.epoch);
  return Verdict::kLaunch;
}

}  // namespace expertd::engine
