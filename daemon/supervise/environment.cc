// SPDX-License-Identifier: Apache-2.0
#include "daemon/supervise/environment.h"

#include <stdlib.h>
#include <unistd.h>

#include <array>
#include <climits>

namespace expertd::supervise {

namespace {

constexpr const char* kGuard = "EXPERTD_REEXECUTED";

/// The file behind a link: the kernel names a process after the file it executes, and "exe" would
/// tell nobody anything.
std::string link_target(const char* link) {
  std::array<char, PATH_MAX> target{};
  const ssize_t bytes = ::readlink(link, target.data(), target.size() - 1);
  std::string path(target.data(), bytes > 0 ? static_cast<size_t>(bytes) : 0);
  // A binary replaced while it runs reads as "... (deleted)"; the link itself still works.
  return path.empty() || ::access(path.c_str(), X_OK) != 0 ? std::string(link) : path;
}

}  // namespace

std::span<const EnvironmentVariable> required_environment() {
  static const std::array<EnvironmentVariable, 7> kRequired{{
      {"UCX_ERROR_SIGNALS", ""},              // UCX installs no signal handlers of its own
      {"UCX_HANDLE_ERRORS", "none"},          // nor prints a backtrace in front of a core dump
      {"UCX_DEBUG_SIGNO", "0"},               // nor takes a signal for its debugger
      {"UCX_WARN_UNUSED_ENV_VARS", "n"},      // the three above are not known to every release
      {"CUDA_DEVICE_MAX_CONNECTIONS", "32"},  // armed streams that progress independently
      {"CUDA_MODULE_LOADING", "EAGER"},       // a lazy load hangs behind a parked stream
      {"CUDA_DEVICE_ORDER", "PCI_BUS_ID"},    // the order of nvidia-smi
  }};
  return kRequired;
}

EnvironmentPlan plan_environment(const EnvironmentLookup& environment) {
  EnvironmentPlan plan;
  for (const EnvironmentVariable& wanted : required_environment()) {
    const std::optional<std::string> found = environment(wanted.name);
    if (!found.has_value()) {
      plan.missing.push_back(wanted);
    } else if (*found != wanted.value) {
      plan.different.push_back({wanted.name, *found});
    }
  }
  plan.reexecute = !plan.missing.empty() && environment(kGuard) != "1";
  return plan;
}

base::Status reexecute(const EnvironmentPlan& plan, char* const* argv, const char* executable) {
  for (const EnvironmentVariable& variable : plan.missing) {
    if (::setenv(variable.name.c_str(), variable.value.c_str(), 1) != 0) {
      return base::errno_status("setenv " + variable.name);
    }
  }
  if (::setenv(kGuard, "1", 1) != 0) {
    return base::errno_status(std::string("setenv ") + kGuard);
  }
  ::execv(link_target(executable).c_str(), argv);
  return base::errno_status(std::string("execv ") + executable);
}

}  // namespace expertd::supervise
