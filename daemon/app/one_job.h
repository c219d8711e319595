// SPDX-License-Identifier: Apache-2.0
// OneJob: a thread that does one thing at a time and takes no more than that. What a job returns is called when the
// thread is free again, so that whoever is told may hand in the next one. Owned by the composition root's parts.
#pragma once

#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>

namespace expertd::app {

class OneJob {
 public:
  using Told = std::function<void()>;
  using Job = std::function<Told()>;

  OneJob() : thread_([this] { run(); }) {}
  ~OneJob() { stop(); }
  OneJob(const OneJob&) = delete;
  OneJob& operator=(const OneJob&) = delete;

  /// False while another job waits or runs, and after stop(). Any thread.
  bool try_submit(Job job) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (busy_ || stop_) {
      return false;
    }
    busy_ = true;
    job_ = std::move(job);
    changed_.notify_all();
    return true;
  }
  /// Waits for the job that runs; one that waits is run first.
  void stop() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
      changed_.notify_all();
    }
    if (thread_.joinable()) {
      thread_.join();
    }
  }

 private:
  void run() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      changed_.wait(lock, [this] { return stop_ || job_ != nullptr; });
      if (job_ == nullptr) {
        return;
      }
      const Job job = std::exchange(job_, nullptr);
      lock.unlock();
      const Told told = job();
      lock.lock();
      busy_ = false;
      lock.unlock();
      told();
      lock.lock();
    }
  }

  std::mutex mutex_;  // what follows
  std::condition_variable changed_;
  Job job_;
  bool busy_ = false;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace expertd::app
