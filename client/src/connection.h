// SPDX-License-Identifier: Apache-2.0
// Connection: one attachment to the daemon: lease socket, gRPC channel, ring and the client thread that polls them. It
// lives from attach to the next re-attach or detach and belongs to the Session. call() and the descriptor exchange may
// be used by any thread but the client thread. When the lease ends, every wait on it ends at once.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "client/rpc/channel.h"
#include "client/src/attach_socket.h"
#include "client/src/device_side.h"
#include "client/src/fd_exchange.h"
#include "client/src/ring_client.h"
#include "client/src/rpc_call.h"

namespace expertd::client {

struct AttachRequest {
  std::string socket_path;
  std::string device;
  std::string name;
  std::string traceparent;
  uint64_t timeout_ns = 0;
};

class Connection {
  struct Private {
    explicit Private() = default;
  };

 public:
  /// Attaches, starts the client thread and opens the session. The device side must outlive the connection.
  static Status open(const AttachRequest& request, DeviceSide* device, std::unique_ptr<Connection>* connection);
  /// Only for open().
  Connection(Private, Greeting greeting, DeviceSide* device);
  /// finish(), and the end of the lease.
  ~Connection();
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  const expertd_attach_welcome& welcome() const { return greeting_.welcome; }
  RingClient* ring() const { return ring_.get(); }
  bool lost() const { return lost_.load(std::memory_order_acquire); }

  /// What ends because the lease is over ends with this: the Reason that the daemon left in the ring, else UNAVAILABLE
  /// with `text`.
  Status over(std::string text) const;

  Status call(const char* method, const RpcMessage& request, const RpcMessage& response, uint64_t timeout_ns) {
    return explain(call_session(channel_.get(), method, request, response, timeout_ns));
  }
  Status put_fd(int fd, uint64_t deadline_ns, uint64_t* token) {
    return explain(descriptors_.put(fd, deadline_ns, token));
  }
  Status get_fd(uint64_t token, uint64_t deadline_ns, FdReply* reply) {
    return explain(descriptors_.get(token, deadline_ns, reply));
  }

  /// Whether the lease is over, asked of the socket itself: the client thread may not have seen it yet. Any thread.
  bool look_for_end();
  /// Ends everything that waits; the lease itself ends with the destructor. Any thread.
  void abandon(const char* why);
  /// Abandons and joins the client thread: afterwards nothing of this connection touches the device side any more, and
  /// the next one may begin there. Not by two threads at once.
  void finish();

 private:
  Status start(uint64_t deadline_ns);
  Status open_session(const AttachRequest& request, uint64_t deadline_ns);
  static void* thread_main(void* self);
  void run();
  bool poll_once(bool* rpc_alive);
  /// UNAVAILABLE as over() says it.
  Status explain(Status status) const;

  Greeting greeting_;
  DeviceSide* const device_;
  OwnedFd stop_;
  FdExchange descriptors_;
  std::unique_ptr<RingClient> ring_;
  std::unique_ptr<rpc::Channel> channel_;
  std::atomic<bool> lost_{false};
  bool thread_started_ = false;
  pthread_t thread_{};
};

}  // namespace expertd::client
