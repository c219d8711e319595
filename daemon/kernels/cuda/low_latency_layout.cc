// SPDX-License-Identifier: Apache-2.0
// Where things lie in a low-latency buffer, and what fits it. Without CUDA, so that it is built and tested everywhere.
#include <algorithm>

#include "daemon/kernels/cuda/part_params.h"
#include "daemon/kernels/numerics.h"

namespace expertd::kernels::cuda {
namespace {

constexpr uint64_t kLeastSideBytes = 256;  // of a dispatched token, for rows of bytes with a side of their own

uint64_t align_up(uint64_t bytes, uint64_t unit) {
  return (bytes + unit - 1) / unit * unit;
}

}  // namespace

LowLatencyLayout low_latency_layout(const OpShape& shape, uint32_t table_top_k) {
  LowLatencyLayout layout;
  uint64_t at = 0;
  const auto place = [&at](uint64_t bytes) {
    const uint64_t begin = at;
    at = align_up(at + bytes, 256);
    return begin;
  };
  const uint64_t tokens = uint64_t{shape.ranks} * shape.max_tokens;
  const uint64_t scales = shape.hidden / kScaleGroup * sizeof(float);
  // Whole lines, so that no two rows share one.
  layout.row_stride = align_up(2ull * shape.hidden + std::max(scales, kLeastSideBytes), 128);
  layout.dispatch_rows = place(tokens * layout.row_stride);
  layout.dispatch_lanes = place(tokens * table_top_k * sizeof(RoutedLane));
  layout.combine_rows = place(tokens * shape.hidden * 2);
  layout.bytes = at;
  return layout;
}

bool fits_low_latency(const OpShape& shape, const LowLatencyLayout& layout) {
  const uint64_t side = shape.payload == Payload::kFp8 ? shape.hidden / kScaleGroup * sizeof(float)
                                                       : uint64_t{shape.side_elements} * shape.side_element_bytes;
  return shape.out_row_bytes + side <= layout.row_stride;
}

}  // namespace expertd::kernels::cuda
