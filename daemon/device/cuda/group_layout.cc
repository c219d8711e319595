// SPDX-License-Identifier: Apache-2.0
#include "daemon/device/cuda/group_layout.h"

#include <algorithm>

#include "daemon/kernels/cuda/arm_params.h"
#include "proto/abi/executor_v1.h"

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
  const bool spans_nodes = shape.placement != nullptr;  // its lanes have their tables in the host's memory
  const uint32_t lanes = shape.low_latency || spans_nodes ? std::min(shape.capture_lanes, kMaxGroupLanes) : 0;
  const uint32_t pages = engine::kExchangePages + lanes * kLanePages;
  layout.sync_pages = place(pages * sizeof(kernels::cuda::SyncPage));
  layout.counts_page_bytes = align_up(matrix_bytes(shape));
  layout.counts = place(pages * layout.counts_page_bytes);
  layout.shared_bytes = at;
  kernels::OpShape widest;
  widest.ranks = shape.ranks;
  widest.hidden = shape.hidden;
  widest.max_tokens = shape.max_tokens;
  layout.relay_bytes = kernels::cuda::relay_bytes(widest, shape.top_k);
  for (uint32_t i = 0; i <= lanes; ++i) {
    ScratchLayout& scratch = layout.scratch[i];
    scratch.plan = place(sizeof(kernels::cuda::Plan));
    scratch.chunk_counts = place(chunks * (uint64_t{shape.ranks} + shape.experts) * sizeof(int32_t));
    scratch.chunk_errors = place(chunks * sizeof(uint32_t));
    scratch.plan_work = place(sizeof(kernels::cuda::PlanWork));
    scratch.block_rows = place(kernels::cuda::kMostLinkSms * sizeof(kernels::cuda::BlockRows));
    scratch.rows = place(uint64_t{shape.max_tokens} * shape.ranks * sizeof(int32_t));
    scratch.left_blocks = place(kernels::cuda::kMostLinkSms * sizeof(uint64_t));
  }
  for (uint32_t i = 0; i < lanes; ++i) {
    layout.lanes[i].state = place(sizeof(kernels::cuda::LaneState));
    layout.lanes[i].arm_states = place(kArms * sizeof(kernels::cuda::PartState));
    const uint64_t entries = spans_nodes ? 0 : uint64_t{kLanePages} * kernels::cuda::kMostCapturedEntries;
    layout.lanes[i].entries = place(entries * sizeof(kernels::cuda::PartParams));
  }
  if (shape.low_latency) {
    layout.low_latency_bytes = kernels::cuda::low_latency_layout(widest, shape.top_k).bytes;
    layout.low_latency = place((kLowLatencyBuffers + lanes * kLanePages) * layout.low_latency_bytes);
  }
  const uint64_t per_token = (shape.ranks + 2ull * shape.top_k) * sizeof(int32_t);
  layout.handle_rows = align_up(matrix_bytes(shape));
  layout.handle_bytes = align_up(layout.handle_rows + shape.max_tokens * per_token);
  const uint64_t fitting = std::max<uint64_t>(kMaxHandleTableBytes / layout.handle_bytes, 1);
  layout.handle_count = static_cast<uint32_t>(std::min<uint64_t>(std::max(handle_limit, 1u), fitting));
  layout.handles = place(layout.handle_count * layout.handle_bytes);
  layout.total_bytes = at;
  return layout;
}

CopyLayout copy_layout(const engine::GroupShape& shape) {
  CopyLayout layout;
  if ((shape.copies & EXPERTD_COPIES_LL) != 0) {
    const expertd_exchange_shape exchanged{shape.ranks, shape.experts, shape.hidden, shape.max_tokens, shape.top_k};
    layout.low_latency = expertd_exchange_layout_of(&exchanged);
  }
  if ((shape.copies & EXPERTD_COPIES_HT) != 0) {
    const expertd_exchange_ht_shape exchanged{shape.ranks, shape.experts, shape.hidden, shape.max_tokens, shape.top_k};
    layout.ht = expertd_exchange_ht_layout_of(&exchanged);
  }
  layout.ht_offset = layout.low_latency.total_bytes;
  layout.total_bytes = layout.ht_offset + layout.ht.total_bytes;
  return layout;
}

uint64_t pinned_bytes(const GroupLayout& layout) {
  return layout.shared_bytes + layout.relay_bytes;
}

GroupMemory group_memory(const GroupLayout& layout, uint64_t allocated_bytes, bool relayed) {
  GroupMemory memory;
  memory.handle_bytes = layout.handle_count * layout.handle_bytes;
  memory.handle_count = layout.handle_count;
  memory.table_bytes = allocated_bytes - memory.handle_bytes;
  memory.pinned_bytes = relayed ? pinned_bytes(layout) : 0;
  return memory;
}

}  // namespace expertd::device::cuda
