// SPDX-License-Identifier: Apache-2.0
// The parts of daemon_client.h that are plain sockets.
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>

#include "client/ctl/daemon_client.h"

namespace expertd::ctl {

namespace {

/// A connected descriptor, or -1 with errno.
int connect_unix(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof(address.sun_path)) {
    errno = ENAMETOOLONG;
    return -1;
  }
  std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
  const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) {
    return -1;
  }
  if (connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
    const int error = errno;
    close(fd);
    errno = error;
    return -1;
  }
  return fd;
}

}  // namespace

std::string default_socket() {
  const char* const directory = std::getenv("EXPERTD_RUNTIME_DIRECTORY");
  return std::string(directory != nullptr && *directory != '\0' ? directory : "/run/expertd") + "/control.sock";
}

std::string socket_problem(const std::string& path) {
  const int fd = connect_unix(path);
  if (fd >= 0) {
    close(fd);
    return {};
  }
  switch (errno) {
    case ENOENT:
      return "there is no such socket";
    case ECONNREFUSED:
      return "the socket is there but no process answers on it";
    case EACCES:
    case EPERM:
      return "permission denied; join the group of the socket or use sudo";
    default:
      return std::strerror(errno);
  }
}

LifeLine::LifeLine(const std::string& socket) : fd_(connect_unix(socket)) {}

LifeLine::~LifeLine() {
  if (fd_ >= 0) {
    close(fd_);
  }
}

bool LifeLine::wait_for_end(uint64_t timeout_ns) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point end = Clock::now() + std::chrono::nanoseconds(timeout_ns);
  while (fd_ >= 0) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(end - Clock::now()).count();
    if (left <= 0) {
      return false;
    }
    pollfd event{fd_, POLLIN, 0};
    if (poll(&event, 1, static_cast<int>(std::min<int64_t>(left, 60'000))) <= 0) {
      continue;
    }
    char discarded[4096];
    const ssize_t got = recv(fd_, discarded, sizeof(discarded), MSG_DONTWAIT);
    if (got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR)) {
      return true;
    }
  }
  return true;
}

}  // namespace expertd::ctl
