// SPDX-License-Identifier: Apache-2.0
// When a peer daemon is pinged and when its silence is too long; the test has the clock.
#include "daemon/fabric/heartbeat.h"

#include <gtest/gtest.h>

#include <deque>

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

/// Pings and signs of life of a peer from 0 to `until_ms` by milliseconds; the peer is heard in every one of them and
/// answers each ping that was sent before `cut_ms` after `rtt_ms`. When it is lost, or `until_ms`.
uint64_t lost_after_ms(Heartbeat& heartbeat, uint64_t rtt_ms, uint64_t cut_ms, uint64_t until_ms) {
  std::deque<uint64_t> pings_ms;
  for (uint64_t ms = 0; ms < until_ms; ++ms) {
    const uint64_t now_ns = kStart + ms * kMs;
    if (!pings_ms.empty() && pings_ms.front() + rtt_ms == ms) {
      heartbeat.answered(kStart + pings_ms.front() * kMs, now_ns);
      pings_ms.pop_front();
    }
    heartbeat.heard(now_ns);
    if (heartbeat.take_due(now_ns) && ms < cut_ms) {
      pings_ms.push_back(ms);
    }
    if (heartbeat.silent_too_long(now_ns)) {
      return ms;
    }
  }
  return until_ms;
}

TEST(FabricHeartbeat, APeerThatIsHeardAndNoLongerAnswersIsLostWithinAllIntervalsAndOneMore) {
  for (uint64_t cut_ms = 300; cut_ms <= 400; cut_ms += 10) {
    Heartbeat heartbeat({}, kStart);
    const uint64_t lost_ms = lost_after_ms(heartbeat, 1, cut_ms, 2000);
    // The first ping that is lost was sent at the next full interval.
    EXPECT_EQ(lost_ms, (cut_ms + 99) / 100 * 100 + 501) << "cut at " << cut_ms << " ms";
    EXPECT_TRUE(heartbeat.only_unanswered(kStart + lost_ms * kMs));
    EXPECT_EQ(heartbeat.asked_ns(), kStart + (lost_ms - 501) * kMs);
  }
}

TEST(FabricHeartbeat, APeerThatAnswersLateButAlwaysIsNotLost) {
  for (const uint64_t rtt_ms : {1U, 99U, 100U, 101U, 250U, 499U, 501U, 730U}) {
    Heartbeat heartbeat({}, kStart);
    EXPECT_EQ(lost_after_ms(heartbeat, rtt_ms, UINT64_MAX, 10'000), 10'000U) << "a round trip of " << rtt_ms << " ms";
  }
}

TEST(FabricHeartbeat, AnAnswerToALaterPingEndsTheWaitAndARepeatedOneDoesNot) {
  Heartbeat heartbeat({}, kStart);
  EXPECT_TRUE(heartbeat.take_due(kStart));
  heartbeat.answered(kStart, kStart + kMs);
  for (const uint64_t ms : {100U, 200U, 300U}) {
    EXPECT_TRUE(heartbeat.take_due(kStart + ms * kMs));
  }
  EXPECT_EQ(heartbeat.asked_ns(), kStart + 100 * kMs);
  heartbeat.answered(kStart, kStart + 350 * kMs);
  EXPECT_EQ(heartbeat.asked_ns(), kStart + 100 * kMs) << "that answer was there already";
  heartbeat.answered(kStart + 200 * kMs, kStart + 360 * kMs);
  EXPECT_EQ(heartbeat.asked_ns(), 0U) << "the answer to the ping before it may have been left out";
  heartbeat.heard(kStart + 360 * kMs);
  EXPECT_TRUE(heartbeat.take_due(kStart + 400 * kMs));
  heartbeat.answered(kStart + 100 * kMs, kStart + 410 * kMs);
  EXPECT_EQ(heartbeat.asked_ns(), kStart + 400 * kMs);
}

TEST(FabricHeartbeat, SilenceIsNoMissingAnswer) {
  Heartbeat heartbeat({}, kStart);
  EXPECT_TRUE(heartbeat.take_due(kStart));
  heartbeat.answered(kStart, kStart + kMs);
  heartbeat.heard(kStart + kMs);
  EXPECT_TRUE(heartbeat.take_due(kStart + 100 * kMs));
  EXPECT_EQ(heartbeat.lost_at_ns(), kStart + 501 * kMs);
  EXPECT_FALSE(heartbeat.only_unanswered(kStart + 501 * kMs + 1));
}

TEST(FabricHeartbeat, BeforeTheFirstAnswerOnlySilenceCounts) {
  Heartbeat heartbeat({}, kStart);
  for (uint64_t ms = 0; ms < 3000; ms += 100) {
    EXPECT_TRUE(heartbeat.take_due(kStart + ms * kMs));
    heartbeat.heard(kStart + ms * kMs);
    EXPECT_FALSE(heartbeat.silent_too_long(kStart + ms * kMs)) << "its connection may still be under way";
  }
}

TEST(FabricHeartbeat, OwnLatenessIsNoMissingAnswer) {
  Heartbeat heartbeat({}, kStart);
  EXPECT_TRUE(heartbeat.take_due(kStart));
  heartbeat.answered(kStart, kStart + kMs);
  EXPECT_TRUE(heartbeat.take_due(kStart + 100 * kMs));
  heartbeat.forgive(60'000 * kMs);
  heartbeat.heard(kStart + 60'600 * kMs);
  EXPECT_FALSE(heartbeat.silent_too_long(kStart + 60'600 * kMs));
  EXPECT_TRUE(heartbeat.silent_too_long(kStart + 60'600 * kMs + 1));
  heartbeat.answered(kStart + 100 * kMs, kStart + 60'600 * kMs);
  heartbeat.forgive(1000 * kMs);
  EXPECT_EQ(heartbeat.asked_ns(), 0U) << "nothing was asked that could be forgiven";
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
