// SPDX-License-Identifier: Apache-2.0
// FP8 on the way: sixteen channels per lane of a warp, eight lanes per scale. Device code only, included by the
// dispatch kernels; no state. Definitions: daemon/kernels/README.md.
#pragma once

#include "daemon/kernels/cuda/device_common.cuh"

namespace expertd::kernels::cuda {

inline constexpr uint32_t kChannelsPerLane = 16;  // one 16-byte store per lane, eight lanes per scale

/// Sixteen codes and the scale that the lane's group of 128 channels shares.
struct QuantisedLane {
  uint4 codes;
  float scale;
};

/// Whole warp; a lane without channels gives zeros.
__device__ inline QuantisedLane quantise_lane(const uint4& low, const uint4& high, ScaleForm form) {
  const Bf16x8 halves[2] = {to_bf16x8(low), to_bf16x8(high)};
  float amax = 0.0f;
#pragma unroll
  for (uint32_t i = 0; i < kChannelsPerLane; ++i) {
    amax = fmaxf(amax, fabsf(element(halves[i / 8], i % 8)));
  }
#pragma unroll
  for (int step = 1; step < 8; step *= 2) {
    amax = fmaxf(amax, __shfl_xor_sync(kFullWarp, amax, step));
  }
  const float scale = fp8_scale(amax, form);
  uint32_t words[4] = {};
#pragma unroll
  for (uint32_t i = 0; i < kChannelsPerLane; ++i) {
    const uint32_t code = float_to_e4m3(divide_exact(element(halves[i / 8], i % 8), scale));
    words[i / 4] |= code << (8 * (i % 4));
  }
  return {uint4{words[0], words[1], words[2], words[3]}, scale};
}

/// The exponent bytes of the four groups of one warp, the first group's in the lowest byte; the same for all lanes.
__device__ inline uint32_t pack_ue8m0(float scale) {
  const uint32_t exponent = scale_to_ue8m0(scale);
  uint32_t word = 0;
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    word |= __shfl_sync(kFullWarp, exponent, static_cast<int>(i * 8)) << (8 * i);
  }
  return word;
}

}  // namespace expertd::kernels::cuda
