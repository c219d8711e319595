// SPDX-License-Identifier: Apache-2.0
// What of the memory's speed a dispatch on host devices keeps: each iteration runs a bf16 dispatch of all ranks, then
// as many threads copy as many bytes with memcpy. The first and the last output are verified, of both. A thread per
// rank.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstring>
#include <iostream>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <thread>

#include "client/ctl/bench_operation.h"
#include "client/ctl/bench_rendezvous.h"
#include "client/ctl/format.h"
#include "tests/bench/bench_daemon.h"
#include "tests/bench/bench_figures.h"

namespace expertd::bench {

namespace {

struct RankFigures {
  std::vector<uint64_t> dispatch_ns, memcpy_ns;
  uint64_t bytes = 0;  // of the first iteration; the copies move as many
  uint64_t verified = 0;
};

class Measurement {
 public:
  explicit Measurement(const ctl::BenchOptions& options)
      : options_(options), meeting_(static_cast<uint32_t>(options.devices.size())), ranks_(options.devices.size()) {}

  /// Throws the first failure of any rank.
  void run();
  const std::vector<RankFigures>& ranks() const { return ranks_; }

 private:
  void rank_thread(uint32_t index);
  void rank_work(uint32_t index);
  void iterate(ctl::BenchRank* rank, ctl::BenchOperation* dispatch, RankFigures* figures);
  uint64_t time_dispatch(ctl::BenchRank* rank, ctl::BenchOperation* dispatch, expertd_op_result_t* result);
  uint64_t time_memcpy(const std::vector<char>& source, std::vector<char>* target);

  const ctl::BenchOptions& options_;
  ctl::BenchRendezvous meeting_;
  std::vector<RankFigures> ranks_;  // each written by its thread
  std::mutex mutex_;
  std::string failure_;  // under mutex_: the first
};

void Measurement::run() {
  std::vector<std::thread> threads;
  for (uint32_t index = 0; index < ranks_.size(); ++index) {
    threads.emplace_back(&Measurement::rank_thread, this, index);
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  if (!failure_.empty()) {
    throw std::runtime_error(failure_);
  }
}

void Measurement::rank_thread(uint32_t index) {
  try {
    rank_work(index);
  } catch (const ctl::BenchAborted&) {
    // Another rank failed and has said why.
  } catch (const std::exception& error) {
    const std::lock_guard lock(mutex_);
    failure_ = failure_.empty() ? error.what() : failure_;
    meeting_.abort();
  }
}

void Measurement::rank_work(uint32_t index) {
  ctl::BenchRank rank(options_, index);
  const ctl::BenchShape shape = options_.shape(false);
  rank.join("host-dispatch-" + std::to_string(getpid()), shape, false);
  {
    const auto dispatch = ctl::dispatch_rows(shape).front().make({options_, shape, &rank, "dispatch bf16 exact"});
    iterate(&rank, dispatch.get(), &ranks_[index]);
  }
  meeting_.meet();
  rank.leave();
}

uint64_t Measurement::time_dispatch(ctl::BenchRank* rank, ctl::BenchOperation* dispatch, expertd_op_result_t* result) {
  // The first meeting may end in a wake-up, the second then finds everybody awake.
  meeting_.meet();
  meeting_.meet();
  expertd_event_t event{};
  const uint64_t begin = now_ns();
  dispatch->issue(&event);
  *result = rank->wait(event, "dispatch");
  return now_ns() - begin;
}

uint64_t Measurement::time_memcpy(const std::vector<char>& source, std::vector<char>* target) {
  meeting_.meet();
  meeting_.meet();
  const uint64_t begin = now_ns();
  std::memcpy(target->data(), source.data(), source.size());
  return now_ns() - begin;
}

void Measurement::iterate(ctl::BenchRank* rank, ctl::BenchOperation* dispatch, RankFigures* figures) {
  dispatch->prepare(0);
  figures->bytes = dispatch->bytes().logical;
  const std::vector<char> source(figures->bytes, 'x');
  std::vector<char> target(figures->bytes, 'y');
  expertd_op_result_t result{};
  for (uint32_t i = 0; i < options_.warmup; ++i) {
    time_dispatch(rank, dispatch, &result);
    dispatch->finish();
    time_memcpy(source, &target);
  }
  const uint32_t last = options_.iterations - 1;
  for (uint32_t i = 0; i <= last; ++i) {
    const bool verified = i == 0 || i == last;
    if (verified) {
      dispatch->prepare(i);
      dispatch->poison();
    }
    figures->dispatch_ns.push_back(time_dispatch(rank, dispatch, &result));
    if (verified) {
      dispatch->verify(result);
      std::fill(target.begin(), target.end(), 'y');
      ++figures->verified;
    }
    dispatch->finish();
    figures->memcpy_ns.push_back(time_memcpy(source, &target));
    if (verified && source != target) {
      throw std::runtime_error("memcpy did not copy");
    }
  }
}

/// Of each iteration the slowest rank.
std::vector<uint64_t> slowest(const std::vector<RankFigures>& ranks, std::vector<uint64_t> RankFigures::*times) {
  std::vector<uint64_t> all = ranks.front().*times;
  for (const RankFigures& rank : ranks) {
    for (size_t i = 0; i < all.size(); ++i) {
      all[i] = std::max(all[i], (rank.*times)[i]);
    }
  }
  return all;
}

struct Summary {
  std::vector<uint64_t> dispatch_ns, memcpy_ns;
  double bytes = 0;  // of all ranks
  uint64_t verified = 0;

  double ratio() const { return quantile_us(memcpy_ns, 0.5) / quantile_us(dispatch_ns, 0.5); }
  double gb_per_s(const std::vector<uint64_t>& times) const { return bytes / quantile_us(times, 0.5) / 1e3; }
};

Summary summarise(const std::vector<RankFigures>& ranks) {
  Summary summary{slowest(ranks, &RankFigures::dispatch_ns), slowest(ranks, &RankFigures::memcpy_ns)};
  for (const RankFigures& rank : ranks) {
    summary.bytes += static_cast<double>(rank.bytes);
    summary.verified += rank.verified;
  }
  return summary;
}

void print_table(const BenchDaemon& daemon, const ctl::BenchOptions& options, const Summary& summary) {
  using ctl::Align;
  ctl::Table table({{"WHAT"}, {"P50 µs", Align::kRight}, {"P99 µs", Align::kRight}, {"GB/s", Align::kRight}});
  const auto add = [&](const char* what, const std::vector<uint64_t>& times) {
    table.add({what, fixed(quantile_us(times, 0.5), 1), fixed(quantile_us(times, 0.99), 1),
               fixed(summary.gb_per_s(times), 2)});
  };
  add("dispatch bf16", summary.dispatch_ns);
  add("memcpy", summary.memcpy_ns);
  std::cout << "daemon " << daemon.version() << ", " << utc_now() << ", " << options.devices.size() << " host devices, "
            << options.tokens << " tokens per rank, hidden " << options.hidden << ", top " << options.top_k << " of "
            << options.experts << " experts, " << options.iterations << " iterations\n"
            << table.text() << "dispatch reaches " << fixed(summary.ratio(), 3) << " of memcpy (p50)\n"
            << "verified " << summary.verified << " outputs\n";
}

void print_json(const BenchDaemon& daemon, const ctl::BenchOptions& options, const Summary& summary) {
  const auto times = [&](const std::vector<uint64_t>& of) {
    return nlohmann::json{
        {"p50_us", quantile_us(of, 0.5)}, {"p99_us", quantile_us(of, 0.99)}, {"gb_per_s", summary.gb_per_s(of)}};
  };
  const nlohmann::json document = {{"daemon", daemon.version()},
                                   {"client", expertd_version()},
                                   {"date", utc_now()},
                                   {"ranks", options.devices.size()},
                                   {"tokens", options.tokens},
                                   {"hidden", options.hidden},
                                   {"experts", options.experts},
                                   {"top_k", options.top_k},
                                   {"iterations", options.iterations},
                                   {"dispatch", times(summary.dispatch_ns)},
                                   {"memcpy", times(summary.memcpy_ns)},
                                   {"dispatch_to_memcpy_ratio", summary.ratio()},
                                   {"verified", summary.verified}};
  std::cout << document.dump(2) << "\n";
}

int run(int argc, char** argv) {
  CLI::App app("Times a bf16 dispatch on host devices against memcpy of the same bytes.", "host_dispatch");
  std::string runtime_directory;
  uint32_t ranks = 2;
  bool json = false;
  ctl::BenchOptions options;
  options.tokens = 1024;
  options.iterations = 30;
  options.warmup = 3;
  app.add_option("--runtime-directory", runtime_directory, "Of a running daemon; else one is started");
  app.add_option("--ranks", ranks, "Host devices to use")->check(CLI::Range(1, 64))->capture_default_str();
  app.add_option("--tokens", options.tokens, "Per rank")->check(CLI::Range(1, 65536))->capture_default_str();
  app.add_option("--hidden", options.hidden, "A multiple of 128")->capture_default_str();
  app.add_option("--iterations", options.iterations, "Timed")->check(CLI::Range(2, 100000))->capture_default_str();
  app.add_flag("--json", json, "Print JSON in place of the table");
  CLI11_PARSE(app, argc, argv);
  const BenchDaemon daemon(runtime_directory, ranks);
  options.socket = daemon.attach_socket();
  for (uint32_t rank = 0; rank < ranks; ++rank) {
    options.devices.push_back("host:" + std::to_string(rank));
  }
  Measurement measurement(options);
  measurement.run();
  const Summary summary = summarise(measurement.ranks());
  json ? print_json(daemon, options, summary) : print_table(daemon, options, summary);
  return 0;
}

}  // namespace

}  // namespace expertd::bench

int main(int argc, char** argv) {
  try {
    return expertd::bench::run(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << "host_dispatch: " << error.what() << "\n";
    return 1;
  }
}
