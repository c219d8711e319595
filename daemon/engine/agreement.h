// SPDX-License-Identifier: Apache-2.0
// What all ranks of a collective must have given alike, as numbers that can be compared wherever the ranks are. Pure;
// loop threads.
#pragma once

#include <array>
#include <cstdint>

#include "daemon/engine/ports.h"

namespace expertd::engine {

inline constexpr uint32_t kAgreements = 13;
using AgreedValues = std::array<int64_t, kAgreements>;

/// A rank without rows may leave optional tensors out (an empty tensor often has no pointer), so it agrees with
/// anybody.
inline constexpr int64_t kAgreesWithAny = INT64_MIN;

/// The request's values, in the order in which a disagreement is named.
AgreedValues agreed_values(const Request& request);
/// The expertd_argument that value `index` of them is of.
uint32_t agreed_argument(uint32_t index);

}  // namespace expertd::engine
