// SPDX-License-Identifier: Apache-2.0
#include "client/ctl/cli.h"

#include <CLI/CLI.hpp>
#include <exception>
#include <memory>
#include <ostream>
#include <vector>

#include "client/ctl/daemon_client.h"
#include "client/ctl/exit_codes.h"
#include "client/ctl/format.h"

#ifndef EXPERTD_VERSION
#define EXPERTD_VERSION "unknown"
#endif

namespace expertd::ctl {

namespace {

const char* const kFooter =
    "Exit codes: 0 ok, 1 a check failed (not ready, doctor), 64 wrong arguments, 69 the daemon does not answer,\n"
    "70 the daemon answered with an error, 77 not allowed for this user.";

/// The chosen verb's action behind what CLI11 may throw on the way.
int parse_and_run(CLI::App& app, const CommandLine& line, const Action* chosen) {
  try {
    app.parse(line.argc, line.argv);
  } catch (const CLI::Success& asked) {  // --help, --version
    app.exit(asked, line.out, line.err);
    return kExitOk;
  } catch (const CLI::ParseError& wrong) {
    line.err << "expertctl: " << wrong.what() << "\nSee: expertctl --help\n";
    return kExitUsage;
  }
  if (*chosen == nullptr) {
    line.err << app.help();
    return kExitUsage;
  }
  return (*chosen)();
}

}  // namespace

std::function<Action(CLI::App& verb, const Context& context)> pass_through(int (*run)(int argc, char** argv)) {
  return [run](CLI::App& verb, const Context& context) {
    verb.prefix_command();
    verb.fallthrough(false);
    verb.set_help_flag();  // its own
    return [run, &verb, &context] {
      std::vector<std::string> words = verb.remaining();
      words.insert(words.begin(), verb.get_name());
      if (context.json) {
        words.emplace_back("--json");  // given before the verb
      }
      std::vector<char*> argv;
      for (std::string& word : words) {
        argv.push_back(word.data());
      }
      argv.push_back(nullptr);
      return run(static_cast<int>(words.size()), argv.data());
    };
  };
}

int run_cli(const CommandLine& line, std::span<const Verb> verbs) {
  Context context;
  context.socket = default_socket();
  context.terminal = line.terminal;
  context.out = &line.out;
  context.err = &line.err;
  std::string timeout = "5s";
  Action chosen;
  try {
    CLI::App app("Looks at and steers the expertd daemon of this node.", "expertctl");
    app.footer(kFooter);
    app.set_version_flag("--version", "expertctl " EXPERTD_VERSION);
    app.require_subcommand(0, 1);  // none is told below: an unknown word should be named first
    app.fallthrough();
    app.add_option("--socket", context.socket, "The daemon's control socket")->capture_default_str()->type_name("PATH");
    app.add_option("--timeout", timeout, "Longest wait for an answer")
        ->capture_default_str()
        ->type_name("DURATION")
        ->check([](const std::string& text) {
          return parse_duration_ns(text).value_or(0) > 0 ? "" : "\"" + text + "\" is no duration such as 500ms or 5s";
        });
    app.add_flag("--json", context.json, "Print JSON; numbers are in the units their names end with");
    for (const Verb& verb : verbs) {
      CLI::App* const sub = app.add_subcommand(verb.name, verb.sentence);
      sub->fallthrough();
      Action action = verb.add(*sub, context);
      sub->final_callback([&chosen, action = std::move(action)] { chosen = action; });
    }
    app.final_callback([&context, &timeout] { context.timeout_ns = parse_duration_ns(timeout).value_or(0); });
    return parse_and_run(app, line, &chosen);
  } catch (const std::exception& error) {
    line.err << "expertctl: internal error: " << error.what() << "\n";
    return kExitInternal;
  }
}

}  // namespace expertd::ctl
