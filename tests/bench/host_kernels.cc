// SPDX-License-Identifier: Apache-2.0
// host_kernels [HIDDEN]: what the loops of host devices take per row, by kind of vectors, with rows in the processor's
// caches and with more rows than those hold. ns per row, the least of several passes: other work on the machine only
// adds. A line per loop, a column per kind.
#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "daemon/kernels/host/row_math.h"
#include "daemon/kernels/numerics.h"

namespace expertd::bench {
namespace {

using kernels::ScaleForm;
using kernels::host::RowMath;
using kernels::host::TokenRows;

constexpr uint32_t kPasses = 40;
constexpr uint32_t kWarmRows = 16;
constexpr uint32_t kColdRows = 4096;

struct Memory {
  explicit Memory(uint32_t channels) : hidden(channels), in(size_t{kColdRows} * channels), out(in.size()) {
    std::minstd_rand random(1);
    std::uniform_real_distribution<float> values(-2.0f, 2.0f);
    for (uint16_t& value : in) {
      value = kernels::float_to_bf16(values(random));
    }
  }
  const uint16_t* row(uint32_t index) const { return in.data() + size_t{index % kColdRows} * hidden; }
  uint16_t* out_row(uint32_t index) { return out.data() + size_t{index % kColdRows} * hidden; }

  uint32_t hidden;
  std::vector<uint16_t> in;
  std::vector<uint16_t> out;
  std::array<float, 256> scales{};
};

using Loop = std::function<void(const RowMath&, Memory*, uint32_t)>;

double least_ns(const RowMath& math, Memory* memory, uint32_t rows, const Loop& loop) {
  double least = 1e30;
  for (uint32_t pass = 0; pass < kPasses * (rows == kWarmRows ? 20 : 1); ++pass) {
    const auto begin = std::chrono::steady_clock::now();
    for (uint32_t row = 0; row < rows; ++row) {
      loop(math, memory, row);
    }
    const std::chrono::duration<double, std::nano> passed = std::chrono::steady_clock::now() - begin;
    least = std::min(least, passed.count() / rows);
  }
  return least;
}

Loop quantise(ScaleForm form) {
  return [form](const RowMath& math, Memory* memory, uint32_t row) {
    math.quantise_row(memory->row(row), memory->hidden, form, reinterpret_cast<uint8_t*>(memory->out_row(row)),
                      memory->scales.data());
  };
}

/// Sums of `count` rows; of one rank each, or all of one rank.
Loop sum(uint32_t count, bool lanes) {
  return [=](const RowMath& math, Memory* memory, uint32_t row) {
    kernels::OpShape shape;
    shape.hidden = memory->hidden;
    TokenRows rows;
    rows.rows = count;
    for (uint32_t i = 0; i < count; ++i) {
      rows.row[i] = {memory->row(row + i * (kColdRows / 8)), 0.5f, lanes ? i / 4 : i};
    }
    (lanes ? math.sum_lanes : math.sum_rows)(shape, rows, {}, memory->out_row(row));
  };
}

int run(uint32_t hidden) {
  Memory memory(hidden);
  const std::vector<std::pair<std::string, Loop>> loops = {
      {"FP8, exact scales", quantise(ScaleForm::kFloat32)},
      {"FP8, rounded scales", quantise(ScaleForm::kRounded)},
      {"sum of 1 row", sum(1, false)},
      {"sum of 2 rows", sum(2, false)},
      {"sum of 8 lanes, 2 ranks", sum(8, true)},
      {"memcpy of a row",
       [](const RowMath&, Memory* bytes, uint32_t row) {
         std::memcpy(bytes->out_row(row), bytes->row(row), size_t{bytes->hidden} * 2);
       }},
  };
  std::printf("%-26s", ("ns per row of " + std::to_string(hidden)).c_str());
  for (const RowMath& math : kernels::host::row_maths()) {
    std::printf("%10s%10s", math.name, "cold");
  }
  for (const auto& [name, loop] : loops) {
    std::printf("\n%-26s", name.c_str());
    for (const RowMath& math : kernels::host::row_maths()) {
      std::printf("%10.0f%10.0f", least_ns(math, &memory, kWarmRows, loop), least_ns(math, &memory, kColdRows, loop));
    }
  }
  std::printf("\n");
  return 0;
}

}  // namespace
}  // namespace expertd::bench

int main(int argc, char** argv) {
  const int hidden = argc > 1 ? std::atoi(argv[1]) : 7168;
  if (hidden < 128 || hidden > 8192 || hidden % 128 != 0) {
    std::fprintf(stderr, "host_kernels [HIDDEN]: a multiple of 128, at most 8192\n");
    return 64;
  }
  return expertd::bench::run(static_cast<uint32_t>(hidden));
}
