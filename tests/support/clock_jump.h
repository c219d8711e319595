// SPDX-License-Identifier: Apache-2.0
// Sets the wall clock of processes that a test starts, and theirs alone, while they run: a library (clock_jump.cc) that
// is loaded before theirs adds what a file says to every reading of the wall clock. CLOCK_MONOTONIC stays as it is, as
// it does when an operator or NTP sets the clock. One thread; tests only.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "tests/support/temp_dir.h"

namespace expertd::support {

class ClockJump {
 public:
  ClockJump();
  ~ClockJump();
  ClockJump(const ClockJump&) = delete;
  ClockJump& operator=(const ClockJump&) = delete;

  /// Why it cannot be done here, empty when it can.
  std::string problem() const;
  /// Of processes whose clock is to be set.
  std::vector<std::string> environment() const;
  /// So far from the real time from now on, forwards or (negative) backwards.
  void set(int64_t seconds);

 private:
  TempDir directory_;
  void* page_ = nullptr;
};

}  // namespace expertd::support
