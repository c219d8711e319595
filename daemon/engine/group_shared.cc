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

#include "daemon/engine/agreement.h"
#include "daemon/engine/op_words.h"

namespace expertd::engine {

namespace {
constexpr uint32_t kNoRank = base::kMaxRanks;
}  // namespace

GroupShared::GroupShared(const GroupSettings& settings)
    : settings_(settings),
      all_ranks_(base::RankSet::first(settings.shape.ranks)),
      lost_through_(settings.shape.ranks),
      entries_(kEntries) {
  lost_.store(settings.born_lost, std::memory_order_relaxed);
  views_[0].lost.store(settings.born_lost, std::memory_order_relaxed);
  settings_.shape.placement = settings_.placement.get();
  for (uint32_t place = 0; place < places(); ++place) {
    local_ranks_.add(rank_at(place));
  }
  for (OpEntry& op : entries_) {
    op.flags.size_for(ranks());
  }
}

void GroupShared::set_lost(uint32_t rank, uint64_t through) {
  const bool holds = has_views() && !view().lost.contains(rank);
  if (holds) {
    held_.store(true, std::memory_order_seq_cst);
  }
  if (!is_local(rank) && !is_lost(rank)) {
    lost_through_[rank].store(through, std::memory_order_relaxed);  // published by the addition below
  }
  const bool fresh = lost_.add(rank, std::memory_order_seq_cst);
  if (holds) {
    held_.store(true, std::memory_order_seq_cst);  // again: install() may have let operations go in between
  }
  if (fresh && !has_views()) {
    epoch_.fetch_add(1, std::memory_order_acq_rel);
  }
}

void GroupShared::change_excluded(const base::RankSet& exclude, const base::RankSet& readmit) {
  uint64_t before = excluded_.load(std::memory_order_seq_cst);
  const auto after = [&](uint64_t ranks) { return (ranks | exclude.low()) & ~readmit.low(); };
  while (!excluded_.compare_exchange_weak(before, after(before), std::memory_order_seq_cst)) {
  }
  if (after(before) != before) {
    epoch_.fetch_add(1, std::memory_order_acq_rel);
  }
}

void GroupShared::post(uint64_t number, uint32_t rank, const Request* request) {
  OpEntry& op = entry(number);
  const uint32_t place = place_of(rank);
  op.requests[place] = request;
  op.last_posted_ns.store(request->admit_ns, std::memory_order_relaxed);
  op.last_posted.store(number << 8 | place, std::memory_order_relaxed);  // published by the store below
  outstanding_[place].store(outstanding_[place].load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  op.posted[place].store(submitted(number), std::memory_order_seq_cst);  // also publishes the request to who decides
}

int32_t GroupShared::last_to_post(uint64_t number) const {
  const uint64_t last = entry(number).last_posted.load(std::memory_order_relaxed);
  return last >> 8 == number ? static_cast<int32_t>(rank_at(last & 0xff)) : -1;
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

base::RankSet GroupShared::not_posted(uint64_t number) const {
  const OpEntry& op = entry(number);
  base::RankSet ranks_missing;
  bool any = false;
  for (uint32_t place = 0; place < places(); ++place) {
    if (op.posted[place].load(std::memory_order_seq_cst) < submitted(number)) {
      ranks_missing.add(rank_at(place));
      any = true;
    }
  }
  return any ? ranks_missing - lost() - (has_views() ? view_of(number).out() : excluded()) : ranks_missing;
}

bool GroupShared::reusable(const OpEntry& op, uint64_t decided_word) const {
  const uint64_t old_number = number_of(decided_word);
  if (old_number == 0) {
    return true;
  }
  if (tag_of(decided_word) == kDeciding || op.unfinished.load(std::memory_order_seq_cst) != 0) {
    return false;
  }
  for (uint32_t place = 0; place < places(); ++place) {
    // A lost rank reads the entry as well until its session has drained.
    const bool reads = op.posted[place].load(std::memory_order_seq_cst) >> 1 == old_number;
    if (reads && op.released[place].load(std::memory_order_seq_cst) != old_number) {
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

base::RankSet GroupShared::participants(uint64_t number, const base::RankSet& lost_ranks) const {
  const OpEntry& op = entry(number);
  base::RankSet active = all_ranks() - lost_ranks - excluded();
  for (uint32_t place = 0; place < places(); ++place) {
    if (op.posted[place].load(std::memory_order_seq_cst) > submitted(number)) {
      active.remove(rank_at(place));
    }
  }
  return active;
}

// Of a group on one node, where the places are the ranks.
bool GroupShared::agree(uint64_t number, const base::RankSet& active, Failure* failure) const {
  const OpEntry& op = entry(number);
  AgreedValues expected;
  expected.fill(kAgreesWithAny);
  std::array<uint32_t, kAgreements> first{};
  std::array<int64_t, kAgreements> other{};
  first.fill(kNoRank);
  for (uint32_t rank = 0; rank < places(); ++rank) {
    const AgreedValues given = !active.contains(rank) ? expected : agreed_values(*op.requests[rank]);
    for (uint32_t i = 0; i < kAgreements; ++i) {
      expected[i] = expected[i] == kAgreesWithAny ? given[i] : expected[i];
      if (given[i] != kAgreesWithAny && given[i] != expected[i] && first[i] == kNoRank) {
        first[i] = rank;
        other[i] = given[i];
      }
    }
  }
  // The argument that is named is the first of the list, whichever rank differs in it.
  const auto found = std::find_if(first.begin(), first.end(), [](uint32_t rank) { return rank != kNoRank; });
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
  if (now != Verdict::kOpen || held_.load(std::memory_order_seq_cst) || not_posted(number).any()) {
    return now;
  }
  if (const uint64_t at = held_at(); at != 0 && number >= at) {
    return now;
  }
  uint64_t before = 0;
  if (!claim(number, &before, changed)) {
    return verdict_of(number);
  }
  if (stops_at(number)) {
    entry(number).verdict.store(before, std::memory_order_seq_cst);
    return Verdict::kOpen;
  }
  if (has_views()) {
    return decide_in_view(number, before);
  }
  OpEntry& op = entry(number);
  const base::RankSet lost_ranks = lost();
  const base::RankSet active = participants(number, lost_ranks);
  const bool anybody_here = (active & local_ranks_).any();
  Failure failure;
  if (!anybody_here || (lost_ranks.any() && !settings_.mask_on_loss)) {
    failure = {.reason = lost_ranks.any() ? EXPERTD_REASON_PEER_LOST : EXPERTD_REASON_BAD_STATE,
               .rank = lost_ranks.lowest()};
  }
  for (uint32_t place = 0; place < places() && failure.reason == 0; ++place) {
    const uint32_t rank = rank_at(place);
    if (active.contains(rank) && op.posted[place].load(std::memory_order_acquire) < submitted(number)) {
      // A readmitted rank appeared between the check and now; the operation belongs to the older epoch.
      failure = {.reason = EXPERTD_REASON_CANCELLED, .rank = static_cast<int32_t>(rank)};
    } else if (active.contains(rank) && !spans_nodes() && op.requests[place]->rejected_reason != 0) {
      failure = {.reason = EXPERTD_REASON_PEER_REJECTED,
                 .peer_reason = op.requests[place]->rejected_reason,
                 .rank = static_cast<int32_t>(rank)};
    }
  }
  // Where the group spans nodes the parts decide about refusals and agreement, alike on all of them.
  if (!anybody_here || failure.reason != 0 || (!spans_nodes() && !agree(number, active, &failure))) {
    return publish_failure(&op, number, active, failure);
  }
  publish(&op, number, active, epoch());
  return Verdict::kLaunch;
}

Verdict GroupShared::publish_failure(OpEntry* op, uint64_t number, const base::RankSet& active,
                                     const Failure& failure) {
  op->failure = failure;
  op->active.store(active, std::memory_order_relaxed);  // published by the verdict
  op->epoch = epoch();
  op->verdict.store(word(number, kFailedTag), std::memory_order_release);
  return Verdict::kFailed;
}

void GroupShared::publish(OpEntry* op, uint64_t number, const base::RankSet& active, uint64_t epoch) {
  op->active.store(active, std::memory_order_relaxed);  // published by the verdict, as all here
  op->epoch = epoch;
  op->flags.clear();
  op->unfinished.store((active & local_ranks_).count(), std::memory_order_relaxed);
  launched_ops_.fetch_add(1, std::memory_order_relaxed);
  op->verdict.store(word(number, kLaunchTag), std::memory_order_release);
}

bool GroupShared::undecided(uint64_t number) const {
  return number_of(entry(number).verdict.load(std::memory_order_seq_cst)) < number;
}

bool GroupShared::withdraw(uint64_t number, uint32_t rank) {
  entry(number).posted[place_of(rank)].store(withdrawn(number), std::memory_order_seq_cst);
  return undecided(number);
}

bool GroupShared::ahead(uint64_t number) const {
  return number_of(entry(number).verdict.load(std::memory_order_seq_cst)) + kEntries < number;
}

// What spoke against it may have come about before nobody else could decide any more, so it is asked again then. Who
// excludes a rank can rely on it: whatever is undecided when that returns, the rank's lateness does not end. And who is
// ahead must not take the entry from the ranks that still come to the older operation.
bool GroupShared::fail(uint64_t number, const base::RankSet& ranks, const Failure& failure, bool* changed) {
  *changed = false;
  uint64_t before = 0;
  if (const uint64_t from = moved_from(); from != 0 && number >= from) {
    return false;  // it is the successor's
  }
  if (ahead(number) || !claim(number, &before, changed)) {
    return false;
  }
  OpEntry& op = entry(number);
  const bool skips = number_of(before) + kEntries < number;
  if (skips || (ranks.any() && (ranks - excluded_from(number)).empty())) {
    op.verdict.store(before, std::memory_order_seq_cst);
    return false;
  }
  (void)publish_failure(&op, number, participants(number, lost()), failure);
  return true;
}

base::RankSet GroupShared::lost_before_release(uint64_t number) const {
  const OpEntry& op = entry(number);
  base::RankSet ranks_lost = lost_behind(number, op.active.load(std::memory_order_relaxed));
  for (uint32_t place = 0; place < places() && ranks_lost.any(); ++place) {
    if (op.released[place].load(std::memory_order_acquire) == number) {
      ranks_lost.remove(rank_at(place));
    }
  }
  return ranks_lost;
}

// Of `ranks`, those that are lost, unless they are elsewhere and were through with the operation.
base::RankSet GroupShared::lost_behind(uint64_t number, const base::RankSet& ranks_asked) const {
  base::RankSet ranks_lost = lost() & ranks_asked;
  for (const uint32_t rank : ranks_lost - local_ranks_) {
    if (lost_through_[rank].load(std::memory_order_relaxed) >= number) {
      ranks_lost.remove(rank);
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
  const uint32_t place = place_of(rank);
  op.released[place].store(number, std::memory_order_seq_cst);
  outstanding_[place].store(outstanding_[place].load(std::memory_order_relaxed) - 1, std::memory_order_release);
  if (released_through(rank) < number) {  // only the rank's loop thread writes it
    released_through_[place].store(number, std::memory_order_release);
  }
  return std::any_of(op.posted.begin(), op.posted.begin() + places(), [number](const std::atomic<uint64_t>& posted) {
    return posted.load(std::memory_order_seq_cst) > withdrawn(number);
  });
}

bool GroupShared::quiet(uint32_t rank) const {
  for (const OpEntry& op : entries_) {
    const uint64_t verdict = op.verdict.load(std::memory_order_seq_cst);
    if (tag_of(verdict) == kDeciding) {
      return false;
    }
    if (tag_of(verdict) == kLaunchTag && op.active.contains(rank, std::memory_order_acquire) &&
        op.unfinished.load(std::memory_order_acquire) != 0) {
      return false;
    }
  }
  return true;
}

}  // namespace expertd::engine
