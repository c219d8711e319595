// SPDX-License-Identifier: Apache-2.0
#include "tests/bench/push_clock.h"

#include <algorithm>
#include <limits>

namespace expertd::bench {

namespace {

double since(uint64_t zero_ns, uint64_t at_ns) {
  return static_cast<double>(static_cast<int64_t>(at_ns - zero_ns));
}

}  // namespace

PushClock::PushClock(const std::vector<PushTrip>& trips)
    : gpu_zero_ns_(trips.front().sent_ns), host_zero_ns_(trips.front().observed_ns) {
  // The drift first: a line through the middles of all trips.
  double sum_x = 0;
  double sum_y = 0;
  double sum_xx = 0;
  double sum_xy = 0;
  for (const PushTrip& trip : trips) {
    const double x = (since(gpu_zero_ns_, trip.sent_ns) + since(gpu_zero_ns_, trip.seen_ns)) / 2;
    const double y = since(host_zero_ns_, trip.observed_ns) - x;
    sum_x += x;
    sum_y += y;
    sum_xx += x * x;
    sum_xy += x * y;
  }
  const auto count = static_cast<double>(trips.size());
  const double spread = count * sum_xx - sum_x * sum_x;
  drift_ = spread > 0 ? (count * sum_xy - sum_x * sum_y) / spread : 0;
  for (size_t begin = 0; begin + kWindow <= trips.size(); begin += kWindow) {
    double low = -std::numeric_limits<double>::infinity();
    double high = std::numeric_limits<double>::infinity();
    for (size_t i = begin; i < begin + kWindow; ++i) {
      const double sent = since(gpu_zero_ns_, trips[i].sent_ns);
      const double seen = since(gpu_zero_ns_, trips[i].seen_ns);
      const double observed = since(host_zero_ns_, trips[i].observed_ns);
      low = std::max(low, observed - seen * (1 + drift_));
      high = std::min(high, observed - sent * (1 + drift_));
    }
    places_.push_back(since(gpu_zero_ns_, trips[begin + kWindow / 2].sent_ns));
    offsets_.push_back((low + high) / 2);
    error_ns_ = std::max(error_ns_, std::max(high - low, 0.0) / 2);
  }
}

/// Between windows on the line from one to the next, outside them as at the nearest.
double PushClock::offset_at(double gpu_ns) const {
  const auto next = std::lower_bound(places_.begin(), places_.end(), gpu_ns);
  const auto index = static_cast<size_t>(next - places_.begin());
  if (index == 0 || index == places_.size()) {
    return offsets_[index == 0 ? 0 : index - 1];
  }
  const double part = (gpu_ns - places_[index - 1]) / (places_[index] - places_[index - 1]);
  return offsets_[index - 1] + part * (offsets_[index] - offsets_[index - 1]);
}

double PushClock::between(uint64_t gpu_ns, uint64_t host_ns) const {
  const double gpu = since(gpu_zero_ns_, gpu_ns);
  return since(host_zero_ns_, host_ns) - gpu * (1 + drift_) - offset_at(gpu);
}

}  // namespace expertd::bench
