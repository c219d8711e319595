// SPDX-License-Identifier: Apache-2.0
#include "client/src/buffer_pair.h"

#include <memory>
#include <utility>
#include <vector>

#include "client/src/clock.h"
#include "client/src/session.h"

namespace expertd::client {
namespace {

uint64_t element_bytes(expertd_data_type_t dtype) {
  switch (dtype) {
    case EXPERTD_BF16:
      return 2;
    case EXPERTD_F32:
    case EXPERTD_I32:
      return 4;
    case EXPERTD_I64:
      return 8;
    case EXPERTD_BYTES:
    case EXPERTD_FP8_E4M3:
    case EXPERTD_U8:
      return 1;
  }
  return 0;
}

// An operation that has not ended, as opposed to one whose end is not known any more.
bool still_running(const Status& status, const expertd_op_result_t& result) {
  return status.reason == EXPERTD_REASON_TIMEOUT && result.status.reason != EXPERTD_REASON_TIMEOUT;
}

}  // namespace

Status BufferPair::create(Session* session, uint64_t elements, expertd_data_type_t dtype, BufferPair** pair) {
  const uint64_t size = element_bytes(dtype);
  constexpr uint64_t kMaxElements = uint64_t{1} << 40;
  if (size == 0) {
    return range_error(EXPERTD_REASON_WRONG_DTYPE, "dtype", dtype, EXPERTD_BF16, EXPERTD_U8);
  }
  if (elements == 0 || elements > kMaxElements) {
    return range_error(EXPERTD_REASON_ARGUMENT_RANGE, "elements", static_cast<int64_t>(elements), 1, kMaxElements);
  }
  auto made = std::make_unique<BufferPair>(session);
  Status status = session->memory()->allocate(elements * size, &made->send_);
  if (!status.ok()) {
    return status;
  }
  status = session->memory()->allocate(elements * size, &made->receive_);
  void* send = made->send_;
  void* receive = made->receive_;
  if (status.ok()) {
    status = session->add_pair(std::move(made), pair);
  }
  if (!status.ok()) {
    // The first failure is the one to report.
    static_cast<void>(session->memory()->free_allocated(send));
    if (receive != nullptr) {
      static_cast<void>(session->memory()->free_allocated(receive));
    }
  }
  return status;
}

Status BufferPair::destroy(BufferPair* pair) {
  Session* session = pair->session_;
  const std::unique_ptr<BufferPair> owned = session->remove_pair(pair);
  if (owned == nullptr) {
    return error(EXPERTD_REASON_NO_SUCH_BUFFER, "the buffer pair was destroyed already");
  }
  Status send = session->memory()->free_allocated(owned->send_);
  Status receive = session->memory()->free_allocated(owned->receive_);
  return send.ok() ? receive : send;
}

Status BufferPair::record(expertd_event_t event, expertd_hook_t hook, void* user) {
  if (unwrap(event.session) != session_) {
    return error(EXPERTD_REASON_NO_SUCH_SESSION, "the event belongs to another session than the buffer pair");
  }
  const std::lock_guard lock(mutex_);
  if (queue_.size() >= kMaxRecorded) {
    return range_error(EXPERTD_REASON_RING_OVERFLOW, "recorded events", static_cast<int64_t>(queue_.size()) + 1, 0,
                       kMaxRecorded);
  }
  queue_.push_back({event.seq, hook, user});
  return {};
}

Status BufferPair::stream_wait(expertd_stream_t stream) {
  std::vector<uint64_t> events;
  {
    const std::lock_guard lock(mutex_);
    for (const Recorded& recorded : queue_) {
      events.push_back(recorded.event);
    }
  }
  for (const uint64_t event : events) {
    Status status = session_->stream_wait(event, stream);
    if (!status.ok()) {
      return status;
    }
  }
  return {};
}

uint32_t BufferPair::pending() {
  const std::lock_guard lock(mutex_);
  return static_cast<uint32_t>(queue_.size());
}

// False when another thread has taken this event meanwhile.
bool BufferPair::take_front(uint64_t event, Recorded* recorded) {
  const std::lock_guard lock(mutex_);
  if (queue_.empty() || queue_.front().event != event) {
    return false;
  }
  *recorded = queue_.front();
  queue_.pop_front();
  return true;
}

// The event has ended: a wait returns at once.
Status BufferPair::finish(const Recorded& recorded) {
  expertd_op_result_t result{};
  result.struct_size = sizeof(result);
  Status status = session_->wait(recorded.event, 1, &result);
  if (recorded.hook != nullptr) {
    recorded.hook(to_c(status.reason), &result, recorded.user);
  }
  return status;
}

Status BufferPair::poll(uint32_t* taken) {
  Status first;
  *taken = 0;
  for (size_t i = 0; i < kMaxRecorded; ++i) {
    uint64_t event = 0;
    {
      const std::lock_guard lock(mutex_);
      if (queue_.empty()) {
        break;
      }
      event = queue_.front().event;
    }
    int done = 0;
    Status asked = session_->query(event, &done);
    if (asked.ok() && done == 0) {
      break;
    }
    Recorded recorded;
    if (take_front(event, &recorded)) {
      ++*taken;
      Status status = finish(recorded);
      first = first.ok() ? std::move(status) : std::move(first);
    }
  }
  return first;
}

Status BufferPair::synchronize(uint64_t timeout_ns) {
  const uint64_t deadline_ns = timeout_ns == 0 ? 0 : deadline_after(timeout_ns);
  Status first;
  for (;;) {
    uint64_t event = 0;
    {
      const std::lock_guard lock(mutex_);
      if (queue_.empty()) {
        return first;
      }
      event = queue_.front().event;
    }
    expertd_op_result_t result{};
    result.struct_size = sizeof(result);
    // At least 1, because 0 would mean the operation's own deadline.
    const uint64_t left = deadline_ns == 0 ? 0 : left_until(deadline_ns) + 1;
    Status status = session_->wait(event, left, &result);
    if (still_running(status, result)) {
      return status;
    }
    Recorded recorded;
    if (take_front(event, &recorded)) {
      if (recorded.hook != nullptr) {
        recorded.hook(to_c(status.reason), &result, recorded.user);
      }
      first = first.ok() ? std::move(status) : std::move(first);
    }
  }
}

}  // namespace expertd::client
