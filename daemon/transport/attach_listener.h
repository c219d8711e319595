// SPDX-License-Identifier: Apache-2.0
// AttachListener: the attach socket and the leases. One thread accepts clients, reads their HELLO, hands over the
// session's gRPC connection, ring, eventfd and flag page by SCM_RIGHTS, passes descriptors both ways, and takes the end
// of file of a connection as the end of its session. The protocol is proto/abi/attach_v1.h; every byte is untrusted,
// and so is every descriptor: the thread never closes one that a client sent.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "daemon/base/fd.h"
#include "daemon/base/status.h"
#include "daemon/session/attach_api.h"
#include "daemon/transport/attach_socket.h"

namespace expertd::transport {

struct ListenerOptions {
  std::string path;
  uint32_t mode = 0660;
  std::string group;                   // empty: unchanged
  std::vector<uint32_t> allowed_uids;  // empty: all that the file mode lets in
};

class AttachListener {
 public:
  /// Gives the daemon's end of a session's gRPC connection to the control server, with the session's user.
  using AdoptConnection = std::function<base::Status(base::ScopedFd fd, base::SessionId session, uint32_t uid)>;
  /// Tells the control server that a session is over.
  using SessionOver = std::function<void(base::SessionId session)>;

  /// Binds the socket: a stale file is replaced, a live one is ADDRESS_IN_USE.
  static base::Result<std::unique_ptr<AttachListener>> create(const ListenerOptions& options,
                                                              session::AttachApi* sessions, AdoptConnection adopt,
                                                              SessionOver over);
  ~AttachListener();
  base::Status start();
  void stop();
  /// Ends a session from the daemon's side (ring fault): its connection is closed. Any thread.
  void close_session(base::SessionId session);
  /// The process is about to end and the clients were told why: ends all connections and takes no new ones. The
  /// sessions do not end by it, for nobody is to hear that a peer is lost. Any thread; it does not wait for the
  /// listener's.
  void hang_up();

 private:
  struct Connection {
    base::ScopedFd fd;
    base::SessionId session;  // 0 until HELLO
    uint32_t uid = 0;
    uint32_t pid = 0;
    uint64_t hello_deadline_ns = 0;
  };

  AttachListener(const ListenerOptions& options, session::AttachApi* sessions, AdoptConnection adopt, SessionOver over,
                 base::ScopedFd listening, base::ScopedFd wake)
      : options_(options),
        sessions_(sessions),
        adopt_(std::move(adopt)),
        over_(std::move(over)),
        listening_(std::move(listening)),
        wake_(std::move(wake)) {}
  void thread_main();
  void accept_clients();
  /// False when the connection is over.
  bool serve(Connection& connection);
  bool answer(Connection& connection, const void* message, Packet* packet);
  bool hello(Connection& connection, const void* message);
  bool pass_fd(Connection& connection, const void* message, Packet* packet);
  void end_connection(base::ScopedFd fd);
  bool refuse(const Connection& connection, const base::Status& status);
  void drop(int fd, const std::string& cause);
  void close_requested();
  void expire_silent(uint64_t now_ns);
  void keep(int fd);
  void forget(int fd);

  ListenerOptions options_;
  session::AttachApi* sessions_;
  AdoptConnection adopt_;
  SessionOver over_;
  base::ScopedFd listening_;
  base::ScopedFd wake_;
  std::map<int, Connection> connections_;
  uint64_t accept_again_ns_ = 0;
  std::mutex close_mutex_;
  std::vector<base::SessionId> close_;
  std::mutex open_mutex_;
  std::vector<int> open_;  // the numbers in connections_; never closed while they are here
  std::atomic<bool> hung_up_{false};
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

}  // namespace expertd::transport
