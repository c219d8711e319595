// SPDX-License-Identifier: Apache-2.0
// Which ranks, nodes and lanes held the last operations up, reckoned from what the daemon's ranks saw. Pure functions,
// any thread.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "expertd/v1/control.pb.h"

namespace expertd::ctl {

/// One rank of a group that was the last of at least one operation.
struct SlowRank {
  std::string group;
  uint32_t rank = 0;
  std::string node;      // empty: this one, without a fabric
  uint64_t last = 0;     // how often it was the last
  uint64_t seen = 0;     // of so many operations of its group
  uint64_t waits = 0;    // how often another rank waited for it
  uint64_t held_ns = 0;  // how long, in all
  double share = 0;      // of all the time that ranks of its group waited for somebody, 0..1
  uint64_t p50_ns = 0;   // of these waits; 0 without any
  uint64_t p99_ns = 0;
};

/// A node, or a lane, and what share of all the time waited it had; of groups over several nodes.
struct SlowPart {
  std::string name;
  uint64_t held_ns = 0;
  double share = 0;  // 0..1
};

struct Slowest {
  std::vector<SlowRank> ranks;  // by group; in it the one first that was waited for longest
  std::vector<SlowPart> nodes;  // the one first that was waited for longest
  std::vector<SlowPart> lanes;
};

/// By time and not by how often: who came last by a hair held nobody up.
Slowest slowest_of(const v1::ListWaitsResponse& waits);
std::string slowest_text(const v1::ListWaitsResponse& waits);
nlohmann::json slowest_json(const v1::ListWaitsResponse& waits);

}  // namespace expertd::ctl
