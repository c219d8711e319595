// SPDX-License-Identifier: Apache-2.0
// When the watchdog pings and whom it names, on a clock and a service manager of the test.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "daemon/supervise/watchdog.h"

namespace expertd::supervise {
namespace {

constexpr uint64_t kSecond = 1'000'000'000;
using Names = std::vector<std::string>;

class FakeNotifier final : public Notifier {
 public:
  base::Status send(std::string_view state) override {
    sent.emplace_back(state);
    return fails ? base::Status(EXPERTD_REASON_SYSTEM) : base::Status::ok();
  }
  Names sent;
  bool fails = false;
};

class WatchdogTest : public testing::Test {
 protected:
  Beat& add(std::string name) {
    base::Result<Beat*> beat = watchdog_.add(std::move(name), now_);
    EXPECT_TRUE(beat.is_ok());
    return *beat.value();
  }
  Watchdog::Tick tick_after(uint64_t ns) {
    now_ += ns;
    return watchdog_.tick(now_);
  }

  uint64_t now_ = 100 * kSecond;
  FakeNotifier notifier_;
  Watchdog watchdog_{notifier_, {.ping_interval_ns = 5 * kSecond, .late_ns = 2 * kSecond}};
};

TEST_F(WatchdogTest, PingsAtTheFirstTickAndThenEveryInterval) {
  EXPECT_TRUE(tick_after(0).pinged);
  EXPECT_FALSE(tick_after(5 * kSecond - 1).pinged);
  EXPECT_TRUE(tick_after(1).pinged);
  EXPECT_EQ(notifier_.sent, (Names{"WATCHDOG=1", "WATCHDOG=1"}));
}

TEST_F(WatchdogTest, NeverPingsWithoutAnInterval) {
  Watchdog quiet(notifier_, {});
  EXPECT_FALSE(quiet.tick(now_).pinged);
  EXPECT_TRUE(notifier_.sent.empty());
}

TEST_F(WatchdogTest, WithholdsThePingAndNamesTheLateThread) {
  Beat& engine = add("engine.0");
  add("lease");
  engine.beat(now_ + 2 * kSecond);
  const Watchdog::Tick tick = tick_after(2 * kSecond);
  EXPECT_FALSE(tick.pinged);
  EXPECT_EQ(tick.late, (Names{"lease"}));
}

TEST_F(WatchdogTest, PingsAsSoonAsTheLateThreadBeats) {
  Beat& engine = add("engine.0");
  EXPECT_FALSE(tick_after(3 * kSecond).pinged);
  engine.beat(now_);
  EXPECT_TRUE(tick_after(1).pinged);
}

TEST_F(WatchdogTest, TreatsABeatJustYoungerThanTheBoundAsFresh) {
  add("engine.0");
  EXPECT_TRUE(tick_after(2 * kSecond - 1).late.empty());
}

TEST_F(WatchdogTest, TakesABeatFromTheFutureAsFresh) {
  add("engine.0").beat(now_ + kSecond);
  EXPECT_TRUE(tick_after(0).late.empty());
}

TEST_F(WatchdogTest, ExcusesAThreadThatSleepsIdle) {
  Beat& engine = add("engine.0");
  engine.sleep_idle();
  EXPECT_TRUE(tick_after(1000 * kSecond).pinged);
  engine.beat(now_);
  EXPECT_EQ(tick_after(2 * kSecond).late, (Names{"engine.0"}));
}

TEST_F(WatchdogTest, ForgetsARetiredThread) {
  add("engine.0").retire();
  EXPECT_TRUE(tick_after(1000 * kSecond).late.empty());
}

TEST_F(WatchdogTest, CountsALatePeriodOnceHoweverOftenItLooks) {
  Beat& engine = add("engine.0");
  tick_after(2 * kSecond);
  tick_after(kSecond / 2);
  tick_after(kSecond / 2);
  EXPECT_EQ(engine.missed_total(), 1U);
}

TEST_F(WatchdogTest, CountsEveryPeriodOfALongLateness) {
  Beat& engine = add("engine.0");
  tick_after(7 * kSecond);
  EXPECT_EQ(engine.missed_total(), 3U);
  tick_after(kSecond);
  EXPECT_EQ(engine.missed_total(), 4U);
}

TEST_F(WatchdogTest, CountsANewLatenessFromItsStart) {
  Beat& engine = add("engine.0");
  tick_after(2 * kSecond);
  engine.beat(now_);
  tick_after(0);
  tick_after(2 * kSecond);
  EXPECT_EQ(engine.missed_total(), 2U);
}

TEST_F(WatchdogTest, ListsTheMissedBeatsOfEveryThread) {
  add("engine.0");
  add("lease").sleep_idle();
  tick_after(2 * kSecond);
  const std::vector<Watchdog::Missed> missed = watchdog_.missed();
  ASSERT_EQ(missed.size(), 2U);
  EXPECT_EQ(missed[0].name, "engine.0");
  EXPECT_EQ(missed[0].total, 1U);
  EXPECT_EQ(missed[1].total, 0U);
}

TEST_F(WatchdogTest, RepeatsAPingThatDidNotGoOut) {
  notifier_.fails = true;
  const Watchdog::Tick failed = tick_after(0);
  EXPECT_FALSE(failed.pinged);
  EXPECT_FALSE(failed.notified.is_ok());
  notifier_.fails = false;
  EXPECT_TRUE(tick_after(1).pinged);
}

TEST_F(WatchdogTest, RefusesThreadsBeyondItsBound) {
  for (size_t i = 0; i < Watchdog::kMaxBeats; ++i) {
    EXPECT_TRUE(watchdog_.add("thread", now_).is_ok());
  }
  EXPECT_EQ(watchdog_.add("one more", now_).status().reason(), EXPERTD_REASON_INTERNAL);
}

TEST(WatchdogInterval, IsHalfOfWhatTheManagerAsksFor) {
  EXPECT_EQ(watchdog_ping_interval_ns("10000000", nullptr, 7), 5 * kSecond);
  EXPECT_EQ(watchdog_ping_interval_ns("10000000", "7", 7), 5 * kSecond);
}

TEST(WatchdogInterval, IsZeroWhenNobodyListens) {
  EXPECT_EQ(watchdog_ping_interval_ns(nullptr, nullptr, 7), 0U);
  EXPECT_EQ(watchdog_ping_interval_ns("", nullptr, 7), 0U);
  EXPECT_EQ(watchdog_ping_interval_ns("ten", nullptr, 7), 0U);
  EXPECT_EQ(watchdog_ping_interval_ns("18446744073709551615", nullptr, 7), 0U);
  EXPECT_EQ(watchdog_ping_interval_ns("10000000", "8", 7), 0U);
  EXPECT_EQ(watchdog_ping_interval_ns("10000000", "x", 7), 0U);
}

}  // namespace
}  // namespace expertd::supervise
