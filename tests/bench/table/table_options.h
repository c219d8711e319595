// SPDX-License-Identifier: Apache-2.0
// What a run of the table is asked to do. Filled in by the main thread before any rank starts, read by all of them.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "tests/bench/table/table_cases.h"

namespace expertd::bench {

struct TableOptions {
  TableSelection selection;
  std::string runtime_directory;          // empty: an own daemon
  std::vector<int> gpus;                  // ordinals; empty: all
  std::vector<std::string> daemon_words;  // arguments of the own daemon
  uint32_t link_sms = 24;                 // as the daemon's own default
  std::string executor = "auto";          // of the operations
  bool idle = true;
  bool busy = true;
  bool nccl = true;
  uint32_t iterations = 200;
  uint32_t warmup = 5;
  std::chrono::microseconds arm{100};
  std::chrono::seconds time_max{165};
  std::string json_file, append_file;
  bool json = false;
  bool list = false;
  uint64_t seed = 1;
};

/// Empty when the program is to end with `exit_code` at once, as after --help.
std::optional<TableOptions> parse_table_options(int argc, char** argv, int* exit_code);

}  // namespace expertd::bench
