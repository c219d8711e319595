// SPDX-License-Identifier: Apache-2.0
// Pool: the account of what a device has allocated, against device.pool_max_bytes. Memory of clients that is merely
// mapped is not in it. Owned by its device; any thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

#include "daemon/base/status.h"

namespace expertd::device {

class Pool {
 public:
  /// 0: no cap.
  explicit Pool(uint64_t max_bytes) : max_bytes_(max_bytes) {}

  /// POOL_EXHAUSTED when the cap does not allow it; otherwise give() has to follow.
  base::Status take(uint64_t bytes) {
    uint64_t used = used_.load(std::memory_order_relaxed);
    do {
      if (max_bytes_ != 0 && (bytes > max_bytes_ || used > max_bytes_ - bytes)) {
        return base::Status(EXPERTD_REASON_POOL_EXHAUSTED,
                            "the device's pool holds " + std::to_string(used) + " of " + std::to_string(max_bytes_) +
                                " bytes (device.pool_max_bytes); " + std::to_string(bytes) + " more were asked for");
      }
    } while (!used_.compare_exchange_weak(used, used + bytes, std::memory_order_relaxed));
    return base::Status::ok();
  }
  void give(uint64_t bytes) { used_.fetch_sub(bytes, std::memory_order_relaxed); }
  uint64_t used() const { return used_.load(std::memory_order_relaxed); }

 private:
  const uint64_t max_bytes_;
  std::atomic<uint64_t> used_{0};  // a number on its own: nothing is published through it
};

}  // namespace expertd::device
