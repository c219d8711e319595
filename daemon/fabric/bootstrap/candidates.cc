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
    asked_ = false;
    lock.unlock();
    Candidates found = options_.elected ? search_elected() : search();
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
      out.hosts_here = out.hosts_here || (first && is_own(address));
      // A name that stands for one daemon may have several addresses of it; otherwise the first one hosts.
      first = first && !options_.entries[i].all_of_name;
      if (out.places.size() < kMaxCandidates) {
        out.places.push_back({address.text(), text});
      }
    }
  }
  if (out.hosts_here) {
    // The name may lead elsewhere from this machine, as to another loopback address.
    out.places.insert(out.places.begin(), {own_target(), options_.texts.front()});
  }
  return out;
}

Candidates CandidateSearch::search_elected() const {
  const group::Elected elected = options_.elected();
  Candidates out;
  out.cause = elected.cause;
  out.term = elected.term;
  out.hosts_here = elected.here;
  if (elected.term == 0) {
    return out;
  }
  if (elected.here) {
    out.places.push_back({own_target(), elected.host.address});
    return out;
  }
  const base::Result<HostPort> place = parse_host_port(elected.host.address);
  const base::Result<std::vector<SocketAddress>> addresses =
      place.is_ok() ? resolve(place.value()) : base::Result<std::vector<SocketAddress>>(place.status());
  if (!addresses.is_ok()) {
    out.cause += (out.cause.empty() ? "" : "; ") +
                 addresses.status().with_context("the elected node \"" + elected.host.name + "\"").message();
    return out;
  }
  for (const SocketAddress& address : addresses.value()) {
    out.places.push_back({address.text(), elected.host.address});
  }
  return out;
}

bool CandidateSearch::is_own(const SocketAddress& address) const {
  const base::Result<SocketAddress> listen = parse_literal(options_.own_listen);
  const bool every = !listen.is_ok() || is_wildcard(listen.value());
  return address.port() == options_.own_port && (every ? is_local(address) : listen.value().same_host(address));
}

std::string CandidateSearch::own_target() const {
  const std::string port = ":" + std::to_string(options_.own_port);
  const base::Result<SocketAddress> listen = parse_literal(options_.own_listen);
  if (!listen.is_ok() || is_wildcard(listen.value())) {
    return (listen.is_ok() && listen.value().family() == AF_INET6 ? "[::1]" : "127.0.0.1") + port;
  }
  const std::string text = listen.value().text();
  return text.substr(0, text.rfind(':')) + port;
}

}  // namespace expertd::fabric
