// SPDX-License-Identifier: Apache-2.0
// expertctl. A verb is one line of the table; one that reads its own command line is wrapped in pass_through().
#include <unistd.h>

#include <cstdlib>
#include <iostream>

#include "client/ctl/bench.h"
#include "client/ctl/cli.h"
#include "client/ctl/plan.h"
#include "client/ctl/verbs.h"

int main(int argc, char** argv) {
  using namespace expertd::ctl;
  // Errors are told by expertctl itself.
  setenv("GRPC_VERBOSITY", "NONE", 0);
  const Verb verbs[] = {
      {"status", "Devices, groups and state of the daemon", add_status},
      {"health", "Whether the daemon answers, or is ready", add_health},
      {"sessions", "Attached clients, with their memory and latencies", add_sessions},
      {"peers", "Daemons of other nodes, and what went to and from them", add_peers},
      {"slowest", "Which rank or node the last operations of groups waited for", add_slowest},
      {"mesh", "Measure latency and bandwidth between all pairs of nodes", add_mesh},
      {"top", "Rates per device and operation, refreshed", add_top},
      {"drain", "Stop taking sessions, let operations end, then end the daemon", add_drain},
      {"log-level", "Change what the daemon logs, until its restart", add_log_level},
      {"doctor", "Check this node; works without the daemon", add_doctor},
      {"plan", "Predict times and efficiency over many nodes from figures of links; works without the daemon",
       add_plan},
      {"bench", "Run, time and verify every operation through the daemon", pass_through(run_bench)},
  };
  return run_cli({argc, argv, std::cout, std::cerr, isatty(STDOUT_FILENO) == 1}, verbs);
}
