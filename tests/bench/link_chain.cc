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
#include "tests/bench/link_chain_forms.h"
#include "tests/bench/link_copy.h"

namespace {

using expertd::bench::all_chain_forms;
using expertd::bench::check_cuda;
using Form = expertd::bench::ChainForm;
using Step = expertd::bench::ChainStep;
using Kind = expertd::bench::ChainStepKind;
using expertd::bench::kEighth;
using expertd::bench::LinkCopy;

constexpr uint32_t kWarmup = 10;
constexpr uint32_t kStreams = 3;
constexpr uint32_t kChunksMax = 8;
constexpr uint64_t kSmallBytes[] = {16384, 65536, 122880, 122880};  // what travels beside rows

/// On a GPU. `told` is written by the peer.
struct Words {
  uint64_t told[kChunksMax];
  uint64_t marks[kChunksMax];
  uint64_t own[kChunksMax];
  uint64_t sources[kChunksMax];  // of copies of 8 bytes
};

/// Found in the driver that the runtime has loaded; linking it would keep the program from starting where there is
/// none.
template <typename Call>
Call find_call(const char* name) {
  void* const driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  return driver == nullptr ? nullptr : reinterpret_cast<Call>(dlsym(driver, name));
}

void check_driver(CUresult result, const char* what) {
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error(std::string(what) + ": error " + std::to_string(result));
  }
}

class DriverWords {
 public:
  DriverWords() : call_(find_call<Call>("cuStreamBatchMemOp_v2")) {
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
    check_driver(result, "cuStreamBatchMemOp");
  }

 private:
  using Call = CUresult (*)(CUstream, unsigned int, CUstreamBatchMemOpParams*, unsigned int);
  const Call call_;
  CUstreamBatchMemOpParams entries_[2 * kChunksMax] = {};
  uint32_t count_ = 0;
};

/// Copies of one call, in any order.
class CopyBatch {
 public:
  CopyBatch() : call_(find_call<Call>("cuMemcpyBatchAsync_v2")) {}
  bool is_there() const { return call_ != nullptr; }
  void add(const LinkCopy& copy, uint64_t first_byte, uint64_t bytes) {
    to_.push_back(copy.target(first_byte));
    from_.push_back(copy.source(first_byte));
    bytes_.push_back(bytes);
  }
  void send(cudaStream_t stream) {
    CUmemcpyAttributes attributes{};
    attributes.srcAccessOrder = CU_MEMCPY_SRC_ACCESS_ORDER_STREAM;
    attributes.flags = CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE;
    size_t first = 0;
    check_driver(call_(to_.data(), from_.data(), bytes_.data(), to_.size(), &attributes, &first, 1, stream),
                 "cuMemcpyBatchAsync");
    to_.clear();
    from_.clear();
    bytes_.clear();
  }

 private:
  using Call = CUresult (*)(CUdeviceptr*, CUdeviceptr*, size_t*, size_t, CUmemcpyAttributes*, size_t*, size_t,
                            CUstream);
  const Call call_;
  std::vector<CUdeviceptr> to_;
  std::vector<CUdeviceptr> from_;
  std::vector<size_t> bytes_;
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
  bool has_batches() const { return batch_.is_there(); }

 private:
  void open(int index, uint64_t bytes);
  void enqueue(const Gpu& gpu, const Form& form);
  void take(const Gpu& gpu, const Step& step);
  void take_small(const Gpu& gpu, const Step& step);
  void run_once(const Form& form, double* us, double* host_us);
  uint64_t wrong_words(const Form& form, uint64_t seed);

  DriverWords words_;
  CopyBatch batch_;
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

void Probe::take_small(const Gpu& gpu, const Step& step) {
  const cudaStream_t stream = gpu.streams[step.stream];
  if (step.kind == Kind::kSmallOnce) {
    gpu.small->enqueue_range(stream, 0, gpu.small->bytes());
    return;
  }
  if (step.kind == Kind::kBatch) {
    batch_.add(*gpu.rows, step.first * eighth_bytes_, (step.last - step.first) * eighth_bytes_);
  }
  uint64_t at = 0;
  for (const uint64_t bytes : kSmallBytes) {
    if (step.kind == Kind::kBatch) {
      batch_.add(*gpu.small, at, bytes);
    } else {
      gpu.small->enqueue_range(stream, at, bytes);
    }
    at += bytes;
  }
  if (step.kind == Kind::kBatch) {
    batch_.send(stream);
  }
}

void Probe::take(const Gpu& gpu, const Step& step) {
  const cudaStream_t stream = gpu.streams[step.stream];
  const uint64_t value = value_of(round_, step.first + 1);
  switch (step.kind) {
    case Kind::kRows:
      gpu.rows->enqueue_range(stream, step.first * eighth_bytes_, (step.last - step.first) * eighth_bytes_);
      return;
    case Kind::kSmall:
    case Kind::kSmallOnce:
    case Kind::kBatch:
      take_small(gpu, step);
      return;
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
  for (const Form& form : all_chain_forms(probe.has_batches())) {
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
