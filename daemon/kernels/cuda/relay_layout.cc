// SPDX-License-Identifier: Apache-2.0
// Where things lie in a rank's relay (relay.cu), and how large it is. Without CUDA, so that it is built and tested
// everywhere.
#include <algorithm>

#include "daemon/kernels/cuda/part_params.h"

namespace expertd::kernels::cuda {
namespace {

constexpr uint64_t kLeastRowBytes = 4096;   // of a dispatch, for rows of bytes that are longer than 2 * hidden
constexpr uint64_t kLeastSideBytes = 4096;  // of a dispatch, per token

uint64_t align_up(uint64_t bytes) {
  return (bytes + 255) / 256 * 256;
}

}  // namespace

RelayLayout relay_layout(const OpShape& shape, uint32_t table_top_k) {
  RelayLayout layout;
  uint64_t at = 0;
  const auto place = [&at](uint64_t bytes) {
    const uint64_t begin = at;
    at = align_up(at + bytes);
    return begin;
  };
  const uint64_t tokens = shape.max_tokens;
  if (shape.kind == OpKind::kCombine || shape.kind == OpKind::kLlCombine) {
    layout.rows = tokens * shape.ranks * table_top_k;
    place(layout.rows * shape.hidden * 2);
    layout.weights = place(layout.rows * sizeof(float));
  } else {
    place(tokens * shape.row_bytes);
    layout.weights = place(tokens * shape.top_k * sizeof(float));
    layout.topk = place(tokens * table_top_k * sizeof(int32_t));
    layout.token_rank = place(tokens * shape.ranks * sizeof(int32_t));
    layout.token_expert = place(tokens * table_top_k * sizeof(int32_t));
    layout.side = place(tokens * shape.side_elements * shape.side_element_bytes);
  }
  layout.bytes = at;
  return layout;
}

uint64_t relay_bytes(const OpShape& shape, uint32_t table_top_k) {
  OpShape widest = shape;
  widest.top_k = table_top_k;
  widest.kind = OpKind::kCombine;
  const uint64_t combine = relay_layout(widest, table_top_k).bytes;
  widest.kind = OpKind::kDispatch;
  widest.row_bytes = static_cast<uint32_t>(std::max<uint64_t>(2ull * shape.hidden, kLeastRowBytes));
  widest.side_elements = kLeastSideBytes;
  widest.side_element_bytes = 1;
  return std::max(combine, relay_layout(widest, table_top_k).bytes);
}

}  // namespace expertd::kernels::cuda
