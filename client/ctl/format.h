// SPDX-License-Identifier: Apache-2.0
// Numbers and tables for people: sizes, rates and times with units, columns that line up. Pure functions and a value
// type, any thread. Never used for JSON, whose numbers stay in base units.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace expertd::ctl {

/// "512 B", "1.5 KiB", "2.0 GiB".
std::string size_text(uint64_t bytes);
/// Decimal, as links are rated: "0 B/s", "357.2 GB/s".
std::string rate_text(double bytes_per_second);
/// "0", "950", "12.3 k", "4.0 M".
std::string count_text(double count);
/// "850 ns", "12.3 µs", "4.0 ms", "2.5 s", "3 min 20 s", "2 h 5 min", "4 d 3 h".
std::string duration_text(uint64_t duration_ns);
/// Ranks or devices of a bit mask: "0-3,6", or "-" for none.
std::string mask_text(uint64_t low, std::span<const uint64_t> more = {});
/// The ranks themselves, ascending.
std::vector<uint32_t> ranks_of_mask(uint64_t low, std::span<const uint64_t> more = {});
/// "500ms", "30s", "5m", "1h"; a plain number is seconds. Empty for anything else.
std::optional<uint64_t> parse_duration_ns(std::string_view text);

enum class Align { kLeft, kRight };

class Table {
 public:
  struct Column {
    std::string title;
    Align align = Align::kLeft;
  };

  explicit Table(std::vector<Column> columns) : columns_(std::move(columns)) {}
  /// Missing cells are empty.
  void add(std::vector<std::string> cells) { rows_.push_back(std::move(cells)); }
  bool empty() const { return rows_.empty(); }
  /// Title line and rows, each ending in a newline, without trailing spaces.
  std::string text() const;

 private:
  std::vector<Column> columns_;
  std::vector<std::vector<std::string>> rows_;
};

}  // namespace expertd::ctl
