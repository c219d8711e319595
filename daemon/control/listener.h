// SPDX-License-Identifier: Apache-2.0
// control.sock: binds it, and accepts on one thread, handing each allowed connection with its peer credentials to a
// callback (on that thread). Owned by ControlServer. It never speaks gRPC, and never takes a socket path that another
// process still answers on.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "daemon/base/fd.h"
#include "daemon/base/status.h"
#include "daemon/control/peer_table.h"

namespace expertd::control {

struct ListenerOptions {
  std::string path;
  uint32_t mode = 0660;
  std::string group;                   // empty: leave the group of the process
  std::vector<uint32_t> allowed_uids;  // empty: whom the mode lets in; root and the daemon's uid always may
};

class Listener {
 public:
  using Accepted = std::function<void(base::ScopedFd connection, const Peer& peer)>;

  /// Binds and listens, so that clients queue from here on, and starts the thread. ADDRESS_IN_USE when somebody answers
  /// on the path or it is no socket; CONFIG_BAD_VALUE for a path or group that cannot be used.
  static base::Result<std::unique_ptr<Listener>> create(const ListenerOptions& options, Accepted accepted);
  /// Ends the thread and removes the socket, unless another process has replaced it.
  ~Listener();
  Listener(const Listener&) = delete;
  Listener& operator=(const Listener&) = delete;

 private:
  Listener(const ListenerOptions& options, Accepted accepted) : options_(options), accepted_(std::move(accepted)) {}

  base::Status bind_and_listen();
  base::Status set_owner_and_mode() const;
  void accept_loop();
  void accept_one();
  bool allowed(uint32_t uid) const;
  /// Waits for the stop event at most this long; true when it came.
  bool stopped_within(int timeout_ms) const;

  const ListenerOptions options_;
  const Accepted accepted_;
  base::ScopedFd socket_;
  base::ScopedFd stop_;  // eventfd
  dev_t device_ = 0;     // of the socket file, to remove only our own
  ino_t inode_ = 0;
  std::thread thread_;
};

}  // namespace expertd::control
