// SPDX-License-Identifier: Apache-2.0
// Channel: blocking unary gRPC calls over one connected stream socket. call() and fail_all() may be
// used from any thread, the rest by the one pump thread of the client library, which polls fd() and
// wake_fd(). The channel owns its descriptors and starts no thread. It closes the socket without a
// farewell and never shuts it down, because a forked child shares the connection with its parent.
// It never retries a call and never holds more than kMaxPendingCalls.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "client/rpc/call_result.h"

namespace expertd::rpc {

class Http2Session;

/// Calls queued or in flight, counting abandoned ones until the server has been told.
inline constexpr std::size_t kMaxPendingCalls = 64;

class Channel {
  struct Private {
    explicit Private() = default;
  };

 public:
  /// Takes over the descriptor, also when it fails, which gives null and says why in error.
  static std::unique_ptr<Channel> create(int fd, std::string authority, std::string* error);
  /// Only for create().
  Channel(Private, int fd, int wake_fd, std::unique_ptr<Http2Session> session);
  /// Ends pending calls with UNAVAILABLE and waits for their threads to leave call(). The pump
  /// thread must be past its last use of the channel.
  ~Channel();
  Channel(const Channel&) = delete;
  Channel& operator=(const Channel&) = delete;

  /// Blocks until the answer, the end of the connection or the timeout (capped at a day); not for
  /// the pump thread. The method is a path such as "/expertd.v1.Session/JoinGroup".
  CallResult call(std::string_view method, std::string_view request, std::uint64_t timeout_ns);

  int fd() const { return fd_; }
  /// Readable when another thread queued something; pump() clears it.
  int wake_fd() const { return wake_fd_; }
  /// True while the socket did not take everything: poll fd() for writing too.
  bool wants_write() const { return out_sent_ < out_.size(); }
  /// Moves bytes both ways without blocking; to be called when a descriptor is ready. False means
  /// that the connection is over, every call has ended and the descriptors need no more polling.
  bool pump();
  /// Every pending call ends with UNAVAILABLE now, and every later one at once.
  void fail_all(std::string reason);

 private:
  using Clock = std::chrono::steady_clock;

  // Lives on the stack of call(); reachable by others only through calls_ under mutex_.
  struct PendingCall {
    std::condition_variable wake;
    bool done = false;
    CallResult result;
  };
  struct QueuedCall {
    std::uint64_t call_id = 0;
    std::string method;
    std::string framed_request;
    Clock::time_point deadline;
  };
  // What call() hands to the pump thread.
  struct Outbox {
    std::vector<QueuedCall> starts;
    std::vector<std::uint64_t> cancels;
  };

  bool admit_locked(CallResult* refusal) const;
  void abandon_locked(std::uint64_t call_id);
  void wake() const;
  void clear_wake() const;
  bool take_outbox(Outbox* outbox);
  bool exchange_bytes();
  bool receive();
  bool flush();
  void deliver();

  const int fd_;
  const int wake_fd_;

  // Of the pump thread alone.
  std::unique_ptr<Http2Session> session_;
  std::string out_;
  std::size_t out_sent_ = 0;
  std::vector<std::uint8_t> in_;
  std::string end_reason_;

  // Guarded by mutex_.
  std::mutex mutex_;
  std::condition_variable callers_gone_;
  std::map<std::uint64_t, PendingCall*> calls_;
  Outbox outbox_;
  std::uint64_t next_call_id_ = 1;
  std::size_t open_streams_ = 0;
  std::size_t callers_ = 0;
  bool draining_ = false;
  bool closed_ = false;
  std::string close_reason_;
};

}  // namespace expertd::rpc
