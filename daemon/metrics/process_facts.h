// SPDX-License-Identifier: Apache-2.0
// What /proc says about this process, read anew at each call. Any thread; keeps nothing. What cannot be read is zero.
#pragma once

#include <cstdint>

namespace expertd::metrics {

struct ProcessFacts {
  double cpu_seconds = 0;
  double start_time_seconds = 0;  // since 1970
  uint64_t resident_bytes = 0;
  uint64_t virtual_bytes = 0;
  uint64_t open_fds = 0;
  uint64_t max_fds = 0;
};

ProcessFacts read_process_facts();

}  // namespace expertd::metrics
