// SPDX-License-Identifier: Apache-2.0
// SessionTables: what one session owns as its device loop sees it at admission: buffers, groups, handles. Only the loop
// thread touches the tables (control threads change them by tasks run on the loop); the statistics are relaxed atomics
// that anybody may read. Owned by the session service; outlives the loop's use.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <vector>

#include "daemon/base/ids.h"
#include "daemon/base/limits.h"
#include "daemon/engine/engine.h"

namespace expertd::session {

/// What a dispatch left under a handle index; generation 0 is empty.
struct HandleState {
  uint32_t generation = 0;
  base::GroupId group;
  bool low_latency = false;
  bool expanded = false;
  bool copy_engine = false;  // its routing is in the exchange window, not in the tables of the daemon's kernels
  uint32_t expert_alignment = 1;
  uint32_t tokens = 0;
  uint32_t top_k = 0;
  base::GroupId made_in{};  // the group as it was: of a group that goes over to a successor, one of the two
  uint64_t made = 0;        // by this operation of it
  bool open = false;        // no combine has used it yet
};

struct JoinedGroup {
  base::GroupId id;  // value 0: free entry
  engine::RankState rank;
  uint32_t handle_limit = UINT32_MAX;  // handles that the rank's device holds for this group
};

/// For expertctl: counted by the loop, read by anybody.
struct SessionStats {
  static constexpr uint32_t kLatencies = 1024;
  std::atomic<uint64_t> completed{0};
  std::atomic<uint64_t> rejected{0};
  std::atomic<uint64_t> bytes{0};
  std::atomic<uint32_t> outstanding{0};
  std::array<std::atomic<uint32_t>, kLatencies> latency_ns{};  // of the last operations, saturating
};

struct SessionTables {
  SessionTables(base::SessionId session, uint32_t handle_limit) : id(session), handles(handle_limit) {}

  base::SessionId id;
  /// Index = buffer id; null = none. Id 0 is never used.
  std::array<const engine::Mapping*, base::kMaxBuffersPerSession + 1> buffers{};
  std::array<JoinedGroup, base::kMaxGroupsPerSession> groups{};
  std::vector<HandleState> handles;
  SessionStats stats;

  JoinedGroup* find_group(uint64_t group) {
    for (JoinedGroup& joined : groups) {
      if (group != 0 && joined.id.value == group) {
        return &joined;
      }
    }
    return nullptr;
  }
  /// Nothing may use the handle any more, or a combine has.
  void close_handle(HandleState* handle) {
    JoinedGroup* const joined = handle->open ? find_group(handle->group.value) : nullptr;
    if (joined != nullptr && joined->rank.open_handles != 0) {
      --joined->rank.open_handles;
    }
    handle->open = false;
  }
};

}  // namespace expertd::session
