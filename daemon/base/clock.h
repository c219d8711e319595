// SPDX-License-Identifier: Apache-2.0
// The node-wide monotonic clock in nanoseconds (CLOCK_MONOTONIC is the same for clients and daemon, also in
// containers).
#pragma once

#include <time.h>

#include <cstdint>

namespace expertd::base {

inline uint64_t now_ns() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1'000'000'000ULL + static_cast<uint64_t>(now.tv_nsec);
}

}  // namespace expertd::base
