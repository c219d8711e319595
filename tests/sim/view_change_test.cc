// SPDX-License-Identifier: Apache-2.0
// Views of a group over several nodes under any order of messages, losses and wishes: no operation ever has two masks,
// and when losses stop, whoever has a majority goes on. Every run comes from a seed.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <sstream>

#include "daemon/engine/view_change.h"

namespace expertd::test {
namespace {

using engine::View;
using engine::ViewChange;
using engine::ViewEnd;
using engine::ViewMessage;

constexpr uint64_t kRetryNs = 50;
constexpr uint64_t kLimitNs = 10'000'000;

engine::Placement placement_of(const std::vector<uint32_t>& node_of, uint32_t nodes, uint32_t own) {
  engine::Placement placement;
  placement.own_node = own;
  placement.ranks_of.resize(nodes);
  for (uint32_t rank = 0; rank < node_of.size(); ++rank) {
    placement.node_of.push_back(node_of[rank]);
    placement.index_of.push_back(static_cast<uint32_t>(placement.ranks_of[node_of[rank]].size()));
    placement.ranks_of[node_of[rank]].push_back(rank);
  }
  return placement;
}

class ViewWorld {
 public:
  struct Faults {
    uint32_t crashes = 0;
    uint32_t deaths = 0;  // of ranks whose daemons live
    uint32_t cuts = 0;    // between two nodes that live
    uint32_t wishes = 0;
    uint32_t drop_percent = 0;
  };

  ViewWorld(uint64_t seed, uint32_t nodes, uint32_t ranks) : random_(seed) {
    for (uint32_t rank = 0; rank < ranks; ++rank) {
      node_of_.push_back(rank < nodes ? rank : pick(nodes));
    }
    std::sort(node_of_.begin(), node_of_.end());
    for (uint32_t node = 0; node < nodes; ++node) {
      nodes_.push_back(std::make_unique<Node>(this, node));
    }
  }

  /// What went wrong, or empty.
  std::string run(Faults faults) {
    while (faults.crashes + faults.deaths + faults.cuts + faults.wishes != 0 && breach_.empty()) {
      step(faults.drop_percent);
      if (chance(8)) {
        fault(&faults);
      }
    }
    for (uint32_t step_count = 0; breach_.empty() && !settled(); ++step_count) {
      step(0);
      if (step_count > 300'000) {
        breach("it does not settle");
      }
    }
    check_end();
    return breach_;
  }

  uint32_t nodes() const { return static_cast<uint32_t>(nodes_.size()); }
  bool crashed(uint32_t node) const { return nodes_[node]->crashed; }
  ViewEnd ended(uint32_t node) const { return nodes_[node]->change->ended(); }
  const View& view(uint32_t node) const { return nodes_[node]->change->view(); }
  uint64_t operations() const { return operations_; }
  uint64_t messages() const { return messages_; }
  uint64_t granted(uint32_t node) const { return nodes_[node]->change->granted(); }
  uint64_t wishes(uint32_t node) const { return nodes_[node]->wishes; }

 private:
  struct Node final : engine::ViewHost {
    Node(ViewWorld* of, uint32_t own)
        : world(of),
          number(own),
          placement(placement_of(of->node_of_, 1 + *std::max_element(of->node_of_.begin(), of->node_of_.end()), own)),
          change(std::make_unique<ViewChange>(placement, engine::ViewOptions{kRetryNs, kLimitNs}, this)) {}

    uint64_t hold() override {
      held = true;
      return decided;
    }
    void install(const View& view, bool stays_held) override {
      held = stays_held;
      views.push_back(view);
      world->installed(number, view);
    }
    void end(ViewEnd /*end*/) override { over = true; }
    void send(uint32_t node, const ViewMessage& message) override {
      ++world->messages_;
      world->under_way_.push_back({number, node, message, std::nullopt});
    }
    void decide_next() {
      ++decided;
      const auto view = std::find_if(views.rbegin(), views.rend(), [this](const View& v) { return v.from <= decided; });
      epoch_of.push_back(view->epoch);
    }

    ViewWorld* world;
    uint32_t number;
    engine::Placement placement;
    std::unique_ptr<ViewChange> change;
    std::vector<View> views{View{}};
    uint64_t decided = 0;
    std::vector<uint64_t> epoch_of{0};  // by operation
    uint64_t wishes = 0;
    bool held = false;
    bool over = false;
    bool crashed = false;
  };
  /// A message, or what a daemon tells of a rank of its own.
  struct Parcel {
    uint32_t from = 0;
    uint32_t to = 0;
    ViewMessage message;
    std::optional<uint32_t> gone;
  };

  uint32_t pick(size_t count) { return static_cast<uint32_t>(random_() % count); }
  bool chance(uint32_t percent) { return pick(100) < percent; }
  void breach(const std::string& text) { breach_ = breach_.empty() ? text : breach_; }

  void installed(uint32_t node, const View& view) {
    const auto [known, fresh] = views_.emplace(view.epoch, view);
    if (!fresh && !(known->second == view)) {
      breach("node " + std::to_string(node) + " has another view of epoch " + std::to_string(view.epoch));
    }
  }
  /// Who is in every view up to the one that an operation belongs to decides it in that one. Others are lost to those
  /// who are, and may have been ahead.
  void check_masks(const Node& node) {
    for (uint64_t op = 1; op <= node.decided && breach_.empty(); ++op) {
      uint64_t epoch = 1;
      bool member = true;
      for (const auto& [next, view] : views_) {
        epoch = view.from <= op ? next : epoch;
        member = member && (view.from > op || is_member(node, view));
      }
      ++operations_;
      if (member && node.epoch_of[op] != epoch) {
        breach("node " + std::to_string(node.number) + " decides operation " + std::to_string(op) + " in epoch " +
               std::to_string(node.epoch_of[op]) + ", it is of " + std::to_string(epoch));
      }
    }
  }
  bool is_member(const Node& node, const View& view) const {
    return std::any_of(node.placement.ranks_of[node.number].begin(), node.placement.ranks_of[node.number].end(),
                       [&](uint32_t rank) { return !view.lost.contains(rank); });
  }

  void step(uint32_t drop_percent) {
    now_ns_ += chance(20) ? pick(kRetryNs) : 0;
    const uint32_t what = pick(100);
    if (what < 60 && !under_way_.empty()) {
      deliver(drop_percent);
    } else if (what < 75 && !losses_.empty()) {
      const uint32_t which = pick(losses_.size());
      const auto [node, lost] = losses_[which];
      losses_.erase(losses_.begin() + which);
      if (!nodes_[node]->crashed) {
        nodes_[node]->change->node_lost(lost, now_ns_);
      }
    } else if (what < 90) {
      Node& node = *nodes_[pick(nodes_.size())];
      // How far one is ahead of another is bounded by what a rank may have outstanding.
      if (!node.held && !node.over && !node.crashed && node.decided < least_decided() + 64) {
        node.decide_next();
      }
    } else {
      Node& node = *nodes_[pick(nodes_.size())];
      if (!node.crashed) {
        node.change->tend(now_ns_);
      }
    }
  }
  uint64_t least_decided() const {
    uint64_t least = UINT64_MAX;
    for (const std::unique_ptr<Node>& node : nodes_) {
      least = node->crashed || node->over ? least : std::min(least, node->decided);
    }
    return least;
  }

  void deliver(uint32_t drop_percent) {
    const uint32_t which = pick(under_way_.size());
    const Parcel parcel = under_way_[which];
    under_way_[which] = under_way_.back();
    under_way_.pop_back();
    Node& to = *nodes_[parcel.to];
    const bool lost = to.crashed || cut_.contains({parcel.from, parcel.to});
    if (lost || (!parcel.gone.has_value() && chance(drop_percent))) {
      return;
    }
    if (parcel.gone.has_value()) {
      to.change->rank_gone(*parcel.gone, now_ns_);
    } else if (!to.change->receive(parcel.from, parcel.message, now_ns_)) {
      breach("a message of a node is refused");
    }
  }

  void cut(uint32_t a, uint32_t b) {
    if (a != b && cut_.insert({a, b}).second) {
      cut_.insert({b, a});
      losses_.emplace_back(a, b);
      losses_.emplace_back(b, a);
    }
  }
  void fault(Faults* left) {
    const uint32_t node = pick(nodes_.size());
    if (left->crashes != 0 && chance(30)) {
      --left->crashes;
      nodes_[node]->crashed = true;
      for (uint32_t other = 0; other < nodes_.size(); ++other) {
        // Some of what it sent still arrives, and some does not.
        if (other != node && chance(50)) {
          cut(node, other);
        } else if (other != node) {
          losses_.emplace_back(other, node);
        }
      }
    } else if (left->deaths != 0 && chance(40)) {
      --left->deaths;
      die(pick(node_of_.size()));
    } else if (left->cuts != 0 && chance(30)) {
      --left->cuts;
      cut(node, pick(nodes_.size()));
    } else if (left->wishes != 0) {
      --left->wishes;
      if (!nodes_[node]->crashed) {
        const auto ranks = base::RankSet::one(pick(node_of_.size()));
        ++nodes_[node]->wishes;
        (void)nodes_[node]->change->ask(chance(60) ? ranks : base::RankSet(), chance(40) ? ranks : base::RankSet(),
                                        now_ns_);
      }
    }
  }
  void die(uint32_t rank) {
    Node& home = *nodes_[node_of_[rank]];
    if (home.crashed || !dead_.insert(rank).second) {
      return;
    }
    home.change->rank_gone(rank, now_ns_);
    for (uint32_t other = 0; other < nodes_.size(); ++other) {
      if (other != home.number) {
        under_way_.push_back({home.number, other, {}, rank});
      }
    }
  }

  bool has_ranks(const Node& node) const {
    return std::any_of(node.placement.ranks_of[node.number].begin(), node.placement.ranks_of[node.number].end(),
                       [this](uint32_t rank) { return !dead_.contains(rank); });
  }
  bool settled() const {
    return under_way_.empty() && losses_.empty() &&
           std::all_of(nodes_.begin(), nodes_.end(), [](const std::unique_ptr<Node>& node) {
             return node->crashed || node->change->next_ns() == UINT64_MAX;
           });
  }
  void check_end() {
    for (const std::unique_ptr<Node>& node : nodes_) {
      check_masks(*node);
    }
    const View* common = nullptr;
    for (const std::unique_ptr<Node>& node : nodes_) {
      if (node->crashed || node->over || !has_ranks(*node) || !breach_.empty()) {
        continue;
      }
      const View& view = node->change->view();
      common = common == nullptr ? &view : common;
      if (!(view == *common)) {
        breach("two nodes that go on have two views");
      }
      if (node->held) {
        breach("node " + std::to_string(node->number) + " decides nothing for good");
      }
      for (uint32_t rank = 0; rank < node_of_.size(); ++rank) {
        const bool there = !dead_.contains(rank) && !nodes_[node_of_[rank]]->crashed && !nodes_[node_of_[rank]]->over;
        if (there == view.lost.contains(rank)) {
          breach("rank " + std::to_string(rank) + " is " + (there ? "there and lost" : "gone and waited for"));
        }
      }
    }
  }

  std::mt19937_64 random_;
  std::vector<uint32_t> node_of_;
  std::vector<std::unique_ptr<Node>> nodes_;
  std::vector<Parcel> under_way_;
  std::vector<std::pair<uint32_t, uint32_t>> losses_;  // who will hear of whom
  std::set<std::pair<uint32_t, uint32_t>> cut_;
  std::set<uint32_t> dead_;
  std::map<uint64_t, View> views_;
  uint64_t operations_ = 0;
  uint64_t messages_ = 0;
  uint64_t now_ns_ = 1;
  std::string breach_;
};

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
