// SPDX-License-Identifier: Apache-2.0
#include "daemon/control/call_pool.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <string>
#include <utility>

#include "daemon/base/clock.h"

namespace expertd::control {

base::Result<std::unique_ptr<CallPool>> CallPool::create(const CallPoolOptions& options) {
  std::unique_ptr<CallPool> pool(new CallPool(options));
  try {
    for (uint32_t i = 0; i < options.threads; ++i) {
      pool->threads_.emplace_back([raw = pool.get()] { raw->work(); });
      pthread_setname_np(pool->threads_.back().native_handle(), options.thread_name);
    }
  } catch (const std::exception& error) {
    return base::Status(EXPERTD_REASON_SYSTEM, std::string("starting a control thread: ") + error.what());
  }
  return pool;
}

CallPool::~CallPool() {
  {
    const std::lock_guard lock(mutex_);
    closing_ = true;
  }
  changed_.notify_all();
  for (std::thread& thread : threads_) {
    thread.join();
  }
}

size_t CallPool::waiting_of(uint64_t key) const {
  return static_cast<size_t>(std::ranges::count_if(waiting_, [key](const Job& job) { return job.turn.key == key; }));
}

base::Status CallPool::submit(const Turn& turn, std::function<bool()> ended, std::function<void()> job) {
  {
    const std::lock_guard lock(mutex_);
    if (closing_) {
      return base::Status(EXPERTD_REASON_UNAVAILABLE);
    }
    if (waiting_of(turn.key) >= options_.per_key_max || waiting_.size() >= options_.queue_max) {
      // A cancelled call makes room in gRPC's count of streams, but its job stays here until it is looked at.
      std::erase_if(waiting_, [](const Job& waiting) { return waiting.ended(); });
    }
    if (waiting_of(turn.key) >= options_.per_key_max) {
      return base::Status(EXPERTD_REASON_CALL_LIMIT,
                          std::to_string(options_.per_key_max) + " control calls of the session are waiting");
    }
    if (waiting_.size() >= options_.queue_max) {
      return base::Status(EXPERTD_REASON_UNAVAILABLE, "too many control calls are waiting; try again later");
    }
    waiting_.push_back(Job{turn, std::move(ended), std::move(job)});
  }
  changed_.notify_all();
  return base::Status::ok();
}

bool CallPool::wait_idle(uint64_t deadline_ns) {
  std::unique_lock lock(mutex_);
  const auto idle = [this] { return waiting_.empty() && running_.empty(); };
  const uint64_t now = base::now_ns();
  const uint64_t left_ns = deadline_ns > now ? deadline_ns - now : 0;
  return changed_.wait_for(lock, std::chrono::nanoseconds(left_ns), idle);
}

bool CallPool::may_run(const Job& job) const {
  if (running_.contains(job.turn.key)) {
    return false;
  }
  const auto running = running_of_.find(job.turn.owner);
  const bool last_thread = options_.leave_a_thread && running != running_of_.end() && running->second != 0 &&
                           running->second + 1 >= options_.threads;
  return !last_thread;
}

std::deque<CallPool::Job>::iterator CallPool::next_job() {
  return std::ranges::find_if(waiting_, [this](const Job& job) { return may_run(job); });
}

void CallPool::work() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [this] { return next_job() != waiting_.end() || (closing_ && waiting_.empty()); });
    const auto next = next_job();
    if (next == waiting_.end()) {
      return;
    }
    Job job = std::move(*next);
    waiting_.erase(next);
    running_.insert(job.turn.key);
    ++running_of_[job.turn.owner];
    lock.unlock();
    job.work();
    job.work = nullptr;  // what it captured ends before the key is free
    lock.lock();
    running_.erase(job.turn.key);
    if (--running_of_[job.turn.owner] == 0) {
      running_of_.erase(job.turn.owner);
    }
    changed_.notify_all();
  }
}

}  // namespace expertd::control
