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

/// Rows that move the same bytes over the link beside the same client, whether they are captured or not and whoever
/// executes them.
std::string floor_key(const TableCase& it, bool busy) {
  TableCase plain = it;
  plain.captured = false;
  plain.executor.clear();
  return plain.name() + (busy ? " busy" : " idle");
}

}  // namespace

/// Cases of one group, from the join to the leave or the first failure.
class TableRunner::Batch {
 public:
  Batch(TableRunner* runner, std::vector<TableCase> cases, uint32_t number);

  /// Gives the runner the rows of cases that are done with: those that ran, and the one that failed. Returns how many
  /// cases that are.
  size_t run();
  bool failed() const { return !failure_.empty(); }

 private:
  void rank_thread(uint32_t index);
  void rank_work(uint32_t index);
  void measure(RankCase* it, size_t number, uint32_t index);
  void fail(const std::string& text);
  void add_missing(size_t number, const std::string& error);
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
  size_t done_cases_ = 0;                                       // of rank 0, as is the next
  size_t done_clients_ = 0;                                     // of the case behind them
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
             runner->tools_,      [runner](const TableCase& it) { return runner->has_floors(it); }},
      figures_(cases_.size(),
               std::vector<std::vector<RankFigures>>(clients_.size(), std::vector<RankFigures>(ranks_))) {
  bench_.socket = runner->daemon_.attach_socket;
  for (uint32_t rank = 0; rank < ranks_; ++rank) {
    bench_.devices.push_back("cuda:" + std::to_string(runner->gpus_[rank]));
  }
  bench_.iterations = runner->options_.iterations;
  bench_.seed = runner->options_.seed;
  bench_.timeout_ns = kTimeoutNs;
  const TableCase& first = cases_.front();
  const std::string& executor = first.executor.empty() ? runner->options_.executor : first.executor;
  const bool captured = cases_.front().captured;
  bench_.capture_lanes = captured ? kCaptureLanes : 0;
  // A captured combine is by the daemon's kernels in any group, and takes the routing of a dispatch by the same.
  bench_.executor = captured || executor == "sm" ? EXPERTD_GROUP_EXECUTOR_SM
                    : executor == "copy_engine"  ? EXPERTD_GROUP_EXECUTOR_COPY_ENGINE
                                                 : EXPERTD_GROUP_EXECUTOR_AUTO;
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
      time_is_over_ = runner_->is_over();
    }
    meeting_.meet();
    if (time_is_over_) {
      break;
    }
    const uint64_t begin_ns = now_ns();
    auto it = std::make_unique<RankCase>(&group_, &rank, cases_[i]);
    figures_[i].front()[index].set_up_s = static_cast<double>(now_ns() - begin_ns) * 1e-9;
    measure(it.get(), i, index);
    if (cases_[i].captured) {
      kept.push_back(std::move(it));
    }
  }
  meeting_.meet();
  rank.leave();
}

/// Each row is handed over when the last rank has its figures, so that a run that is stopped leaves what it had.
void TableRunner::Batch::measure(RankCase* it, size_t number, uint32_t index) {
  const std::vector<bool> wanted = runner_->wanted(cases_[number]);
  for (size_t client = 0; client < clients_.size(); ++client) {
    if (std::find(wanted.begin(), wanted.end(), clients_[client]) == wanted.end()) {
      continue;
    }
    it->measure(clients_[client], &figures_[number][client][index]);
    meeting_.meet();
    if (index == 0) {
      TableRow row = finished_row(cases_[number], client, figures_[number][client]);
      row.set_up_s = client == 0 || wanted.size() == 1 ? figures_[number].front().front().set_up_s : 0;
      runner_->share_floors(&row);
      runner_->add(row);
      ++done_clients_;
    }
  }
  if (index == 0) {
    ++done_cases_;
    done_clients_ = 0;
  }
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
    row.client_slowdown_marks = std::max(row.client_slowdown_marks, rank.client_slowdown_marks);
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

void TableRunner::Batch::add_missing(size_t number, const std::string& error) {
  const std::vector<bool> wanted = runner_->wanted(cases_[number]);
  for (size_t client = number == done_cases_ ? done_clients_ : 0; client < wanted.size(); ++client) {
    TableRow row = runner_->new_row(cases_[number], wanted[client]);
    row.error = error;
    runner_->add(row);
  }
}

size_t TableRunner::Batch::run() {
  std::vector<std::thread> threads;
  for (uint32_t index = 0; index < ranks_; ++index) {
    threads.emplace_back(&Batch::rank_thread, this, index);
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  // The next batch's rounds are closed again.
  runner_->gate_->open_all();
  if (failed() && done_cases_ < cases_.size()) {
    add_missing(done_cases_, failure_);
    return done_cases_ + 1;
  }
  for (size_t number = done_cases_; number < cases_.size(); ++number) {
    add_missing(number, kTimeOver);
  }
  return cases_.size();
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
  int mps = 0;
  check_cuda(cudaDeviceGetAttribute(&mps, cudaDevAttrMpsEnabled, gpus_.front()), "cudaDeviceGetAttribute");
  mps_ = mps != 0;
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
  row.asked_executor = it.captured ? "sm" : it.executor.empty() ? options_.executor : it.executor;
  row.link_sms = options_.link_sms;
  return row;
}

std::vector<bool> TableRunner::wanted(const TableCase& it) const {
  std::vector<bool> busy = clients(it);
  std::erase_if(busy, [&](bool client) { return known_(new_row(it, client)); });
  return busy;
}

/// With an estimate by the mean of the rows so far.
void TableRunner::add(const TableRow& row) {
  rows_.push_back(row);
  const double seconds = std::chrono::duration<double>(Clock::now() - begin_).count();
  const auto done = static_cast<double>(rows_.size());
  const double left = seconds / done * static_cast<double>(planned_rows_ - std::min(planned_rows_, rows_.size()));
  std::cerr << "[" + std::to_string(rows_.size()) + "/" + std::to_string(planned_rows_) + ", " + fixed(seconds, 0) +
                   " s, about " + fixed(left, 0) + " s to go] " + row.it.name() +
                   (row.busy ? ", client busy: " : ", client idle: ") +
                   (row.error.empty() ? fixed(quantile_of(row.times_us, 0.5), 1) + " us\n" : row.error + "\n");
  progress_(rows_);
}

bool TableRunner::has_floors(const TableCase& it) const {
  const std::vector<bool> busy = wanted(it);
  return std::all_of(busy.begin(), busy.end(), [&](bool client) { return floors_.count(floor_key(it, client)) != 0; });
}

void TableRunner::share_floors(TableRow* row) {
  const auto [found, is_first] = floors_.try_emplace(floor_key(row->it, row->busy), *row);
  if (is_first) {
    return;
  }
  const TableRow& from = found->second;
  for (Times TableRow::*times : {&TableRow::floor_copy_engine_us, &TableRow::floor_sm_us, &TableRow::nccl_us,
                                 &TableRow::floor_least_copy_engine_us, &TableRow::floor_least_sm_us}) {
    if ((row->*times).empty()) {
      row->*times = from.*times;
    }
  }
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

std::vector<TableRow> TableRunner::run(const std::vector<TableCase>& cases, const Known& known,
                                       const Progress& progress) {
  known_ = known;
  progress_ = progress;
  begin_ = Clock::now();
  std::vector<TableCase> missing;
  for (const TableCase& it : cases) {
    planned_rows_ += wanted(it).size();
    if (!wanted(it).empty()) {
      missing.push_back(it);
    }
  }
  uint32_t failures = 0;
  uint32_t batches = 0;
  for (size_t next = 0; next < missing.size();) {
    size_t end = next;
    while (end < missing.size() && missing[end].shares_group(missing[next])) {
      ++end;
    }
    using Difference = std::vector<TableCase>::difference_type;
    std::vector<TableCase> group(missing.begin() + static_cast<Difference>(next),
                                 missing.begin() + static_cast<Difference>(end));
    if (failures == kFailuresInARow || is_over()) {
      const char* const reason =
          failures == kFailuresInARow ? "not run: the cases before failed, one behind the other" : kTimeOver;
      for (const TableCase& it : group) {
        for (const bool busy : wanted(it)) {
          TableRow row = new_row(it, busy);
          row.error = reason;
          add(row);
        }
      }
      next = end;
      continue;
    }
    Batch batch(this, std::move(group), ++batches);
    const size_t before = rows_.size();
    next += batch.run();
    const bool began_well = rows_.size() > before && rows_[before].error.empty();
    failures = !batch.failed() ? 0 : began_well ? 1 : failures + 1;
    if (batch.failed() && renew_ && !renew_daemon()) {
      failures = kFailuresInARow;
    }
  }
  return rows_;
}

}  // namespace expertd::bench
