// SPDX-License-Identifier: Apache-2.0
#include "daemon/device/cuda/tables.h"

namespace expertd::device::cuda {

kernels::Routing GroupEntry::routing(uint32_t handle) const {
  kernels::Routing routing;
  const CUdeviceptr base = memory->address() + layout.handles + handle * layout.handle_bytes;
  routing.counts = reinterpret_cast<int32_t*>(base);
  routing.token_rank = reinterpret_cast<int32_t*>(base + layout.handle_rows);
  routing.token_expert = routing.token_rank + uint64_t{shape.max_tokens} * shape.ranks;
  routing.topk = routing.token_expert + uint64_t{shape.max_tokens} * shape.top_k;
  return routing;
}

kernels::cuda::PartScratch GroupEntry::scratch(uint32_t stream) const {
  const ScratchLayout& at = layout.scratch[stream];
  const CUdeviceptr base = memory->address();
  kernels::cuda::PartScratch scratch;
  scratch.plan = reinterpret_cast<kernels::cuda::Plan*>(base + at.plan);
  scratch.chunk_counts = reinterpret_cast<int32_t*>(base + at.chunk_counts);
  scratch.chunk_errors = reinterpret_cast<uint32_t*>(base + at.chunk_errors);
  scratch.plan_work = reinterpret_cast<kernels::cuda::PlanWork*>(base + at.plan_work);
  scratch.block_rows = reinterpret_cast<kernels::cuda::BlockRows*>(base + at.block_rows);
  scratch.rows = reinterpret_cast<int32_t*>(base + at.rows);
  scratch.left_blocks = reinterpret_cast<uint64_t*>(base + at.left_blocks);
  return scratch;
}

}  // namespace expertd::device::cuda
