// SPDX-License-Identifier: Apache-2.0
// Which executor a group's operations get: one answer for all ranks, from what each rank's device and
// client can. Pure, any thread.
#pragma once

#include <vector>

#include "daemon/session/api.h"

namespace expertd::session {

/// One rank of a group that is formed.
struct ExecutorFacts {
  bool is_cuda = false;
  bool mps = false;
  bool reaches_all = false;   // its GPU reaches those of all ranks
  bool link_kernels = false;  // the daemon would have its fast kernels there
  bool has_kernels = false;   // the client's library has its own
};

struct ExecutorChoice {
  Executor executor = Executor::kSm;
  ErrorDetail error;  // UNSUPPORTED, naming rank and what is missing: only where COPY_ENGINE was asked for
};

/// `ranks` in rank order. `config.executor` kAuto: copy engines where every rank can, without MPS; under MPS
/// kernels of the daemon have a place beside the client's.
ExecutorChoice choose_executor(const GroupConfig& config, const std::vector<ExecutorFacts>& ranks);

}  // namespace expertd::session
