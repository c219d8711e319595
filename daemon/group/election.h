// SPDX-License-Identifier: Apache-2.0
// The thread that keeps a Candidacy: it renews and looks in time, waits at the store for changes in between, and tells
// what came of it. One object per daemon; created and ended by the composition root.
#pragma once

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>

#include "daemon/group/candidacy.h"

namespace expertd::group {

class Election {
 public:
  /// Called by the election's thread with every look at the store, also when it fails.
  using Told = std::function<void(const Elected&)>;

  Election(const CandidacyOptions& options, std::unique_ptr<ElectionStore> store);
  /// Ends it if stop() has not.
  ~Election();
  Election(const Election&) = delete;
  Election& operator=(const Election&) = delete;

  /// SYSTEM when there is no thread.
  base::Status start(Told told);
  /// Tells once more, that this daemon hosts no longer, and gives its lease back. Waits for at most one call.
  void stop();

  /// Any thread.
  Elected elected() const;

 private:
  void run();
  void publish(const Elected& now);
  void rest(uint64_t idle_ns);

  const std::string where_;  // names key and store in the log
  const std::unique_ptr<ElectionStore> store_;
  Candidacy candidacy_;   // of the thread
  Told told_;             // of the thread
  bool hosting_ = false;  // of the thread: what was logged last
  std::minstd_rand random_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;  // with mutex_
  Elected elected_;                  // under mutex_
  bool stopping_ = false;            // under mutex_
  std::thread thread_;
};

}  // namespace expertd::group
