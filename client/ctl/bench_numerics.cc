// SPDX-License-Identifier: Apache-2.0
#include "client/ctl/bench_numerics.h"

#include <algorithm>
#include <bit>
#include <cmath>

namespace expertd::ctl {

namespace {

constexpr float kLargest = 448.0f;
constexpr float kSmallestAmax = 1e-4f;
constexpr float kSmallestNormal = 0x1p-6f;
constexpr float kSubnormalSteps = 0x1p9f;  // per 1.0
constexpr float kUnitsOnly = 0x1p23f;
constexpr uint8_t kLargestCode = 0x7e;
constexpr int kDroppedBits = 20;                      // mantissa bits of a float behind the three of E4M3
constexpr uint32_t kBiasDifference = (127 - 7) << 3;  // exponent biases, in units of a code's exponent field
constexpr int kExponentBias = 127;

/// The next power of two at or above a positive normal value.
float next_power_of_two(float value) {
  int exponent = 0;
  const float fraction = std::frexp(value, &exponent);  // value = fraction * 2^exponent, fraction in [0.5, 1)
  return std::ldexp(1.0f, fraction == 0.5f ? exponent - 1 : exponent);
}

}  // namespace

float bf16_to_float(uint16_t bits) {
  return std::bit_cast<float>(uint32_t{bits} << 16);
}

uint16_t float_to_bf16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

uint8_t float_to_e4m3(float value) {
  const auto sign = static_cast<uint8_t>((std::bit_cast<uint32_t>(value) >> 24) & 0x80);
  const float size = std::fabs(value);
  if (size >= kLargest) {
    return sign | kLargestCode;
  }
  if (size < kSmallestNormal) {
    // The sum keeps no bit behind the units, so it rounds to the nearest, and its last bits are the number of steps.
    return sign | static_cast<uint8_t>(std::bit_cast<uint32_t>(size * kSubnormalSteps + kUnitsOnly));
  }
  uint32_t bits = std::bit_cast<uint32_t>(size);
  bits += (1u << (kDroppedBits - 1)) - 1 + ((bits >> kDroppedBits) & 1);
  const uint32_t code = (bits >> kDroppedBits) - kBiasDifference;
  return sign | static_cast<uint8_t>(std::min<uint32_t>(code, kLargestCode));
}

void quantise_row(std::span<const uint16_t> row, ScaleKind kind, std::span<uint8_t> payload,
                  std::span<uint32_t> scales) {
  for (size_t group = 0; group < row.size() / kScaleChannels; ++group) {
    const auto channels = row.subspan(group * kScaleChannels, kScaleChannels);
    float amax = kSmallestAmax;
    for (const uint16_t bits : channels) {
      amax = std::max(amax, std::fabs(bf16_to_float(bits)));
    }
    float scale = amax / kLargest;
    if (kind != ScaleKind::kFloat) {
      scale = next_power_of_two(scale);
    }
    for (size_t i = 0; i < channels.size(); ++i) {
      payload[group * kScaleChannels + i] = float_to_e4m3(bf16_to_float(channels[i]) / scale);
    }
    scales[group] = kind == ScaleKind::kUe8m0 ? static_cast<uint32_t>(std::ilogb(scale) + kExponentBias)
                                              : std::bit_cast<uint32_t>(scale);
  }
}

}  // namespace expertd::ctl
