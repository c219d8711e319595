// SPDX-License-Identifier: Apache-2.0
// Fakes at the engine's outlets: a device that records launches and ends parts on command, a ring that keeps its
// completions, a wake port and an observer that count. One thread each; nothing happens by itself.
#pragma once

#include <deque>
#include <list>
#include <map>
#include <utility>
#include <vector>

#include "daemon/engine/ports.h"

namespace expertd::test {

class FakeDevicePort final : public engine::DevicePort {
 public:
  struct Part {
    engine::PartId id = 0;
    engine::LaunchSpec spec;
    engine::SlotWords words;
    bool ended = false;   // the next poll reports the outcome
    bool polled = false;  // it has been reported
    uint32_t abort_reason = 0;
    engine::Outcome outcome{};
  };

  bool launch(const engine::LaunchSpec& spec, const engine::SlotWords& words, engine::PartId* part) override {
    if (full) {
      ++refused;
      return false;
    }
    parts_.push_back({.id = parts_.size() + 1, .spec = spec, .words = words});
    *part = parts_.back().id;
    return true;
  }

  bool poll(engine::PartId part, engine::Outcome* outcome) override {
    Part& polled = at(part);
    if (!polled.ended) {
      return false;
    }
    polled.polled = true;
    *outcome = polled.outcome;
    return true;
  }

  bool settle(engine::PartId part) override {
    settled.push_back(part);
    return settles;
  }
  void abort(engine::PartId part, uint32_t reason) override {
    Part& aborted = at(part);
    aborted.abort_reason = reason;
    if (ends_on_abort && !aborted.ended) {
      aborted.ended = true;
      aborted.outcome.report.reason = reason;
    }
  }

  uint32_t missing(engine::PartId /*part*/, base::RankSet* ranks) override {
    *ranks = missing_ranks;
    return missing_what;
  }

  bool busy() const override { return false; }

  bool next_replay(const engine::Request** request, engine::Outcome* outcome) override {
    if (replays.empty()) {
      return false;
    }
    *request = &replays.front().first;
    *outcome = replays.front().second;
    taken_replays.splice(taken_replays.end(), replays, replays.begin());
    return true;
  }
  bool end_captures(base::SessionId session, base::GroupId group) override {
    captures_ended_of.emplace_back(session.value, group.value);
    return captures_end;
  }

  void release_words(const engine::SlotWords& words, uint32_t reason) override {
    released.emplace_back(words.seq, reason);
  }

  /// Parts in order of launch.
  const std::deque<Part>& parts() const { return parts_; }
  Part& at(engine::PartId part) { return parts_[part - 1]; }
  /// Ends a part as its kernels would.
  void finish(engine::PartId part, const kernels::OpReport& report = {}) {
    at(part).ended = true;
    at(part).outcome.report = report;
  }
  void finish_all() {
    for (Part& part : parts_) {
      part.ended = true;
    }
  }

  bool full = false;    // launch() refuses
  bool settles = true;  // settle() answers
  std::vector<engine::PartId> settled;
  bool ends_on_abort = true;  // an aborted part ends at once, as host parts do
  uint32_t missing_what = EXPERTD_MISSING_ROWS;
  base::RankSet missing_ranks;
  uint32_t refused = 0;
  std::vector<std::pair<uint64_t, uint32_t>> released;             // (seq, reason)
  std::list<std::pair<engine::Request, engine::Outcome>> replays;  // that ended
  std::list<std::pair<engine::Request, engine::Outcome>> taken_replays;
  bool captures_end = true;                                      // end_captures() answers
  std::vector<std::pair<uint64_t, uint64_t>> captures_ended_of;  // (session, group)

 private:
  std::deque<Part> parts_;
};

class FakeCompletionPort final : public engine::CompletionPort {
 public:
  void complete(const engine::Request& request, const expertd_completion& completion) override {
    ++count[request.seq];
    by_seq[request.seq] = completion;
    order.push_back(request.seq);
  }
  std::map<uint64_t, uint32_t> count;
  std::map<uint64_t, expertd_completion> by_seq;
  std::vector<uint64_t> order;
};

class FakeWakePort final : public engine::WakePort {
 public:
  void wake(base::DeviceIndex device) override { ++woken[device.value]; }
  std::map<uint32_t, uint32_t> woken;
};

class FakeObserver final : public engine::OpObserver {
 public:
  void completed(base::DeviceIndex /*device*/, const engine::Request& request, const expertd_completion& completion,
                 const engine::HeldUp& held_up) override {
    ++completions;
    last_held_up = held_up;
    last_request = request;
    last_completion = completion;
  }
  uint32_t completions = 0;
  engine::Request last_request;
  expertd_completion last_completion{};
  engine::HeldUp last_held_up;
};

}  // namespace expertd::test
