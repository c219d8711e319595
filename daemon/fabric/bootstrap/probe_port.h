// SPDX-License-Identifier: Apache-2.0
// What peers may ask of this daemon about the speed of the fabric, and what they are told. The peer services call it
// from gRPC's threads, and nothing waits; the callbacks come once, from a thread of the implementation.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "daemon/group/rendezvous_port.h"

namespace expertd::fabric {

/// Of one lane, or of one device of it, from one daemon to another.
struct LaneSpeed {
  uint32_t lane = 0;            // as in group::LaneAddress
  uint64_t latency_p50_ns = 0;  // one way
  uint64_t latency_p99_ns = 0;
  uint64_t bytes_per_second = 0;
  std::string device;  // of the measuring daemon, where the lane has several; at most kDeviceBytesMax
};
inline constexpr size_t kDeviceBytesMax = 64;

struct ProbeOpening {
  group::NodeIdentity asker;
  uint64_t probe = 0;
  uint32_t bytes_max = 0;
  uint64_t timeout_ns = 0;
};

class ProbePort {
 public:
  using Opened = std::function<void(const session::ErrorDetail&)>;
  using Measured = std::function<void(const session::ErrorDetail&, const std::vector<LaneSpeed>&)>;

  virtual ~ProbePort() = default;
  virtual void open(const ProbeOpening& opening, Opened done) = 0;
  virtual void measure(const group::NodeIdentity& to, uint64_t timeout_ns, Measured done) = 0;
};

}  // namespace expertd::fabric
