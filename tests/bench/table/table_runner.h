// SPDX-License-Identifier: Apache-2.0
// Runs the cases: one thread per rank, each with a session of its own, all in one group per shape. A case that fails is
// a row that says so, and what comes behind it begins with new sessions. Main thread.
#pragma once

#include <sys/types.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "tests/bench/table/rank_case.h"

namespace expertd::bench {

struct DaemonPlace {
  std::string attach_socket;
  pid_t pid = 0;
};

class TableRunner {
 public:
  /// A daemon in the place of one beside which a case failed, so that the next case does not suffer from that.
  using Renew = std::function<DaemonPlace()>;

  /// `gpus` are ordinals of this process, one rank each. Throws when a GPU cannot be used. `renew` may be empty.
  TableRunner(const TableOptions& options, std::vector<int> gpus, DaemonPlace daemon, Renew renew);

  /// Told of the rows so far after each of them, by the thread of a rank while the others wait.
  using Progress = std::function<void(const std::vector<TableRow>&)>;
  /// Whether a row, which has no results yet, is there already.
  using Known = std::function<bool(const TableRow&)>;
  /// Two rows for a case where both kinds of client are asked for, but for those that are known. Each is told on
  /// stderr, with an estimate of what the others take.
  std::vector<TableRow> run(const std::vector<TableCase>& cases, const Known& known, const Progress& progress);

  /// The daemon runs under MPS, as CUDA says and then the last session was told.
  bool mps() const { return mps_; }
  size_t ranks() const { return gpus_.size(); }
  const std::string& device_name() const { return device_name_; }
  /// Smallest step of the GPUs' timers, the largest of them.
  uint64_t gpu_timer_step_ns() const;
  /// "cuBLAS" or "kernel"; "none" when no client is busy.
  std::string load_kind() const;
  /// Version, or why it is not there.
  const std::string& nccl() const { return nccl_text_; }

 private:
  class Batch;
  using Clock = std::chrono::steady_clock;

  void open_tools();
  void open_nccl();
  /// False, told on stderr, when there is none.
  bool renew_daemon();
  std::vector<bool> clients(const TableCase& it) const;
  /// Of those of the case, the ones whose row is to be had.
  std::vector<bool> wanted(const TableCase& it) const;
  void add(const TableRow& row);
  bool is_over() const { return table_stopped.load(std::memory_order_relaxed) || Clock::now() > end_; }
  bool has_floors(const TableCase& it) const;
  /// Floors and NCCL of a row that has none, from one that moves the same bytes; or keeps them for others.
  void share_floors(TableRow* row);
  TableRow new_row(const TableCase& it, bool busy) const;

  const TableOptions& options_;
  const std::vector<int> gpus_;
  DaemonPlace daemon_;
  const Renew renew_;
  const Clock::time_point end_;
  std::string device_name_;
  std::string nccl_text_;
  bool mps_ = false;
  Known known_;
  Progress progress_;
  std::vector<TableRow> rows_;
  size_t planned_rows_ = 0;
  Clock::time_point begin_;
  std::map<std::string, TableRow> floors_;  // by what moves the same bytes beside the same client
  std::unique_ptr<Gate> gate_;
  std::vector<std::unique_ptr<RankTools>> tools_;
  std::unique_ptr<Nccl> nccl_;
};

}  // namespace expertd::bench
