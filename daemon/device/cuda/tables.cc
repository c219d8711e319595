// SPDX-License-Identifier: Apache-2.0
#include "daemon/device/cuda/tables.h"

#include <algorithm>

namespace expertd::device::cuda {
namespace {

constexpr uint64_t kAlign = 256;

uint64_t align_up(uint64_t value) {
  return (value + kAlign - 1) / kAlign * kAlign;
}

uint64_t matrix_bytes(const engine::GroupShape& shape) {
  return uint64_t{shape.ranks} * kernels::count_row_ints(shape.ranks, shape.experts) * sizeof(int32_t);
}

}  // namespace

GroupLayout group_layout(const engine::GroupShape& shape, uint32_t handle_limit) {
  GroupLayout layout;
  const uint64_t chunks = kernels::cuda::route_chunks(shape.max_tokens);
  uint64_t at = 0;
  const auto place = [&at](uint64_t bytes) {
    const uint64_t begin = at;
    at = align_up(at + bytes);
    return begin;
  };
  layout.sync_pages = place(engine::kExchangePages * sizeof(kernels::cuda::SyncPage));
  layout.counts_page_bytes = align_up(matrix_bytes(shape));
  layout.counts = place(engine::kExchangePages * layout.counts_page_bytes);
  layout.shared_bytes = at;
  kernels::OpShape widest;
  widest.ranks = shape.ranks;
  widest.hidden = shape.hidden;
  widest.max_tokens = shape.max_tokens;
  layout.relay_bytes = kernels::cuda::relay_bytes(widest, shape.top_k);
  layout.plan = place(sizeof(kernels::cuda::Plan));
  layout.chunk_counts = place(chunks * (uint64_t{shape.ranks} + shape.experts) * sizeof(int32_t));
  layout.chunk_errors = place(chunks * sizeof(uint32_t));
  const uint64_t per_token = (shape.ranks + 2ull * shape.top_k) * sizeof(int32_t);
  layout.handle_bytes = align_up(align_up(matrix_bytes(shape)) + shape.max_tokens * per_token);
  const uint64_t fitting = std::max<uint64_t>(kMaxHandleTableBytes / layout.handle_bytes, 1);
  layout.handle_count = static_cast<uint32_t>(std::min<uint64_t>(std::max(handle_limit, 1u), fitting));
  layout.handles = place(layout.handle_count * layout.handle_bytes);
  layout.total_bytes = at;
  return layout;
}

kernels::Routing GroupEntry::routing(uint32_t handle) const {
  kernels::Routing routing;
  const CUdeviceptr base = memory->address() + layout.handles + handle * layout.handle_bytes;
  routing.counts = reinterpret_cast<int32_t*>(base);
  routing.token_rank = reinterpret_cast<int32_t*>(base + align_up(matrix_bytes(shape)));
  routing.token_expert = routing.token_rank + uint64_t{shape.max_tokens} * shape.ranks;
  routing.topk = routing.token_expert + uint64_t{shape.max_tokens} * shape.top_k;
  return routing;
}

kernels::cuda::PartScratch GroupEntry::scratch() const {
  kernels::cuda::PartScratch scratch;
  scratch.plan = reinterpret_cast<kernels::cuda::Plan*>(memory->address() + layout.plan);
  scratch.chunk_counts = reinterpret_cast<int32_t*>(memory->address() + layout.chunk_counts);
  scratch.chunk_errors = reinterpret_cast<uint32_t*>(memory->address() + layout.chunk_errors);
  return scratch;
}

}  // namespace expertd::device::cuda
