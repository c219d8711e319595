// SPDX-License-Identifier: Apache-2.0
#include "client/ctl/bench_weighted_sum.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "client/ctl/bench_numerics.h"

namespace expertd::ctl {

namespace {

/// Of the whole output, both shifted by one: 1 - 2<a,b> / (<a,a> + <b,b>).
constexpr double kRelativeErrorMax = 1e-5;
/// Of one element and one rounding to bf16, of the sum of the sizes of its terms.
constexpr float kRoundingErrorMax = 0x1p-8f;

void check_token(const BenchCheck& check, uint64_t token, std::span<const uint16_t> got,
                 const std::vector<BenchTerm>& terms, float error_max, std::span<float> expected) {
  std::vector<float> sizes(got.size(), 0.0f);
  std::fill(expected.begin(), expected.end(), 0.0f);
  for (const BenchTerm& it : terms) {
    for (size_t i = 0; i < got.size(); ++i) {
      const float term = it.weight * bf16_to_float(it.row[i]);
      expected[i] += term;
      sizes[i] += std::fabs(term);
    }
  }
  for (size_t i = 0; i < got.size(); ++i) {
    const float value = bf16_to_float(got[i]);
    // Written so that a NaN is an error.
    if (!(std::fabs(value - expected[i]) <= sizes[i] * error_max)) {
      check.fail("combined_x row " + std::to_string(token) + " element " + std::to_string(i) + ": got " +
                 std::to_string(value) + ", expected " + std::to_string(expected[i]) + " within " +
                 std::to_string(sizes[i] * error_max));
    }
  }
}

}  // namespace

void check_weighted_sums(const BenchCheck& check, const BenchTensor& combined, uint64_t tokens,
                         const std::function<std::vector<BenchTerm>(uint64_t)>& terms_of, uint32_t roundings) {
  const float error_max = static_cast<float>(roundings) * kRoundingErrorMax;
  double product = 0;
  double squares = 0;
  std::vector<float> expected(combined.row_bytes() / sizeof(uint16_t));
  combined.read_rows(0, tokens, [&](uint64_t token, const uint8_t* bytes) {
    const std::span<const uint16_t> got(reinterpret_cast<const uint16_t*>(bytes), expected.size());
    check_token(check, token, got, terms_of(token), error_max, expected);
    for (size_t i = 0; i < expected.size(); ++i) {
      const double a = double{expected[i]} + 1;
      const double b = double{bf16_to_float(got[i])} + 1;
      product += a * b;
      squares += a * a + b * b;
    }
  });
  const double error = squares == 0 ? 0 : 1 - 2 * product / squares;
  if (error >= kRelativeErrorMax) {
    check.fail("combined_x: relative error " + std::to_string(error) + ", expected below " +
               std::to_string(kRelativeErrorMax));
  }
  check.untouched("combined_x", combined, tokens, 1);
}

}  // namespace expertd::ctl
