// SPDX-License-Identifier: Apache-2.0
// One turn of the engine: what is decided about waiting operations, whose are launched, and whose launched ones work.
#include <algorithm>

#include "daemon/engine/engine.h"

namespace expertd::engine {

// A replay has no slot, so nobody but the observer is told. Bounded, so that the rings are looked at between.
bool Engine::observe_replays(uint64_t now_ns) {
  constexpr uint32_t kReplaysPerTurn = 64;
  const Request* request = nullptr;
  Outcome outcome;
  uint32_t taken = 0;
  while (taken < kReplaysPerTurn && port_->next_replay(&request, &outcome)) {
    ++taken;
    expertd_completion completion{};
    completion.rank = -1;
    completion.reason = outcome.report.reason;
    completion.recv_rows = outcome.report.recv_rows;
    completion.local_bytes = outcome.report.local_bytes;
    completion.remote_bytes = outcome.report.remote_bytes;
    Request replayed = *request;
    replayed.submit_ns = outcome.launch_ns;
    completion.admit_ns = outcome.launch_ns;
    completion.launch_ns = outcome.launch_ns;
    completion.start_ns = outcome.start_ns;
    completion.end_ns = outcome.end_ns;
    completion.complete_ns = std::max(now_ns, outcome.end_ns);
    completion.executor = outcome.executor;
    completion.sms = outcome.sms;
    observer_->completed(device_, replayed, completion, {});
  }
  return taken != 0;
}

// Launches come before work, so that what has just become complete does not wait for a chunk of somebody else's; and
// once more after work that ended something, because places and pages are free again.
bool Engine::run_once(uint64_t now_ns) {
  bool moved = port_->tend(now_ns);
  moved |= observe_replays(now_ns);
  moved |= settle(now_ns);
  moved |= launch_ready(now_ns);
  if (advance_launched(now_ns)) {
    moved = true;
    (void)settle(now_ns);
    (void)launch_ready(now_ns);
  }
  finish_turn();
  return moved;
}

// An operation behind the last one of its group is its successor's, which counts from 1. The first one takes the rank
// along, so that what the rank submits from now on is posted there. A handle that stays behind is good for nothing.
void Engine::go_over(Op& op) {
  const uint64_t from = op.group->moved_from();
  if (from == 0 || op.number < from) {
    return;
  }
  GroupShared& next = *op.group->successor();
  RankState& rank = *op.rank;
  if (rank.group == op.group) {
    rank.before = op.group->settings().shape.id;
    rank.before_from = from;
    rank.next_number = rank.next_number - from + 1;
    rank.group = &next;
  }
  Request& request = op.request;
  if (request.handle_made != 0 && request.handle_made < from && request.rejected_reason == 0) {
    request.rejected_reason = EXPERTD_REASON_STALE_HANDLE;
    request.rejected_argument = EXPERTD_ARGUMENT_HANDLE;
    request.rejected_value = request.handle_generation;
  }
  request.handle_made = request.handle_made < from ? 0 : request.handle_made - from + 1;
  request.begins = false;  // the next place to go over is behind what is under way
  op.group->take_back(rank.rank);
  op.group = &next;
  op.number = op.number - from + 1;
  next.post(op.number, rank.rank, &op.request);
}

bool Engine::settle(uint64_t now_ns) {
  bool moved = false;
  for (EngineSession* session : sessions_) {
    for (uint64_t i = session->head_; i != session->tail_; ++i) {
      Op& op = session->ops_[session->order_[i % EXPERTD_RING_SLOTS_MAX]];
      if (op.stage == EngineSession::Stage::kQueued) {
        moved |= advance_queued(*session, op, now_ns);
      } else if (op.stage == EngineSession::Stage::kEnding) {
        moved |= advance_ending(*session, op, now_ns);
      }
    }
  }
  return moved;
}

// The session's first operation that is not launched, if it is complete. One that the client refused never launches and
// holds no stream of it, so nothing waits behind it.
EngineSession::Op* Engine::next_ready(EngineSession& session) {
  for (uint64_t i = session.head_; i != session.tail_; ++i) {
    Op& op = session.ops_[session.order_[i % EXPERTD_RING_SLOTS_MAX]];
    if (op.stage == EngineSession::Stage::kQueued && !op.request.without_words) {
      return op.ticket != 0 ? &op : nullptr;
    }
  }
  return nullptr;
}

// Bytes are those of the caller's rows: what a client may ask for is bounded by its own buffers.
Candidate Engine::candidate(EngineSession& session, const Op& op) {
  const kernels::OpShape& shape = op.request.shape;
  const uint64_t rows = std::max(shape.tokens, shape.capacity_rows);
  return {op.request.traffic, op.ticket, rows * shape.row_bytes, &session.share_};
}

// The session whose next operation is to be launched; null when there is none.
EngineSession* Engine::choose() {
  EngineSession* best = nullptr;
  Candidate best_candidate;
  for (EngineSession* session : sessions_) {
    const Op* op = session->passed_ ? nullptr : next_ready(*session);
    if (op == nullptr) {
      continue;
    }
    const Candidate next = candidate(*session, *op);
    if (schedule_.may_launch(next) && (best == nullptr || schedule_.before(next, best_candidate))) {
      best = session;
      best_candidate = next;
    }
  }
  return best;
}

void Engine::note_launched(EngineSession& session, const Candidate& launched) {
  schedule_.launched(launched);
  for (EngineSession* other : sessions_) {
    const Op* waiting = other == &session ? nullptr : next_ready(*other);
    if (waiting != nullptr) {
      schedule_.passed_over(launched, candidate(*other, *waiting));
    }
  }
}

bool Engine::launch_ready(uint64_t now_ns) {
  bool moved = false;
  for (EngineSession* session : sessions_) {
    session->passed_ = false;
  }
  while (EngineSession* const session = choose()) {
    Op& op = *next_ready(*session);
    const Candidate next = candidate(*session, op);
    if (try_launch(*session, op, now_ns, &moved)) {
      note_launched(*session, next);
      moved = true;
    } else {
      session->passed_ = true;
    }
  }
  return moved;
}

// A session's parts run in order, so one that has low latency among them has to get through what is in front of it.
Engine::Running Engine::running(EngineSession& session) {
  Running running;
  for (uint64_t i = session.head_; i != session.tail_; ++i) {
    Op& op = session.ops_[session.order_[i % EXPERTD_RING_SLOTS_MAX]];
    if (op.stage != EngineSession::Stage::kRunning) {
      continue;
    }
    running.first = running.first == nullptr ? &op : running.first;
    running.traffic = op.request.traffic == Traffic::kLatency ? Traffic::kLatency : running.traffic;
  }
  return running;
}

bool Engine::advance_session(EngineSession& session, bool may_work, uint64_t now_ns) {
  bool moved = false;
  for (uint64_t i = session.head_; i != session.tail_; ++i) {
    Op& op = session.ops_[session.order_[i % EXPERTD_RING_SLOTS_MAX]];
    if (op.stage == EngineSession::Stage::kRunning) {
      moved |= advance_running(session, op, may_work, now_ns);
    }
  }
  return moved;
}

bool Engine::advance_launched(uint64_t now_ns) {
  if (!port_->works_in_poll()) {
    bool moved = false;
    for (EngineSession* session : sessions_) {
      moved |= advance_session(*session, true, now_ns);
    }
    return moved;
  }
  if (schedule_.policy() == Policy::kFifo) {
    return advance_oldest_first(now_ns);
  }
  bool latency = false;
  bool throughput = false;
  for (EngineSession* session : sessions_) {
    const Running state = running(*session);
    latency |= state.first != nullptr && state.traffic == Traffic::kLatency;
    throughput |= state.first != nullptr && state.traffic == Traffic::kThroughput;
  }
  return advance_by_turns(now_ns, schedule_.hold(now_ns, latency, throughput));
}

// Only the oldest part works, and those behind it as long as it waits for other ranks: two devices may have completed
// two operations in different orders, and each would wait for the other's second one.
bool Engine::advance_oldest_first(uint64_t now_ns) {
  bool moved = false;
  bool may_work = true;
  uint64_t done = 0;
  for (size_t visited = 0; visited < sessions_.size(); ++visited) {
    EngineSession* oldest = nullptr;
    Running oldest_state;
    for (EngineSession* session : sessions_) {
      const Running state = running(*session);
      const bool later = state.first != nullptr && state.first->ticket > done;
      if (later && (oldest == nullptr || state.first->ticket < oldest_state.first->ticket)) {
        oldest = session;
        oldest_state = state;
      }
    }
    if (oldest == nullptr) {
      break;
    }
    const PartId part = oldest_state.first->part;
    done = oldest_state.first->ticket;
    moved |= advance_session(*oldest, may_work, now_ns);
    may_work = may_work && !port_->works(part);
  }
  return moved;
}

// Fair: each session one chunk. Latency: all sessions with low latency, then one chunk of one of the others, so that
// whoever comes next waits for one chunk at most.
bool Engine::advance_by_turns(uint64_t now_ns, bool hold) {
  const bool fair = schedule_.policy() == Policy::kFair;
  const size_t count = sessions_.size();
  const size_t first = count == 0 ? 0 : first_turn_ % count;
  bool moved = false;
  bool may_work = !hold;
  for (const Traffic pass : {Traffic::kLatency, Traffic::kThroughput}) {
    for (size_t i = 0; i < count; ++i) {
      EngineSession& session = *sessions_[(first + i) % count];
      const Running state = running(session);
      if (state.first == nullptr || state.traffic != pass) {
        continue;
      }
      const PartId part = state.first->part;
      moved |= advance_session(session, fair || pass == Traffic::kLatency || may_work, now_ns);
      if (pass == Traffic::kThroughput && may_work && port_->works(part)) {
        may_work = false;
        first_turn_ = first + i + 1;
      }
    }
  }
  first_turn_ += fair ? 1 : 0;
  return moved;
}

bool Engine::overtakes(const EngineSession& session, const Op& op) const {
  if (op.request.traffic != Traffic::kLatency || op.part == 0) {
    return false;
  }
  return std::any_of(sessions_.begin(), sessions_.end(), [&](const EngineSession* other) {
    for (uint64_t i = other->head_; other != &session && i != other->tail_; ++i) {
      const Op& older = other->ops_[other->order_[i % EXPERTD_RING_SLOTS_MAX]];
      const bool waits = older.stage == EngineSession::Stage::kQueued || older.stage == EngineSession::Stage::kRunning;
      if (waits && older.ticket != 0 && older.ticket < op.ticket && older.request.traffic == Traffic::kThroughput) {
        return true;
      }
    }
    return false;
  });
}

void Engine::finish_turn() {
  next_deadline_ns_ = ~0ULL;
  for (EngineSession* session : sessions_) {
    const auto op_at = [session](uint64_t i) -> Op& {
      return session->ops_[session->order_[i % EXPERTD_RING_SLOTS_MAX]];
    };
    while (session->head_ != session->tail_ && op_at(session->head_).stage == EngineSession::Stage::kDone) {
      ++session->head_;
    }
    for (uint64_t i = session->head_; i != session->tail_; ++i) {
      if (op_at(i).stage != EngineSession::Stage::kDone) {
        next_deadline_ns_ = std::min(next_deadline_ns_, op_at(i).request.deadline_ns);
      }
    }
  }
}

}  // namespace expertd::engine
