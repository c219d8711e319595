// SPDX-License-Identifier: Apache-2.0
#include "daemon/transport/attach_socket.h"

#include <grp.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace expertd::transport {

namespace {

// SCM_MAX_FD of the kernel: with room for all that one packet can carry it closes none of them on the receiving thread.
constexpr size_t kMaxReceivedFds = 253;
constexpr size_t kMaxSentFds = 4;
constexpr int kBacklog = 128;

base::Status check_stale(const std::string& path, const sockaddr_un& address) {
  base::ScopedFd probe(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  if (!probe.valid()) {
    return base::errno_status("socket");
  }
  if (::connect(probe.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0) {
    return base::Status(EXPERTD_REASON_ADDRESS_IN_USE, path + ": another process listens here");
  }
  if (errno == ECONNREFUSED) {
    ::unlink(path.c_str());  // left by a process that is gone
  } else if (errno != ENOENT) {
    return base::Status(EXPERTD_REASON_ADDRESS_IN_USE, path + ": in the way: " + std::strerror(errno));
  }
  return base::Status::ok();
}

}  // namespace

base::Result<base::ScopedFd> listen_seqpacket(const std::string& path, uint32_t mode, const std::string& group) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof(address.sun_path)) {
    return base::Status(EXPERTD_REASON_CONFIG_BAD_VALUE,
                        path + ": longer than " + std::to_string(sizeof(address.sun_path) - 1) + " bytes");
  }
  std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
  EXPERTD_RETURN_IF_ERROR(check_stale(path, address));
  base::ScopedFd fd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd.valid()) {
    return base::errno_status("socket");
  }
  if (::bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
    const base::Reason reason = errno == EADDRINUSE ? EXPERTD_REASON_ADDRESS_IN_USE : EXPERTD_REASON_RUNTIME_DIRECTORY;
    return base::Status(reason, path + ": " + std::strerror(errno));
  }
  if (::chmod(path.c_str(), mode) != 0) {
    return base::errno_status("chmod of " + path);
  }
  if (!group.empty()) {
    const struct group* entry = ::getgrnam(group.c_str());
    if (entry == nullptr || ::chown(path.c_str(), static_cast<uid_t>(-1), entry->gr_gid) != 0) {
      return base::Status(EXPERTD_REASON_CONFIG_BAD_VALUE, "control.socket_group \"" + group + "\" cannot be used");
    }
  }
  if (::listen(fd.get(), kBacklog) != 0) {
    return base::errno_status("listen on " + path);
  }
  return fd;
}

Packet receive_packet(int fd, void* buffer, size_t capacity) {
  Packet packet;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * kMaxReceivedFds)];
  iovec data{buffer, capacity};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  const ssize_t received = ::recvmsg(fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (received < 0) {
    packet.nothing = errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR;
    packet.end_of_file = !packet.nothing;
    return packet;
  }
  packet.bytes = static_cast<size_t>(received);
  packet.end_of_file = received == 0;
  packet.fds_missing = (message.msg_flags & MSG_CTRUNC) != 0;
  for (cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr; header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) {
      continue;
    }
    const size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int received_fd = -1;
      std::memcpy(&received_fd, CMSG_DATA(header) + i * sizeof(int), sizeof(int));
      packet.fds.emplace_back(received_fd);
    }
  }
  return packet;
}

bool end_with_unread(int fd) {
  ::shutdown(fd, SHUT_RDWR);
  // Every packet comes with its sender's credentials then, also one of no bytes, which would look like the end of file:
  // room for none of them shows as MSG_CTRUNC, and peeking leaves the packet and its descriptors where they are.
  const int on = 1;
  (void)::setsockopt(fd, SOL_SOCKET, SO_PASSCRED, &on, sizeof(on));
  char byte = 0;
  iovec data{&byte, 1};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  const ssize_t seen = ::recvmsg(fd, &message, MSG_PEEK | MSG_DONTWAIT);
  return seen > 0 || (seen == 0 && (message.msg_flags & MSG_CTRUNC) != 0);
}

bool send_packet(int fd, const void* message_bytes, size_t bytes, const std::vector<int>& fds) {
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * kMaxSentFds)] = {};
  iovec data{const_cast<void*>(message_bytes), bytes};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  if (!fds.empty()) {
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(sizeof(int) * fds.size());
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int) * fds.size());
    std::memcpy(CMSG_DATA(header), fds.data(), sizeof(int) * fds.size());
  }
  return ::sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL) == static_cast<ssize_t>(bytes);
}

}  // namespace expertd::transport
