// SPDX-License-Identifier: Apache-2.0
// Text to value and back, for one key of the table: the only parser of values, whether they come
// from a flag, the environment or the file. Pure functions, any thread; used inside daemon/config.
#pragma once

#include <string>
#include <string_view>

#include "daemon/base/status.h"
#include "daemon/config/keys.h"

namespace expertd::config {

/// The message of a failure says what is allowed; the caller puts the place in front.
base::Result<Value> parse_value(const Key& key, std::string_view text);

/// The value as a TOML literal: 20, true, "30s", [1000, 1001].
std::string format_value(const Key& key, const Value& value);

/// "an integer from 0 to 1000000", for messages, --help and the example file.
std::string describe_allowed(const Key& key);

/// A TOML basic string, which is a JSON string as well.
std::string quote(std::string_view text);

/// The default of a key; the table's defaults are valid (a test walks them).
Value default_value(const Key& key);

}  // namespace expertd::config
