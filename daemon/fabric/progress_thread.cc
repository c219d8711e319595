// SPDX-License-Identifier: Apache-2.0
#include "daemon/fabric/progress_thread.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <future>
#include <memory>
#include <system_error>
#include <utility>

#include "daemon/base/clock.h"
#include "daemon/base/limits.h"

namespace expertd::fabric {

namespace {

constexpr uint64_t kBeatNs = 125'000'000;
constexpr uint64_t kSleepNsMax = 500'000'000;  // the watchdog hears from an idle thread this often
constexpr uint64_t kLateNs = 20'000'000;       // a turn takes microseconds; after such a gap others were not heard

}  // namespace

base::Status ProgressThread::start(Progressed* progressed, const std::vector<int>& event_fds) {
  progressed_ = progressed;
  if (!waker_.valid()) {
    return base::errno_status("eventfd of the fabric thread");
  }
  watched_.push_back({waker_.fd(), POLLIN, 0});
  for (const int fd : event_fds) {
    watched_.push_back({fd, POLLIN, 0});
  }
  try {
    thread_ = std::thread([this] { thread_main(); });
  } catch (const std::system_error& error) {
    return base::Status(EXPERTD_REASON_SYSTEM, std::string("starting the fabric thread: ") + error.what());
  }
  const std::lock_guard<std::mutex> lock(tasks_mutex_);
  tasks_ended_ = false;
  return base::Status::ok();
}

void ProgressThread::begin_stop() {
  stop_.store(true, std::memory_order_seq_cst);
  waker_.wake();
}

void ProgressThread::stop() {
  if (!thread_.joinable()) {
    return;
  }
  begin_stop();
  thread_.join();
}

bool ProgressThread::post(std::function<void()> task) {
  {
    const std::lock_guard<std::mutex> lock(tasks_mutex_);
    if (tasks_ended_ || tasks_.size() >= base::kMaxLoopTasks) {
      return false;
    }
    tasks_.push_back(std::move(task));
  }
  tasks_waiting_.fetch_add(1, std::memory_order_seq_cst);
  waker_.wake();
  return true;
}

base::Status ProgressThread::run(const std::function<void()>& task) {
  // Whoever claims the ticket first decides: the thread runs the task, or the caller gave up and it never runs.
  struct Ticket {
    std::atomic<bool> claimed{false};
    std::promise<void> done;
  };
  const auto ticket = std::make_shared<Ticket>();
  std::future<void> done = ticket->done.get_future();
  {
    const std::lock_guard<std::mutex> lock(tasks_mutex_);
    if (tasks_ended_) {
      return base::Status(EXPERTD_REASON_UNAVAILABLE, "the fabric thread has ended");
    }
    if (tasks_.size() >= base::kMaxLoopTasks) {
      return base::Status(EXPERTD_REASON_INTERNAL, "the fabric thread has too many requests waiting");
    }
    tasks_.push_back([task, ticket] {
      if (!ticket->claimed.exchange(true, std::memory_order_acq_rel)) {
        task();
        ticket->done.set_value();
      }
    });
  }
  tasks_waiting_.fetch_add(1, std::memory_order_seq_cst);
  waker_.wake();
  if (done.wait_for(std::chrono::nanoseconds(options_.task_limit_ns)) == std::future_status::ready) {
    return base::Status::ok();
  }
  if (!ticket->claimed.exchange(true, std::memory_order_acq_rel)) {
    return base::Status(EXPERTD_REASON_INTERNAL, "the fabric thread did not answer in time");
  }
  done.wait();  // it has just begun, and tasks are short
  return base::Status::ok();
}

bool ProgressThread::run_tasks() {
  if (tasks_waiting_.load(std::memory_order_seq_cst) == 0) {
    return false;
  }
  std::deque<std::function<void()>> tasks;
  {
    const std::lock_guard<std::mutex> lock(tasks_mutex_);
    tasks.swap(tasks_);
  }
  tasks_waiting_.fetch_sub(static_cast<uint32_t>(tasks.size()), std::memory_order_seq_cst);
  for (const std::function<void()>& task : tasks) {
    task();
  }
  return !tasks.empty();
}

void ProgressThread::end_tasks() {
  {
    const std::lock_guard<std::mutex> lock(tasks_mutex_);
    tasks_ended_ = true;
  }
  (void)run_tasks();
}

uint64_t ProgressThread::sleep(uint64_t now_ns) {
  waker_.sleep_begins();
  // Once more, since what was published before the flag was visible must not be slept over.
  uint64_t until_ns = std::min(progressed_->next_ns(), now_ns + kSleepNsMax);
  if (tasks_waiting_.load(std::memory_order_seq_cst) == 0 && !stop_.load(std::memory_order_seq_cst) &&
      until_ns > now_ns && progressed_->prepare_sleep()) {
    const uint64_t wait_ns = until_ns - now_ns;
    const timespec limit{static_cast<time_t>(wait_ns / 1'000'000'000), static_cast<long>(wait_ns % 1'000'000'000)};
    if (::ppoll(watched_.data(), watched_.size(), &limit, nullptr) > 0 && watched_[0].revents != 0) {
      waker_.drain();
    }
  } else {
    until_ns = now_ns;
  }
  waker_.sleep_ends();
  return until_ns;
}

void ProgressThread::thread_main() {
  (void)::pthread_setname_np(::pthread_self(), options_.name);
  uint64_t turn_ns = base::now_ns();
  uint64_t work_ns = turn_ns;
  uint64_t beat_ns = 0;
  uint64_t stop_at_ns = 0;
  while (true) {
    const uint64_t now_ns = base::now_ns();
    if (now_ns - turn_ns > kLateNs) {
      progressed_->was_late(now_ns - turn_ns);
    }
    turn_ns = now_ns;
    if (now_ns - beat_ns > kBeatNs) {
      progressed_->beat(now_ns);
      beat_ns = now_ns;
    }
    if (stop_.load(std::memory_order_seq_cst)) {
      if (stop_at_ns == 0) {
        stop_at_ns = now_ns + options_.stop_limit_ns;
        end_tasks();
        progressed_->begin_stop();
      }
      if (progressed_->quiet(now_ns) || now_ns >= stop_at_ns) {
        return;
      }
    }
    bool moved = run_tasks();
    moved |= progressed_->run_once(now_ns);
    if (moved || stop_at_ns != 0) {
      work_ns = now_ns;
    } else if (now_ns - work_ns < options_.spin_ns) {
      __builtin_ia32_pause();
    } else {
      const uint64_t until_ns = sleep(now_ns);
      turn_ns = std::min(until_ns, base::now_ns());  // only what went beyond the sleep is lateness
    }
  }
}

}  // namespace expertd::fabric
