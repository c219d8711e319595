// SPDX-License-Identifier: Apache-2.0
// Sessions of the C interface as scoped objects, and a group whose ranks are sessions of this process, each run on a
// thread of its own. Thread rules are those of expertd.h; tests only.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "client/include/expertd.h"

namespace expertd::support {

/// What a call came to, with the message of the thread that made it.
struct Outcome {
  expertd_status_t status{};
  std::string message;
  bool ok() const { return status.reason == EXPERTD_REASON_NONE; }
};
/// Wraps a call's status at once, while the thread's last message is its own.
Outcome outcome_of(expertd_status_t status);
/// "PEER_LOST: rank 1 ..." for test output.
std::string describe(const Outcome& outcome);

/// One attached session; detached with the object.
class ClientSession {
 public:
  ClientSession() = default;
  ClientSession(const std::string& socket, const std::string& device, const std::string& name = "test");
  ~ClientSession();
  ClientSession(ClientSession&& other) noexcept;
  ClientSession& operator=(ClientSession&& other) noexcept;

  bool ok() const { return session_ != nullptr; }
  expertd_session_t* get() const { return session_; }
  const Outcome& attached() const { return attached_; }
  Outcome detach();
  expertd_session_info_t info() const;
  /// Memory from expertd_alloc, null when it was refused.
  template <typename T>
  T* alloc(size_t count) {
    return static_cast<T*>(alloc_bytes(count * sizeof(T)));
  }
  void* alloc_bytes(size_t bytes);

 private:
  expertd_session_t* session_ = nullptr;
  Outcome attached_;
};

/// Options for a small group that most tests do with; change what matters.
expertd_group_options_t small_group(const char* name, uint32_t rank, uint32_t ranks);

/// Runs body(0) .. body(count - 1) on threads of their own and waits for all.
void on_threads(uint32_t count, const std::function<void(uint32_t)>& body);

/// The end of one operation as its rank saw it.
struct OpEnd {
  Outcome outcome;
  expertd_op_result_t result{};
  double wait_ms = 0;
};
/// Waits for an issued operation.
OpEnd finish(expertd_event_t event, uint64_t timeout_ns = 0);
/// Issues a barrier and waits for it.
OpEnd barrier(expertd_group_t* group, uint64_t timeout_ns = 0);

struct Rank {
  uint32_t rank = 0;
  ClientSession session;
  expertd_group_t* group = nullptr;
  Outcome joined;
};

/// Where a rank attaches.
struct Seat {
  std::string socket;
  std::string device;
};
/// host:0 .. host:R-1 of one daemon.
std::vector<Seat> seats_on(const std::string& socket, uint32_t ranks);

/// Sessions of one or more daemons, members of one group.
class RankGroup {
 public:
  using Configure = std::function<void(expertd_group_options_t*)>;
  /// Attaches and joins; see ok().
  RankGroup(const std::vector<Seat>& seats, const std::string& name, const Configure& configure = {});
  RankGroup(const std::string& socket, const std::string& name, uint32_t ranks, const Configure& configure = {})
      : RankGroup(seats_on(socket, ranks), name, configure) {}
  ~RankGroup();
  RankGroup(const RankGroup&) = delete;
  RankGroup& operator=(const RankGroup&) = delete;

  bool ok() const;
  /// The first failure of attaching or joining.
  std::string failure() const;
  uint32_t ranks() const { return static_cast<uint32_t>(ranks_.size()); }
  /// Per rank the node it is on, that is its daemon: from 0, in the order of their lowest rank.
  const std::vector<uint32_t>& node_of() const { return node_of_; }
  uint32_t nodes() const { return nodes_; }
  Rank& rank(uint32_t index) { return *ranks_[index]; }
  /// Every rank on its own thread.
  void run(const std::function<void(Rank&)>& body);
  /// Ends one session, as the end of its process would.
  void drop(uint32_t index) { ranks_[index]->session = ClientSession(); }

 private:
  std::vector<std::unique_ptr<Rank>> ranks_;
  std::vector<uint32_t> node_of_;
  uint32_t nodes_ = 0;
};

}  // namespace expertd::support
