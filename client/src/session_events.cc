// SPDX-License-Identifier: Apache-2.0
// Asking and waiting for issued operations. Waits hold no lock.
#include <algorithm>
#include <cstring>

#include "client/src/clock.h"
#include "client/src/message.h"
#include "client/src/session.h"

namespace expertd::client {
namespace {

// Behind the daemon's own deadline, whose completion names what was missing.
constexpr uint64_t kWaitGraceNs = kNsPerS;

static_assert(int{EXPERTD_EXECUTOR_HOST} == int{EXPERTD_COMPLETION_EXECUTOR_HOST} &&
              int{EXPERTD_EXECUTOR_SM} == int{EXPERTD_COMPLETION_EXECUTOR_SM} &&
              int{EXPERTD_EXECUTOR_COPY_ENGINE} == int{EXPERTD_COMPLETION_EXECUTOR_COPY_ENGINE});

uint64_t span_ns(uint64_t from, uint64_t to) {
  return from != 0 && to > from ? to - from : 0;
}

Status fill_result(const OpOutcome& outcome, expertd_op_result_t* result) {
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
  std::memcpy(result, &filled, std::min(filled.struct_size, sizeof(filled)));
  return status;
}

Status lost_status() {
  return {EXPERTD_REASON_UNAVAILABLE, "the daemon ended before the operation did; call expertd_reattach"};
}

}  // namespace

Status Session::find(uint64_t event, Lookup* lookup, OpOutcome* outcome, uint64_t* deadline_ns) {
  const uint64_t seq = event & kSeqMask;
  const uint64_t incarnation = event >> kIncarnationShift;
  if (seq == 0 || incarnation == 0 || incarnation > incarnation_) {
    return missing_argument("event");
  }
  const bool current = incarnation == incarnation_;
  RingClient* ring = connection_->ring();
  if (current && seq >= ring->next_seq()) {
    return error(EXPERTD_REASON_BAD_STATE, "event.seq = %llu was not issued yet", static_cast<unsigned long long>(seq));
  }
  *lookup = ops_->find(current ? ring : nullptr, event, seq, outcome, deadline_ns);
  return {};
}

Status Session::query(uint64_t event, int* done) {
  Lookup lookup = Lookup::kLost;
  OpOutcome outcome;
  uint64_t deadline_ns = 0;
  Status status = find(event, &lookup, &outcome, &deadline_ns);
  if (!status.ok()) {
    return status;
  }
  *done = lookup == Lookup::kInFlight ? 0 : 1;
  if (lookup == Lookup::kLost || (lookup == Lookup::kInFlight && connection_->lost())) {
    *done = 1;
    return lost_status();
  }
  return {};
}

Status Session::wait(uint64_t event, uint64_t timeout_ns, expertd_op_result_t* result) {
  const uint64_t given_deadline_ns = timeout_ns == 0 ? 0 : deadline_after(timeout_ns);
  for (;;) {
    Lookup lookup = Lookup::kLost;
    OpOutcome outcome;
    uint64_t op_deadline_ns = 0;
    Status status = find(event, &lookup, &outcome, &op_deadline_ns);
    if (!status.ok()) {
      return status;
    }
    if (lookup == Lookup::kDone) {
      return fill_result(outcome, result);
    }
    if (lookup == Lookup::kLost) {
      return lost_status();
    }
    if (lookup == Lookup::kForgotten) {
      return error(EXPERTD_REASON_BAD_STATE, "the operation ended, its result is not kept: only the last %u are",
                   OpTable::kHistory);
    }
    const uint64_t deadline_ns = timeout_ns == 0 ? op_deadline_ns + kWaitGraceNs : given_deadline_ns;
    switch (connection_->ring()->wait(event & kSeqMask, deadline_ns)) {
      case WaitEnd::kComplete:
        break;
      case WaitEnd::kClosed:
        return lost_status();
      case WaitEnd::kDeadline:
        return {EXPERTD_REASON_TIMEOUT, "the operation has not ended; it goes on until its own deadline"};
    }
  }
}

Status Session::stream_wait(uint64_t event, expertd_stream_t stream) {
  const uint64_t seq = event & kSeqMask;
  if (event >> kIncarnationShift != incarnation_) {
    return lost_status();
  }
  if (seq == 0 || seq >= connection_->ring()->next_seq()) {
    return missing_argument("event");
  }
  return device_->wait_completion(connection_->ring()->slot_index(seq), seq, stream);
}

Status Session::synchronize(expertd_stream_t stream, uint64_t timeout_ns) {
  const uint64_t deadline_ns = deadline_after(timeout_ns == 0 ? default_timeout_ns() : timeout_ns);
  if (device_->is_cuda()) {
    return device_->synchronize(stream, deadline_ns);
  }
  RingClient* ring = connection_->ring();
  const uint64_t last = ring->next_seq();
  const uint64_t first = last > ring->slot_count() ? last - ring->slot_count() : 1;
  for (uint64_t seq = first; seq < last; ++seq) {
    // What was collected has ended, and nobody waits for the end of a refusal.
    const WaitEnd end = ops_->holds(*ring, seq) ? ring->wait(seq, deadline_ns) : WaitEnd::kComplete;
    if (end == WaitEnd::kClosed) {
      return lost_status();
    }
    if (end == WaitEnd::kDeadline) {
      return {EXPERTD_REASON_TIMEOUT, "operations of the session have not ended"};
    }
    ops_->collect(*ring, seq);
  }
  return {};
}

}  // namespace expertd::client
