// SPDX-License-Identifier: Apache-2.0
// The log of the process: its two forms, its limits, and what it does when nobody reads.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <array>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "daemon/base/clock.h"
#include "daemon/base/fd.h"
#include "daemon/base/ids.h"
#include "daemon/base/log.h"

namespace expertd::base {
namespace {

constexpr uint64_t kSecondNs = 1'000'000'000;
constexpr uint64_t kMoment = 1'767'323'045 * kSecondNs + 678'901'234;  // 2026-01-02T03:04:05.678901234Z

std::string logfmt(std::string_view message, LogFields fields) {
  return format_log_line(LogFormat::kLogfmt, LogLevel::kInfo, kMoment, message, fields);
}

nlohmann::json json(std::string_view message, LogFields fields) {
  return nlohmann::json::parse(format_log_line(LogFormat::kJson, LogLevel::kInfo, kMoment, message, fields));
}

TEST(LogLine, IsLogfmtWithTimeLevelAndFields) {
  EXPECT_EQ(logfmt("session opened", {{"session", 7}, {"uid", 1000U}}),
            "time=2026-01-02T03:04:05.678901Z level=info msg=\"session opened\" session=7 uid=1000");
}

TEST(LogLine, IsJsonWithTimeLevelAndFields) {
  EXPECT_EQ(format_log_line(LogFormat::kJson, LogLevel::kWarn, kMoment, "session opened", {{"session", 7}}),
            "{\"time\":\"2026-01-02T03:04:05.678901Z\",\"level\":\"warn\",\"msg\":\"session opened\",\"session\":7}");
}

TEST(LogLine, WritesEveryKindOfValue) {
  const std::string text = "t";
  const nlohmann::json line = json("m", {{"bool", true},
                                         {"negative", int64_t{-9'223'372'036'854'775'807}},
                                         {"big", UINT64_MAX},
                                         {"real", 0.25},
                                         {"nan", __builtin_nan("")},
                                         {"string", text},
                                         {"null", static_cast<const char*>(nullptr)},
                                         {"session", SessionId{12}},
                                         {"reason", EXPERTD_REASON_PEER_LOST}});
  EXPECT_EQ(line["bool"], true);
  EXPECT_EQ(line["negative"], int64_t{-9'223'372'036'854'775'807});
  EXPECT_EQ(line["big"], UINT64_MAX);
  EXPECT_EQ(line["real"], 0.25);
  EXPECT_EQ(line["nan"], "nan");
  EXPECT_EQ(line["string"], "t");
  EXPECT_EQ(line["null"], "");
  EXPECT_EQ(line["session"], 12);
  EXPECT_EQ(line["reason"], "PEER_LOST");
}

TEST(LogLine, LeavesPlainLogfmtValuesBare) {
  EXPECT_TRUE(logfmt("m", {{"path", "/run/expertd"}}).ends_with(" path=/run/expertd"));
}

TEST(LogLine, QuotesLogfmtValuesThatWouldSplit) {
  EXPECT_TRUE(logfmt("m", {{"k", "a b"}}).ends_with(" k=\"a b\""));
  EXPECT_TRUE(logfmt("m", {{"k", "a=b"}}).ends_with(" k=\"a=b\""));
  EXPECT_TRUE(logfmt("m", {{"k", ""}}).ends_with(" k=\"\""));
  EXPECT_TRUE(logfmt("m", {{"k", "a\"b\\c"}}).ends_with(" k=\"a\\\"b\\\\c\""));
}

TEST(LogLine, KeepsALogfmtLineOnOneLine) {
  EXPECT_TRUE(logfmt("m", {{"k", "a\nb\r\t\x01\x7F"}}).ends_with(" k=\"a\\nb\\r\\t\\u0001\\u007f\""));
}

TEST(LogLine, RoundTripsEveryByteThroughJson) {
  std::string text;
  for (int byte = 0; byte < 0x80; ++byte) {
    text += static_cast<char>(byte);
  }
  text += "gr\xC3\xBCn \xE2\x82\xAC \xF0\x9F\x98\x80";
  EXPECT_EQ(json(text, {{"k", text}})["k"], text);
  EXPECT_EQ(json(text, {{"k", text}})["msg"], text);
}

TEST(LogLine, ReplacesInvalidUtf8) {
  for (const char* text : {"\xC3", "\xFF", "\xC0\x80", "\xED\xA0\x80", "\xF5\x80\x80\x80", "\xE2\x82"}) {
    EXPECT_EQ(json("m", {{"k", text}})["k"].get<std::string>().substr(0, 3), "\xEF\xBF\xBD");
  }
  EXPECT_EQ(json("m", {{"k", "a\xFFz"}})["k"], "a\xEF\xBF\xBDz");
}

TEST(LogLine, CutsLongTextsAndStillParses) {
  const std::string text(100'000, '\x01');
  const std::string cut = json("m", {{"k", text}})["k"];
  EXPECT_LT(cut.size(), 1024U);
  EXPECT_TRUE(cut.ends_with("\xE2\x80\xA6"));
}

TEST(LogLine, StaysWithinOneAtomicWrite) {
  const std::string text(100'000, '"');
  const LogFields fields = {{"a", text}, {"b", text}, {"c", text}, {"d", text}, {"e", text}};
  for (const LogFormat format : {LogFormat::kLogfmt, LogFormat::kJson}) {
    EXPECT_LT(format_log_line(format, LogLevel::kInfo, kMoment, text, fields).size(), kLogLineBytesMax);
  }
  EXPECT_EQ(json(text, fields)["truncated"], true);
}

TEST(LogLine, AllowsOnlyPlainKeys) {
  EXPECT_TRUE(logfmt("m", {{"a b=\"", 1}}).ends_with(" a_b__=1"));
}

TEST(CallSiteLimiter, WritesTenLinesOfASecond) {
  auto limiter = std::make_unique<CallSiteLimiter>();
  int written = 0;
  for (uint64_t i = 0; i < 100; ++i) {
    written += limiter->admit("file", 1, kSecondNs + i).write ? 1 : 0;
  }
  EXPECT_EQ(written, 10);
}

TEST(CallSiteLimiter, TellsTheCountWithTheFirstLineOfTheNextSecond) {
  auto limiter = std::make_unique<CallSiteLimiter>();
  for (uint64_t i = 0; i < 100; ++i) {
    EXPECT_EQ(limiter->admit("file", 1, kSecondNs + i).suppressed, 0U);
  }
  const CallSiteLimiter::Decision next = limiter->admit("file", 1, 2 * kSecondNs);
  EXPECT_TRUE(next.write);
  EXPECT_EQ(next.suppressed, 90U);
  EXPECT_EQ(limiter->admit("file", 1, 3 * kSecondNs).suppressed, 0U);
}

TEST(CallSiteLimiter, KeepsCallSitesApart) {
  auto limiter = std::make_unique<CallSiteLimiter>();
  const char* file = "file";
  for (uint64_t i = 0; i < 11; ++i) {
    limiter->admit(file, 1, kSecondNs);
  }
  EXPECT_FALSE(limiter->admit(file, 1, kSecondNs).write);
  EXPECT_TRUE(limiter->admit(file, 2, kSecondNs).write);
  EXPECT_TRUE(limiter->admit("other", 1, kSecondNs).write);
}

TEST(CallSiteLimiter, HandsOutCountsOfSilentSitesOnce) {
  auto limiter = std::make_unique<CallSiteLimiter>();
  const char* file = "file";
  for (uint64_t i = 0; i < 15; ++i) {
    limiter->admit(file, 3, kSecondNs);
  }
  EXPECT_TRUE(limiter->take_suppressed(kSecondNs + 1).empty());
  const std::vector<CallSiteLimiter::Silent> silent = limiter->take_suppressed(2 * kSecondNs);
  ASSERT_EQ(silent.size(), 1U);
  EXPECT_EQ(silent[0].file, file);
  EXPECT_EQ(silent[0].line, 3U);
  EXPECT_EQ(silent[0].suppressed, 5U);
  EXPECT_TRUE(limiter->take_suppressed(3 * kSecondNs).empty());
}

TEST(CallSiteLimiter, DoesNotLimitWhatItHasNoPlaceFor) {
  auto limiter = std::make_unique<CallSiteLimiter>();
  for (uint32_t line = 1; line <= CallSiteLimiter::kSites; ++line) {
    limiter->admit("file", line, kSecondNs);
  }
  for (uint64_t i = 0; i < 20; ++i) {
    EXPECT_TRUE(limiter->admit("file", 60'000, kSecondNs).write);
  }
}

class ProcessLogTest : public testing::Test {
 protected:
  void SetUp() override {
    std::array<int, 2> ends{};
    ASSERT_EQ(::pipe2(ends.data(), O_CLOEXEC), 0);
    read_end_.reset(ends[0]);
    write_end_.reset(ends[1]);
    options_.fd = write_end_.get();
    options_.close_timeout_ns = kSecondNs / 100;
  }
  void TearDown() override {
    log_close();
    set_log_level(LogLevel::kInfo);
  }

  /// Closes the log and returns its lines.
  std::vector<std::string> lines() {
    log_close();
    write_end_.reset();
    std::string text;
    std::array<char, 4096> block{};
    for (ssize_t bytes; (bytes = ::read(read_end_.get(), block.data(), block.size())) > 0;) {
      text.append(block.data(), static_cast<size_t>(bytes));
    }
    std::vector<std::string> result;
    for (size_t begin = 0, end; (end = text.find('\n', begin)) != text.npos; begin = end + 1) {
      result.push_back(text.substr(begin, end - begin));
    }
    return result;
  }

  ScopedFd read_end_;
  ScopedFd write_end_;
  LogOptions options_;
};

TEST_F(ProcessLogTest, WritesLinesInOrderBeforeItCloses) {
  ASSERT_TRUE(log_open(options_).is_ok());
  log_info("first", {{"n", 1}});
  log_error("second");
  const std::vector<std::string> written = lines();
  ASSERT_EQ(written.size(), 2U);
  EXPECT_NE(written[0].find("level=info msg=first n=1"), std::string::npos);
  EXPECT_NE(written[1].find("level=error msg=second"), std::string::npos);
}

TEST_F(ProcessLogTest, WritesJsonWhenAsked) {
  options_.format = LogFormat::kJson;
  ASSERT_TRUE(log_open(options_).is_ok());
  log_info("first");
  const std::vector<std::string> written = lines();
  ASSERT_EQ(written.size(), 1U);
  EXPECT_EQ(nlohmann::json::parse(written[0])["msg"], "first");
}

TEST_F(ProcessLogTest, FollowsTheLevelAtRunTime) {
  ASSERT_TRUE(log_open(options_).is_ok());
  log_debug("hidden");
  set_log_level(LogLevel::kDebug);
  log_debug("shown");
  set_log_level(LogLevel::kError);
  log_warn("hidden too");
  EXPECT_EQ(log_level(), LogLevel::kError);
  const std::vector<std::string> written = lines();
  ASSERT_EQ(written.size(), 1U);
  EXPECT_NE(written[0].find("msg=shown"), std::string::npos);
}

TEST_F(ProcessLogTest, LimitsACallSiteAndReportsTheRest) {
  ASSERT_TRUE(log_open(options_).is_ok());
  const uint64_t before = log_suppressed_total();
  const uint64_t started_ns = now_ns();
  for (int i = 0; i < 50; ++i) {
    log_info("often");
  }
  if (now_ns() - started_ns >= kSecondNs) {
    GTEST_SKIP() << "the loop took longer than the second that it is about";
  }
  EXPECT_EQ(log_suppressed_total() - before, 40U);
  const std::vector<std::string> written = lines();
  ASSERT_EQ(written.size(), 11U);
  EXPECT_NE(written[10].find("msg=\"log lines suppressed\" site=supervise_log_test.cc:"), std::string::npos);
  EXPECT_NE(written[10].find(" count=40"), std::string::npos);
}

TEST_F(ProcessLogTest, IsOpenOnlyOnce) {
  ASSERT_TRUE(log_open(options_).is_ok());
  EXPECT_EQ(log_open(options_).reason(), EXPERTD_REASON_BAD_STATE);
}

TEST_F(ProcessLogTest, DropsTheOldestAndCountsWhenNobodyReads) {
  ASSERT_GT(::fcntl(write_end_.get(), F_SETPIPE_SZ, 4096), 0);
  options_.queue_lines = 4;
  ASSERT_TRUE(log_open(options_).is_ok());
  const uint64_t before = log_dropped_total();
  const std::string filler(900, 'x');
  // Two call sites of ten lines each: a pipe of four lines, a queue of four, and the writer's own.
  for (uint32_t i = 0; i < 10; ++i) {
    log_info("line", {{"n", i}, {"filler", filler}});
    log_warn("line", {{"n", i}, {"filler", filler}});
  }
  EXPECT_GE(log_dropped_total() - before, 10U);
}

TEST_F(ProcessLogTest, ClosesWhileNobodyReads) {
  ASSERT_GT(::fcntl(write_end_.get(), F_SETPIPE_SZ, 4096), 0);
  ASSERT_TRUE(log_open(options_).is_ok());
  const std::string filler(1000, 'x');
  for (int i = 0; i < 10; ++i) {
    log_info("line", {{"a", filler}, {"b", filler}});
  }
  const uint64_t before = log_dropped_total();
  log_close();  // or the test hangs
  EXPECT_GT(log_dropped_total(), before);
}

TEST_F(ProcessLogTest, SurvivesAReaderThatWentAway) {
  read_end_.reset();
  ASSERT_TRUE(log_open(options_).is_ok());
  const uint64_t before = log_dropped_total();
  log_info("to nobody");
  log_close();
  EXPECT_EQ(log_dropped_total() - before, 1U);
}

TEST_F(ProcessLogTest, TakesLinesFromSeveralThreads) {
  ASSERT_TRUE(log_open(options_).is_ok());
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([t] {
      log_info("from a thread", {{"thread", t}});
      log_info("again", {{"thread", t}});
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  EXPECT_EQ(lines().size(), 8U);
}

}  // namespace
}  // namespace expertd::base
