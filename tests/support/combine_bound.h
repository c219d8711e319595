// SPDX-License-Identifier: Apache-2.0
// How near an element of a combine over several nodes is to the same on one node. Pure; tests only.
#pragma once

#include <cmath>

namespace expertd::support {

/// Of bf16 values; `elsewhere` is the sum of the sizes of the other nodes' sums. Rounding costs at most 2^-8 of what is
/// rounded: here each other node's sum and the two results. The order of the float32 sums is another one, too, which
/// shows where rows cancel each other.
inline float nodes_combine_bound(float elsewhere, float got, float wanted) {
  return (elsewhere + std::abs(got) + std::abs(wanted)) * 0x1p-8f + 0x1p-14f;
}

/// Weights are summed in float32 in another order.
inline constexpr float kNodesWeightBound = 1e-5f;

}  // namespace expertd::support
