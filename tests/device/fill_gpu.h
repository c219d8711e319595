// SPDX-License-Identifier: Apache-2.0
// A kernel that takes places of the GPU until it is told to go. Device tests only, any thread.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace expertd::device_test {

/// Takes all multiprocessors but `places` of them, until *word (page-locked) is not 0, for 10 s at most. Nothing else
/// that has a block of shared memory fits beside.
cudaError_t fill_gpu(uint32_t places, const uint32_t* word, cudaStream_t stream);

}  // namespace expertd::device_test
