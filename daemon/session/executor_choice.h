// SPDX-License-Identifier: Apache-2.0
// The rule by which a group's operations get their executor: one for all ranks, from what each rank's device and client
// can. Pure, any thread.
#pragma once

#include <string>
#include <vector>

#include "daemon/session/api.h"
#include "proto/abi/executor_v1.h"

namespace expertd::session {

/// A split HT operation of fewer bytes (bound x hidden x 2) stays with the daemon's kernels under MPS: 16 MiB cross in
/// about 50 us, in which 24 of 132 multiprocessors are away from who computes. That is about what the kernels and words
/// of a chain cost it; for less the chain costs more than it frees.
inline constexpr uint64_t kHtSplitBytesMin = 16ULL << 20;

/// A rank's exchange window that `auto` takes under MPS, where only split operations use it and none may come; for
/// more, copy_engine has to be asked for. Eight ranks of 1024 tokens, hidden 7168 and top 8 have one of 898 MiB for low
/// latency, and of 4096 tokens one of 884 MiB for high throughput. Low latency comes first where both do not fit.
inline constexpr uint64_t kSplitWindowBytesMax = 1ULL << 30;

/// One rank of a group that is formed.
struct ExecutorFacts {
  bool is_cuda = false;
  bool mps = false;
  bool reaches_all = false;   // its GPU reaches those of all ranks
  bool link_kernels = false;  // the daemon would have its fast kernels there
  bool has_kernels = false;   // the client's library has its own
  uint32_t copies = 0;        // set of expertd_copies that it evaluates a rule for; 0: it knows one executor per group
};

struct ExecutorChoice {
  expertd_executor_rule rule{};
  /// Of all low latency operations, for clients that know nothing else; kAuto: it depends on the operation.
  Executor executor = Executor::kSm;
  ErrorDetail error;  // UNSUPPORTED, naming rank and what is missing: only where COPY_ENGINE was asked for
};

/// `ranks` in rank order, `built` what the daemon can. `config.executor` kAuto, where every rank can: without MPS
/// copies for all operations, since a kernel of the daemon waits for its time slice there; under MPS, where kernels
/// have a place beside the client's, for split operations alone, whose caller computes meanwhile (measured, two
/// micro-batches of low latency take 2.43 times one by kernels, and 1.48 times by copies). With a client that knows one
/// executor per group all low latency operations have the same one, and under MPS that is SM.
ExecutorChoice choose_executor(const GroupConfig& config, const std::vector<ExecutorFacts>& ranks,
                               uint32_t built = EXPERTD_COPIES_BUILT);

/// For people: "ll sm, split copy_engine; ht sm".
std::string rule_text(GroupMode mode, const expertd_executor_rule& rule);

}  // namespace expertd::session
