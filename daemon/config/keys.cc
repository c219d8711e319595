// SPDX-License-Identifier: Apache-2.0
#include "daemon/config/keys.h"

#include <algorithm>
#include <cctype>
#include <numeric>

namespace expertd::config {

namespace {

std::string join(const Key& key, char separator) {
  std::string name(key.section);
  if (!name.empty()) {
    name += separator;
  }
  return name.append(key.name);
}

/// Levenshtein distance; both words are cut to 64 characters, longer than any key.
size_t distance(std::string_view a, std::string_view b) {
  a = a.substr(0, 64);
  b = b.substr(0, 64);
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t substituted = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({substituted, row[j] + 1, row[j - 1] + 1});
    }
  }
  return row[b.size()];
}

bool is_near(std::string_view given, std::string_view known, size_t steps) {
  return steps <= std::max<size_t>(1, std::min(given.size(), known.size()) / 3);
}

}  // namespace

std::string full_name(const Key& key) {
  return join(key, '.');
}

std::string flag_name(const Key& key) {
  std::string name = "--" + join(key, '-');
  std::replace(name.begin(), name.end(), '_', '-');
  return name;
}

std::string environment_name(const Key& key) {
  std::string name = "EXPERTD_" + join(key, '_');
  std::transform(name.begin(), name.end(), name.begin(),
                 [](unsigned char c) { return static_cast<char>(std::toupper(c)); });
  return name;
}

const Key* find_key(std::string_view section, std::string_view name) {
  for (const Key& key : keys()) {
    if (key.section == section && key.name == name) {
      return &key;
    }
  }
  return nullptr;
}

const Key* find_key(std::string_view full_name) {
  const size_t dot = full_name.find('.');
  return dot == std::string_view::npos ? find_key("", full_name)
                                       : find_key(full_name.substr(0, dot), full_name.substr(dot + 1));
}

bool is_section(std::string_view name) {
  return !name.empty() && std::any_of(keys().begin(), keys().end(), [&](const Key& k) { return k.section == name; });
}

std::string nearest_key(std::string_view section, std::string_view name) {
  const Key* best = nullptr;
  size_t best_steps = 0;
  // A key of another section counts as one step further, so that the section at hand wins a draw.
  for (const Key& key : keys()) {
    const size_t steps = distance(name, key.name);
    const size_t cost = 2 * steps + (key.section == section ? 0 : 1);
    if (is_near(name, key.name, steps) && (best == nullptr || cost < best_steps)) {
      best = &key;
      best_steps = cost;
    }
  }
  return best != nullptr ? full_name(*best) : std::string();
}

std::string nearest_section(std::string_view name) {
  std::string best;
  size_t best_steps = 0;
  for (const Key& key : keys()) {
    const size_t steps = distance(name, key.section);
    if (is_near(name, key.section, steps) && (best.empty() || steps < best_steps)) {
      best = key.section;
      best_steps = steps;
    }
  }
  return best;
}

}  // namespace expertd::config
