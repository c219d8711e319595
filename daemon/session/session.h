// SPDX-License-Identifier: Apache-2.0
// One session as the service keeps it. Control threads under the session's own mutex; the tables inside belong to the
// device loop between add_session and the drained callback.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>

#include "daemon/session/service.h"

namespace expertd::session {

struct SessionService::Session {
  struct Buffer {
    std::unique_ptr<device::HeldMemory> memory;
    bool is_window = false;  // the daemon's memory; otherwise the client's, registered
  };
  /// Of a group that goes over to its successor a session has both for a while, under the name of the first.
  enum class Part { kNow, kComing, kPast };
  struct Membership {
    std::shared_ptr<engine::GroupShared> group;
    uint32_t rank = 0;
    uint32_t window_buffer = 0;
    bool formed = false;    // the client was told; until then it can only have guessed the group's id
    base::GroupId named{};  // by which the client knows it
    Part part = Part::kNow;
  };
  struct PendingFd {
    base::ScopedFd fd;
    uint64_t bytes = 0;
    bool for_client = false;  // a window's; otherwise put by the client
  };

  Session(base::SessionId session, uint32_t handle_limit) : id(session), tables(session, handle_limit) {}

  const base::SessionId id;
  SessionTables tables;
  std::shared_ptr<RingMemory> ring;  // the last word's too
  DeviceEntry place;
  AttachRequest identity;
  uint64_t opened_ns = 0;

  /// The group as it is now, by the client's name of it; end() when there is none. Under the mutex.
  std::map<uint64_t, Membership>::iterator find_group(base::GroupId named) {
    return std::find_if(memberships.begin(), memberships.end(), [named](const auto& entry) {
      return entry.second.named == named && entry.second.part == Part::kNow;
    });
  }

  std::mutex mutex;  // guards what follows
  std::string client_id;
  std::string traceparent;
  std::map<uint32_t, Buffer> buffers;
  // Sums over buffers, by whose memory it is. Those of windows have besides what is reserved for one that is being
  // made.
  uint64_t window_bytes = 0;
  uint64_t registered_bytes = 0;
  std::map<uint64_t, Membership> memberships;  // by the group's own id
  std::set<uint64_t> joins;                    // tickets of those without answer and membership
  uint64_t next_ticket = 1;
  std::map<uint64_t, PendingFd> fds;
  uint64_t next_token = 1;
  bool ended = false;
  uint64_t ended_ns = 0;
  std::atomic<bool> drained{false};
};

}  // namespace expertd::session
