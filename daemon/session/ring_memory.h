// SPDX-License-Identifier: Apache-2.0
// RingMemory: the memfd of one session's ring, created, formatted and mapped by the daemon (layout:
// proto/abi/ring_v1.h), and the eventfd that wakes its loop. The memory is sealed, so that the client can neither
// shrink it under the daemon nor grow it. Counter and flags of the eventfd belong to whoever holds a descriptor of it,
// so each session has one of its own and the daemon only watches it.
#pragma once

#include <cstdint>
#include <memory>

#include "daemon/base/fd.h"
#include "daemon/base/ids.h"
#include "daemon/base/status.h"
#include "proto/abi/ring_v1.h"

namespace expertd::session {

class RingMemory {
 public:
  static base::Result<std::unique_ptr<RingMemory>> create(base::SessionId session, uint64_t generation,
                                                          uint32_t slot_count);
  ~RingMemory();
  RingMemory(const RingMemory&) = delete;
  RingMemory& operator=(const RingMemory&) = delete;

  int fd() const { return fd_.get(); }
  int wake_fd() const { return wake_fd_.get(); }
  uint64_t bytes() const { return bytes_; }
  uint32_t slot_count() const { return slot_count_; }
  expertd_ring_header* header() const { return static_cast<expertd_ring_header*>(base_); }
  expertd_slot* slots() const {
    return reinterpret_cast<expertd_slot*>(static_cast<char*>(base_) + EXPERTD_RING_HEADER_BYTES);
  }
  expertd_completion* completions() const {
    return reinterpret_cast<expertd_completion*>(static_cast<char*>(base_) + EXPERTD_RING_HEADER_BYTES +
                                                 uint64_t{slot_count_} * EXPERTD_SLOT_BYTES);
  }

 private:
  RingMemory(base::ScopedFd fd, base::ScopedFd wake_fd, void* base, uint64_t bytes, uint32_t slot_count)
      : fd_(std::move(fd)), wake_fd_(std::move(wake_fd)), base_(base), bytes_(bytes), slot_count_(slot_count) {}

  base::ScopedFd fd_;
  base::ScopedFd wake_fd_;
  void* base_;
  uint64_t bytes_;
  uint32_t slot_count_;  // the daemon's own copy: the header's is writable by the client
};

}  // namespace expertd::session
