// SPDX-License-Identifier: Apache-2.0
#include "daemon/fabric/bootstrap/peer_listener.h"

#include <fcntl.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <exception>
#include <utility>

#include "daemon/base/clock.h"
#include "daemon/base/log.h"
#include "daemon/fabric/bootstrap/address.h"

namespace expertd::fabric {

namespace {

constexpr int kBacklog = 128;
constexpr uint64_t kPrefaceBytes = 24;  // of HTTP/2
constexpr uint64_t kAcceptPauseNs = 50'000'000;
constexpr unsigned kUserTimeoutMs = 10'000;

uint64_t bytes_received(int fd) {
  tcp_info info{};
  socklen_t size = sizeof(info);
  return getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &size) == 0 ? info.tcpi_bytes_received : 0;
}

}  // namespace

PeerListener::PeerListener(const PeerListenerOptions& options, Accepted accepted)
    : options_(options), accepted_(std::move(accepted)) {}

base::Result<std::unique_ptr<PeerListener>> PeerListener::create(const PeerListenerOptions& options,
                                                                 Accepted accepted) {
  std::unique_ptr<PeerListener> listener(new PeerListener(options, std::move(accepted)));
  listener->stop_.reset(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!listener->stop_.valid()) {
    return base::errno_status("eventfd");
  }
  EXPERTD_RETURN_IF_ERROR(listener->bind_and_listen());
  try {
    listener->thread_ = std::thread([raw = listener.get()] { raw->run(); });
    pthread_setname_np(listener->thread_.native_handle(), "peer-accept");
  } catch (const std::exception& error) {
    return base::Status(EXPERTD_REASON_SYSTEM, std::string("starting the accept thread: ") + error.what());
  }
  return listener;
}

PeerListener::~PeerListener() {
  if (thread_.joinable()) {
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t written = write(stop_.get(), &one, sizeof(one));
    thread_.join();
  }
}

base::Status PeerListener::bind_and_listen() {
  const base::Result<SocketAddress> address = parse_literal(options_.address);
  if (!address.is_ok()) {
    return address.status().with_context("fabric.listen");
  }
  const SocketAddress& at = address.value();
  socket_.reset(socket(at.family(), SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!socket_.valid()) {
    return base::errno_status("socket");
  }
  // Only that a port whose connections are still winding down can be taken again; two listeners are refused anyway.
  const int on = 1;
  (void)setsockopt(socket_.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
  if (bind(socket_.get(), at.raw(), at.size()) != 0 || listen(socket_.get(), kBacklog) != 0) {
    const std::string where = "fabric.listen: " + options_.address + ": ";
    switch (errno) {
      case EADDRINUSE:
        return base::Status(EXPERTD_REASON_ADDRESS_IN_USE,
                            where + "another process listens there, or no port is free; is expertd running already?");
      case EADDRNOTAVAIL:
        return base::Status(EXPERTD_REASON_CONFIG_BAD_VALUE, where + "is no address of this machine");
      case EACCES:
        return base::Status(EXPERTD_REASON_PERMISSION, where + "this port needs a privilege; choose one above 1023");
      default:
        return base::errno_status("listening on " + options_.address);
    }
  }
  sockaddr_storage own{};
  socklen_t size = sizeof(own);
  if (getsockname(socket_.get(), reinterpret_cast<sockaddr*>(&own), &size) != 0) {
    return base::errno_status("getsockname");
  }
  port_ = SocketAddress(own, size).port();
  return base::Status::ok();
}

int PeerListener::wait_ms(uint64_t now_ns) const {
  uint64_t next = pause_until_ns_ > now_ns ? pause_until_ns_ : UINT64_MAX;
  for (const Connection& connection : connections_) {
    next = connection.spoke ? next : std::min(next, connection.first_bytes_deadline_ns);
  }
  return next == UINT64_MAX ? -1 : static_cast<int>((std::max(next, now_ns) - now_ns) / 1'000'000 + 1);
}

void PeerListener::run() {
  std::vector<pollfd> polled;
  std::vector<short> events;
  while (true) {
    const uint64_t now = base::now_ns();
    polled.clear();
    polled.push_back({stop_.get(), POLLIN, 0});
    polled.push_back({pause_until_ns_ > now ? -1 : socket_.get(), POLLIN, 0});
    for (const Connection& connection : connections_) {
      polled.push_back({connection.fd.get(), POLLRDHUP, 0});
    }
    const int ready = poll(polled.data(), polled.size(), wait_ms(now));
    if (ready < 0 && errno != EINTR) {
      base::log_error("fabric.listen: peers cannot connect any more", {{"error", std::strerror(errno)}});
      return;
    }
    if (ready > 0 && polled[0].revents != 0) {
      return;
    }
    events.clear();
    for (size_t i = 2; i < polled.size(); ++i) {
      events.push_back(ready > 0 ? polled[i].revents : short{0});
    }
    drop_ended(events);
    end_silent(base::now_ns());
    if (ready > 0 && polled[1].revents != 0) {
      accept_one();
    }
  }
}

void PeerListener::drop_ended(const std::vector<short>& events) {
  size_t kept = 0;
  for (size_t i = 0; i < events.size(); ++i) {
    if (events[i] == 0) {
      if (kept != i) {
        connections_[kept] = std::move(connections_[i]);
      }
      ++kept;
    }
  }
  connections_.resize(kept);
}

void PeerListener::end_silent(uint64_t now_ns) {
  for (Connection& connection : connections_) {
    if (connection.spoke || connection.first_bytes_deadline_ns > now_ns) {
      continue;
    }
    connection.spoke = bytes_received(connection.fd.get()) >= kPrefaceBytes;
    if (!connection.spoke) {
      shutdown(connection.fd.get(), SHUT_RDWR);  // its owner sees the end, and the next poll drops it
      connection.first_bytes_deadline_ns = UINT64_MAX;
    }
  }
}

/// True when there is room for one more connection.
bool PeerListener::make_way() {
  if (connections_.size() < options_.connections_max) {
    return true;
  }
  const auto silent = std::ranges::find_if(connections_, [](Connection& connection) {
    connection.spoke = connection.spoke || bytes_received(connection.fd.get()) >= kPrefaceBytes;
    return !connection.spoke;
  });
  if (silent == connections_.end()) {
    return false;
  }
  shutdown(silent->fd.get(), SHUT_RDWR);
  connections_.erase(silent);
  return true;
}

void PeerListener::accept_one() {
  base::ScopedFd fd(accept4(socket_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
  if (!fd.valid()) {
    if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
      pause_until_ns_ = base::now_ns() + kAcceptPauseNs;
      base::log_warn("fabric.listen: no descriptor is free for a peer", {{"error", std::strerror(errno)}});
    }
    return;
  }
  if (!make_way()) {
    base::log_warn("fabric.listen: too many connections, one is closed", {{"connections", connections_.size()}});
    return;
  }
  const int on = 1;
  (void)setsockopt(fd.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  (void)setsockopt(fd.get(), IPPROTO_TCP, TCP_USER_TIMEOUT, &kUserTimeoutMs, sizeof(kUserTimeoutMs));
  base::ScopedFd watch(fcntl(fd.get(), F_DUPFD_CLOEXEC, 0));
  if (!watch.valid()) {
    pause_until_ns_ = base::now_ns() + kAcceptPauseNs;
    return;
  }
  connections_.push_back({std::move(watch), base::now_ns() + options_.first_bytes_ns, false});
  accepted_(std::move(fd));
}

}  // namespace expertd::fabric
