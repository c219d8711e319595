// SPDX-License-Identifier: Apache-2.0
// When a peer daemon is pinged and when its silence is too long; the test has the clock.
#include "daemon/fabric/heartbeat.h"

#include <gtest/gtest.h>

namespace expertd::fabric {
namespace {

constexpr uint64_t kMs = 1'000'000;
constexpr uint64_t kStart = 1'000'000'000'000;

TEST(FabricHeartbeat, PingsOncePerInterval) {
  Heartbeat heartbeat({}, kStart);
  uint32_t pings = 0;
  for (uint64_t ms = 0; ms < 1000; ++ms) {
    pings += heartbeat.take_due(kStart + ms * kMs) ? 1 : 0;
  }
  EXPECT_EQ(pings, 10U);
}

TEST(FabricHeartbeat, ALateThreadSendsOnePingAndNotAllThatWereDue) {
  Heartbeat heartbeat({}, kStart);
  EXPECT_TRUE(heartbeat.take_due(kStart));
  EXPECT_TRUE(heartbeat.take_due(kStart + 1000 * kMs));
  EXPECT_FALSE(heartbeat.take_due(kStart + 1001 * kMs));
  EXPECT_TRUE(heartbeat.take_due(kStart + 1100 * kMs));
}

TEST(FabricHeartbeat, SilenceOfAllIntervalsLosesAPeerThatWasUp) {
  Heartbeat heartbeat({}, kStart);
  heartbeat.heard(kStart + 50 * kMs);
  EXPECT_TRUE(heartbeat.up());
  EXPECT_FALSE(heartbeat.silent_too_long(kStart + 550 * kMs));
  EXPECT_TRUE(heartbeat.silent_too_long(kStart + 550 * kMs + 1));
  heartbeat.heard(kStart + 551 * kMs);
  EXPECT_FALSE(heartbeat.silent_too_long(kStart + 1000 * kMs));
}

TEST(FabricHeartbeat, APeerThatNeverAnsweredHasLonger) {
  Heartbeat heartbeat({.interval_ns = 100 * kMs, .misses = 5, .connect_limit_ns = 2000 * kMs}, kStart);
  EXPECT_FALSE(heartbeat.silent_too_long(kStart + 2000 * kMs));
  EXPECT_TRUE(heartbeat.silent_too_long(kStart + 2001 * kMs));
  EXPECT_FALSE(heartbeat.up());
}

TEST(FabricHeartbeat, OwnLatenessIsNoSilenceOfThePeer) {
  Heartbeat heartbeat({}, kStart);
  heartbeat.heard(kStart);
  heartbeat.forgive(60'000 * kMs);
  EXPECT_FALSE(heartbeat.silent_too_long(kStart + 60'000 * kMs));
  EXPECT_TRUE(heartbeat.silent_too_long(kStart + 60'501 * kMs));
}

TEST(FabricHeartbeat, MeasuresTheRoundTripAndBelievesNoFuture) {
  Heartbeat heartbeat({}, kStart);
  EXPECT_EQ(heartbeat.rtt_ns(), 0U);
  heartbeat.answered(kStart + 1, kStart + 1 + 30'000);
  EXPECT_EQ(heartbeat.rtt_ns(), 30'000U);
  heartbeat.answered(kStart + 500 * kMs, kStart + 400 * kMs);
  heartbeat.answered(0, kStart + 400 * kMs);
  EXPECT_EQ(heartbeat.rtt_ns(), 30'000U);
}

TEST(FabricHeartbeat, SaysWhenToLookAgain) {
  Heartbeat heartbeat({}, kStart);
  EXPECT_EQ(heartbeat.next_ns(), kStart);
  EXPECT_TRUE(heartbeat.take_due(kStart));
  EXPECT_EQ(heartbeat.next_ns(), kStart + 100 * kMs);
}

}  // namespace
}  // namespace expertd::fabric
