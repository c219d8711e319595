// SPDX-License-Identifier: Apache-2.0
// The stores by which a kernel of the library says that its operation has ended.
#pragma once

#include "client/src/local_kernels/layout_params.h"
#include "client/src/local_kernels/ptx.cuh"

namespace expertd::client {

/// By one thread, behind a barrier of its block and what made it see the other blocks' work. The fence pairs with the
/// acquire loads of seq by the host (LocalOps) and by waiting streams: who sees seq sees the outputs and the record.
__device__ inline void publish(LocalScratch* scratch, LocalRecord* record, uint64_t seq) {
  __threadfence_system();
  store_relaxed_sys(&record->seq, seq);
  store_relaxed_sys(&scratch->seq, seq);
}

}  // namespace expertd::client
