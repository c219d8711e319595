// SPDX-License-Identifier: Apache-2.0
// What a rank that is late by a known time costs the others: how long after the late doorbell the operation ends at the
// rank that waited, against the same when nobody is late, and what its computation on another stream takes meanwhile.
// Both by the host's clock, from words that the streams write, so that no two GPUs' timers are compared. Needs two
// GPUs; starts a daemon of its own, under MPS or not as the environment has it.
#include <cuda_runtime_api.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <array>
#include <atomic>
#include <iostream>
#include <mutex>
#include <thread>

#include "client/ctl/bench_operation.h"
#include "client/ctl/bench_rendezvous.h"
#include "tests/bench/bench_daemon.h"
#include "tests/bench/bench_figures.h"
#include "tests/bench/cuda_check.h"
#include "tests/bench/table/exchange.h"
#include "tests/bench/table/fixed_work.h"
#include "tests/bench/table/gate.h"
#include "tests/bench/table/stamps.h"
#include "tests/bench/table/table_cases.h"
#include "tests/bench/table/table_row.h"

namespace expertd::bench {

namespace {

constexpr uint32_t kRanks = 2;
constexpr uint32_t kLate = 1;  // the rank that is late; rank 0 waits and computes
constexpr uint64_t kTimeoutNs = 20'000'000'000;
constexpr std::chrono::microseconds kArm{300};
constexpr std::chrono::seconds kStuck{30};
constexpr uint32_t kWarmUps = 10;
constexpr uint32_t kKernels = 20;  // of a computation
constexpr double kKernelUs = 100;
constexpr double kAfterArrivalUs = 3;
constexpr double kComputeShare = 0.02;

struct LateOptions {
  std::vector<int> gpus = {0, 1};
  uint32_t rounds = 100;
  uint32_t tokens = 128;
  uint32_t late_us = 1000;
};

/// What a round is.
struct Form {
  const char* name;
  bool operates;
  bool late;
  bool computes;
};
constexpr std::array<Form, 5> kForms = {{{"on time", true, false, false},
                                         {"late", true, true, false},
                                         {"on time, computing", true, false, true},
                                         {"late, computing", true, true, true},
                                         {"computing alone", false, false, true}}};

/// Of one form, a value for each round.
struct FormTimes {
  Times after_arrival_us;  // of rank 0's end
  Times compute_us;        // of rank 0
};

/// What both ranks of a round write, each its own, between two meetings.
struct RoundTimes {
  std::array<uint64_t, kRanks> arrived_ns{};
  uint64_t ended_ns = 0;  // of rank 0
};

/// What the ranks share.
struct Shared {
  const LateOptions& options;
  const ctl::BenchOptions& bench;
  ctl::BenchRendezvous meeting{kRanks};
  Gate gate{};
  RoundTimes round{};
  std::array<FormTimes, kForms.size()> times{};
  bool mps = false;
  std::mutex mutex{};
  std::string failure{};  // under mutex: the first
};

/// Words that a stream writes and the host polls.
class Word {
 public:
  Word() {
    void* memory = nullptr;
    check_cuda(cudaHostAlloc(&memory, sizeof(StreamMarks), cudaHostAllocPortable | cudaHostAllocMapped),
               "cudaHostAlloc");
    marks_ = new (memory) StreamMarks{};
    check_cuda(cudaHostGetDevicePointer(&memory, marks_, 0), "cudaHostGetDevicePointer");
    device_marks_ = static_cast<StreamMarks*>(memory);
  }
  ~Word() { static_cast<void>(cudaFreeHost(marks_)); }
  Word(const Word&) = delete;
  Word& operator=(const Word&) = delete;

  StreamMarks* device() const { return device_marks_; }
  /// When the host saw the round.
  uint64_t wait(uint32_t round, const char* what) const {
    const std::atomic_ref<uint32_t> place(marks_->ended);
    const auto end = std::chrono::steady_clock::now() + kStuck;
    // Pairs with the release of the stream that wrote it.
    while (place.load(std::memory_order_acquire) != round) {
      if (std::chrono::steady_clock::now() > end) {
        throw std::runtime_error(std::string(what) + ": not reached");
      }
    }
    return now_ns();
  }

 private:
  StreamMarks* marks_ = nullptr;
  StreamMarks* device_marks_ = nullptr;
};

class LateRank {
 public:
  LateRank(Shared* shared, uint32_t index);
  void run();

 private:
  void round(size_t form, bool verified);
  void park(cudaStream_t stream, uint32_t number);
  void mark(const Word& word, uint32_t number);
  void enqueue_computation(uint32_t number);
  void open_gate(uint32_t number);
  double compute_us() const;
  void calibrate();
  void use_all_once();
  void note(size_t form, const RoundTimes& times);
  bool waits() const { return index_ != kLate; }

  Shared* const shared_;
  const uint32_t index_;
  cudaStream_t stream_ = nullptr;
  cudaStream_t computes_ = nullptr;
  cudaEvent_t begin_ = nullptr;
  cudaEvent_t end_ = nullptr;
  uint32_t multiprocessors_ = 0;
  uint32_t work_ = 1000;
  uint32_t number_ = 1;  // of the next round; 0 is open from the start
  bool mps_ = false;
  Word arrived_, ended_;
  DeviceBuffer scratch_;
  ctl::BenchRank rank_;
  std::unique_ptr<ctl::BenchOperation> operation_;
};

int use_device(const Shared& shared, uint32_t index) {
  const int device = shared.options.gpus[index];
  check_cuda(cudaSetDevice(device), "cudaSetDevice");
  return device;
}

LateRank::LateRank(Shared* shared, uint32_t index)
    : shared_(shared), index_(index), scratch_(4096), rank_(shared->bench, index) {
  int device = use_device(*shared, index);
  int count = 0;
  int least = 0;
  int greatest = 0;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  multiprocessors_ = static_cast<uint32_t>(count);
  check_cuda(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
  check_cuda(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, greatest), "cudaStreamCreate");
  check_cuda(cudaStreamCreateWithPriority(&computes_, cudaStreamNonBlocking, least), "cudaStreamCreate");
  check_cuda(cudaEventCreate(&begin_), "cudaEventCreate");
  check_cuda(cudaEventCreate(&end_), "cudaEventCreate");
  rank_.set_stream(stream_);
  rank_.set_filler([this](void* data, uint8_t value, uint64_t bytes) {
    check_cuda(cudaMemsetAsync(data, value, bytes, stream_), "cudaMemsetAsync");
    check_cuda(cudaStreamSynchronize(stream_), "cudaMemsetAsync");
  });
  auto info = EXPERTD_INIT(expertd_session_info_t);
  rank_.check(expertd_session_info(rank_.session(), &info), "session information");
  mps_ = info.mps_active != 0;
  if (index == 0) {
    shared->mps = mps_;
  }
}

/// Under MPS by kernels of one thread, because the rest would wait for the computation; else without any kernel,
/// because the GPU would have to come back to this process for one.
void LateRank::park(cudaStream_t stream, uint32_t number) {
  if (mps_) {
    enqueue_gate(stream, shared_->gate.device_word(), arrived_.device(), number);
  } else {
    shared_->gate.park(stream, number);
  }
}

void LateRank::mark(const Word& word, uint32_t number) {
  if (mps_) {
    enqueue_end(stream_, scratch_.as<uint64_t>(), word.device(), number);
  } else {
    shared_->gate.write(stream_, &word.device()->ended, number);
  }
}

void LateRank::enqueue_computation(uint32_t number) {
  park(computes_, number);
  check_cuda(cudaEventRecord(begin_, computes_), "cudaEventRecord");
  for (uint32_t i = 0; i < kKernels; ++i) {
    enqueue_multiply_adds(computes_, multiprocessors_ / 2, work_, scratch_.as<float>());
  }
  check_cuda(cudaEventRecord(end_, computes_), "cudaEventRecord");
}

double LateRank::compute_us() const {
  check_cuda(cudaEventSynchronize(end_), "the computation");
  float ms = 0;
  check_cuda(cudaEventElapsedTime(&ms, begin_, end_), "cudaEventElapsedTime");
  return double{ms} * 1e3;
}

/// A first use must not happen while a stream is parked.
void LateRank::use_all_once() {
  park(stream_, 0);
  enqueue_passing_time(stream_, 0);
  mark(arrived_, 0);
  mark(ended_, 0);
  enqueue_computation(0);
  check_cuda(cudaStreamSynchronize(stream_), "the first use of everything");
  check_cuda(cudaStreamSynchronize(computes_), "the first use of everything");
}

void LateRank::calibrate() {
  constexpr uint32_t kCorrections = 4;
  for (uint32_t i = 0; i < kCorrections; ++i) {
    enqueue_computation(0);
    const double factor = kKernels * kKernelUs / std::max(1.0, compute_us());
    work_ = std::max(1u, static_cast<uint32_t>(work_ * factor));
  }
}

void LateRank::open_gate(uint32_t number) {
  shared_->meeting.meet();
  if (index_ == 0) {
    const auto until = std::chrono::steady_clock::now() + kArm;
    while (std::chrono::steady_clock::now() < until) {
    }
    shared_->gate.open(number);
  }
}

void LateRank::note(size_t form, const RoundTimes& times) {
  if (!waits()) {
    return;
  }
  FormTimes& all = shared_->times[form];
  if (kForms[form].operates) {
    const uint64_t arrived_ns = std::max(times.arrived_ns[0], times.arrived_ns[1]);
    all.after_arrival_us.push_back((static_cast<double>(times.ended_ns) - static_cast<double>(arrived_ns)) * 1e-3);
  }
  if (kForms[form].computes) {
    all.compute_us.push_back(compute_us());
  }
}

void LateRank::round(size_t form, bool verified) {
  const Form& it = kForms[form];
  const uint32_t number = number_++;
  if (verified && it.operates) {
    operation_->poison();
  }
  shared_->meeting.meet();
  park(stream_, number);
  enqueue_passing_time(stream_, it.late && !waits() ? shared_->options.late_us * 1000ull : 0);
  mark(arrived_, number);
  expertd_event_t event{};
  if (it.operates) {
    operation_->issue(&event);
  }
  mark(ended_, number);
  if (it.computes && waits()) {
    enqueue_computation(number);
  }
  open_gate(number);
  shared_->round.arrived_ns[index_] = arrived_.wait(number, "the doorbell");
  const uint64_t ended_ns = ended_.wait(number, "the end of the operation");
  shared_->round.ended_ns = waits() ? ended_ns : shared_->round.ended_ns;
  shared_->meeting.meet();
  note(form, shared_->round);
  if (it.operates) {
    const expertd_op_result_t result = rank_.wait(event, it.name);
    if (verified) {
      operation_->verify(result);
    }
    operation_->finish();
  }
  check_cuda(cudaStreamSynchronize(computes_), "the computation");
}

void LateRank::run() {
  const ctl::BenchShape shape{kRanks, 256, 7168, 8, shared_->options.tokens};
  const TableCase dispatch{"dispatch", "fp8", true, shape};
  use_all_once();
  calibrate();
  rank_.join("late-" + std::to_string(getpid()), shape, true);
  operation_ = row_spec(dispatch).make({shared_->bench, shape, &rank_, dispatch.name(), 0});
  operation_->prepare(0);
  for (uint32_t i = 0; i < kWarmUps; ++i) {
    expertd_event_t event{};
    operation_->issue(&event);
    rank_.wait(event, "warming up");
    operation_->finish();
  }
  check_cuda(cudaStreamSynchronize(stream_), "warming up");
  const uint32_t rounds = shared_->options.rounds;
  for (uint32_t i = 0; i < rounds; ++i) {
    for (size_t form = 0; form < kForms.size(); ++form) {
      round(form, i == 0 || i == rounds - 1);
    }
  }
  operation_.reset();
  shared_->meeting.meet();
  rank_.leave();
}

void rank_thread(Shared* shared, uint32_t index) {
  try {
    use_device(*shared, index);
    LateRank rank(shared, index);
    try {
      rank.run();
    } catch (...) {
      // What unwinds from here frees memory, which never ends beside a parked stream.
      shared->gate.open_all();
      shared->meeting.abort();
      throw;
    }
  } catch (const ctl::BenchAborted&) {
    // The other rank failed and has said why.
  } catch (const std::exception& error) {
    const std::lock_guard lock(shared->mutex);
    shared->failure = shared->failure.empty() ? error.what() : shared->failure;
    // A rank that could not be made has not told the other one yet.
    shared->meeting.abort();
  }
}

std::string verdict(double value, double most) {
  return value <= most ? " met" : " MISSED";
}

/// A line for each figure.
void report(const Shared& shared) {
  const std::string title = std::string("figure late rank, ") + (shared.mps ? "MPS" : "no MPS") + ", ";
  const auto after = [&](size_t form, double quantile) {
    return quantile_of(shared.times[form].after_arrival_us, quantile);
  };
  const auto compute = [&](size_t form) { return quantile_of(shared.times[form].compute_us, 0.5); };
  for (const size_t on_time : {size_t{0}, size_t{2}}) {
    const double extra_us = after(on_time + 1, 0.5) - after(on_time, 0.5);
    std::cout << title << (on_time == 0 ? "idle" : "computing") << ": end after the last doorbell, us p50/p99: on time "
              << fixed(after(on_time, 0.5), 1) << "/" << fixed(after(on_time, 0.99), 1) << ", "
              << shared.options.late_us << " us late " << fixed(after(on_time + 1, 0.5), 1) << "/"
              << fixed(after(on_time + 1, 0.99), 1) << ", more by " << fixed(extra_us, 1) << ", target "
              << fixed(kAfterArrivalUs, 0) << verdict(extra_us, kAfterArrivalUs) << "\n";
  }
  const double share = compute(3) / std::max(1.0, compute(2)) - 1;
  std::cout << title << "computation of the rank that waits, us p50: alone " << fixed(compute(4), 0)
            << ", beside an operation on time " << fixed(compute(2), 0) << ", beside a late one "
            << fixed(compute(3), 0) << ", more by " << fixed(100 * share, 1) << " %, target "
            << fixed(100 * kComputeShare, 0) << " %" << verdict(share, kComputeShare) << "\n";
}

int run(const LateOptions& options) {
  BenchDaemon daemon("", {"--device-gpus=" + std::to_string(options.gpus[0]) + "," + std::to_string(options.gpus[1]),
                          "--device-hosts=0"});
  ctl::BenchOptions bench;
  bench.socket = daemon.attach_socket();
  bench.devices = {"cuda:" + std::to_string(options.gpus[0]), "cuda:" + std::to_string(options.gpus[1])};
  bench.iterations = options.rounds;
  bench.timeout_ns = kTimeoutNs;
  check_cuda(cudaSetDevice(options.gpus[0]), "cudaSetDevice");
  Shared shared{options, bench};
  std::vector<std::thread> threads;
  for (uint32_t index = 0; index < kRanks; ++index) {
    threads.emplace_back(rank_thread, &shared, index);
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  if (!shared.failure.empty()) {
    std::cerr << "late_rank: " + shared.failure + "\n";
    return 1;
  }
  report(shared);
  std::cout << "verified the outputs of the first and the last round of each form\n";
  return 0;
}

}  // namespace

}  // namespace expertd::bench

int main(int argc, char** argv) {
  using namespace expertd::bench;
  LateOptions options;
  CLI::App app("What a late rank costs the others, beyond its being late.", "late_rank");
  app.add_option("--gpus", options.gpus, "Two ordinals")->delimiter(',')->expected(2);
  app.add_option("--rounds", options.rounds, "Of each form")->check(CLI::Range(2, 100000))->capture_default_str();
  app.add_option("--tokens", options.tokens, "Per rank")->check(CLI::Range(1, 1024))->capture_default_str();
  app.add_option("--late-us", options.late_us, "How late")->check(CLI::Range(0, 100000))->capture_default_str();
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    constexpr int kUsage = 64;
    return app.exit(error) == 0 ? 0 : kUsage;
  }
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count < 2) {
    std::cerr << "late_rank: " << count << " GPUs here, two are needed\n";
    constexpr int kUnavailable = 69;
    return kUnavailable;
  }
  try {
    return run(options);
  } catch (const std::exception& error) {
    std::cerr << "late_rank: " << error.what() << "\n";
    return 1;
  }
}
