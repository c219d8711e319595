// SPDX-License-Identifier: Apache-2.0
#include "tests/bench/table/gate.h"

#include <cuda.h>
#include <dlfcn.h>

#include <string>

#include "tests/bench/cuda_check.h"

namespace expertd::bench {

namespace {

using WaitValue = CUresult (*)(CUstream, CUdeviceptr, cuuint32_t, unsigned int);

}  // namespace

Gate::Gate() {
  // The runtime has loaded the driver; linking it would keep the program from starting where there is none.
  void* const driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  wait_value_ = driver == nullptr ? nullptr : dlsym(driver, "cuStreamWaitValue32_v2");
  if (wait_value_ == nullptr) {
    throw std::runtime_error("the GPU driver has no cuStreamWaitValue32_v2; CUDA 12 or newer is needed");
  }
  void* word = nullptr;
  check_cuda(cudaHostAlloc(&word, sizeof(*word_), cudaHostAllocPortable | cudaHostAllocMapped), "cudaHostAlloc");
  word_ = static_cast<uint32_t*>(word);
  *word_ = 0;
}

Gate::~Gate() {
  open_all();
  static_cast<void>(cudaFreeHost(word_));  // at the end of the program, where a failure harms nobody
}

void Gate::park(cudaStream_t stream, uint32_t round) const {
  void* word = nullptr;
  check_cuda(cudaHostGetDevicePointer(&word, word_, 0), "cudaHostGetDevicePointer");
  const CUresult result = reinterpret_cast<WaitValue>(wait_value_)(stream, reinterpret_cast<CUdeviceptr>(word), round,
                                                                   CU_STREAM_WAIT_VALUE_GEQ);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuStreamWaitValue32: error " + std::to_string(result));
  }
}

// Never back: after a failure one rank may still open its round when another has opened all.
void Gate::open(uint32_t round) {
  std::atomic_ref<uint32_t> word(*word_);
  uint32_t before = word.load(std::memory_order_relaxed);
  while (static_cast<int32_t>(round - before) > 0 && !word.compare_exchange_weak(before, round)) {
  }
}

void Gate::open_all() {
  const uint32_t last = first_round() + kRoundsMax;
  open(last);
  first_round_.store(last + 1, std::memory_order_release);
}

}  // namespace expertd::bench
