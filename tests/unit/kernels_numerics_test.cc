// SPDX-License-Identifier: Apache-2.0
// The shared conversions against the independent ones of the reference: exhaustive over all bf16 values and e4m3 codes,
// and over every tie and its neighbours where floats are rounded.
#include "daemon/kernels/numerics.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "daemon/kernels/host/tables.h"
#include "tests/support/random_case.h"

namespace expertd::support {
namespace {

using kernels::bf16_to_float;
using kernels::bits_to_float;
using kernels::e4m3_to_float;
using kernels::float_to_bf16;
using kernels::float_to_bits;
using kernels::float_to_e4m3;
using kernels::ScaleForm;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

TEST(KernelsNumerics, EveryBf16ValueConvertsLikeTheReference) {
  for (uint32_t value = 0; value < 0x10000; ++value) {
    const auto bf16 = static_cast<uint16_t>(value);
    const float got = bf16_to_float(bf16);
    const float wanted = reference_bf16_to_float(bf16);
    if (std::isnan(wanted)) {
      ASSERT_TRUE(std::isnan(got)) << value;
      ASSERT_EQ(float_to_bf16(got), 0x7fff) << value;
      continue;
    }
    ASSERT_EQ(float_to_bits(got), float_to_bits(wanted)) << value;
    ASSERT_EQ(float_to_bf16(got), bf16) << "a bf16 value survives the way there and back";
  }
}

TEST(KernelsNumerics, FloatsRoundToBf16LikeTheReference) {
  // Every bf16 value with the low halves at and around the tie, which covers odd and even codes, carries into the next
  // binade, subnormals and overflow into infinity.
  for (uint32_t high = 0; high < 0x10000; ++high) {
    for (const uint32_t low : {0x0001u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      const float value = bits_to_float(high << 16 | low);
      if (std::isnan(value)) {
        ASSERT_EQ(float_to_bf16(value), 0x7fff) << high << " " << low;
      } else {
        ASSERT_EQ(float_to_bf16(value), reference_float_to_bf16(value)) << high << " " << low;
      }
    }
  }
}

TEST(KernelsNumerics, EveryE4m3CodeConvertsLikeTheReference) {
  for (uint32_t value = 0; value < 256; ++value) {
    const auto code = static_cast<uint8_t>(value);
    const float got = e4m3_to_float(code);
    if ((code & 0x7f) == 0x7f) {
      ASSERT_TRUE(std::isnan(got)) << value;
      ASSERT_EQ(float_to_e4m3(got), 0x7f);
      continue;
    }
    ASSERT_EQ(got, reference_e4m3_to_float(code)) << value;
    ASSERT_EQ(std::signbit(got), value >= 0x80) << value;
    ASSERT_EQ(float_to_e4m3(got), code) << "an e4m3 value survives the way there and back";
  }
}

TEST(KernelsNumerics, TiesBetweenE4m3CodesGoToTheEvenCode) {
  for (uint32_t code = 0; code < 0x7e; ++code) {
    const float low = e4m3_to_float(static_cast<uint8_t>(code));
    const float high = e4m3_to_float(static_cast<uint8_t>(code + 1));
    const float tie = (low + high) / 2;
    const auto even = static_cast<uint8_t>(code % 2 == 0 ? code : code + 1);
    EXPECT_EQ(float_to_e4m3(tie), even) << code;
    EXPECT_EQ(float_to_e4m3(-tie), even | 0x80) << code;
    EXPECT_EQ(float_to_e4m3(std::nextafter(tie, 0.0f)), code) << code;
    EXPECT_EQ(float_to_e4m3(std::nextafter(tie, kInfinity)), code + 1) << code;
  }
}

TEST(KernelsNumerics, EveryBf16ValueQuantisesLikeTheReference) {
  for (uint32_t value = 0; value < 0x10000; ++value) {
    for (const uint32_t low : {0u, 1u, 0xffffu}) {
      const float number = bits_to_float(value << 16 | low);
      ASSERT_EQ(float_to_e4m3(number), reference_float_to_e4m3(number)) << value << " " << low;
    }
  }
}

TEST(KernelsNumerics, RandomFloatsQuantiseLikeTheReference) {
  Random random(3);
  for (uint32_t i = 0; i < 2'000'000; ++i) {
    // Exponents around the representable range; the rest saturates or vanishes and is covered exhaustively above.
    const auto bits = static_cast<uint32_t>(random.next());
    const float number = bits_to_float((bits & 0x807fffffu) | ((112 + bits % 26) << 23));
    ASSERT_EQ(float_to_e4m3(number), reference_float_to_e4m3(number)) << float_to_bits(number);
    ASSERT_EQ(float_to_bf16(number), reference_float_to_bf16(number)) << float_to_bits(number);
  }
}

TEST(KernelsNumerics, LargeMagnitudesSaturate) {
  EXPECT_EQ(float_to_e4m3(448.0f), 0x7e);
  EXPECT_EQ(float_to_e4m3(464.0f), 0x7e);
  EXPECT_EQ(float_to_e4m3(1e30f), 0x7e);
  EXPECT_EQ(float_to_e4m3(kInfinity), 0x7e);
  EXPECT_EQ(float_to_e4m3(-kInfinity), 0xfe);
  EXPECT_EQ(float_to_e4m3(-449.0f), 0xfe);
}

TEST(KernelsNumerics, ZeroKeepsItsSign) {
  EXPECT_EQ(float_to_e4m3(0.0f), 0x00);
  EXPECT_EQ(float_to_e4m3(-0.0f), 0x80);
  EXPECT_EQ(float_to_bf16(-0.0f), 0x8000);
}

TEST(KernelsNumerics, ScalesOfSmallGroupsAreFloored) {
  EXPECT_EQ(kernels::group_scale(0.0f), 1e-4f / 448.0f);
  EXPECT_EQ(kernels::group_scale(1e-5f), 1e-4f / 448.0f);
  EXPECT_EQ(kernels::group_scale(448.0f), 1.0f);
}

TEST(KernelsNumerics, RoundedScalesAreTheNextPowerOfTwo) {
  EXPECT_EQ(kernels::round_scale(1.0f), 1.0f);
  EXPECT_EQ(kernels::round_scale(std::nextafter(1.0f, 2.0f)), 2.0f);
  EXPECT_EQ(kernels::round_scale(std::nextafter(2.0f, 1.0f)), 2.0f);
  EXPECT_EQ(kernels::round_scale(0.3f), 0.5f);
  EXPECT_EQ(kernels::round_scale(kInfinity), kInfinity);
  for (int exponent = -126; exponent < 127; ++exponent) {
    const float power = std::ldexp(1.0f, exponent);
    ASSERT_EQ(kernels::round_scale(power), power);
    ASSERT_EQ(kernels::round_scale(power * 1.5f), power * 2);
    ASSERT_EQ(kernels::scale_to_ue8m0(power), exponent + 127);
    ASSERT_EQ(kernels::ue8m0_to_scale(static_cast<uint8_t>(exponent + 127)), power);
  }
  EXPECT_EQ(kernels::ue8m0_to_scale(0), std::ldexp(1.0f, -127));
}

TEST(KernelsNumerics, RowsQuantiseLikeTheReference) {
  Random random(5);
  constexpr uint32_t kHidden = 512;
  for (const ScaleForm form : {ScaleForm::kFloat32, ScaleForm::kRounded, ScaleForm::kUe8m0}) {
    for (uint32_t round = 0; round < 400; ++round) {
      // Half of the rows hold any bit patterns, NaN and infinity included.
      std::vector<uint16_t> row = random_rows(&random, kHidden);
      for (uint16_t& value : row) {
        value = round % 2 == 0 ? value : static_cast<uint16_t>(random.next());
      }
      std::vector<uint8_t> payload(kHidden);
      std::vector<float> scales(kHidden / 128);
      kernels::host::quantise_row(row.data(), kHidden, form, payload.data(), scales.data());
      if (form == ScaleForm::kUe8m0 && !std::isfinite(scales[0] + scales[1] + scales[2] + scales[3])) {
        continue;  // an infinite scale has no exponent byte to compare
      }
      const QuantisedRow wanted = reference_quantise(row.data(), kHidden, form);
      ASSERT_EQ(payload, wanted.payload) << round;
      ASSERT_EQ(scales, wanted.scales) << round;
      for (size_t group = 0; group < wanted.exponents.size(); ++group) {
        ASSERT_EQ(kernels::scale_to_ue8m0(scales[group]), wanted.exponents[group]);
      }
    }
  }
}

/// What comes back, as bf16, for a row of one value.
uint16_t round_trip_constant(uint16_t value, ScaleForm form) {
  const std::vector<uint16_t> row(128, value);
  std::vector<uint8_t> payload(128);
  float scale = 0;
  kernels::host::quantise_row(row.data(), 128, form, payload.data(), &scale);
  return float_to_bf16(e4m3_to_float(payload[77]) * scale);
}

TEST(KernelsNumerics, ConstantRowsDequantiseExactly) {
  for (uint32_t value = 0; value < 0x10000; ++value) {
    const auto bf16 = static_cast<uint16_t>(value);
    const float number = std::fabs(bf16_to_float(bf16));
    if ((number >= 1e-4f && std::isfinite(number)) || number == 0) {
      ASSERT_EQ(round_trip_constant(bf16, ScaleForm::kFloat32), bf16) << value;
    }
    // A power of two cannot carry more significant bits than e4m3 has: four.
    if (number >= 1e-4f && number < 1e38f && (value & 0xf) == 0) {
      ASSERT_EQ(round_trip_constant(bf16, ScaleForm::kRounded), bf16) << value;
    }
  }
}

}  // namespace
}  // namespace expertd::support
