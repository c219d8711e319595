// SPDX-License-Identifier: Apache-2.0
// Kernels that stand for a client's computation: an amount of work on a stated number of multiprocessors, and a time
// that passes. Enqueued by a rank's thread whose device is current. Failures are thrown as std::runtime_error.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace expertd::bench {

/// Multiply-adds of every thread of `blocks` full blocks, one to a multiprocessor where nothing else runs, `rounds`
/// times. Work and no time: beside something else that takes multiprocessors it takes longer.
void enqueue_multiply_adds(cudaStream_t stream, uint32_t blocks, uint32_t rounds, float* sink);
/// One thread looks at the GPU's timer until the time has passed.
void enqueue_passing_time(cudaStream_t stream, uint64_t ns);

}  // namespace expertd::bench
