// SPDX-License-Identifier: Apache-2.0
// The counters that threads of the daemon write and the collector reads: plain relaxed atomics on cache lines of their
// own. OpCounters and ThreadCounters have one writer, the thread of their loop; ProcessCounters any thread. Owned by
// Blocks. Writing never allocates, locks, divides or fails, whatever the values are.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "daemon/metrics/catalog.h"

namespace expertd::metrics {

inline constexpr size_t kLineBytes = 128;  // two 64-byte lines: neighbours are prefetched in pairs

/// Every atomic below is a number on its own: nothing is published through it, so relaxed order is enough.
using Count = std::atomic<uint64_t>;

inline uint64_t read(const Count& count) {
  return count.load(std::memory_order_relaxed);
}
/// For the one writer of a count: no locked instruction.
inline void add_alone(Count& count, uint64_t value) {
  count.store(count.load(std::memory_order_relaxed) + value, std::memory_order_relaxed);
}
inline void add_shared(Count& count, uint64_t value) {
  count.fetch_add(value, std::memory_order_relaxed);
}

/// A histogram of nanoseconds with one writer. N bounds, and one bucket more for what lies beyond.
template <size_t N>
struct Histogram {
  std::array<Count, N + 1> buckets{};
  Count sum_ns{0};

  void observe_alone(const std::array<uint64_t, N>& bounds_ns, uint64_t value_ns) {
    size_t bucket = 0;
    for (const uint64_t bound : bounds_ns) {
      bucket += value_ns > bound ? 1 : 0;
    }
    add_alone(buckets[bucket], 1);
    add_alone(sum_ns, value_ns);
  }
};

inline constexpr uint64_t kPhaseAbsent = UINT64_MAX;
/// Longer durations count as this: submit times come from clients and may be anything.
inline constexpr uint64_t kDurationMaxNs = 3'600'000'000'000;

/// Durations by Phase; kPhaseAbsent for what the operation did not go through.
struct PhaseTimes {
  std::array<uint64_t, static_cast<size_t>(Phase::kCount)> ns{kPhaseAbsent, kPhaseAbsent, kPhaseAbsent, kPhaseAbsent,
                                                              kPhaseAbsent};
  uint64_t& operator[](Phase phase) { return ns[static_cast<size_t>(phase)]; }
  uint64_t operator[](Phase phase) const { return ns[static_cast<size_t>(phase)]; }
};

/// Absent when a step was not reached or the times are in a wrong order.
constexpr uint64_t duration_between(uint64_t begin_ns, uint64_t end_ns) {
  if (begin_ns == 0 || end_ns < begin_ns) {
    return kPhaseAbsent;
  }
  return end_ns - begin_ns < kDurationMaxNs ? end_ns - begin_ns : kDurationMaxNs;
}

/// Queue is submission to start, kernel start to end, complete end to completion; one node has no fabric phase.
inline PhaseTimes phase_times(const expertd_completion& completion, uint64_t submit_ns) {
  PhaseTimes times;
  times[Phase::kQueue] = duration_between(submit_ns, completion.start_ns);
  times[Phase::kKernel] = duration_between(completion.start_ns, completion.end_ns);
  times[Phase::kComplete] = duration_between(completion.end_ns, completion.complete_ns);
  times[Phase::kTotal] = duration_between(submit_ns, completion.complete_ns);
  return times;
}

/// One completed operation.
struct OpRecord {
  uint32_t op = EXPERTD_OP_NONE;  // expertd_op
  uint32_t reason = EXPERTD_REASON_NONE;
  uint32_t missing = EXPERTD_MISSING_NONE;  // with TIMEOUT
  PhaseTimes phases;
  uint64_t tokens = 0;
  uint64_t local_bytes = 0;
  uint64_t remote_bytes = 0;  // to other ranks of the node
  uint64_t fabric_bytes = 0;  // to other nodes
  uint32_t executor = EXPERTD_COMPLETION_EXECUTOR_NONE;
  uint32_t sms = 0;
};

/// What is known of one kind of operation on one device.
struct OpBlock {
  std::array<Count, kReasonCount> ended{};  // by compact reason index; [0] is ok
  std::array<Count, kMissingNames.size()> deadline_exceeded{};
  Count tokens{0};
  Count local_bytes{0};
  Count remote_bytes{0};
  Count fabric_bytes{0};
  std::array<Count, kExecutorNames.size()> executed{};
  Count sm_ns{0};  // multiprocessors times the kernel phase
  std::array<Histogram<kOpBoundsNs.size()>, static_cast<size_t>(Phase::kCount)> phases{};
};

struct OpTotals {
  uint64_t ok = 0;
  uint64_t failed = 0;
  uint64_t tokens = 0;
  uint64_t local_bytes = 0;
  uint64_t remote_bytes = 0;  // to other ranks, those of other nodes among them
  uint64_t duration_ns = 0;   // of successful operations, submission to completion
};

/// Counters of one device loop; only its thread writes.
class alignas(kLineBytes) OpCounters {
 public:
  /// A completed operation. Unknown kinds are not counted; durations, tokens and bytes of failed ones neither.
  void record(const OpRecord& op) {
    if (op.op == EXPERTD_OP_NONE || op.op >= EXPERTD_OP_COUNT) {
      return;
    }
    OpBlock& block = ops_[op.op];
    add_alone(block.ended[reason_index(op.reason)], 1);
    if (op.reason != EXPERTD_REASON_NONE) {
      if (op.reason == EXPERTD_REASON_TIMEOUT) {
        add_alone(block.deadline_exceeded[op.missing < kMissingNames.size() ? op.missing : 0], 1);
      }
      return;
    }
    add_alone(block.tokens, op.tokens);
    add_alone(block.local_bytes, op.local_bytes);
    add_alone(block.remote_bytes, op.remote_bytes);
    add_alone(block.fabric_bytes, op.fabric_bytes);
    add_alone(block.executed[op.executor < kExecutorNames.size() ? op.executor : 0], 1);
    if (op.phases[Phase::kKernel] != kPhaseAbsent) {
      add_alone(block.sm_ns, op.sms * op.phases[Phase::kKernel]);
    }
    for (size_t phase = 0; phase < block.phases.size(); ++phase) {
      if (op.phases.ns[phase] != kPhaseAbsent) {
        block.phases[phase].observe_alone(kOpBoundsNs, op.phases.ns[phase]);
      }
    }
  }
  /// An operation refused, at admission or by its client's library.
  void reject(uint32_t reason) { add_alone(rejected_[reason_index(reason)], 1); }
  /// A descriptor that could not be understood; count it with reject() as well.
  void descriptor_invalid(uint32_t reason) { add_alone(invalid_[reason_index(reason)], 1); }
  void ring_full() { add_alone(ring_full_, 1); }
  void overtook() { add_alone(overtakes_, 1); }
  /// Slots in use on a ring; the largest since the last scrape is shown.
  void ring_used(uint64_t slots) {
    if (slots > read(ring_used_max_)) {
      ring_used_max_.store(slots, std::memory_order_relaxed);
    }
  }

  OpTotals totals(uint32_t op) const {
    const OpBlock& block = ops_[op < EXPERTD_OP_COUNT ? op : 0];
    OpTotals out;
    out.ok = read(block.ended[0]);
    for (size_t i = 1; i < kReasonCount; ++i) {
      out.failed += read(block.ended[i]);
    }
    out.tokens = read(block.tokens);
    out.local_bytes = read(block.local_bytes);
    out.remote_bytes = read(block.remote_bytes) + read(block.fabric_bytes);
    out.duration_ns = read(block.phases[static_cast<size_t>(Phase::kTotal)].sum_ns);
    return out;
  }
  const OpBlock& block(uint32_t op) const { return ops_[op]; }
  uint64_t rejected(size_t reason) const { return read(rejected_[reason]); }
  uint64_t invalid(size_t reason) const { return read(invalid_[reason]); }
  uint64_t ring_full_count() const { return read(ring_full_); }
  uint64_t overtakes() const { return read(overtakes_); }
  /// For the collector, at a scrape.
  uint64_t take_ring_used_max() const { return ring_used_max_.exchange(0, std::memory_order_relaxed); }

 private:
  std::array<OpBlock, EXPERTD_OP_COUNT> ops_{};  // by expertd_op; [0] stays zero
  std::array<Count, kReasonCount> rejected_{};
  std::array<Count, kReasonCount> invalid_{};
  Count ring_full_{0};
  Count overtakes_{0};
  mutable Count ring_used_max_{0};
};

/// Counters of one thread's loop. lag() is for that thread, missed_beat() for the watchdog's.
class alignas(kLineBytes) ThreadCounters {
 public:
  void lag(uint64_t turn_ns) {
    if (turn_ns > read(lag_max_ns_)) {
      lag_max_ns_.store(turn_ns, std::memory_order_relaxed);
    }
  }
  void missed_beat() { add_shared(missed_beats_, 1); }

  uint64_t take_lag_max_ns() const { return lag_max_ns_.exchange(0, std::memory_order_relaxed); }
  uint64_t missed_beats() const { return read(missed_beats_); }

 private:
  mutable Count lag_max_ns_{0};
  Count missed_beats_{0};
};

/// Rare events of the whole process, from any thread.
class alignas(kLineBytes) ProcessCounters {
 public:
  void session_opened() { add_shared(opened_, 1); }
  void session_closed(CloseCause cause) { add_shared(closed_[static_cast<size_t>(cause)], 1); }
  void lease_reaped(uint64_t duration_ns) {
    size_t bucket = 0;
    for (const uint64_t bound : kReapBoundsNs) {
      bucket += duration_ns > bound ? 1 : 0;
    }
    add_shared(reap_.buckets[bucket], 1);
    add_shared(reap_.sum_ns, duration_ns);
  }

  uint64_t opened() const { return read(opened_); }
  uint64_t closed(size_t cause) const { return read(closed_[cause]); }
  const Histogram<kReapBoundsNs.size()>& reap() const { return reap_; }

 private:
  Count opened_{0};
  std::array<Count, static_cast<size_t>(CloseCause::kCount)> closed_{};
  Histogram<kReapBoundsNs.size()> reap_{};
};

}  // namespace expertd::metrics
