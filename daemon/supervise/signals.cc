// SPDX-License-Identifier: Apache-2.0
#include "daemon/supervise/signals.h"

#include <poll.h>
#include <signal.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

namespace expertd::supervise {

namespace {

constexpr uint64_t kMaxWaitNs = 3'600'000'000'000;

sigset_t watched_signals() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGTERM);
  sigaddset(&set, SIGINT);
  sigaddset(&set, SIGHUP);
  return set;
}

}  // namespace

base::Status block_signals() {
  const sigset_t set = watched_signals();
  const int error = pthread_sigmask(SIG_BLOCK, &set, nullptr);
  if (error != 0) {
    return base::Status(EXPERTD_REASON_SYSTEM, std::string("pthread_sigmask: ") + std::strerror(error));
  }
  if (::signal(SIGPIPE, SIG_IGN) == SIG_ERR) {
    return base::errno_status("ignoring SIGPIPE");
  }
  return base::Status::ok();
}

base::Result<Signals> Signals::create() {
  const sigset_t set = watched_signals();
  base::ScopedFd fd(::signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK));
  if (!fd.valid()) {
    return base::errno_status("signalfd");
  }
  return Signals(std::move(fd));
}

base::Result<SignalEvent> Signals::wait(uint64_t timeout_ns) {
  const uint64_t wait_ns = std::min(timeout_ns, kMaxWaitNs);
  const timespec timeout{.tv_sec = static_cast<time_t>(wait_ns / 1'000'000'000),
                         .tv_nsec = static_cast<long>(wait_ns % 1'000'000'000)};
  pollfd entry{.fd = fd_.get(), .events = POLLIN, .revents = 0};
  if (::ppoll(&entry, 1, &timeout, nullptr) < 0 && errno != EINTR) {
    return base::errno_status("ppoll on the signals");
  }
  signalfd_siginfo info{};
  const ssize_t bytes = ::read(fd_.get(), &info, sizeof(info));
  if (bytes < 0) {
    return errno == EAGAIN || errno == EINTR ? base::Result<SignalEvent>(SignalEvent::kNone)
                                             : base::errno_status("read of the signals");
  }
  if (info.ssi_signo == SIGHUP) {
    return SignalEvent::kReload;
  }
  return std::exchange(stopping_, true) ? SignalEvent::kStopNow : SignalEvent::kDrain;
}

}  // namespace expertd::supervise
