// SPDX-License-Identifier: Apache-2.0
// Who is behind each adopted gRPC connection. gRPC names such a connection by its descriptor ("fd:N"), so every one
// gets a number of its own: numbers only rise and wrap below the descriptor limit, and a late call of a closed
// connection is never taken for another peer's. Any thread; owned by ControlServer. It never owns the descriptors: gRPC
// closes them.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <mutex>
#include <optional>
#include <string_view>
#include <unordered_map>

#include "daemon/base/fd.h"
#include "daemon/base/ids.h"
#include "daemon/base/status.h"

namespace expertd::control {

enum class PeerKind { kSession, kOperator };

struct Peer {
  PeerKind kind = PeerKind::kOperator;
  base::SessionId session;  // kSession
  uint32_t uid = 0;
  uint32_t pid = 0;  // kOperator; 0 when it lives in another pid namespace
};

/// Descriptor numbers [first, limit) are the table's; nobody else takes numbers that high by chance.
struct FdRange {
  int first = 0;
  int limit = 0;
};

/// The upper half of what RLIMIT_NOFILE leaves, at most 65536 (the kernel's table grows with the highest number).
base::Result<FdRange> default_fd_range();

/// Has the kernel refuse descriptors that a peer sends over the socket, or over those accepted from it. gRPC asks for
/// none, so the kernel would close them on gRPC's threads, and a close may wait for hours. Kernels before 6.16 cannot:
/// false.
bool refuse_descriptors(int fd);

class PeerTable {
 public:
  explicit PeerTable(FdRange range) : range_(range), next_(range.first) {}

  /// Moves a connected socket to a number of its own and makes it non-blocking; the caller owns the result. SYSTEM when
  /// no number is free.
  base::Result<base::ScopedFd> adopt(base::ScopedFd fd, const Peer& peer);
  /// The peer of a gRPC peer name; empty for an unknown, ended or foreign name.
  std::optional<Peer> find(std::string_view grpc_peer) const;
  /// Forgets the session's connections and shuts them down, so that their calls end.
  void end_session(base::SessionId session);
  /// Connections of a kind that are still open; entries of closed ones are dropped.
  size_t count_open(PeerKind kind);

 private:
  struct Entry {
    Peer peer;
    ino_t inode = 0;  // of the socket: tells it from another file that got the same number
  };

  base::Result<base::ScopedFd> duplicate(int fd);
  static bool is_open(int number, const Entry& entry);
  void drop_closed();

  const FdRange range_;
  mutable std::mutex mutex_;
  int next_;  // under mutex_, as is entries_
  std::unordered_map<int, Entry> entries_;
};

}  // namespace expertd::control
