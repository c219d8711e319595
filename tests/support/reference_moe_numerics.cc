// SPDX-License-Identifier: Apache-2.0
// Reference conversions: every one goes through exact doubles and a search for the nearest representable value.
#include <algorithm>
#include <array>
#include <cmath>

#include "tests/support/reference_moe.h"

namespace expertd::support {
namespace {

/// The 127 finite magnitudes of e4m3fn by code: four exponent bits with bias 7, three mantissa bits, code 0x7f is NaN.
std::array<double, 127> make_e4m3_magnitudes() {
  std::array<double, 127> magnitudes{};
  for (int code = 0; code < 127; ++code) {
    const int exponent = code / 8;
    const int mantissa = code % 8;
    magnitudes[static_cast<size_t>(code)] =
        exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  }
  return magnitudes;
}

const std::array<double, 127>& e4m3_magnitudes() {
  static const std::array<double, 127> magnitudes = make_e4m3_magnitudes();
  return magnitudes;
}

float power_of_two_not_below(float scale) {
  if (std::isinf(scale)) {
    return scale;
  }
  int exponent = 0;
  const float fraction = std::frexp(scale, &exponent);  // [0.5, 1)
  return std::ldexp(1.0f, fraction == 0.5f ? exponent - 1 : exponent);
}

}  // namespace

float reference_bf16_to_float(uint16_t value) {
  const bool negative = (value & 0x8000) != 0;
  const int exponent = (value >> 7) & 0xff;
  const int mantissa = value & 0x7f;
  double magnitude = 0;
  if (exponent == 0xff) {
    magnitude = mantissa == 0 ? HUGE_VAL : std::nan("");
  } else if (exponent == 0) {
    magnitude = std::ldexp(mantissa, -126 - 7);
  } else {
    magnitude = std::ldexp(128 + mantissa, exponent - 127 - 7);
  }
  return static_cast<float>(std::copysign(magnitude, negative ? -1.0 : 1.0));
}

uint16_t reference_float_to_bf16(float value) {
  const auto sign = static_cast<uint16_t>(std::signbit(value) ? 0x8000 : 0);
  if (std::isnan(value)) {
    return 0x7fff;
  }
  // The double of the magnitude in units of bf16's last place, rounded half to even by nearbyint.
  const double magnitude = std::fabs(static_cast<double>(value));
  if (std::isinf(magnitude)) {
    return static_cast<uint16_t>(sign | 0x7f80);
  }
  if (magnitude == 0) {
    return sign;
  }
  int exponent = 0;
  std::frexp(magnitude, &exponent);  // magnitude in [2^(exponent-1), 2^exponent)
  const int unit = std::max(exponent - 8, -126 - 7);
  const double units = std::nearbyint(std::ldexp(magnitude, -unit));
  // Codes of positive bf16 values are consecutive, also across binades and into infinity.
  const int code = static_cast<int>(units) + (unit + 126 + 7) * 128;
  return static_cast<uint16_t>(sign | std::min(code, 0x7f80));
}

float reference_e4m3_to_float(uint8_t code) {
  const int magnitude_code = code & 0x7f;
  if (magnitude_code == 0x7f) {
    return std::nanf("");
  }
  const double magnitude = e4m3_magnitudes()[static_cast<size_t>(magnitude_code)];
  return static_cast<float>((code & 0x80) != 0 ? -magnitude : magnitude);
}

uint8_t reference_float_to_e4m3(float value) {
  if (std::isnan(value)) {
    return 0x7f;
  }
  const auto sign = static_cast<uint8_t>(std::signbit(value) ? 0x80 : 0);
  const double magnitude = std::fabs(static_cast<double>(value));
  const auto& table = e4m3_magnitudes();
  const auto above = std::lower_bound(table.begin(), table.end(), magnitude);
  if (above == table.end()) {
    return static_cast<uint8_t>(sign | 0x7e);
  }
  auto code = static_cast<size_t>(above - table.begin());
  if (*above != magnitude) {
    const double up = *above - magnitude;
    const double down = magnitude - *(above - 1);
    if (down < up || (down == up && code % 2 == 1)) {
      --code;
    }
  }
  return static_cast<uint8_t>(sign | code);
}

QuantisedRow reference_quantise(const uint16_t* row, uint32_t hidden, kernels::ScaleForm form) {
  QuantisedRow result;
  for (uint32_t group = 0; group < hidden / 128; ++group) {
    float amax = 1e-4f;
    for (uint32_t i = 0; i < 128; ++i) {
      const float value = reference_bf16_to_float(row[group * 128 + i]);
      amax = std::fmax(amax, std::fabs(value));
    }
    float scale = amax / 448.0f;
    if (form != kernels::ScaleForm::kFloat32) {
      scale = power_of_two_not_below(scale);
    }
    result.scales.push_back(scale);
    if (form == kernels::ScaleForm::kUe8m0) {
      result.exponents.push_back(static_cast<uint8_t>(std::ilogb(scale) + 127));
    }
    for (uint32_t i = 0; i < 128; ++i) {
      const float quotient = reference_bf16_to_float(row[group * 128 + i]) / scale;
      result.payload.push_back(reference_float_to_e4m3(quotient));
    }
  }
  return result;
}

}  // namespace expertd::support
