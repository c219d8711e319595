// SPDX-License-Identifier: Apache-2.0
#include "tests/support/case_watchdog.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>
#include <utility>

#include "tests/support/child_process.h"

namespace expertd::support {
namespace {

// For waits to end once nobody is left to answer; a process in a driver's call may take a while to die.
constexpr std::chrono::seconds kUnwindLimit(45);
constexpr int kExitStuck = 3;

}  // namespace

CaseWatchdog::CaseWatchdog(std::string name, std::chrono::milliseconds limit)
    : name_(std::move(name)), limit_(limit), thread_([this] { thread_main(); }) {
  allow_children();
}

CaseWatchdog::~CaseWatchdog() {
  {
    const std::lock_guard lock(mutex_);
    over_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void CaseWatchdog::thread_main() {
  std::unique_lock lock(mutex_);
  if (changed_.wait_for(lock, limit_, [this] { return over_; })) {
    return;
  }
  ADD_FAILURE() << name_ << " was not done after " << limit_.count() << " ms; it waited for " << noted_wait()
                << ". Its processes are killed";
  std::fflush(stdout);
  kill_children(true);
  if (!changed_.wait_for(lock, kUnwindLimit, [this] { return over_; })) {
    std::fprintf(stderr, "%s: stuck, now waiting for %s; giving up\n", name_.c_str(), noted_wait().c_str());
    kill_children(true);
    ::_exit(kExitStuck);
  }
}

}  // namespace expertd::support
