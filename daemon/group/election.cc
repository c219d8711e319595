// SPDX-License-Identifier: Apache-2.0
#include "daemon/group/election.h"

#include <pthread.h>

#include <chrono>
#include <system_error>
#include <utility>

#include "daemon/base/clock.h"
#include "daemon/base/log.h"

namespace expertd::group {

namespace {

constexpr uint64_t kRestMinNs = 50'000'000;  // between waits that end with an error at once

}  // namespace

Election::Election(const CandidacyOptions& options, std::unique_ptr<ElectionStore> store)
    : where_(options.where),
      store_(std::move(store)),
      candidacy_(options, store_.get(), base::now_ns),
      random_(static_cast<std::minstd_rand::result_type>(options.self.id ^ options.self.id >> 32)) {
  elected_.cause = where_ + " has not been looked at yet";
}

Election::~Election() {
  stop();
}

base::Status Election::start(Told told) {
  told_ = std::move(told);
  try {
    thread_ = std::thread([this] { run(); });
  } catch (const std::system_error& error) {
    return base::Status(EXPERTD_REASON_SYSTEM, std::string("starting the thread of the election: ") + error.what());
  }
  pthread_setname_np(thread_.native_handle(), "election");
  return base::Status::ok();
}

void Election::stop() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    changed_.notify_all();
  }
  store_->interrupt();
  if (thread_.joinable()) {
    thread_.join();
  }
}

Elected Election::elected() const {
  const std::lock_guard lock(mutex_);
  return elected_;
}

void Election::run() {
  const auto stopping = [this] {
    const std::lock_guard lock(mutex_);
    return stopping_;
  };
  while (!stopping()) {
    publish(candidacy_.turn());
    const uint64_t idle_ns = candidacy_.idle_ns();
    if (idle_ns == 0) {
      continue;
    }
    if (!candidacy_.reachable()) {
      rest(idle_ns / 2 + random_() % (idle_ns / 2 + 1));
    } else if (!store_->wait_change(candidacy_.revision(), idle_ns).is_ok()) {
      rest(kRestMinNs);
    }
  }
  Elected last = candidacy_.elected();
  last.here = false;
  last.until_ns = 0;
  publish(last);  // before the lease goes back
  candidacy_.resign();
}

void Election::rest(uint64_t idle_ns) {
  std::unique_lock lock(mutex_);
  changed_.wait_for(lock, std::chrono::nanoseconds(idle_ns), [this] { return stopping_; });
}

void Election::publish(const Elected& now) {
  Elected before;
  bool stopping = false;
  {
    const std::lock_guard lock(mutex_);
    before = std::exchange(elected_, now);
    stopping = stopping_;
  }
  told_(now);
  const bool hosting = now.here && base::now_ns() < now.until_ns;
  if (std::exchange(hosting_, hosting) != hosting) {
    base::log_info(hosting ? "this daemon hosts the rendezvous" : "this daemon hosts the rendezvous no more",
                   {{"elected_by", where_}, {"term", hosting ? now.term : before.term}, {"cause", now.cause}});
  }
  if (!stopping && now.cause != before.cause && !now.cause.empty()) {
    base::log_warn("who hosts the rendezvous cannot be seen; it is tried again", {{"cause", now.cause}});
  } else if (now.cause.empty() && (!before.cause.empty() || now.term != before.term)) {
    base::log_info("host of the rendezvous",
                   {{"node", now.host.name}, {"address", now.host.address}, {"term", now.term}, {"by", where_}});
  }
}

}  // namespace expertd::group
