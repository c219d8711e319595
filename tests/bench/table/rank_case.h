// SPDX-License-Identifier: Apache-2.0
// One rank's measurement of one case: the operation and what it is compared with, in turns. Made and used on the rank's
// thread; all ranks do the same together. Failures are thrown.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "client/ctl/bench_operation.h"
#include "client/ctl/bench_rendezvous.h"
#include "tests/bench/link_copy.h"
#include "tests/bench/table/device_probe.h"
#include "tests/bench/table/exchange.h"
#include "tests/bench/table/gemm_load.h"
#include "tests/bench/table/layer.h"
#include "tests/bench/table/overlap.h"
#include "tests/bench/table/replay.h"
#include "tests/bench/table/stream_timer.h"
#include "tests/bench/table/table_options.h"
#include "tests/bench/table/table_row.h"

namespace expertd::bench {

/// What stays open on a GPU from case to case. Used by one rank's thread at a time.
struct RankTools {
  int device = 0;
  uint32_t multiprocessors = 0;
  std::unique_ptr<StreamTimer> timer;
  std::unique_ptr<DeviceProbe> probe;
  std::unique_ptr<GemmLoad> load;  // null: no client is busy
};

/// What the ranks of a group share. Written before their threads start, apart from `link_bytes`, which each rank writes
/// for itself between two meetings.
struct RankGroup {
  const TableOptions& options;
  const ctl::BenchOptions& bench;
  ctl::BenchRendezvous* meeting;
  const Nccl* nccl;  // null: not there
  pid_t daemon;
  std::vector<uint64_t> link_bytes;
  const std::vector<std::unique_ptr<RankTools>>& tools;
  /// Whether floors and NCCL of a case were measured before: another one moves the same bytes.
  std::function<bool(const TableCase&)> has_floors;
};

/// What a rank found of a case with one kind of client.
struct RankFigures {
  TimerClock clock = TimerClock::kEvents;  // of the operation and of those back to back
  Times times_us, nccl_us, queued_us, replay_us, compute_us;
  Times switch_us;        // the operation between events, where two contexts take turns for it
  Times clock_offset_us;  // what the words of memory take for nothing, taken off the operation's times already
  Times local_wait_us;    // what the kernels of the clock take for nothing
  Times floor_copy_engine_us, floor_sm_us, floor_least_copy_engine_us, floor_least_sm_us;
  ctl::BenchBytes bytes;
  ctl::BenchExecution execution;  // of the operation that the row is of; of a pair and a layer, of their combine
  double client_slowdown = 0;
  double client_slowdown_marks = 0;  // by what is timed around the operation
  double daemon_cpu_ns = 0;          // of the leading rank alone
  double wall_ns = 0;
  Times single_us, serial_us, communication_us;  // of an overlap
  uint32_t compute_sms = 0;
  double set_up_s = 0;  // where the table's time goes
  double measure_s = 0;
  double verify_s = 0;  // of `measure_s`
};

class RankCase {
 public:
  /// Makes the operation and everything it is compared with, and runs each once.
  RankCase(RankGroup* group, ctl::BenchRank* rank, const TableCase& it);
  RankCase(const RankCase&) = delete;
  RankCase& operator=(const RankCase&) = delete;

  void measure(bool busy, RankFigures* figures);

 private:
  /// Something timed besides the operation.
  struct Contender {
    Times RankFigures::*times;
    std::function<void()> enqueue;
    std::function<void()> after;  // may be empty
    double per_timing = 1;        // of it in one timing
    Start start = Start::kAtTheGate;
    TimerClock clock = TimerClock::kEvents;
    uint32_t turns = 0;  // in a row; 0: as many as all others
    bool idle_only = false;
  };

  RankTools& tools() const { return *group_->tools[rank_->index()]; }
  bool leads() const { return rank_->index() == 0; }
  std::unique_ptr<ctl::BenchOperation> make();
  std::unique_ptr<ctl::BenchOperation> make_eager();
  expertd_op_result_t wait(expertd_event_t event) const;
  void warm_up();
  uint64_t agreed(uint64_t bytes);
  void add_floors();
  void add_floor(uint64_t bytes, Times RankFigures::*copy_engine, Times RankFigures::*kernel);
  void add_nccl();
  void add_queue();
  void add_replays();
  void add_compute();
  void add_switch();
  void add_overlap();
  uint32_t iterations(bool busy) const;
  bool is_enough(bool busy, uint32_t done, uint64_t begin_ns);
  void renew_inputs();
  void add_clock();
  Timing timing(TimerClock clock, Start start, double per_timing);
  double time_us(const Timing& timing, const std::function<void()>& enqueue);
  void take_off_offset(RankFigures* figures) const;
  void iterate(bool busy, RankFigures* figures);
  void time_operation(RankFigures* figures, bool verified);
  void time_contenders(bool busy, RankFigures* figures);

  RankGroup* const group_;
  ctl::BenchRank* const rank_;
  const TableCase it_;
  /// A layer with GEMMs of many sizes has too many kernels for a parked stream.
  const Start start_;
  const TimerClock clock_;
  std::unique_ptr<Cublas> cublas_;
  LayerOperation* layer_ = nullptr;      // the operation where it is one
  OverlapOperation* overlap_ = nullptr;  // likewise
  ReplayOperation* replay_ = nullptr;    // where the case is captured
  std::unique_ptr<ctl::BenchOperation> operation_;
  /// A small one, with which the daemon's context takes the GPU before the gate opens; null: the clock needs none.
  std::unique_ptr<ctl::BenchOperation> untimed_;
  expertd_event_t untimed_event_{};
  uint32_t inputs_ = 0;  // iteration whose inputs are in place
  bool measured_ = false;
  std::vector<std::unique_ptr<LinkCopy>> links_;
  std::vector<std::unique_ptr<Exchange>> exchanges_;
  std::vector<expertd_event_t> queued_;
  expertd_event_t switched_{};
  std::vector<Contender> contenders_;
};

}  // namespace expertd::bench
