// SPDX-License-Identifier: Apache-2.0
#include "client/src/local_ops.h"

#include <sched.h>

#include <utility>

#include "client/src/clock.h"
#include "client/src/cpu_pause.h"
#include "client/src/metrics.h"
#include "client/src/op_request.h"
#include "client/src/session.h"

namespace expertd::client {
namespace {

constexpr uint64_t kSpinNs = 20'000;      // longer than the kernels take
constexpr uint64_t kYieldNs = 1'000'000;  // then the stream is known to be busy with something else
constexpr uint64_t kNapNs = 50'000;
constexpr uintptr_t kAlignment = 16;

static_assert(kLocalSlots <= EXPERTD_RING_SLOTS_MAX, "OpTable has a place for each");

// A kernel cannot wake a thread of the host.
void nap(uint64_t deadline_ns) {
  const uint64_t end_ns = now_ns() + kNapNs;
  const timespec until = to_timespec(end_ns < deadline_ns ? end_ns : deadline_ns);
  clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, nullptr);
}

template <typename T>
T* output_of(const OpRequest& request, uint32_t index) {
  return static_cast<T*>(const_cast<void*>(request.tensors[index].pointer));
}

}  // namespace

bool layout_params(const OpRequest& request, LayoutParams* params) {
  const expertd_slot& slot = request.slot;
  const bool in_range = slot.tokens <= kLayoutTokensMax && slot.top_k >= 1 && slot.top_k <= kLayoutTopKMax &&
                        slot.num_ranks >= 1 && slot.num_ranks <= kLayoutRanksMax &&
                        slot.num_experts >= slot.num_ranks && slot.num_experts <= kLayoutExpertsMax &&
                        slot.num_experts % slot.num_ranks == 0 && slot.flags == 0;
  const void* ids = request.tensors[EXPERTD_IN_TOPK_IDX].pointer;
  if (!in_range || (ids == nullptr && slot.tokens != 0)) {
    return false;
  }
  for (const TensorArg& tensor : request.tensors) {
    if (reinterpret_cast<uintptr_t>(tensor.pointer) % kAlignment != 0) {
      return false;
    }
  }
  params->topk_idx = ids;
  params->tokens_per_rank = output_of<int32_t>(request, EXPERTD_OUT_RANK_PREFIX);
  params->tokens_per_node = output_of<int32_t>(request, EXPERTD_OUT_LAYOUT_RANGE);
  params->tokens_per_expert = output_of<int32_t>(request, EXPERTD_OUT_EXPERT_COUNTS);
  params->token_rank_mask = output_of<uint8_t>(request, EXPERTD_OUT_TOKEN_RANK_MASK);
  params->idx_bytes = slot.topk_idx_bytes;
  params->tokens = slot.tokens;
  params->top_k = slot.top_k;
  params->experts = slot.num_experts;
  params->ranks = slot.num_ranks;
  params->ranks_per_node = slot.num_ranks;  // one node, as the daemon has it
  return true;
}

// Pairs with the kernel's publish(): who sees the sequence sees the rest of the record.
bool LocalOps::has_ended(uint64_t seq) const {
  uint64_t* word = &kernels_->record(slot_index(seq))->seq;
  return std::atomic_ref<uint64_t>(*word).load(std::memory_order_acquire) >= seq;
}

bool LocalOps::try_read(uint64_t seq, expertd_completion* completion) const {
  if (!has_ended(seq)) {
    return false;
  }
  const LocalRecord& record = *kernels_->record(slot_index(seq));
  *completion = expertd_completion{};
  completion->seq = seq;
  completion->rank = -1;
  completion->executor = EXPERTD_COMPLETION_EXECUTOR_SM;
  if (record.failed != 0) {
    completion->reason = EXPERTD_REASON_EXPERT_OUT_OF_RANGE;
    completion->argument = EXPERTD_ARGUMENT_EXPERT_ID;
    completion->value = record.value;
    completion->minimum = -1;
    completion->maximum = record.maximum;
  }
  return true;
}

// Under the issue lock; the place of the next sequence is free afterwards and its old operation collected.
Status LocalOps::wait_for_slot(uint64_t deadline_ns) {
  const uint64_t seq = next_seq_.load(std::memory_order_relaxed);
  if (seq <= kLocalSlots) {
    return {};
  }
  const uint64_t before = seq - kLocalSlots;
  switch (wait_seq(before, deadline_ns)) {
    case WaitEnd::kComplete:
      break;
    case WaitEnd::kClosed:
      return kernels_->health();
    case WaitEnd::kDeadline:
      return range_error(EXPERTD_REASON_RING_OVERFLOW, "operations in flight", int64_t{kLocalSlots} + 1, 0,
                         kLocalSlots);
  }
  ops_.collect(*this, before);
  return {};
}

void LocalOps::note_use(const OpRequest& request, uint64_t seq) {
  const std::lock_guard lock(uses_mutex_);
  Use& use = uses_[slot_index(seq)];
  use = Use();
  use.seq = seq;
  size_t count = 0;
  for (const TensorArg& tensor : request.tensors) {
    if (tensor.pointer != nullptr && count < use.extents.size()) {
      use.extents[count++] = extent_of(tensor.pointer, tensor.bytes);
    }
  }
}

Status LocalOps::issue_layout(const OpRequest& request, LayoutParams params, uint64_t incarnation,
                              expertd_stream_t stream, uint64_t* event) {
  const std::lock_guard lock(issue_mutex_);
  OpRecord record;
  record.submit_ns = now_ns();
  record.deadline_ns = deadline_after(request.timeout_ns);
  Status status = wait_for_slot(record.deadline_ns);
  if (!status.ok()) {
    return status;
  }
  const uint64_t seq = next_seq_.load(std::memory_order_relaxed);
  const uint32_t slot = slot_index(seq);
  LocalRecord* end = kernels_->record(slot);
  end->failed = 0;
  end->maximum = int64_t{params.experts} - 1;
  params.seq = seq;
  note_use(request, seq);
  status = kernels_->launch_layout(params, slot, stream);
  if (!status.ok()) {
    return status;  // nothing of it is on the stream, and the next one takes the sequence
  }
  record.event = (incarnation << kIncarnationShift) | kLocalEvent | seq;
  record.seq = seq;
  record.op = EXPERTD_OP_LAYOUT;
  *event = record.event;
  ops_.begin(std::move(record), slot);
  next_seq_.store(seq + 1, std::memory_order_release);
  count_local_op();
  return {};
}

Status LocalOps::find(uint64_t event, Lookup* lookup, OpOutcome* outcome, uint64_t* deadline_ns) {
  const uint64_t seq = seq_of(event);
  if (seq == 0 || event >> kIncarnationShift == 0) {
    return missing_argument("event");
  }
  if (seq >= next_seq_.load(std::memory_order_acquire)) {
    return error(EXPERTD_REASON_BAD_STATE, "event.seq = %llu was not issued yet", static_cast<unsigned long long>(seq));
  }
  *lookup = ops_.find(this, event, seq, outcome, deadline_ns);
  return {};
}

WaitEnd LocalOps::wait(uint64_t event, uint64_t deadline_ns) {
  return wait_seq(seq_of(event), deadline_ns);
}

WaitEnd LocalOps::wait_seq(uint64_t seq, uint64_t deadline_ns) {
  const uint64_t begin_ns = now_ns();
  for (;;) {
    if (has_ended(seq)) {
      return WaitEnd::kComplete;
    }
    const uint64_t now = now_ns();
    if (now >= deadline_ns) {
      return WaitEnd::kDeadline;
    }
    if (now - begin_ns < kSpinNs) {
      pause_cpu();
    } else if (now - begin_ns < kYieldNs) {
      (void)sched_yield();
    } else if (!kernels_->health().ok()) {
      return has_ended(seq) ? WaitEnd::kComplete : WaitEnd::kClosed;
    } else {
      nap(deadline_ns);
    }
  }
}

Status LocalOps::stream_word(uint64_t event, const void** word, uint64_t* value) const {
  const uint64_t seq = seq_of(event);
  if (seq == 0 || seq >= next_seq_.load(std::memory_order_acquire)) {
    return missing_argument("event");
  }
  *word = has_ended(seq) ? nullptr : kernels_->word(slot_index(seq));
  *value = seq;
  return {};
}

Status LocalOps::wait_unused(const Extent& bytes, uint64_t deadline_ns) {
  for (uint32_t slot = 0; slot < kLocalSlots; ++slot) {
    uint64_t seq = 0;
    {
      const std::lock_guard lock(uses_mutex_);
      for (const Extent& extent : uses_[slot].extents) {
        seq = extent.overlaps(bytes) ? uses_[slot].seq : seq;
      }
    }
    // A launch that failed has left its use behind.
    if (seq == 0 || seq >= next_seq_.load(std::memory_order_acquire)) {
      continue;
    }
    if (wait_seq(seq, deadline_ns) == WaitEnd::kDeadline) {
      return {EXPERTD_REASON_BUFFER_BUSY, "a local operation in flight still uses the buffer"};
    }
  }
  return {};
}

}  // namespace expertd::client
