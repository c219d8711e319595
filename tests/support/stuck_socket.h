// SPDX-License-Identifier: Apache-2.0
// A TCP socket whose last close waits: it lingers over bytes that its peer, here, never reads. When this goes, the
// close ends. One thread; tests only.
#pragma once

#include <fcntl.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <utility>
#include <vector>

namespace expertd::support {

class StuckSocket {
 public:
  StuckSocket() {
    const int listening = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof(address);
    auto* const any = reinterpret_cast<sockaddr*>(&address);
    if (::bind(listening, any, size) == 0 && ::listen(listening, 1) == 0 && ::getsockname(listening, any, &size) == 0) {
      fd_ = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
      if (::connect(fd_, any, size) == 0) {
        peer_ = ::accept4(listening, nullptr, nullptr, SOCK_CLOEXEC);
        fill();
      }
    }
    ::close(listening);
  }
  ~StuckSocket() {
    if (peer_ >= 0) {
      ::close(peer_);  // with unread bytes: resets the connection, which ends the close of the other side
    }
    if (fd_ >= 0) {
      ::close(fd_);
    }
  }
  StuckSocket(const StuckSocket&) = delete;
  StuckSocket& operator=(const StuckSocket&) = delete;

  bool ready() const { return filled_; }
  /// The caller owns it and sees to it that somebody else closes it last.
  int take() { return std::exchange(fd_, -1); }

 private:
  void fill() {
    const linger long_time{1, 3600};
    if (peer_ < 0 || ::setsockopt(fd_, SOL_SOCKET, SO_LINGER, &long_time, sizeof(long_time)) != 0) {
      return;
    }
    const std::vector<char> bytes(1 << 16);
    while (::send(fd_, bytes.data(), bytes.size(), MSG_DONTWAIT | MSG_NOSIGNAL) > 0) {
      filled_ = true;
    }
  }

  int fd_ = -1;
  int peer_ = -1;
  bool filled_ = false;
};

}  // namespace expertd::support
