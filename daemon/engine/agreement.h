// SPDX-License-Identifier: Apache-2.0
// What the ranks of a collective must have given alike. The values are numbers, so that they can travel to ranks of
// other nodes with an operation's counts (fabric_port.h) and all ranks find the same mismatch. Pure.
#pragma once

#include <array>
#include <cstdint>

#include "daemon/engine/ports.h"

namespace expertd::engine {

inline constexpr uint32_t kAgreements = 13;
/// The value of a rank that agrees with anybody: it has no rows, and left the tensor out.
inline constexpr int64_t kAgreesWithAny = INT64_MIN;
using AgreementValues = std::array<int64_t, kAgreements>;

struct Mismatch {
  uint32_t argument = 0;  // expertd_argument
  uint32_t rank = 0;      // the first whose value is another one than that of the ranks before it
  int64_t value = 0;
  int64_t expected = 0;
};

AgreementValues agreement_values(const Request& request);
/// Of the ranks in `active`, by rank number; false when they agree.
bool find_mismatch(const AgreementValues* given, uint64_t active, Mismatch* mismatch);

}  // namespace expertd::engine
