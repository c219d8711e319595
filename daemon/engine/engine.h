// SPDX-License-Identifier: Apache-2.0
// Engine: orders and drives the operations of one device's sessions. Pure and single-threaded: the device's loop calls
// everything here with the time as an argument. Operations of a session launch in the order of submission, in which the
// device executes them as well; an operation of a group launches when every active rank has submitted it. Between
// sessions the Schedule chooses. Every request ends with exactly one completion, except those of a closed session,
// which end silently.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "daemon/engine/group_shared.h"
#include "daemon/engine/ports.h"
#include "daemon/engine/schedule.h"

namespace expertd::engine {

/// One rank of a group as its own engine sees it. Owned by the session service, registered with attach_rank.
struct RankState {
  GroupShared* group = nullptr;
  uint32_t rank = 0;
  uint64_t next_number = 1;
  uint32_t open_handles = 0;    // made by dispatches, with no combine yet
  bool has_dispatched = false;  // since it joined
  /// Where its group is the successor of another: that one, and the operation that became the first of this one.
  base::GroupId before{};
  uint64_t before_from = 0;
};

/// Per-session part of the engine. Owned by the loop's session; its requests live here, one per ring slot.
class EngineSession {
 public:
  EngineSession(base::SessionId id, CompletionPort* completions, void* flag_page)
      : id_(id), completions_(completions), flag_page_(flag_page) {}

  base::SessionId id() const { return id_; }
  uint32_t outstanding() const { return static_cast<uint32_t>(tail_ - head_); }
  /// Storage for the request of `slot`; free because a slot is reused only after its completion.
  Request& request(uint32_t slot) { return ops_[slot].request; }
  bool slot_free(uint32_t slot) const { return ops_[slot].stage == Stage::kIdle || ops_[slot].stage == Stage::kDone; }
  /// Whether an operation in flight names the mapping.
  bool uses(const Mapping* mapping) const;
  /// Whether an operation in flight belongs to the rank.
  bool uses(const RankState* rank) const;

 private:
  friend class Engine;
  enum class Stage : uint32_t { kIdle, kQueued, kRunning, kEnding, kDone };
  struct Op {
    Request request;
    RankState* rank = nullptr;     // null: local operation
    GroupShared* group = nullptr;  // that it was posted to; the rank may have gone over to its successor since
    uint64_t number = 0;
    uint64_t ticket = 0;     // not 0: complete, so that it may be launched
    uint64_t agreed_ns = 0;  // when it was seen to be
    Stage stage = Stage::kIdle;
    PartId part = 0;
    bool abort_sent = false;
    bool withdrawn = false;  // the rank ends it alone unless it was decided first; `failure` says why
    Outcome outcome;
    Failure failure;
  };

  base::SessionId id_;
  CompletionPort* completions_;
  void* flag_page_;
  bool closing_ = false;
  bool passed_ = false;  // in this turn nothing more of it is launched
  SessionShare share_;
  std::array<Op, EXPERTD_RING_SLOTS_MAX> ops_{};
  std::array<uint32_t, EXPERTD_RING_SLOTS_MAX> order_{};  // slots in order of submission
  uint64_t head_ = 0;                                     // oldest operation not yet completed
  uint64_t tail_ = 0;
};

class Engine {
 public:
  Engine(base::DeviceIndex device, DevicePort* port, WakePort* wake, OpObserver* observer,
         const ScheduleOptions& schedule = {})
      : device_(device), port_(port), wake_(wake), observer_(observer), schedule_(schedule) {}

  void add_session(EngineSession* session) { sessions_.push_back(session); }
  /// Drops what is not launched, aborts what runs. The session's ranks were marked lost before.
  void close_session(EngineSession* session, uint64_t now_ns);
  /// True when nothing of a closed session is in flight any more; it is then forgotten and may be destroyed.
  bool forget_if_drained(EngineSession* session);

  /// Takes the request in session->request(slot). rank is null for local operations.
  void submit(EngineSession* session, uint32_t slot, RankState* rank);
  /// Advances everything once; true when something moved.
  bool run_once(uint64_t now_ns);
  /// Earliest deadline of anything outstanding, or ~0.
  uint64_t next_deadline_ns() const { return next_deadline_ns_; }
  bool idle() const { return outstanding_ == 0; }

 private:
  using Op = EngineSession::Op;
  /// Where a session stands with what it has launched.
  struct Running {
    Op* first = nullptr;  // null: nothing is launched
    Traffic traffic = Traffic::kThroughput;
  };
  // engine_turn.cc: one turn, and the choice between sessions.
  static void go_over(Op& op);
  bool settle(uint64_t now_ns);
  bool launch_ready(uint64_t now_ns);
  bool advance_launched(uint64_t now_ns);
  bool advance_oldest_first(uint64_t now_ns);
  bool advance_by_turns(uint64_t now_ns, bool hold);
  bool advance_session(EngineSession& session, bool may_work, uint64_t now_ns);
  void finish_turn();
  Op* next_ready(EngineSession& session);
  EngineSession* choose();
  void note_launched(EngineSession& session, const Candidate& launched);
  bool overtakes(const EngineSession& session, const Op& op) const;
  static HeldUp held_up(const Op& op);
  static Candidate candidate(EngineSession& session, const Op& op);
  static Running running(EngineSession& session);
  bool try_launch(EngineSession& session, Op& op, uint64_t now_ns, bool* moved);

  bool advance_queued(EngineSession& session, Op& op, uint64_t now_ns);
  bool advance_agreed(EngineSession& session, Op& op, uint64_t now_ns);
  bool advance_running(EngineSession& session, Op& op, bool may_work, uint64_t now_ns);
  bool advance_ending(EngineSession& session, Op& op, uint64_t now_ns);
  bool launch(EngineSession& session, Op& op, uint64_t now_ns);
  void check_loss(Op& op);
  bool stands_alone(Op& op);
  Verdict gather(Op& op, uint64_t now_ns, bool* changed, bool* alone);
  void finish_unlaunched(EngineSession& session, Op& op, uint64_t now_ns);
  void complete(EngineSession& session, Op& op, uint64_t now_ns);
  void wake_group(const GroupShared& group);
  /// Tells the observer of replays of captured operations.
  bool observe_replays(uint64_t now_ns);

  base::DeviceIndex device_;
  DevicePort* port_;
  WakePort* wake_;
  OpObserver* observer_;
  std::vector<EngineSession*> sessions_;  // grows only when a session is added, on the loop thread
  uint64_t outstanding_ = 0;
  uint64_t next_deadline_ns_ = ~0ULL;
  Schedule schedule_;
  uint64_t tickets_ = 0;
  size_t first_turn_ = 0;  // of sessions_: who works first where they take turns
};

}  // namespace expertd::engine
