// SPDX-License-Identifier: Apache-2.0
// The log of the process: one line per event, a sentence with key=value fields, as logfmt or JSON.
// Any thread may log (never the hot path); `main` opens it first and closes it after the other
// threads have ended. Lines go through a bounded queue to one writer thread; when it is full the
// oldest are dropped and counted, so logging never blocks. Each call site is limited to
// kLinesPerSecond. Before log_open and after log_close lines are written at once, without the
// queue.
#pragma once

#include <array>
#include <atomic>
#include <concepts>
#include <cstdint>
#include <initializer_list>
#include <source_location>
#include <string>
#include <string_view>
#include <type_traits>
#include <variant>
#include <vector>

#include "daemon/base/status.h"

namespace expertd::base {

enum class LogLevel : int { kTrace, kDebug, kInfo, kWarn, kError };
enum class LogFormat { kLogfmt, kJson };

std::string_view log_level_name(LogLevel level);

/// The value of a field. Holds no copy of a text: fields live as long as the call that logs them.
class LogValue {
 public:
  template <std::integral T>
  LogValue(T value) : value_(widen(value)) {}  // NOLINT(google-explicit-constructor)
  LogValue(double value) : value_(value) {}    // NOLINT(google-explicit-constructor)
  LogValue(const char* text) : value_(std::string_view(text == nullptr ? "" : text)) {}  // NOLINT
  LogValue(std::string_view text) : value_(text) {}                                      // NOLINT
  LogValue(const std::string& text) : value_(std::string_view(text)) {}                  // NOLINT
  LogValue(Reason reason) : value_(reason_name(reason)) {}                               // NOLINT
  /// Strong ids.
  template <typename T>
  requires std::integral<decltype(T::value)> LogValue(const T& id)
      : value_(widen(id.value)) {}  // NOLINT(google-explicit-constructor)

  using Any = std::variant<bool, int64_t, uint64_t, double, std::string_view>;
  const Any& get() const { return value_; }

 private:
  template <std::integral T>
  static Any widen(T value) {
    if constexpr (std::is_same_v<T, bool>) {
      return value;
    } else if constexpr (std::is_signed_v<T>) {
      return static_cast<int64_t>(value);
    } else {
      return static_cast<uint64_t>(value);
    }
  }

  Any value_;
};

struct LogField {
  std::string_view key;  // a literal of [a-z0-9_]
  LogValue value;
};
using LogFields = std::initializer_list<LogField>;

void log(LogLevel level, std::string_view message, LogFields fields,
         std::source_location site = std::source_location::current());

inline void log_trace(std::string_view message, LogFields fields = {},
                      std::source_location site = std::source_location::current()) {
  log(LogLevel::kTrace, message, fields, site);
}
inline void log_debug(std::string_view message, LogFields fields = {},
                      std::source_location site = std::source_location::current()) {
  log(LogLevel::kDebug, message, fields, site);
}
inline void log_info(std::string_view message, LogFields fields = {},
                     std::source_location site = std::source_location::current()) {
  log(LogLevel::kInfo, message, fields, site);
}
inline void log_warn(std::string_view message, LogFields fields = {},
                     std::source_location site = std::source_location::current()) {
  log(LogLevel::kWarn, message, fields, site);
}
inline void log_error(std::string_view message, LogFields fields = {},
                      std::source_location site = std::source_location::current()) {
  log(LogLevel::kError, message, fields, site);
}

struct LogOptions {
  LogLevel level = LogLevel::kInfo;
  LogFormat format = LogFormat::kLogfmt;
  int fd = 2;                                 // borrowed: stays open until log_close
  size_t queue_lines = 8192;                  // bound of the queue
  uint64_t close_timeout_ns = 1'000'000'000;  // for a reader that does not read
};

/// Starts the writer thread; block signals first. BAD_STATE when it is open already.
Status log_open(const LogOptions& options);
/// Writes what is queued (giving up on a reader that does not read after close_timeout_ns, or after
/// `at_most_ns` when that is less) and ends the writer.
void log_close(uint64_t at_most_ns = UINT64_MAX);

/// Takes effect at once, from any thread.
void set_log_level(LogLevel level);
LogLevel log_level();

/// Lines lost: dropped from a full queue or not accepted by the descriptor. Never decreases.
uint64_t log_dropped_total();
/// Lines that the limit per call site kept back. Never decreases.
uint64_t log_suppressed_total();
/// Writes the count of each call site whose second is over and that has been silent since; call it
/// now and then.
void log_report_suppressed();

inline constexpr size_t kLogLineBytesMax = 4096;  // with its newline: one atomic write to a pipe (PIPE_BUF)

/// One line without its newline. Long texts are cut and invalid UTF-8 is replaced, so that it
/// always parses. `unix_ns` counts from 1970.
std::string format_log_line(LogFormat format, LogLevel level, uint64_t unix_ns, std::string_view message,
                            LogFields fields);

/// Bytes of the well-formed UTF-8 sequence that `text` starts with; 0 when there is none.
size_t utf8_sequence_bytes(std::string_view text);

/// How many lines each call site may write: kLinesPerSecond in each second that starts with its
/// first line. Lock-free, any thread, fixed size; sites beyond kSites are not limited. Counts are
/// approximate under contention.
class CallSiteLimiter {
 public:
  static constexpr size_t kSites = 512;
  static constexpr uint32_t kLinesPerSecond = 10;

  struct Decision {
    bool write = true;
    uint64_t suppressed = 0;  // lines kept back since the last one written; report them first
  };
  struct Silent {
    const char* file = nullptr;
    uint32_t line = 0;
    uint64_t suppressed = 0;
  };

  /// `file` is the pointer of a string literal: the pointer itself is the identity.
  Decision admit(const char* file, uint32_t line, uint64_t now_ns);
  /// Takes the counts of sites whose second is over.
  std::vector<Silent> take_suppressed(uint64_t now_ns);
  /// Forgets every site; while nobody else calls.
  void reset();

 private:
  struct Site {
    std::atomic<uint64_t> key{0};  // 48 bits of the file's pointer, 16 of the line; 0: free
    std::atomic<uint64_t> second_start_ns{0};
    std::atomic<uint32_t> lines{0};
    std::atomic<uint64_t> suppressed{0};
  };
  Site* find(uint64_t key);

  std::array<Site, kSites> sites_;
};

}  // namespace expertd::base
