// SPDX-License-Identifier: Apache-2.0
// What a chain of copies costs beyond its bytes: two GPUs copy to each other at the same time, as the daemon's chains
// of high throughput do, in pieces, with words between them, on one stream or two. Every form is a list of steps; all
// of it is enqueued behind a gate, so that no host is in the times, and the slower GPU counts. Every byte and word is
// verified. Usage: link_chain [MEGABYTES ITERATIONS]
#include <cuda.h>
#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "tests/bench/cuda_check.h"
#include "tests/bench/link_copy.h"

namespace {

using expertd::bench::check_cuda;
using expertd::bench::LinkCopy;

constexpr uint32_t kWarmup = 10;
constexpr uint32_t kStreams = 3;
constexpr uint32_t kChunksMax = 8;
constexpr uint64_t kSmallBytes[] = {16384, 65536, 122880, 122880};  // what travels beside rows
constexpr uint64_t kEighth = 8;

enum class Kind : uint32_t {
  kRows,       // eighths [first, last) of the bytes
  kSmall,      // all small copies
  kTell,       // word `first` of the peer
  kTellBoth,   // and of this GPU, in one submission
  kTellCopy,   // word `first` of the peer by a copy of 8 bytes
  kMark,       // local word `first`
  kAwait,      // the same
  kRecord,     // event `first`
  kAwaitEvent  // the same
};

struct Step {
  uint32_t stream = 0;
  Kind kind = Kind::kRows;
  uint32_t first = 0;
  uint32_t last = 0;
};

struct Form {
  std::string name;
  std::vector<Step> steps;
  bool small = false;
};

/// On a GPU. `told` is written by the peer.
struct Words {
  uint64_t told[kChunksMax];
  uint64_t marks[kChunksMax];
  uint64_t own[kChunksMax];
  uint64_t sources[kChunksMax];  // of copies of 8 bytes
};

class DriverWords {
 public:
  DriverWords() {
    // The runtime has loaded the driver; linking it would keep the program from starting where there is none.
    void* const driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    call_ = driver == nullptr ? nullptr : reinterpret_cast<Call>(dlsym(driver, "cuStreamBatchMemOp_v2"));
    if (call_ == nullptr) {
      throw std::runtime_error("the GPU driver has no cuStreamBatchMemOp_v2; CUDA 12 or newer is needed");
    }
  }
  void write(const void* address, uint64_t value) {
    CUstreamBatchMemOpParams& entry = entries_[count_++];
    entry = {};
    entry.writeValue.operation = CU_STREAM_MEM_OP_WRITE_VALUE_64;
    entry.writeValue.address = reinterpret_cast<CUdeviceptr>(address);
    entry.writeValue.value64 = value;
  }
  void wait(const void* address, uint64_t value) {
    CUstreamBatchMemOpParams& entry = entries_[count_++];
    entry = {};
    entry.waitValue.operation = CU_STREAM_MEM_OP_WAIT_VALUE_64;
    entry.waitValue.address = reinterpret_cast<CUdeviceptr>(address);
    entry.waitValue.value64 = value;
    entry.waitValue.flags = CU_STREAM_WAIT_VALUE_GEQ;
  }
  void send(cudaStream_t stream) {
    const CUresult result = call_(stream, count_, entries_, 0);
    count_ = 0;
    if (result != CUDA_SUCCESS) {
      throw std::runtime_error("cuStreamBatchMemOp: error " + std::to_string(result));
    }
  }

 private:
  using Call = CUresult (*)(CUstream, unsigned int, CUstreamBatchMemOpParams*, unsigned int);
  Call call_ = nullptr;
  CUstreamBatchMemOpParams entries_[2 * kChunksMax] = {};
  uint32_t count_ = 0;
};

struct Gpu {
  int index = 0;
  std::unique_ptr<LinkCopy> rows;
  std::unique_ptr<LinkCopy> small;
  cudaStream_t streams[kStreams] = {};
  cudaEvent_t events[kChunksMax] = {};
  cudaEvent_t begin = nullptr;
  cudaEvent_t end = nullptr;
  Words* words = nullptr;
  Words* peer_words = nullptr;
};

uint64_t value_of(uint64_t round, uint32_t chunk) {
  return round * kChunksMax + chunk;
}

class Probe {
 public:
  explicit Probe(uint64_t bytes);
  /// Prints a line. The words that differ.
  uint64_t measure(const Form& form, uint32_t iterations);

 private:
  void open(int index, uint64_t bytes);
  void enqueue(const Gpu& gpu, const Form& form);
  void take(const Gpu& gpu, const Step& step);
  void run_once(const Form& form, double* us, double* host_us);
  uint64_t wrong_words(const Form& form, uint64_t seed);

  DriverWords words_;
  std::vector<Gpu> gpus_;
  uint64_t eighth_bytes_;
  uint64_t* gate_ = nullptr;  // pinned
  uint64_t round_ = 0;
  uint64_t seed_ = 0;
};

Probe::Probe(uint64_t bytes) : eighth_bytes_(bytes / kEighth) {
  void* gate = nullptr;
  check_cuda(cudaHostAlloc(&gate, sizeof(*gate_), cudaHostAllocPortable | cudaHostAllocMapped), "cudaHostAlloc");
  gate_ = static_cast<uint64_t*>(gate);
  *gate_ = 0;
  for (const int index : {0, 1}) {
    open(index, bytes);
  }
  gpus_[0].peer_words = gpus_[1].words;
  gpus_[1].peer_words = gpus_[0].words;
}

void Probe::open(int index, uint64_t bytes) {
  Gpu gpu;
  gpu.index = index;
  check_cuda(cudaSetDevice(index), "cudaSetDevice");
  gpu.rows = std::make_unique<LinkCopy>(index, 1 - index, bytes);
  uint64_t small = 0;
  for (const uint64_t one : kSmallBytes) {
    small += one;
  }
  gpu.small = std::make_unique<LinkCopy>(index, 1 - index, small);
  int least = 0;
  int greatest = 0;
  check_cuda(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
  for (cudaStream_t& stream : gpu.streams) {
    check_cuda(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest), "cudaStreamCreate");
  }
  for (cudaEvent_t& event : gpu.events) {
    check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
  }
  check_cuda(cudaEventCreate(&gpu.begin), "cudaEventCreate");
  check_cuda(cudaEventCreate(&gpu.end), "cudaEventCreate");
  check_cuda(cudaMalloc(reinterpret_cast<void**>(&gpu.words), sizeof(Words)), "cudaMalloc");
  check_cuda(cudaMemset(gpu.words, 0, sizeof(Words)), "cudaMemset");
  gpus_.push_back(std::move(gpu));
}

void Probe::take(const Gpu& gpu, const Step& step) {
  const cudaStream_t stream = gpu.streams[step.stream];
  const uint64_t value = value_of(round_, step.first + 1);
  switch (step.kind) {
    case Kind::kRows:
      gpu.rows->enqueue_range(stream, step.first * eighth_bytes_, (step.last - step.first) * eighth_bytes_);
      return;
    case Kind::kSmall: {
      uint64_t at = 0;
      for (const uint64_t bytes : kSmallBytes) {
        gpu.small->enqueue_range(stream, at, bytes);
        at += bytes;
      }
      return;
    }
    case Kind::kTell:
    case Kind::kTellBoth:
      words_.write(&gpu.peer_words->told[step.first], value);
      if (step.kind == Kind::kTellBoth) {
        words_.write(&gpu.words->own[step.first], value);
      }
      words_.send(stream);
      return;
    case Kind::kTellCopy:
      check_cuda(cudaMemcpyAsync(&gpu.peer_words->told[step.first], &gpu.words->sources[step.first], sizeof(uint64_t),
                                 cudaMemcpyDefault, stream),
                 "cudaMemcpyAsync");
      return;
    case Kind::kMark:
      words_.write(&gpu.words->marks[step.first], value);
      words_.send(stream);
      return;
    case Kind::kAwait:
      words_.wait(&gpu.words->marks[step.first], value);
      words_.send(stream);
      return;
    case Kind::kRecord:
      check_cuda(cudaEventRecord(gpu.events[step.first], stream), "cudaEventRecord");
      return;
    case Kind::kAwaitEvent:
      check_cuda(cudaStreamWaitEvent(stream, gpu.events[step.first], 0), "cudaStreamWaitEvent");
      return;
  }
}

/// The last step is on the first stream, and joins the others.
void Probe::enqueue(const Gpu& gpu, const Form& form) {
  for (uint32_t chunk = 0; chunk < kChunksMax; ++chunk) {
    words_.write(&gpu.words->sources[chunk], value_of(round_, chunk + 1));
  }
  words_.send(gpu.streams[0]);
  void* gate = nullptr;
  check_cuda(cudaHostGetDevicePointer(&gate, gate_, 0), "cudaHostGetDevicePointer");
  for (const cudaStream_t stream : gpu.streams) {
    words_.wait(gate, round_);
    words_.send(stream);
  }
  check_cuda(cudaEventRecord(gpu.begin, gpu.streams[0]), "cudaEventRecord");
  for (const Step& step : form.steps) {
    take(gpu, step);
  }
  check_cuda(cudaEventRecord(gpu.end, gpu.streams[0]), "cudaEventRecord");
}

/// Of the slower GPU, and what a host takes to enqueue one GPU's steps.
void Probe::run_once(const Form& form, double* us, double* host_us) {
  using Clock = std::chrono::steady_clock;
  ++round_;
  *us = 0;
  for (const Gpu& gpu : gpus_) {
    check_cuda(cudaSetDevice(gpu.index), "cudaSetDevice");
    const Clock::time_point before = Clock::now();
    enqueue(gpu, form);
    *host_us = std::chrono::duration<double, std::micro>(Clock::now() - before).count();
  }
  std::atomic_ref<uint64_t>(*gate_).store(round_, std::memory_order_release);
  for (const Gpu& gpu : gpus_) {
    check_cuda(cudaSetDevice(gpu.index), "cudaSetDevice");
    check_cuda(cudaDeviceSynchronize(), "the copies");
    float ms = 0;
    check_cuda(cudaEventElapsedTime(&ms, gpu.begin, gpu.end), "cudaEventElapsedTime");
    *us = std::max(*us, static_cast<double>(ms) * 1e3);
  }
}

uint64_t Probe::wrong_words(const Form& form, uint64_t seed) {
  uint64_t wrong = 0;
  for (const Gpu& gpu : gpus_) {
    wrong += gpu.rows->wrong_words(seed + static_cast<uint64_t>(gpu.index));
    wrong += form.small ? gpu.small->wrong_words(seed + static_cast<uint64_t>(gpu.index)) : 0;
    Words words{};
    check_cuda(cudaMemcpy(&words, gpu.peer_words, sizeof(words), cudaMemcpyDefault), "cudaMemcpy");
    for (const Step& step : form.steps) {
      const bool tells = step.kind == Kind::kTell || step.kind == Kind::kTellBoth || step.kind == Kind::kTellCopy;
      wrong += tells && words.told[step.first] != value_of(round_, step.first + 1) ? 1 : 0;
    }
  }
  return wrong;
}

uint64_t Probe::measure(const Form& form, uint32_t iterations) {
  seed_ += gpus_.size();
  for (const Gpu& gpu : gpus_) {
    gpu.rows->prepare(seed_ + static_cast<uint64_t>(gpu.index));
    gpu.small->prepare(seed_ + static_cast<uint64_t>(gpu.index));
  }
  std::vector<double> times;
  std::vector<double> host;
  for (uint32_t i = 0; i < kWarmup + iterations; ++i) {
    double us = 0;
    double host_us = 0;
    run_once(form, &us, &host_us);
    if (i >= kWarmup) {
      times.push_back(us);
      host.push_back(host_us);
    }
  }
  std::sort(times.begin(), times.end());
  std::sort(host.begin(), host.end());
  const size_t p99 = std::min(times.size() - 1, times.size() * 99 / 100);
  std::printf("%-66s %8.1f %8.1f %8.1f\n", form.name.c_str(), times[times.size() / 2], times[p99],
              host[host.size() / 2]);
  std::fflush(stdout);
  return wrong_words(form, seed_);
}

/// Chunks that end at these eighths, the words behind them of this kind, on `streams` streams in turn.
Form chunks(std::string name, const std::vector<uint32_t>& ends, const Kind* tell, uint32_t streams) {
  Form form;
  form.name = std::move(name);
  uint32_t first = 0;
  for (uint32_t c = 0; c < ends.size(); ++c) {
    const uint32_t stream = c % streams;
    form.steps.push_back({stream, Kind::kRows, first, ends[c]});
    if (tell != nullptr) {
      form.steps.push_back({stream, *tell, c, 0});
    }
    first = ends[c];
  }
  if (streams > 1) {  // the last chunk that is not of the first stream is the last of its stream
    const uint32_t last = static_cast<uint32_t>(ends.size()) - 1;
    const uint32_t other = last % streams == 0 ? last - 1 : last;
    form.steps.push_back({other % streams, Kind::kMark, other, 0});
    form.steps.push_back({0, Kind::kAwait, other, 0});
  }
  return form;
}

/// A chunk is told only when those before it were, by whichever stream.
Form told_in_order(const std::vector<uint32_t>& ends) {
  Form form;
  form.name = "5 chunks, words, two streams in turn, told in order";
  uint32_t first = 0;
  for (uint32_t c = 0; c < ends.size(); ++c) {
    form.steps.push_back({c % 2, Kind::kRows, first, ends[c]});
    if (c != 0) {
      form.steps.push_back({c % 2, Kind::kAwait, c - 1, 0});
    }
    form.steps.push_back({c % 2, Kind::kTell, c, 0});
    form.steps.push_back({c % 2, Kind::kMark, c, 0});
    first = ends[c];
  }
  return form;  // the last of five is on the first stream, behind all others
}

/// One stream copies and records events, another tells behind them.
Form told_aside(const std::vector<uint32_t>& ends) {
  Form form;
  form.name = "5 chunks, events, words by another stream";
  uint32_t first = 0;
  for (uint32_t c = 0; c < ends.size(); ++c) {
    form.steps.push_back({0, Kind::kRows, first, ends[c]});
    form.steps.push_back({0, Kind::kRecord, c, 0});
    form.steps.push_back({1, Kind::kAwaitEvent, c, 0});
    form.steps.push_back({1, Kind::kTell, c, 0});
    first = ends[c];
  }
  form.steps.push_back({1, Kind::kMark, 0, 0});
  form.steps.push_back({0, Kind::kAwait, 0, 0});
  return form;
}

/// Two pieces of rows and the small copies, none of them, on the rows' stream or on another; one word at the end.
Form beside(std::string name, uint32_t small_stream, bool small) {
  Form form;
  form.name = std::move(name);
  form.small = small;
  form.steps.push_back({0, Kind::kRows, 0, 2});
  if (small && small_stream != 0) {
    form.steps.push_back({small_stream, Kind::kSmall, 0, 0});
    form.steps.push_back({small_stream, Kind::kMark, 0, 0});
  }
  form.steps.push_back({0, Kind::kRows, 2, kEighth});
  if (small && small_stream == 0) {
    form.steps.push_back({0, Kind::kSmall, 0, 0});
  } else if (small) {
    form.steps.push_back({0, Kind::kAwait, 0, 0});
  }
  form.steps.push_back({0, Kind::kTell, 0, 0});
  return form;
}

std::vector<Form> all_forms() {
  const std::vector<uint32_t> five = {2, 4, 6, 7, 8};
  const std::vector<uint32_t> ends = {1, 3, 5, 7, 8};
  const std::vector<uint32_t> eight = {1, 2, 3, 4, 5, 6, 7, 8};
  const Kind tell = Kind::kTell;
  const Kind both = Kind::kTellBoth;
  const Kind by_copy = Kind::kTellCopy;
  return {
      chunks("one copy", {8}, nullptr, 1),
      chunks("one copy, a word to the peer", {8}, &tell, 1),
      chunks("two halves on two streams at once", {4, 8}, nullptr, 2),
      chunks("5 chunks (2 2 2 1 1 eighths)", five, nullptr, 1),
      chunks("5 chunks, a word to the peer behind each", five, &tell, 1),
      chunks("5 chunks, words to the peer and to the own GPU behind each", five, &both, 1),
      chunks("5 chunks, a copy of 8 bytes to the peer behind each", five, &by_copy, 1),
      chunks("5 chunks, two streams in turn", five, nullptr, 2),
      chunks("5 chunks, a word to the peer behind each, two streams in turn", five, &tell, 2),
      told_in_order(five),
      told_aside(five),
      chunks("5 chunks (1 2 2 2 1), a word to the peer behind each", ends, &tell, 1),
      chunks("5 chunks (1 2 2 2 1), words, two streams in turn", ends, &tell, 2),
      chunks("8 chunks, a word to the peer behind each", eight, &tell, 1),
      chunks("8 chunks, words, two streams in turn", eight, &tell, 2),
      beside("2 pieces (2 6), a word at the end", 0, false),
      beside("2 pieces, 4 small copies behind them, a word", 0, true),
      beside("2 pieces, 4 small copies on a second stream, a word", 1, true),
  };
}

int run(int argc, char** argv) {
  int count = 0;
  check_cuda(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  if (count < 2) {
    std::fprintf(stderr, "link_chain: %d GPU here, two are needed\n", count);
    return 69;
  }
  const double megabytes = argc > 1 ? std::atof(argv[1]) : 58.5;
  const uint32_t iterations = argc > 2 ? static_cast<uint32_t>(std::atoi(argv[2])) : 200;
  const uint64_t bytes = static_cast<uint64_t>(megabytes * 1e6) / (kEighth * 512) * (kEighth * 512);
  if (bytes == 0 || iterations == 0) {
    std::fprintf(stderr, "usage: link_chain [MEGABYTES ITERATIONS]\n");
    return 64;
  }
  Probe probe(bytes);
  char head[80];
  std::snprintf(head, sizeof(head), "%llu bytes from GPU 0 to 1 and from 1 to 0",
                static_cast<unsigned long long>(bytes));
  std::printf("%-66s %8s %8s %8s\n", head, "p50 us", "p99 us", "host us");
  for (const Form& form : all_forms()) {
    const uint64_t wrong = probe.measure(form, iterations);
    if (wrong != 0) {
      std::printf("link_chain: %llu words differ\n", static_cast<unsigned long long>(wrong));
      return 1;
    }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "link_chain: %s\n", error.what());
    return 69;
  }
}
