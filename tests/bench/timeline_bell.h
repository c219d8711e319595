// SPDX-License-Identifier: Apache-2.0
// Rings doorbells on several GPUs at one moment, for measurements from one process. One thread.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace expertd::bench {

/// What one thread on a GPU does: when the word `gate`, of the host, is at least `value`, it writes `value` into
/// `doorbell`. It gives up after a second.
struct BellRope {
  const uint64_t* gate = nullptr;
  uint64_t* doorbell = nullptr;
  uint64_t value = 0;
};

/// On the current device.
cudaError_t hang_bell(const BellRope& rope, cudaStream_t stream);

}  // namespace expertd::bench
