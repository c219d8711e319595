// SPDX-License-Identifier: Apache-2.0
// Exit codes of expertctl, stable for scripts; the numbers are those of sysexits.h where it has one. Constants.
#pragma once

namespace expertd::ctl {

inline constexpr int kExitOk = 0;
inline constexpr int kExitCheckFailed = 1;   // not ready; the doctor found a failure
inline constexpr int kExitUsage = 64;        // wrong arguments
inline constexpr int kExitUnavailable = 69;  // the daemon does not answer
inline constexpr int kExitInternal = 70;     // the daemon answered with an error
inline constexpr int kExitPermission = 77;   // this user may not ask for that

}  // namespace expertd::ctl
