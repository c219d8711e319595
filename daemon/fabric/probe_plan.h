// SPDX-License-Identifier: Apache-2.0
// What is measured between two daemons, and what came of it. Value types without UCX, for the composition root.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "daemon/base/status.h"
#include "daemon/engine/fabric_port.h"

namespace expertd::fabric {

inline constexpr uint32_t kProbeBytesMax = 1024 * 1024;
inline constexpr uint32_t kProbeMessagesMax = 1024;        // of a run
inline constexpr uint32_t kProbeRunsMax = 32;              // of a probe: two per rail of each data lane
inline constexpr uint64_t kProbeNsMax = 10'000'000'000;    // from open to end
inline constexpr uint64_t kProbeRunNsMax = 1'000'000'000;  // in which a run begins messages

/// So many messages of a size, at most `window` of them without an answer; fewer when `limit_ns` is over.
struct ProbeRun {
  engine::FabricLane lane = engine::FabricLane::kLatency;
  uint32_t bytes = 8;     // at most kProbeBytesMax
  uint32_t window = 1;    // 1..8
  uint32_t messages = 2;  // 2..kProbeMessagesMax
  uint64_t limit_ns = 0;
  uint32_t rail = 0;  // of the asker's lane; answers come by the rail of the other side that it leads to
};

/// The first answer counts for nothing: what has to be set up at a first message is no part of the lane's speed.
struct ProbeFigures {
  engine::FabricLane lane = engine::FabricLane::kLatency;
  uint32_t bytes = 0;
  uint32_t messages = 0;    // that were answered after the first
  uint64_t elapsed_ns = 0;  // from the first answer to the last
  uint64_t p50_ns = 0;      // there and back
  uint64_t p99_ns = 0;
  uint32_t rail = 0;
};

struct ProbePlan {
  uint64_t node_id = 0;  // of the other daemon, which is connected
  uint64_t probe = 0;    // random, never 0; the other daemon has opened it
  std::vector<ProbeRun> runs;
  uint64_t deadline_ns = 0;  // absolute, base::now_ns clock
};

/// The other side of it: to answer so many bytes at a time to one node until then.
struct ProbeOffer {
  uint64_t node_id = 0;  // who asks; connected
  uint64_t probe = 0;
  uint32_t bytes_max = 0;    // at most kProbeBytesMax
  uint64_t deadline_ns = 0;  // absolute, base::now_ns clock
};

/// Once, on a thread of the fabric, which it must not keep. TIMEOUT, PEER_LOST or CANCELLED.
using ProbeDone = std::function<void(const base::Status&, const std::vector<ProbeFigures>&)>;

}  // namespace expertd::fabric
