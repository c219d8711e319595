// SPDX-License-Identifier: Apache-2.0
#include "client/src/attach_socket.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "client/src/clock.h"

namespace expertd::client {
namespace {

Status timed_out(const char* what) {
  return error(EXPERTD_REASON_UNAVAILABLE, "the daemon did not %s before the deadline", what);
}

// True when the socket is ready; false at the deadline.
bool wait_ready(int socket, short events, uint64_t deadline_ns) {
  for (;;) {
    const timespec left = to_timespec(left_until(deadline_ns));
    pollfd entry{socket, events, 0};
    const int ready = ppoll(&entry, 1, &left, nullptr);
    if (ready > 0) {
      return true;
    }
    if (ready == 0 || errno != EINTR) {
      return false;
    }
  }
}

Status connect_error(const std::string& path) {
  const int number = errno;
  const char* hint = number == EACCES || number == EPERM ? "the socket's group may use it" : "is expertd running?";
  const int32_t reason = number == EACCES || number == EPERM ? EXPERTD_REASON_PERMISSION : EXPERTD_REASON_UNAVAILABLE;
  errno = number;
  return {reason, format("cannot connect to %s: %s; %s", path.c_str(), system_error("connect").text.c_str(), hint)};
}

Status connect_to(const std::string& path, uint64_t deadline_ns, OwnedFd* socket_fd) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof(address.sun_path)) {
    return range_error(EXPERTD_REASON_ARGUMENT_RANGE, "length of socket_path", static_cast<int64_t>(path.size()), 1,
                       static_cast<int64_t>(sizeof(address.sun_path)) - 1);
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  OwnedFd made(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  if (!made.valid()) {
    return system_error("socket");
  }
  // A full backlog blocks connect(); this bounds it.
  const uint64_t left = left_until(deadline_ns) + 1000;
  timeval limit{};
  limit.tv_sec = static_cast<time_t>(left / kNsPerS);
  limit.tv_usec = static_cast<suseconds_t>(left % kNsPerS / 1000);
  setsockopt(made.get(), SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
  int result = 0;
  do {
    result = connect(made.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address));
  } while (result != 0 && errno == EINTR && left_until(deadline_ns) > 0);
  if (result != 0 && errno != EISCONN) {
    return connect_error(path);
  }
  if (fcntl(made.get(), F_SETFL, O_NONBLOCK) != 0) {
    return system_error("fcntl of the attach socket");
  }
  *socket_fd = std::move(made);
  return {};
}

void take_fds(msghdr* message, Packet* packet) {
  for (cmsghdr* control = CMSG_FIRSTHDR(message); control != nullptr; control = CMSG_NXTHDR(message, control)) {
    if (control->cmsg_level != SOL_SOCKET || control->cmsg_type != SCM_RIGHTS) {
      continue;
    }
    const size_t count = (control->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(control) + i * sizeof(int), sizeof(int));
      OwnedFd owned(fd);
      if (packet->fd_count < kMaxPacketFds) {
        packet->fds[packet->fd_count++] = std::move(owned);
      }
    }
  }
}

Status refusal(const expertd_attach_welcome& welcome) {
  const size_t length = strnlen(welcome.message, sizeof(welcome.message));
  const int32_t reason = static_cast<int32_t>(welcome.reason);
  return {reason == 0 ? EXPERTD_REASON_INTERNAL : reason, std::string(welcome.message, length)};
}

Status check_welcome(const Packet& packet, const expertd_attach_welcome& welcome) {
  if (packet.truncated || packet.bytes != sizeof(welcome) || welcome.magic != EXPERTD_ATTACH_MAGIC) {
    return error(EXPERTD_REASON_PROTOCOL_VERSION, "the answer of %zu bytes is not a welcome of this protocol",
                 packet.bytes);
  }
  if (welcome.type == EXPERTD_ATTACH_REFUSED) {
    return refusal(welcome);
  }
  if (welcome.type != EXPERTD_ATTACH_WELCOME || welcome.abi_major != EXPERTD_ABI_MAJOR) {
    return error(EXPERTD_REASON_PROTOCOL_VERSION, "the daemon speaks ABI %u.%u (message %u), this library %u.%u",
                 welcome.abi_major, welcome.abi_minor, welcome.type, EXPERTD_ABI_MAJOR, EXPERTD_ABI_MINOR);
  }
  const size_t needed = welcome.device_kind == EXPERTD_DEVICE_CUDA ? 4 : 3;
  if (packet.fd_count < needed) {
    return error(EXPERTD_REASON_BAD_MESSAGE, "the welcome carries %zu descriptors, %zu are needed", packet.fd_count,
                 needed);
  }
  return {};
}

}  // namespace

Receive receive_packet(int socket, void* payload, size_t capacity, Packet* packet) {
  alignas(cmsghdr) char control[CMSG_SPACE(kMaxPacketFds * sizeof(int))];
  iovec part{payload, capacity};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  ssize_t size = 0;
  do {
    size = recvmsg(socket, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  } while (size < 0 && errno == EINTR);
  if (size < 0) {
    return errno == EAGAIN || errno == EWOULDBLOCK ? Receive::kNothing : Receive::kEnd;
  }
  *packet = Packet();
  take_fds(&message, packet);
  // An empty packet is what an end of file looks like; the protocol has none.
  if (size == 0) {
    return Receive::kEnd;
  }
  packet->bytes = static_cast<size_t>(size);
  packet->truncated = (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0;
  return Receive::kPacket;
}

Status send_packet(int socket, const void* payload, size_t bytes, int fd, uint64_t deadline_ns) {
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  iovec part{const_cast<void*>(payload), bytes};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (fd >= 0) {
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(header), &fd, sizeof(int));
  }
  for (;;) {
    if (sendmsg(socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0) {
      return {};
    }
    if (errno == EAGAIN || errno == EWOULDBLOCK) {
      if (!wait_ready(socket, POLLOUT, deadline_ns)) {
        return timed_out("take a packet");
      }
    } else if (errno != EINTR) {
      return {EXPERTD_REASON_UNAVAILABLE, system_error("sendmsg on the attach socket").text};
    }
  }
}

Status greet(const std::string& path, const expertd_attach_hello& hello, uint64_t deadline_ns, Greeting* greeting) {
  Status status = connect_to(path, deadline_ns, &greeting->socket);
  if (!status.ok()) {
    return status;
  }
  const int socket = greeting->socket.get();
  status = send_packet(socket, &hello, sizeof(hello), -1, deadline_ns);
  // A daemon that refuses may have closed the socket before the hello; its refusal can still be read.
  if (!wait_ready(socket, POLLIN, deadline_ns)) {
    return status.ok() ? timed_out("answer the hello") : status;
  }
  Packet packet;
  if (receive_packet(socket, &greeting->welcome, sizeof(greeting->welcome), &packet) != Receive::kPacket) {
    return error(EXPERTD_REASON_UNAVAILABLE, "the daemon closed %s without an answer", path.c_str());
  }
  status = check_welcome(packet, greeting->welcome);
  if (status.ok()) {
    greeting->rpc = std::move(packet.fds[0]);
    greeting->ring = std::move(packet.fds[1]);
    greeting->wake = std::move(packet.fds[2]);
    greeting->flag_page = std::move(packet.fds[3]);
  }
  return status;
}

}  // namespace expertd::client
