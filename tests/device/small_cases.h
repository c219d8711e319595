// SPDX-License-Identifier: Apache-2.0
// Random cases small enough for kernels that run a hundred times slower than they are. Pure, tests only.
#pragma once

#include <gtest/gtest.h>

#include <utility>

#include "tests/support/random_case.h"

namespace expertd::device_test {

inline constexpr uint32_t kSmallCases = 8;

inline bool is_small(const support::RandomCase& it) {
  const kernels::OpShape& shape = it.shape;
  return shape.ranks >= 2 && shape.ranks <= 3 && shape.experts <= 12 && shape.top_k <= 6 && shape.hidden <= 512 &&
         shape.row_bytes <= 1024 && shape.max_tokens <= 24;
}

/// Calls `run` with the case and its number for the first small ones of the seeds that `accepts` takes.
template <typename Accepts, typename Run>
void for_small_cases(kernels::OpKind kind, const Accepts& accepts, const Run& run) {
  constexpr uint32_t kSeeds = 4000;  // few of them make small cases
  uint32_t ran = 0;
  for (const uint64_t seed : support::seeds_to_run(kSeeds)) {
    support::RandomCase made = support::make_random_case(seed, kind);
    if (is_small(made) && accepts(made)) {
      SCOPED_TRACE(support::repro_line(made));
      run(std::move(made), ran++);
    }
    if (ran == kSmallCases || testing::Test::HasFailure()) {
      break;
    }
  }
  EXPECT_GT(ran, 0u) << "none of the seeds makes a small case";
}

}  // namespace expertd::device_test
