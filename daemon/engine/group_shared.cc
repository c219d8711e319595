// SPDX-License-Identifier: Apache-2.0
// Memory order. Mostly a word is stored with release after what it announces, and loaded with acquire. In four places
// two threads each write one word and then read the other's, and one of them must see the other; there both stores and
// both loads are seq_cst, so that they have one order, in which the read that comes last sees both writes:
//  - A rank posts operation n and then reads its verdict; another claims the entry of n for a newer operation by moving
//    the verdict word, and then reads who posted n (claim). Either the claimer sees the post and gives the entry back,
//    or the rank sees the newer number and reads nothing of the entry (kGone).
//  - A rank is marked lost, or withdraws, and then finds an operation undecided; another claims that operation and then
//    reads who is lost or withdrew (participants). Either the claimer leaves the rank out, or the rank sees the claim
//    and waits for its outcome.
//  - A change of views holds operations and then looks which were decided (hold); a rank claims an operation and then
//    looks whether they are held (decide_in_view). Either the rank gives the entry back, or the change counts it.
//  - A rank posts and then finds its operation not decidable (another has not posted, or reads the entry still); the
//    other posts or releases and then looks whether anybody waits for that. One of the two goes on, or wakes the other.
#include "daemon/engine/group_shared.h"

#include <algorithm>
#include <bit>

#include "daemon/engine/agreement.h"
#include "daemon/engine/op_words.h"

namespace expertd::engine {

namespace {

constexpr uint32_t kMaxRanks = base::kMaxLocalRanks;  // no rank
}  // namespace

GroupShared::GroupShared(const GroupSettings& settings)
    : settings_(settings), local_ranks_(all_ranks()), entries_(kEntries) {
  if (settings_.placement == nullptr) {
    return;
  }
  local_ranks_ = 0;
  for (const uint32_t rank : settings_.placement->ranks_of[settings_.placement->own_node]) {
    local_ranks_ |= 1ULL << rank;
  }
}

uint64_t GroupShared::all_ranks() const {
  return ranks() >= 64 ? ~0ULL : (1ULL << ranks()) - 1;
}

void GroupShared::set_lost(uint32_t rank, uint64_t through) {
  const uint64_t bit = 1ULL << rank;
  const bool holds = has_views() && (view().lost & bit) == 0;
  if (holds) {
    held_.store(true, std::memory_order_seq_cst);
  }
  if ((local_ranks_ & bit) == 0 && (lost() & bit) == 0) {
    lost_through_[rank].store(through, std::memory_order_relaxed);  // published by the exchange below
  }
  const bool fresh = (lost_.fetch_or(bit, std::memory_order_seq_cst) & bit) == 0;
  if (holds) {
    held_.store(true, std::memory_order_seq_cst);  // again: install() may have let operations go in between
  }
  if (fresh && !has_views()) {
    epoch_.fetch_add(1, std::memory_order_acq_rel);
  }
}

void GroupShared::change_excluded(uint64_t exclude, uint64_t readmit) {
  uint64_t before = excluded();
  while (!excluded_.compare_exchange_weak(before, (before | exclude) & ~readmit, std::memory_order_seq_cst)) {
  }
  if (((before | exclude) & ~readmit) != before) {
    epoch_.fetch_add(1, std::memory_order_acq_rel);
  }
}

void GroupShared::post(uint64_t number, uint32_t rank, const Request* request) {
  OpEntry& op = entry(number);
  op.requests[rank] = request;
  op.last_posted_ns.store(request->admit_ns, std::memory_order_relaxed);
  op.last_posted.store(number << 8 | rank, std::memory_order_relaxed);  // published by the store below
  op.posted[rank].store(submitted(number), std::memory_order_seq_cst);  // also publishes the request to who decides
}

int32_t GroupShared::last_to_post(uint64_t number) const {
  const uint64_t last = entry(number).last_posted.load(std::memory_order_relaxed);
  return last >> 8 == number ? static_cast<int32_t>(last & 0xff) : -1;
}

uint64_t GroupShared::last_posted_ns(uint64_t number) const {
  return entry(number).last_posted_ns.load(std::memory_order_relaxed);
}

Verdict GroupShared::verdict_of(uint64_t number) const {
  const uint64_t current = entry(number).verdict.load(std::memory_order_seq_cst);
  if (number_of(current) > number) {
    return Verdict::kGone;
  }
  if (number_of(current) < number || tag_of(current) == kDeciding) {
    return Verdict::kOpen;
  }
  return tag_of(current) == kLaunchTag ? Verdict::kLaunch : Verdict::kFailed;
}

uint64_t GroupShared::not_posted(uint64_t number) const {
  const OpEntry& op = entry(number);
  uint64_t ranks_missing = 0;
  const uint64_t inactive = lost() | (has_views() ? view_of(number).out() : excluded()) | ~local_ranks_;
  for (uint32_t rank = 0; rank < ranks(); ++rank) {
    if ((inactive >> rank & 1) == 0 && op.posted[rank].load(std::memory_order_seq_cst) < submitted(number)) {
      ranks_missing |= 1ULL << rank;
    }
  }
  return ranks_missing;
}

bool GroupShared::reusable(const OpEntry& op, uint64_t decided_word) const {
  const uint64_t old_number = number_of(decided_word);
  if (old_number == 0) {
    return true;
  }
  if (tag_of(decided_word) == kDeciding || op.unfinished.load(std::memory_order_seq_cst) != 0) {
    return false;
  }
  for (uint32_t rank = 0; rank < ranks(); ++rank) {
    // A lost rank reads the entry as well until its session has drained.
    const bool reads = op.posted[rank].load(std::memory_order_seq_cst) >> 1 == old_number;
    if (reads && op.released[rank].load(std::memory_order_seq_cst) != old_number) {
      return false;
    }
  }
  return true;
}

// Whoever wins owns the entry and everything in it until it publishes a verdict. A rank that the others do not wait for
// may post the older operation between the look at the entry and the exchange, and then reads it; so the winner looks
// again, and who posts after that look sees the newer number. Nothing of the entry was written when it is given back.
bool GroupShared::claim(uint64_t number, uint64_t* before, bool* changed) {
  OpEntry& op = entry(number);
  *before = op.verdict.load(std::memory_order_seq_cst);
  if (number_of(*before) >= number || !reusable(op, *before) ||
      !op.verdict.compare_exchange_strong(*before, word(number, kDeciding), std::memory_order_seq_cst)) {
    return false;
  }
  *changed = true;
  if (reusable(op, *before)) {
    return true;
  }
  op.verdict.store(*before, std::memory_order_seq_cst);
  return false;
}

uint64_t GroupShared::participants(uint64_t number, uint64_t lost_ranks) const {
  const OpEntry& op = entry(number);
  uint64_t active = all_ranks() & ~(lost_ranks | excluded());
  for (uint32_t rank = 0; rank < ranks(); ++rank) {
    if (op.posted[rank].load(std::memory_order_seq_cst) > submitted(number)) {
      active &= ~(1ULL << rank);
    }
  }
  return active;
}

bool GroupShared::agree(uint64_t number, uint64_t active, Failure* failure) const {
  const OpEntry& op = entry(number);
  AgreedValues expected;
  expected.fill(kAgreesWithAny);
  std::array<uint32_t, kAgreements> first{};
  std::array<int64_t, kAgreements> other{};
  first.fill(kMaxRanks);
  for (uint32_t rank = 0; rank < ranks(); ++rank) {
    const AgreedValues given = (active >> rank & 1) == 0 ? expected : agreed_values(*op.requests[rank]);
    for (uint32_t i = 0; i < kAgreements; ++i) {
      expected[i] = expected[i] == kAgreesWithAny ? given[i] : expected[i];
      if (given[i] != kAgreesWithAny && given[i] != expected[i] && first[i] == kMaxRanks) {
        first[i] = rank;
        other[i] = given[i];
      }
    }
  }
  // The argument that is named is the first of the list, whichever rank differs in it.
  const auto found = std::find_if(first.begin(), first.end(), [](uint32_t rank) { return rank != kMaxRanks; });
  if (found == first.end()) {
    return true;
  }
  const auto index = static_cast<uint32_t>(found - first.begin());
  *failure = {.reason = EXPERTD_REASON_OP_MISMATCH,
              .argument = agreed_argument(index),
              .rank = static_cast<int32_t>(*found),
              .value = other[index],
              .minimum = expected[index],
              .maximum = expected[index]};
  return false;
}

Verdict GroupShared::try_decide(uint64_t number, bool* changed) {
  *changed = false;
  const Verdict now = verdict_of(number);
  if (now != Verdict::kOpen || held_.load(std::memory_order_seq_cst) || not_posted(number) != 0) {
    return now;
  }
  uint64_t before = 0;
  if (!claim(number, &before, changed)) {
    return verdict_of(number);
  }
  if (has_views()) {
    return decide_in_view(number, before);
  }
  OpEntry& op = entry(number);
  const uint64_t lost_ranks = lost();
  const uint64_t active = participants(number, lost_ranks);
  const uint64_t here = active & local_ranks_;
  Failure failure;
  if (here == 0 || (lost_ranks != 0 && !settings_.mask_on_loss)) {
    failure = {.reason = lost_ranks != 0 ? EXPERTD_REASON_PEER_LOST : EXPERTD_REASON_BAD_STATE,
               .rank = lost_ranks != 0 ? std::countr_zero(lost_ranks) : -1};
  }
  for (uint32_t rank = 0; rank < ranks() && failure.reason == 0; ++rank) {
    if ((here >> rank & 1) != 0 && op.posted[rank].load(std::memory_order_acquire) < submitted(number)) {
      // A readmitted rank appeared between the check and now; the operation belongs to the older epoch.
      failure = {.reason = EXPERTD_REASON_CANCELLED, .rank = static_cast<int32_t>(rank)};
    } else if ((here >> rank & 1) != 0 && !spans_nodes() && op.requests[rank]->rejected_reason != 0) {
      failure = {.reason = EXPERTD_REASON_PEER_REJECTED,
                 .peer_reason = op.requests[rank]->rejected_reason,
                 .rank = static_cast<int32_t>(rank)};
    }
  }
  // Where the group spans nodes the parts decide about refusals and agreement, alike on all of them.
  if (here == 0 || failure.reason != 0 || (!spans_nodes() && !agree(number, active, &failure))) {
    return publish_failure(&op, number, active, failure);
  }
  publish(&op, number, active, epoch());
  return Verdict::kLaunch;
}

Verdict GroupShared::publish_failure(OpEntry* op, uint64_t number, uint64_t active, const Failure& failure) {
  op->failure = failure;
  op->active = active;
  op->epoch = epoch();
  op->verdict.store(word(number, kFailedTag), std::memory_order_release);
  return Verdict::kFailed;
}

void GroupShared::publish(OpEntry* op, uint64_t number, uint64_t active, uint64_t epoch) {
  op->active = active;
  op->epoch = epoch;
  op->flags.routed.store(0, std::memory_order_relaxed);
  op->flags.moved.store(0, std::memory_order_relaxed);
  op->unfinished.store(static_cast<uint32_t>(std::popcount(active & local_ranks_)), std::memory_order_relaxed);
  launched_ops_.fetch_add(1, std::memory_order_relaxed);
  op->verdict.store(word(number, kLaunchTag), std::memory_order_release);
}

bool GroupShared::undecided(uint64_t number) const {
  return number_of(entry(number).verdict.load(std::memory_order_seq_cst)) < number;
}

bool GroupShared::withdraw(uint64_t number, uint32_t rank) {
  entry(number).posted[rank].store(withdrawn(number), std::memory_order_seq_cst);
  return undecided(number);
}

bool GroupShared::ahead(uint64_t number) const {
  return number_of(entry(number).verdict.load(std::memory_order_seq_cst)) + kEntries < number;
}

// What spoke against it may have come about before nobody else could decide any more, so it is asked again then. Who
// excludes a rank can rely on it: whatever is undecided when that returns, the rank's lateness does not end. And who is
// ahead must not take the entry from the ranks that still come to the older operation.
bool GroupShared::fail(uint64_t number, uint64_t ranks, const Failure& failure, bool* changed) {
  *changed = false;
  uint64_t before = 0;
  if (ahead(number) || !claim(number, &before, changed)) {
    return false;
  }
  OpEntry& op = entry(number);
  const bool skips = number_of(before) + kEntries < number;
  if (skips || (ranks != 0 && (ranks & ~excluded_from(number)) == 0)) {
    op.verdict.store(before, std::memory_order_seq_cst);
    return false;
  }
  (void)publish_failure(&op, number, participants(number, lost()), failure);
  return true;
}

uint64_t GroupShared::lost_before_release(uint64_t number) const {
  const OpEntry& op = entry(number);
  uint64_t ranks_lost = lost_behind(number, op.active);
  for (uint32_t rank = 0; rank < ranks() && ranks_lost != 0; ++rank) {
    if ((local_ranks_ >> rank & 1) != 0 && op.released[rank].load(std::memory_order_acquire) == number) {
      ranks_lost &= ~(1ULL << rank);
    }
  }
  return ranks_lost;
}

// Of `ranks`, those that are lost, unless they are elsewhere and were through with the operation.
uint64_t GroupShared::lost_behind(uint64_t number, uint64_t ranks_asked) const {
  uint64_t ranks_lost = lost() & ranks_asked;
  for (uint64_t left = ranks_lost & ~local_ranks_; left != 0; left &= left - 1) {
    if (lost_through_[static_cast<uint32_t>(std::countr_zero(left))].load(std::memory_order_relaxed) >= number) {
      ranks_lost &= ~(left & (~left + 1));
    }
  }
  return ranks_lost;
}

bool GroupShared::request_abort(uint64_t number, const Failure& failure) {
  OpEntry& op = entry(number);
  uint64_t claimed = op.abort_claim.load(std::memory_order_acquire);
  if (claimed >= number || !op.abort_claim.compare_exchange_strong(claimed, number, std::memory_order_acq_rel)) {
    return false;
  }
  op.abort_failure = failure;
  op.abort_number.store(number, std::memory_order_release);
  return true;
}

bool GroupShared::abort_requested(uint64_t number, Failure* failure) const {
  const OpEntry& op = entry(number);
  if (op.abort_number.load(std::memory_order_acquire) != number) {
    return false;
  }
  *failure = op.abort_failure;
  return true;
}

bool GroupShared::page_free(uint64_t number, bool* changed) {
  *changed = false;
  // An operation that failed before its launch never waited for the page, so older users of the page count as well.
  const uint64_t pages = settings_.exchange_pages;
  for (uint64_t back = pages; back < kEntries && back < number; back += pages) {
    // One that some ranks withdrew from, and that the others are lost for, has nobody else left to decide it.
    bool decided = false;
    const Verdict verdict = try_decide(number - back, &decided);
    *changed |= decided;
    if (verdict == Verdict::kOpen ||
        (verdict == Verdict::kLaunch && entry(number - back).unfinished.load(std::memory_order_acquire) != 0)) {
      return false;
    }
  }
  return true;
}

void GroupShared::part_finished(uint64_t number) {
  entry(number).unfinished.fetch_sub(1, std::memory_order_seq_cst);
}

bool GroupShared::release(uint64_t number, uint32_t rank) {
  OpEntry& op = entry(number);
  op.released[rank].store(number, std::memory_order_seq_cst);
  if (released_through(rank) < number) {  // only the rank's loop thread writes it
    released_through_[rank].store(number, std::memory_order_release);
  }
  return std::any_of(op.posted.begin(), op.posted.begin() + ranks(), [number](const std::atomic<uint64_t>& posted) {
    return posted.load(std::memory_order_seq_cst) > withdrawn(number);
  });
}

bool GroupShared::quiet(uint32_t rank) const {
  for (const OpEntry& op : entries_) {
    const uint64_t verdict = op.verdict.load(std::memory_order_seq_cst);
    if (tag_of(verdict) == kDeciding) {
      return false;
    }
    if (tag_of(verdict) == kLaunchTag && (op.active >> rank & 1) != 0 &&
        op.unfinished.load(std::memory_order_acquire) != 0) {
      return false;
    }
  }
  return true;
}

}  // namespace expertd::engine
