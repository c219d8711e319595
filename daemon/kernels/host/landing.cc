// SPDX-License-Identifier: Apache-2.0
#include "daemon/kernels/host/landing.h"

#include <cstddef>
#include <cstring>

#include "daemon/kernels/host/tables.h"
#include "daemon/kernels/numerics.h"

namespace expertd::kernels::host {
namespace {

template <typename Element>
void gather_side(const char* in, int64_t stride, uint32_t elements, char* out) {
  for (uint32_t i = 0; i < elements; ++i) {
    std::memcpy(out + size_t{i} * sizeof(Element), in + static_cast<int64_t>(i) * stride, sizeof(Element));
  }
}

void land_side(const OpShape& shape, const LandingRow& from, void* out_side, uint64_t row) {
  const size_t bytes = size_t{shape.side_elements} * shape.side_element_bytes;
  if (from.side == nullptr || out_side == nullptr || bytes == 0) {
    return;
  }
  copy_side(shape, from.side, from.side_stride, static_cast<char*>(out_side) + row * bytes);
}

/// Scales into the column-major tensor of their destination.
void land_scales(const OpShape& shape, const LandingRow& from, void* out_side, uint64_t expert, uint64_t row) {
  if (out_side == nullptr) {
    return;
  }
  const uint64_t words = scale_words(shape);
  const uint64_t slots = shape.slots_per_expert;
  auto* out = static_cast<uint32_t*>(out_side) + expert * slots * words + row;
  for (uint64_t word = 0; word < words; ++word) {
    out[word * slots] = from.scales[word];
  }
}

void store_index(const OpShape& shape, void* out_topk_idx, uint64_t index, int64_t local) {
  if (out_topk_idx == nullptr) {
    return;
  }
  if (shape.topk_idx_bytes == 4) {
    static_cast<int32_t*>(out_topk_idx)[index] = static_cast<int32_t>(local);
  } else {
    static_cast<int64_t*>(out_topk_idx)[index] = local;
  }
}

/// The top-k of a whole token as its destination sees it: local experts, -1 for those of other ranks.
void store_top_k(const OpShape& shape, const LandingRow& from, const PeerView& peer, uint32_t rank, uint64_t row) {
  const int64_t first = static_cast<int64_t>(rank) * shape.local_experts;
  for (uint32_t lane = 0; lane < shape.top_k; ++lane) {
    const uint64_t to = row * shape.top_k + lane;
    const int64_t local = from.topk[lane] - first;
    const bool owned = from.topk[lane] >= 0 && local >= 0 && local < static_cast<int64_t>(shape.local_experts);
    store_index(shape, peer.out_topk_idx, to, owned ? local : -1);
    if (from.weights != nullptr && peer.out_topk_weights != nullptr) {
      const bool zero = !owned && shape.zero_foreign_weights != 0;
      peer.out_topk_weights[to] = zero ? 0.0f : from.weights[lane];
    }
  }
}

}  // namespace

void pack_scales(const OpShape& shape, const float* scales, uint32_t* words) {
  const uint32_t count = scale_words(shape);
  if (shape.scale != ScaleForm::kUe8m0) {
    std::memcpy(words, scales, size_t{count} * sizeof(uint32_t));
    return;
  }
  for (uint32_t word = 0; word < count; ++word) {
    const float* four = scales + size_t{word} * 4;
    words[word] = uint32_t{scale_to_ue8m0(four[0])} | uint32_t{scale_to_ue8m0(four[1])} << 8 |
                  uint32_t{scale_to_ue8m0(four[2])} << 16 | uint32_t{scale_to_ue8m0(four[3])} << 24;
  }
}

void copy_side(const OpShape& shape, const char* side, int64_t stride, char* out) {
  if (stride == static_cast<int64_t>(shape.side_element_bytes)) {
    std::memcpy(out, side, size_t{shape.side_elements} * shape.side_element_bytes);
  } else if (shape.side_element_bytes == 1) {
    gather_side<uint8_t>(side, stride, shape.side_elements, out);
  } else if (shape.side_element_bytes == 2) {
    gather_side<uint16_t>(side, stride, shape.side_elements, out);
  } else {
    gather_side<uint32_t>(side, stride, shape.side_elements, out);
  }
}

bool land_token(const OpShape& shape, const LandingRow& from, const PeerView& peer, uint32_t rank, uint64_t row) {
  // The outputs are a client's and end with its capacity, which check_matrix held against the rows of a matrix. Rows of
  // a handle were numbered for other outputs, so each is held against these once more.
  if (row >= peer.capacity_rows || peer.out_x == nullptr) {
    return false;
  }
  std::memcpy(static_cast<char*>(peer.out_x) + row * shape.out_row_bytes, from.payload, shape.out_row_bytes);
  land_side(shape, from, peer.out_side, row);
  if (shape.cached == 0) {
    store_top_k(shape, from, peer, rank, row);
    if (peer.out_src_info != nullptr) {
      peer.out_src_info[row] = static_cast<int32_t>(from.token);
    }
  }
  return true;
}

bool land_lane(const OpShape& shape, const LandingRow& from, const PeerView& peer, uint32_t lane, uint64_t row) {
  const uint64_t local = static_cast<uint32_t>(from.topk[lane]) % shape.local_experts;
  const uint64_t slot = is_ll(shape) ? local * shape.slots_per_expert + row : row;
  if (row >= (is_ll(shape) ? shape.slots_per_expert : peer.capacity_rows) || peer.out_x == nullptr) {
    return false;  // as in land_token
  }
  std::memcpy(static_cast<char*>(peer.out_x) + slot * shape.out_row_bytes, from.payload, shape.out_row_bytes);
  if (shape.payload == Payload::kFp8) {
    land_scales(shape, from, peer.out_side, local, row);
  } else {
    land_side(shape, from, peer.out_side, slot);
  }
  if (shape.cached != 0) {
    return true;
  }
  if (peer.out_src_info != nullptr) {
    peer.out_src_info[slot] = static_cast<int32_t>(from.token);
  }
  if (!is_ll(shape)) {
    store_index(shape, peer.out_topk_idx, slot, static_cast<int64_t>(local));
    if (from.weights != nullptr && peer.out_topk_weights != nullptr) {
      peer.out_topk_weights[slot] = from.weights[lane];
    }
  }
  return true;
}

}  // namespace expertd::kernels::host
