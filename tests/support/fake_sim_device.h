// SPDX-License-Identifier: Apache-2.0
// A device of a simulation: its parts meet through the ExchangeFlags of their operation as host parts do, and every
// step takes a random number of ticks. The driver sets the time before it turns the engine. One device, one thread;
// ranks on other threads are met through the flags alone. It checks what engines promise to devices and keeps the first
// breach.
#pragma once

#include <algorithm>
#include <map>
#include <random>
#include <string>

#include "daemon/engine/ports.h"

namespace expertd::test {

class SimDevice final : public engine::DevicePort {
 public:
  SimDevice(uint64_t seed, uint32_t index, engine::WakePort* wake) : random_(seed), index_(index), wake_(wake) {}

  bool launch(const engine::LaunchSpec& spec, const engine::SlotWords& /*words*/, engine::PartId* id) override {
    if (parts_.size() >= parts_max) {
      return false;
    }
    check_spec(spec);
    Part part;
    part.group = spec.group.value;
    part.page = spec.page;
    part.active = spec.active_ranks;
    part.rank = spec.rank;
    part.flags = spec.flags;
    part.devices = spec.devices;
    part.routed_ns = now_ns + ticks();
    part.moved_ns = part.routed_ns + ticks();
    *id = next_id_++;
    parts_[*id] = part;
    return true;
  }

  bool poll(engine::PartId id, engine::Outcome* outcome) override {
    const auto found = parts_.find(id);
    if (found == parts_.end()) {
      breach("a part that ended was polled again");
      return true;
    }
    Part& part = found->second;
    advance(part);
    const bool aborted = part.abort_reason != 0 && now_ns >= part.abort_ns;
    if (!part.done && !aborted) {
      return false;
    }
    outcome->report = kernels::OpReport{};
    outcome->report.reason = part.done ? 0 : part.abort_reason;
    outcome->start_ns = part.routed_ns;
    outcome->end_ns = now_ns;
    parts_.erase(found);
    return true;
  }

  bool settle(engine::PartId /*id*/) override { return true; }
  void abort(engine::PartId id, uint32_t reason) override {
    const auto found = parts_.find(id);
    if (found == parts_.end() || found->second.abort_reason != 0 || reason == 0) {
      breach("an abort without a running part, a second one, or one without a Reason");
      return;
    }
    found->second.abort_reason = reason;
    found->second.abort_ns = now_ns + ticks();
  }

  uint32_t missing(engine::PartId id, base::RankSet* ranks) override {
    const auto found = parts_.find(id);
    *ranks = found == parts_.end() || found->second.flags == nullptr
                 ? base::RankSet()
                 : found->second.active - base::RankSet(found->second.flags->moved.load(std::memory_order_acquire));
    return EXPERTD_MISSING_ROWS;
  }
  bool busy() const override {
    return on_loop &&
           std::any_of(parts_.begin(), parts_.end(), [this](const auto& entry) { return due(entry.second) <= now_ns; });
  }
  bool works_in_poll() const override { return on_loop; }
  bool works(engine::PartId id) const override {
    const auto found = parts_.find(id);
    return found != parts_.end() && due(found->second) <= now_ns;
  }
  void release_words(const engine::SlotWords& /*words*/, uint32_t /*reason*/) override {}

  /// The next time at which a part advances by itself; ~0 when none does.
  uint64_t next_event_ns() const {
    uint64_t next = ~0ULL;
    for (const auto& [id, part] : parts_) {
      next = std::min(next, due(part));
    }
    return next;
  }
  size_t parts() const { return parts_.size(); }
  const std::string& first_breach() const { return breach_; }

  uint64_t now_ns = 0;
  size_t parts_max = 1024;
  uint64_t ticks_max = 20;
  bool on_loop = false;         // the thread that polls does the work
  uint64_t closed_session = 0;  // launches nothing for it any more

 private:
  struct Part {
    uint64_t group = 0;
    uint32_t page = 0;
    base::RankSet active;
    uint32_t rank = 0;
    engine::ExchangeFlags* flags = nullptr;
    std::array<base::DeviceIndex, base::kMaxLocalRanks> devices{};
    uint64_t routed_ns = 0;
    uint64_t moved_ns = 0;
    uint64_t abort_ns = 0;
    uint32_t abort_reason = 0;
    bool routed = false;
    bool moved = false;
    bool done = false;
  };

  /// When the part advances by itself; ~0 while it waits for others.
  static uint64_t due(const Part& part) {
    if (part.abort_reason != 0) {
      return part.abort_ns;
    }
    if (!part.routed) {
      return part.routed_ns;
    }
    const bool moves = !part.moved && all_routed(part);
    return moves ? part.moved_ns : ~0ULL;
  }
  uint64_t ticks() { return random_() % ticks_max + 1; }

  void breach(const std::string& text) {
    if (breach_.empty()) {
      breach_ = "device " + std::to_string(index_) + ": " + text;
    }
  }

  void check_spec(const engine::LaunchSpec& spec) {
    if (spec.own->session.value == closed_session) {
      breach("a launch for a closed session");
    }
    if (spec.group.value == 0) {
      return;
    }
    for (uint32_t rank = 0; rank < spec.ranks; ++rank) {
      const bool active = spec.active_ranks.contains(rank);
      if (active != (spec.requests[rank] != nullptr)) {
        breach("requests do not match the active ranks");
      } else if (active && spec.requests[rank]->submit_ns != spec.group_op) {
        breach("rank " + std::to_string(rank) + "'s request is not the one of operation " +
               std::to_string(spec.group_op));
      }
    }
    for (const auto& [id, part] : parts_) {
      if (part.group == spec.group.value && part.page == spec.page) {
        breach("exchange page " + std::to_string(spec.page) + " is still in use");
      }
    }
  }

  // All ranks are on one node here, so that their places are themselves.
  static bool all_routed(const Part& part) {
    return part.flags == nullptr || part.flags->routed.load(std::memory_order_acquire) == part.active;
  }
  static bool all_moved(const Part& part) {
    return part.flags == nullptr || part.flags->moved.load(std::memory_order_acquire) == part.active.low();
  }
  void wake_others(const Part& part) {
    for (const uint32_t rank : part.active) {
      if (rank != part.rank) {
        wake_->wake(part.devices[rank]);
      }
    }
  }
  void set_routed(const Part& part) {
    part.flags->routed.add(part.rank, std::memory_order_seq_cst);
    if (part.flags->routed.load(std::memory_order_seq_cst) == part.active) {
      wake_others(part);
    }
  }
  void set_moved(const Part& part) {
    const uint64_t bit = uint64_t{1} << part.rank;
    if ((part.flags->moved.fetch_or(bit, std::memory_order_seq_cst) | bit) == part.active.low()) {
      wake_others(part);
    }
  }

  void advance(Part& part) {
    if (part.abort_reason != 0) {
      return;
    }
    if (!part.routed && now_ns >= part.routed_ns) {
      part.routed = true;
      if (part.flags != nullptr) {
        set_routed(part);
      }
    }
    if (part.routed && !part.moved && now_ns >= part.moved_ns && all_routed(part)) {
      part.moved = true;
      if (part.flags != nullptr) {
        set_moved(part);
      }
    }
    part.done = part.moved && all_moved(part);
  }

  std::mt19937_64 random_;
  uint32_t index_;
  engine::WakePort* wake_;
  std::map<engine::PartId, Part> parts_;
  engine::PartId next_id_ = 1;
  std::string breach_;
};

}  // namespace expertd::test
