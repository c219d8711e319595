// SPDX-License-Identifier: Apache-2.0
#include "client/src/op_table.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <utility>

#include "client/src/clock.h"
#include "client/src/message.h"
#include "client/src/metrics.h"
#include "client/src/staging.h"

namespace expertd::client {
namespace {

void copy_rows(const StagedOutput& output, uint64_t first_row, uint64_t rows) {
  const uint64_t begin = std::min(first_row * output.row_bytes, output.bytes);
  const uint64_t bytes = std::min(rows * output.row_bytes, output.bytes - begin);
  std::memcpy(static_cast<char*>(output.destination) + begin, static_cast<const char*>(output.source) + begin, bytes);
  count_staged_copy(bytes);
}

// Bytes that the operation did not write stay as the caller left them.
void copy_back(const StagedOutput& output, const OpRecord& record, const expertd_completion& completion) {
  switch (output.rows) {
    case CopyBack::kAll:
      std::memcpy(output.destination, output.source, output.bytes);
      count_staged_copy(output.bytes);
      break;
    case CopyBack::kReceivedRows:
      copy_rows(output, 0, completion.recv_rows);
      break;
    case CopyBack::kExpertRows:
      for (uint32_t expert = 0; expert < completion.expert_count_entries; ++expert) {
        const uint32_t rows = std::min(completion.expert_counts[expert], record.rows_per_expert);
        copy_rows(output, uint64_t{expert} * record.rows_per_expert, rows);
      }
      break;
  }
}

uint64_t duration_of(const OpRecord& record, const expertd_completion& completion) {
  const uint64_t end = completion.complete_ns > record.submit_ns ? completion.complete_ns : now_ns();
  return end > record.submit_ns ? end - record.submit_ns : 0;
}

static_assert(int{EXPERTD_EXECUTOR_HOST} == int{EXPERTD_COMPLETION_EXECUTOR_HOST} &&
              int{EXPERTD_EXECUTOR_SM} == int{EXPERTD_COMPLETION_EXECUTOR_SM} &&
              int{EXPERTD_EXECUTOR_COPY_ENGINE} == int{EXPERTD_COMPLETION_EXECUTOR_COPY_ENGINE});

uint64_t span_ns(uint64_t from, uint64_t to) {
  return from != 0 && to > from ? to - from : 0;
}

}  // namespace

Status result_of(const OpOutcome& outcome, expertd_op_result_t* result) {
  const expertd_completion& completion = outcome.completion;
  Status status = completion_status(completion);
  if (result == nullptr) {
    return status;
  }
  expertd_op_result_t filled{};
  filled.struct_size = result->struct_size;
  filled.status = to_c(status.reason);
  filled.recv_rows = completion.recv_rows;
  filled.expert_count_entries = outcome.expert_counts == nullptr ? 0 : completion.expert_count_entries;
  filled.expert_counts = outcome.expert_counts;
  filled.degraded = (completion.flags & EXPERTD_COMPLETION_DEGRADED) != 0 ? 1 : 0;
  filled.rank_mask = completion.rank_mask;
  filled.epoch = completion.epoch;
  filled.rank = completion.rank;
  filled.queue_ns = span_ns(outcome.submit_ns, completion.start_ns);
  filled.execute_ns = span_ns(completion.start_ns, completion.end_ns);
  filled.total_ns = span_ns(outcome.submit_ns, completion.complete_ns);
  filled.local_bytes = completion.local_bytes;
  filled.remote_bytes = completion.remote_bytes;
  filled.executor = completion.executor;
  filled.sms = completion.sms;
  std::copy(std::begin(completion.rank_mask_more), std::end(completion.rank_mask_more), filled.rank_mask_more);
  std::memcpy(result, &filled, std::min(filled.struct_size, sizeof(filled)));
  return status;
}

Status forgotten_status() {
  return error(EXPERTD_REASON_BAD_STATE, "the operation ended, its result is not kept: only the last %u are",
               OpTable::kHistory);
}

OpTable::OpTable(Staging* staging)
    : staging_(staging),
      kept_(std::make_unique<std::array<Kept, kHistory>>()),
      counts_(std::make_unique<std::array<Counts, kCountTables>>()) {}

void OpTable::begin(OpRecord record, uint32_t slot) {
  const std::lock_guard lock(mutex_);
  in_flight_[slot % EXPERTD_RING_SLOTS_MAX] = std::move(record);
}

void OpTable::collect(const CompletionSource& ring, uint64_t seq) {
  const std::lock_guard lock(mutex_);
  OpRecord& record = in_flight_[ring.slot_index(seq)];
  if (record.seq == seq) {
    collect_locked(ring, &record);
  }
}

bool OpTable::holds(const CompletionSource& ring, uint64_t seq) {
  const std::lock_guard lock(mutex_);
  return in_flight_[ring.slot_index(seq)].seq == seq;
}

void OpTable::collect_all(const CompletionSource& ring) {
  const std::lock_guard lock(mutex_);
  for (OpRecord& record : in_flight_) {
    if (record.seq != 0) {
      collect_locked(ring, &record);
    }
  }
}

void OpTable::collect_locked(const CompletionSource& ring, OpRecord* record) {
  expertd_completion completion;
  if (!ring.try_read(record->seq, &completion)) {
    return;
  }
  if (completion.reason == EXPERTD_REASON_NONE) {
    for (const StagedOutput& output : record->outputs) {
      copy_back(output, *record, completion);
    }
  }
  Kept& kept = kept_at(record->event);
  kept.event = record->event;
  kept.submit_ns = record->submit_ns;
  std::memcpy(kept.head.data(), &completion, kept.head.size());
  Counts& counts = counts_at(record->event);
  counts.event = record->event;
  std::copy_n(completion.expert_counts, completion.expert_count_entries, counts.values.begin());
  observe_op(record->op, completion.reason == EXPERTD_REASON_NONE, duration_of(*record, completion),
             completion.local_bytes + completion.remote_bytes);
  if (record->staging_chunk >= 0) {
    staging_->give_back(record->staging_chunk);
  }
  *record = OpRecord();
}

bool OpTable::find_kept_locked(uint64_t event, OpOutcome* outcome) {
  const Kept& kept = kept_at(event);
  if (kept.event != event) {
    return false;
  }
  outcome->event = event;
  outcome->submit_ns = kept.submit_ns;
  std::memcpy(&outcome->completion, kept.head.data(), kept.head.size());
  Counts& counts = counts_at(event);
  const bool has_counts = counts.event == event && outcome->completion.expert_count_entries > 0;
  outcome->expert_counts = has_counts ? counts.values.data() : nullptr;
  return true;
}

Lookup OpTable::find(const CompletionSource* ring, uint64_t event, uint64_t seq, OpOutcome* outcome,
                     uint64_t* deadline_ns) {
  const std::lock_guard lock(mutex_);
  if (ring != nullptr) {
    OpRecord& record = in_flight_[ring->slot_index(seq)];
    if (record.event == event) {
      *deadline_ns = record.deadline_ns;
      collect_locked(*ring, &record);
    }
    if (record.event == event) {
      return Lookup::kInFlight;
    }
  }
  if (find_kept_locked(event, outcome)) {
    return Lookup::kDone;
  }
  return ring == nullptr ? Lookup::kLost : Lookup::kForgotten;
}

void OpTable::forget_in_flight() {
  const std::lock_guard lock(mutex_);
  for (OpRecord& record : in_flight_) {
    record = OpRecord();
  }
}

}  // namespace expertd::client
