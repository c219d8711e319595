// SPDX-License-Identifier: Apache-2.0
// The clock of the host against the timer of a GPU, from round trips that both have timed. Pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace expertd::bench {

/// A command: when the GPU sent it and had its answer, and when the host saw it and answered, each by its own clock.
struct PushTrip {
  uint64_t sent_ns = 0;
  uint64_t observed_ns = 0;
  uint64_t seen_ns = 0;
};

/// host = gpu + offset, which drifts. Every trip bounds it from both sides, for nothing arrives before it was sent: the
/// tightest bounds of a window of trips leave `error_ns` to either side. What lies between is taken in the middle, as
/// if the shortest ways there and back were equally long.
class PushClock {
 public:
  /// At least kWindow trips, in order.
  explicit PushClock(const std::vector<PushTrip>& trips);
  static constexpr size_t kWindow = 500;

  /// Nanoseconds from `gpu_ns` of the GPU's timer to `host_ns` of the host's clock.
  double between(uint64_t gpu_ns, uint64_t host_ns) const;
  double error_ns() const { return error_ns_; }
  /// Nanoseconds that the host's clock gains in a second.
  double drift_ns_per_s() const { return drift_ * 1e9; }

 private:
  double offset_at(double gpu_ns) const;

  uint64_t gpu_zero_ns_ = 0;
  uint64_t host_zero_ns_ = 0;
  double drift_ = 0;
  std::vector<double> places_;   // of the windows, GPU nanoseconds from the zero
  std::vector<double> offsets_;  // there, without the drift
  double error_ns_ = 0;
};

}  // namespace expertd::bench
