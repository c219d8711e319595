// SPDX-License-Identifier: Apache-2.0
#include "client/rpc/channel.h"

#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <span>
#include <system_error>
#include <utility>

#include "client/rpc/grpc_wire.h"
#include "client/rpc/http2_session.h"
#include "proto/abi/expertd_reason.h"

namespace expertd::rpc {
namespace {

constexpr std::uint64_t kMaxTimeoutNs = 24ull * 3600 * 1'000'000'000;
constexpr std::size_t kIoBytes = 64 << 10;
// gRPC keeps deadlines in whole milliseconds, and a server that gives up first answers "cancelled".
// This much more time lets the client's own deadline come first; the reset then ends the call at
// the server.
constexpr std::chrono::milliseconds kServerGrace{10};
// After 1 MiB the pump thread looks at its other descriptors; poll() reports what is left.
constexpr int kMaxReadsPerPump = 16;

CallResult make_result(int grpc_status, std::string message) {
  CallResult result;
  result.grpc_status = grpc_status;
  result.message = std::move(message);
  return result;
}

std::string errno_text(std::string_view what) {
  const int number = errno;
  return std::string(what) + ": errno " + std::to_string(number) + " (" + std::generic_category().message(number) + ")";
}

bool make_nonblocking(int fd) {
  const int flags = fcntl(fd, F_GETFL);
  return flags >= 0 && fcntl(fd, F_SETFL, flags | O_NONBLOCK) == 0 && fcntl(fd, F_SETFD, FD_CLOEXEC) == 0;
}

}  // namespace

std::unique_ptr<Channel> Channel::create(int fd, std::string authority, std::string* error) {
  std::string reason;
  int wake_fd = -1;
  std::unique_ptr<Http2Session> session;
  if (!make_nonblocking(fd)) {
    reason = errno_text("while preparing the descriptor of a channel");
  } else {
    session = Http2Session::create(std::move(authority), &reason);
  }
  if (session != nullptr) {
    // It starts readable, so that the first poll sends the connection preface.
    wake_fd = eventfd(1, EFD_NONBLOCK | EFD_CLOEXEC);
    if (wake_fd >= 0) {
      return std::make_unique<Channel>(Private(), fd, wake_fd, std::move(session));
    }
    reason = errno_text("while creating the eventfd of a channel");
  }
  if (fd >= 0) {
    close(fd);
  }
  if (error != nullptr) {
    *error = std::move(reason);
  }
  return nullptr;
}

Channel::Channel(Private, int fd, int wake_fd, std::unique_ptr<Http2Session> session)
    : fd_(fd), wake_fd_(wake_fd), session_(std::move(session)), in_(kIoBytes) {}

Channel::~Channel() {
  fail_all("the channel was closed");
  {
    // Every call is done by now; its thread only has to wake up and return.
    std::unique_lock lock(mutex_);
    callers_gone_.wait(lock, [this] { return callers_ == 0; });
  }
  close(wake_fd_);
  close(fd_);
}

bool Channel::admit_locked(CallResult* refusal) const {
  if (closed_) {
    *refusal = make_result(EXPERTD_CODE_UNAVAILABLE, close_reason_);
    return false;
  }
  if (draining_) {
    *refusal = make_result(EXPERTD_CODE_UNAVAILABLE, "the daemon takes no more calls (GOAWAY)");
    return false;
  }
  if (outbox_.starts.size() + open_streams_ >= kMaxPendingCalls) {
    *refusal = make_result(EXPERTD_CODE_RESOURCE_EXHAUSTED,
                           std::to_string(kMaxPendingCalls) + " calls are pending; wait for one to end");
    return false;
  }
  return true;
}

CallResult Channel::call(std::string_view method, std::string_view request, std::uint64_t timeout_ns) {
  const auto timeout = std::chrono::nanoseconds(std::min(timeout_ns, kMaxTimeoutNs));
  const Clock::time_point deadline = Clock::now() + timeout;
  if (request.size() > kMaxMessageBytes) {
    return make_result(EXPERTD_CODE_RESOURCE_EXHAUSTED, "the request of " + std::to_string(request.size()) +
                                                            " bytes is over the limit of " +
                                                            std::to_string(kMaxMessageBytes));
  }
  QueuedCall queued{0, std::string(method), frame_message(request), deadline};
  PendingCall pending;

  std::unique_lock lock(mutex_);
  if (!admit_locked(&pending.result)) {
    return std::move(pending.result);
  }
  const std::uint64_t call_id = next_call_id_++;
  queued.call_id = call_id;
  calls_.emplace(call_id, &pending);
  outbox_.starts.push_back(std::move(queued));
  ++callers_;
  wake();
  pending.wake.wait_until(lock, deadline, [&pending] { return pending.done; });
  // A cancellation after the deadline is the server's view of the same event.
  const bool late_cancel =
      pending.done && pending.result.grpc_status == EXPERTD_CODE_CANCELLED && Clock::now() >= deadline;
  if (!pending.done) {
    abandon_locked(call_id);
  }
  if (!pending.done || late_cancel) {
    pending.result = make_result(EXPERTD_CODE_DEADLINE_EXCEEDED, "the deadline passed before the daemon answered");
  }
  --callers_;
  if (callers_ == 0) {
    callers_gone_.notify_all();
  }
  return std::move(pending.result);
}

void Channel::abandon_locked(std::uint64_t call_id) {
  calls_.erase(call_id);
  const auto removed =
      std::erase_if(outbox_.starts, [call_id](const QueuedCall& queued) { return queued.call_id == call_id; });
  // A call that the pump thread never saw leaves no trace, so that a stopped pump cannot make the
  // outbox grow.
  if (removed == 0) {
    outbox_.cancels.push_back(call_id);
    wake();
  }
}

void Channel::wake() const {
  // It can only fail with EAGAIN at a full counter, and then the descriptor is readable already.
  const std::uint64_t one = 1;
  static_cast<void>(!write(wake_fd_, &one, sizeof(one)));
}

void Channel::clear_wake() const {
  std::uint64_t count = 0;
  static_cast<void>(!read(wake_fd_, &count, sizeof(count)));
}

void Channel::fail_all(std::string reason) {
  const std::lock_guard lock(mutex_);
  if (!closed_) {
    closed_ = true;
    close_reason_ = std::move(reason);
  }
  outbox_ = Outbox();
  for (const auto& [call_id, pending] : calls_) {
    pending->result = make_result(EXPERTD_CODE_UNAVAILABLE, close_reason_);
    pending->done = true;
    pending->wake.notify_one();
  }
  calls_.clear();
  // The pump thread learns of it by its next pump().
  wake();
}

bool Channel::take_outbox(Outbox* outbox) {
  const std::lock_guard lock(mutex_);
  if (closed_) {
    return false;
  }
  *outbox = std::exchange(outbox_, Outbox());
  // They keep their places among the pending calls until deliver() counts the streams again.
  open_streams_ += outbox->starts.size();
  return true;
}

bool Channel::pump() {
  // In this order a call queued in between is either taken now or wakes the next poll.
  clear_wake();
  Outbox outbox;
  if (!take_outbox(&outbox)) {
    return false;
  }
  const Clock::time_point now = Clock::now();
  for (QueuedCall& queued : outbox.starts) {
    const auto left = std::max(queued.deadline - now, Clock::duration::zero()) + kServerGrace;
    session_->start({queued.call_id, std::move(queued.method), std::move(queued.framed_request),
                     static_cast<std::uint64_t>(std::chrono::nanoseconds(left).count())});
  }
  for (const std::uint64_t call_id : outbox.cancels) {
    session_->cancel(call_id);
  }
  const bool alive = exchange_bytes();
  deliver();
  if (!alive) {
    fail_all(end_reason_);
  }
  return alive;
}

bool Channel::exchange_bytes() {
  bool alive = receive();
  if (!flush()) {
    // The peer reads no more, but its last words may still be in the socket.
    alive = alive && receive();
    alive = false;
  }
  if (alive && !wants_write() && session_->over()) {
    end_reason_ =
        session_->draining() ? "the daemon ended the connection (GOAWAY)" : "the daemon broke the HTTP/2 protocol";
    alive = false;
  }
  return alive;
}

bool Channel::receive() {
  for (int reads = 0; reads < kMaxReadsPerPump; ++reads) {
    const ssize_t size = recv(fd_, in_.data(), in_.size(), 0);
    if (size == 0) {
      end_reason_ = "the daemon closed the connection";
      return false;
    }
    if (size < 0) {
      if (errno == EINTR) {
        continue;
      }
      if (errno == EAGAIN || errno == EWOULDBLOCK) {
        return true;
      }
      end_reason_ = errno_text("while receiving from the daemon");
      return false;
    }
    if (!session_->receive(std::span(in_).first(static_cast<std::size_t>(size)))) {
      end_reason_ = "the daemon broke the HTTP/2 protocol";
      return false;
    }
    // A short read has emptied the socket, which saves the call that would say so.
    if (static_cast<std::size_t>(size) < in_.size()) {
      return true;
    }
  }
  return true;
}

bool Channel::flush() {
  for (;;) {
    if (!wants_write()) {
      out_.clear();
      out_sent_ = 0;
      if (!session_->produce(&out_, kIoBytes)) {
        end_reason_ = "the HTTP/2 session failed";
        return false;
      }
      if (out_.empty()) {
        return true;
      }
    }
    const ssize_t size = send(fd_, out_.data() + out_sent_, out_.size() - out_sent_, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (size >= 0) {
      out_sent_ += static_cast<std::size_t>(size);
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      return true;
    } else if (errno != EINTR) {
      end_reason_ = errno_text("while sending to the daemon");
      return false;
    }
  }
}

void Channel::deliver() {
  std::vector<Completion> completions = session_->take_completions();
  const std::lock_guard lock(mutex_);
  open_streams_ = session_->open_streams();
  draining_ = session_->draining();
  for (Completion& completion : completions) {
    const auto found = calls_.find(completion.call_id);
    // A caller that left at its deadline has no entry any more.
    if (found == calls_.end()) {
      continue;
    }
    found->second->result = std::move(completion.result);
    found->second->done = true;
    // Notified under the lock, because the object is gone as soon as its thread can leave.
    found->second->wake.notify_one();
    calls_.erase(found);
  }
}

}  // namespace expertd::rpc
