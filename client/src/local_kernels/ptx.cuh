// SPDX-License-Identifier: Apache-2.0
// The PTX of the library's kernels: words that other processes and the host read, and conversions that have no
// intrinsic. Device code only, no state.
#pragma once

#include <cstdint>

namespace expertd::client {

/// System scope, because the host and other streams read it; relaxed, because publish() fences once for both words.
__device__ inline void store_relaxed_sys(uint64_t* word, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}

/// Behind all that this thread wrote or saw.
__device__ inline void store_release_sys(uint64_t* word, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}

/// Pairs with what the daemon's copies and streams write.
__device__ inline uint64_t load_acquire_sys(const uint64_t* word) {
  uint64_t value = 0;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}

__device__ inline uint64_t global_timer_ns() {
  uint64_t now = 0;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  return now;
}

/// Round to nearest even; the lower half is the first.
__device__ inline uint32_t to_bf16_pair(float first, float second) {
  uint32_t pair = 0;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

/// Round to nearest even, saturating at +-448; NaN gives 0x7f.
__device__ inline uint32_t to_e4m3(float value) {
#if __CUDA_ARCH__ >= 890
  uint16_t pair = 0;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(value));
  return pair & 0xffu;
#else
  // As daemon/kernels/numerics.h has it: normal codes round the mantissa, small ones are multiples of 2^-9.
  const uint32_t bits = __float_as_uint(value);
  const int magnitude = static_cast<int>(bits & 0x7fffffffu);
  const int limited = min(magnitude, 0x43e00000);
  const int normal = ((limited + 0x7ffff + ((limited >> 20) & 1)) >> 20) - ((127 - 7) << 3);
  const int small = static_cast<int>(__float_as_uint(__uint_as_float(limited) + 16384.0f)) - 0x46800000;
  const int code = limited < 0x3c800000 ? small : normal;
  return magnitude > 0x7f800000 ? 0x7fu : static_cast<uint32_t>(code) | ((bits >> 24) & 0x80u);
#endif
}

}  // namespace expertd::client
