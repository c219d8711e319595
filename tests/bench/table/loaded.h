// SPDX-License-Identifier: Apache-2.0
// A busy client for the time of a row. On a rank's thread, as the load is.
#pragma once

#include <chrono>
#include <exception>
#include <utility>

#include "tests/bench/bench_daemon.h"
#include "tests/bench/table/gemm_load.h"

namespace expertd::bench {

inline constexpr std::chrono::milliseconds kLoadAlone{40};

/// A load that runs for a scope.
class Loaded {
 public:
  explicit Loaded(GemmLoad* load) : load_(load) {
    if (load_ != nullptr) {
      load_->start();
      load_->set_phase(LoadPhase::kAlone);
      idle_for(kLoadAlone);
      load_->set_phase(LoadPhase::kOther);
    }
  }
  ~Loaded() {
    try {
      stop();
    } catch (const std::exception&) {
      // Another failure is on its way and was there first.
    }
  }
  Loaded(const Loaded&) = delete;
  Loaded& operator=(const Loaded&) = delete;

  void set_phase(LoadPhase phase) {
    if (load_ != nullptr) {
      load_->set_phase(phase);
    }
  }
  void stop() {
    if (GemmLoad* const load = std::exchange(load_, nullptr); load != nullptr) {
      load->stop();
    }
  }

 private:
  GemmLoad* load_;
};

}  // namespace expertd::bench
