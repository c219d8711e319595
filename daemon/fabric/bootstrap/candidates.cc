// SPDX-License-Identifier: Apache-2.0
#include "daemon/fabric/bootstrap/candidates.h"

#include <pthread.h>

#include <utility>

namespace expertd::fabric {

namespace {

constexpr size_t kMaxCandidates = 128;

}  // namespace

CandidateSearch::CandidateSearch(CandidateOptions options, std::function<void(Candidates)> found)
    : options_(std::move(options)), found_(std::move(found)), thread_([this] { run(); }) {
  pthread_setname_np(thread_.native_handle(), "peer-resolve");
}

CandidateSearch::~CandidateSearch() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    changed_.notify_all();
  }
  thread_.join();
}

void CandidateSearch::begin() {
  const std::lock_guard lock(mutex_);
  asked_ = true;
  changed_.notify_all();
}

void CandidateSearch::run() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [this] { return asked_ || stopping_; });
    if (stopping_) {
      return;
    }
    lock.unlock();
    Candidates found = search();
    lock.lock();
    asked_ = false;
    lock.unlock();
    found_(std::move(found));
    lock.lock();
  }
}

Candidates CandidateSearch::search() const {
  Candidates out;
  for (size_t i = 0; i < options_.entries.size(); ++i) {
    const std::string& text = options_.texts[i];
    const base::Result<std::vector<SocketAddress>> addresses = resolve(options_.entries[i]);
    if (!addresses.is_ok()) {
      out.cause += (out.cause.empty() ? "" : "; ") + addresses.status().message();
    }
    // Its own entry is this daemon also when the name leads elsewhere from here, as behind a translated address.
    out.hosts_here = out.hosts_here || (i == 0 && text == options_.own_address);
    if (!addresses.is_ok()) {
      continue;
    }
    bool first = i == 0;
    for (const SocketAddress& address : addresses.value()) {
      out.hosts_here = out.hosts_here || (first && address.port() == options_.own_port && is_local(address));
      // A name that stands for one daemon may have several addresses of it; otherwise the first one hosts.
      first = first && !options_.entries[i].all_of_name;
      if (out.places.size() < kMaxCandidates) {
        out.places.push_back({address.text(), text});
      }
    }
  }
  return out;
}

}  // namespace expertd::fabric
