// SPDX-License-Identifier: Apache-2.0
// A client without the client library: speaks the attach socket and the ring by hand, so that a test can send what the
// library never would. One thread; tests only.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "proto/abi/attach_v1.h"
#include "proto/abi/expertd_reason.h"

namespace expertd::support {

/// A well-formed HELLO for a device.
expertd_attach_hello make_hello(const std::string& device);

class RawClient {
 public:
  RawClient() = default;
  ~RawClient();
  RawClient(const RawClient&) = delete;
  RawClient& operator=(const RawClient&) = delete;

  /// Connects only.
  bool connect(const std::string& socket);
  /// Connects, says HELLO and maps the ring.
  bool attach(const std::string& socket, const std::string& device);
  /// Sends bytes as one packet, with a descriptor when fd >= 0.
  bool send(const void* bytes, size_t size, int fd = -1);
  bool send_many(const void* bytes, size_t size, const std::vector<int>& fds);
  /// Receives one packet with its descriptors; nothing at end of file or after the time.
  std::optional<std::vector<uint8_t>> receive(std::vector<int>* fds, std::chrono::milliseconds limit);
  /// Reads the answer to a HELLO: REFUSED, or WELCOME, after which the ring is mapped.
  std::optional<expertd_attach_welcome> welcome(std::chrono::milliseconds limit);
  /// True when the daemon closed the connection within the time.
  bool closed_by_peer(std::chrono::milliseconds limit);
  void close();

  /// Puts a descriptor; its token, 0 when it was refused.
  uint64_t put_fd(int fd, uint32_t* reason);

  expertd_ring_header* header() { return reinterpret_cast<expertd_ring_header*>(ring_); }
  expertd_slot* slot(uint64_t seq);
  expertd_completion* completion(uint64_t seq);
  uint64_t next_seq() const { return next_seq_; }
  /// Fills seq unless `keep_seq`, writes the slot, moves the tail and wakes the daemon.
  uint64_t submit(expertd_slot slot, bool keep_seq = false);
  /// Sets the tail to any value.
  void set_tail(uint64_t tail);
  /// The completion, nothing when it does not come in time.
  std::optional<expertd_completion> wait(uint64_t seq, std::chrono::milliseconds limit = std::chrono::seconds(5));

  /// The eventfd that wakes the daemon's loop; stays this object's.
  int wake_fd() const { return wake_; }
  /// The session's gRPC connection; the caller owns it afterwards.
  int take_rpc_fd();

 private:
  void wake();

  int socket_ = -1;
  int rpc_ = -1;
  int wake_ = -1;
  uint8_t* ring_ = nullptr;
  uint64_t ring_bytes_ = 0;
  uint64_t next_seq_ = 1;
};

}  // namespace expertd::support
