// SPDX-License-Identifier: Apache-2.0
// Signals as events. `main` calls block_signals() before any thread exists, so that every thread
// inherits the mask, and later waits on a Signals; nothing runs in a signal handler. Owned and
// called by the supervising thread.
#pragma once

#include <cstdint>
#include <utility>

#include "daemon/base/fd.h"
#include "daemon/base/status.h"

namespace expertd::supervise {

enum class SignalEvent {
  kNone,     // the timeout passed
  kDrain,    // the first SIGTERM or SIGINT
  kStopNow,  // every further one
  kReload,   // SIGHUP
};

/// Blocks SIGTERM, SIGINT and SIGHUP in this thread and those it starts, and ignores SIGPIPE.
base::Status block_signals();

class Signals {
 public:
  /// After block_signals().
  static base::Result<Signals> create();

  /// The next event, or kNone after `timeout_ns`. An interrupted wait may end early as kNone.
  base::Result<SignalEvent> wait(uint64_t timeout_ns);
  /// Readable when an event waits; for a loop of one's own.
  int fd() const { return fd_.get(); }

 private:
  explicit Signals(base::ScopedFd fd) : fd_(std::move(fd)) {}

  base::ScopedFd fd_;
  bool stopping_ = false;
};

}  // namespace expertd::supervise
