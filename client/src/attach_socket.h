// SPDX-License-Identifier: Apache-2.0
// The attach socket (proto/abi/attach_v1.h) as packets with descriptors: connecting, the greeting, one packet each way.
// Any thread, one at a time per direction. It keeps nothing and never waits without a deadline.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "client/src/owned_fd.h"
#include "client/src/status.h"
#include "proto/abi/attach_v1.h"

namespace expertd::client {

inline constexpr size_t kMaxPacketFds = 4;

struct Packet {
  size_t bytes = 0;
  /// Control data or payload did not fit: nothing in the packet can be believed.
  bool truncated = false;
  std::array<OwnedFd, kMaxPacketFds> fds;
  size_t fd_count = 0;
};

/// One packet without blocking. kEnd: the daemon closed the socket or it failed.
enum class Receive { kPacket, kNothing, kEnd };
Receive receive_packet(int socket, void* payload, size_t capacity, Packet* packet);

/// Sends one packet, with one descriptor unless fd < 0.
Status send_packet(int socket, const void* payload, size_t bytes, int fd, uint64_t deadline_ns);

struct Greeting {
  OwnedFd socket;
  OwnedFd rpc;
  OwnedFd ring;
  OwnedFd wake;
  OwnedFd flag_page;  // GPU sessions
  expertd_attach_welcome welcome{};
};

/// Connects, says hello and takes the welcome; a refusal comes back with the daemon's Reason and text.
Status greet(const std::string& path, const expertd_attach_hello& hello, uint64_t deadline_ns, Greeting* greeting);

}  // namespace expertd::client
