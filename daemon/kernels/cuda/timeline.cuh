// SPDX-License-Identifier: Apache-2.0
// How a link kernel writes its timeline. Included by the kernels' .cu files, each of which has a timeline of its own;
// without EXPERTD_KERNEL_TIMELINE the functions are empty.
#pragma once

#include "daemon/kernels/cuda/device_common.cuh"
#include "daemon/kernels/cuda/timeline.h"

namespace expertd::kernels::cuda {
namespace {

#ifdef EXPERTD_KERNEL_TIMELINE

__device__ Timeline timeline_of_kernel;

/// The block has come to a phase; the first lane of every calling warp says so, and the last of them counts.
__device__ __forceinline__ void stamp(Stamp phase) {
  if ((threadIdx.x & 31) == 0) {
    atomicMax(reinterpret_cast<unsigned long long*>(&timeline_of_kernel.ns[blockIdx.x][static_cast<uint32_t>(phase)]),
              global_timer_ns());
  }
}

inline cudaError_t take_timeline(Timeline* timeline) {
  void* memory = nullptr;
  cudaError_t error = cudaGetSymbolAddress(&memory, timeline_of_kernel);
  error = error == cudaSuccess ? cudaMemcpy(timeline, memory, sizeof(Timeline), cudaMemcpyDeviceToHost) : error;
  error = error == cudaSuccess ? cudaMemset(memory, 0, sizeof(Timeline)) : error;
  return error == cudaSuccess ? cudaDeviceSynchronize() : error;
}

#else

__device__ __forceinline__ void stamp(Stamp) {}

inline cudaError_t take_timeline(Timeline*) {
  return cudaErrorNotSupported;
}

#endif

}  // namespace
}  // namespace expertd::kernels::cuda
