// SPDX-License-Identifier: Apache-2.0
// The command line: global options, verbs, help, exit codes. `main` gives the table of verbs; a verb is one line of it.
// Main thread. Every verb honours --json; nothing here knows what a verb does.
#pragma once

#include <cstdint>
#include <functional>
#include <iosfwd>
#include <span>
#include <string>

namespace CLI {
class App;
}  // namespace CLI

namespace expertd::ctl {

/// Filled in before a verb runs.
struct Context {
  std::string socket;
  uint64_t timeout_ns = 0;
  bool json = false;
  bool terminal = false;  // out is one
  std::ostream* out = nullptr;
  std::ostream* err = nullptr;
};

/// What a verb does when it was chosen; returns the exit code.
using Action = std::function<int()>;

struct Verb {
  const char* name;
  const char* sentence;
  /// Adds the verb's own options. `context` is filled in when the action runs.
  std::function<Action(CLI::App& verb, const Context& context)> add;
};

/// For a verb with a command line of its own: everything behind its name is passed on, argv[0] being the name.
std::function<Action(CLI::App& verb, const Context& context)> pass_through(int (*run)(int argc, char** argv));

struct CommandLine {
  int argc = 0;
  const char* const* argv = nullptr;
  std::ostream& out;
  std::ostream& err;
  bool terminal = false;
};

int run_cli(const CommandLine& line, std::span<const Verb> verbs);

}  // namespace expertd::ctl
