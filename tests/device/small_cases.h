// SPDX-License-Identifier: Apache-2.0
// Random cases small enough for kernels that run a hundred times slower than they are. Pure, tests only.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <utility>
#include <vector>

#include "tests/support/random_case.h"

namespace expertd::device_test {

inline constexpr uint32_t kSmallCases = 8;

inline bool is_small(const support::RandomCase& it) {
  const kernels::OpShape& shape = it.shape;
  return shape.ranks >= 2 && shape.ranks <= 3 && shape.experts <= 12 && shape.top_k <= 6 && shape.hidden <= 512 &&
         shape.row_bytes <= 1024 && shape.max_tokens <= 24;
}

/// Those that every run takes, whatever EXPERTD_CASES says: few of them make small cases. The start is one whose cases
/// have every payload, errors, masks and ranks that are missing.
inline std::vector<uint64_t> small_case_seeds() {
  constexpr uint32_t kSeeds = 4000;
  if (std::getenv("EXPERTD_SEED") != nullptr) {
    return support::seeds_to_run(1);
  }
  std::vector<uint64_t> seeds;
  support::Random random(10);
  for (uint32_t i = 0; i < kSeeds; ++i) {
    seeds.push_back(random.next());
  }
  return seeds;
}

/// Calls `run` with the case and its number for the first small ones that `accepts` takes.
template <typename Accepts, typename Run>
void for_small_cases(kernels::OpKind kind, const Accepts& accepts, const Run& run) {
  uint32_t ran = 0;
  for (const uint64_t seed : small_case_seeds()) {
    support::RandomCase made = support::make_random_case(seed, kind);
    if (is_small(made) && accepts(made)) {
      run(std::move(made), ran++);
    }
    if (ran == kSmallCases || testing::Test::HasFailure()) {
      break;
    }
  }
  EXPECT_GT(ran, 0u) << "the seed makes no case that is small and of this kind";
}

}  // namespace expertd::device_test
