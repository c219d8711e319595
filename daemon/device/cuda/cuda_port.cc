// SPDX-License-Identifier: Apache-2.0
// The loop thread's side of a GPU: takes parts, watches their `done` words, ends them early.
//
// Ending early. abort() sends, over the rescue stream, the part's number into its abort word and then the abort value
// into the doorbell and exchange words that the chain waits for; the rest of the chain runs as no-ops and finish
// settles the verdict. A finish that had decided before the abort word came stays a normal end. After both the
// chain drained and the rescue was seen (so that no late write can follow), the same stream puts the words back:
// doorbell = seq, exchange words = n; only then poll() reports the part, so a page or slot is never used again while a
// write to it is under way. The result and completion word of an aborted part follow with settle(), when the peers'
// parts have ended too: until then they may write its outputs, and the caller's stream must not go on. A slot's
// doorbell is not rung again before its ring completion was written, which the ring protocol gives.
#include <algorithm>
#include <atomic>

#include "daemon/base/clock.h"
#include "daemon/device/cuda/cuda_device.h"
#include "daemon/device/cuda/host_word.h"
#include "daemon/device/cuda/word_batch.h"
#include "proto/abi/ring_v1.h"

namespace expertd::device::cuda {
namespace {

constexpr uint64_t kHealthIntervalNs = 10'000'000;

}  // namespace

kernels::cuda::PartFacts* CudaDevice::host_facts(engine::PartId part) const {
  return static_cast<kernels::cuda::PartFacts*>(facts_->host()) + part % kMaxPartsInFlight;
}

kernels::cuda::PartFacts* CudaDevice::device_facts(engine::PartId part) const {
  return reinterpret_cast<kernels::cuda::PartFacts*>(facts_->device()) + part % kMaxPartsInFlight;
}

kernels::cuda::PartState* CudaDevice::part_state(engine::PartId part) const {
  return reinterpret_cast<kernels::cuda::PartState*>(states_->address()) + part % kMaxPartsInFlight;
}

CudaDevice::Part* CudaDevice::take_part() {
  for (uint32_t i = 0; i < kMaxPartsInFlight; ++i) {
    if (parts_[i].id == 0) {
      parts_[i] = Part{};
      parts_[i].id = next_part_++ * kMaxPartsInFlight + i;
      return &parts_[i];
    }
  }
  return nullptr;
}

bool CudaDevice::is_exchanging(base::GroupId group) const {
  const GroupEntry* entry = groups_.find(group.value);
  return entry != nullptr && entry->nodes != nullptr && entry->nodes->is_open();
}

/// Whether the session's stream may have the part now.
bool CudaDevice::has_room(const engine::LaunchSpec& spec, const SessionEntry* session) const {
  if (session != nullptr && session->queued_entries + entries_of(spec) > kMaxStreamEntries) {
    return false;
  }
  if (session != nullptr && session->open_part != 0) {
    return false;  // the rest of a chain is still to come, and nothing may stand in front of it
  }
  return spec.placement == nullptr || !is_exchanging(spec.group);  // one operation over several nodes at a time
}

bool CudaDevice::launch(const engine::LaunchSpec& spec, const engine::SlotWords& words, engine::PartId* part) {
  SessionEntry* session = sessions_.find(spec.own->session.value);
  if (!has_room(spec, session)) {
    return false;
  }
  launch_refused_ = !gpu_.view.gate->try_enter();
  if (launch_refused_) {
    return false;  // a mapping is being closed
  }
  Part* slot = parts_in_flight_ < kMaxPartsInFlight ? take_part() : nullptr;
  if (slot == nullptr) {
    gpu_.view.gate->leave();
    return false;
  }
  ++parts_in_flight_;
  *part = slot->id;
  *host_facts(slot->id) = {};
  slot->launch_ns = base::now_ns();
  slot->words = words;
  slot->session = session;
  slot->group = spec.group.value == 0 ? nullptr : groups_.find(spec.group.value);
  slot->waits_doorbell = words.flag_page != nullptr && !spec.own->doorbell_rung;
  slot->group_op = spec.group_op;
  slot->ranks = slot->group == nullptr ? 0 : spec.ranks;
  slot->rank = spec.rank;
  slot->active_ranks = spec.active_ranks.low();
  slot->flag_ranks = spec.active_ranks.low();
  if (session == nullptr || words.slot >= EXPERTD_RING_SLOTS_MAX ||
      (spec.group.value != 0 && (slot->group == nullptr || slot->group->shape.rank != spec.rank ||
                                 slot->group->shape.ranks != spec.ranks || spec.page >= engine::kExchangePages))) {
    fail_launch(slot, EXPERTD_REASON_INTERNAL);
    return true;
  }
  if (slot->group != nullptr) {
    std::copy_n(spec.devices.begin(), spec.ranks, slot->devices.begin());
  }
  if (spec.placement != nullptr) {
    return launch_nodes(spec, slot);
  }
  if (spec.own->captured) {
    capture(spec, slot);
    return true;
  }
  if (takes_copies(spec)) {
    return launch_copies(spec, slot);
  }
  if (slot->group != nullptr) {
    slot->page = slot->group->sync_page(spec.page);
  }
  kernels::cuda::PartParams params{};
  const bool filled = fill_params(spec, slot, &params);
  if (slot->group != nullptr) {
    slot->group->last_op = spec.group_op;
    slot->group->last_active = spec.active_ranks.low();
  }
  if (!filled) {
    fail_launch(slot, EXPERTD_REASON_UNSUPPORTED);
    return true;
  }
  const ScopedContext context(driver_, gpu_.view.context);
  slot->sms = sms_of(*slot, params);
  slot->entries = kEntriesPerPart;
  session->queued_entries += slot->entries;
  if (!enqueue_chain(*slot, params)) {
    slot->chain_broken = true;
    fail_launch(slot, EXPERTD_REASON_CUDA);
  }
  return true;
}

/// The part ends without its chain, or with a piece of it: release what may wait and report `reason`.
void CudaDevice::fail_launch(Part* part, uint32_t reason) {
  part->end_reason = reason;
  if (part->chain_broken) {
    send_rescue(part);
    return;
  }
  part->waits_doorbell = false;  // nothing was enqueued: only the caller's words are to be written
  part->page = nullptr;
  part->rescue_sent = true;
  host_facts(part->id)->rescued = part->id;
  host_facts(part->id)->done = part->id;
  host_facts(part->id)->verdict = kernels::cuda::kVerdictAborted;
}

void CudaDevice::send_rescue(Part* part) {
  WordBatch batch;
  batch.write(&part_state(part->id)->aborted_part, part->id);
  if (part->copies) {
    part->ht ? void_ht(*part, &batch) : void_copies(*part, &batch);  // before anything is released
  }
  if (part->waits_doorbell) {
    batch.write(word_at(part->words.flag_page, EXPERTD_DOORBELL_OFFSET(part->words.slot)), EXPERTD_ABORT_WORD);
  }
  for (uint32_t s = 0; part->page != nullptr && s < part->ranks; ++s) {
    if (s != part->rank && ((part->active_ranks >> s) & 1) != 0) {
      batch.write(&part->page->routed[s], EXPERTD_ABORT_WORD);
      batch.write(&part->page->counted[s], EXPERTD_ABORT_WORD);
      batch.write(&part->page->moved[s], EXPERTD_ABORT_WORD);
    }
  }
  if (part->ht) {
    batch.write_ht_client(part->words, EXPERTD_ABORT_WORD);
  } else if (part->copies) {
    batch.write_steps(part->words, part->ranks, EXPERTD_ABORT_WORD);
    batch.write_client_steps(part->words, EXPERTD_ABORT_WORD);
  }
  batch.write(&device_facts(part->id)->rescued, part->id);
  const ScopedContext context(driver_, gpu_.view.context);
  part->rescue_sent = batch.send(driver_, rescue_stream_);
}

/// Puts the words as a normal end leaves them, but for those of an aborted part's caller.
void CudaDevice::send_restore(Part* part) {
  WordBatch batch;
  if (part->waits_doorbell) {
    batch.write(word_at(part->words.flag_page, EXPERTD_DOORBELL_OFFSET(part->words.slot)), part->words.seq);
  }
  for (uint32_t s = 0; part->page != nullptr && s < part->ranks; ++s) {
    if (s != part->rank && ((part->active_ranks >> s) & 1) != 0) {
      batch.write(&part->page->routed[s], part->group_op);
      batch.write(&part->page->counted[s], part->group_op);
      batch.write(&part->page->moved[s], part->group_op);
    }
  }
  if (part->ht) {
    batch.write_ht_client(part->words, part->words.seq);
  } else if (part->copies) {
    batch.write_client_steps(part->words, part->words.seq);
  }
  batch.write(&device_facts(part->id)->restored, part->id);
  const ScopedContext context(driver_, gpu_.view.context);
  part->restore_sent = batch.send(driver_, rescue_stream_);
}

/// Lets the caller's stream go of an aborted part.
void CudaDevice::send_words(Part* part) {
  WordBatch batch;
  if (part->words.flag_page != nullptr && part->words.slot < EXPERTD_RING_SLOTS_MAX) {
    batch.write(word_at(part->words.flag_page, EXPERTD_RESULT_WORD_OFFSET(part->words.slot)), part->end_reason);
    batch.write(word_at(part->words.flag_page, EXPERTD_COMPLETION_WORD_OFFSET(part->words.slot)), part->words.seq);
    if (part->ht) {
      batch.write_ht_daemon(part->words);
    } else if (part->copies) {
      batch.write_steps(part->words, part->ranks, part->words.seq);
    }
  }
  batch.write(&device_facts(part->id)->settled, part->id);
  const ScopedContext context(driver_, gpu_.view.context);
  part->words_sent = batch.send(driver_, rescue_stream_);
}

bool CudaDevice::settle(engine::PartId id) {
  Part& part = parts_[id % kMaxPartsInFlight];
  if (part.id != id || id == 0 || !part.words_owed) {
    return true;
  }
  check_health();
  if (healthy_.load(std::memory_order_relaxed)) {
    if (!part.words_sent) {
      send_words(&part);
    }
    if (load_word(host_facts(id)->settled) != id) {
      return false;
    }
  }
  free_part(&part);
  return true;
}

bool CudaDevice::chain_drained(const Part& part) {
  if (load_word(host_facts(part.id)->done) == part.id) {
    return true;
  }
  if (!part.chain_broken) {
    return false;
  }
  const ScopedContext context(driver_, gpu_.view.context);
  return driver_.cuStreamQuery(part.session->stream) != CUDA_ERROR_NOT_READY;
}

bool CudaDevice::poll(engine::PartId id, engine::Outcome* outcome) {
  Part& part = parts_[id % kMaxPartsInFlight];
  if (part.id != id || id == 0 || part.words_owed) {
    *outcome = {};
    outcome->report.reason = EXPERTD_REASON_INTERNAL;
    return true;
  }
  check_health();
  const bool lost = !healthy_.load(std::memory_order_relaxed);
  if (lost) {
    part.end_reason = EXPERTD_REASON_GPU_LOST;
    report_part(part, outcome);
    free_part(&part);
    return true;
  }
  if (part.end_reason == 0 && part.nodes_open) {
    advance_nodes(&part);
  } else if (part.end_reason == 0 && ht_is_open(part)) {
    advance_ht(&part);
  } else if (part.end_reason != 0 && !part.nodes) {
    close_ht(&part);
  }
  if (part.end_reason != 0 && part.nodes && !close_nodes(&part)) {
    return false;
  }
  if (!chain_drained(part)) {
    if (part.end_reason != 0 && !part.rescue_sent) {
      send_rescue(&part);
    }
    return false;
  }
  drop_nodes(part);
  if (part.end_reason == 0 && ht_is_voided(part)) {
    return false;  // until its own abort
  }
  if (part.copies) {
    part.ht ? judge_ht(part) : judge_copies(part);
  }
  if (part.end_reason == 0) {
    report_part(part, outcome);
    free_part(&part);
    return true;
  }
  const kernels::cuda::PartFacts* facts = host_facts(id);
  if (!part.rescue_sent) {
    send_rescue(&part);
    return false;
  }
  if (load_word(facts->rescued) != id) {
    return false;
  }
  if (!part.restore_sent) {
    send_restore(&part);
    return false;
  }
  if (load_word(facts->restored) != id) {
    return false;
  }
  report_part(part, outcome);
  if (facts->verdict == kernels::cuda::kVerdictGo) {
    free_part(&part);  // its finish wrote the words
  } else {
    part.words_owed = true;
  }
  return true;
}

void CudaDevice::report_part(const Part& part, engine::Outcome* outcome) const {
  const kernels::cuda::PartFacts& facts = *host_facts(part.id);
  *outcome = {};
  outcome->launch_ns = part.launch_ns;
  outcome->end_ns = base::now_ns();
  outcome->executor = part.copies     ? EXPERTD_COMPLETION_EXECUTOR_COPY_ENGINE
                      : part.sms == 0 ? EXPERTD_COMPLETION_EXECUTOR_NONE
                                      : EXPERTD_COMPLETION_EXECUTOR_SM;
  outcome->sms = part.sms;
  // The GPU's timer is another clock: the part's length is taken from it, its end is when the host saw it.
  if (facts.start_ns != 0 && facts.end_ns >= facts.start_ns) {
    outcome->start_ns = std::max(part.launch_ns, outcome->end_ns - (facts.end_ns - facts.start_ns));
  }
  outcome->capture_entry = part.capture_entry;
  outcome->capture_words = part.capture_words;
  if (part.nodes) {
    outcome->exchanged = part.group->nodes->exchanged;
  }
  const bool finished = load_word(facts.done) == part.id && facts.verdict == kernels::cuda::kVerdictGo;
  if (finished) {
    outcome->report = facts.report;
  } else if (part.nodes && part.group->nodes->report.reason != 0) {
    outcome->report = part.group->nodes->report;
    outcome->peer_reason = part.group->nodes->peer_reason;
  } else {
    outcome->report.reason = part.end_reason;
  }
}

void CudaDevice::free_part(Part* part) {
  if (part->session != nullptr) {
    part->session->queued_entries -= part->entries;
  }
  part->id = 0;
  --parts_in_flight_;
  gpu_.view.gate->leave();
}

void CudaDevice::abort(engine::PartId id, uint32_t reason) {
  Part& part = parts_[id % kMaxPartsInFlight];
  if (part.id != id || id == 0 || part.end_reason != 0 ||
      (load_word(host_facts(id)->done) == id && !ht_is_voided(part))) {
    return;
  }
  part.end_reason = reason == 0 ? static_cast<uint32_t>(EXPERTD_REASON_INTERNAL) : reason;
  send_rescue(&part);
}

uint32_t CudaDevice::missing(engine::PartId id, base::RankSet* ranks) {
  *ranks = {};
  const Part& part = parts_[id % kMaxPartsInFlight];
  if (part.id != id || id == 0) {
    return EXPERTD_MISSING_NONE;
  }
  if (load_word(host_facts(id)->start_ns) == 0) {
    *ranks = base::RankSet::one(part.rank);
    return EXPERTD_MISSING_DOORBELL;
  }
  if (part.nodes) {
    uint64_t bits = 0;
    const uint32_t missing = missing_nodes(part, &bits);
    *ranks = base::RankSet(bits);
    return missing;
  }
  uint64_t unrouted = 0;
  uint64_t unmoved = 0;
  for (uint32_t s = 0; s < part.ranks; ++s) {
    if (((part.active_ranks >> s) & 1) == 0) {
      continue;
    }
    const Registry::GroupTable* table = registry_->groups[part.devices[s].value].load(std::memory_order_acquire);
    const GroupEntry* group = table == nullptr ? nullptr : table->find(part.group->shape.id.value);
    const bool routed = group != nullptr && load_word(group->host_progress->routed) >= part.group_op;
    const bool moved = group != nullptr && load_word(group->host_progress->moved) >= part.group_op;
    unrouted |= routed ? 0 : uint64_t{1} << s;
    unmoved |= moved ? 0 : uint64_t{1} << s;
  }
  *ranks = base::RankSet(unrouted != 0 ? unrouted : unmoved);
  if (ranks->empty()) {
    return EXPERTD_MISSING_NONE;
  }
  return unrouted != 0 ? EXPERTD_MISSING_COUNTS : EXPERTD_MISSING_ROWS;
}

void CudaDevice::release_words(const engine::SlotWords& words, uint32_t reason) {
  if (words.flag_page == nullptr || words.slot >= EXPERTD_RING_SLOTS_MAX) {
    return;
  }
  WordBatch batch;
  batch.write(word_at(words.flag_page, EXPERTD_RESULT_WORD_OFFSET(words.slot)), reason);
  batch.write(word_at(words.flag_page, EXPERTD_COMPLETION_WORD_OFFSET(words.slot)), words.seq);
  // The client's stream may wait for the words of copies; others have no use for them.
  batch.write_steps(words, EXPERTD_STEP_RANKS, words.seq);
  batch.write_ht_daemon(words);
  const ScopedContext context(driver_, gpu_.view.context);
  batch.send(driver_, rescue_stream_);
}

/// A lost context shows as an error of any query. At most once per interval; the rescue stream never holds work back.
void CudaDevice::check_health() {
  const uint64_t now = base::now_ns();
  if (now - health_checked_ns_ < kHealthIntervalNs) {
    return;
  }
  health_checked_ns_ = now;
  probe_context();
}

/// Whoever sees it first tells, and does nothing with the driver before: the next call may not come back.
void CudaDevice::probe_context() {
  const ScopedContext context(driver_, gpu_.view.context);
  const CUresult state = context.ok() ? driver_.cuStreamQuery(rescue_stream_) : CUDA_ERROR_INVALID_CONTEXT;
  const bool alive = state == CUDA_SUCCESS || state == CUDA_ERROR_NOT_READY;
  if (!alive && healthy_.exchange(false, std::memory_order_relaxed) && loss_observer_ != nullptr) {
    loss_observer_->context_lost(gpu_.view.index);
  }
}

}  // namespace expertd::device::cuda
