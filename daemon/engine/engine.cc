// SPDX-License-Identifier: Apache-2.0
#include "daemon/engine/engine.h"

#include <algorithm>
#include <iterator>

#include "daemon/engine/late_ranks.h"

namespace expertd::engine {

namespace {

void fill_from_report(const kernels::OpReport& report, expertd_completion* completion) {
  completion->reason = report.reason;
  completion->argument = report.argument;
  completion->value = report.value;
  completion->minimum = report.minimum;
  completion->maximum = report.maximum;
  completion->rank = report.rank;
  completion->recv_rows = report.recv_rows;
  completion->local_bytes = report.local_bytes;
  completion->remote_bytes = report.remote_bytes;
  completion->expert_count_entries = std::min(report.expert_count_entries, EXPERTD_COMPLETION_EXPERTS);
  std::copy_n(report.expert_counts, completion->expert_count_entries, completion->expert_counts);
}

void fill_ranks(const base::RankSet& active, expertd_completion* completion) {
  completion->rank_mask = active.low();
  std::copy(std::begin(active.words) + 1, std::end(active.words), completion->rank_mask_more);
}
static_assert(base::RankSet::kWords == 1 + EXPERTD_COMPLETION_MASK_WORDS, "all ranks have a bit in a completion");

/// Reasons with which a device ends one rank's part on its own; all others are decided alike by every rank.
bool ends_alone(uint32_t reason) {
  return reason == EXPERTD_REASON_INTERNAL || reason == EXPERTD_REASON_CUDA || reason == EXPERTD_REASON_GPU_LOST ||
         reason == EXPERTD_REASON_UNSUPPORTED;
}

void fill_from_failure(const Failure& failure, expertd_completion* completion) {
  completion->reason = failure.reason;
  completion->argument = failure.argument;
  completion->missing = failure.missing;
  completion->value = failure.value;
  completion->minimum = failure.minimum;
  completion->maximum = failure.maximum;
  completion->rank = failure.rank;
  completion->peer_reason = failure.peer_reason;
}

}  // namespace

bool EngineSession::uses(const Mapping* mapping) const {
  for (const Op& op : ops_) {
    if (op.stage == Stage::kIdle || op.stage == Stage::kDone) {
      continue;
    }
    for (const TensorView& tensor : op.request.tensors) {
      if (tensor.mapping == mapping) {
        return true;
      }
    }
  }
  return false;
}

bool EngineSession::uses(const RankState* rank) const {
  return std::any_of(ops_.begin(), ops_.end(), [rank](const Op& op) {
    return op.stage != Stage::kIdle && op.stage != Stage::kDone && op.rank == rank;
  });
}

void Engine::wake_group(const GroupShared& group) {
  for (uint32_t place = 0; place < group.places(); ++place) {
    const base::DeviceIndex device = group.settings().shape.devices[place];
    if (device != device_) {
      wake_->wake(device);
    }
  }
}

void Engine::submit(EngineSession* session, uint32_t slot, RankState* rank) {
  Op& op = session->ops_[slot];
  op.rank = rank;
  op.group = rank == nullptr ? nullptr : rank->group;
  op.number = rank == nullptr ? 0 : rank->next_number++;
  op.stage = EngineSession::Stage::kQueued;
  op.ticket = 0;
  op.part = 0;
  op.abort_sent = false;
  op.withdrawn = false;
  op.failure = Failure{};
  op.outcome.missing = 0;
  op.outcome.launch_ns = 0;
  op.outcome.start_ns = 0;
  op.outcome.end_ns = 0;
  op.outcome.exchanged = Exchanged{};
  op.agreed_ns = 0;
  session->order_[session->tail_ % EXPERTD_RING_SLOTS_MAX] = slot;
  ++session->tail_;
  ++outstanding_;
  if (rank != nullptr) {
    rank->group->post(op.number, rank->rank, &op.request);
  }
}

// A lost rank ends gathering operations of a `fail` group at once, those of a view that still has it, and running ones
// in both modes: they would wait for rows that never come. Every rank sees to that itself, but one that looks just
// while another does finds nothing to do and sleeps, so whoever did it wakes the others.
void Engine::check_loss(Op& op) {
  GroupShared& group = *op.group;
  const base::RankSet lost = group.lost();
  if (lost.empty()) {
    return;
  }
  bool changed = false;
  if (op.stage == EngineSession::Stage::kQueued) {
    const base::RankSet doomed = group.doomed_by(op.number);
    const Failure failure{.reason = EXPERTD_REASON_PEER_LOST, .rank = doomed.lowest()};
    if (doomed.any()) {
      (void)group.fail(op.number, {}, failure, &changed);
    }
  }
  if (op.stage == EngineSession::Stage::kRunning) {
    const base::RankSet missed = group.lost_before_release(op.number);
    // Where ranks are lost for good all name the lowest; under views one that is out already is no cause.
    const Failure failure{.reason = EXPERTD_REASON_PEER_LOST, .rank = (group.has_views() ? missed : lost).lowest()};
    changed = missed.any() && group.request_abort(op.number, failure);
  }
  if (changed) {
    wake_group(group);
  }
}

// Whether a rank whose deadline passed ends a gathering operation for itself alone: an excluded rank, which takes no
// part in it, and one that ran ahead of its peers while it was excluded, by so much that they still need the entry.
// Once it withdrew the rank stays out, whatever the mask becomes.
bool Engine::stands_alone(Op& op) {
  const GroupShared& group = *op.group;
  if (group.excluded_from(op.number).contains(op.rank->rank)) {
    op.failure = {.reason = EXPERTD_REASON_BAD_STATE, .rank = static_cast<int32_t>(op.rank->rank)};
    op.withdrawn = true;
  } else if (group.ahead(op.number)) {
    op.failure = {.reason = EXPERTD_REASON_TIMEOUT,
                  .missing = EXPERTD_MISSING_SUBMISSION,
                  .rank = group.not_posted(op.number).lowest()};
    op.withdrawn = true;
  }
  return op.withdrawn;
}

// What is decided about an operation by now; `alone` is set when it ended at its deadline for this rank only.
Verdict Engine::gather(Op& op, uint64_t now_ns, bool* changed, bool* alone) {
  GroupShared& group = *op.group;
  const Verdict verdict = group.try_decide(op.number, changed);
  if (verdict != Verdict::kOpen || now_ns < op.request.deadline_ns) {
    return verdict;
  }
  bool failed = false;
  if (stands_alone(op)) {
    *alone = group.withdraw(op.number, op.rank->rank);
  } else {
    const Failure late{.reason = EXPERTD_REASON_TIMEOUT,
                       .missing = EXPERTD_MISSING_SUBMISSION,
                       .rank = group.not_posted(op.number).lowest()};
    (void)group.fail(op.number, base::RankSet::one(op.rank->rank), late, &failed);
  }
  bool decided = false;
  const Verdict after = *alone ? verdict : group.try_decide(op.number, &decided);
  *changed |= failed || decided;
  return after;
}

bool Engine::advance_queued(EngineSession& session, Op& op, uint64_t now_ns) {
  if (op.rank == nullptr) {
    if (op.request.rejected_reason != 0 || session.closing_ || now_ns >= op.request.deadline_ns) {
      op.failure = {.reason = EXPERTD_REASON_TIMEOUT, .missing = EXPERTD_MISSING_DOORBELL};
      finish_unlaunched(session, op, now_ns);
      return true;
    }
    op.ticket = op.ticket != 0 ? op.ticket : ++tickets_;
    return false;
  }
  go_over(op);
  GroupShared& group = *op.group;
  const int32_t rank = static_cast<int32_t>(op.rank->rank);
  check_loss(op);
  const bool left = session.closing_ || group.is_lost(op.rank->rank);
  if (left && group.undecided(op.number)) {  // whoever decides later leaves the lost rank out
    op.failure = {.reason = EXPERTD_REASON_PEER_LOST, .rank = rank};
    finish_unlaunched(session, op, now_ns);
    return true;
  }
  bool changed = false;
  bool alone = false;
  const Verdict verdict = gather(op, now_ns, &changed, &alone);
  if (changed) {
    wake_group(group);
  }
  if (verdict == Verdict::kOpen && !alone) {
    return changed;
  }
  if (verdict == Verdict::kFailed) {
    op.failure = group.entry(op.number).failure;
  } else if (verdict == Verdict::kGone) {
    op.failure = {.reason = EXPERTD_REASON_TIMEOUT, .missing = EXPERTD_MISSING_SUBMISSION, .rank = rank};
  } else if (verdict == Verdict::kLaunch) {
    if (group.entry(op.number).active.contains(op.rank->rank, std::memory_order_relaxed)) {
      op.failure = Failure{};  // of a withdrawal that came too late
      return advance_agreed(session, op, now_ns);
    }
    // Excluded by request, or lost while its session still drains: the others run without this rank.
    op.failure = {.reason = EXPERTD_REASON_BAD_STATE, .rank = rank};
  }
  finish_unlaunched(session, op, now_ns);
  return true;
}

bool Engine::advance_agreed(EngineSession& session, Op& op, uint64_t now_ns) {
  GroupShared& group = *op.group;
  Failure abort;
  const bool late = now_ns >= op.request.deadline_ns;
  if (late) {
    group.request_abort(op.number, {.reason = EXPERTD_REASON_TIMEOUT,
                                    .missing = EXPERTD_MISSING_DOORBELL,
                                    .rank = static_cast<int32_t>(op.rank->rank)});
    wake_group(group);
  }
  // Launched it would only tell the other nodes of what cannot be, and push aside what they need next.
  const base::RankSet missed = group.has_views() ? group.lost_before_release(op.number) : base::RankSet();
  if (missed.any()) {
    group.request_abort(op.number, {.reason = EXPERTD_REASON_PEER_LOST, .rank = missed.lowest()});
  }
  if (session.closing_ || group.abort_requested(op.number, &abort)) {
    // Agreed but never launched here: this part counts as ended, the others abort theirs.
    group.request_abort(op.number, {.reason = EXPERTD_REASON_PEER_LOST, .rank = static_cast<int32_t>(op.rank->rank)});
    (void)group.abort_requested(op.number, &op.failure);
    group.part_finished(op.number);
    op.stage = EngineSession::Stage::kEnding;
    wake_group(group);
    return true;
  }
  if (op.ticket == 0) {
    op.ticket = ++tickets_;
    op.agreed_ns = now_ns;
  }
  return false;
}

// The operation is the session's next one and complete. False when it cannot be launched in this turn.
bool Engine::try_launch(EngineSession& session, Op& op, uint64_t now_ns, bool* moved) {
  if (op.rank == nullptr) {
    return launch(session, op, now_ns);
  }
  bool changed = false;
  const bool launched = op.group->page_free(op.number, &changed) && launch(session, op, now_ns);
  if (changed) {
    *moved = true;
    wake_group(*op.group);
  }
  return launched;
}

bool Engine::launch(EngineSession& session, Op& op, uint64_t now_ns) {
  LaunchSpec spec;
  spec.own = &op.request;
  if (op.rank != nullptr) {
    GroupShared& group = *op.group;
    OpEntry& entry = group.entry(op.number);
    spec.group = group.settings().shape.id;
    spec.group_op = op.number;
    spec.ranks = group.ranks();
    spec.rank = op.rank->rank;
    spec.active_ranks = entry.active.load(std::memory_order_relaxed);
    spec.epoch = static_cast<uint32_t>(entry.epoch);
    spec.page = static_cast<uint32_t>(op.number % kExchangePages);
    spec.flags = &entry.flags;
    spec.devices = group.settings().shape.devices;
    spec.placement = group.settings().placement.get();
    spec.fabric = group.settings().fabric.get();
    for (uint32_t place = 0; place < group.places(); ++place) {
      spec.requests[place] = spec.active_ranks.contains(group.rank_at(place)) ? entry.requests[place] : nullptr;
    }
  }
  const SlotWords words{session.flag_page_, op.request.slot, op.request.seq};
  if (!port_->launch(spec, words, &op.part)) {
    return false;
  }
  op.stage = EngineSession::Stage::kRunning;
  op.outcome.launch_ns = now_ns;
  return true;
}

bool Engine::advance_running(EngineSession& session, Op& op, bool may_work, uint64_t now_ns) {
  const uint64_t launch_ns = op.outcome.launch_ns;
  // What ends early is only cleared away, and others wait for that.
  if ((may_work || op.abort_sent) && port_->poll(op.part, &op.outcome)) {
    op.outcome.launch_ns = launch_ns;
    schedule_.ended(op.request.traffic, &session.share_);
    if (op.rank != nullptr) {
      if (ends_alone(op.outcome.report.reason) && !op.abort_sent) {
        // The others would wait for this rank's rows until their deadline.
        op.group->request_abort(op.number,
                                {.reason = op.outcome.report.reason, .rank = static_cast<int32_t>(op.rank->rank)});
        op.abort_sent = true;
        wake_group(*op.group);
      }
      op.group->part_finished(op.number);
      if (op.group->entry(op.number).unfinished.load(std::memory_order_acquire) == 0) {
        wake_group(*op.group);  // others may wait for the exchange page, or to complete what was aborted
      }
    }
    // An aborted operation completes only when every rank's part has ended: peers read this request until then.
    op.stage = EngineSession::Stage::kEnding;
    (void)advance_ending(session, op, now_ns);
    return true;
  }
  if (op.abort_sent) {
    return false;
  }
  if (op.rank == nullptr) {
    if (session.closing_ || now_ns >= op.request.deadline_ns) {
      op.failure = {.reason = session.closing_ ? EXPERTD_REASON_CANCELLED : EXPERTD_REASON_TIMEOUT,
                    .missing = EXPERTD_MISSING_DOORBELL};
      port_->abort(op.part, op.failure.reason);
      op.abort_sent = true;
      return true;
    }
    return false;
  }
  GroupShared& group = *op.group;
  check_loss(op);
  if (session.closing_) {
    group.request_abort(op.number, {.reason = EXPERTD_REASON_PEER_LOST, .rank = static_cast<int32_t>(op.rank->rank)});
    wake_group(group);
  } else if (now_ns >= op.request.deadline_ns) {
    base::RankSet ranks;
    const uint32_t missing = port_->missing(op.part, &ranks);
    const base::RankSet active = group.entry(op.number).active.load(std::memory_order_acquire);
    group.request_abort(op.number, late_failure(group.settings().placement.get(), active, missing, ranks));
    wake_group(group);
  }
  if (group.abort_requested(op.number, &op.failure)) {
    port_->abort(op.part, op.failure.reason);
    op.abort_sent = true;
    return true;
  }
  return false;
}

bool Engine::advance_ending(EngineSession& session, Op& op, uint64_t now_ns) {
  if (op.rank != nullptr) {
    GroupShared& group = *op.group;
    const bool aborted = op.abort_sent || op.part == 0;
    // Nothing runs on a lost GPU, and the process is about to end: the loops of the others may not come back from the
    // driver before that.
    const bool lost = op.part != 0 && op.outcome.report.reason == EXPERTD_REASON_GPU_LOST;
    if (aborted && !lost && group.entry(op.number).unfinished.load(std::memory_order_acquire) != 0) {
      return false;
    }
    if (aborted) {
      wake_group(group);
    }
  }
  if (op.part != 0 && !port_->settle(op.part)) {
    return false;
  }
  if (op.part == 0) {
    finish_unlaunched(session, op, now_ns);
  } else {
    complete(session, op, now_ns);
  }
  return true;
}

void Engine::finish_unlaunched(EngineSession& session, Op& op, uint64_t now_ns) {
  const uint32_t reason = op.request.rejected_reason != 0 ? op.request.rejected_reason : op.failure.reason;
  // Words written for nobody could arrive behind those of the slot's next operation and hold its waiter.
  if (!session.closing_ && !op.request.without_words && !op.request.captured) {
    port_->release_words({session.flag_page_, op.request.slot, op.request.seq}, reason);
  }
  complete(session, op, now_ns);
}

// Before the rank releases the operation, whose entry then may become another's.
HeldUp Engine::held_up(const Op& op) {
  HeldUp held;
  if (op.rank == nullptr || op.part == 0 || op.request.captured) {
    return held;
  }
  const GroupShared& group = *op.group;
  const Exchanged& exchanged = op.outcome.exchanged;
  held.group = group.settings().shape.id;
  held.rank = op.rank->rank;
  held.last_rank = group.last_to_post(op.number);
  // By when the last one submitted, not by when this loop saw it, whose own delays hold nobody responsible. A rank that
  // ran ahead may have written a later time.
  const uint64_t until_ns = std::min(group.last_posted_ns(op.number), op.agreed_ns);
  held.waited_ns = until_ns > op.request.admit_ns ? until_ns - op.request.admit_ns : 0;
  held.counts = exchanged.last_rank >= 0;
  held.fabric_bytes = exchanged.fabric_bytes;
  if (held.last_rank == static_cast<int32_t>(held.rank)) {
    held.waited_ns = 0;
  }
  if (held.counts && (held.last_rank < 0 || exchanged.waited_ns > held.waited_ns)) {
    held.last_rank = exchanged.last_rank;
    held.waited_ns = exchanged.waited_ns;
  }
  return held;
}

void Engine::complete(EngineSession& session, Op& op, uint64_t now_ns) {
  const HeldUp held = held_up(op);
  expertd_completion completion{};
  completion.rank = -1;
  // A refused request of a group over several nodes has a part, which tells the others.
  if (op.part != 0 && op.request.rejected_reason == 0) {
    fill_from_report(op.outcome.report, &completion);
    completion.peer_reason = op.outcome.peer_reason;
    completion.missing = op.outcome.missing;
    if (op.outcome.report.reason != 0 && op.failure.reason != 0) {
      fill_from_failure(op.failure, &completion);
      completion.recv_rows = 0;
    }
  } else if (op.request.rejected_reason != 0) {
    completion.reason = op.request.rejected_reason;  // details were written by admission beside the request
    completion.argument = op.request.rejected_argument;
    completion.value = op.request.rejected_value;
    completion.minimum = op.request.rejected_minimum;
    completion.maximum = op.request.rejected_maximum;
  } else {
    fill_from_failure(op.failure, &completion);
  }
  if (op.rank != nullptr) {
    GroupShared& group = *op.group;
    const OpEntry& entry = group.entry(op.number);
    completion.group_op = op.number;
    completion.epoch = group.settings().epoch_base + (op.part != 0 ? entry.epoch : group.epoch());
    if (op.part != 0) {
      const base::RankSet active = entry.active.load(std::memory_order_relaxed);
      fill_ranks(active, &completion);
      completion.flags |= active != group.all_ranks() ? EXPERTD_COMPLETION_DEGRADED : 0;
    }
    if (group.release(op.number, op.rank->rank)) {
      wake_group(group);
    }
  }
  completion.seq = op.request.seq;
  completion.admit_ns = op.request.admit_ns;
  completion.launch_ns = op.outcome.launch_ns;
  completion.start_ns = op.outcome.start_ns;
  completion.end_ns = op.outcome.end_ns;
  // The turn's time is that of its beginning, and the device may have seen the end since.
  completion.complete_ns = std::max(now_ns, op.outcome.end_ns);
  completion.executor = op.outcome.executor;
  completion.sms = op.outcome.sms;
  completion.capture_entry = op.request.captured ? op.outcome.capture_entry : 0;
  completion.capture_words = op.request.captured ? op.outcome.capture_words : 0;
  if (completion.reason == EXPERTD_REASON_NONE && overtakes(session, op)) {
    schedule_.overtaken();
    observer_->overtook(device_);
  }
  op.stage = EngineSession::Stage::kDone;
  --outstanding_;
  if (!session.closing_) {
    session.completions_->complete(op.request, completion);
    observer_->completed(device_, op.request, completion, held);
  }
}

void Engine::close_session(EngineSession* session, uint64_t now_ns) {
  session->closing_ = true;
  (void)run_once(now_ns);
}

bool Engine::forget_if_drained(EngineSession* session) {
  if (session->outstanding() != 0 || !port_->end_captures(session->id(), base::GroupId{})) {
    return false;
  }
  std::erase(sessions_, session);
  return true;
}

}  // namespace expertd::engine
