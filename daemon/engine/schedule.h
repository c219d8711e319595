// SPDX-License-Identifier: Apache-2.0
// Schedule: which session's operation goes next on one device, a choice that the engine makes before every launch and,
// where its own thread does the work, before every chunk of it. Pure: values in, values out; it keeps a few numbers,
// allocates nothing and knows no clock. Loop thread only.
#pragma once

#include <cstdint>

#include "daemon/engine/ports.h"

namespace expertd::engine {

/// engine.schedule. kLatency: what is waited for token by token goes before what moves many rows, as long as that does
/// not wait too long. kFair: sessions take turns by the bytes they move. kFifo: whoever was complete first.
enum class Policy : uint32_t { kLatency = 0, kFair = 1, kFifo = 2 };
constexpr const char* policy_name(Policy policy) {
  return policy == Policy::kLatency ? "latency" : policy == Policy::kFair ? "fair" : "fifo";
}

/// A waiting operation of high throughput is passed over so often and, while a device's thread works on low latency, so
/// long; then one chunk or one launch of it goes first.
inline constexpr uint32_t kOvertakesMax = 16;
inline constexpr uint64_t kHoldMaxNs = 200'000;
/// Under kFair: high-throughput parts of one session between launch and end. Two keep a device busy; more would let a
/// session queue its work in front of everybody else's.
inline constexpr uint32_t kFairPartsMax = 2;

struct ScheduleOptions {
  Policy policy = Policy::kLatency;
  uint64_t hold_max_ns = kHoldMaxNs;
};

/// What the schedule keeps about one session; zero for a new one.
struct SessionShare {
  uint64_t finish_tag = 0;  // kFair: bytes up to which the session has had its share
  uint32_t throughput_parts = 0;
  uint32_t passed_over = 0;  // launches of low latency since its waiting operation could have gone
};

/// The next operation of a session that may be launched.
struct Candidate {
  Traffic traffic = Traffic::kThroughput;
  uint64_t ticket = 0;  // grows in the order in which operations became complete on this device
  uint64_t bytes = 0;   // that it moves, roughly
  SessionShare* share = nullptr;
};

class Schedule {
 public:
  explicit Schedule(const ScheduleOptions& options) : policy_(options.policy), hold_max_ns_(options.hold_max_ns) {}
  Policy policy() const { return policy_; }

  /// False while the session has its share in flight; others are asked meanwhile.
  bool may_launch(const Candidate& candidate) const;
  /// Whether `a` is launched before `b`; a strict order, since tickets differ.
  bool before(const Candidate& a, const Candidate& b) const;
  /// `candidate` was launched.
  void launched(const Candidate& candidate);
  /// `candidate` was launched while `waiting`, of another session, could have been.
  void passed_over(const Candidate& candidate, const Candidate& waiting) const;
  /// A launched part of the session ended.
  void ended(Traffic traffic, SessionShare* share) const;

  /// Whether high throughput waits in this turn of a device whose own thread does the work. Asked once per turn;
  /// `latency` and `throughput`: launched parts of such sessions exist.
  bool hold(uint64_t now_ns, bool latency, bool throughput);
  /// A low-latency operation ended before a high-throughput one of another session that was complete earlier.
  void overtaken() { ++overtakes_; }

 private:
  uint64_t start_tag(const Candidate& candidate) const;

  Policy policy_;
  uint64_t hold_max_ns_;
  uint64_t virtual_bytes_ = 0;  // kFair: start tag of the last launch
  uint64_t held_since_ns_ = 0;  // 0: nothing is held
  uint32_t overtakes_ = 0;      // since high throughput last had a turn
};

}  // namespace expertd::engine
