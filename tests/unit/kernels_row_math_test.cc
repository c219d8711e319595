// SPDX-License-Identifier: Apache-2.0
// Every kind of vectors that this processor has gives the bits of the shared conversions, channel by channel.
#include "daemon/kernels/host/row_math.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "daemon/kernels/numerics.h"
#include "tests/support/random_case.h"

namespace expertd::support {
namespace {

using kernels::bf16_to_float;
using kernels::float_to_bf16;
using kernels::float_to_bits;
using kernels::kScaleGroup;
using kernels::OpShape;
using kernels::ScaleForm;
using kernels::host::RowMath;
using kernels::host::SumTerms;
using kernels::host::TokenRows;

constexpr uint32_t kHidden = 384;  // three groups
using Row = std::vector<uint16_t>;

float scale_of(const uint16_t* group, ScaleForm form) {
  float amax = 0;
  for (uint32_t i = 0; i < kScaleGroup; ++i) {
    const float magnitude = bf16_to_float(static_cast<uint16_t>(group[i] & 0x7fff));
    amax = magnitude > amax ? magnitude : amax;  // not so for NaN
  }
  const float exact = kernels::group_scale(amax);
  return form == ScaleForm::kFloat32 ? exact : kernels::round_scale(exact);
}

void expect_quantised(const RowMath& math, const Row& row, ScaleForm form, const std::string& what) {
  std::vector<uint8_t> payload(row.size());
  std::vector<float> scales(row.size() / kScaleGroup);
  math.quantise_row(row.data(), static_cast<uint32_t>(row.size()), form, payload.data(), scales.data());
  for (size_t i = 0; i < row.size(); ++i) {
    const float scale = scale_of(&row[i / kScaleGroup * kScaleGroup], form);
    ASSERT_EQ(float_to_bits(scales[i / kScaleGroup]), float_to_bits(scale)) << math.name << ", " << what;
    const uint8_t code = kernels::float_to_e4m3(kernels::divide_exact(bf16_to_float(row[i]), scale));
    ASSERT_EQ(payload[i], code) << math.name << ", " << what << ", channel " << i << " of bits " << row[i];
  }
}

TEST(KernelsRowMath, EveryMagnitudeIsQuantisedUnderManyScales) {
  // A group whose first channel is the largest, and then all smaller magnitudes in turn: of both signs, in pairs of
  // neighbours, so that codes that share a word with others are met.
  for (const uint32_t amax : {0x0000u, 0x0001u, 0x3800u, 0x38d2u, 0x3f80u, 0x3f81u, 0x3fffu, 0x43e0u, 0x4479u, 0x5a5au,
                              0x7f00u, 0x7f7fu, 0x7f80u, 0x7fc0u}) {
    Row row;
    for (uint32_t value = 0; value <= amax || row.size() % kScaleGroup != 0; ++value) {
      if (row.size() % kScaleGroup == 0) {
        row.push_back(static_cast<uint16_t>(amax));
      }
      row.push_back(static_cast<uint16_t>(std::min(value, amax) | (value % 3 == 0 ? 0x8000 : 0)));
    }
    for (const RowMath& math : kernels::host::row_maths()) {
      for (const ScaleForm form : {ScaleForm::kFloat32, ScaleForm::kRounded, ScaleForm::kUe8m0}) {
        ASSERT_NO_FATAL_FAILURE(expect_quantised(math, row, form, "amax " + std::to_string(amax)));
      }
    }
  }
}

TEST(KernelsRowMath, RandomBitsAreQuantised) {
  for (const uint64_t seed : seeds_to_run(400)) {
    Random random(seed);
    // Any bits, or numbers of one binade, whose quotients lie close to ties.
    const bool any = random.chance(50);
    Row row(kHidden);
    for (uint16_t& value : row) {
      value = static_cast<uint16_t>(any ? random.next() : 0x3f80 | random.below(0x80) | random.below(2) << 15);
    }
    for (const RowMath& math : kernels::host::row_maths()) {
      for (const ScaleForm form : {ScaleForm::kFloat32, ScaleForm::kRounded}) {
        ASSERT_NO_FATAL_FAILURE(expect_quantised(math, row, form, "EXPERTD_SEED=" + std::to_string(seed)));
      }
    }
  }
}

struct Terms {
  std::vector<Row> rows;
  std::vector<Row> others;  // biases and sums of other nodes
  TokenRows token;
  OpShape shape;
  std::vector<const uint16_t*> partials;
  SumTerms terms;
};

void make_terms(Random* random, Terms* made) {
  const auto any_row = [random] {
    Row row(kHidden);
    for (uint16_t& value : row) {
      value = static_cast<uint16_t>(random->chance(5) ? random->next() : 0x3c00 + random->below(0x600));
    }
    return row;
  };
  made->shape.hidden = kHidden;
  made->shape.expanded = random->chance(50) ? 1 : 0;
  made->rows.resize(random->below(9));
  std::generate(made->rows.begin(), made->rows.end(), any_row);
  made->others.resize(4);
  std::generate(made->others.begin(), made->others.end(), any_row);
  // Sometimes the second row takes away what the first gave, bit for bit: a product that is not rounded before it is
  // added would leave a rest.
  const bool opposite = made->rows.size() == 2 && random->chance(70);
  for (uint32_t i = 0; opposite && i < kHidden; ++i) {
    made->rows[1][i] = static_cast<uint16_t>(made->rows[0][i] ^ 0x8000);
  }
  uint32_t rank = 0;
  float weight = static_cast<float>(random->unit());
  for (const Row& row : made->rows) {
    const bool next = made->token.rows != 0 && !opposite && random->chance(50);
    weight = opposite ? weight : static_cast<float>(random->unit());
    rank += next ? 1 : 0;
    if (next || made->token.rows == 0) {
      ++made->token.groups;
    }
    made->token.row[made->token.rows++] = {row.data(), weight, rank};
    made->token.group_end[made->token.groups - 1] = made->token.rows;
  }
  made->terms.bias0 = random->chance(50) ? made->others[0].data() : nullptr;
  made->terms.bias1 = random->chance(50) ? made->others[1].data() : nullptr;
  const uint32_t count = random->below(3);
  for (uint32_t i = 2; i < 2 + count; ++i) {
    made->partials.push_back(made->others[i].data());
  }
  made->terms.partials = made->partials;
}

/// One channel of a sum as token_sum.h has it.
uint16_t channel_sum(const Terms& given, bool lanes, uint32_t channel) {
  const TokenRows& token = given.token;
  float sum = given.terms.bias0 == nullptr ? 0.0f : bf16_to_float(given.terms.bias0[channel]);
  if (given.terms.bias1 != nullptr) {
    sum += bf16_to_float(given.terms.bias1[channel]);
  }
  for (uint32_t row = 0; row < token.rows;) {
    const uint32_t rank = token.row[row].rank;
    float partial = 0;
    for (; row < token.rows && token.row[row].rank == rank; ++row) {
      const float value = bf16_to_float(token.row[row].data[channel]);
      if (!lanes && given.shape.expanded == 0) {
        sum += value;
        continue;
      }
      const float weighted = lanes ? token.row[row].weight * value : value;
      partial += weighted;
    }
    if (lanes || given.shape.expanded != 0) {
      sum += bf16_to_float(float_to_bf16(partial));
    }
  }
  for (const uint16_t* partial : given.terms.partials) {
    sum += bf16_to_float(partial[channel]);
  }
  return float_to_bf16(sum);
}

TEST(KernelsRowMath, SumsHaveTheBitsOfOneChannelAtATime) {
  for (const uint64_t seed : seeds_to_run(400)) {
    Random random(seed);
    Terms given;
    make_terms(&random, &given);
    for (const RowMath& math : kernels::host::row_maths()) {
      for (const bool lanes : {false, true}) {
        Row out(kHidden);
        (lanes ? math.sum_lanes : math.sum_rows)(given.shape, given.token, given.terms, out.data());
        for (uint32_t channel = 0; channel < kHidden; ++channel) {
          ASSERT_EQ(out[channel], channel_sum(given, lanes, channel))
              << math.name << (lanes ? " lanes" : " rows") << " EXPERTD_SEED=" << seed << ", channel " << channel;
        }
      }
    }
  }
}

}  // namespace
}  // namespace expertd::support
