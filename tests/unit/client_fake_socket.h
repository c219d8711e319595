// SPDX-License-Identifier: Apache-2.0
// Sealed memfds, packets with descriptors and details of gRPC's errors, for the stand-in daemon of the client's tests.
// Any thread.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace expertd::test {

/// Memory that a stand-in has mapped.
struct Region {
  char* data = nullptr;
  uint64_t bytes = 0;
};

inline int make_memfd(uint64_t bytes) {
  const int fd = memfd_create("fake", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (ftruncate(fd, static_cast<off_t>(bytes)) != 0 || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) != 0) {
    abort();
  }
  return fd;
}

inline void send_with(int socket, const void* bytes, size_t size, const std::vector<int>& fds) {
  alignas(cmsghdr) char control[CMSG_SPACE(4 * sizeof(int))] = {};
  iovec part{const_cast<void*>(bytes), size};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (!fds.empty()) {
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(fds.size() * sizeof(int));
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(fds.size() * sizeof(int));
    memcpy(CMSG_DATA(header), fds.data(), fds.size() * sizeof(int));
  }
  if (sendmsg(socket, &message, MSG_NOSIGNAL) < 0) {
    return;
  }
}

inline ssize_t receive_with(int socket, void* bytes, size_t size, int* fd) {
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  iovec part{bytes, size};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  const ssize_t got = recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
  const cmsghdr* header = CMSG_FIRSTHDR(&message);
  if (header != nullptr && header->cmsg_type == SCM_RIGHTS) {
    memcpy(fd, CMSG_DATA(header), sizeof(int));
  }
  return got;
}

// google.rpc.Status with one detail (type url and value), written by hand.
inline std::string status_details(const std::string& type, const std::string& value) {
  const auto field = [](char tag, const std::string& bytes) {
    return std::string(1, tag) + std::string(1, static_cast<char>(bytes.size())) + bytes;
  };
  const std::string any = field('\x0a', type) + field('\x12', value);
  std::string details = std::string("\x08\x09", 2) + field('\x12', "e");
  details += std::string(1, '\x1a');
  details += static_cast<char>((any.size() & 0x7f) | (any.size() > 127 ? 0x80 : 0));
  if (any.size() > 127) {
    details += static_cast<char>(any.size() >> 7);
  }
  return details + any;
}

}  // namespace expertd::test
