// SPDX-License-Identifier: Apache-2.0
// Settling: until when a lane's thread must not sleep for long. UCX 1.13 makes a connection in several steps, of which
// some are taken by a later call of progress() that no event descriptor announces: a thread that sleeps meanwhile keeps
// the other side waiting. So for a while after something moved that was no message, it looks every millisecond.
#pragma once

#include <cstdint>

namespace expertd::fabric {

class Settling {
 public:
  /// Something moved that may be a step of a connection.
  void stir(uint64_t now_ns) { until_ns_ = now_ns + kForNs; }
  /// When to turn again at the latest.
  uint64_t next_ns(uint64_t now_ns) const { return now_ns < until_ns_ ? now_ns + kStepNs : UINT64_MAX; }

 private:
  static constexpr uint64_t kForNs = 100'000'000;
  static constexpr uint64_t kStepNs = 1'000'000;

  uint64_t until_ns_ = 0;
};

}  // namespace expertd::fabric
