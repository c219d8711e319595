// SPDX-License-Identifier: Apache-2.0
// bf16 and FP8 as the operations define them, computed on their own so that the daemon's kernels are held to a second
// implementation. Pure, any thread.
#pragma once

#include <cstdint>
#include <span>

namespace expertd::ctl {

inline constexpr uint32_t kScaleChannels = 128;

float bf16_to_float(uint16_t bits);
/// Round to nearest even. `value` is finite.
uint16_t float_to_bf16(float value);
/// E4M3 without infinities: round to nearest even, saturating at 448. `value` is no NaN.
uint8_t float_to_e4m3(float value);

enum class ScaleKind { kFloat, kRounded, kUe8m0 };

/// One row to E4M3 in groups of 128 channels. `scales` gets the bits of a float per group, or the exponent byte.
void quantise_row(std::span<const uint16_t> row, ScaleKind kind, std::span<uint8_t> payload,
                  std::span<uint32_t> scales);

}  // namespace expertd::ctl
