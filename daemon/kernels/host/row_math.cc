// SPDX-License-Identifier: Apache-2.0
// The loops stand in functions that are inlined into one caller per kind of vectors: a function that is compiled for
// wider vectors takes the loops it contains along, while no symbol that other files share is made with instructions
// that a processor may lack. Chosen by a table and not by the loader (ifunc), which sanitizers do not survive.
#include "daemon/kernels/host/row_math.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>

#include "daemon/kernels/numerics.h"

#define EXPERTD_INLINE [[gnu::always_inline]] inline

namespace expertd::kernels::host {
namespace {

/// A group with infinities or NaNs, which are rare: channel by channel. NaNs count as zero where the scale is made.
/// Returns the scale.
[[gnu::noinline]] float quantise_beyond(const uint16_t* in, ScaleForm form, uint8_t* out) {
  uint16_t largest = 0;
  for (uint32_t i = 0; i < kScaleGroup; ++i) {
    const auto magnitude = static_cast<uint16_t>(in[i] & 0x7fff);
    largest = magnitude <= 0x7f80 ? std::max(largest, magnitude) : largest;
  }
  const float exact = group_scale(bf16_to_float(largest));
  const float scale = form == ScaleForm::kFloat32 ? exact : round_scale(exact);
  for (uint32_t i = 0; i < kScaleGroup; ++i) {
    out[i] = float_to_e4m3(divide_exact(bf16_to_float(in[i]), scale));
  }
  return scale;
}

/// Vectors of so many 32-bit lanes, with the compiler's operators on them. A lane holds two neighbouring channels of
/// bf16 (the even one in its lower half, as on all machines with little-endian integers), or one of them as a float:
/// even and odd channels are computed in vectors of their own, so that widening and narrowing are a shift or a mask and
/// nothing moves between lanes.
template <uint32_t Lanes>
struct VectorTypes;
template <>
struct VectorTypes<4> {
  typedef float Floats __attribute__((vector_size(16)));
  typedef int32_t Ints __attribute__((vector_size(16)));
  typedef uint32_t Words __attribute__((vector_size(16)));
  typedef int16_t Halves __attribute__((vector_size(16)));
  typedef uint16_t Codes __attribute__((vector_size(8)));
};
template <>
struct VectorTypes<8> {
  typedef float Floats __attribute__((vector_size(32)));
  typedef int32_t Ints __attribute__((vector_size(32)));
  typedef uint32_t Words __attribute__((vector_size(32)));
  typedef int16_t Halves __attribute__((vector_size(32)));
  typedef uint16_t Codes __attribute__((vector_size(16)));
};
template <>
struct VectorTypes<16> {
  typedef float Floats __attribute__((vector_size(64)));
  typedef int32_t Ints __attribute__((vector_size(64)));
  typedef uint32_t Words __attribute__((vector_size(64)));
  typedef int16_t Halves __attribute__((vector_size(64)));
  typedef uint16_t Codes __attribute__((vector_size(32)));
};

constexpr int32_t kInfinityBits = 0x7f800000;
constexpr int16_t kInfinityHalf = 0x7f80;

template <uint32_t Lanes>
struct Vectors {
  using Floats = typename VectorTypes<Lanes>::Floats;
  using Ints = typename VectorTypes<Lanes>::Ints;
  using Words = typename VectorTypes<Lanes>::Words;
  using Halves = typename VectorTypes<Lanes>::Halves;
  using Codes = typename VectorTypes<Lanes>::Codes;
  static constexpr uint32_t kChannels = 2 * Lanes;  // of a vector of words
  static constexpr uint32_t kUnroll = 4;            // so many at a time, so that additions need not wait for each other
  static constexpr uint32_t kStep = kChannels * kUnroll;
  static_assert(kScaleGroup % kStep == 0, "H is a multiple of the group, so that no loop has a rest");

  /// Rows are aligned to their elements alone.
  template <typename Vector, typename Element>
  EXPERTD_INLINE static Vector load(const Element* in) {
    Vector vector;
    std::memcpy(&vector, in, sizeof(vector));
    return vector;
  }
  EXPERTD_INLINE static Floats even(Words channels) { return reinterpret_cast<Floats>(channels << 16); }
  EXPERTD_INLINE static Floats odd(Words channels) { return reinterpret_cast<Floats>(channels & 0xffff0000u); }

  /// As float_to_bf16, but in the upper half of the bits; what is in the lower half is of no use.
  EXPERTD_INLINE static Words round(Floats values) {
    const auto bits = reinterpret_cast<Words>(values);
    const Words rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    const auto magnitude = reinterpret_cast<Ints>(bits & 0x7fffffffu);
    return magnitude > kInfinityBits ? Words{} + 0x7fff0000u : rounded;
  }

  /// As float_to_e4m3, for quotients of [0, 448] and what rounds to 448, less kCodeBase. One addition rounds all codes:
  /// a float with the exponent of the quotient (at least that of the least normal code) plus 20 has its last place
  /// where the code has it, so that the sum counts multiples of that place.
  static constexpr int32_t kLift = 20 << 23;
  static constexpr int32_t kCodeBase = static_cast<int32_t>(kE4m3MinNormalBits >> 20);
  EXPERTD_INLINE static Words raised_e4m3(Floats quotients) {
    constexpr int32_t kLeast = static_cast<int32_t>(kE4m3MinNormalBits);
    const Ints exponent = reinterpret_cast<Ints>(quotients) & kInfinityBits;
    const Ints limited = exponent > kLeast ? exponent : Ints{} + kLeast;
    const Ints lifted = limited + kLift;
    const Floats sum = quotients + reinterpret_cast<Floats>(lifted);
    return reinterpret_cast<Words>(reinterpret_cast<Ints>(sum) - lifted + (limited >> 20));
  }

  /// The largest magnitude of a group as bits of bf16, NaNs and infinity beyond all numbers.
  EXPERTD_INLINE static int16_t largest_magnitude(const uint16_t* in) {
    Halves largest{};
    for (uint32_t i = 0; i < kScaleGroup; i += kChannels) {
      const Halves magnitude = load<Halves>(in + i) & int16_t{0x7fff};
      largest = magnitude > largest ? magnitude : largest;
    }
    std::array<int16_t, kChannels> halves;
    std::memcpy(halves.data(), &largest, sizeof(halves));
    return reduce<kChannels>(halves.data());
  }
  template <uint32_t Count>
  EXPERTD_INLINE static int16_t reduce(int16_t* halves) {
    if constexpr (Count == 1) {
      return halves[0];
    } else {
      for (uint32_t i = 0; i < Count / 2; ++i) {
        halves[i] = halves[i] > halves[i + Count / 2] ? halves[i] : halves[i + Count / 2];
      }
      return reduce<Count / 2>(halves);
    }
  }

  template <bool Exact>
  EXPERTD_INLINE static void encode_group(const uint16_t* in, float scale, uint8_t* out) {
    // A power of two has an exact inverse, and so the product is the quotient.
    const float inverse = divide_exact(1.0f, scale);
    for (uint32_t i = 0; i < kScaleGroup; i += kChannels) {
      const Words channels = load<Words>(in + i);
      const Words magnitudes = channels & 0x7fff7fffu;
      const Words low = raised_e4m3(Exact ? even(magnitudes) / scale : even(magnitudes) * inverse);
      const Words high = raised_e4m3(Exact ? odd(magnitudes) / scale : odd(magnitudes) * inverse);
      const Words signs = (channels >> 8 & 0x80u) | (channels >> 16 & 0x8000u);
      constexpr uint32_t kBases = uint32_t{kCodeBase} << 8 | uint32_t{kCodeBase};
      const Codes codes = __builtin_convertvector(((low + (high << 8)) - kBases) | signs, Codes);
      std::memcpy(out + i, &codes, sizeof(codes));
    }
  }

  EXPERTD_INLINE static void quantise(const uint16_t* row, uint32_t hidden, ScaleForm form, uint8_t* payload,
                                      float* scales) {
    for (uint32_t at = 0; at < hidden; at += kScaleGroup) {
      const int16_t largest = largest_magnitude(row + at);
      if (largest >= kInfinityHalf) {
        scales[at / kScaleGroup] = quantise_beyond(row + at, form, payload + at);
        continue;
      }
      const float exact = group_scale(bf16_to_float(static_cast<uint16_t>(largest)));
      if (form == ScaleForm::kFloat32) {
        scales[at / kScaleGroup] = exact;
        encode_group<true>(row + at, exact, payload + at);
      } else {
        scales[at / kScaleGroup] = round_scale(exact);
        encode_group<false>(row + at, round_scale(exact), payload + at);
      }
    }
  }

  struct Sum {
    Floats even[kUnroll];
    Floats odd[kUnroll];
  };
  EXPERTD_INLINE static void add(const uint16_t* row, Sum* sum) {
    for (uint32_t i = 0; i < kUnroll; ++i) {
      const Words channels = load<Words>(row + i * kChannels);
      sum->even[i] += even(channels);
      sum->odd[i] += odd(channels);
    }
  }
  EXPERTD_INLINE static void add_weighted(const uint16_t* row, float weight, Sum* sum) {
    for (uint32_t i = 0; i < kUnroll; ++i) {
      const Words channels = load<Words>(row + i * kChannels);
      sum->even[i] += weight * even(channels);
      sum->odd[i] += weight * odd(channels);
    }
  }
  /// Adds a partial sum as it would cross the wire: rounded to bf16 once.
  EXPERTD_INLINE static void add_rounded(const Sum& partial, Sum* sum) {
    for (uint32_t i = 0; i < kUnroll; ++i) {
      sum->even[i] += odd(round(partial.even[i]));
      sum->odd[i] += odd(round(partial.odd[i]));
    }
  }
  EXPERTD_INLINE static Sum begin(const SumTerms& terms, uint32_t at) {
    Sum sum{};
    for (uint32_t i = 0; terms.bias0 != nullptr && i < kUnroll; ++i) {
      const Words channels = load<Words>(terms.bias0 + at + i * kChannels);
      sum.even[i] = even(channels);
      sum.odd[i] = odd(channels);
    }
    if (terms.bias1 != nullptr) {
      add(terms.bias1 + at, &sum);
    }
    return sum;
  }
  EXPERTD_INLINE static void end(const SumTerms& terms, uint32_t at, Sum* sum, uint16_t* out) {
    for (const uint16_t* partial : terms.partials) {
      add(partial + at, sum);
    }
    for (uint32_t i = 0; i < kUnroll; ++i) {
      const Words channels = round(sum->even[i]) >> 16 | (round(sum->odd[i]) & 0xffff0000u);
      std::memcpy(out + at + i * kChannels, &channels, sizeof(channels));
    }
  }

  EXPERTD_INLINE static void sum_rows(const OpShape& shape, const TokenRows& rows, const SumTerms& terms,
                                      uint16_t* out) {
    for (uint32_t at = 0; at < shape.hidden; at += kStep) {
      Sum sum = begin(terms, at);
      for (uint32_t row = 0; shape.expanded == 0 && row < rows.rows; ++row) {
        add(rows.row[row].data + at, &sum);
      }
      uint32_t row = 0;
      for (uint32_t group = 0; shape.expanded != 0 && group < rows.groups; ++group) {
        Sum partial{};
        for (; row < rows.group_end[group]; ++row) {
          add(rows.row[row].data + at, &partial);
        }
        add_rounded(partial, &sum);
      }
      end(terms, at, &sum, out);
    }
  }

  EXPERTD_INLINE static void sum_lanes(const OpShape& shape, const TokenRows& rows, const SumTerms& terms,
                                       uint16_t* out) {
    for (uint32_t at = 0; at < shape.hidden; at += kStep) {
      Sum sum = begin(terms, at);
      for (uint32_t row = 0; row < rows.rows;) {
        const uint32_t rank = rows.row[row].rank;
        Sum partial{};
        for (; row < rows.rows && rows.row[row].rank == rank; ++row) {
          add_weighted(rows.row[row].data + at, rows.row[row].weight, &partial);
        }
        add_rounded(partial, &sum);
      }
      end(terms, at, &sum, out);
    }
  }
};

void quantise_plain(const uint16_t* row, uint32_t hidden, ScaleForm form, uint8_t* payload, float* scales) {
  Vectors<4>::quantise(row, hidden, form, payload, scales);
}
void sum_rows_plain(const OpShape& shape, const TokenRows& rows, const SumTerms& terms, uint16_t* out) {
  Vectors<4>::sum_rows(shape, rows, terms, out);
}
void sum_lanes_plain(const OpShape& shape, const TokenRows& rows, const SumTerms& terms, uint16_t* out) {
  Vectors<4>::sum_lanes(shape, rows, terms, out);
}

#if defined(__x86_64__)
// Neither target has fused multiply-adds by name, but avx512f brings its own: -ffp-contract=off keeps them out.
#define EXPERTD_AVX2 [[gnu::target("avx2")]]
#define EXPERTD_AVX512 [[gnu::target("avx512f,avx512bw,avx512vl,avx512dq")]]

EXPERTD_AVX2 void quantise_avx2(const uint16_t* row, uint32_t hidden, ScaleForm form, uint8_t* payload, float* scales) {
  Vectors<8>::quantise(row, hidden, form, payload, scales);
}
EXPERTD_AVX2 void sum_rows_avx2(const OpShape& shape, const TokenRows& rows, const SumTerms& terms, uint16_t* out) {
  Vectors<8>::sum_rows(shape, rows, terms, out);
}
EXPERTD_AVX2 void sum_lanes_avx2(const OpShape& shape, const TokenRows& rows, const SumTerms& terms, uint16_t* out) {
  Vectors<8>::sum_lanes(shape, rows, terms, out);
}

EXPERTD_AVX512 void quantise_avx512(const uint16_t* row, uint32_t hidden, ScaleForm form, uint8_t* payload,
                                    float* scales) {
  Vectors<16>::quantise(row, hidden, form, payload, scales);
}
EXPERTD_AVX512 void sum_rows_avx512(const OpShape& shape, const TokenRows& rows, const SumTerms& terms, uint16_t* out) {
  Vectors<16>::sum_rows(shape, rows, terms, out);
}
EXPERTD_AVX512 void sum_lanes_avx512(const OpShape& shape, const TokenRows& rows, const SumTerms& terms,
                                     uint16_t* out) {
  Vectors<16>::sum_lanes(shape, rows, terms, out);
}

// In the order in which a processor may have them.
constexpr std::array<RowMath, 3> kMaths = {{{"plain", quantise_plain, sum_rows_plain, sum_lanes_plain},
                                            {"avx2", quantise_avx2, sum_rows_avx2, sum_lanes_avx2},
                                            {"avx512", quantise_avx512, sum_rows_avx512, sum_lanes_avx512}}};

size_t usable() {
  if (!__builtin_cpu_supports("avx2")) {
    return 1;
  }
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return wide ? 3 : 2;
}
#else
constexpr std::array<RowMath, 1> kMaths = {{{"plain", quantise_plain, sum_rows_plain, sum_lanes_plain}}};

size_t usable() {
  return 1;
}
#endif

}  // namespace

std::span<const RowMath> row_maths() {
  static const size_t count = usable();
  return std::span(kMaths).first(count);
}

const RowMath& row_math() {
  static const RowMath& fastest = row_maths().back();
  return fastest;
}

void quantise_row(const uint16_t* row, uint32_t hidden, ScaleForm form, uint8_t* payload, float* scales) {
  row_math().quantise_row(row, hidden, form, payload, scales);
}
void sum_rows(const OpShape& shape, const TokenRows& rows, const SumTerms& terms, uint16_t* out) {
  row_math().sum_rows(shape, rows, terms, out);
}
void sum_lanes(const OpShape& shape, const TokenRows& rows, const SumTerms& terms, uint16_t* out) {
  row_math().sum_lanes(shape, rows, terms, out);
}

}  // namespace expertd::kernels::host
