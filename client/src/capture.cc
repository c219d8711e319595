// SPDX-License-Identifier: Apache-2.0
#include "client/src/capture.h"

#include "client/src/clock.h"

namespace expertd::client {
namespace {

constexpr uint64_t kCapturedEvent = uint64_t{1} << 45;

/// Calls of the driver in between belong to no capture, in whatever mode the thread captures.
class RelaxedCapture {
 public:
  explicit RelaxedCapture(DeviceSide* device) : device_(device) { device_->exchange_capture_mode(&mode_); }
  ~RelaxedCapture() { device_->exchange_capture_mode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  DeviceSide* const device_;
  int mode_ = 2;  // CU_STREAM_CAPTURE_MODE_RELAXED
};

}  // namespace

bool is_captured_event(uint64_t event) {
  return (event & kSeqMask & kCapturedEvent) != 0;
}

uint32_t capture_words_of(uint64_t event) {
  return static_cast<uint32_t>(event & (kCapturedEvent - 1));
}

Status check_capture(const Group& group, uint32_t op) {
  if (op != EXPERTD_OP_LL_DISPATCH && op != EXPERTD_OP_LL_COMBINE) {
    return error(EXPERTD_REASON_UNSUPPORTED,
                 "the stream is being captured: only ll_dispatch and ll_combine can be; issue the others eagerly");
  }
  if (group.config().capture_lanes == 0) {
    return error(EXPERTD_REASON_UNSUPPORTED,
                 "the stream is being captured: join the group with capture_lanes = 1 or 2 for that");
  }
  return group.session()->connection()->ring()->takes_captures()
             ? Status()
             : error(EXPERTD_REASON_UNSUPPORTED, "the daemon is older than ring version 1.3 and captures nothing");
}

Status issue_low_latency(Group* group, OpRequest* request, expertd_stream_t stream, expertd_event_t* event) {
  Session* session = group->session();
  if (!request->captured) {
    return session->submit(request, stream, event);
  }
  // The ranks capture the same operations in one order, so they come to the same lane.
  request->slot.capture_lane = group->next_capture_lane();
  uint32_t words = 0;
  uint64_t entry = 0;
  {
    const RelaxedCapture relaxed(session->device());
    Status status = session->submit_capture(request, &entry, &words);
    if (!status.ok()) {
      return status;
    }
  }
  group->commit_capture();
  *event = {wrap(session), (session->incarnation() << kIncarnationShift) | kCapturedEvent | words};
  DeviceSide* device = session->device();
  return (request->flags & EXPERTD_ASYNC) == 0 ? device->call_captured(words, entry, stream)
                                               : device->ring_captured(words, entry, stream);
}

// Waits for the daemon, which answers when every rank has captured the operation; not under the submit lock.
Status Session::submit_capture(OpRequest* request, uint64_t* entry, uint32_t* words) {
  const uint64_t deadline_ns = deadline_after(request->timeout_ns);
  uint64_t event = 0;
  uint64_t seq = 0;
  {
    const std::lock_guard lock(submit_mutex_);
    Status status = wait_for_slot(deadline_ns);
    OpRecord record;
    if (status.ok()) {
      status = resolve_tensors(request, &record, nullptr);
    }
    if (!status.ok()) {
      return status;
    }
    request->slot.flags |= EXPERTD_SLOT_CAPTURED;
    stamp(&request->slot);
    seq = request->slot.seq;
    event = (incarnation_ << kIncarnationShift) | seq;
    record.event = event;
    record.seq = seq;
    record.op = request->slot.op;
    record.submit_ns = request->slot.submit_ns;
    record.deadline_ns = deadline_ns;
    ops_->begin(std::move(record), connection_->ring()->slot_index(seq));
    connection_->ring()->submit(request->slot);
    request->submitted = true;
  }
  Status status = wait(event, 0, nullptr);
  Lookup lookup = Lookup::kLost;
  OpOutcome outcome;
  uint64_t unused = 0;
  if (status.ok()) {
    status = find(event, &lookup, &outcome, &unused);
  }
  if (!status.ok()) {
    return status;
  }
  *entry = outcome.completion.capture_entry;
  *words = outcome.completion.capture_words;
  return *entry >= 1 && *entry <= EXPERTD_CAPTURE_RUNG_MAX
             ? Status()
             : error(EXPERTD_REASON_BAD_MESSAGE, "the daemon gave the captured operation entry %llu",
                     static_cast<unsigned long long>(*entry));
}

}  // namespace expertd::client
