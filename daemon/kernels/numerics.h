// SPDX-License-Identifier: Apache-2.0
// Conversions that the host and the CUDA implementations share bit for bit: bf16, e4m3fn and the scales of 128-channel
// groups. Pure inline functions, any thread, host and device; no branches where a select will do, so that host loops
// over them vectorise. Must not be compiled with fast-math: divisions and comparisons are the IEEE ones.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define EXPERTD_HOST_DEVICE __host__ __device__
#else
#define EXPERTD_HOST_DEVICE
#endif

namespace expertd::kernels {

inline constexpr uint32_t kScaleGroup = 128;                 // channels that share a scale
inline constexpr float kE4m3Max = 448.0f;                    // largest finite e4m3fn value
inline constexpr float kAmaxFloor = 1e-4f;                   // keeps the scale of an all-zero group away from zero
inline constexpr uint32_t kE4m3MaxBits = 0x43e00000u;        // 448.0f
inline constexpr uint32_t kE4m3MinNormalBits = 0x3c800000u;  // 2^-6

EXPERTD_HOST_DEVICE inline uint32_t float_to_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
#endif
}

EXPERTD_HOST_DEVICE inline float bits_to_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value = 0;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
#endif
}

/// IEEE division on both sides, whatever the flags of the CUDA compiler.
EXPERTD_HOST_DEVICE inline float divide_exact(float dividend, float divisor) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(dividend, divisor);
#else
  return dividend / divisor;
#endif
}

EXPERTD_HOST_DEVICE inline float bf16_to_float(uint16_t value) {
  return bits_to_float(static_cast<uint32_t>(value) << 16);
}

/// Round to nearest even; every NaN becomes 0x7fff, as the GPU's conversion has it.
EXPERTD_HOST_DEVICE inline uint16_t float_to_bf16(float value) {
#if defined(__CUDA_ARCH__)
  uint16_t rounded = 0;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(value));
  return rounded;
#else
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = static_cast<int32_t>(bits & 0x7fffffffu) > 0x7f800000;
  return static_cast<uint16_t>(is_nan ? 0x7fffu : rounded);
#endif
}

/// Round to nearest even, saturating at +-448 (infinity too); NaN gives 0x7f whatever its sign.
EXPERTD_HOST_DEVICE inline uint8_t float_to_e4m3(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t pair = 0;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(value));
  return static_cast<uint8_t>(pair);
#else
  const uint32_t bits = float_to_bits(value);
  const auto magnitude = static_cast<int32_t>(bits & 0x7fffffffu);
  const int32_t limited =
      magnitude < static_cast<int32_t>(kE4m3MaxBits) ? magnitude : static_cast<int32_t>(kE4m3MaxBits);
  // Normal codes: round the 23-bit mantissa to 3 bits; a carry moves into the exponent, which is what is wanted.
  const int32_t normal = ((limited + 0x7ffff + ((limited >> 20) & 1)) >> 20) - ((127 - 7) << 3);
  // Below 2^-6 codes count multiples of 2^-9, the last place of floats in [2^14, 2^15): the addition rounds.
  const float lifted = bits_to_float(static_cast<uint32_t>(limited)) + 16384.0f;
  const int32_t subnormal = static_cast<int32_t>(float_to_bits(lifted)) - 0x46800000;
  // Masks and not selects: a compiler moves the addition, which may trap, into the branch of a select, and then the
  // loops around this function do not vectorise.
  const int32_t is_small = (limited - static_cast<int32_t>(kE4m3MinNormalBits)) >> 31;
  const int32_t is_nan = (0x7f800000 - magnitude) >> 31;
  const auto sign = static_cast<int32_t>((bits >> 24) & 0x80u);
  const int32_t code = (subnormal & is_small) | (normal & ~is_small) | sign;
  return static_cast<uint8_t>((code & ~is_nan) | (0x7f & is_nan));
#endif
}

EXPERTD_HOST_DEVICE inline float e4m3_to_float(uint8_t code) {
  const uint32_t sign = static_cast<uint32_t>(code & 0x80u) << 24;
  const uint32_t magnitude = code & 0x7fu;
  const float small = static_cast<float>(magnitude) * 0.001953125f;  // 2^-9
  const float large = bits_to_float((magnitude << 20) + (static_cast<uint32_t>(127 - 7) << 23));
  const float value = magnitude < 8u ? small : large;
  return bits_to_float(magnitude == 0x7fu ? 0x7fc00000u | sign : float_to_bits(value) | sign);
}

/// The scale of a group from its largest magnitude; NaNs among the values are to be ignored by the caller's maximum.
EXPERTD_HOST_DEVICE inline float group_scale(float amax) {
  return divide_exact(amax > kAmaxFloor ? amax : kAmaxFloor, kE4m3Max);
}

/// The next power of two not below a positive normal scale, on the exponent bits; infinity stays.
EXPERTD_HOST_DEVICE inline float round_scale(float scale) {
  return bits_to_float((float_to_bits(scale) + 0x7fffffu) & 0x7f800000u);
}

/// The exponent byte of a power of two: scale = 2^(byte - 127).
EXPERTD_HOST_DEVICE inline uint8_t scale_to_ue8m0(float rounded_scale) {
  return static_cast<uint8_t>((float_to_bits(rounded_scale) >> 23) & 0xffu);
}

/// The inverse; byte 0 is 2^-127, a subnormal float, and byte 255 has no value (infinity here).
EXPERTD_HOST_DEVICE inline float ue8m0_to_scale(uint8_t byte) {
  return bits_to_float(byte == 0 ? 0x00400000u : static_cast<uint32_t>(byte) << 23);
}

}  // namespace expertd::kernels
