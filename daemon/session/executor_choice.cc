// SPDX-License-Identifier: Apache-2.0
#include "daemon/session/executor_choice.h"

#include <algorithm>

#include "proto/abi/expertd_reason.h"

namespace expertd::session {
namespace {

/// What a rank lacks to be executed by copy engines; null: nothing.
const char* lack_of(const ExecutorFacts& rank) {
  if (!rank.is_cuda) {
    return "is on a host device, which has no copy engines";
  }
  if (!rank.reaches_all) {
    return "is on a GPU that does not reach those of all other ranks";
  }
  if (!rank.has_kernels) {
    return "has a client library without kernels for its GPU";
  }
  return nullptr;
}

ErrorDetail unsupported(int32_t rank, const std::string& sentence) {
  ErrorDetail error;
  error.status = base::Status(EXPERTD_REASON_UNSUPPORTED, sentence);
  error.rank = rank;
  error.field = "executor";
  error.value = "copy_engine";
  return error;
}

}  // namespace

ExecutorChoice choose_executor(const GroupConfig& config, const std::vector<ExecutorFacts>& ranks) {
  ExecutorChoice choice;
  if (config.executor == Executor::kAuto) {
    const bool fits = std::all_of(ranks.begin(), ranks.end(), [](const ExecutorFacts& rank) {
      return lack_of(rank) == nullptr && !rank.mps && rank.link_kernels;
    });
    choice.executor = fits ? Executor::kCopyEngine : Executor::kSm;
    return choice;
  }
  choice.executor = config.executor;
  if (config.executor != Executor::kCopyEngine) {
    return choice;
  }
  for (size_t r = 0; r < ranks.size() && choice.error.status.is_ok(); ++r) {
    if (const char* lack = lack_of(ranks[r]); lack != nullptr) {
      choice.error =
          unsupported(static_cast<int32_t>(r), "executor = copy_engine: rank " + std::to_string(r) + " " + lack);
    }
  }
  return choice;
}

}  // namespace expertd::session
