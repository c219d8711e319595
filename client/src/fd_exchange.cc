// SPDX-License-Identifier: Apache-2.0
#include "client/src/fd_exchange.h"

#include <chrono>

#include "client/src/attach_socket.h"
#include "client/src/clock.h"

namespace expertd::client {
namespace {

// steady_clock is CLOCK_MONOTONIC.
std::chrono::steady_clock::time_point time_point(uint64_t time_ns) {
  return std::chrono::steady_clock::time_point(std::chrono::nanoseconds(static_cast<int64_t>(time_ns)));
}

Status gone() {
  return {EXPERTD_REASON_UNAVAILABLE, "the session's lease is over"};
}

Status reply_status(const expertd_attach_fd& packet) {
  if (packet.reason == EXPERTD_REASON_NONE) {
    return {};
  }
  const int32_t reason = static_cast<int32_t>(packet.reason);
  return {reason, reason_sentence(reason)};
}

}  // namespace

Status FdExchange::put(int fd, uint64_t deadline_ns, uint64_t* token) {
  FdReply reply;
  Status status = request(EXPERTD_ATTACH_PUT_FD, 0, fd, deadline_ns, &reply);
  *token = reply.token;
  return status;
}

Status FdExchange::get(uint64_t token, uint64_t deadline_ns, FdReply* reply) {
  Status status = request(EXPERTD_ATTACH_GET_FD, token, -1, deadline_ns, reply);
  if (status.ok() && !reply->fd.valid()) {
    return error(EXPERTD_REASON_BAD_MESSAGE, "the daemon's reply to GET_FD carries no descriptor");
  }
  return status;
}

Status FdExchange::request(uint32_t type, uint64_t token, int fd, uint64_t deadline_ns, FdReply* reply) {
  std::unique_lock lock(mutex_);
  if (!changed_.wait_until(lock, time_point(deadline_ns), [this] { return failed_ || !busy_; })) {
    return {EXPERTD_REASON_TIMEOUT, "another request held the attach socket until the deadline"};
  }
  if (failed_) {
    return gone();
  }
  busy_ = true;
  replied_ = false;
  expertd_attach_fd packet{};
  packet.magic = EXPERTD_ATTACH_MAGIC;
  packet.type = type;
  packet.token = token;
  lock.unlock();
  Status status = send_packet(socket_, &packet, sizeof(packet), fd, deadline_ns);
  lock.lock();
  if (status.ok()) {
    status = wait_reply(&lock, deadline_ns, reply);
  }
  busy_ = false;
  changed_.notify_all();
  return status;
}

Status FdExchange::wait_reply(std::unique_lock<std::mutex>* lock, uint64_t deadline_ns, FdReply* reply) {
  changed_.wait_until(*lock, time_point(deadline_ns), [this] { return failed_ || replied_; });
  if (replied_) {
    *reply = std::move(reply_);
    return std::move(reply_status_);
  }
  if (failed_) {
    return gone();
  }
  ++abandoned_;
  return {EXPERTD_REASON_TIMEOUT, "the daemon did not answer on the attach socket before the deadline"};
}

bool FdExchange::on_readable() {
  for (;;) {
    expertd_attach_fd body{};
    Packet packet;
    const Receive received = receive_packet(socket_, &body, sizeof(body), &packet);
    if (received == Receive::kNothing) {
      return true;
    }
    // A daemon that speaks another protocol is as good as gone.
    if (received == Receive::kEnd || packet.truncated || packet.bytes != sizeof(body) ||
        body.magic != EXPERTD_ATTACH_MAGIC || body.type != EXPERTD_ATTACH_FD_REPLY) {
      return false;
    }
    const std::lock_guard lock(mutex_);
    if (abandoned_ > 0) {
      --abandoned_;
    } else if (busy_ && !replied_) {
      replied_ = true;
      reply_status_ = reply_status(body);
      reply_.token = body.token;
      reply_.bytes = body.bytes;
      reply_.fd = std::move(packet.fds[0]);
      changed_.notify_all();
    }
  }
}

void FdExchange::fail() {
  const std::lock_guard lock(mutex_);
  failed_ = true;
  changed_.notify_all();
}

}  // namespace expertd::client
