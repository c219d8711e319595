// SPDX-License-Identifier: Apache-2.0
// A group of 72 ranks over nine nodes, seen from the last one: ranks behind the 64th are counted, named and left out
// like all others.
#include <gtest/gtest.h>

#include <memory>
#include <vector>

#include "tests/support/fake_engine_group.h"

namespace expertd::test {
namespace {

constexpr uint32_t kNodes = 9;
constexpr uint32_t kRanksOnNode = 8;
constexpr uint32_t kFirst = (kNodes - 1) * kRanksOnNode;  // of this node
constexpr uint32_t kRanks = kNodes * kRanksOnNode;
constexpr uint64_t kNow = 1;

engine::GroupSettings settings_of(bool mask_on_loss) {
  engine::GroupSettings settings = group_settings(kRanks, mask_on_loss);
  auto placement = std::make_shared<engine::Placement>();
  placement->own_node = kNodes - 1;
  placement->ranks_of.resize(kNodes);
  for (uint32_t rank = 0; rank < kRanks; ++rank) {
    placement->node_of.push_back(rank / kRanksOnNode);
    placement->index_of.push_back(rank % kRanksOnNode);
    placement->ranks_of[rank / kRanksOnNode].push_back(rank);
  }
  settings.placement = placement;
  return settings;
}

class EngineManyRanks : public ::testing::Test {
 protected:
  explicit EngineManyRanks(bool mask_on_loss = true) : shared_(settings_of(mask_on_loss)) {
    for (uint32_t place = 0; place < kRanksOnNode; ++place) {
      ranks_.push_back(std::make_unique<FakeRank>(&shared_, kFirst + place, &wake_));
    }
  }
  FakeRank& rank(uint32_t number) { return *ranks_[number - kFirst]; }
  uint64_t submit_but(uint32_t late = kRanks) {
    uint64_t seq = 0;
    for (uint32_t place = 0; place < kRanksOnNode; ++place) {
      seq = kFirst + place == late ? seq : ranks_[place]->submit();
    }
    return seq;
  }
  void settle(uint64_t now_ns = kNow) {
    for (int turn = 0; turn < 20; ++turn) {
      for (const std::unique_ptr<FakeRank>& rank : ranks_) {
        (void)rank->run(now_ns);
      }
    }
  }
  void finish() {
    for (const std::unique_ptr<FakeRank>& rank : ranks_) {
      rank->port.finish_all();
    }
    settle();
  }

  engine::GroupShared shared_;
  FakeWakePort wake_;
  std::vector<std::unique_ptr<FakeRank>> ranks_;
};

class EngineManyRanksThatFail : public EngineManyRanks {
 protected:
  EngineManyRanksThatFail() : EngineManyRanks(false) {}
};

TEST_F(EngineManyRanks, ACompletionHasABitForEveryRank) {
  const uint64_t seq = submit_but();
  settle();
  ASSERT_EQ(rank(70).port.parts().size(), 1U);
  const engine::LaunchSpec& spec = rank(70).port.parts()[0].spec;
  EXPECT_EQ(spec.active_ranks, base::RankSet::first(kRanks));
  EXPECT_EQ(spec.request_of(65), &rank(65).session().request(0));
  EXPECT_EQ(spec.request_of(1), nullptr) << "it is elsewhere, and its place is another's here";
  finish();
  ASSERT_TRUE(rank(71).completed(seq));
  const expertd_completion& completion = rank(71).completion(seq);
  EXPECT_EQ(completion.reason, 0U);
  EXPECT_EQ(completion.rank_mask, ~uint64_t{0});
  EXPECT_EQ(completion.rank_mask_more[0], 0xffU);
  EXPECT_EQ(completion.rank_mask_more[1], 0U);
  EXPECT_EQ(completion.flags & EXPERTD_COMPLETION_DEGRADED, 0U);
}

TEST_F(EngineManyRanks, WhoDoesNotSubmitIsNamed) {
  const uint64_t seq = submit_but(70);
  settle(kDeadlineNs);
  ASSERT_TRUE(rank(64).completed(seq));
  EXPECT_EQ(rank(64).reason(seq), uint32_t{EXPERTD_REASON_TIMEOUT});
  EXPECT_EQ(rank(64).completion(seq).missing, uint32_t{EXPERTD_MISSING_SUBMISSION});
  EXPECT_EQ(rank(64).completion(seq).rank, 70);
}

TEST_F(EngineManyRanks, WhoseRowsAreMissingIsNamed) {
  const uint64_t seq = submit_but();
  settle();
  for (uint32_t number = kFirst; number < kRanks; ++number) {
    rank(number).port.missing_what = EXPERTD_MISSING_ROWS;
    rank(number).port.missing_ranks = base::RankSet::one(67) | base::RankSet::one(69);
  }
  settle(kDeadlineNs);
  ASSERT_TRUE(rank(64).completed(seq));
  EXPECT_EQ(rank(64).reason(seq), uint32_t{EXPERTD_REASON_TIMEOUT});
  EXPECT_EQ(rank(64).completion(seq).rank, 67);
}

TEST_F(EngineManyRanks, ALostRankIsLeftOutByTheNextView) {
  shared_.set_lost(70);
  shared_.set_lost(3);
  const base::RankSet lost = base::RankSet::one(70) | base::RankSet::one(3);
  shared_.install({.epoch = 2, .from = 1, .lost = lost, .excluded = base::RankSet::one(68)}, false);
  EXPECT_EQ(shared_.excluded(), base::RankSet::one(68));
  const uint64_t seq = submit_but(70);
  settle();
  finish();
  ASSERT_TRUE(rank(64).completed(seq));
  const expertd_completion& completion = rank(64).completion(seq);
  EXPECT_EQ(completion.reason, 0U);
  EXPECT_EQ(completion.rank_mask, ~uint64_t{0b1000});
  EXPECT_EQ(completion.rank_mask_more[0], 0xffU & ~(1U << 6) & ~(1U << 4));
  EXPECT_NE(completion.flags & EXPERTD_COMPLETION_DEGRADED, 0U);
  EXPECT_EQ(rank(68).reason(seq), uint32_t{EXPERTD_REASON_BAD_STATE}) << "the others run without it";
  EXPECT_EQ(rank(68).completion(seq).rank, 68);
}

TEST_F(EngineManyRanks, ARunningOperationOfALostRankIsAborted) {
  const uint64_t seq = submit_but();
  settle();
  shared_.set_lost(66);
  settle();
  finish();
  ASSERT_TRUE(rank(64).completed(seq));
  EXPECT_EQ(rank(64).reason(seq), uint32_t{EXPERTD_REASON_PEER_LOST});
  EXPECT_EQ(rank(64).completion(seq).rank, 66);
}

TEST_F(EngineManyRanks, OneThatALostRankElsewhereWasThroughWithRuns) {
  const uint64_t seq = submit_but();
  shared_.set_lost(9, 1);
  shared_.install({.epoch = 2, .from = 2, .lost = base::RankSet::one(9), .excluded = {}}, false);
  settle();
  finish();
  ASSERT_TRUE(rank(64).completed(seq));
  EXPECT_EQ(rank(64).reason(seq), 0U);
  EXPECT_EQ(rank(64).completion(seq).rank_mask_more[0], 0xffU);
}

TEST_F(EngineManyRanksThatFail, NothingStartsOnceARankIsLost) {
  shared_.set_lost(71);
  const uint64_t seq = submit_but(71);
  settle();
  ASSERT_TRUE(rank(64).completed(seq));
  EXPECT_EQ(rank(64).reason(seq), uint32_t{EXPERTD_REASON_PEER_LOST});
  EXPECT_EQ(rank(64).completion(seq).rank, 71);
}

TEST_F(EngineManyRanks, TheLastToSubmitIsKnown) {
  for (uint32_t number = kFirst; number < kRanks; ++number) {
    (void)rank(number).submit();
  }
  EXPECT_EQ(shared_.last_to_post(1), 71);
}

}  // namespace
}  // namespace expertd::test
