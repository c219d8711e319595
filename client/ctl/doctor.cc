// SPDX-License-Identifier: Apache-2.0
#include "client/ctl/doctor.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <nlohmann/json.hpp>
#include <ostream>

#include "client/ctl/exit_codes.h"
#include "client/ctl/render.h"
#include "client/ctl/verbs.h"

namespace expertd::ctl {

namespace {

constexpr size_t kNameWidth = 18;

void append(Checks* all, Checks more) {
  all->insert(all->end(), std::make_move_iterator(more.begin()), std::make_move_iterator(more.end()));
}

}  // namespace

std::string_view level_name(Level level) {
  switch (level) {
    case Level::kOk:
      return "ok";
    case Level::kWarn:
      return "warn";
    case Level::kFail:
      return "fail";
  }
  return "";
}

bool any_failed(const Checks& checks) {
  return std::ranges::any_of(checks, [](const Check& check) { return check.level == Level::kFail; });
}

std::string doctor_text(const Checks& checks) {
  std::string out;
  int counts[3] = {0, 0, 0};
  for (const Check& check : checks) {
    ++counts[static_cast<int>(check.level)];
    std::string line(level_name(check.level));
    line.resize(6, ' ');
    line += check.name;
    line.resize(std::max(line.size() + 1, 6 + kNameWidth), ' ');
    line += check.finding;
    if (!check.remedy.empty()) {
      line += "; do: " + check.remedy;
    }
    if (!check.without.empty()) {
      line += "; without: " + check.without;
    }
    out += line + "\n";
  }
  return out + std::to_string(counts[0]) + " ok, " + std::to_string(counts[1]) + " warn, " + std::to_string(counts[2]) +
         " fail\n";
}

nlohmann::json doctor_json(const Checks& checks) {
  nlohmann::json list = nlohmann::json::array();
  for (const Check& check : checks) {
    list.push_back({{"name", check.name},
                    {"level", level_name(check.level)},
                    {"finding", check.finding},
                    {"remedy", check.remedy},
                    {"without", check.without}});
  }
  return {{"checks", std::move(list)}, {"ok", !any_failed(checks)}};
}

Action add_doctor(CLI::App&, const Context& context) {
  return [&context] {
    Checks checks = check_system();
    append(&checks, check_daemon(context.socket, context.timeout_ns));
    append(&checks, check_gpus());
    append(&checks, check_fabric());
    *context.out << (context.json ? json_text(doctor_json(checks)) : doctor_text(checks));
    return any_failed(checks) ? kExitCheckFailed : kExitOk;
  };
}

}  // namespace expertd::ctl
