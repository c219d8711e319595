// SPDX-License-Identifier: Apache-2.0
// A few threads for control calls that may block (memory registration, waiting for operations in flight), so that
// gRPC's own threads never do. Calls of one key (session) run one after another and in order, and few of them wait;
// calls of one owner (user) never hold the last thread, however many sessions it has. Any thread submits; owned by
// ControlServer. A job whose call has ended meanwhile may be dropped; every other one runs, and it is its duty to look
// at its deadline first.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "daemon/base/limits.h"
#include "daemon/base/status.h"

namespace expertd::control {

struct CallPoolOptions {
  uint32_t threads = 4;
  uint32_t queue_max = base::kMaxWaitingCalls;              // jobs waiting, of all keys
  uint32_t per_key_max = base::kMaxWaitingCallsPerSession;  // of them of one key
  bool leave_a_thread = true;                               // that the jobs of one owner alone do not get
  const char* thread_name = "control-call";
};

/// Whose turn a job takes.
struct Turn {
  uint64_t key = 0;
  uint64_t owner = 0;
};

class CallPool {
 public:
  static base::Result<std::unique_ptr<CallPool>> create(const CallPoolOptions& options);
  /// Blocks until every job has run; their deadlines bound that.
  ~CallPool();
  CallPool(const CallPool&) = delete;
  CallPool& operator=(const CallPool&) = delete;

  /// `ended` tells, from any thread and without blocking, that nobody waits for the job any more. CALL_LIMIT when too
  /// many of the key wait, UNAVAILABLE when the queue is full or the pool is closing.
  base::Status submit(const Turn& turn, std::function<bool()> ended, std::function<void()> job);
  /// False when jobs are still there at the deadline (absolute, base::now_ns clock).
  bool wait_idle(uint64_t deadline_ns);

 private:
  struct Job {
    Turn turn;
    std::function<bool()> ended;
    std::function<void()> work;
  };

  explicit CallPool(const CallPoolOptions& options) : options_(options) {}
  void work();
  bool may_run(const Job& job) const;
  /// The first waiting job whose turn it is, or end.
  std::deque<Job>::iterator next_job();
  size_t waiting_of(uint64_t key) const;

  const CallPoolOptions options_;
  std::mutex mutex_;
  std::condition_variable changed_;  // with mutex_: everything below
  std::deque<Job> waiting_;
  std::unordered_set<uint64_t> running_;               // keys
  std::unordered_map<uint64_t, uint32_t> running_of_;  // owner -> jobs
  bool closing_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace expertd::control
