// SPDX-License-Identifier: Apache-2.0
#include "tests/bench/table/gate.h"

#include <cuda.h>
#include <dlfcn.h>

#include <string>

#include "tests/bench/bench_figures.h"
#include "tests/bench/cuda_check.h"

namespace expertd::bench {

namespace {

/// cuStreamWaitValue32 and cuStreamWriteValue32 alike.
using ValueCall = CUresult (*)(CUstream, CUdeviceptr, cuuint32_t, unsigned int);

void* find_call(void* driver, const char* name) {
  void* const call = driver == nullptr ? nullptr : dlsym(driver, name);
  if (call == nullptr) {
    throw std::runtime_error(std::string("the GPU driver has no ") + name + "; CUDA 12 or newer is needed");
  }
  return call;
}

void enqueue_value(void* call, const char* name, cudaStream_t stream, uint32_t* place, uint32_t value,
                   unsigned int flags) {
  const CUresult result = reinterpret_cast<ValueCall>(call)(stream, reinterpret_cast<CUdeviceptr>(place), value, flags);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error(std::string(name) + ": error " + std::to_string(result));
  }
}

}  // namespace

Gate::Gate() {
  // The runtime has loaded the driver; linking it would keep the program from starting where there is none.
  void* const driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  wait_value_ = find_call(driver, "cuStreamWaitValue32_v2");
  write_value_ = find_call(driver, "cuStreamWriteValue32_v2");
  void* word = nullptr;
  check_cuda(cudaHostAlloc(&word, sizeof(*word_), cudaHostAllocPortable | cudaHostAllocMapped), "cudaHostAlloc");
  word_ = static_cast<uint32_t*>(word);
  *word_ = 0;
}

Gate::~Gate() {
  open_all();
  static_cast<void>(cudaFreeHost(word_));  // at the end of the program, where a failure harms nobody
}

uint32_t* Gate::device_word() const {
  void* word = nullptr;
  check_cuda(cudaHostGetDevicePointer(&word, word_, 0), "cudaHostGetDevicePointer");
  return static_cast<uint32_t*>(word);
}

void Gate::park(cudaStream_t stream, uint32_t round) const {
  enqueue_value(wait_value_, "cuStreamWaitValue32", stream, device_word(), round, CU_STREAM_WAIT_VALUE_GEQ);
}

void Gate::write(cudaStream_t stream, uint32_t* place, uint32_t value) const {
  enqueue_value(write_value_, "cuStreamWriteValue32", stream, place, value, CU_STREAM_WRITE_VALUE_DEFAULT);
}

// Never back: after a failure one rank may still open its round when another has opened all.
void Gate::open(uint32_t round) {
  std::atomic_ref<uint32_t> word(*word_);
  uint32_t before = word.load(std::memory_order_relaxed);
  // Released by the exchange below; a rank reads it when its stream has gone through.
  opened_ns_.store(now_ns(), std::memory_order_release);
  while (static_cast<int32_t>(round - before) > 0 && !word.compare_exchange_weak(before, round)) {
  }
}

void Gate::open_all() {
  const uint32_t last = first_round() + kRoundsMax;
  open(last);
  first_round_.store(last + 1, std::memory_order_release);
}

}  // namespace expertd::bench
