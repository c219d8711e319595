// SPDX-License-Identifier: Apache-2.0
// push_observe: how long a command of a GPU is under way to the host: from a kernel's store into pinned memory until a
// thread has seen it. Round trips by a thread that does nothing else (the floor), then by the loop of a device as the
// daemon has it, whose device looks at the word in its turn; one way as half of a trip and by the clocks of both sides.
// Behind them the words that a stream writes at the end of a kernel, as chains over nodes count their launches. Every
// command and answer is checked. Prints a table, or JSON.
#include <cuda.h>
#include <dlfcn.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "daemon/base/clock.h"
#include "daemon/transport/device_loop.h"
#include "tests/bench/bench_figures.h"
#include "tests/bench/cuda_check.h"
#include "tests/bench/push_clock.h"
#include "tests/bench/push_observe.h"

namespace expertd::bench {
namespace {

constexpr uint64_t kLimitNs = 60'000'000'000;
constexpr int kNoGpu = 69;

struct Options {
  int gpu = 0;
  uint32_t commands = 20'000;
  uint32_t stream_words = 2'000;
  uint64_t pause_ns = 20'000;
  bool as_json = false;
};

uint64_t load(const uint64_t& word) {
  return std::atomic_ref<uint64_t>(const_cast<uint64_t&>(word)).load(std::memory_order_acquire);
}

/// What sees commands: which is the next, when each was seen, and what was wrong.
class Observer {
 public:
  Observer(PushPage* page, uint64_t first, uint32_t count) : page_(page), next_(first), end_(first + count) {
    seen_ns_.reserve(count);
  }
  /// One look; true when there was a command, which is answered.
  bool look() {
    const uint64_t command = load(page_->command);
    if (command != next_ || next_ == end_) {
      wrong_ += command != next_ && command != next_ - 1 ? 1 : 0;
      return false;
    }
    seen_ns_.push_back(base::now_ns());
    wrong_ += page_->payload != command * kPushPayload ? 1 : 0;
    ++next_;
    std::atomic_ref<uint64_t>(page_->answer).store(command, std::memory_order_release);
    through_.store(next_ == end_, std::memory_order_release);
    return true;
  }
  bool through() const { return through_.load(std::memory_order_acquire); }
  const std::vector<uint64_t>& seen_ns() const { return seen_ns_; }
  uint64_t wrong() const { return wrong_; }

 private:
  PushPage* const page_;
  uint64_t next_;
  const uint64_t end_;
  std::vector<uint64_t> seen_ns_;
  uint64_t wrong_ = 0;
  std::atomic<bool> through_{false};
};

/// A device whose work is to look at the word, in every turn of its loop.
class LookingPort final : public engine::DevicePort {
 public:
  explicit LookingPort(Observer* observer) : observer_(observer) {}
  bool launch(const engine::LaunchSpec& /*spec*/, const engine::SlotWords& /*words*/,
              engine::PartId* /*part*/) override {
    return false;
  }
  bool poll(engine::PartId /*part*/, engine::Outcome* /*outcome*/) override { return true; }
  void abort(engine::PartId /*part*/, uint32_t /*reason*/) override {}
  bool settle(engine::PartId /*part*/) override { return true; }
  uint32_t missing(engine::PartId /*part*/, base::RankSet* ranks) override {
    *ranks = {};
    return 0;
  }
  bool busy() const override { return true; }  // as while a part exchanges with other nodes
  bool polls() const override { return true; }
  bool tend(uint64_t /*now_ns*/) override { return observer_->look(); }
  void release_words(const engine::SlotWords& /*words*/, uint32_t /*reason*/) override {}

 private:
  Observer* const observer_;
};

class Nobody final : public engine::WakePort, public engine::OpObserver, public transport::LoopObserver {
 public:
  void wake(base::DeviceIndex /*device*/) override {}
  void completed(base::DeviceIndex /*device*/, const engine::Request& /*request*/,
                 const expertd_completion& /*completion*/, const engine::HeldUp& /*held_up*/) override {}
  void beat(base::DeviceIndex /*device*/, uint64_t /*now_ns*/, uint64_t /*lag_ns*/) override {}
  void ring_fill(base::DeviceIndex /*device*/, uint32_t /*used*/, uint32_t /*capacity*/) override {}
};

/// Nothing but looks, with one at the clock now and then.
template <typename There>
void wait_until(const There& there) {
  const uint64_t deadline_ns = base::now_ns() + kLimitNs;
  for (uint32_t looks = 0; !there(); ++looks) {
    if (looks % 4096 == 0 && base::now_ns() > deadline_ns) {
      throw std::runtime_error("the GPU and the host lost each other");
    }
  }
}

void look_alone(Observer* observer) {
  wait_until([observer] { return observer->look() && observer->through(); });
}

void look_in_a_loop(Observer* observer) {
  Nobody nobody;
  LookingPort port(observer);
  auto loop = transport::DeviceLoop::create(base::DeviceIndex{0}, {});
  if (!loop.is_ok() || !loop.value()->start(&port, &nobody, &nobody, &nobody, [](base::SessionId) {}).is_ok()) {
    throw std::runtime_error("the loop of a device does not start");
  }
  const uint64_t deadline_ns = base::now_ns() + kLimitNs;
  while (!observer->through() && base::now_ns() < deadline_ns) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  loop.value()->stop();
}

struct Row {
  std::string what;
  std::vector<double> trips_us;    // empty: there is no way back
  std::vector<double> one_way_us;  // by the clocks
};

double quantile(std::vector<double> values, double share) {
  std::sort(values.begin(), values.end());
  return values.empty() ? 0 : values[static_cast<size_t>(share * static_cast<double>(values.size() - 1))];
}

class Bench {
 public:
  explicit Bench(const Options& options) : options_(options) {
    check_cuda(cudaSetDevice(options.gpu), "cudaSetDevice");
    check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
    void* page = nullptr;
    check_cuda(cudaHostAlloc(&page, sizeof(PushPage), cudaHostAllocPortable), "cudaHostAlloc");
    page_ = new (page) PushPage();
    const uint64_t words = uint64_t{3} * options.commands + 1;
    void* times = nullptr;
    check_cuda(cudaMalloc(&times, words * sizeof(uint64_t)), "cudaMalloc");
    times_ = static_cast<uint64_t*>(times);
    check_cuda(launch_timer_step(times_ + words - 1, stream_), "timer_step");
    check_cuda(cudaMemcpyAsync(&step_ns_, times_ + words - 1, sizeof(step_ns_), cudaMemcpyDeviceToHost, stream_),
               "cudaMemcpyAsync");
    check_cuda(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
  }

  int run() {
    (void)trips("warming up", look_alone);
    Row floor = trips("bare poll", look_alone);
    Row loop = trips("device loop", look_in_a_loop);
    Row words = stream_words();
    return report({std::move(floor), std::move(loop), std::move(words)});
  }

 private:
  Row trips(const char* what, void (*look)(Observer*));
  Row stream_words();
  int report(const std::vector<Row>& rows) const;
  void check_failed() {
    if (load(page_->failed) != 0) {
      throw std::runtime_error("command " + std::to_string(page_->failed) + " had no answer");
    }
  }

  const Options options_;
  cudaStream_t stream_ = nullptr;
  PushPage* page_ = nullptr;
  uint64_t* times_ = nullptr;
  uint64_t step_ns_ = 0;
  uint64_t next_ = 1;
  uint64_t wrong_ = 0;
  double error_us_ = 0;  // the largest of all rows
  double drift_ns_per_s_ = 0;
  std::vector<PushTrip> last_;
};

Row Bench::trips(const char* what, void (*look)(Observer*)) {
  const uint32_t count = options_.commands;
  Observer observer(page_, next_, count);
  const PushJob job{page_, next_, count, options_.pause_ns, times_, times_ + count, times_ + 2 * uint64_t{count}};
  next_ += count;
  check_cuda(launch_push_commands(job, stream_), "push_commands");
  look(&observer);
  check_cuda(cudaStreamSynchronize(stream_), "push_commands");
  check_failed();
  if (!observer.through()) {
    throw std::runtime_error("commands are missing");
  }
  wrong_ += observer.wrong();
  std::vector<uint64_t> times(uint64_t{3} * count);
  check_cuda(cudaMemcpy(times.data(), times_, times.size() * sizeof(uint64_t), cudaMemcpyDeviceToHost), "cudaMemcpy");
  last_.clear();
  double cycles = 0;
  double timer_ns = 0;
  for (uint32_t i = 0; i < count; ++i) {
    last_.push_back({times[i], observer.seen_ns()[i], times[count + i]});
    cycles += static_cast<double>(times[2 * uint64_t{count} + i]);
    timer_ns += static_cast<double>(times[count + i] - times[i]);
  }
  const PushClock clock(last_);
  error_us_ = std::max(error_us_, (clock.error_ns() + static_cast<double>(step_ns_)) / 1e3);
  drift_ns_per_s_ = clock.drift_ns_per_s();
  Row row{what, {}, {}};
  for (uint32_t i = 0; i < count; ++i) {
    // The timer has steps, cycles have none: what a cycle is both say together.
    row.trips_us.push_back(static_cast<double>(times[2 * uint64_t{count} + i]) * timer_ns / cycles / 1e3);
    row.one_way_us.push_back(clock.between(last_[i].sent_ns, last_[i].observed_ns) / 1e3);
  }
  return row;
}

/// A kernel that ends with the time, and behind it the stream's word. The clock is that of trips before and behind.
Row Bench::stream_words() {
  using Write = CUresult (*)(CUstream, CUdeviceptr, cuuint64_t, unsigned int);
  void* const driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  const auto write = driver == nullptr ? nullptr : reinterpret_cast<Write>(dlsym(driver, "cuStreamWriteValue64_v2"));
  if (write == nullptr) {
    throw std::runtime_error("the driver has no cuStreamWriteValue64");
  }
  (void)trips("before", look_alone);
  std::vector<PushTrip> around = last_;
  std::vector<std::pair<uint64_t, uint64_t>> words;  // GPU and host
  for (uint32_t i = 0; i < options_.stream_words; ++i) {
    const uint64_t command = next_++;
    check_cuda(launch_stamp_timer(page_, stream_), "stamp_timer");
    if (write(stream_, reinterpret_cast<CUdeviceptr>(&page_->command), command, 0) != CUDA_SUCCESS) {
      throw std::runtime_error("cuStreamWriteValue64 fails");
    }
    wait_until([&] { return load(page_->command) == command; });
    const uint64_t now_ns = base::now_ns();
    words.emplace_back(load(page_->stamp_ns), now_ns);
  }
  (void)trips("behind", look_alone);
  around.insert(around.end(), last_.begin(), last_.end());
  const PushClock clock(around);
  Row row{"stream word", {}, {}};
  for (const auto& [gpu_ns, host_ns] : words) {
    row.one_way_us.push_back(clock.between(gpu_ns, host_ns) / 1e3);
  }
  return row;
}

int Bench::report(const std::vector<Row>& rows) const {
  cudaDeviceProp properties{};
  check_cuda(cudaGetDeviceProperties(&properties, options_.gpu), "cudaGetDeviceProperties");
  nlohmann::json json = {{"program", "push_observe"},
                         {"date", utc_now()},
                         {"gpu", properties.name},
                         {"commands", options_.commands},
                         {"pause_us", static_cast<double>(options_.pause_ns) / 1e3},
                         {"timer_step_ns", step_ns_},
                         {"drift_ns_per_s", drift_ns_per_s_},
                         {"one_way_error_us", error_us_},
                         {"wrong", wrong_},
                         {"rows", nlohmann::json::array()}};
  if (!options_.as_json) {
    std::printf("%s; %u commands, %.0f us apart; one way by clocks +- %.2f us (timer steps of %llu ns)\n",
                properties.name, options_.commands, static_cast<double>(options_.pause_ns) / 1e3, error_us_,
                static_cast<unsigned long long>(step_ns_));
    std::printf("%-12s %18s %18s %18s\n", "seen by", "trip p50/p99 us", "half p50/p99 us", "one way p50/p99 us");
  }
  for (const Row& row : rows) {
    const double trip[2] = {quantile(row.trips_us, 0.5), quantile(row.trips_us, 0.99)};
    const double way[2] = {quantile(row.one_way_us, 0.5), quantile(row.one_way_us, 0.99)};
    nlohmann::json out = {{"seen_by", row.what}, {"one_way_p50_us", way[0]}, {"one_way_p99_us", way[1]}};
    std::string trips = "-";
    std::string halves = "-";
    if (!row.trips_us.empty()) {
      out["trip_p50_us"] = trip[0];
      out["trip_p99_us"] = trip[1];
      out["half_p50_us"] = trip[0] / 2;
      out["half_p99_us"] = trip[1] / 2;
      trips = fixed(trip[0], 2) + " / " + fixed(trip[1], 2);
      halves = fixed(trip[0] / 2, 2) + " / " + fixed(trip[1] / 2, 2);
    }
    json["rows"].push_back(out);
    if (!options_.as_json) {
      std::printf("%-12s %18s %18s %18s\n", row.what.c_str(), trips.c_str(), halves.c_str(),
                  (fixed(way[0], 2) + " / " + fixed(way[1], 2)).c_str());
    }
  }
  if (options_.as_json) {
    std::printf("%s\n", json.dump(2).c_str());
  }
  if (wrong_ != 0) {
    std::fprintf(stderr, "push_observe: %llu commands were not as they were sent\n",
                 static_cast<unsigned long long>(wrong_));
    return 1;
  }
  return 0;
}

int run(const Options& options) {
  int count = 0;
  const cudaError_t found = cudaGetDeviceCount(&count);
  if (found != cudaSuccess || count <= options.gpu) {
    std::fprintf(stderr, "push_observe: there is no GPU %d here: %s\n", options.gpu,
                 found != cudaSuccess ? cudaGetErrorString(found) : "too few GPUs");
    return kNoGpu;
  }
  return Bench(options).run();
}

}  // namespace
}  // namespace expertd::bench

int main(int count, char** arguments) {
  expertd::bench::Options options;
  CLI::App app{"How long a command of a GPU is under way until a thread of the host has seen it"};
  app.add_option("--gpu", options.gpu)->check(CLI::Range(0, 63))->capture_default_str();
  app.add_option("--commands", options.commands)->check(CLI::Range(1'000, 1'000'000))->capture_default_str();
  app.add_option("--stream-words", options.stream_words)->check(CLI::Range(1, 1'000'000))->capture_default_str();
  app.add_option("--pause-ns", options.pause_ns, "between an answer and the next command")
      ->check(CLI::Range(0, 1'000'000))
      ->capture_default_str();
  app.add_flag("--json", options.as_json);
  CLI11_PARSE(app, count, arguments);
  try {
    return expertd::bench::run(options);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "push_observe: %s\n", error.what());
    return 1;
  }
}
