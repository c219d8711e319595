// SPDX-License-Identifier: Apache-2.0
// A join that waits for others while the test does something else. Tests only.
#pragma once

#include <chrono>
#include <thread>

#include "tests/support/rank_threads.h"
#include "tests/support/temp_dir.h"

namespace expertd::support {

/// Starts a join on its own thread; its outcome is there after the daemon has decided. When a probe of the test came
/// first and is what the daemon waits with, this one tries again until it is the first.
class PendingJoin {
 public:
  PendingJoin(const ClientSession& session, const expertd_group_options_t& options)
      : thread_([this, &session, options] {
          static_cast<void>(wait_until(
              [&] {
                outcome_ = outcome_of(expertd_group_join(session.get(), &options, &group_));
                const int32_t reason = outcome_.status.reason;
                return reason != EXPERTD_REASON_CONFIG_MISMATCH && reason != EXPERTD_REASON_DUPLICATE_RANK &&
                       reason != EXPERTD_REASON_DEVICE_TAKEN;
              },
              std::chrono::seconds(5)));
        }) {}
  ~PendingJoin() { static_cast<void>(outcome()); }
  const Outcome& outcome() {
    if (thread_.joinable()) {
      thread_.join();
    }
    return outcome_;
  }
  expertd_group_t* group() const { return group_; }

 private:
  expertd_group_t* group_ = nullptr;
  Outcome outcome_;
  std::thread thread_;
};

}  // namespace expertd::support
