// SPDX-License-Identifier: Apache-2.0
// The one table of configuration keys. The loader, the printer, the command line and the example
// file all walk it, so a key is added by adding its row (key_table.cc) and its field (config.h).
// Immutable, any thread; read inside daemon/config.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "daemon/config/config.h"

namespace expertd::config {

enum class Type {
  kBool,
  kInteger,
  kPowerOfTwo,
  kDuration,  // nanoseconds
  kSize,      // bytes
  kMode,      // file permission bits, written in octal
  kChoice,    // one of `choices`
  kString,
  kPath,     // absolute
  kAddress,  // IPv4 or IPv6 literal
  kGpus,
  kIntegerList,
  kTextList,
};

/// A parsed value before it lands in its field: which member counts follows from the key's type.
struct Value {
  int64_t integer = 0;     // bool, integer, nanoseconds, bytes, mode, index of the choice
  bool automatic = false;  // a size given as "auto"
  std::string text;        // string, path, address; the normalised list of kGpus
  std::vector<uint32_t> list;
  std::vector<std::string> texts;
};

struct Key {
  std::string_view section = {};  // empty for the top level
  std::string_view name = {};
  Type type = Type::kString;
  int64_t min = 0;  // of integers, durations (ns), sizes (bytes), the elements of a list
  int64_t max = 0;
  int64_t plain_unit = 1;              // what 1 means when a duration or size is a plain number
  bool allow_auto = false;             // kSize: "auto" is a value
  std::string_view default_text = {};  // as a flag would give it
  std::string_view choices = {};       // "a|b|c"
  std::string_view sentence = {};
  std::string_view short_environment = {};  // a second variable, which environment_name() wins over
  bool reloadable = false;
  bool (*accepts)(std::string_view text) = nullptr;  // kString, each entry of kTextList; null: anything
  std::string_view form = {};                        // what it accepts, for messages
  void (*set)(Config& config, const Value& value) = nullptr;
};

std::span<const Key> keys();
/// A part of them, for the table.
std::vector<Key> fabric_lane_keys();

/// "engine.spin_us", "--engine-spin-us", "EXPERTD_ENGINE_SPIN_US".
std::string full_name(const Key& key);
std::string flag_name(const Key& key);
std::string environment_name(const Key& key);

/// nullptr when there is none.
const Key* find_key(std::string_view section, std::string_view name);
const Key* find_key(std::string_view full_name);
bool is_section(std::string_view name);

/// The known name nearest to a misspelt one; empty when none is near. For keys the result is a full
/// name.
std::string nearest_key(std::string_view section, std::string_view name);
std::string nearest_section(std::string_view name);

}  // namespace expertd::config
