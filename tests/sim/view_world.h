// SPDX-License-Identifier: Apache-2.0
// Nodes that agree on views of a group while messages come in any order and nodes, ranks and links go, all from a seed.
// Tests only.
#pragma once

#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "daemon/engine/view_change.h"

namespace expertd::test {

using engine::View;
using engine::ViewChange;
using engine::ViewEnd;
using engine::ViewMessage;

inline constexpr uint64_t kRetryNs = 50;
inline constexpr uint64_t kLimitNs = 10'000'000;

inline engine::Placement placement_of(const std::vector<uint32_t>& node_of, uint32_t nodes, uint32_t own) {
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
    bool successor = false;  // all nodes form one, each at some time
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
    successor_ = faults.successor;
    while (faults.crashes + faults.deaths + faults.cuts + faults.wishes != 0 && breach_.empty()) {
      step(faults.drop_percent);
      if (chance(8)) {
        fault(&faults);
      }
    }
    settles_ = true;
    for (const std::unique_ptr<Node>& node : nodes_) {
      node->goes_over = successor_;
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
  uint64_t moved_from(uint32_t node) const { return nodes_[node]->moved_from; }
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
      at = 0;
      not_before = view.from;
      if (change->has_moved()) {
        moved_from = view.from;
        if (decided + 1 != view.from && world->is_member(*this, views.back())) {
          world->breach("node " + std::to_string(number) + " moves over behind another operation than it held at");
        }
      } else {
        views.push_back(view);
      }
      world->installed(number, view);
    }
    void end(ViewEnd /*end*/) override { over = true; }
    void send(uint32_t node, const ViewMessage& message) override {
      ++world->messages_;
      world->under_way_.push_back({number, node, message, std::nullopt});
    }
    /// Holds in place of deciding, where the next operation begins something. One that failed on this node alone does
    /// not begin anything there.
    bool holds() {
      const uint64_t next = decided + 1;
      const bool begins = next % 4 == 1 && (next * 31 + number * 17) % 11 != 0;
      at = at == 0 && goes_over && next >= not_before && begins ? next : at;
      return at != 0;
    }
    void decide_next() {
      if (moved_from != 0 || holds()) {
        return;
      }
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
    bool goes_over = false;
    uint64_t at = 0;
    uint64_t not_before = 0;
    uint64_t moved_from = 0;
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
        node.goes_over = node.goes_over || (successor_ && chance(5));
        if (node.goes_over && node.moved_from == 0 && !settles_ && chance(3) && node.change->stay()) {
          node.goes_over = false;  // for now: nothing may be agreed on meanwhile that needs it to hold
          node.at = 0;
        }
        if (node.goes_over && !node.over && node.moved_from == 0) {
          node.change->ready(node.at, node.decided, now_ns_);
        }
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
           std::all_of(nodes_.begin(), nodes_.end(), [this](const std::unique_ptr<Node>& node) {
             const bool to_move = successor_ && !node->over && has_ranks(*node) && node->moved_from == 0;
             return node->crashed || (!to_move && node->change->next_ns() == UINT64_MAX);
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
      if (successor_ != (node->moved_from != 0)) {
        breach("node " + std::to_string(node->number) + " is in the wrong group");
      }
      for (uint32_t rank = 0; rank < node_of_.size() && !successor_; ++rank) {
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
  bool successor_ = false;
  bool settles_ = false;
};

}  // namespace expertd::test
