// SPDX-License-Identifier: Apache-2.0
#include "client/ctl/bench_runner.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <iostream>
#include <mutex>
#include <optional>
#include <thread>

#include "client/ctl/bench_rendezvous.h"
#include "client/ctl/exit_codes.h"

namespace expertd::ctl {

namespace {

uint64_t now_ns() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(now).count());
}

/// What one rank found in one row.
struct RankRow {
  std::vector<uint64_t> times_ns;
  BenchBytes bytes;
  BenchExecution execution;
  uint64_t verified = 0;
};

class Run {
 public:
  explicit Run(const BenchOptions& options)
      : options_(options),
        ranks_(options.devices.size()),
        rendezvous_(static_cast<uint32_t>(ranks_)),
        devices_(ranks_),
        joins_ns_(2, std::vector<uint64_t>(ranks_)) {
    for (const bool low_latency : {false, true}) {
      const auto rows = rows_of_mode(options, low_latency);
      specs_.insert(specs_.end(), rows.begin(), rows.end());
    }
    found_.assign(specs_.size(), std::vector<RankRow>(ranks_));
  }

  BenchResult run();

 private:
  void rank_thread(uint32_t index);
  void rank_work(uint32_t index);
  void run_mode(BenchRank* rank, bool low_latency);
  BenchGroup group_of(bool low_latency, const std::vector<uint32_t>& node_of) const;
  void run_row(BenchRank* rank, size_t row);
  uint64_t time_one(BenchRank* rank, BenchOperation* operation, const std::string& name, expertd_op_result_t* result);
  void fail(const Failure& failure);

  const BenchOptions& options_;
  const size_t ranks_;
  BenchRendezvous rendezvous_;
  std::vector<BenchRowSpec> specs_;
  std::vector<std::vector<RankRow>> found_;  // [row][rank], each written by its rank
  std::vector<std::string> devices_;
  std::vector<std::vector<uint64_t>> joins_ns_;  // [low latency][rank], each written by its rank
  std::mutex mutex_;
  std::optional<Failure> failure_;  // under mutex_: the first
};

void Run::fail(const Failure& failure) {
  const std::lock_guard lock(mutex_);
  if (!failure_.has_value()) {
    failure_ = failure;
  }
  rendezvous_.abort();
}

void Run::rank_thread(uint32_t index) {
  try {
    rank_work(index);
  } catch (const BenchAborted&) {
    // Another rank failed and has said why.
  } catch (const Failure& failure) {
    fail(failure);
  } catch (const std::exception& error) {
    fail(Failure(kExitInternal, "rank " + std::to_string(index) + ": " + error.what()));
  }
}

void Run::rank_work(uint32_t index) {
  BenchRank rank(options_, index);
  devices_[index] = rank.device();
  rendezvous_.meet();
  for (const bool low_latency : {false, true}) {
    if (low_latency ? options_.inference : options_.normal) {
      run_mode(&rank, low_latency);
    }
  }
}

void Run::run_mode(BenchRank* rank, bool low_latency) {
  const std::string name = "bench-" + std::to_string(getpid()) + (low_latency ? "-inference" : "-normal");
  rendezvous_.meet();
  const uint64_t begin = now_ns();
  rank->join(name, options_.shape(low_latency), low_latency);
  joins_ns_[low_latency ? 1 : 0][rank->index()] = now_ns() - begin;
  for (size_t row = 0; row < specs_.size(); ++row) {
    if (specs_[row].low_latency == low_latency) {
      run_row(rank, row);
    }
  }
  rendezvous_.meet();
  rank->leave();
}

/// Submission to completion of one operation, as this rank's host sees it.
uint64_t Run::time_one(BenchRank* rank, BenchOperation* operation, const std::string& name,
                       expertd_op_result_t* result) {
  // The first meeting may end in a wake-up, the second then finds everybody awake.
  rendezvous_.meet();
  rendezvous_.meet();
  expertd_event_t event{};
  const uint64_t begin = now_ns();
  operation->issue(&event);
  *result = rank->wait(event, name);
  return now_ns() - begin;
}

void Run::run_row(BenchRank* rank, size_t row) {
  const BenchRowSpec& spec = specs_[row];
  const std::string name = spec.operation + " " + spec.flags;
  if (rank->index() == 0) {
    std::cerr << "[" + std::to_string(row + 1) + "/" + std::to_string(specs_.size()) + "] " + name + "\n";
  }
  RankRow& found = found_[row][rank->index()];
  found.times_ns.reserve(options_.iterations);
  const auto operation = spec.make({options_, options_.shape(spec.low_latency), rank, name});
  expertd_op_result_t result{};
  operation->prepare(0);
  for (uint32_t i = 0; i < options_.warmup; ++i) {
    time_one(rank, operation.get(), name, &result);
    operation->finish();
  }
  const uint32_t last = options_.iterations - 1;
  for (uint32_t i = 0; i <= last; ++i) {
    const bool verified = spec.has_outputs && (i == 0 || i == last);
    if (i == last) {
      operation->prepare(i);
    }
    if (verified) {
      operation->poison();
    }
    found.times_ns.push_back(time_one(rank, operation.get(), name, &result));
    found.execution.add(result.executor, result.sms);
    if (verified) {
      operation->verify(result);
      ++found.verified;
    }
    operation->finish();
  }
  found.bytes = operation->bytes();
}

BenchMeasured merge(const BenchOptions& options, const BenchRowSpec& spec, const std::vector<RankRow>& ranks) {
  BenchMeasured row;
  row.operation = spec.operation;
  row.flags = spec.flags;
  row.mode = spec.low_latency ? "inference" : "normal";
  row.tokens = options.shape(spec.low_latency).tokens;
  row.times_ns.assign(options.iterations, 0);
  for (const RankRow& rank : ranks) {
    std::transform(row.times_ns.begin(), row.times_ns.end(), rank.times_ns.begin(), row.times_ns.begin(),
                   [](uint64_t left, uint64_t right) { return std::max(left, right); });
    row.logical_bytes += static_cast<double>(rank.bytes.logical) / static_cast<double>(ranks.size());
    row.link_bytes += static_cast<double>(rank.bytes.remote) / static_cast<double>(ranks.size());
    row.verified += rank.verified;
    row.execution.add(rank.execution.executor, rank.execution.sms);
  }
  std::sort(row.times_ns.begin(), row.times_ns.end());
  return row;
}

BenchGroup Run::group_of(bool low_latency, const std::vector<uint32_t>& node_of) const {
  const std::vector<uint64_t>& joins = joins_ns_[low_latency ? 1 : 0];
  const BenchRouting routing(options_.shape(low_latency), BenchInput(options_.seed, 0, options_.expert_groups));
  return {low_latency ? "inference" : "normal", *std::max_element(joins.begin(), joins.end()),
          routing.crossings(node_of)};
}

BenchResult Run::run() {
  std::vector<std::thread> threads;
  for (uint32_t index = 0; index < ranks_; ++index) {
    threads.emplace_back(&Run::rank_thread, this, index);
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  if (failure_.has_value()) {
    throw Failure(*failure_);
  }
  BenchResult result;
  result.devices = devices_;
  const std::vector<uint32_t> node_of = options_.node_of();
  result.nodes = *std::max_element(node_of.begin(), node_of.end()) + 1;
  for (const bool low_latency : {false, true}) {
    if (low_latency ? options_.inference : options_.normal) {
      result.groups.push_back(group_of(low_latency, node_of));
    }
  }
  for (size_t row = 0; row < specs_.size(); ++row) {
    result.rows.push_back(merge(options_, specs_[row], found_[row]));
    result.verified += result.rows.back().verified;
  }
  return result;
}

}  // namespace

uint64_t BenchMeasured::time_ns(double quantile) const {
  const auto rank = static_cast<size_t>(std::ceil(quantile * static_cast<double>(times_ns.size())));
  return times_ns[std::clamp<size_t>(rank, 1, times_ns.size()) - 1];
}

std::vector<BenchRowSpec> rows_of_mode(const BenchOptions& options, bool low_latency) {
  if (!(low_latency ? options.inference : options.normal)) {
    return {};
  }
  const BenchShape shape = options.shape(low_latency);
  std::vector<BenchRowSpec> rows;
  if (!low_latency || !options.normal) {
    rows = common_rows(low_latency);
  }
  for (const auto& more : low_latency ? std::vector{low_latency_dispatch_rows(shape), low_latency_combine_rows()}
                                      : std::vector{dispatch_rows(shape), combine_rows(shape)}) {
    rows.insert(rows.end(), more.begin(), more.end());
  }
  std::erase_if(rows, [&](const BenchRowSpec& row) {
    const std::string name = row.operation + " " + row.flags;
    return !options.only.empty() && std::none_of(options.only.begin(), options.only.end(),
                                                 [&](const std::string& text) { return name == text; });
  });
  return rows;
}

BenchResult run_rows(const BenchOptions& options) {
  Run run(options);
  return run.run();
}

}  // namespace expertd::ctl
