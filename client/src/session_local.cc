// SPDX-License-Identifier: Apache-2.0
// Local work of a session: what the library's own kernels do on the caller's stream, and the events of it. On the
// caller's thread. What the kernels do not take goes to the daemon, which does it or says by name what is wrong.
#include "client/src/clock.h"
#include "client/src/op_request.h"
#include "client/src/session.h"

namespace expertd::client {
namespace {

OpOutcome timed_out() {
  OpOutcome outcome;
  outcome.completion.reason = EXPERTD_REASON_TIMEOUT;
  outcome.completion.rank = -1;
  return outcome;
}

}  // namespace

// At the first attach; records and kernels outlive the attachment.
void Session::begin_local() {
  LocalKernels* kernels = device_->local_kernels();
  if (local_ == nullptr && kernels != nullptr) {
    local_ = std::make_unique<LocalOps>(kernels);
  }
}

// The caller's tensors often lie in one allocation, and windows are known: mostly the driver is asked once.
bool Session::reaches(const OpRequest& request) {
  Extent known;
  for (const TensorArg& tensor : request.tensors) {
    if (tensor.pointer == nullptr || tensor.bytes == 0) {
      continue;
    }
    Place place;
    Buffer* buffer = nullptr;
    const bool found = memory_->resolve(tensor.pointer, tensor.bytes, &place, &buffer) == Resolved::kFound;
    if (found && buffer->kind == BufferKind::kWindow) {
      continue;
    }
    if (!local_->kernels()->reaches(extent_of(tensor.pointer, tensor.bytes), &known)) {
      return false;
    }
  }
  return true;
}

Status Session::submit_layout(OpRequest* request, expertd_stream_t stream, expertd_event_t* event) {
  LayoutParams params;
  if (local_ == nullptr || !layout_params(*request, &params) || !reaches(*request)) {
    return submit(request, stream, event);
  }
  uint64_t seq = 0;
  Status status = local_->issue_layout(*request, params, incarnation_, stream, &seq);
  if (status.ok()) {
    *event = {wrap(this), seq};
  }
  return status;
}

// What is on a stream cannot be taken off it. At its deadline the operation counts as ended all the same, as one of the
// daemon would; its result can be had when it comes after all.
Status Session::query_local(uint64_t event, int* done) {
  if (local_ == nullptr) {
    return missing_argument("event");
  }
  Lookup lookup = Lookup::kForgotten;
  OpOutcome outcome;
  uint64_t deadline_ns = 0;
  Status status = local_->find(event, &lookup, &outcome, &deadline_ns);
  if (!status.ok()) {
    return status;
  }
  *done = lookup == Lookup::kInFlight && now_ns() < deadline_ns ? 0 : 1;
  if (*done == 0) {
    status = local_->health();
    *done = status.ok() ? 0 : 1;
  }
  return status;
}

Status Session::wait_local(uint64_t event, uint64_t timeout_ns, expertd_op_result_t* result) {
  if (local_ == nullptr) {
    return missing_argument("event");
  }
  const uint64_t given_deadline_ns = timeout_ns == 0 ? UINT64_MAX : deadline_after(timeout_ns);
  for (;;) {
    Lookup lookup = Lookup::kForgotten;
    OpOutcome outcome;
    uint64_t op_deadline_ns = 0;
    Status status = local_->find(event, &lookup, &outcome, &op_deadline_ns);
    if (!status.ok()) {
      return status;
    }
    if (lookup != Lookup::kInFlight) {
      return lookup == Lookup::kDone ? result_of(outcome, result) : forgotten_status();
    }
    const bool own = op_deadline_ns <= given_deadline_ns;
    switch (local_->wait(event, own ? op_deadline_ns : given_deadline_ns)) {
      case WaitEnd::kComplete:
        break;
      case WaitEnd::kClosed:
        return local_->health();
      case WaitEnd::kDeadline:
        return own ? result_of(timed_out(), result)
                   : Status{EXPERTD_REASON_TIMEOUT, "the operation has not ended; it goes on until its own deadline"};
    }
  }
}

Status Session::stream_wait_local(uint64_t event, expertd_stream_t stream) {
  if (local_ == nullptr) {
    return missing_argument("event");
  }
  const void* word = nullptr;
  uint64_t value = 0;
  Status status = local_->stream_word(event, &word, &value);
  return status.ok() && word != nullptr ? device_->wait_word(word, value, stream) : status;
}

Status Session::wait_unused(const void* data, uint64_t bytes) {
  const Extent extent = bytes == UINT64_MAX ? Extent{0, UINTPTR_MAX} : extent_of(data, bytes);
  return local_ == nullptr ? Status() : local_->wait_unused(extent, deadline_after(kControlTimeoutNs));
}

}  // namespace expertd::client
