// SPDX-License-Identifier: Apache-2.0
#include "daemon/base/log.h"

#include <poll.h>
#include <pthread.h>
#include <spdlog/async_logger.h>
#include <spdlog/details/thread_pool.h>
#include <spdlog/sinks/sink.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <exception>
#include <memory>
#include <utility>

#include "daemon/base/clock.h"

namespace expertd::base {

namespace {

constexpr uint64_t kSecondNs = 1'000'000'000;
constexpr int kPollMs = 100;
constexpr size_t kMessageBytesMax = 1024;
constexpr size_t kTextBytesMax = 1024;
constexpr size_t kKeyBytesMax = 64;
constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD
constexpr std::string_view kEllipsis = "\xE2\x80\xA6";
constexpr std::string_view kLevelNames[] = {"trace", "debug", "info", "warn", "error"};

/// Writes whole lines to a descriptor. Runs on the writer thread only, but for close_by().
class FdSink final : public spdlog::sinks::sink {
 public:
  explicit FdSink(int fd) : fd_(fd) {}

  void log(const spdlog::details::log_msg& message) override {
    if (!write_line(std::string_view(message.payload.data(), message.payload.size()))) {
      lost_.fetch_add(1, std::memory_order_relaxed);
    }
  }
  void flush() override {}
  void set_pattern(const std::string&) override {}
  void set_formatter(std::unique_ptr<spdlog::formatter>) override {}

  /// From then on a line that the reader does not take by `ns` is lost instead of waited for.
  void close_by(uint64_t ns) { close_by_ns_.store(ns, std::memory_order_relaxed); }
  uint64_t lost() const { return lost_.load(std::memory_order_relaxed); }
  void count_lost() { lost_.fetch_add(1, std::memory_order_relaxed); }

 private:
  bool write_line(std::string_view line) {
    while (!line.empty()) {
      if (!wait_writable()) {
        return false;
      }
      const ssize_t bytes = ::write(fd_, line.data(), line.size());
      if (bytes < 0 && errno != EINTR && errno != EAGAIN) {
        return false;
      }
      line.remove_prefix(bytes > 0 ? static_cast<size_t>(bytes) : 0);
    }
    return true;
  }

  bool wait_writable() {
    for (;;) {
      const bool patient = now_ns() < close_by_ns_.load(std::memory_order_relaxed);
      pollfd entry{.fd = fd_, .events = POLLOUT, .revents = 0};
      const int ready = ::poll(&entry, 1, patient ? kPollMs : 0);
      if (ready > 0) {
        return (entry.revents & (POLLERR | POLLNVAL)) == 0;  // no write, so no SIGPIPE
      }
      if (!patient) {
        return false;
      }
    }
  }

  const int fd_;
  std::atomic<uint64_t> close_by_ns_{UINT64_MAX};
  std::atomic<uint64_t> lost_{0};
};

/// The queue and its thread. Kept after log_close until the next log_open, so that a late log call
/// finds it; what such a call writes is lost, because the queue is gone (spdlog holds it weakly).
struct Writer {
  std::shared_ptr<FdSink> sink;
  uint64_t close_timeout_ns = 0;
  std::shared_ptr<spdlog::details::thread_pool> queue;  // touched by open and close only
  std::weak_ptr<spdlog::details::thread_pool> queue_view;
  std::shared_ptr<spdlog::async_logger> logger;

  uint64_t lost() const {
    const auto pinned = queue_view.lock();
    return sink->lost() + (pinned ? pinned->overrun_counter() : 0);
  }
};

struct ProcessLog {
  std::atomic<LogLevel> level{LogLevel::kInfo};
  std::atomic<LogFormat> format{LogFormat::kLogfmt};
  std::atomic<Writer*> writer{nullptr};  // acquire pairs with the release of log_open
  std::atomic<uint64_t> lost_before{0};  // by writers that were closed
  std::atomic<uint64_t> suppressed{0};
  CallSiteLimiter limiter;
};

constinit ProcessLog process_log;

/// Owns the writer that process_log.writer names or named last; touched by log_open and log_close
/// only.
std::unique_ptr<Writer>& owned_writer() {
  static std::unique_ptr<Writer> writer;
  return writer;
}

uint64_t unix_now_ns() {
  timespec now{};
  clock_gettime(CLOCK_REALTIME, &now);
  return static_cast<uint64_t>(now.tv_sec) * kSecondNs + static_cast<uint64_t>(now.tv_nsec);
}

void emit(LogLevel level, std::string_view message, LogFields fields) {
  std::string line =
      format_log_line(process_log.format.load(std::memory_order_relaxed), level, unix_now_ns(), message, fields);
  line += '\n';
  const Writer* writer = process_log.writer.load(std::memory_order_acquire);
  if (writer != nullptr) {
    writer->logger->log(spdlog::level::info, spdlog::string_view_t(line.data(), line.size()));
  } else if (::write(STDERR_FILENO, line.data(), line.size()) < 0) {
    process_log.lost_before.fetch_add(1, std::memory_order_relaxed);
  }
}

void emit_suppressed(LogLevel level, const char* file, uint32_t line, uint64_t count) {
  std::string_view name(file);
  name.remove_prefix(name.rfind('/') == std::string_view::npos ? 0 : name.rfind('/') + 1);
  const std::string site = std::string(name) + ":" + std::to_string(line);
  emit(level, "log lines suppressed", {{"site", site}, {"count", count}});
}

/// Reports the sites whose second was over at `now_ns`.
void report_suppressed(uint64_t now_ns) {
  for (const CallSiteLimiter::Silent& site : process_log.limiter.take_suppressed(now_ns)) {
    emit_suppressed(LogLevel::kWarn, site.file, site.line, site.suppressed);
  }
}

void append_time(std::string& out, uint64_t unix_ns) {
  const auto seconds = static_cast<time_t>(unix_ns / kSecondNs);
  tm parts{};
  gmtime_r(&seconds, &parts);
  std::array<char, 80> text{};
  std::snprintf(text.data(), text.size(), "%04d-%02d-%02dT%02d:%02d:%02d.%06uZ", parts.tm_year + 1900, parts.tm_mon + 1,
                parts.tm_mday, parts.tm_hour, parts.tm_min, parts.tm_sec,
                static_cast<unsigned>(unix_ns % kSecondNs / 1000));
  out += text.data();
}

/// Escapes for a quoted text, the same in JSON and logfmt, and cuts it at `limit` bytes of output.
void append_escaped(std::string& out, std::string_view text, size_t limit) {
  const size_t start = out.size();
  while (!text.empty()) {
    if (out.size() - start + 6 + kEllipsis.size() > limit) {
      out += kEllipsis;
      return;
    }
    const size_t bytes = utf8_sequence_bytes(text);
    const auto lead = static_cast<unsigned char>(text.front());
    if (bytes == 0) {
      out += kReplacement;
    } else if (lead == '"' || lead == '\\') {
      out.append(1, '\\').append(1, text.front());
    } else if (lead == '\n') {
      out += "\\n";
    } else if (lead == '\r') {
      out += "\\r";
    } else if (lead == '\t') {
      out += "\\t";
    } else if (lead < 0x20 || lead == 0x7F) {
      std::array<char, 8> escape{};
      std::snprintf(escape.data(), escape.size(), "\\u%04x", static_cast<unsigned>(lead));
      out += escape.data();
    } else {
      out.append(text.substr(0, bytes));
    }
    text.remove_prefix(std::max<size_t>(bytes, 1));
  }
}

void append_text(std::string& out, LogFormat format, std::string_view text, size_t limit) {
  const auto is_bare = [](char c) {
    const auto byte = static_cast<unsigned char>(c);
    return byte > 0x20 && byte < 0x7F && c != '"' && c != '=' && c != '\\';
  };
  if (format == LogFormat::kLogfmt && !text.empty() && text.size() <= limit &&
      std::all_of(text.begin(), text.end(), is_bare)) {
    out.append(text);
    return;
  }
  out += '"';
  append_escaped(out, text, limit);
  out += '"';
}

void append_key(std::string& out, LogFormat format, std::string_view key) {
  const bool json = format == LogFormat::kJson;
  out += json ? ",\"" : " ";
  for (const char c : key.substr(0, kKeyBytesMax)) {
    const bool plain =
        (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '.' || c == '-';
    out += plain ? c : '_';
  }
  out += json ? "\":" : "=";
}

void append_double(std::string& out, LogFormat format, double number) {
  if (!std::isfinite(number)) {
    append_text(out, format, std::isnan(number) ? "nan" : number > 0 ? "inf" : "-inf", kTextBytesMax);
    return;
  }
  std::array<char, 32> text{};
  const auto [end, error] = std::to_chars(text.data(), text.data() + text.size(), number);
  out.append(text.data(), error == std::errc() ? end : text.data());
}

void append_value(std::string& out, LogFormat format, const LogValue& value) {
  const LogValue::Any& any = value.get();
  if (const bool* boolean = std::get_if<bool>(&any)) {
    out += *boolean ? "true" : "false";
  } else if (const int64_t* integer = std::get_if<int64_t>(&any)) {
    out += std::to_string(*integer);
  } else if (const uint64_t* natural = std::get_if<uint64_t>(&any)) {
    out += std::to_string(*natural);
  } else if (const double* real = std::get_if<double>(&any)) {
    append_double(out, format, *real);
  } else if (const std::string_view* text = std::get_if<std::string_view>(&any)) {
    append_text(out, format, *text, kTextBytesMax);
  }
}

}  // namespace

std::string_view log_level_name(LogLevel level) {
  const auto index = static_cast<size_t>(level);
  return index < std::size(kLevelNames) ? kLevelNames[index] : "unknown";
}

size_t utf8_sequence_bytes(std::string_view text) {
  const auto byte = [text](size_t i) {
    return i < text.size() ? static_cast<uint32_t>(static_cast<unsigned char>(text[i])) : 0;
  };
  const uint32_t lead = byte(0);
  if (lead < 0x80) {
    return text.empty() ? 0 : 1;
  }
  const size_t bytes = lead < 0xC2 ? 0 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : lead < 0xF5 ? 4 : 0;
  if (bytes == 0) {
    return 0;
  }
  uint32_t point = lead & (0xFFU >> (bytes + 1));
  for (size_t i = 1; i < bytes; ++i) {
    if ((byte(i) & 0xC0U) != 0x80) {
      return 0;
    }
    point = (point << 6U) | (byte(i) & 0x3FU);
  }
  const bool overlong = (bytes == 3 && point < 0x800) || (bytes == 4 && point < 0x10000);
  const bool surrogate = point >= 0xD800 && point <= 0xDFFF;
  return overlong || surrogate || point > 0x10FFFF ? 0 : bytes;
}

std::string format_log_line(LogFormat format, LogLevel level, uint64_t unix_ns, std::string_view message,
                            LogFields fields) {
  const bool json = format == LogFormat::kJson;
  std::string out = json ? "{\"time\":\"" : "time=";
  append_time(out, unix_ns);
  out += json ? "\",\"level\":\"" : " level=";
  out += log_level_name(level);
  out += json ? "\",\"msg\":" : " msg=";
  append_text(out, format, message, kMessageBytesMax);
  // What one field takes at most, and what closes the line.
  constexpr size_t kFieldBytesMax = kKeyBytesMax + kTextBytesMax + 8;
  constexpr size_t kTailBytes = 32;
  for (const LogField& field : fields) {
    if (out.size() + kFieldBytesMax + kTailBytes > kLogLineBytesMax) {
      append_key(out, format, "truncated");
      out += "true";
      break;
    }
    append_key(out, format, field.key);
    append_value(out, format, field.value);
  }
  if (json) {
    out += '}';
  }
  return out;
}

void log(LogLevel level, std::string_view message, LogFields fields, std::source_location site) {
  if (level < process_log.level.load(std::memory_order_relaxed)) {
    return;
  }
  const char* file = site.file_name();
  const CallSiteLimiter::Decision decision = process_log.limiter.admit(file, site.line(), now_ns());
  if (decision.suppressed > 0) {
    emit_suppressed(level, file, site.line(), decision.suppressed);
  }
  if (decision.write) {
    emit(level, message, fields);
  } else {
    process_log.suppressed.fetch_add(1, std::memory_order_relaxed);
  }
}

Status log_open(const LogOptions& options) {
  if (process_log.writer.load(std::memory_order_acquire) != nullptr) {
    return Status(EXPERTD_REASON_BAD_STATE, "the log is open already");
  }
  try {
    auto writer = std::make_unique<Writer>();
    writer->close_timeout_ns = options.close_timeout_ns;
    writer->sink = std::make_shared<FdSink>(options.fd);
    writer->queue = std::make_shared<spdlog::details::thread_pool>(options.queue_lines, 1,
                                                                   [] { pthread_setname_np(pthread_self(), "log"); });
    writer->queue_view = writer->queue;
    writer->logger = std::make_shared<spdlog::async_logger>("expertd", writer->sink, writer->queue,
                                                            spdlog::async_overflow_policy::overrun_oldest);
    writer->logger->set_error_handler([sink = writer->sink](const std::string&) { sink->count_lost(); });
    process_log.level.store(options.level, std::memory_order_relaxed);
    process_log.format.store(options.format, std::memory_order_relaxed);
    process_log.writer.store(writer.get(), std::memory_order_release);
    owned_writer() = std::move(writer);
    return Status::ok();
  } catch (const std::exception& error) {
    return Status(EXPERTD_REASON_SYSTEM, std::string("the log's writer cannot start: ") + error.what());
  }
}

void log_close(uint64_t at_most_ns) {
  report_suppressed(UINT64_MAX);  // all of them
  process_log.limiter.reset();
  Writer* writer = process_log.writer.exchange(nullptr, std::memory_order_acq_rel);
  if (writer == nullptr) {
    return;
  }
  writer->sink->close_by(now_ns() + std::min(writer->close_timeout_ns, at_most_ns));
  const uint64_t overrun = writer->queue->overrun_counter();
  writer->queue.reset();  // joins the writer after it has written what is queued
  process_log.lost_before.fetch_add(overrun + writer->sink->lost(), std::memory_order_relaxed);
}

void set_log_level(LogLevel level) {
  process_log.level.store(level, std::memory_order_relaxed);
}

LogLevel log_level() {
  return process_log.level.load(std::memory_order_relaxed);
}

uint64_t log_dropped_total() {
  const Writer* writer = process_log.writer.load(std::memory_order_acquire);
  return process_log.lost_before.load(std::memory_order_relaxed) + (writer != nullptr ? writer->lost() : 0);
}

uint64_t log_suppressed_total() {
  return process_log.suppressed.load(std::memory_order_relaxed);
}

void log_report_suppressed() {
  report_suppressed(now_ns());
}

CallSiteLimiter::Site* CallSiteLimiter::find(uint64_t key) {
  const size_t start = (key * 0x9E3779B97F4A7C15ULL) >> 55U;  // 9 bits: kSites
  for (size_t step = 0; step < kSites; ++step) {
    Site& site = sites_[(start + step) % kSites];
    uint64_t seen = site.key.load(std::memory_order_relaxed);
    if (seen == key) {
      return &site;
    }
    // The key is all that a claim publishes; the counters start at zero, so relaxed is enough.
    if (seen == 0 && site.key.compare_exchange_strong(seen, key, std::memory_order_relaxed)) {
      return &site;
    }
    if (seen == key) {
      return &site;
    }
  }
  return nullptr;
}

CallSiteLimiter::Decision CallSiteLimiter::admit(const char* file, uint32_t line, uint64_t now_ns) {
  Site* site = find((std::bit_cast<uint64_t>(file) << 16U) | (line & 0xFFFFU));
  if (site == nullptr) {
    return {};
  }
  Decision decision;
  uint64_t start = site->second_start_ns.load(std::memory_order_relaxed);
  const bool over = start == 0 || (now_ns > start && now_ns - start >= kSecondNs);
  // One thread opens the next second; the others count into it.
  if (over && site->second_start_ns.compare_exchange_strong(start, now_ns, std::memory_order_relaxed)) {
    site->lines.store(0, std::memory_order_relaxed);
    decision.suppressed = site->suppressed.exchange(0, std::memory_order_relaxed);
  }
  decision.write = site->lines.fetch_add(1, std::memory_order_relaxed) < kLinesPerSecond;
  if (!decision.write) {
    site->suppressed.fetch_add(1, std::memory_order_relaxed);
  }
  return decision;
}

void CallSiteLimiter::reset() {
  for (Site& site : sites_) {
    site.key.store(0, std::memory_order_relaxed);
    site.second_start_ns.store(0, std::memory_order_relaxed);
    site.lines.store(0, std::memory_order_relaxed);
    site.suppressed.store(0, std::memory_order_relaxed);
  }
}

std::vector<CallSiteLimiter::Silent> CallSiteLimiter::take_suppressed(uint64_t now_ns) {
  std::vector<Silent> silent;
  for (Site& site : sites_) {
    const uint64_t start = site.second_start_ns.load(std::memory_order_relaxed);
    if (start == 0 || now_ns < start + kSecondNs) {
      continue;
    }
    const uint64_t count = site.suppressed.exchange(0, std::memory_order_relaxed);
    if (count > 0) {
      const uint64_t key = site.key.load(std::memory_order_relaxed);
      silent.push_back({std::bit_cast<const char*>(key >> 16U), static_cast<uint32_t>(key & 0xFFFFU), count});
    }
  }
  return silent;
}

}  // namespace expertd::base
