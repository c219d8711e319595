// SPDX-License-Identifier: Apache-2.0
#include "daemon/control/peer_table.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <charconv>

namespace expertd::control {

namespace {

constexpr int kHighestNumber = 65536;
constexpr int kSmallestRange = 16;
// Entries of closed connections are swept once this many have gathered.
constexpr size_t kSweepAbove = 256;

constexpr std::string_view kPeerPrefix = "fd:";

// The headers of most systems are older.
constexpr int kSoPassRights = 83;

}  // namespace

base::Result<FdRange> default_fd_range() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) {
    return base::errno_status("getrlimit(RLIMIT_NOFILE)");
  }
  const rlim_t capped = std::min<rlim_t>(limit.rlim_cur, kHighestNumber);
  const FdRange range{static_cast<int>(capped / 2), static_cast<int>(capped)};
  if (range.limit - range.first < kSmallestRange) {
    return base::Status(EXPERTD_REASON_SYSTEM, "the descriptor limit is too low; raise LimitNOFILE to 1024 or more");
  }
  return range;
}

bool refuse_descriptors(int fd) {
  const int off = 0;
  return setsockopt(fd, SOL_SOCKET, kSoPassRights, &off, sizeof(off)) == 0;
}

base::Result<base::ScopedFd> PeerTable::duplicate(int fd) {
  const auto next_free = [this, fd](int minimum) {
    const int number = fcntl(fd, F_DUPFD_CLOEXEC, minimum);
    if (number >= range_.limit) {
      ::close(number);
      return -1;
    }
    return number;
  };
  int number = next_free(next_);
  if (number < 0) {
    number = next_free(range_.first);  // wrapped
  }
  if (number < 0) {
    return base::Status(EXPERTD_REASON_SYSTEM, "no descriptor is free for a connection; raise LimitNOFILE");
  }
  next_ = number + 1 < range_.limit ? number + 1 : range_.first;
  return base::ScopedFd(number);
}

base::Result<base::ScopedFd> PeerTable::adopt(base::ScopedFd fd, const Peer& peer) {
  const int flags = fcntl(fd.get(), F_GETFL);
  if (flags < 0 || fcntl(fd.get(), F_SETFL, flags | O_NONBLOCK) != 0) {
    return base::errno_status("making a connection non-blocking");
  }
  (void)refuse_descriptors(fd.get());
  struct stat info {};
  if (fstat(fd.get(), &info) != 0) {
    return base::errno_status("fstat of a connection");
  }
  const std::lock_guard lock(mutex_);
  if (entries_.size() > kSweepAbove) {
    drop_closed();
  }
  base::Result<base::ScopedFd> own = duplicate(fd.get());
  if (own.is_ok()) {
    entries_[own.value().get()] = Entry{peer, info.st_ino};
  }
  return own;
}

std::optional<Peer> PeerTable::find(std::string_view grpc_peer) const {
  if (!grpc_peer.starts_with(kPeerPrefix)) {
    return std::nullopt;
  }
  grpc_peer.remove_prefix(kPeerPrefix.size());
  int number = -1;
  const char* const end = grpc_peer.data() + grpc_peer.size();
  const auto [parsed_to, error] = std::from_chars(grpc_peer.data(), end, number);
  if (error != std::errc() || parsed_to != end) {
    return std::nullopt;
  }
  const std::lock_guard lock(mutex_);
  const auto found = entries_.find(number);
  return found == entries_.end() ? std::nullopt : std::optional<Peer>(found->second.peer);
}

void PeerTable::end_session(base::SessionId session) {
  const std::lock_guard lock(mutex_);
  std::erase_if(entries_, [session](const auto& item) {
    const auto& [number, entry] = item;
    if (entry.peer.kind != PeerKind::kSession || entry.peer.session != session) {
      return false;
    }
    if (is_open(number, entry)) {
      ::shutdown(number, SHUT_RDWR);
    }
    return true;
  });
}

size_t PeerTable::count_open(PeerKind kind) {
  const std::lock_guard lock(mutex_);
  drop_closed();
  return static_cast<size_t>(
      std::ranges::count_if(entries_, [kind](const auto& item) { return item.second.peer.kind == kind; }));
}

bool PeerTable::is_open(int number, const Entry& entry) {
  struct stat info {};
  return fstat(number, &info) == 0 && S_ISSOCK(info.st_mode) && info.st_ino == entry.inode;
}

void PeerTable::drop_closed() {
  std::erase_if(entries_, [](const auto& item) { return !is_open(item.first, item.second); });
}

}  // namespace expertd::control
