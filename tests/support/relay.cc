// SPDX-License-Identifier: Apache-2.0
#include "tests/support/relay.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <deque>
#include <list>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "daemon/base/clock.h"
#include "daemon/base/fd.h"

namespace expertd::support {
namespace {

constexpr size_t kHeldBytesMax = 1 << 20;  // read and not passed on, per connection and way
constexpr size_t kChunkBytes = 16384;
constexpr size_t kSlowChunkBytes = 512;  // with a bandwidth
constexpr int kBacklog = 64;
constexpr int kFillersMax = 64;
constexpr int kFillerMs = 20;  // a connect that takes longer over loopback hangs
constexpr int kWays = 2;

sockaddr_in loopback(uint16_t port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

base::ScopedFd connecting(uint16_t port) {
  base::ScopedFd fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  const sockaddr_in address = loopback(port);
  (void)::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address));
  return fd;
}

struct Chunk {
  std::string bytes;  // empty: the end of the stream
  uint64_t due_ns = 0;
};

/// Bytes from one socket of a connection to the other.
struct Stream {
  std::deque<Chunk> chunks;
  size_t held_bytes = 0;
  uint64_t free_ns = 0;  // when the bandwidth has room again
  bool read_end = false;
  bool written_end = false;
};

struct Link {
  base::ScopedFd ends[kWays];  // what a way reads from: the caller's, then the daemon's; the second is none when mute
  Stream streams[kWays];
  bool broken = false;
};

void reset(int fd) {
  const linger now{1, 0};  // close() sends RST
  (void)::setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
}

}  // namespace

struct Relay::Parts {
  base::ScopedFd listener;
  base::ScopedFd wake{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
  uint16_t port = 0;
  std::list<Link> links;  // the thread's alone
  std::thread thread;

  mutable std::mutex mutex;
  // All under mutex.
  uint16_t target_port = 0;
  RelayRule rules[kWays];
  uint64_t cut_at_bytes[kWays] = {};  // of `passed`; 0: never
  uint64_t passed[kWays] = {};
  uint64_t accepted_count = 0;
  uint64_t cut_count = 0;
  bool mute = false;
  bool cut_now = false;
  bool accepting = true;
  bool ended = false;
  std::vector<base::ScopedFd> fillers;

  void run();
  void accept_one();
  bool turn();
  void read(Link* link, int way, uint64_t now);
  void write(Link* link, int way, uint64_t now);
  void cut_links();
  std::vector<pollfd> waited(uint64_t now, uint64_t* next_ns) const;
  void ring() const {
    const uint64_t one = 1;
    (void)!::write(wake.get(), &one, sizeof(one));
  }
};

void Relay::Parts::accept_one() {
  base::ScopedFd caller(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
  if (!caller.valid()) {
    return;
  }
  ++accepted_count;
  if (target_port == 0 && !mute) {
    reset(caller.get());
    return;
  }
  Link& link = links.emplace_back();
  link.ends[0] = std::move(caller);
  if (!mute) {
    link.ends[1] = connecting(target_port);
    const int one = 1;
    (void)::setsockopt(link.ends[1].get(), IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    (void)::setsockopt(link.ends[0].get(), IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
  }
}

void Relay::Parts::read(Link* link, int way, uint64_t now) {
  Stream& stream = link->streams[way];
  const RelayRule& rule = rules[way];
  while (link->ends[1].valid() && !rule.held && !stream.read_end && stream.held_bytes < kHeldBytesMax) {
    char bytes[kChunkBytes];
    const size_t most = rule.bytes_per_s == 0 ? kChunkBytes : kSlowChunkBytes;
    const ssize_t got = ::recv(link->ends[way].get(), bytes, most, 0);
    if (got < 0) {
      link->broken = link->broken || (errno != EAGAIN && errno != EINTR && errno != ENOTCONN);
      return;
    }
    stream.read_end = got == 0;
    stream.held_bytes += static_cast<size_t>(got);
    stream.chunks.push_back({std::string(bytes, static_cast<size_t>(got)), now + rule.delay_ms * 1'000'000});
  }
}

void Relay::Parts::write(Link* link, int way, uint64_t now) {
  Stream& stream = link->streams[way];
  const RelayRule& rule = rules[way];
  const int to = link->ends[1 - way].get();
  while (!stream.chunks.empty() && !rule.held && now >= std::max(stream.chunks.front().due_ns, stream.free_ns)) {
    Chunk& chunk = stream.chunks.front();
    if (chunk.bytes.empty()) {
      (void)::shutdown(to, SHUT_WR);
      stream.written_end = true;
      stream.chunks.pop_front();
      return;
    }
    size_t size = chunk.bytes.size();
    if (cut_at_bytes[way] != 0) {
      size = std::min<size_t>(size, cut_at_bytes[way] - passed[way]);
    }
    const ssize_t put = ::send(to, chunk.bytes.data(), size, MSG_NOSIGNAL);
    if (put < 0) {
      link->broken = link->broken || (errno != EAGAIN && errno != EINTR && errno != ENOTCONN);
      return;
    }
    passed[way] += static_cast<uint64_t>(put);
    stream.held_bytes -= static_cast<size_t>(put);
    stream.free_ns = rule.bytes_per_s == 0 ? 0 : now + static_cast<uint64_t>(put) * 1'000'000'000 / rule.bytes_per_s;
    chunk.bytes.erase(0, static_cast<size_t>(put));
    if (chunk.bytes.empty()) {
      stream.chunks.pop_front();
    }
    if (cut_at_bytes[way] != 0 && passed[way] >= cut_at_bytes[way]) {
      cut_at_bytes[way] = 0;
      cut_now = true;
      return;
    }
  }
}

void Relay::Parts::cut_links() {
  for (Link& link : links) {
    for (const base::ScopedFd& end : link.ends) {
      reset(end.get());
    }
    ++cut_count;
  }
  links.clear();
}

/// What to poll for, and when the next chunk is due.
std::vector<pollfd> Relay::Parts::waited(uint64_t now, uint64_t* next_ns) const {
  std::vector<pollfd> polled = {{wake.get(), POLLIN, 0}, {accepting ? listener.get() : -1, POLLIN, 0}};
  for (const Link& link : links) {
    short events[kWays] = {};
    for (int way = 0; way < kWays && link.ends[1].valid(); ++way) {
      const Stream& stream = link.streams[way];
      if (rules[way].held) {
        continue;
      }
      if (!stream.read_end && stream.held_bytes < kHeldBytesMax) {
        events[way] = static_cast<short>(events[way] | POLLIN);
      }
      if (!stream.chunks.empty()) {
        const uint64_t due_ns = std::max(stream.chunks.front().due_ns, stream.free_ns);
        if (due_ns <= now) {
          events[1 - way] = static_cast<short>(events[1 - way] | POLLOUT);
        } else {
          *next_ns = std::min(*next_ns, due_ns);
        }
      }
    }
    for (int end = 0; end < kWays; ++end) {
      // A socket that is asked nothing would still report its hang-up, again and again.
      polled.push_back({events[end] != 0 ? link.ends[end].get() : -1, events[end], 0});
    }
  }
  return polled;
}

/// Passes on what can be passed on; false at the end.
bool Relay::Parts::turn() {
  const std::lock_guard lock(mutex);
  if (ended) {
    return false;
  }
  if (accepting) {
    accept_one();
  }
  const uint64_t now = base::now_ns();
  for (Link& link : links) {
    for (int way = 0; way < kWays && !cut_now; ++way) {
      read(&link, way, now);
      write(&link, way, now);
    }
  }
  if (cut_now) {
    cut_links();
    cut_now = false;
  }
  for (Link& link : links) {
    if (link.broken) {
      reset(link.ends[0].get());
      reset(link.ends[1].get());
    }
  }
  links.remove_if(
      [](const Link& link) { return link.broken || (link.streams[0].written_end && link.streams[1].written_end); });
  return true;
}

void Relay::Parts::run() {
  while (turn()) {
    uint64_t next_ns = UINT64_MAX;
    std::vector<pollfd> polled;
    const uint64_t now = base::now_ns();
    {
      const std::lock_guard lock(mutex);
      polled = waited(now, &next_ns);
    }
    const int limit_ms = next_ns == UINT64_MAX ? -1 : static_cast<int>((next_ns - now + 999'999) / 1'000'000);
    (void)::poll(polled.data(), polled.size(), limit_ms);
    uint64_t rung = 0;
    (void)!::read(wake.get(), &rung, sizeof(rung));
  }
}

Relay::Relay() : parts_(std::make_unique<Parts>()) {
  Parts& parts = *parts_;
  parts.listener.reset(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  sockaddr_in address = loopback(0);
  socklen_t size = sizeof(address);
  if (::bind(parts.listener.get(), reinterpret_cast<const sockaddr*>(&address), size) == 0 &&
      ::listen(parts.listener.get(), kBacklog) == 0 &&
      ::getsockname(parts.listener.get(), reinterpret_cast<sockaddr*>(&address), &size) == 0) {
    parts.port = ntohs(address.sin_port);
  }
  parts.thread = std::thread([&parts] { parts.run(); });
}

Relay::~Relay() {
  {
    const std::lock_guard lock(parts_->mutex);
    parts_->ended = true;
  }
  parts_->ring();
  parts_->thread.join();
}

void Relay::set_target(const std::string& address) {
  const std::lock_guard lock(parts_->mutex);
  parts_->target_port =
      static_cast<uint16_t>(std::strtoul(address.substr(address.rfind(':') + 1).c_str(), nullptr, 10));
}

std::string Relay::address() const {
  return "127.0.0.1:" + std::to_string(parts_->port);
}

void Relay::set_rule(Way way, const RelayRule& rule) {
  const std::lock_guard lock(parts_->mutex);
  parts_->rules[static_cast<int>(way)] = rule;
  parts_->ring();
}

void Relay::set_mute(bool mute) {
  const std::lock_guard lock(parts_->mutex);
  parts_->mute = mute;
}

void Relay::cut() {
  const std::lock_guard lock(parts_->mutex);
  parts_->cut_now = true;
  parts_->ring();
}

void Relay::cut_after(Way way, uint64_t bytes) {
  const std::lock_guard lock(parts_->mutex);
  parts_->cut_at_bytes[static_cast<int>(way)] = parts_->passed[static_cast<int>(way)] + bytes;
  parts_->ring();
}

void Relay::stop_accepting() {
  const std::lock_guard lock(parts_->mutex);
  Parts& parts = *parts_;
  parts.accepting = false;
  parts.ring();
  (void)::listen(parts.listener.get(), 0);
  // Connections of its own fill the queue until one of them hangs.
  for (int count = 0; count < kFillersMax; ++count) {
    parts.fillers.push_back(connecting(parts.port));
    pollfd polled{parts.fillers.back().get(), POLLOUT, 0};
    if (::poll(&polled, 1, kFillerMs) == 0) {
      return;
    }
  }
}

void Relay::go_on_accepting() {
  const std::lock_guard lock(parts_->mutex);
  parts_->fillers.clear();
  (void)::listen(parts_->listener.get(), kBacklog);
  parts_->accepting = true;
  parts_->ring();
}

uint64_t Relay::accepted() const {
  const std::lock_guard lock(parts_->mutex);
  return parts_->accepted_count;
}

uint64_t Relay::passed_bytes(Way way) const {
  const std::lock_guard lock(parts_->mutex);
  return parts_->passed[static_cast<int>(way)];
}

uint64_t Relay::cuts() const {
  const std::lock_guard lock(parts_->mutex);
  return parts_->cut_count;
}

}  // namespace expertd::support
