// SPDX-License-Identifier: Apache-2.0
#include "daemon/config/command_line.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdlib>
#include <exception>
#include <map>
#include <utility>
#include <vector>

#include "daemon/config/keys.h"
#include "daemon/config/print.h"
#include "daemon/config/value.h"

#ifndef EXPERTD_VERSION
#define EXPERTD_VERSION "0.1.0"
#endif
#ifndef EXPERTD_ABI_VERSION
#define EXPERTD_ABI_VERSION "1.4"
#endif
#ifndef EXPERTD_BUILD_DETAIL
#define EXPERTD_BUILD_DETAIL ""
#endif

namespace expertd::config {

namespace {

// CLI11 takes "--key=" as "the value is the next argument", splits "[1,2]" into two values of which one is lost, and
// "-1" for an option. So a value travels behind this mark, which nobody types by accident.
constexpr char kMark = '\x01';

std::string unmarked(const std::string& text) {
  return !text.empty() && text.front() == kMark ? text.substr(1) : text;
}

bool takes_value(std::string_view argument) {
  return argument == "--config" || argument == "--set" ||
         std::any_of(keys().begin(), keys().end(),
                     [&](const Key& key) { return key.type != Type::kBool && argument == flag_name(key); });
}

std::vector<std::string> mark_values(int argc, const char* const* argv) {
  std::vector<std::string> marked(argv, argv + argc);
  bool is_value = false;
  for (size_t i = 1; i < marked.size(); ++i) {
    std::string& argument = marked[i];
    const size_t equals = argument.find('=');
    if (is_value && !argument.starts_with("--")) {
      argument.insert(argument.begin(), kMark);
      is_value = false;
    } else {
      is_value = takes_value(argument);
      if (argument.starts_with("--") && equals != std::string::npos) {
        argument.insert(equals + 1, 1, kMark);
      }
    }
  }
  return marked;
}

/// What CLI11 fills in.
struct Arguments {
  std::optional<std::string> path;
  bool check = false;
  bool version = false;
  bool print = false;
  std::string print_form;
  std::vector<std::string> sets;
  std::map<std::string, std::string> direct;  // full name -> text
};

void declare_options(CLI::App& app, Arguments& arguments) {
  app.add_option_function<std::string>(
         "--config", [&arguments](const std::string& path) { arguments.path = unmarked(path); },
         "configuration file (default " + std::string(kDefaultConfigPath) + ", which may be absent)")
      ->type_name("PATH");
  app.add_flag("--check-config", arguments.check, "check the configuration and exit with 0 or 78");
  app.add_option_function<std::string>(
         "--print-config",
         [&arguments](const std::string& form) {
           arguments.print = true;
           arguments.print_form = unmarked(form);
         },
         "print the effective configuration with the origin of each value, or the example file")
      ->expected(0, 1)
      ->type_name("[=toml|json|example]");
  app.add_option("--set", arguments.sets, "set a key for this run; a key's own flag wins over it")
      ->type_name("SECTION.KEY=VALUE")
      ->allow_extra_args(false);
  app.add_flag("--version", arguments.version, "print the version and exit");
}

void declare_keys(CLI::App& app, Arguments& arguments) {
  for (const Key& key : keys()) {
    const std::string name = full_name(key);
    const bool is_bool = key.type == Type::kBool;
    CLI::Option* option = app.add_option_function<std::string>(
        flag_name(key),
        [&arguments, name, is_bool](const std::string& text) {
          // A boolean key's flag without a value: CLI11 hands out nothing or "true", unmarked.
          arguments.direct[name] = is_bool && text.empty() ? "true" : unmarked(text);
        },
        std::string(key.sentence) + " Default " + format_value(key, default_value(key)) + ".");
    option->take_last()->type_name("VALUE");
    option->group(key.section.empty() ? "Keys" : "Keys of [" + std::string(key.section) + "]");
    if (is_bool) {
      option->expected(0, 1)->type_name("[=true|false]");
    }
  }
}

CommandLine usage_error(const std::string& message) {
  CommandLine result;
  result.exit_code = kExitUsage;
  result.error = "expertd: " + message + "\nexpertd: try --help\n";
  return result;
}

/// Flags in the order in which they take effect; nothing when a --set has no '='.
std::optional<std::vector<std::pair<std::string, std::string>>> collect_flags(const Arguments& arguments) {
  std::vector<std::pair<std::string, std::string>> flags;
  for (const std::string& argument : arguments.sets) {
    const std::string set = unmarked(argument);
    const size_t equals = set.find('=');
    if (equals == std::string::npos || equals == 0) {
      return std::nullopt;
    }
    flags.emplace_back(set.substr(0, equals), set.substr(equals + 1));
  }
  for (const auto& [name, text] : arguments.direct) {
    flags.emplace_back(name, text);
  }
  return flags;
}

CommandLine interpret(const Arguments& arguments) {
  CommandLine result;
  if (arguments.version) {
    result.output = version_line() + "\n";
    return result;
  }
  const std::string& form = arguments.print_form;
  const bool print_toml_form = form.empty() || form == "toml" || form == "true";
  if (arguments.print && form == "example") {
    result.output = example_toml();
    return result;
  }
  if (arguments.print && !print_toml_form && form != "json") {
    return usage_error("--print-config=" + form + ": there are toml, json and example");
  }
  auto flags = collect_flags(arguments);
  if (!flags.has_value()) {
    return usage_error("--set wants section.key=value");
  }
  result.request.flags = *std::move(flags);
  if (arguments.path.has_value()) {
    result.request.path = *arguments.path;
    result.request.path_given = true;
  }
  result.action = arguments.print   ? (print_toml_form ? Action::kPrintToml : Action::kPrintJson)
                  : arguments.check ? Action::kCheckConfig
                                    : Action::kRun;
  return result;
}

CommandLine parse(int argc, const char* const* argv) {
  CLI::App app("Node daemon for mixture-of-experts dispatch and combine.", "expertd");
  app.get_formatter()->column_width(40);
  Arguments arguments;
  declare_options(app, arguments);
  declare_keys(app, arguments);
  try {
    std::vector<std::string> reversed = mark_values(argc, argv);  // CLI11 wants it from the back, without the program
    reversed.erase(reversed.begin(), reversed.begin() + std::min(argc, 1));
    std::reverse(reversed.begin(), reversed.end());
    app.parse(std::move(reversed));
  } catch (const CLI::CallForHelp&) {
    CommandLine result;
    result.output = app.help();
    return result;
  } catch (const CLI::ParseError& error) {
    std::string message = error.what();
    std::erase(message, kMark);
    return usage_error(message);
  }
  return interpret(arguments);
}

}  // namespace

CommandLine parse_command_line(int argc, const char* const* argv, EnvironmentLookup environment) {
  try {
    CommandLine result = parse(argc, argv);
    result.request.environment = std::move(environment);
    return result;
  } catch (const std::exception& error) {  // the declaration of an option itself
    CommandLine result;
    result.exit_code = kExitInternal;
    result.error = std::string("expertd: ") + error.what() + "\n";
    return result;
  }
}

EnvironmentLookup process_environment() {
  return [](const std::string& name) -> std::optional<std::string> {
    const char* text = std::getenv(name.c_str());
    return text == nullptr ? std::nullopt : std::optional<std::string>(text);
  };
}

Startup carry_out(const CommandLine& command_line) {
  Startup startup;
  startup.exit_code = command_line.exit_code;
  startup.output = command_line.output;
  startup.error = command_line.error;
  if (command_line.action == Action::kExit) {
    return startup;
  }
  base::Result<LoadedConfig> loaded = load(command_line.request);
  if (!loaded.is_ok()) {
    startup.exit_code = kExitConfig;
    startup.error += loaded.status().message() + "\n";
    return startup;
  }
  switch (command_line.action) {
    case Action::kPrintToml:
      startup.output += print_toml(loaded.value().report);
      break;
    case Action::kPrintJson:
      startup.output += print_json(loaded.value().report);
      break;
    case Action::kRun:
      startup.loaded = std::move(loaded).value();
      break;
    case Action::kCheckConfig:
    case Action::kExit:
      break;
  }
  return startup;
}

std::string version_line() {
  return "expertd " EXPERTD_VERSION " (abi " EXPERTD_ABI_VERSION EXPERTD_BUILD_DETAIL ")";
}

}  // namespace expertd::config
