// SPDX-License-Identifier: Apache-2.0
// The memory of one rank of a group on a GPU, as far as it is arithmetic: where each table lies, how many handles fit,
// what is pinned behind the relay, and what a plan says of it.
#include "daemon/device/cuda/group_layout.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "daemon/kernels/cuda/arm_params.h"

namespace expertd::device::cuda {
namespace {

constexpr uint64_t kMiB = 1ULL << 20;

engine::GroupShape shape_of(uint32_t ranks, uint32_t experts, uint32_t hidden, uint32_t top_k, uint32_t max_tokens) {
  engine::GroupShape shape;
  shape.ranks = ranks;
  shape.experts = experts;
  shape.hidden = hidden;
  shape.top_k = top_k;
  shape.max_tokens = max_tokens;
  return shape;
}

const engine::GroupShape kShapes[] = {shape_of(1, 1, 128, 1, 1), shape_of(2, 64, 2048, 4, 100),
                                      shape_of(8, 256, 7168, 8, 4096), shape_of(16, 2048, 16384, 32, 65536)};

uint64_t matrix_bytes(const engine::GroupShape& shape) {
  return uint64_t{shape.ranks} * (shape.ranks + shape.experts + 4) * 4;
}

TEST(GroupLayoutOfAGpu, KeepsItsTablesApartAlignedAndInside) {
  for (engine::GroupShape shape : kShapes) {
    SCOPED_TRACE(shape.max_tokens);
    shape.low_latency = true;
    shape.capture_lanes = 2;
    const uint32_t pages = engine::kExchangePages + 2 * kLanePages;
    const GroupLayout layout = group_layout(shape, 7);
    const uint64_t chunks = (shape.max_tokens + 63) / 64;
    std::vector<std::pair<uint64_t, uint64_t>> tables = {
        {layout.sync_pages, pages * sizeof(kernels::cuda::SyncPage)},
        {layout.counts, pages * layout.counts_page_bytes},
        {layout.low_latency, (2 + 2 * kLanePages) * layout.low_latency_bytes},
        {layout.handles, layout.handle_count * layout.handle_bytes}};
    for (const ScratchLayout& scratch : layout.scratch) {
      tables.push_back({scratch.plan, sizeof(kernels::cuda::Plan)});
      tables.push_back({scratch.chunk_counts, chunks * (shape.ranks + shape.experts) * 4});
      tables.push_back({scratch.chunk_errors, chunks * 4});
      tables.push_back({scratch.left_blocks, kernels::cuda::kMostLinkSms * 8});
    }
    for (const LaneLayout& lane : layout.lanes) {
      tables.push_back({lane.state, sizeof(kernels::cuda::LaneState)});
      tables.push_back({lane.arm_states, kArms * sizeof(kernels::cuda::PartState)});
      tables.push_back(
          {lane.entries, kLanePages * kernels::cuda::kMostCapturedEntries * sizeof(kernels::cuda::PartParams)});
    }
    std::sort(tables.begin(), tables.end());
    uint64_t end = 0;
    for (const auto& [offset, bytes] : tables) {
      EXPECT_EQ(offset % 256, 0U);
      EXPECT_GE(offset, end);
      end = offset + bytes;
    }
    EXPECT_LE(end, layout.total_bytes);
    EXPECT_GE(layout.counts_page_bytes, matrix_bytes(shape));
    EXPECT_LE(layout.counts + pages * layout.counts_page_bytes, layout.shared_bytes);
    EXPECT_LE(layout.shared_bytes, layout.scratch[0].plan) << "what peers write is in front of the rest";
    EXPECT_GE(layout.handle_rows, matrix_bytes(shape));
    EXPECT_GE(layout.handle_bytes,
              layout.handle_rows + uint64_t{shape.max_tokens} * (shape.ranks + 2 * shape.top_k) * 4);
  }
}

TEST(GroupLayoutOfAGpu, StagesLowLatencyOnlyWhereItIsServed) {
  for (engine::GroupShape shape : kShapes) {
    const GroupLayout without = group_layout(shape, 7);
    EXPECT_EQ(without.low_latency_bytes, 0U);
    shape.low_latency = true;
    const GroupLayout layout = group_layout(shape, 7);
    const uint64_t rows = uint64_t{shape.ranks} * shape.max_tokens;
    EXPECT_GE(layout.low_latency_bytes, rows * (2 * (2ULL * shape.hidden) + 8ULL * shape.top_k));
    EXPECT_GE(layout.total_bytes, without.total_bytes + 2 * layout.low_latency_bytes);
    EXPECT_EQ(layout.handle_count, without.handle_count);
  }
}

TEST(GroupLayoutOfAGpu, PlacesALowLatencyBuffer) {
  for (const engine::GroupShape& shape : kShapes) {
    kernels::OpShape op;
    op.ranks = shape.ranks;
    op.hidden = shape.hidden;
    op.max_tokens = shape.max_tokens;
    op.out_row_bytes = 2 * shape.hidden;
    const kernels::cuda::LowLatencyLayout layout = kernels::cuda::low_latency_layout(op, shape.top_k);
    const uint64_t rows = uint64_t{shape.ranks} * shape.max_tokens;
    EXPECT_EQ(layout.row_stride % 128, 0U);
    EXPECT_GE(layout.dispatch_lanes, layout.dispatch_rows + rows * layout.row_stride);
    EXPECT_GE(layout.combine_rows, layout.dispatch_lanes + rows * shape.top_k * 8);
    EXPECT_GE(layout.bytes, layout.combine_rows + rows * shape.hidden * 2);
    EXPECT_TRUE(fits_low_latency(op, layout));
    op.payload = kernels::Payload::kFp8;
    op.out_row_bytes = shape.hidden;
    EXPECT_TRUE(fits_low_latency(op, layout));
    op.payload = kernels::Payload::kBytes;
    op.out_row_bytes = static_cast<uint32_t>(layout.row_stride);
    EXPECT_TRUE(fits_low_latency(op, layout));
    op.side_elements = 1;
    op.side_element_bytes = 1;
    EXPECT_FALSE(fits_low_latency(op, layout));
  }
}

TEST(GroupLayoutOfAGpu, HasAsManyHandlesAsAskedForOrFitAndNeverNone) {
  EXPECT_EQ(group_layout(kShapes[1], 512).handle_count, 512U);
  EXPECT_EQ(group_layout(kShapes[1], 0).handle_count, 1U);
  const GroupLayout large = group_layout(kShapes[3], 512);
  EXPECT_EQ(large.handle_count, kMaxHandleTableBytes / large.handle_bytes);
  EXPECT_LT(large.handle_count, 512U);
  EXPECT_LE(large.handle_count * large.handle_bytes, 256 * kMiB);
}

TEST(GroupLayoutOfAGpu, PinsTheSharedTablesAndTheRelay) {
  for (const engine::GroupShape& shape : kShapes) {
    SCOPED_TRACE(shape.max_tokens);
    const GroupLayout layout = group_layout(shape, 7);
    EXPECT_EQ(pinned_bytes(layout), layout.shared_bytes + layout.relay_bytes);
    const uint64_t rows = uint64_t{shape.max_tokens} * shape.ranks * shape.top_k;
    EXPECT_GE(layout.relay_bytes, rows * (2 * shape.hidden + 4)) << "every row of a combine";
    kernels::OpShape dispatch;
    dispatch.kind = kernels::OpKind::kDispatch;
    dispatch.ranks = shape.ranks;
    dispatch.top_k = shape.top_k;
    dispatch.hidden = shape.hidden;
    dispatch.max_tokens = shape.max_tokens;
    dispatch.row_bytes = 2 * shape.hidden;
    dispatch.side_elements = 1024;
    dispatch.side_element_bytes = 4;
    EXPECT_GE(layout.relay_bytes, kernels::cuda::relay_layout(dispatch, shape.top_k).bytes);
  }
}

TEST(GroupMemoryOfAGpu, IsThatOfTheAllocation) {
  for (const engine::GroupShape& shape : kShapes) {
    SCOPED_TRACE(shape.max_tokens);
    const GroupLayout layout = group_layout(shape, 512);
    const uint64_t allocated = (layout.total_bytes + 2 * kMiB - 1) / (2 * kMiB) * (2 * kMiB);
    const GroupMemory memory = group_memory(layout, allocated, false);
    EXPECT_EQ(memory.table_bytes + memory.handle_bytes, allocated);
    EXPECT_EQ(memory.handle_count, layout.handle_count);
    EXPECT_EQ(memory.handle_bytes, layout.handle_count * layout.handle_bytes);
    EXPECT_EQ(memory.pinned_bytes, 0U);
    const GroupMemory relayed = group_memory(layout, allocated, true);
    EXPECT_EQ(relayed.pinned_bytes, pinned_bytes(layout));
    EXPECT_EQ(relayed.table_bytes, memory.table_bytes) << "the tables stay on the GPU as well";
  }
}

}  // namespace
}  // namespace expertd::device::cuda
