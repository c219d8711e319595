// SPDX-License-Identifier: Apache-2.0
// What a low-latency dispatch waits for beside a session that loops large dispatches, under each engine.schedule: both
// on the same host devices, in sessions of their own. A thread per rank and session.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <atomic>
#include <barrier>
#include <iostream>
#include <memory>
#include <mutex>
#include <thread>

#include "client/ctl/bench_operation.h"
#include "client/ctl/format.h"
#include "tests/bench/bench_daemon.h"
#include "tests/bench/bench_figures.h"

namespace expertd::bench {

namespace {

/// The sessions of one group, which issue one operation again and again until told to stop or for a number of times.
class Loop {
 public:
  Loop(const ctl::BenchOptions& options, bool low_latency, uint64_t iterations)
      : options_(options),
        low_latency_(low_latency),
        iterations_(iterations),
        times_ns_(options.devices.size()),
        together_(static_cast<std::ptrdiff_t>(options.devices.size()), NextRound{this}) {}

  void begin() {
    for (uint32_t index = 0; index < times_ns_.size(); ++index) {
      threads_.emplace_back([this, index] { work(index); });
    }
  }
  void stop() { stop_ = true; }
  void join() {
    for (std::thread& thread : threads_) {
      thread.join();
    }
    threads_.clear();
    if (!failure_.empty()) {
      throw std::runtime_error(failure_);
    }
  }
  uint64_t rounds() const { return rounds_; }
  bool failed() const { return failed_; }
  /// Of each round the slowest rank, without the first tenth.
  std::vector<uint64_t> slowest() const {
    std::vector<uint64_t> all = times_ns_.front();
    for (const std::vector<uint64_t>& of_rank : times_ns_) {
      for (size_t i = 0; i < std::min(all.size(), of_rank.size()); ++i) {
        all[i] = std::max(all[i], of_rank[i]);
      }
    }
    all.erase(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(all.size() / 10));
    return all;
  }

 private:
  struct NextRound {
    Loop* loop;
    void operator()() noexcept {
      const uint64_t done = ++loop->rounds_;
      loop->go_on_ = !loop->stop_ && !loop->failed_ && (loop->iterations_ == 0 || done < loop->iterations_);
    }
  };

  void work(uint32_t index) {
    try {
      run(index);
    } catch (const std::exception& error) {
      const std::lock_guard lock(mutex_);
      failure_ = failure_.empty() ? error.what() : failure_;
      failed_ = true;
      together_.arrive_and_drop();
    }
  }

  void run(uint32_t index) {
    ctl::BenchRank rank(options_, index);
    const ctl::BenchShape shape = options_.shape(low_latency_);
    rank.join((low_latency_ ? "schedule-ll-" : "schedule-ht-") + std::to_string(getpid()), shape, low_latency_);
    {
      const ctl::BenchRowSpec row =
          low_latency_ ? ctl::low_latency_dispatch_rows(shape).front() : ctl::dispatch_rows(shape).front();
      const auto operation = row.make({options_, shape, &rank, low_latency_ ? "ll_dispatch bf16" : "dispatch bf16"});
      operation->prepare(0);
      while (go_on_) {
        expertd_event_t event{};
        operation->issue(&event);
        times_ns_[index].push_back(rank.wait(event, "the operation").total_ns);
        operation->finish();
        together_.arrive_and_wait();
      }
    }
    rank.leave();
  }

  const ctl::BenchOptions& options_;
  const bool low_latency_;
  const uint64_t iterations_;
  std::vector<std::vector<uint64_t>> times_ns_;  // each written by its rank's thread
  std::atomic<bool> stop_{false};
  std::atomic<bool> failed_{false};
  std::atomic<bool> go_on_{true};
  std::atomic<uint64_t> rounds_{0};
  std::barrier<NextRound> together_;
  std::mutex mutex_;
  std::string failure_;  // under mutex_: the first
  std::vector<std::thread> threads_;
};

struct Row {
  std::vector<uint64_t> alone_ns, beside_ns;
  double prefills_per_s = 0;
};

std::vector<uint64_t> decode(const ctl::BenchOptions& options) {
  Loop loop(options, true, options.iterations);
  loop.begin();
  loop.join();
  return loop.slowest();
}

Row measure(const std::string& schedule, ctl::BenchOptions options) {
  const BenchDaemon daemon("", {"--device-gpus=none", "--device-hosts=" + std::to_string(options.devices.size()),
                                "--engine-schedule=" + schedule});
  options.socket = daemon.attach_socket();
  Row row;
  row.alone_ns = decode(options);
  Loop prefill(options, false, 0);
  prefill.begin();
  while (prefill.rounds() < 2 && !prefill.failed()) {
    std::this_thread::yield();
  }
  const uint64_t rounds = prefill.rounds();
  const uint64_t begin = now_ns();
  row.beside_ns = decode(options);
  row.prefills_per_s = static_cast<double>(prefill.rounds() - rounds) * 1e9 / static_cast<double>(now_ns() - begin);
  prefill.stop();
  prefill.join();
  return row;
}

int run(int argc, char** argv) {
  CLI::App app("Times a low-latency dispatch beside a session that loops large ones, under each engine.schedule.",
               "schedule_latency");
  uint32_t ranks = 1;
  ctl::BenchOptions options;
  options.low_latency_tokens = 16;
  options.hidden = 2048;
  options.experts = 32;
  options.iterations = 3000;
  app.add_option("--ranks", ranks, "Host devices to use")->check(CLI::Range(1, 64))->capture_default_str();
  app.add_option("--tokens", options.tokens, "Of the large dispatch")->capture_default_str();
  app.add_option("--low-latency-tokens", options.low_latency_tokens, "Of the small one")->capture_default_str();
  app.add_option("--hidden", options.hidden, "A multiple of 128")->capture_default_str();
  app.add_option("--iterations", options.iterations, "Timed")->check(CLI::Range(10, 1000000))->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  for (uint32_t rank = 0; rank < ranks; ++rank) {
    options.devices.push_back("host:" + std::to_string(rank));
  }
  using ctl::Align;
  ctl::Table table({{"SCHEDULE"},
                    {"ALONE P50 µs", Align::kRight},
                    {"P99", Align::kRight},
                    {"BESIDE HT P50 µs", Align::kRight},
                    {"P99", Align::kRight},
                    {"P99 RATIO", Align::kRight},
                    {"HT/s", Align::kRight}});
  for (const char* schedule : {"latency", "fair", "fifo"}) {
    const Row row = measure(schedule, options);
    const double alone_p99 = quantile_us(row.alone_ns, 0.99);
    const double beside_p99 = quantile_us(row.beside_ns, 0.99);
    table.add({schedule, fixed(quantile_us(row.alone_ns, 0.5), 1), fixed(alone_p99, 1),
               fixed(quantile_us(row.beside_ns, 0.5), 1), fixed(beside_p99, 1), fixed(beside_p99 / alone_p99, 2),
               fixed(row.prefills_per_s, 1)});
  }
  std::cout << utc_now() << ", " << ranks << " host devices, ll_dispatch of " << options.low_latency_tokens
            << " tokens beside dispatches of " << options.tokens << ", hidden " << options.hidden << ", top "
            << options.top_k << " of " << options.experts << "\n"
            << table.text();
  return 0;
}

}  // namespace

}  // namespace expertd::bench

int main(int argc, char** argv) {
  try {
    return expertd::bench::run(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << "schedule_latency: " << error.what() << "\n";
    return 1;
  }
}
