// SPDX-License-Identifier: Apache-2.0
// Pings the service manager only while every thread that must make progress does. Threads beat (one
// relaxed store); the supervising thread calls tick(); metrics read the counters. Owned by `main`,
// and outlives the threads that beat. It has no thread and no clock of its own: a ping from an
// independent timer would prove nothing.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <deque>
#include <mutex>
#include <string>
#include <vector>

#include "daemon/base/status.h"
#include "daemon/supervise/notify.h"

namespace expertd::supervise {

/// One thread's sign of life. beat(), sleep_idle() and retire() belong to that thread.
class Beat {
 public:
  Beat(std::string name, uint64_t now_ns) : name_(std::move(name)), last_ns_(now_ns) {}
  Beat(const Beat&) = delete;
  Beat& operator=(const Beat&) = delete;

  void beat(uint64_t now_ns) { last_ns_.store(now_ns, std::memory_order_relaxed); }
  /// Before a wait without a deadline; the next beat() ends it.
  void sleep_idle() { last_ns_.store(kIdle, std::memory_order_relaxed); }
  /// Before the thread ends.
  void retire() { last_ns_.store(kRetired, std::memory_order_relaxed); }

  const std::string& name() const { return name_; }
  /// Whole late periods so far; one that lasts three periods counts three.
  uint64_t missed_total() const { return missed_.load(std::memory_order_relaxed); }

 private:
  friend class Watchdog;
  // One word for time and state, so that the watchdog never sees one without the other.
  static constexpr uint64_t kIdle = UINT64_MAX;
  static constexpr uint64_t kRetired = UINT64_MAX - 1;

  const std::string name_;
  std::atomic<uint64_t> last_ns_;  // stores of the thread pair with the loads of tick()
  std::atomic<uint64_t> missed_{0};
  uint64_t counted_ = 0;  // late periods of the present lateness; tick() only
};

class Watchdog {
 public:
  static constexpr uint64_t kLateNs = 2'000'000'000;
  static constexpr size_t kMaxBeats = 256;

  struct Options {
    uint64_t ping_interval_ns = 0;  // 0: the service manager expects no pings
    uint64_t late_ns = kLateNs;
  };
  struct Tick {
    bool pinged = false;
    std::vector<std::string> late;  // names of the threads that hold the ping back
    base::Status notified;          // of the ping, when one was due
  };
  struct Missed {
    std::string name;
    uint64_t total = 0;
  };

  /// The notifier outlives the watchdog.
  Watchdog(Notifier& notifier, const Options& options) : notifier_(notifier), options_(options) {}

  /// Good for the watchdog's life. Fails only at kMaxBeats, which the daemon's threads never reach.
  base::Result<Beat*> add(std::string name, uint64_t now_ns);
  /// Looks at every beat, and pings when that is due and none is late. Call it at least twice per
  /// second.
  Tick tick(uint64_t now_ns);
  /// For metrics, any thread.
  std::vector<Missed> missed() const;

 private:
  bool is_late(Beat& beat, uint64_t now_ns) const;

  Notifier& notifier_;
  const Options options_;
  mutable std::mutex mutex_;  // of the list; the beats themselves are atomic
  std::deque<Beat> beats_;    // never moves an element
  uint64_t next_ping_ns_ = 0;
};

/// Half of what WATCHDOG_USEC asks for, 0 when it or WATCHDOG_PID (of another process) says that
/// nobody listens.
uint64_t watchdog_ping_interval_ns(const char* watchdog_usec, const char* watchdog_pid, pid_t self);

}  // namespace expertd::supervise
