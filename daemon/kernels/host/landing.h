// SPDX-License-Identifier: Apache-2.0
// How a row lands in the outputs of its destination, whether the source's loop thread copies it there or it came in a
// message of another node. Pure functions; loop threads. Rows of different sources never overlap.
#pragma once

#include <cstdint>

#include "daemon/base/limits.h"
#include "daemon/kernels/op_params.h"

namespace expertd::kernels::host {

/// A token's row with all that lands beside it.
struct LandingRow {
  uint32_t token = 0;                // of its source rank
  const void* payload = nullptr;     // out_row_bytes
  const int32_t* topk = nullptr;     // [K] global ids, -1 for none
  const float* weights = nullptr;    // [K]; null: none travel
  const char* side = nullptr;        // side_elements of the shape; null: none travel
  int64_t side_stride = 0;           // bytes from one element to the next
  const uint32_t* scales = nullptr;  // FP8: scale_words() as they land
};

/// Words of an FP8 row's scales as they land: floats, or four exponent bytes each.
inline uint32_t scale_words(const OpShape& shape) {
  return shape.hidden / 128 / (shape.scale == ScaleForm::kUe8m0 ? 4 : 1);
}
/// From the scales of a row's groups to those words.
void pack_scales(const OpShape& shape, const float* scales, uint32_t* words);

/// One side row, from any stride between its elements to row-major.
void copy_side(const OpShape& shape, const char* side, int64_t stride, char* out);

/// Lands a whole token in row `row` of `rank`, whose outputs are `peer`'s. False: they end before it.
bool land_token(const OpShape& shape, const LandingRow& from, const PeerView& peer, uint32_t rank, uint64_t row);
/// Lands the row of one lane (expanded form, LL), whose expert the peer owns. `row` as in Routing::token_expert.
bool land_lane(const OpShape& shape, const LandingRow& from, const PeerView& peer, uint32_t lane, uint64_t row);

}  // namespace expertd::kernels::host
