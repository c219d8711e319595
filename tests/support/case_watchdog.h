// SPDX-License-Identifier: Apache-2.0
// Keeps a test case that starts processes from hanging: when its time is over, says what was waited for and kills the
// children, so that every wait for them ends and the case fails by itself; when even that does not help, ends the
// process. One per case, owned by it; the thread is its own. Tests only.
#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>

namespace expertd::support {

class CaseWatchdog {
 public:
  CaseWatchdog(std::string name, std::chrono::milliseconds limit);
  ~CaseWatchdog();
  CaseWatchdog(const CaseWatchdog&) = delete;
  CaseWatchdog& operator=(const CaseWatchdog&) = delete;

 private:
  void thread_main();

  const std::string name_;
  const std::chrono::milliseconds limit_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool over_ = false;  // under mutex_
  std::thread thread_;
};

}  // namespace expertd::support
