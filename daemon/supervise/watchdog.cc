// SPDX-License-Identifier: Apache-2.0
#include "daemon/supervise/watchdog.h"

#include <charconv>
#include <optional>
#include <string_view>
#include <utility>

namespace expertd::supervise {

namespace {

std::optional<uint64_t> parse_number(const char* text) {
  const std::string_view digits = text == nullptr ? std::string_view() : text;
  uint64_t number = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), number);
  if (digits.empty() || error != std::errc() || end != digits.data() + digits.size()) {
    return std::nullopt;
  }
  return number;
}

}  // namespace

base::Result<Beat*> Watchdog::add(std::string name, uint64_t now_ns) {
  const std::lock_guard lock(mutex_);
  if (beats_.size() == kMaxBeats) {
    return base::Status(EXPERTD_REASON_INTERNAL, "the watchdog has no place for thread " + name + "; raise kMaxBeats");
  }
  return &beats_.emplace_back(std::move(name), now_ns);
}

bool Watchdog::is_late(Beat& beat, uint64_t now_ns) const {
  const uint64_t last_ns = beat.last_ns_.load(std::memory_order_relaxed);
  // A beat after `now_ns` was taken looks like the future; idle and retired do too.
  const uint64_t age_ns = now_ns > last_ns ? now_ns - last_ns : 0;
  const uint64_t periods = age_ns / options_.late_ns;
  if (periods > beat.counted_) {
    beat.missed_.fetch_add(periods - beat.counted_, std::memory_order_relaxed);
  }
  beat.counted_ = periods;
  return periods > 0;
}

Watchdog::Tick Watchdog::tick(uint64_t now_ns) {
  Tick result;
  {
    const std::lock_guard lock(mutex_);
    for (Beat& beat : beats_) {
      if (is_late(beat, now_ns)) {
        result.late.push_back(beat.name());
      }
    }
  }
  if (options_.ping_interval_ns == 0 || now_ns < next_ping_ns_ || !result.late.empty()) {
    return result;
  }
  result.notified = notifier_.watchdog();
  if (result.notified.is_ok()) {
    result.pinged = true;
    next_ping_ns_ = now_ns + options_.ping_interval_ns;
  }
  return result;
}

std::vector<Watchdog::Missed> Watchdog::missed() const {
  const std::lock_guard lock(mutex_);
  std::vector<Missed> result;
  for (const Beat& beat : beats_) {
    result.push_back({beat.name(), beat.missed_total()});
  }
  return result;
}

uint64_t watchdog_ping_interval_ns(const char* watchdog_usec, const char* watchdog_pid, pid_t self) {
  const std::optional<uint64_t> usec = parse_number(watchdog_usec);
  if (!usec.has_value() || *usec > UINT64_MAX / 1000) {
    return 0;
  }
  if (watchdog_pid != nullptr && parse_number(watchdog_pid) != static_cast<uint64_t>(self)) {
    return 0;
  }
  return *usec * 1000 / 2;
}

}  // namespace expertd::supervise
