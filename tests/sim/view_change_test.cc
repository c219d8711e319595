// SPDX-License-Identifier: Apache-2.0
// Views of a group over several nodes under any order of messages, losses and wishes: no operation ever has two masks,
// and when losses stop, whoever has a majority goes on. Every run comes from a seed.
#include <gtest/gtest.h>

#include <cstdlib>
#include <sstream>

#include "tests/sim/view_world.h"

namespace expertd::test {
namespace {

uint64_t seed_of(uint64_t run) {
  const char* given = std::getenv("EXPERTD_TEST_SEED");
  return given != nullptr ? std::strtoull(given, nullptr, 0) : run;
}

std::string repro(uint64_t seed) {
  const auto* test = ::testing::UnitTest::GetInstance()->current_test_info();
  std::ostringstream text;
  text << "EXPERTD_TEST_SEED=" << seed << " expertd_sim_tests --gtest_filter=" << test->test_suite_name() << "."
       << test->name();
  return text.str();
}

TEST(ViewChange, GivesEveryOperationOneMaskWhateverFails) {
  uint64_t operations = 0;
  for (uint64_t run = 1; run <= 3000; ++run) {
    const uint64_t seed = seed_of(run);
    std::mt19937_64 random(seed);
    const auto nodes = static_cast<uint32_t>(2 + random() % 5);
    const auto ranks = static_cast<uint32_t>(nodes + random() % (3 * nodes));
    const ViewWorld::Faults faults{.crashes = static_cast<uint32_t>(random() % nodes),
                                   .deaths = static_cast<uint32_t>(random() % 4),
                                   .cuts = static_cast<uint32_t>(random() % 3),
                                   .wishes = static_cast<uint32_t>(random() % 4),
                                   .drop_percent = static_cast<uint32_t>(random() % 2 * 10)};
    ViewWorld world(seed, nodes, ranks);
    ASSERT_EQ(world.run(faults), "") << repro(seed);
    operations += world.operations();
  }
  EXPECT_GT(operations, 10'000U);
}

TEST(ViewChange, RanksBehindThe64thAreAgreedOnAsWell) {
  for (uint64_t run = 1; run <= 60; ++run) {
    const uint64_t seed = seed_of(run);
    std::mt19937_64 random(seed);
    const auto nodes = static_cast<uint32_t>(9 + random() % 4);
    const ViewWorld::Faults faults{.crashes = static_cast<uint32_t>(random() % 4),
                                   .deaths = static_cast<uint32_t>(random() % 8),
                                   .cuts = static_cast<uint32_t>(random() % 2),
                                   .wishes = static_cast<uint32_t>(random() % 8),
                                   .drop_percent = static_cast<uint32_t>(random() % 2 * 10)};
    ViewWorld world(seed, nodes, nodes * 8);
    ASSERT_EQ(world.run(faults), "") << repro(seed);
  }
}

TEST(ViewChange, WithoutLostNodesEveryoneGoesOnAndEveryWishIsGranted) {
  for (uint64_t run = 1; run <= 1000; ++run) {
    const uint64_t seed = seed_of(run);
    std::mt19937_64 random(seed);
    const auto nodes = static_cast<uint32_t>(2 + random() % 4);
    ViewWorld world(seed, nodes, nodes * 2);
    ASSERT_EQ(world.run({.deaths = 2, .wishes = 4, .drop_percent = 20}), "") << repro(seed);
    for (uint32_t node = 0; node < nodes; ++node) {
      ASSERT_EQ(world.ended(node), ViewEnd::kNone) << repro(seed);
    }
  }
}

TEST(ViewChange, AGroupGoesOverToItsSuccessorAtOneOperationWhateverFails) {
  uint64_t moved = 0;
  for (uint64_t run = 1; run <= 3000; ++run) {
    const uint64_t seed = seed_of(run);
    std::mt19937_64 random(seed);
    const auto nodes = static_cast<uint32_t>(2 + random() % 4);
    const ViewWorld::Faults faults{.crashes = static_cast<uint32_t>(random() % 2),
                                   .deaths = static_cast<uint32_t>(random() % 3),
                                   .cuts = static_cast<uint32_t>(random() % 2),
                                   .drop_percent = static_cast<uint32_t>(random() % 2 * 10),
                                   .successor = true};
    ViewWorld world(seed, nodes, nodes + static_cast<uint32_t>(random() % nodes));
    ASSERT_EQ(world.run(faults), "") << repro(seed);
    for (uint32_t node = 0; node < nodes; ++node) {
      moved += world.moved_from(node) != 0 ? 1 : 0;
    }
  }
  EXPECT_GT(moved, 3000U);
}

TEST(ViewChange, OneCrashOfThreeNodesEndsNobodyElse) {
  for (uint64_t run = 1; run <= 1000; ++run) {
    const uint64_t seed = seed_of(run);
    ViewWorld world(seed, 3, 3);
    ASSERT_EQ(world.run({.crashes = 1}), "") << repro(seed);
    for (uint32_t node = 0; node < 3; ++node) {
      ASSERT_TRUE(world.crashed(node) || world.ended(node) == ViewEnd::kNone) << repro(seed);
    }
  }
}

/// Two nodes as one would drive them by hand.
class Halves : public ::testing::Test {
 protected:
  struct Host final : engine::ViewHost {
    uint64_t hold() override {
      held = true;
      return last;
    }
    void install(const View& view, bool stays_held) override {
      held = stays_held;
      installed = view;
    }
    void end(ViewEnd end) override { ended = end; }
    void send(uint32_t node, const ViewMessage& message) override { sent.emplace_back(node, message); }
    uint64_t last = 0;
    bool held = false;
    View installed;
    ViewEnd ended = ViewEnd::kNone;
    std::vector<std::pair<uint32_t, ViewMessage>> sent;
  };
  Host hosts_[2];
  engine::Placement placements_[2] = {placement_of({0, 0, 1, 1}, 2, 0), placement_of({0, 0, 1, 1}, 2, 1)};
  ViewChange changes_[2] = {{placements_[0], {kRetryNs, 1000}, &hosts_[0]},
                            {placements_[1], {kRetryNs, 1000}, &hosts_[1]}};
};

TEST_F(Halves, TheOneWithTheLowestRankGoesOnAndTheOtherEnds) {
  hosts_[0].last = 41;
  changes_[0].node_lost(1, 1);
  EXPECT_EQ(hosts_[0].installed, (View{.epoch = 2, .from = 42, .lost = base::RankSet(0b1100)}));
  EXPECT_FALSE(hosts_[0].held);
  changes_[1].node_lost(0, 1);
  EXPECT_EQ(hosts_[1].ended, ViewEnd::kMinority);
  EXPECT_TRUE(hosts_[0].sent.empty() || hosts_[0].ended == ViewEnd::kNone);
}

TEST_F(Halves, AnOrderlyEndOfTheFirstHalfLeavesTheOther) {
  changes_[0].rank_gone(0, 1);
  changes_[0].rank_gone(1, 1);
  changes_[1].rank_gone(0, 1);
  changes_[1].rank_gone(1, 1);
  for (int turn = 0; turn < 10; ++turn) {
    for (const uint32_t node : {0U, 1U}) {
      std::vector<std::pair<uint32_t, ViewMessage>> sent;
      sent.swap(hosts_[node].sent);
      for (const auto& [to, message] : sent) {
        EXPECT_TRUE(changes_[to].receive(node, message, 2));
      }
    }
  }
  EXPECT_EQ(hosts_[1].installed.lost, base::RankSet(0b11));
  changes_[1].node_lost(0, 3);
  EXPECT_EQ(hosts_[1].ended, ViewEnd::kNone);
  EXPECT_FALSE(hosts_[1].held);
}

TEST_F(Halves, ANodeThatNeverAnswersEndsTheGroupAtTheDeadline) {
  changes_[0].rank_gone(0, 1);
  EXPECT_EQ(changes_[0].next_ns(), 1 + kRetryNs);
  changes_[0].tend(1 + kRetryNs);
  EXPECT_EQ(hosts_[0].sent.size(), 2U) << "asked twice";
  changes_[0].tend(1001);
  EXPECT_EQ(hosts_[0].ended, ViewEnd::kDeadline);
  EXPECT_EQ(changes_[0].next_ns(), UINT64_MAX);
}

TEST_F(Halves, WhatNoDaemonSendsIsRefused) {
  ViewMessage message;
  message.kind = engine::ViewKind::kCommit;
  message.epoch = 2;
  message.value.view = {.epoch = 2, .from = 1, .lost = base::RankSet(0b10000)};
  EXPECT_FALSE(changes_[0].receive(1, message, 1)) << "a rank beyond the group";
  message.value.view.lost = {};
  EXPECT_FALSE(changes_[0].receive(0, message, 1)) << "the own node";
  EXPECT_FALSE(changes_[0].receive(2, message, 1)) << "no node";
}

}  // namespace
}  // namespace expertd::test
