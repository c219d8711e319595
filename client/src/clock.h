// SPDX-License-Identifier: Apache-2.0
// The client's clock: CLOCK_MONOTONIC in nanoseconds, which the daemon on the same node shares. Pure, any thread.
#pragma once

#include <time.h>

#include <cstdint>

namespace expertd::client {

inline constexpr uint64_t kNsPerMs = 1'000'000;
inline constexpr uint64_t kNsPerS = 1'000'000'000;

inline uint64_t now_ns() {
  timespec time{};
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<uint64_t>(time.tv_sec) * kNsPerS + static_cast<uint64_t>(time.tv_nsec);
}

/// The time `timeout_ns` from now; a timeout too large to add means a day.
inline uint64_t deadline_after(uint64_t timeout_ns) {
  constexpr uint64_t kDayNs = 24 * 3600 * kNsPerS;
  return now_ns() + (timeout_ns < kDayNs ? timeout_ns : kDayNs);
}

inline uint64_t left_until(uint64_t deadline_ns) {
  const uint64_t now = now_ns();
  return deadline_ns > now ? deadline_ns - now : 0;
}

inline timespec to_timespec(uint64_t time_ns) {
  timespec time{};
  time.tv_sec = static_cast<time_t>(time_ns / kNsPerS);
  time.tv_nsec = static_cast<long>(time_ns % kNsPerS);
  return time;
}

}  // namespace expertd::client
