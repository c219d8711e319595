// SPDX-License-Identifier: Apache-2.0
// Environment variables that UCX and CUDA read in library constructors, before main() could set
// them: one that is missing is set and the process executes itself once more. Called by `main`
// first of all, before any thread and any CUDA or UCX call. What an operator has set is left as it
// is.
#pragma once

#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "daemon/base/status.h"

namespace expertd::supervise {

struct EnvironmentVariable {
  std::string name;
  std::string value;
};

/// What the daemon wants to find.
std::span<const EnvironmentVariable> required_environment();

struct EnvironmentPlan {
  std::vector<EnvironmentVariable> missing;
  /// Set to something else than the daemon wants, with the value found; worth a warning.
  std::vector<EnvironmentVariable> different;
  /// Something is missing and this process has not executed itself before. When it has, `missing`
  /// is worth an error.
  bool reexecute = false;
};

using EnvironmentLookup = std::function<std::optional<std::string>(const std::string& name)>;

/// Pure.
EnvironmentPlan plan_environment(const EnvironmentLookup& environment);

/// Sets what is missing and the guard EXPERTD_REEXECUTED=1, then replaces the process image by
/// `executable`. Returns only on failure. The process keeps its pid and its arguments.
base::Status reexecute(const EnvironmentPlan& plan, char* const* argv, const char* executable = "/proc/self/exe");

}  // namespace expertd::supervise
