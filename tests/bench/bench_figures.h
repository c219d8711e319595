// SPDX-License-Identifier: Apache-2.0
// What measurements share: the clock, quantiles, the command line and the date. Pure or main thread only.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <ctime>
#include <string>
#include <vector>

namespace expertd::bench {

inline uint64_t now_ns() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(now).count());
}

/// In microseconds; `times_ns` must not be empty.
inline double quantile_us(std::vector<uint64_t> times_ns, double quantile) {
  std::sort(times_ns.begin(), times_ns.end());
  const auto rank = static_cast<size_t>(std::ceil(quantile * static_cast<double>(times_ns.size())));
  return static_cast<double>(times_ns[std::clamp<size_t>(rank, 1, times_ns.size()) - 1]) / 1e3;
}

inline std::string fixed(double value, int digits) {
  char text[64];
  std::snprintf(text, sizeof(text), "%.*f", digits, value);
  return text;
}

inline std::string utc_now() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  gmtime_r(&now, &parts);
  char text[32];
  std::strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%SZ", &parts);
  return text;
}

}  // namespace expertd::bench
