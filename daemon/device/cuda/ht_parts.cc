// SPDX-License-Identifier: Apache-2.0
// High throughput parts by copy engines as the loop drives them (ht_chain.cc has the chain).
#include <algorithm>

#include "daemon/base/clock.h"
#include "daemon/device/cuda/host_word.h"
#include "daemon/device/cuda/ht_chain.h"
#include "daemon/device/cuda/word_batch.h"
#include "proto/abi/ring_v1.h"

namespace expertd::device::cuda {

namespace {

/// A chain that waits for the loop is looked at without naps for so long: the caller's compute that stands in front of
/// a doorbell takes milliseconds, and what a nap adds would come on top of the operation. Behind that it is 1 in 100.
constexpr uint64_t kSpinNs = 100'000'000;

}  // namespace

base::Status CudaDevice::start_ht() {
  auto facts = PinnedMemory::create(driver_, gpu_.view.context, kMaxPartsInFlight * sizeof(HtFacts));
  if (!facts.is_ok()) {
    return facts.status();
  }
  ht_facts_ = std::move(facts).value();
  ht_states_ = std::make_unique<HtState[]>(kMaxPartsInFlight);
  return base::Status::ok();
}

CudaDevice::HtFacts* CudaDevice::ht_facts(engine::PartId part) const {
  return static_cast<HtFacts*>(ht_facts_->host()) + part % kMaxPartsInFlight;
}

CudaDevice::HtState* CudaDevice::ht_state(engine::PartId part) const {
  return &ht_states_[part % kMaxPartsInFlight];
}

/// Takes the part whatever comes of it, as launch() does.
bool CudaDevice::launch_ht(const engine::LaunchSpec& spec, Part* part) {
  part->copies = true;
  part->ht = true;
  part->group->last_op = spec.group_op;
  part->group->last_active = spec.active_ranks.low();
  HtState* state = ht_state(part->id);
  *state = {};
  state->spec = spec;
  *ht_facts(part->id) = {};
  if (part->group->ht == nullptr) {  // admission lets no such operation through
    fail_launch(part, EXPERTD_REASON_UNSUPPORTED);
    return true;
  }
  HtChain chain(*this, *part, state);
  if (!chain.find()) {
    fail_launch(part, EXPERTD_REASON_UNSUPPORTED);
    return true;
  }
  const ScopedContext context(driver_, gpu_.view.context);
  part->entries = ht_entries(spec.ranks);
  part->session->queued_entries += part->entries;
  if (!chain.begin()) {
    part->chain_broken = true;
    fail_launch(part, EXPERTD_REASON_CUDA);
    return true;
  }
  part->session->open_part = part->id;
  ++ht_open_;
  ht_spin_until_ns_ = part->launch_ns + kSpinNs;
  const bool dispatch = spec.own->shape.kind == kernels::OpKind::kDispatch;
  state->stage = dispatch ? HtState::Stage::kCounting : HtState::Stage::kGathering;
  if (!dispatch) {
    chain.publish();
    advance_ht(part);
  }
  return true;
}

/// Enqueues the rest as soon as all ranks have published.
void CudaDevice::advance_ht(Part* part) {
  HtState* state = ht_state(part->id);
  HtChain chain(*this, *part, state);
  if (state->stage == HtState::Stage::kCounting && load_word(ht_facts(part->id)->counted) == part->id) {
    chain.take_counts();
    chain.publish();
    state->stage = HtState::Stage::kGathering;
  }
  HtRows rows{};
  if (state->stage != HtState::Stage::kGathering || !chain.gather(&rows)) {
    return;
  }
  const ScopedContext context(driver_, gpu_.view.context);
  state->stage = HtState::Stage::kSent;
  part->session->open_part = 0;
  --ht_open_;
  if (!chain.proceed(rows)) {
    part->chain_broken = true;
    fail_launch(part, EXPERTD_REASON_CUDA);
  }
}

/// A part that is aborted before the rest was enqueued gets its end.
void CudaDevice::close_ht(Part* part) {
  HtState* state = ht_state(part->id);
  if (!state->is_open()) {
    return;
  }
  const ScopedContext context(driver_, gpu_.view.context);
  state->stage = HtState::Stage::kClosed;
  part->session->open_part = 0;
  --ht_open_;
  part->chain_broken = !HtChain(*this, *part, state).close();
}

bool CudaDevice::busy() const {
  return (ht_open_ != 0 || node_lanes_) && base::now_ns() < ht_spin_until_ns_;
}

bool CudaDevice::ht_is_open(const Part& part) const {
  return part.ht && ht_state(part.id)->is_open();
}

/// Whether another rank was aborted before this one's rows had left it. The operation's abort is on its way then.
bool CudaDevice::ht_is_voided(const Part& part) const {
  return part.ht && ht_state(part.id)->stage == HtState::Stage::kSent &&
         load_word(ht_facts(part.id)->voided) == part.words.seq;
}

void CudaDevice::void_ht(const Part& part, WordBatch* batch) const {
  const HtState& state = *ht_state(part.id);
  for (uint32_t j = 0; j < base::kMaxGpuRanks; ++j) {
    if (state.stage == HtState::Stage::kSent && state.voided[j] != 0) {
      batch->write(reinterpret_cast<const void*>(state.voided[j]), state.seqs[j]);
    }
  }
}

/// How a part went whose chain has drained.
void CudaDevice::judge_ht(const Part& part) {
  const HtState& state = *ht_state(part.id);
  kernels::cuda::PartFacts* facts = host_facts(part.id);
  const bool good = part.end_reason == 0 && ht_facts(part.id)->ended == part.words.seq;
  facts->verdict = good ? kernels::cuda::kVerdictGo : kernels::cuda::kVerdictAborted;
  if (part.group == nullptr || part.group->ht == nullptr || state.spec.own == nullptr ||
      state.spec.own->handle_index >= part.group->ht->handles.size()) {
    return;
  }
  const kernels::OpShape& shape = state.spec.own->shape;
  HtGroup::Handle& handle = part.group->ht->handles[state.spec.own->handle_index];
  const bool leaves = shape.kind == kernels::OpKind::kDispatch && shape.cached == 0;
  const bool known = handle.generation == state.spec.own->handle_generation;
  if (good) {
    facts->report = state.report;
  } else if (leaves && known) {
    handle.generation = 0;
  }
  // Its dispatch was aborted after this part had been launched.
  if (good && !leaves && !known && state.report.reason == 0) {
    facts->report = {};
    facts->report.reason = EXPERTD_REASON_STALE_HANDLE;
    facts->report.argument = EXPERTD_ARGUMENT_HANDLE;
    facts->report.value = state.spec.own->handle_generation;
    facts->report.rank = -1;
  }
}

/// Of a group whose high throughput goes by copy engines: beside the exchange window, behind the part for low latency.
base::Status CudaDevice::allocate_ht(const engine::GroupShape& shape, GroupEntry* entry) {
  const CopyLayout layout = copy_layout(shape);
  if (layout.ht.total_bytes == 0) {
    return base::Status::ok();
  }
  auto ht = std::make_unique<HtGroup>();
  ht->layout = layout.ht;
  ht->window_offset = layout.ht_offset;
  ht->handles.resize(std::min<uint64_t>(layout.ht.handle_count, entry->layout.handle_count));
  if (ht_pinned_.empty()) {
    auto pinned = PinnedMemory::create(driver_, gpu_.view.context, HtGroup::kPinnedBytes);
    if (!pinned.is_ok()) {
      return pinned.status().with_context("pinned counts of the group");
    }
    ht_pinned_.push_back(std::move(pinned).value());
  }
  ht->pinned = std::move(ht_pinned_.back());
  ht_pinned_.pop_back();
  entry->ht = std::move(ht);
  return base::Status::ok();
}

/// When no part of the group is left.
void CudaDevice::keep_ht_pinned(GroupEntry* entry) {
  if (entry->ht != nullptr && entry->ht->pinned != nullptr) {
    ht_pinned_.push_back(std::move(entry->ht->pinned));
  }
}

}  // namespace expertd::device::cuda
