// SPDX-License-Identifier: Apache-2.0
// Runs the rows: one thread per rank, each with its own session, all in one group per mode. Called on the main thread,
// which owns the results.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "client/ctl/bench_operation.h"
#include "client/ctl/bench_options.h"
#include "client/ctl/bench_routing.h"

namespace expertd::ctl {

struct BenchMeasured {
  std::string operation;
  std::string flags;
  std::string mode;  // "normal" or "inference"
  uint32_t tokens = 0;
  /// Of each iteration: the slowest rank, from submission to completion as the host sees it. Sorted.
  std::vector<uint64_t> times_ns;
  double logical_bytes = 0;  // per rank, mean of the ranks
  double link_bytes = 0;
  BenchExecution execution;  // of the ranks together
  uint64_t verified = 0;     // outputs: one rank's result of one operation

  /// Of the sorted times; quantile in 0..1.
  uint64_t time_ns(double quantile) const;
};

/// The group of one mode.
struct BenchGroup {
  std::string mode;          // "normal" or "inference"
  uint64_t join_ns = 0;      // of the slowest rank, from where all have met
  BenchCrossings crossings;  // of the inputs of all but the last iteration
};

struct BenchResult {
  std::vector<std::string> devices;  // per rank, as the daemon names them
  uint32_t nodes = 0;                // daemons, by their sockets
  std::vector<BenchGroup> groups;
  std::vector<BenchMeasured> rows;
  uint64_t verified = 0;
};

/// The rows of a mode, in the order in which they run.
std::vector<BenchRowSpec> rows_of_mode(const BenchOptions& options, bool low_latency);

/// Progress goes to stderr. Throws Failure: the first one of any rank.
BenchResult run_rows(const BenchOptions& options);

}  // namespace expertd::ctl
