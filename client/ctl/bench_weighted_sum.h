// SPDX-License-Identifier: Apache-2.0
// The tolerant check of a low latency combine: every element against the weighted sum in float32, and the whole output.
// Belongs to a rank's thread.
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

/// How often a term may be rounded to bf16 on its way: as its rank's sum and as the result; between nodes also as its
/// node's sum.
inline constexpr uint32_t kRoundingsOnOneNode = 2;
inline constexpr uint32_t kRoundingsAcrossNodes = 3;

/// Throws Failure unless rows [0, tokens) of `combined` are the sums of what `terms_of(token)` says and the row behind
/// them is untouched.
void check_weighted_sums(const BenchCheck& check, const BenchTensor& combined, uint64_t tokens,
                         const std::function<std::vector<BenchTerm>(uint64_t)>& terms_of,
                         uint32_t roundings = kRoundingsOnOneNode);

}  // namespace expertd::ctl
