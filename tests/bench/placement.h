// SPDX-License-Identifier: Apache-2.0
// Keeps this thread and the daemon's engine thread on different CPUs for as long as an object lives: a client that
// polls on the engine's CPU keeps the engine from running, and whether that happens is the scheduler's choice. Main
// thread.
#pragma once

#include <sched.h>
#include <sys/types.h>

#include <cstdint>
#include <map>

namespace expertd::bench {

/// CPU time of each thread of a process, in nanoseconds.
std::map<pid_t, uint64_t> thread_times_ns(pid_t process);
/// The thread that used most CPU time since `before`; 0 when none did.
pid_t busiest_thread(pid_t process, const std::map<pid_t, uint64_t>& before);

class Apart {
 public:
  /// `other` is a thread of another process of this user.
  explicit Apart(pid_t other);
  /// Gives both threads their CPUs back.
  ~Apart();
  Apart(const Apart&) = delete;
  Apart& operator=(const Apart&) = delete;

  /// False with a single CPU or without the right to move the other thread; nothing is moved then.
  bool holds() const { return holds_; }

 private:
  pid_t other_;
  bool holds_ = false;
  cpu_set_t own_before_{};
  cpu_set_t other_before_{};
};

}  // namespace expertd::bench
