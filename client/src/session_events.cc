// SPDX-License-Identifier: Apache-2.0
// Asking and waiting for issued operations. Waits hold no lock.
#include "client/src/capture.h"
#include "client/src/clock.h"
#include "client/src/session.h"

namespace expertd::client {
namespace {

// Behind the daemon's own deadline, whose completion names what was missing.
constexpr uint64_t kWaitGraceNs = kNsPerS;

Status lost_status(const Connection& connection) {
  return connection.over("the daemon ended before the operation did; call expertd_reattach");
}

}  // namespace

Status Session::find(uint64_t event, Lookup* lookup, OpOutcome* outcome, uint64_t* deadline_ns) {
  if (is_captured_event(event)) {
    return error(EXPERTD_REASON_UNSUPPORTED,
                 "a captured operation has no end of its own: wait for the stream that its graph was launched on");
  }
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
  if (LocalOps::is_local(event)) {
    return query_local(event, done);
  }
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
    return lost_status(*connection_);
  }
  return {};
}

Status Session::wait(uint64_t event, uint64_t timeout_ns, expertd_op_result_t* result) {
  if (LocalOps::is_local(event)) {
    return wait_local(event, timeout_ns, result);
  }
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
      return result_of(outcome, result);
    }
    if (lookup == Lookup::kLost) {
      return lost_status(*connection_);
    }
    if (lookup == Lookup::kForgotten) {
      return forgotten_status();
    }
    const uint64_t deadline_ns = timeout_ns == 0 ? op_deadline_ns + kWaitGraceNs : given_deadline_ns;
    switch (connection_->ring()->wait(event & kSeqMask, deadline_ns)) {
      case WaitEnd::kComplete:
        break;
      case WaitEnd::kClosed:
        return lost_status(*connection_);
      case WaitEnd::kDeadline:
        return {EXPERTD_REASON_TIMEOUT, "the operation has not ended; it goes on until its own deadline"};
    }
  }
}

Status Session::stream_wait(uint64_t event, expertd_stream_t stream) {
  if (LocalOps::is_local(event)) {
    return stream_wait_local(event, stream);
  }
  const uint64_t seq = event & kSeqMask;
  if (event >> kIncarnationShift != incarnation_) {
    return lost_status(*connection_);
  }
  if (is_captured_event(event)) {
    return device_->take_captured(capture_words_of(event), stream);
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
      return lost_status(*connection_);
    }
    if (end == WaitEnd::kDeadline) {
      return {EXPERTD_REASON_TIMEOUT, "operations of the session have not ended"};
    }
    ops_->collect(*ring, seq);
  }
  return {};
}

}  // namespace expertd::client
