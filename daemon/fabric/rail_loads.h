// SPDX-License-Identifier: Apache-2.0
// RailLoads: by which of a lane's rails (devices with a worker of their own) a message leaves. A rail's load is what is
// under way on it and what it took since the lane was last idle, over all peers, since they share the device. What it
// took counts in bytes and not by time, so that rails are even however fast they are. Pure, of the lane's thread. Owned
// by LaneCore.
#pragma once

#include <array>
#include <cstdint>

#include "daemon/fabric/options.h"

namespace expertd::fabric {

class RailLoads {
 public:
  static constexpr uint64_t kRecentBytes = 64 * 1024 * 1024;  // of a rail; more than that is halved on all
  static constexpr uint64_t kRailSlackBytes = 64 * 1024;      // small messages are no reason to leave a rail

  /// `idle_ns`: nothing under way for so long, and all is forgotten.
  RailLoads(Route route, uint64_t idle_ns) : route_(route), idle_ns_(idle_ns) {}

  void use_rails(uint32_t rails) { rails_ = rails; }
  uint32_t rails() const { return rails_; }
  /// For a message of `bytes` of a rank whose own rail is `home`. `auto` leaves that rail when another has two such
  /// messages less to carry.
  uint32_t choose(uint32_t home, uint64_t bytes) const;
  void started(uint32_t rail, uint64_t bytes);
  void ended(uint32_t rail, uint64_t bytes);
  /// Every turn.
  void look(uint64_t now_ns);

  uint64_t sent_messages(uint32_t rail) const { return loads_[rail].sent_messages; }
  uint64_t sent_bytes(uint32_t rail) const { return loads_[rail].sent_bytes; }
  uint64_t under_way_bytes(uint32_t rail) const { return loads_[rail].under_way_bytes; }

 private:
  struct Load {
    uint64_t under_way_bytes = 0;
    uint64_t recent_bytes = 0;
    uint64_t sent_messages = 0;
    uint64_t sent_bytes = 0;
  };
  uint64_t load(uint32_t rail) const { return loads_[rail].under_way_bytes + loads_[rail].recent_bytes; }

  const Route route_;
  const uint64_t idle_ns_;
  uint32_t rails_ = 1;
  std::array<Load, kMaxRails> loads_{};
  uint64_t under_way_bytes_ = 0;  // on all
  uint64_t busy_ns_ = 0;          // when something was under way
};

}  // namespace expertd::fabric
