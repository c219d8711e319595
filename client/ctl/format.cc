// SPDX-License-Identifier: Apache-2.0
#include "client/ctl/format.h"

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <cstdio>

namespace expertd::ctl {

namespace {

constexpr uint64_t kMicrosecond = 1'000;
constexpr uint64_t kMillisecond = 1'000'000;
constexpr uint64_t kSecond = 1'000'000'000;
constexpr uint64_t kMinute = 60 * kSecond;
constexpr uint64_t kHour = 60 * kMinute;
constexpr uint64_t kDay = 24 * kHour;

std::string with_one_decimal(double value, std::string_view unit) {
  char buffer[64];
  const int length = std::snprintf(buffer, sizeof(buffer), "%.1f ", value);
  return std::string(buffer, static_cast<size_t>(length)) + std::string(unit);
}

template <size_t N>
std::string scaled(double value, double step, const std::array<std::string_view, N>& units) {
  size_t unit = 0;
  // 0.05 below the step: 1023.97 would be printed as "1024.0".
  while (value >= step - 0.05 && unit + 1 < N) {
    value /= step;
    ++unit;
  }
  if (unit > 0) {
    return with_one_decimal(value, units[unit]);
  }
  char buffer[64];
  const int length = std::snprintf(buffer, sizeof(buffer), "%.0f", value);
  const std::string number(buffer, static_cast<size_t>(length));
  return units[0].empty() ? number : number + " " + std::string(units[0]);
}

std::string two_units(uint64_t high, const char* high_unit, uint64_t low, const char* low_unit) {
  std::string out = std::to_string(high) + high_unit;
  if (low > 0) {
    out += " " + std::to_string(low) + low_unit;
  }
  return out;
}

/// Columns that UTF-8 text takes: its characters, all of them narrow here.
size_t width_of(std::string_view text) {
  return static_cast<size_t>(
      std::ranges::count_if(text, [](char c) { return (static_cast<unsigned char>(c) & 0xc0) != 0x80; }));
}

}  // namespace

std::string size_text(uint64_t bytes) {
  static constexpr std::array<std::string_view, 6> kUnits = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
  return scaled(static_cast<double>(bytes), 1024, kUnits);
}

std::string rate_text(double bytes_per_second) {
  static constexpr std::array<std::string_view, 5> kUnits = {"B/s", "kB/s", "MB/s", "GB/s", "TB/s"};
  return scaled(bytes_per_second, 1000, kUnits);
}

std::string count_text(double count) {
  static constexpr std::array<std::string_view, 5> kUnits = {"", "k", "M", "G", "T"};
  return scaled(count, 1000, kUnits);
}

std::string duration_text(uint64_t duration_ns) {
  const auto in = [duration_ns](uint64_t unit) { return static_cast<double>(duration_ns) / static_cast<double>(unit); };
  if (duration_ns < kMicrosecond) {
    return std::to_string(duration_ns) + " ns";
  }
  if (in(kMicrosecond) < 999.95) {
    return with_one_decimal(in(kMicrosecond), "µs");
  }
  if (in(kMillisecond) < 999.95) {
    return with_one_decimal(in(kMillisecond), "ms");
  }
  if (in(kSecond) < 59.95) {
    return with_one_decimal(in(kSecond), "s");
  }
  const uint64_t seconds = (duration_ns + kSecond / 2) / kSecond;
  if (seconds < kHour / kSecond) {
    return two_units(seconds / 60, " min", seconds % 60, " s");
  }
  if (duration_ns < kDay) {
    return two_units(duration_ns / kHour, " h", duration_ns % kHour / kMinute, " min");
  }
  return two_units(duration_ns / kDay, " d", duration_ns % kDay / kHour, " h");
}

std::vector<uint32_t> ranks_of_mask(uint64_t low, std::span<const uint64_t> more) {
  std::vector<uint32_t> ranks;
  for (size_t word = 0; word <= more.size(); ++word) {
    for (uint64_t left = word == 0 ? low : more[word - 1]; left != 0; left &= left - 1) {
      ranks.push_back(static_cast<uint32_t>(word * 64) + static_cast<uint32_t>(std::countr_zero(left)));
    }
  }
  return ranks;
}

std::string mask_text(uint64_t low, std::span<const uint64_t> more) {
  const std::vector<uint32_t> ranks = ranks_of_mask(low, more);
  std::string out;
  for (size_t at = 0; at < ranks.size(); ++at) {
    const uint32_t first = ranks[at];
    uint32_t last = first;
    while (at + 1 < ranks.size() && ranks[at + 1] == last + 1) {
      ++last;
      ++at;
    }
    out += (out.empty() ? "" : ",") + std::to_string(first);
    if (last > first) {
      out += (last > first + 1 ? "-" : ",") + std::to_string(last);
    }
  }
  return out.empty() ? "-" : out;
}

std::optional<uint64_t> parse_duration_ns(std::string_view text) {
  struct Unit {
    std::string_view name;
    uint64_t ns;
  };
  static constexpr std::array<Unit, 7> kUnits = {{{"ns", 1},
                                                  {"us", kMicrosecond},
                                                  {"ms", kMillisecond},
                                                  {"s", kSecond},
                                                  {"m", kMinute},
                                                  {"h", kHour},
                                                  {"", kSecond}}};
  uint64_t number = 0;
  const char* const end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, number);
  if (error != std::errc() || stop == text.data()) {
    return std::nullopt;
  }
  const std::string_view suffix(stop, static_cast<size_t>(end - stop));
  const auto* const unit = std::ranges::find(kUnits, suffix, &Unit::name);
  if (unit == kUnits.end() || number > UINT64_MAX / 2 / unit->ns) {
    return std::nullopt;
  }
  return number * unit->ns;
}

std::string Table::text() const {
  std::vector<size_t> widths;
  for (const Column& column : columns_) {
    widths.push_back(width_of(column.title));
  }
  for (const auto& row : rows_) {
    for (size_t i = 0; i < std::min(row.size(), widths.size()); ++i) {
      widths[i] = std::max(widths[i], width_of(row[i]));
    }
  }
  std::string out;
  const auto put_row = [&](const auto& cell_of) {
    std::string line;
    for (size_t i = 0; i < columns_.size(); ++i) {
      const std::string& cell = cell_of(i);
      const std::string padding(widths[i] - width_of(cell), ' ');
      line += columns_[i].align == Align::kRight ? padding + cell : cell + padding;
      line += "  ";
    }
    line.erase(line.find_last_not_of(' ') + 1);
    out += line + "\n";
  };
  static const std::string kEmpty;
  put_row([this](size_t i) -> const std::string& { return columns_[i].title; });
  for (const auto& row : rows_) {
    put_row([&row](size_t i) -> const std::string& { return i < row.size() ? row[i] : kEmpty; });
  }
  return out;
}

}  // namespace expertd::ctl
