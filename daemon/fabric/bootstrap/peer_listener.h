// SPDX-License-Identifier: Apache-2.0
// The TCP socket at which peers connect: accepts on a thread of its own and hands connections on. Bounds them in
// number, ends those that say nothing after connecting, and lets those that said nothing yet make way for new ones.
// Owned by PeerServer; never reads a byte itself.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "daemon/base/fd.h"
#include "daemon/base/status.h"

namespace expertd::fabric {

struct PeerListenerOptions {
  std::string address;  // "ADDRESS:PORT" with an IPv4 or, in brackets, an IPv6 literal; port 0: any free one
  uint32_t connections_max = 256;
  uint64_t first_bytes_ns = 5'000'000'000;  // within which a connection must have sent its HTTP/2 preface
};

class PeerListener {
 public:
  /// Called by the listener's thread with a connected, non-blocking socket.
  using Accepted = std::function<void(base::ScopedFd fd)>;

  /// ADDRESS_IN_USE naming the port, CONFIG_BAD_VALUE for an address that is none of this machine's.
  static base::Result<std::unique_ptr<PeerListener>> create(const PeerListenerOptions& options, Accepted accepted);
  /// Stops accepting; connections that were handed on stay.
  ~PeerListener();
  PeerListener(const PeerListener&) = delete;
  PeerListener& operator=(const PeerListener&) = delete;

  uint16_t port() const { return port_; }

 private:
  /// A second descriptor of a socket that was handed on: shows its end, and ends it.
  struct Connection {
    base::ScopedFd fd;
    uint64_t first_bytes_deadline_ns = 0;
    bool spoke = false;
  };

  PeerListener(const PeerListenerOptions& options, Accepted accepted);
  base::Status bind_and_listen();
  void run();
  void accept_one();
  bool make_way();
  void drop_ended(const std::vector<short>& events);
  void end_silent(uint64_t now_ns);
  int wait_ms(uint64_t now_ns) const;

  const PeerListenerOptions options_;
  const Accepted accepted_;
  base::ScopedFd socket_;
  base::ScopedFd stop_;
  uint16_t port_ = 0;
  std::vector<Connection> connections_;  // listener thread only, the oldest first
  uint64_t pause_until_ns_ = 0;          // listener thread only: no descriptor was free
  std::thread thread_;
};

}  // namespace expertd::fabric
