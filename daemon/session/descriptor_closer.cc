// SPDX-License-Identifier: Apache-2.0
#include "daemon/session/descriptor_closer.h"

#include <fcntl.h>
#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>

#include "daemon/base/limits.h"

namespace expertd::session {

namespace {

// What is not stuck is closed long before.
constexpr std::chrono::seconds kParting(1);

}  // namespace

struct DescriptorCloser::Lane {
  std::mutex mutex;
  std::condition_variable changed;  // with mutex: everything below
  std::deque<base::ScopedFd> waiting;
  size_t held = 0;  // waiting and being closed
  bool started = false;
  bool stop = false;
};

DescriptorCloser::DescriptorCloser() {
  for (std::shared_ptr<Lane>& lane : lanes_) {
    lane = std::make_shared<Lane>();
  }
}

DescriptorCloser::~DescriptorCloser() {
  for (const std::shared_ptr<Lane>& lane : lanes_) {
    std::unique_lock<std::mutex> lock(lane->mutex);
    lane->stop = true;
    lane->changed.notify_all();
    if (lane->started) {
      (void)lane->changed.wait_for(lock, kParting, [&] { return lane->held == 0; });
    }
  }
}

base::Status DescriptorCloser::start() {
  for (const std::shared_ptr<Lane>& lane : lanes_) {
    try {
      std::thread thread([lane] { work(lane); });
      (void)::pthread_setname_np(thread.native_handle(), "session-closer");
      thread.detach();
    } catch (const std::system_error& error) {
      return base::Status(EXPERTD_REASON_SYSTEM, std::string("starting a closer: ") + error.what());
    }
    const std::lock_guard<std::mutex> lock(lane->mutex);
    lane->started = true;
  }
  return base::Status::ok();
}

bool DescriptorCloser::is_memory_file(int fd) {
  return ::fcntl(fd, F_GET_SEALS) >= 0;
}

void DescriptorCloser::close(base::ScopedFd fd) {
  if (!fd.valid()) {
    return;
  }
  Lane& lane = *lanes_[is_memory_file(fd.get()) ? 0 : 1];
  const std::lock_guard<std::mutex> lock(lane.mutex);
  lane.waiting.push_back(std::move(fd));
  ++lane.held;
  lane.changed.notify_all();
}

bool DescriptorCloser::full() const {
  return std::any_of(lanes_.begin(), lanes_.end(), [](const std::shared_ptr<Lane>& lane) {
    const std::lock_guard<std::mutex> lock(lane->mutex);
    return lane->held >= base::kMaxClosingFds;
  });
}

void DescriptorCloser::work(const std::shared_ptr<Lane>& lane) {
  std::unique_lock<std::mutex> lock(lane->mutex);
  while (true) {
    lane->changed.wait(lock, [&] { return lane->stop || !lane->waiting.empty(); });
    if (lane->waiting.empty()) {
      return;
    }
    base::ScopedFd fd = std::move(lane->waiting.front());
    lane->waiting.pop_front();
    lock.unlock();
    fd.reset();  // for as long as it takes
    lock.lock();
    --lane->held;
    lane->changed.notify_all();
  }
}

}  // namespace expertd::session
