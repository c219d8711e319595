// SPDX-License-Identifier: Apache-2.0
// A few threads for control calls that may block (memory registration, waiting for operations in flight), so that
// gRPC's own threads never do. Calls of one key (session) run one after another and in order, so one client cannot hold
// every thread. Any thread submits; owned by ControlServer. It never drops a job: every one runs, whose duty is to look
// at its deadline first.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_set>
#include <vector>

#include "daemon/base/status.h"

namespace expertd::control {

struct CallPoolOptions {
  uint32_t threads = 4;
  uint32_t queue_max = 1024;  // jobs waiting; gRPC's stream limit bounds them per connection
  const char* thread_name = "control-call";
};

class CallPool {
 public:
  static base::Result<std::unique_ptr<CallPool>> create(const CallPoolOptions& options);
  /// Blocks until every job has run; their deadlines bound that.
  ~CallPool();
  CallPool(const CallPool&) = delete;
  CallPool& operator=(const CallPool&) = delete;

  /// UNAVAILABLE when the queue is full or the pool is closing.
  base::Status submit(uint64_t key, std::function<void()> job);
  /// False when jobs are still there at the deadline (absolute, base::now_ns clock).
  bool wait_idle(uint64_t deadline_ns);

 private:
  struct Job {
    uint64_t key = 0;
    std::function<void()> work;
  };

  explicit CallPool(const CallPoolOptions& options) : options_(options) {}
  void work();
  /// The first waiting job whose key is not running, or end.
  std::deque<Job>::iterator next_job();

  const CallPoolOptions options_;
  std::mutex mutex_;
  std::condition_variable changed_;  // with mutex_: everything below
  std::deque<Job> waiting_;
  std::unordered_set<uint64_t> running_;
  bool closing_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace expertd::control
