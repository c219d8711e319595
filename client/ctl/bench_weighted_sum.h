// SPDX-License-Identifier: Apache-2.0
// The tolerant check of a combine, of low latency or over several daemons: every element against the weighted sum in
// float32, and the whole output. Belongs to a rank's thread.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "client/ctl/bench_check.h"

namespace expertd::ctl {

/// One summand of a token's row.
struct BenchTerm {
  float weight = 0;
  std::vector<uint16_t> row;  // bf16
};

/// How often a sum is rounded to bf16 on its way: by each rank and at its end, and by each daemon where there are
/// several.
inline constexpr uint32_t kBenchRoundings = 2;
inline constexpr uint32_t kBenchRoundingsOverDaemons = 3;

/// Throws Failure unless rows [0, tokens) of `combined` are the sums of what `terms_of(token)` says and the row behind
/// them is untouched.
void check_weighted_sums(const BenchCheck& check, const BenchTensor& combined, uint64_t tokens,
                         const std::function<std::vector<BenchTerm>(uint64_t)>& terms_of,
                         uint32_t roundings = kBenchRoundings);

}  // namespace expertd::ctl
