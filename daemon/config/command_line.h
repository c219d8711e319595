// SPDX-License-Identifier: Apache-2.0
// The daemon's command line: arguments to an action, and the actions that only print carried out as
// text. Called by `main` once, before any thread starts. Prints nothing and never exits: `main`
// writes the text and returns the code. The only file that includes CLI11 (which throws: caught
// there).
#pragma once

#include <optional>
#include <string>

#include "daemon/config/config.h"

namespace expertd::config {

inline constexpr int kExitOk = 0;
inline constexpr int kExitUsage = 64;
inline constexpr int kExitUnavailable = 69;
inline constexpr int kExitInternal = 70;
inline constexpr int kExitTryAgain = 75;
inline constexpr int kExitConfig = 78;

enum class Action {
  kRun,          // load, then serve
  kCheckConfig,  // load, print mistakes, end
  kPrintToml,
  kPrintJson,
  kExit,  // `output` and `error` hold all there is to say
};

struct CommandLine {
  Action action = Action::kExit;
  LoadRequest request;
  int exit_code = kExitOk;
  std::string output;  // for stdout
  std::string error;   // for stderr
};

CommandLine parse_command_line(int argc, const char* const* argv, EnvironmentLookup environment);

/// getenv() of this process; call it before threads start.
EnvironmentLookup process_environment();

/// What is left to do after the command line and the files it names have been read.
struct Startup {
  std::optional<LoadedConfig> loaded;  // present: serve with it
  int exit_code = kExitOk;
  std::string output;
  std::string error;
};

/// Loads, checks or prints as the command line asked.
Startup carry_out(const CommandLine& command_line);

/// "expertd 0.1.0 (abi 1.2)".
std::string version_line();

}  // namespace expertd::config
