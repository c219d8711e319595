// SPDX-License-Identifier: Apache-2.0
// The configuration file as a flat list of entries with their places; knows TOML and nothing of the
// keys. The only file that includes toml++ (which throws: caught there). Pure but for reading the
// one file; any thread; used by the loader.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "daemon/base/status.h"

namespace expertd::config {

enum class NodeKind { kBoolean, kInteger, kFloat, kString, kIntegerArray, kStringArray, kOtherArray, kTable, kDate };

/// "an integer", for messages.
std::string_view node_kind_name(NodeKind kind);

struct Place {
  uint32_t line = 0;
  uint32_t column = 0;
};

/// One key of the file. A section appears as an entry of kind kTable without a section, before its
/// keys.
struct FileEntry {
  std::string section;  // empty at the top level
  std::string name;
  NodeKind kind = NodeKind::kString;
  std::string text;  // booleans, integers and strings as text, arrays of them with commas
  Place key_place;
  Place value_place;
};

/// Empty when the file does not exist; CONFIG_UNREADABLE with the path when it cannot be read.
base::Result<std::optional<std::string>> read_text(const std::string& path);

/// Syntax errors as "PATH:LINE:COL: ...".
base::Result<std::vector<FileEntry>> parse_toml(std::string_view text, const std::string& path);

}  // namespace expertd::config
