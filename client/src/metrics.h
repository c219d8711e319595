// SPDX-License-Identifier: Apache-2.0
// This process's own counters, as Prometheus text. Relaxed atomics, any thread; process-wide because the C function
// that prints them takes no session.
#pragma once

#include <cstdint>
#include <string>

namespace expertd::client {

void observe_op(uint32_t op, bool succeeded, uint64_t duration_ns, uint64_t bytes);
void count_staged_copy(uint64_t bytes);
void count_reattach();
/// A local operation that the library's own kernels execute.
void count_local_op();
/// A GPU session without them.
void count_missing_kernels();
void count_session(int change);

std::string metrics_text();

}  // namespace expertd::client
