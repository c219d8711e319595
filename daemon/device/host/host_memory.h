// SPDX-License-Identifier: Apache-2.0
// Memory of host devices: sealed memfds mapped into the daemon. Control threads only.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "daemon/base/fd.h"
#include "daemon/base/status.h"
#include "daemon/device/device.h"

namespace expertd::device {

/// Bytes of the windows of one device against device.pool_max_bytes. Windows hold it, so that it outlives them. Any
/// thread.
class WindowPool {
 public:
  /// limit 0: none.
  explicit WindowPool(uint64_t limit) : limit_(limit) {}
  /// False when they do not fit.
  bool take(uint64_t bytes);
  void give_back(uint64_t bytes) { used_.fetch_sub(bytes, std::memory_order_relaxed); }
  uint64_t used() const { return used_.load(std::memory_order_relaxed); }
  uint64_t limit() const { return limit_; }

 private:
  const uint64_t limit_;
  std::atomic<uint64_t> used_{0};
};

/// A new memfd of `bytes` (rounded up to whole pages), sealed against resizing, mapped and zero. POOL_EXHAUSTED when
/// the pool has no room for it.
base::Result<Window> create_host_window(uint64_t bytes, base::DeviceIndex home, std::shared_ptr<WindowPool> pool);
/// Maps [offset, offset + bytes) of a client's memfd. UNSEALED_MEMORY unless it is sealed against shrinking: a client
/// that truncates it later would otherwise end the daemon with SIGBUS. UNSUPPORTED unless it is of tmpfs.
base::Result<std::unique_ptr<HeldMemory>> import_host_fd(base::ScopedFd fd, uint64_t offset, uint64_t bytes,
                                                         base::DeviceIndex home);

}  // namespace expertd::device
