// SPDX-License-Identifier: Apache-2.0
// The hint of a loop that polls to its core. Pure, any thread.
#pragma once

namespace expertd::client {

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");  // A hint to the core; orders nothing.
#endif
}

}  // namespace expertd::client
