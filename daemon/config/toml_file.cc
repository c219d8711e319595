// SPDX-License-Identifier: Apache-2.0
#include "daemon/config/toml_file.h"

#include <fcntl.h>
#include <toml++/toml.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <exception>
#include <utility>

#include "daemon/base/fd.h"

namespace expertd::config {

namespace {

constexpr size_t kMaxFileBytes = 1 << 20;

base::Status unreadable(std::string message) {
  return base::Status(EXPERTD_REASON_CONFIG_UNREADABLE, std::move(message));
}

Place place_of(const toml::source_region& region) {
  return Place{static_cast<uint32_t>(region.begin.line), static_cast<uint32_t>(region.begin.column)};
}

/// Of integers alone or of strings alone; a string with a comma is none that a list may hold. An empty one is both.
void set_array(const toml::array& array, FileEntry& entry) {
  entry.kind = array.empty() || array.front().is_integer() ? NodeKind::kIntegerArray : NodeKind::kStringArray;
  for (const toml::node& element : array) {
    const toml::value<int64_t>* integer = element.as_integer();
    const toml::value<std::string>* string = element.as_string();
    const bool fits = entry.kind == NodeKind::kIntegerArray
                          ? integer != nullptr
                          : string != nullptr && string->get().find(',') == std::string::npos && !string->get().empty();
    if (!fits) {
      entry.kind = NodeKind::kOtherArray;
      entry.text.clear();
      return;
    }
    entry.text.append(entry.text.empty() ? "" : ",");
    entry.text.append(integer != nullptr ? std::to_string(integer->get()) : string->get());
  }
}

FileEntry entry_of(const std::string& section, const toml::key& key, const toml::node& node) {
  FileEntry entry;
  entry.section = section;
  entry.name = std::string(key.str());
  entry.key_place = place_of(key.source());
  entry.value_place = place_of(node.source());
  if (const auto* boolean = node.as_boolean()) {
    entry.kind = NodeKind::kBoolean;
    entry.text = boolean->get() ? "true" : "false";
  } else if (const auto* integer = node.as_integer()) {
    entry.kind = NodeKind::kInteger;
    entry.text = std::to_string(integer->get());
  } else if (const auto* string = node.as_string()) {
    entry.kind = NodeKind::kString;
    entry.text = string->get();
  } else if (const auto* array = node.as_array()) {
    set_array(*array, entry);
  } else if (node.is_table()) {
    entry.kind = NodeKind::kTable;
  } else {
    entry.kind = node.is_floating_point() ? NodeKind::kFloat : NodeKind::kDate;
  }
  return entry;
}

std::vector<FileEntry> flatten(const toml::table& root) {
  std::vector<FileEntry> entries;
  for (const auto& [key, node] : root) {
    entries.push_back(entry_of("", key, node));
    if (const toml::table* section = node.as_table()) {
      for (const auto& [inner_key, inner_node] : *section) {
        entries.push_back(entry_of(std::string(key.str()), inner_key, inner_node));
      }
    }
  }
  return entries;
}

}  // namespace

std::string_view node_kind_name(NodeKind kind) {
  switch (kind) {
    case NodeKind::kBoolean:
      return "a boolean";
    case NodeKind::kInteger:
      return "an integer";
    case NodeKind::kFloat:
      return "a floating-point number";
    case NodeKind::kString:
      return "a string";
    case NodeKind::kIntegerArray:
      return "an array of integers";
    case NodeKind::kStringArray:
      return "an array of strings";
    case NodeKind::kOtherArray:
      return "an array";
    case NodeKind::kTable:
      return "a table";
    case NodeKind::kDate:
      return "a date or time";
  }
  return "something else";
}

base::Result<std::optional<std::string>> read_text(const std::string& path) {
  const base::ScopedFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!fd.valid()) {
    if (errno == ENOENT || errno == ENOTDIR) {
      return std::optional<std::string>();
    }
    return unreadable(path + ": cannot be opened: " + std::strerror(errno));
  }
  std::string text;
  std::array<char, 8192> block{};
  for (;;) {
    const ssize_t bytes = ::read(fd.get(), block.data(), block.size());
    if (bytes < 0 && errno == EINTR) {
      continue;
    }
    if (bytes < 0) {
      return unreadable(path + ": cannot be read: " + std::strerror(errno));
    }
    if (bytes == 0) {
      return std::optional<std::string>(std::move(text));
    }
    text.append(block.data(), static_cast<size_t>(bytes));
    if (text.size() > kMaxFileBytes) {
      return unreadable(path + ": is larger than " + std::to_string(kMaxFileBytes) + " bytes");
    }
  }
}

base::Result<std::vector<FileEntry>> parse_toml(std::string_view text, const std::string& path) {
  try {
    return flatten(toml::parse(text));
  } catch (const toml::parse_error& error) {
    const Place place = place_of(error.source());
    return unreadable(path + ":" + std::to_string(place.line) + ":" + std::to_string(place.column) + ": " +
                      std::string(error.description()));
  } catch (const std::exception& error) {
    return unreadable(path + ": " + error.what());
  }
}

}  // namespace expertd::config
