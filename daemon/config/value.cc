// SPDX-License-Identifier: Apache-2.0
#include "daemon/config/value.h"

#include <arpa/inet.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdio>
#include <limits>
#include <optional>
#include <span>

#include "daemon/base/limits.h"
#include "daemon/base/log.h"

namespace expertd::config {

namespace {

constexpr size_t kMaxTextBytes = 4096;
constexpr size_t kMaxListEntries = 1024;
constexpr size_t kMaxTextEntries = 64;

struct Unit {
  std::string_view name;
  int64_t factor;
};

// Largest first: a value is printed in the largest unit that leaves a whole number.
constexpr std::array<Unit, 6> kDurationUnits{{{"h", 3'600'000'000'000},
                                              {"min", 60'000'000'000},
                                              {"s", 1'000'000'000},
                                              {"ms", 1'000'000},
                                              {"us", 1'000},
                                              {"ns", 1}}};
constexpr std::array<Unit, 5> kSizeUnits{{{"TiB", int64_t{1} << 40},
                                          {"GiB", int64_t{1} << 30},
                                          {"MiB", int64_t{1} << 20},
                                          {"KiB", int64_t{1} << 10},
                                          {"B", 1}}};

std::span<const Unit> units_of(const Key& key) {
  return key.type == Type::kDuration ? std::span<const Unit>(kDurationUnits) : std::span<const Unit>(kSizeUnits);
}

base::Status bad_value(std::string message) {
  return base::Status(EXPERTD_REASON_CONFIG_BAD_VALUE, std::move(message));
}

std::string_view trim(std::string_view text) {
  while (!text.empty() && (text.front() == ' ' || text.front() == '\t')) {
    text.remove_prefix(1);
  }
  while (!text.empty() && (text.back() == ' ' || text.back() == '\t')) {
    text.remove_suffix(1);
  }
  return text;
}

std::optional<int64_t> parse_integer(std::string_view text, int radix = 10) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value, radix);
  if (error != std::errc() || end != text.data() + text.size()) {
    return std::nullopt;
  }
  return value;
}

std::string format_scaled(int64_t value, std::span<const Unit> units) {
  if (value == 0) {
    return "0" + std::string(units.size() == kDurationUnits.size() ? "s" : "B");
  }
  for (const Unit& unit : units) {
    if (value % unit.factor == 0) {
      return std::to_string(value / unit.factor).append(unit.name);
    }
  }
  return std::to_string(value);
}

std::string format_bound(const Key& key, int64_t bound) {
  if (key.type == Type::kDuration || key.type == Type::kSize) {
    return format_scaled(bound, units_of(key));
  }
  if (key.type == Type::kMode) {
    std::array<char, 16> octal{};
    std::snprintf(octal.data(), octal.size(), "%04o", static_cast<unsigned>(bound));
    return octal.data();
  }
  return std::to_string(bound);
}

base::Status refuse(const Key& key, std::string_view text) {
  return bad_value(quote(text) + " is not " + describe_allowed(key));
}

base::Result<Value> in_range(const Key& key, std::string_view text, int64_t number) {
  if (number < key.min || number > key.max) {
    return bad_value(std::string(text) + " is out of range, allowed " + format_bound(key, key.min) + " to " +
                     format_bound(key, key.max));
  }
  Value value;
  value.integer = number;
  return value;
}

base::Result<Value> parse_bool(const Key& key, std::string_view text) {
  if (text != "true" && text != "false") {
    return refuse(key, text);
  }
  Value value;
  value.integer = text == "true" ? 1 : 0;
  return value;
}

base::Result<Value> parse_number(const Key& key, std::string_view text) {
  const std::optional<int64_t> number = parse_integer(text, key.type == Type::kMode ? 8 : 10);
  if (!number.has_value()) {
    return refuse(key, text);
  }
  base::Result<Value> value = in_range(key, text, *number);
  const bool power_of_two = *number > 0 && (*number & (*number - 1)) == 0;
  if (value.is_ok() && key.type == Type::kPowerOfTwo && !power_of_two) {
    return refuse(key, text);
  }
  return value;
}

base::Result<Value> parse_scaled(const Key& key, std::string_view text) {
  if (key.allow_auto && text == "auto") {
    Value value;
    value.automatic = true;
    return value;
  }
  const size_t digits = std::min(text.find_first_not_of("0123456789"), text.size());
  const std::optional<int64_t> count = parse_integer(text.substr(0, digits));
  const std::string_view suffix = trim(text.substr(digits));
  int64_t factor = suffix.empty() ? key.plain_unit : 0;
  for (const Unit& unit : units_of(key)) {
    factor = unit.name == suffix ? unit.factor : factor;
  }
  if (digits == 0 || factor == 0) {
    return refuse(key, text);
  }
  int64_t number = std::numeric_limits<int64_t>::max();
  if (!count.has_value() || __builtin_mul_overflow(*count, factor, &number)) {
    number = std::numeric_limits<int64_t>::max();  // above every range of the table
  }
  return in_range(key, text, number);
}

base::Result<Value> parse_choice(const Key& key, std::string_view text) {
  std::string_view rest = key.choices;
  for (Value value; !rest.empty(); ++value.integer) {
    const size_t end = std::min(rest.find('|'), rest.size());
    if (rest.substr(0, end) == text) {
      return value;
    }
    rest.remove_prefix(std::min(end + 1, rest.size()));
  }
  return refuse(key, text);
}

/// True for well-formed UTF-8 without control characters.
bool is_printable(std::string_view text) {
  while (!text.empty()) {
    const size_t bytes = base::utf8_sequence_bytes(text);
    if (bytes == 0 || static_cast<unsigned char>(text.front()) < 0x20 || text.front() == 0x7F) {
      return false;
    }
    text.remove_prefix(bytes);
  }
  return true;
}

base::Result<Value> parse_string(const Key& key, std::string_view text) {
  if (text.size() > kMaxTextBytes || !is_printable(text)) {
    return bad_value("the text is longer than " + std::to_string(kMaxTextBytes) +
                     " bytes, holds a control character or is not UTF-8");
  }
  Value value;
  value.text = text;
  if (key.type == Type::kAddress) {
    std::array<unsigned char, sizeof(in6_addr)> parsed{};
    if (inet_pton(AF_INET, value.text.c_str(), parsed.data()) != 1 &&
        inet_pton(AF_INET6, value.text.c_str(), parsed.data()) != 1) {
      return refuse(key, text);
    }
  }
  if (key.accepts != nullptr && !key.accepts(text)) {
    return refuse(key, text);
  }
  if (key.type == Type::kPath) {
    const bool may_be_empty = key.default_text.empty();
    if (text.empty() ? !may_be_empty : text.front() != '/') {
      return refuse(key, text);
    }
    while (value.text.size() > 1 && value.text.back() == '/') {
      value.text.pop_back();
    }
  }
  return value;
}

template <typename Accept>
bool each_item(std::string_view text, const Accept& accept) {
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    if (!accept(trim(text.substr(begin, end - begin)))) {
      return false;
    }
    begin = end + 1;
  }
  return true;
}

bool is_gpu_name(std::string_view name) {
  const std::optional<int64_t> index = parse_integer(name);
  if (index.has_value()) {
    return *index >= 0 && *index < int64_t{base::kMaxDevices} && std::to_string(*index) == name;
  }
  constexpr std::string_view kUuidPrefix = "GPU-";
  return name.size() > kUuidPrefix.size() && name.starts_with(kUuidPrefix) &&
         name.find_first_not_of("0123456789abcdefABCDEF-", kUuidPrefix.size()) == name.npos;
}

base::Result<Value> parse_gpus(const Key& key, std::string_view text) {
  Value value;
  if (text == "auto" || text == "none") {
    value.text = text;
    return value;
  }
  std::vector<std::string_view> names;
  const bool accepted = each_item(text, [&](std::string_view name) {
    const bool repeated = std::find(names.begin(), names.end(), name) != names.end();
    if (repeated || !is_gpu_name(name) || names.size() == base::kMaxGpuRanks) {
      return false;
    }
    names.push_back(name);
    return true;
  });
  if (!accepted) {
    return text.find("MIG-") == text.npos
               ? refuse(key, text)
               : bad_value(quote(text) + " names a MIG instance: " +
                           std::string(base::reason_sentence(EXPERTD_REASON_MIG_UNSUPPORTED)));
  }
  for (const std::string_view name : names) {
    value.text.append(value.text.empty() ? "" : ",").append(name);
  }
  return value;
}

base::Result<Value> parse_list(const Key& key, std::string_view text) {
  Value value;
  std::string_view items = text;
  if (items.starts_with('[') && items.ends_with(']')) {
    items = trim(items.substr(1, items.size() - 2));
  }
  if (items.empty()) {
    return value;
  }
  base::Status problem;
  each_item(items, [&](std::string_view item) {
    const std::optional<int64_t> number = parse_integer(item);
    if (!number.has_value() || value.list.size() == kMaxListEntries) {
      problem = refuse(key, text);
    } else if (base::Result<Value> checked = in_range(key, item, *number); !checked.is_ok()) {
      problem = checked.status();
    } else {
      value.list.push_back(static_cast<uint32_t>(*number));
    }
    return problem.is_ok();
  });
  if (!problem.is_ok()) {
    return problem;
  }
  return value;
}

base::Result<Value> parse_texts(const Key& key, std::string_view text) {
  Value value;
  if (text.empty() || text == "[]") {
    return value;
  }
  const bool accepted = each_item(text, [&](std::string_view item) {
    const bool fits = !item.empty() && is_printable(item) && item.size() <= kMaxTextBytes && key.accepts(item);
    const bool repeated = std::find(value.texts.begin(), value.texts.end(), item) != value.texts.end();
    value.texts.emplace_back(item);
    return fits && !repeated && value.texts.size() <= kMaxTextEntries;
  });
  if (!accepted) {
    return refuse(key, text);
  }
  return value;
}

}  // namespace

base::Result<Value> parse_value(const Key& key, std::string_view text) {
  switch (key.type) {
    case Type::kBool:
      return parse_bool(key, trim(text));
    case Type::kInteger:
    case Type::kPowerOfTwo:
    case Type::kMode:
      return parse_number(key, trim(text));
    case Type::kDuration:
    case Type::kSize:
      return parse_scaled(key, trim(text));
    case Type::kChoice:
      return parse_choice(key, trim(text));
    case Type::kString:
    case Type::kPath:
    case Type::kAddress:
      return parse_string(key, text);
    case Type::kGpus:
      return parse_gpus(key, trim(text));
    case Type::kIntegerList:
      return parse_list(key, trim(text));
    case Type::kTextList:
      return parse_texts(key, trim(text));
  }
  return base::Status(EXPERTD_REASON_INTERNAL, "a key of a type without a parser");
}

std::string format_value(const Key& key, const Value& value) {
  switch (key.type) {
    case Type::kBool:
      return value.integer != 0 ? "true" : "false";
    case Type::kInteger:
    case Type::kPowerOfTwo:
      return std::to_string(value.integer);
    case Type::kMode:
      return quote(format_bound(key, value.integer));
    case Type::kDuration:
    case Type::kSize:
      if (key.type == Type::kSize && !value.automatic && value.integer == 0) {
        return "0";
      }
      return quote(value.automatic ? "auto" : format_scaled(value.integer, units_of(key)));
    case Type::kChoice: {
      std::string_view rest = key.choices;
      for (int64_t i = 0; i < value.integer; ++i) {
        rest.remove_prefix(std::min(rest.find('|'), rest.size() - 1) + 1);
      }
      return quote(rest.substr(0, rest.find('|')));
    }
    case Type::kString:
    case Type::kPath:
    case Type::kAddress:
    case Type::kGpus:
      return quote(value.text);
    case Type::kIntegerList: {
      std::string out = "[";
      for (const uint32_t item : value.list) {
        out.append(out.size() > 1 ? ", " : "").append(std::to_string(item));
      }
      return out + "]";
    }
    case Type::kTextList: {
      std::string out = "[";
      for (const std::string& item : value.texts) {
        out.append(out.size() > 1 ? ", " : "").append(quote(item));
      }
      return out + "]";
    }
  }
  return {};
}

std::string describe_allowed(const Key& key) {
  const std::string range = format_bound(key, key.min) + " to " + format_bound(key, key.max);
  switch (key.type) {
    case Type::kBool:
      return "true or false";
    case Type::kInteger:
      return "an integer from " + range;
    case Type::kPowerOfTwo:
      return "a power of two from " + range;
    case Type::kMode:
      return "an octal mode in quotes, from " + range;
    case Type::kDuration:
      return "a duration from " + range + " in h, min, s, ms, us or ns (a plain number counts " +
             (key.plain_unit == 1'000'000'000 ? "seconds)" : "nanoseconds)");
    case Type::kSize:
      return std::string(key.allow_auto ? "\"auto\" or " : "") + "a size from " + range +
             " in TiB, GiB, MiB, KiB or B (a plain number counts bytes)";
    case Type::kChoice: {
      std::string out(key.choices.find('|') == std::string_view::npos ? "" : "one of ");
      for (const char c : key.choices) {
        out.append(c == '|' ? ", " : std::string(1, c));
      }
      return out;
    }
    case Type::kString:
      return key.form.empty() ? "a text" : std::string(key.form);
    case Type::kPath:
      return key.default_text.empty() ? "an absolute path, or empty" : "an absolute path";
    case Type::kAddress:
      return "an IPv4 or IPv6 address";
    case Type::kGpus:
      return "\"auto\", \"none\", or at most " + std::to_string(base::kMaxGpuRanks) +
             " different indices and UUIDs (GPU-...) separated by commas";
    case Type::kIntegerList:
      return "a list of integers from " + range;
    case Type::kTextList:
      return "a list of at most " + std::to_string(kMaxTextEntries) + " different " + std::string(key.form);
  }
  return {};
}

std::string quote(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (byte < 0x20 || byte == 0x7F) {
      std::array<char, 8> escape{};
      std::snprintf(escape.data(), escape.size(), "\\u%04X", static_cast<unsigned>(byte));
      out += escape.data();
    } else {
      out += c;
    }
  }
  return out + '"';
}

Value default_value(const Key& key) {
  base::Result<Value> value = parse_value(key, key.default_text);
  return value.is_ok() ? std::move(value).value() : Value{};
}

}  // namespace expertd::config
