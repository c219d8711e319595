// SPDX-License-Identifier: Apache-2.0
#include "tests/bench/table/table_runner.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <iostream>
#include <mutex>

#include "tests/bench/bench_figures.h"
#include "tests/bench/cuda_check.h"

namespace expertd::bench {

namespace {

/// Of attaching, joining and each operation; a case that hangs costs the table no more.
constexpr uint64_t kTimeoutNs = 20'000'000'000;
constexpr uint32_t kFailuresInARow = 3;
/// Of a group whose operations are captured: as many as a client with double batches has.
constexpr uint32_t kCaptureLanes = 2;
const char* const kTimeOver = "not run: the time for the table is over";

}  // namespace

/// Cases of one group, from the join to the leave or the first failure.
class TableRunner::Batch {
 public:
  Batch(TableRunner* runner, std::vector<TableCase> cases, uint32_t number);

  /// The rows of cases that are done with: those that ran, and the one that failed. Sets `done` to their number.
  std::vector<TableRow> run(size_t* done);
  bool failed() const { return !failure_.empty(); }

 private:
  void rank_thread(uint32_t index);
  void rank_work(uint32_t index);
  void fail(const std::string& text);
  void tell(const TableRow& row) const;
  TableRow finished_row(const TableCase& it, size_t client, const std::vector<RankFigures>& ranks) const;

  TableRunner* const runner_;
  const std::vector<TableCase> cases_;
  const std::vector<bool> clients_;
  const uint32_t ranks_;
  const std::string name_;
  ctl::BenchOptions bench_;
  ctl::BenchRendezvous meeting_;
  RankGroup group_;
  std::vector<std::vector<std::vector<RankFigures>>> figures_;  // [case][client][rank], each written by its rank
  std::vector<std::vector<std::atomic<uint32_t>>> finished_;    // [case][client] ranks
  bool time_is_over_ = false;                                   // written by rank 0 between two meetings
  std::mutex mutex_;
  std::string failure_;  // under mutex_ while threads run: the first
};

TableRunner::Batch::Batch(TableRunner* runner, std::vector<TableCase> cases, uint32_t number)
    : runner_(runner),
      cases_(std::move(cases)),
      clients_(runner->clients(cases_.front())),
      ranks_(cases_.front().shape.ranks),
      name_("table-" + std::to_string(getpid()) + "-" + std::to_string(number)),
      meeting_(ranks_),
      group_{runner->options_,    bench_,
             &meeting_,           runner->nccl_.get(),
             runner->daemon_.pid, std::vector<uint64_t>(ranks_, 0),
             runner->tools_},
      figures_(cases_.size(),
               std::vector<std::vector<RankFigures>>(clients_.size(), std::vector<RankFigures>(ranks_))) {
  bench_.socket = runner->daemon_.attach_socket;
  for (uint32_t rank = 0; rank < ranks_; ++rank) {
    bench_.devices.push_back("cuda:" + std::to_string(runner->gpus_[rank]));
  }
  bench_.iterations = runner->options_.iterations;
  bench_.seed = runner->options_.seed;
  bench_.timeout_ns = kTimeoutNs;
  const std::string& executor = runner->options_.executor;
  const bool captured = cases_.front().captured;
  bench_.capture_lanes = captured ? kCaptureLanes : 0;
  // A captured combine is by the daemon's kernels in any group, and takes the routing of a dispatch by the same.
  bench_.executor = captured || executor == "sm" ? EXPERTD_GROUP_EXECUTOR_SM
                    : executor == "copy_engine"  ? EXPERTD_GROUP_EXECUTOR_COPY_ENGINE
                                                 : EXPERTD_GROUP_EXECUTOR_AUTO;
  for (size_t i = 0; i < cases_.size(); ++i) {
    finished_.emplace_back(clients_.size());
  }
}

void TableRunner::Batch::fail(const std::string& text) {
  const std::lock_guard lock(mutex_);
  failure_ = failure_.empty() ? text : failure_;
  meeting_.abort();
  // A rank may have parked its stream, and its session cannot end before the stream goes on.
  runner_->gate_->open_all();
}

void TableRunner::Batch::rank_thread(uint32_t index) {
  try {
    rank_work(index);
  } catch (const ctl::BenchAborted&) {
    // Another rank failed and has said why.
  } catch (const std::exception& error) {
    fail(error.what());
  }
}

void TableRunner::Batch::rank_work(uint32_t index) {
  RankTools& tools = *runner_->tools_[index];
  check_cuda(cudaSetDevice(tools.device), "cudaSetDevice");
  ctl::BenchRank rank(bench_, index);
  cudaStream_t const stream = tools.timer->stream();
  rank.set_stream(stream);
  rank.set_filler([stream](void* data, uint8_t value, uint64_t bytes) {
    check_cuda(cudaMemsetAsync(data, value, bytes, stream), "cudaMemsetAsync");
    check_cuda(cudaStreamSynchronize(stream), "cudaMemsetAsync");
  });
  rank.set_probe([&tools, stream](const void* data, uint8_t value, uint64_t bytes) {
    return tools.probe->holds_only(data, value, bytes, stream);
  });
  if (index == 0) {
    auto info = EXPERTD_INIT(expertd_session_info_t);
    rank.check(expertd_session_info(rank.session(), &info), "session information");
    runner_->mps_ = info.mps_active != 0;
  }
  rank.join(name_, cases_.front().shape, cases_.front().low_latency);
  tools.timer->begin(&meeting_, index == 0);
  std::vector<std::unique_ptr<RankCase>> kept;  // captured operations keep their memory in use until the leave
  for (size_t i = 0; i < cases_.size(); ++i) {
    if (index == 0) {
      time_is_over_ = Clock::now() > runner_->end_;
    }
    meeting_.meet();
    if (time_is_over_) {
      break;
    }
    const uint64_t begin_ns = now_ns();
    auto it = std::make_unique<RankCase>(&group_, &rank, cases_[i]);
    figures_[i].front()[index].set_up_s = static_cast<double>(now_ns() - begin_ns) * 1e-9;
    for (size_t client = 0; client < clients_.size(); ++client) {
      it->measure(clients_[client], &figures_[i][client][index]);
      finished_[i][client].fetch_add(1);
    }
    if (cases_[i].captured) {
      kept.push_back(std::move(it));
    }
  }
  meeting_.meet();
  rank.leave();
}

TableRow TableRunner::Batch::finished_row(const TableCase& it, size_t client,
                                          const std::vector<RankFigures>& ranks) const {
  TableRow row = runner_->new_row(it, clients_[client]);
  const auto slowest = [&](Times RankFigures::*times) {
    std::vector<Times> all;
    for (const RankFigures& rank : ranks) {
      all.push_back(rank.*times);
    }
    return slowest_of(all);
  };
  row.clock = name_of(ranks.front().clock);
  row.times_us = slowest(&RankFigures::times_us);
  row.switch_us = slowest(&RankFigures::switch_us);
  row.local_wait_us = slowest(&RankFigures::local_wait_us);
  row.floor_copy_engine_us = slowest(&RankFigures::floor_copy_engine_us);
  row.floor_sm_us = slowest(&RankFigures::floor_sm_us);
  row.floor_least_copy_engine_us = slowest(&RankFigures::floor_least_copy_engine_us);
  row.floor_least_sm_us = slowest(&RankFigures::floor_least_sm_us);
  row.nccl_us = slowest(&RankFigures::nccl_us);
  row.single_us = quantile_of(slowest(&RankFigures::single_us), 0.5);
  row.serial_us = quantile_of(slowest(&RankFigures::serial_us), 0.5);
  row.communication_us = quantile_of(slowest(&RankFigures::communication_us), 0.5);
  row.queued_us = quantile_of(slowest(&RankFigures::queued_us), 0.5);
  row.replay_us = quantile_of(slowest(&RankFigures::replay_us), 0.5);
  row.compute_us = quantile_of(slowest(&RankFigures::compute_us), 0.5);
  ctl::BenchExecution execution;
  for (const RankFigures& rank : ranks) {
    execution.add(rank.execution.executor, rank.execution.sms);
    row.logical_bytes += static_cast<double>(rank.bytes.logical) / static_cast<double>(ranks.size());
    row.link_bytes += static_cast<double>(rank.bytes.remote) / static_cast<double>(ranks.size());
    row.clock_offset_us = std::max(row.clock_offset_us, quantile_of(rank.clock_offset_us, 0.5));
    row.client_slowdown = std::max(row.client_slowdown, rank.client_slowdown);
  }
  row.executor = ctl::executor_name(execution.executor);
  row.sms = execution.sms;
  const RankFigures& leader = ranks.front();
  row.compute_sms = leader.compute_sms;
  row.set_up_s = leader.set_up_s;
  row.measure_s = leader.measure_s;
  row.verify_s = leader.verify_s;
  row.daemon_cpu_percent =
      leader.wall_ns == 0 ? 0 : 100 * leader.daemon_cpu_ns / leader.wall_ns / static_cast<double>(ranks.size());
  row.verified = true;  // a wrong output has ended the case
  return row;
}

void TableRunner::Batch::tell(const TableRow& row) const {
  const std::string client = row.busy ? ", client busy: " : ", client idle: ";
  std::cerr << row.it.name() + client +
                   (row.error.empty() ? fixed(quantile_of(row.times_us, 0.5), 1) + " us\n" : row.error + "\n");
}

std::vector<TableRow> TableRunner::Batch::run(size_t* done) {
  std::vector<std::thread> threads;
  for (uint32_t index = 0; index < ranks_; ++index) {
    threads.emplace_back(&Batch::rank_thread, this, index);
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  // The next batch's rounds are closed again.
  runner_->gate_->open_all();
  std::vector<TableRow> rows;
  *done = 0;
  for (size_t i = 0; i < cases_.size(); ++i) {
    bool whole = true;
    for (size_t client = 0; client < clients_.size(); ++client) {
      if (finished_[i][client] == ranks_) {
        rows.push_back(finished_row(cases_[i], client, figures_[i][client]));
      } else {
        rows.push_back(runner_->new_row(cases_[i], clients_[client]));
        rows.back().error = failed() ? failure_ : kTimeOver;
        whole = false;
      }
      tell(rows.back());
    }
    ++*done;
    if (!whole && failed()) {
      break;
    }
  }
  return rows;
}

TableRunner::TableRunner(const TableOptions& options, std::vector<int> gpus, DaemonPlace daemon, Renew renew)
    : options_(options),
      gpus_(std::move(gpus)),
      daemon_(std::move(daemon)),
      renew_(std::move(renew)),
      end_(Clock::now() + options.time_max) {
  open_tools();
  open_nccl();
}

void TableRunner::open_tools() {
  check_cuda(cudaSetDevice(gpus_.front()), "cudaSetDevice");
  cudaDeviceProp properties{};
  check_cuda(cudaGetDeviceProperties(&properties, gpus_.front()), "cudaGetDeviceProperties");
  device_name_ = properties.name;
  gate_ = std::make_unique<Gate>();
  for (const int gpu : gpus_) {
    check_cuda(cudaSetDevice(gpu), "cudaSetDevice");
    auto tools = std::make_unique<RankTools>();
    tools->device = gpu;
    int multiprocessors = 0;
    check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, gpu), "cudaDeviceGetAttribute");
    tools->multiprocessors = static_cast<uint32_t>(multiprocessors);
    tools->timer = std::make_unique<StreamTimer>(gate_.get());
    tools->probe = std::make_unique<DeviceProbe>();
    tools->load = options_.busy ? std::make_unique<GemmLoad>(gpu) : nullptr;
    tools_.push_back(std::move(tools));
  }
}

/// A comparison that cannot be had is no failure of the table.
void TableRunner::open_nccl() {
  if (!options_.nccl) {
    nccl_text_ = "left out";
    return;
  }
  try {
    std::string problem;
    nccl_ = Nccl::open(gpus_, &problem);
    nccl_text_ = nccl_ != nullptr ? nccl_->version() : problem;
  } catch (const std::exception& error) {
    nccl_text_ = error.what();
  }
  if (nccl_ == nullptr) {
    std::cerr << "op_table: no comparison with NCCL: " + nccl_text_ + "\n";
  }
}

std::string TableRunner::load_kind() const {
  return tools_.front()->load == nullptr ? "none" : tools_.front()->load->kind();
}

uint64_t TableRunner::gpu_timer_step_ns() const {
  uint64_t step_ns = 0;
  for (const auto& tools : tools_) {
    step_ns = std::max(step_ns, tools->timer->gpu_timer_step_ns());
  }
  return step_ns;
}

std::vector<bool> TableRunner::clients(const TableCase& it) const {
  std::vector<bool> busy;
  // A double batch computes itself.
  if (options_.idle || it.operation == "overlap") {
    busy.push_back(false);
  }
  if (options_.busy && it.operation != "overlap") {
    busy.push_back(true);
  }
  return busy;
}

TableRow TableRunner::new_row(const TableCase& it, bool busy) const {
  TableRow row;
  row.it = it;
  row.busy = busy;
  row.mps = mps_;
  row.device = device_name_;
  return row;
}

bool TableRunner::renew_daemon() {
  try {
    daemon_ = renew_();
    return true;
  } catch (const std::exception& error) {
    std::cerr << std::string("op_table: no new daemon: ") + error.what() + "\n";
    return false;
  }
}

std::vector<TableRow> TableRunner::run(const std::vector<TableCase>& cases, const Progress& progress) {
  std::vector<TableRow> rows;
  uint32_t failures = 0;
  uint32_t batches = 0;
  for (size_t next = 0; next < cases.size();) {
    size_t end = next;
    while (end < cases.size() && cases[end].shares_group(cases[next])) {
      ++end;
    }
    using Difference = std::vector<TableCase>::difference_type;
    std::vector<TableCase> group(cases.begin() + static_cast<Difference>(next),
                                 cases.begin() + static_cast<Difference>(end));
    if (failures == kFailuresInARow || Clock::now() > end_) {
      const char* const reason =
          failures == kFailuresInARow ? "not run: the cases before failed, one behind the other" : kTimeOver;
      for (const TableCase& it : group) {
        for (const bool busy : clients(it)) {
          rows.push_back(new_row(it, busy));
          rows.back().error = reason;
        }
      }
      next = end;
      continue;
    }
    Batch batch(this, std::move(group), ++batches);
    size_t done = 0;
    const std::vector<TableRow> more = batch.run(&done);
    rows.insert(rows.end(), more.begin(), more.end());
    failures = !batch.failed() ? 0 : more.front().error.empty() ? 1 : failures + 1;
    next += done;
    progress(rows);
    if (batch.failed() && renew_ && !renew_daemon()) {
      failures = kFailuresInARow;
    }
  }
  return rows;
}

}  // namespace expertd::bench
