// SPDX-License-Identifier: Apache-2.0
// A row of the performance table, the document of all rows, and both as text. Pure functions and values, any thread.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "tests/bench/table/table_cases.h"

namespace expertd::bench {

/// Times of the slowest rank, one per iteration, in microseconds.
using Times = std::vector<double>;

/// Nearest rank; 0 when there are no times.
double quantile_of(Times times, double quantile);
/// Of each iteration the slowest rank; iterations that a rank lacks are left out.
Times slowest_of(const std::vector<Times>& ranks);

struct TableRow {
  TableCase it;
  std::string asked_executor;  // of the group
  uint32_t link_sms = 0;       // device.link_sms of the daemon
  std::string executor;        // as the operations' results say; empty: there are none
  uint32_t sms = 0;            // that the largest kernel takes, the most of any rank and iteration
  bool mps = false;
  bool busy = false;
  std::string clock;  // what the times are from; empty: there are none
  Times times_us;
  Times switch_us;      // the same between events, with a switch of contexts before and after; empty: not measured
  Times local_wait_us;  // what the clock's kernels take for nothing, which is in the times; empty: it has none
  double clock_offset_us = 0;                        // of words of memory, taken off; 0: not measured
  Times floor_copy_engine_us, floor_sm_us, nccl_us;  // empty: not measured
  /// The same with a token once per rank, where the operation's rows are one per expert.
  Times floor_least_copy_engine_us, floor_least_sm_us;
  double logical_bytes = 0;  // per rank, mean of the ranks
  double link_bytes = 0;
  double compute_us = 0;  // of a layer, its GEMMs alone; 0: not measured
  double queued_us = 0;   // per operation back to back; 0: not measured
  double replay_us = 0;   // of a captured row, per graph of many launched back to back; 0: not measured
  /// Of an overlap: one micro-batch, two one behind the other, the operations of one alone, and multiprocessors that
  /// its computation takes; 0: not measured.
  double single_us = 0, serial_us = 0, communication_us = 0;
  uint32_t compute_sms = 0;
  double set_up_s = 0, measure_s = 0, verify_s = 0;  // where the table's time went; verifying is in the second
  double client_slowdown = 0;                        // of a busy client's own work; 0: not measured
  double client_slowdown_marks = 0;                  // by what is timed around the operation alone
  double daemon_cpu_percent = 0;
  std::string device;
  bool verified = false;
  std::string error;  // empty: none

  /// p50 of the faster of both copies; 0: not measured.
  double floor_us() const;
  double floor_least_us() const;
};

nlohmann::json row_json(const TableRow& row);
/// What both documents say of one case is taken from `more`; the rest of the head stays that of `base`, and `mps` turns
/// into "both" where they differ. A document without an array of rows is refused with std::runtime_error.
nlohmann::json merged(nlohmann::json base, const nlohmann::json& more);
/// What a run of the table may leave out of it: verified rows of the same commit and device; null where there are none.
nlohmann::json resumable(const nlohmann::json& document, const std::string& commit, const std::string& device);
/// Whether the document has the row that this one is to become.
bool has_row(const nlohmann::json& document, const TableRow& row);
/// The rows of a document, a line each.
std::string table_text(const nlohmann::json& document);
/// Every row was right.
bool all_verified(const nlohmann::json& document);

}  // namespace expertd::bench
