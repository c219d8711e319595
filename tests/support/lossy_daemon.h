// SPDX-License-Identifier: Apache-2.0
// What can be asked of expertd_lossy_daemon (lossy_daemon.cc) with SIGUSR1: a set, to which each signal adds. A loss is
// seen when every loop that was asked to be stuck is.
#pragma once

#include <cstdint>

namespace expertd::support {

inline constexpr uint32_t kLoop0Stuck = 1;
inline constexpr uint32_t kLoop1Stuck = 2;
inline constexpr uint32_t kLoop1SeesLoss = 4;
inline constexpr uint32_t kProbe0SeesLoss = 8;

}  // namespace expertd::support
