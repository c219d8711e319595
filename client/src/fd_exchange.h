// SPDX-License-Identifier: Apache-2.0
// FdExchange: PUT_FD and GET_FD over the attach socket, one request at a time. request() by any thread but the client
// thread; on_readable() and fail() by the client thread, which reads the replies. Replies come in order, so that a
// reply after its caller's deadline is counted off and dropped.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>

#include "client/src/owned_fd.h"
#include "client/src/status.h"

namespace expertd::client {

struct FdReply {
  uint64_t token = 0;
  uint64_t bytes = 0;
  OwnedFd fd;
};

class FdExchange {
 public:
  /// Borrows the socket.
  explicit FdExchange(int socket) : socket_(socket) {}

  /// Hands over a descriptor (which stays the caller's) and gets its token.
  Status put(int fd, uint64_t deadline_ns, uint64_t* token);
  /// Fetches the descriptor of a window.
  Status get(uint64_t token, uint64_t deadline_ns, FdReply* reply);

  /// Takes every packet that is there. False: the lease is over.
  bool on_readable();
  /// Ends the request in progress and every later one with UNAVAILABLE.
  void fail();

 private:
  Status request(uint32_t type, uint64_t token, int fd, uint64_t deadline_ns, FdReply* reply);
  Status wait_reply(std::unique_lock<std::mutex>* lock, uint64_t deadline_ns, FdReply* reply);

  const int socket_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool busy_ = false;
  bool failed_ = false;
  bool replied_ = false;
  uint64_t abandoned_ = 0;  // replies still to come that nobody waits for
  Status reply_status_;
  FdReply reply_;
};

}  // namespace expertd::client
