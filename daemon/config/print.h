// SPDX-License-Identifier: Apache-2.0
// The configuration as text: the effective one with the origin of every value, and the commented
// example file. Pure functions, any thread; called by the command line and by tests.
#pragma once

#include <string>
#include <vector>

#include "daemon/config/config.h"

namespace expertd::config {

/// A file that loads to the same values, with the origin behind each.
std::string print_toml(const std::vector<KeyReport>& report);

/// {"engine.spin_us": {"value": 50, "origin": "default"}, ...}
std::string print_json(const std::vector<KeyReport>& report);

/// deploy/config/expertd.toml: every key with its explanation, commented out at its default.
std::string example_toml();

}  // namespace expertd::config
