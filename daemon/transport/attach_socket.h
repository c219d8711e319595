// SPDX-License-Identifier: Apache-2.0
// System calls of the attach socket: binding a SEQPACKET path, sending and receiving one packet with descriptors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "daemon/base/fd.h"
#include "daemon/base/status.h"

namespace expertd::transport {

/// Binds and listens. A file on which nobody answers is replaced; ADDRESS_IN_USE when somebody does.
base::Result<base::ScopedFd> listen_seqpacket(const std::string& path, uint32_t mode, const std::string& group);

struct Packet {
  size_t bytes = 0;
  bool end_of_file = false;
  bool nothing = false;             // would block
  bool fds_missing = false;         // descriptors came for which the process has no number free
  std::vector<base::ScopedFd> fds;  // of the sender: AttachApi::discard_fd closes them
};
Packet receive_packet(int fd, void* buffer, size_t capacity);
/// Takes no packet more from the peer and says whether some were not read, whose descriptors a close would close as
/// well.
bool end_with_unread(int fd);
/// False when the packet could not be sent whole at once: the peer is gone or does not read.
bool send_packet(int fd, const void* message, size_t bytes, const std::vector<int>& fds);

}  // namespace expertd::transport
