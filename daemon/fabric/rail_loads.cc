// SPDX-License-Identifier: Apache-2.0
#include "daemon/fabric/rail_loads.h"

#include <algorithm>

namespace expertd::fabric {

uint32_t RailLoads::choose(uint32_t home, uint64_t bytes) const {
  home %= rails_;
  if (route_ == Route::kRail || rails_ == 1) {
    return home;
  }
  // Its own one wins a draw, so that what is even stays where it is.
  uint32_t least = home;
  for (uint32_t rail = 0; rail < rails_; ++rail) {
    least = load(rail) < load(least) ? rail : least;
  }
  const uint64_t slack_bytes = route_ == Route::kAuto ? 2 * std::max(bytes, kRailSlackBytes) : 0;
  return load(home) > load(least) + slack_bytes ? least : home;
}

void RailLoads::started(uint32_t rail, uint64_t bytes) {
  Load& load = loads_[rail];
  load.under_way_bytes += bytes;
  load.recent_bytes += bytes;
  load.sent_bytes += bytes;
  ++load.sent_messages;
  under_way_bytes_ += bytes;
  if (load.recent_bytes > kRecentBytes) {
    for (Load& each : loads_) {
      each.recent_bytes /= 2;
    }
  }
}

void RailLoads::ended(uint32_t rail, uint64_t bytes) {
  loads_[rail].under_way_bytes -= bytes;
  under_way_bytes_ -= bytes;
}

void RailLoads::look(uint64_t now_ns) {
  if (under_way_bytes_ == 0 && now_ns - busy_ns_ < idle_ns_) {
    return;
  }
  if (under_way_bytes_ == 0) {
    for (Load& load : loads_) {
      load.recent_bytes = 0;
    }
  }
  busy_ns_ = now_ns;
}

}  // namespace expertd::fabric
