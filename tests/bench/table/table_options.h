// SPDX-License-Identifier: Apache-2.0
// What a run of the table is asked to do. Filled in by the main thread before any rank starts, read by all of them.
#pragma once

#include <atomic>
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
  std::chrono::seconds time_max{500};
  double row_seconds = 4;  // of a row's measuring, beyond which it ends with what it has, if that is enough
  std::string json_file, append_file, resume_file;
  bool json = false;
  bool list = false;
  uint64_t seed = 1;
};

/// Set by a signal: the row that runs is the last one.
inline std::atomic<bool> table_stopped{false};

/// Empty when the program is to end with `exit_code` at once, as after --help.
std::optional<TableOptions> parse_table_options(int argc, char** argv, int* exit_code);

}  // namespace expertd::bench
