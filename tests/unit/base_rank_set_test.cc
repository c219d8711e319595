// SPDX-License-Identifier: Apache-2.0
#include "daemon/base/rank_set.h"

#include <gtest/gtest.h>

#include <thread>
#include <vector>

#include "daemon/base/atomic_rank_set.h"

namespace expertd::base {
namespace {

std::vector<uint32_t> ranks_of(const RankSet& set) {
  std::vector<uint32_t> ranks;
  for (const uint32_t rank : set) {
    ranks.push_back(rank);
  }
  return ranks;
}

RankSet set_of(const std::vector<uint32_t>& ranks) {
  RankSet set;
  for (const uint32_t rank : ranks) {
    set.add(rank);
  }
  return set;
}

TEST(RankSet, KeepsRanksOfEveryWord) {
  const std::vector<uint32_t> ranks{0, 1, 63, 64, 127, 128, 300, 448, 511};
  const RankSet set = set_of(ranks);
  EXPECT_EQ(ranks_of(set), ranks);
  EXPECT_EQ(set.count(), ranks.size());
  EXPECT_EQ(set.lowest(), 0);
  EXPECT_TRUE(set.contains(448));
  EXPECT_FALSE(set.contains(449));
}

TEST(RankSet, IsEmptyAtFirst) {
  EXPECT_TRUE(RankSet().empty());
  EXPECT_EQ(RankSet().lowest(), -1);
  EXPECT_EQ(RankSet().count(), 0U);
  EXPECT_TRUE(ranks_of(RankSet()).empty());
}

TEST(RankSet, HasTheFirstRanksOfAnyGroup) {
  for (uint32_t count = 0; count <= kMaxRanks; ++count) {
    const RankSet set = RankSet::first(count);
    ASSERT_EQ(set.count(), count);
    ASSERT_EQ(set.contains(count), false) << count;
    ASSERT_TRUE(count == 0 || set.contains(count - 1)) << count;
  }
}

TEST(RankSet, ARankThatNoGroupHasIsInNoSet) {
  RankSet set = RankSet::first(kMaxRanks);
  EXPECT_FALSE(set.contains(kMaxRanks));
  set.add(kMaxRanks);
  set.remove(UINT32_MAX);
  EXPECT_EQ(set, RankSet::first(kMaxRanks));
}

TEST(RankSet, JoinsMeetsAndLeavesOutOverAllWords) {
  const RankSet a = set_of({1, 70, 200, 511});
  const RankSet b = set_of({70, 199, 511});
  EXPECT_EQ(ranks_of(a | b), (std::vector<uint32_t>{1, 70, 199, 200, 511}));
  EXPECT_EQ(ranks_of(a & b), (std::vector<uint32_t>{70, 511}));
  EXPECT_EQ(ranks_of(a - b), (std::vector<uint32_t>{1, 200}));
  EXPECT_EQ((b - a).lowest(), 199);
  EXPECT_NE(a, b);
}

TEST(AtomicRankSet, TellsWhoWasThere) {
  AtomicRankSet set;
  EXPECT_TRUE(set.add(300, std::memory_order_seq_cst));
  EXPECT_FALSE(set.add(300, std::memory_order_seq_cst));
  set.add(set_of({5, 300, 511}), std::memory_order_seq_cst);
  EXPECT_EQ(set.load(std::memory_order_acquire), set_of({5, 300, 511}));
  EXPECT_TRUE(set.contains(511, std::memory_order_acquire));
  EXPECT_FALSE(set.contains(kMaxRanks, std::memory_order_acquire));
  set.store({}, std::memory_order_relaxed);
  EXPECT_TRUE(set.load(std::memory_order_acquire).empty());
}

// Whoever waits for all ranks sleeps until one of those who add the last ones sees the set whole.
TEST(AtomicRankSet, OfThoseWhoAddTheLastRanksOneSeesAll) {
  for (uint32_t run = 0; run < 2000; ++run) {
    AtomicRankSet set;
    std::atomic<uint32_t> ready{0};
    std::atomic<uint32_t> seen{0};
    const RankSet all = set_of({0, 511});
    const auto add = [&](uint32_t rank) {
      ++ready;
      while (ready.load() != 2) {
      }
      set.add(RankSet::one(rank), std::memory_order_seq_cst);
      seen += set.load(std::memory_order_seq_cst) == all ? 1 : 0;
    };
    std::thread other([&] { add(511); });
    add(0);
    other.join();
    ASSERT_GE(seen.load(), 1U) << "in run " << run;
  }
}

}  // namespace
}  // namespace expertd::base
