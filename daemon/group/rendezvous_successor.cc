// SPDX-License-Identifier: Apache-2.0
// The rendezvous and ranks that come back to a running group: who awaits its successor, and placing that.
#include <algorithm>
#include <utility>

#include "daemon/group/directory.h"
#include "daemon/group/rendezvous.h"

namespace expertd::group {

namespace {

session::ErrorDetail refused(base::Reason reason, const std::string& message) {
  session::ErrorDetail error;
  error.status = base::Status(reason, message);
  return error;
}

std::string quoted(const std::string& text) {
  return "\"" + text + "\"";
}

}  // namespace

session::ErrorDetail check_kept(const KeptGroup& group) {
  const size_t ranks = group.placed.ranks.size();
  const size_t nodes = group.placed.nodes.size();
  if (group.name.empty() || group.name.size() > kMaxNameBytes || group.placed.key == 0 || ranks == 0 ||
      ranks > kMaxGroupRanks || ranks != group.config.expert_parallel_size || nodes == 0 || nodes > kMaxNodes) {
    return refused(EXPERTD_REASON_BAD_MESSAGE, "a group " + quoted(group.name) + " of " + std::to_string(ranks) +
                                                   " ranks on " + std::to_string(nodes) + " nodes");
  }
  const bool in_range =
      std::ranges::all_of(group.placed.ranks, [nodes](const PlacedRank& rank) { return rank.node < nodes; }) &&
      std::ranges::all_of(group.gone, [ranks](uint32_t rank) { return rank < ranks; });
  return in_range ? session::ErrorDetail{}
                  : refused(EXPERTD_REASON_BAD_MESSAGE, "a rank of group " + quoted(group.name) + " is out of range");
}

/// Masks of groups on GPUs, and what their kernels know of each other, are those of one formation.
bool Rendezvous::takes_back(const Group& group) {
  return group.config.on_rank_loss == session::OnRankLoss::kMask &&
         std::ranges::none_of(group.placed.ranks, [](const PlacedRank& rank) { return rank.facts.cuda; });
}

const Rendezvous::Group* Rendezvous::successor_of(uint64_t key) const {
  const auto found = std::ranges::find_if(groups_, [key](const auto& entry) {
    return entry.second.placed.predecessor == key && entry.second.phase != Phase::kFailed;
  });
  return found == groups_.end() ? nullptr : &found->second;
}

/// The formed group of the name that takes ranks back and has no successor yet.
const Rendezvous::Group* Rendezvous::running(const std::string& name) const {
  for (const auto& [key, group] : groups_) {
    const bool alive = std::ranges::any_of(group.holders, [](const Holder& holder) { return !holder.gone; });
    if (group.name == name && group.phase == Phase::kFormed && !group.followed && alive && takes_back(group)) {
      return &group;
    }
  }
  return nullptr;
}

Rendezvous::Group* Rendezvous::running(const std::string& name) {
  return const_cast<Group*>(std::as_const(*this).running(name));
}

/// When those that wait have waited long enough for other lost ranks; 0 when nobody else can come.
uint64_t Rendezvous::collected_ns(const Group& group, const Waiting& waiting) const {
  const auto lost =
      static_cast<size_t>(std::ranges::count_if(group.holders, [](const Holder& holder) { return holder.gone; }));
  uint64_t last_ns = 0;
  for (const auto& [rank, waiter] : waiting.ranks) {
    last_ns = std::max(last_ns, waiter.since_ns);
  }
  return waiting.ranks.size() >= lost ? 0 : last_ns + options_.collect_ns;
}

Rendezvous::Group* Rendezvous::adopt(const KeptGroup& kept, session::ErrorDetail* error) {
  if (const auto found = groups_.find(kept.placed.key); found != groups_.end()) {
    return &found->second;
  }
  const bool taken = std::ranges::any_of(groups_, [&kept](const auto& entry) {
    return entry.second.name == kept.name && entry.second.phase != Phase::kFailed &&
           entry.second.placed.epoch >= kept.placed.epoch;
  });
  if (taken || groups_.size() >= options_.max_groups) {
    *error = refused(taken ? EXPERTD_REASON_NO_SUCH_GROUP : EXPERTD_REASON_GROUP_LIMIT,
                     taken ? "another group has the name " + quoted(kept.name) + " meanwhile"
                           : "the rendezvous keeps " + std::to_string(options_.max_groups) + " groups");
    return nullptr;
  }
  Group& group = groups_[kept.placed.key];
  group.name = kept.name;
  group.config = kept.config;
  group.phase = Phase::kFormed;
  group.placed = kept.placed;
  for (const PlacedRank& rank : kept.placed.ranks) {
    group.holders.push_back({kept.placed.nodes[rank.node].id, 0, false});
  }
  if (const auto before = groups_.find(kept.placed.predecessor); before != groups_.end()) {
    before->second.followed = true;
  }
  for (NodeIdentity& node : group.placed.nodes) {
    node.lanes.clear();
    group.reports[node.id].formed = true;
  }
  return &group;
}

CallId Rendezvous::await_successor(const KeptGroup& kept, const NodeIdentity& node, uint64_t now_ns,
                                   PlacedCallback done) {
  session::ErrorDetail error = check_kept(kept);
  if (error.status.is_ok()) {
    error = check_identity(node);
  }
  std::shared_ptr<const Placed> placed;
  Answers answers;
  CallId call = 0;
  if (error.status.is_ok()) {
    const std::lock_guard<std::mutex> lock(mutex_);
    call = next_call_++;
    error = admit_node(node, now_ns, &answers);
    Group* const group = error.status.is_ok() ? adopt(kept, &error) : nullptr;
    for (size_t i = 0; group != nullptr && i < kept.gone.size(); ++i) {
      group->holders[kept.gone[i]].gone = true;
    }
    if (group != nullptr && group->phase == Phase::kFormed) {
      if (const auto earlier = group->awaits.find(node.id); earlier != group->awaits.end()) {
        awaits_.erase(earlier->second.call);
        answers.push_back([ended = std::move(earlier->second.done)] {
          ended(refused(EXPERTD_REASON_CANCELLED, "a later call of the same node took the place of this one"), {});
        });
        group->awaits.erase(earlier);
      }
      const Group* const next = successor_of(kept.placed.key);
      if (next != nullptr && next->phase == Phase::kForming && next->reports.contains(node.id)) {
        placed = placed_for(*next, 0, std::max(next->deadline_ns, now_ns) - now_ns);  // its answer got lost
      } else {
        group->awaits[node.id] = {call, std::move(done)};
        awaits_[call] = {kept.placed.key, node.id};
      }
    } else if (error.status.is_ok()) {
      error = refused(EXPERTD_REASON_NO_SUCH_GROUP, "the group is not formed");
    }
    forget_gone(&answers);
    rejoin(kept.name, now_ns, &answers);
  }
  for (const std::function<void()>& answer : answers) {
    answer();
  }
  if (!error.status.is_ok() || placed != nullptr) {
    done(error, placed);
  }
  return call;
}

/// Why the ranks that wait are not taken back yet; empty when they can be.
std::string Rendezvous::what_is_missing(const Group& group, const Waiting& waiting) const {
  for (const auto& [rank, waiter] : waiting.ranks) {
    if (rank >= group.holders.size() || !group.holders[rank].gone) {
      return "rank " + std::to_string(rank) + " was in it";
    }
    if (const session::ErrorDetail other = compare_configs(group.config, waiter.join.config); !other.status.is_ok()) {
      return "has another configuration: " + other.status.message();
    }
    if (waiter.join.facts.cuda) {
      return "rank " + std::to_string(rank) + " is on a GPU and it on host devices";
    }
  }
  if (successor_of(group.placed.key) != nullptr) {
    return "was taking other ranks back";
  }
  for (uint32_t rank = 0; rank < group.holders.size(); ++rank) {
    const Holder& holder = group.holders[rank];
    if (!holder.gone && !group.awaits.contains(holder.node_id)) {
      return "node " + quoted(group.placed.nodes[group.placed.ranks[rank].node].name) + " with rank " +
             std::to_string(rank) + " had not said that it takes ranks back";
    }
  }
  return {};
}

void Rendezvous::rejoin(const std::string& name, uint64_t now_ns, Answers* answers) {
  const auto waiting = waiting_.find(name);
  Group* const group = waiting == waiting_.end() ? nullptr : running(name);
  if (group != nullptr && groups_.size() < options_.max_groups && collected_ns(*group, waiting->second) <= now_ns &&
      what_is_missing(*group, waiting->second).empty()) {
    place_successor(group, now_ns, answers);
  }
}

// A rank that nobody has is placed where it was, or with the first that is left: some node has to answer for it.
void Rendezvous::place_successor(Group* before, uint64_t now_ns, Answers* answers) {
  const std::string name = before->name;
  Waiting waiting = std::move(waiting_[name]);
  waiting_.erase(name);
  const uint64_t key = new_key();
  Group& group = groups_[key];  // `before` stays where it is: it is a map
  group.name = name;
  group.config = before->config;
  group.deadline_ns = now_ns + options_.form_timeout_ns;
  group.placed.key = key;
  group.placed.predecessor = before->placed.key;
  group.placed.epoch = std::max(waiting.epoch, before->placed.epoch + 1);
  group.placed.form_timeout_ns = options_.form_timeout_ns;
  std::map<uint64_t, uint32_t> indices;
  const auto first = std::ranges::find_if(before->holders, [](const Holder& holder) { return !holder.gone; });
  for (uint32_t rank = 0; rank < before->holders.size(); ++rank) {
    const auto waiter = waiting.ranks.find(rank);
    const Holder& held = before->holders[rank];
    Holder holder =
        held.gone ? Holder{before->awaits.contains(held.node_id) ? held.node_id : first->node_id, 0, true} : held;
    PlacedRank placed = before->placed.ranks[rank];
    if (waiter != waiting.ranks.end()) {
      const RankJoin& join = waiter->second.join;
      holder = {waiter->second.node.id, join.attempt, false};
      placed = {0, join.facts, join.config.copy_kernels, join.config.copies};
      group.placed.returning.push_back(rank);
      calls_.erase(waiter->second.call);
    } else if (held.gone) {
      group.placed.lost.push_back(rank);
    }
    const auto [index, fresh] = indices.emplace(holder.node_id, static_cast<uint32_t>(group.placed.nodes.size()));
    if (fresh) {
      const Node& node = nodes_.at(holder.node_id);
      group.placed.nodes.push_back({holder.node_id, node.name, node.address, node.lanes});
      group.reports[holder.node_id];
    }
    placed.node = index->second;
    group.placed.ranks.push_back(placed);
    group.holders.push_back(holder);
  }
  const std::shared_ptr<const Placed> placed = placed_for(group, 0, options_.form_timeout_ns);
  for (auto& [rank, waiter] : waiting.ranks) {
    answers->push_back([done = std::move(waiter.done), placed] { done({}, placed); });
  }
  for (auto& [node, await] : before->awaits) {
    awaits_.erase(await.call);
    answers->push_back([done = std::move(await.done), placed] { done({}, placed); });
  }
  before->awaits.clear();
}

/// Ranks that are lost to the running group cannot go over; their nodes may not get so far as to report that.
void Rendezvous::fail_successor_without(const Group& group, const std::vector<uint32_t>& ranks, Answers* answers) {
  const auto next = std::ranges::find_if(
      groups_, [&group](const auto& entry) { return entry.second.placed.predecessor == group.placed.key; });
  if (next == groups_.end() || next->second.phase != Phase::kForming) {
    return;
  }
  const Group& successor = next->second;
  const auto lost = std::ranges::find_if(ranks, [&successor](uint32_t rank) {
    const std::vector<uint32_t>& returning = successor.placed.returning;
    return rank < successor.holders.size() && !successor.holders[rank].gone &&
           std::ranges::find(returning, rank) == returning.end();
  });
  if (lost != ranks.end()) {
    session::ErrorDetail error =
        refused(EXPERTD_REASON_PEER_LOST, "rank " + std::to_string(*lost) + " is lost to the running group");
    error.rank = static_cast<int32_t>(*lost);
    fail_group(&next->second, error, answers);
  }
}

}  // namespace expertd::group
