// SPDX-License-Identifier: Apache-2.0
// ProgressThread: the one thread that touches the UCX workers of a lane. It turns its Progressed, runs tasks of control
// threads between turns, spins a while after the last work, and then sleeps until an event descriptor, a Waker or the
// next deadline. Owned by Fabric.
#pragma once

#include <poll.h>

#include <atomic>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "daemon/base/status.h"
#include "daemon/fabric/waker.h"

namespace expertd::fabric {

/// What the thread drives; all of it on that thread.
class Progressed {
 public:
  virtual ~Progressed() = default;
  /// True when something moved that is worth spinning for what may follow.
  virtual bool run_once(uint64_t now_ns) = 0;
  /// Arms the event descriptors; false when there is something to do already.
  virtual bool prepare_sleep() = 0;
  /// When to turn again at the latest.
  virtual uint64_t next_ns() = 0;
  /// The thread did not run for so long, which is no fault of others.
  virtual void was_late(uint64_t gap_ns) = 0;
  virtual void beat(uint64_t now_ns) = 0;
  /// The end was asked for: lets go of everything; then quiet() tells when that is done.
  virtual void begin_stop() = 0;
  virtual bool quiet(uint64_t now_ns) = 0;
};

struct ProgressOptions {
  const char* name = "expertd-fabric";  // of the thread, at most 15 characters
  uint64_t spin_ns = 50'000;
  uint64_t task_limit_ns = 5'000'000'000;
  uint64_t stop_limit_ns = 1'000'000'000;
};

class ProgressThread {
 public:
  explicit ProgressThread(const ProgressOptions& options) : options_(options) {}
  ~ProgressThread() { stop(); }
  ProgressThread(const ProgressThread&) = delete;
  ProgressThread& operator=(const ProgressThread&) = delete;

  /// `event_fds` wake it while it sleeps; they and `progressed` outlive it.
  base::Status start(Progressed* progressed, const std::vector<int>& event_fds);
  /// From now on it comes to its end, at most stop_limit_ns; any thread.
  void begin_stop();
  /// begin_stop(), and waits for the end.
  void stop();
  Waker& waker() { return waker_; }

  /// Runs `task` on the thread and waits for it. Any other thread. INTERNAL when the thread does not answer in time
  /// (the task then never runs), UNAVAILABLE when it has ended.
  base::Status run(const std::function<void()>& task);
  /// Runs `task` on the thread and does not wait. Any thread. False: it never will, since the thread ends or has too
  /// much to do.
  bool post(std::function<void()> task);

 private:
  void thread_main();
  bool run_tasks();
  void end_tasks();
  /// Until when it may have slept.
  uint64_t sleep(uint64_t now_ns);

  const ProgressOptions options_;
  Progressed* progressed_ = nullptr;
  std::vector<pollfd> watched_;  // the waker first
  Waker waker_;
  std::atomic<bool> stop_{false};
  std::atomic<uint32_t> tasks_waiting_{0};
  std::mutex tasks_mutex_;
  std::deque<std::function<void()>> tasks_;
  bool tasks_ended_ = true;  // under tasks_mutex_: nobody runs them
  std::thread thread_;
};

}  // namespace expertd::fabric
