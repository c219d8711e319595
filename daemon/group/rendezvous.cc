// SPDX-License-Identifier: Apache-2.0
#include "daemon/group/rendezvous.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "daemon/group/directory.h"

namespace expertd::group {

namespace {

constexpr size_t kMaxReplaced = 256;   // remembered; a daemon whose id was forgotten would take its name back
constexpr size_t kMaxNamedRanks = 16;  // in one message

session::ErrorDetail refused(base::Reason reason, const std::string& message, int32_t rank = -1) {
  session::ErrorDetail error;
  error.status = base::Status(reason, message);
  error.rank = rank;
  return error;
}

std::string quoted(const std::string& text) {
  return "\"" + text + "\"";
}

/// "1, 3, 5", and how many more.
std::string list_ranks(const std::vector<uint32_t>& ranks) {
  std::string text;
  for (size_t i = 0; i < std::min(ranks.size(), kMaxNamedRanks); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(ranks[i]);
  }
  return ranks.size() <= kMaxNamedRanks ? text
                                        : text + " and " + std::to_string(ranks.size() - kMaxNamedRanks) + " more";
}

bool is_name(const std::string& text) {
  return !text.empty() && text.size() <= kMaxNameBytes &&
         std::ranges::all_of(text, [](char c) { return c >= ' ' && c <= '~'; });
}

session::ErrorDetail out_of_range(const char* field, const std::string& value, const std::string& allowed) {
  session::ErrorDetail error =
      refused(EXPERTD_REASON_ARGUMENT_RANGE, std::string(field) + " = " + value + ", allowed " + allowed);
  error.field = field;
  error.value = value;
  error.other_value = allowed;
  return error;
}

}  // namespace

session::ErrorDetail check_identity(const NodeIdentity& node) {
  if (node.id == 0) {
    return out_of_range("node.id", "0", "any other number");
  }
  if (!is_name(node.name)) {
    return out_of_range("node.name", std::to_string(node.name.size()) + " bytes", "1..64 printable ASCII characters");
  }
  if (node.address.size() > kMaxAddressBytes) {
    return out_of_range("node.address", std::to_string(node.address.size()) + " bytes",
                        "0.." + std::to_string(kMaxAddressBytes));
  }
  uint32_t seen = 0;
  size_t bytes = 0;
  for (const LaneAddress& lane : node.lanes) {
    if (lane.lane >= kMaxLanes || (seen >> lane.lane & 1) != 0) {
      return out_of_range("node.lanes.lane", std::to_string(lane.lane), "each of 0..23 once");
    }
    seen |= 1U << lane.lane;
    bytes += lane.bytes.size();
    if (lane.bytes.empty() || lane.bytes.size() > kMaxLaneBytes || bytes > kMaxLanesBytes) {
      return out_of_range("node.lanes.address", std::to_string(lane.bytes.size()) + " bytes",
                          "1..4096, 16384 of all lanes");
    }
  }
  return {};
}

session::ErrorDetail check_join(const RankJoin& join) {
  if (!is_name(join.group)) {
    return out_of_range("group", std::to_string(join.group.size()) + " bytes", "1..64 printable ASCII characters");
  }
  const uint32_t ranks = join.config.expert_parallel_size;
  if (ranks == 0 || ranks > kMaxGroupRanks) {
    return out_of_range("expert_parallel_size", std::to_string(ranks), "1.." + std::to_string(kMaxGroupRanks));
  }
  if (join.rank >= ranks) {
    return out_of_range("rank", std::to_string(join.rank), "0.." + std::to_string(ranks - 1));
  }
  if (join.attempt == 0) {
    return out_of_range("attempt", "0", "any other number");
  }
  if (join.timeout_ns == 0 || join.timeout_ns > kMaxJoinNs) {
    return out_of_range("timeout_ns", std::to_string(join.timeout_ns), "1.." + std::to_string(kMaxJoinNs));
  }
  return {};
}

engine::Placement placement_of(const Placed& placed, uint64_t node_id) {
  engine::Placement out;
  out.ranks_of.resize(placed.nodes.size());
  for (uint32_t node = 0; node < placed.nodes.size(); ++node) {
    out.own_node = placed.nodes[node].id == node_id ? node : out.own_node;
  }
  for (uint32_t rank = 0; rank < placed.ranks.size(); ++rank) {
    const uint32_t node = placed.ranks[rank].node;
    out.node_of.push_back(node);
    out.index_of.push_back(out.ranks_on(node));
    out.ranks_of[node].push_back(rank);
  }
  return out;
}

Rendezvous::Rendezvous(const RendezvousOptions& options, std::function<uint64_t()> random)
    : options_(options), random_(std::move(random)) {}

CallId Rendezvous::join(const RankJoin& join, const NodeIdentity& node, uint64_t now_ns, PlacedCallback done) {
  session::ErrorDetail error = check_join(join);
  if (error.status.is_ok()) {
    error = check_identity(node);
  }
  std::shared_ptr<const Placed> placed;
  Answers answers;
  CallId call = 0;
  if (error.status.is_ok()) {
    const std::lock_guard<std::mutex> lock(mutex_);
    call = next_call_++;
    uint64_t epoch = 1;
    error = admit_node(node, now_ns, &answers);
    if (error.status.is_ok()) {
      const Group* const before = placed_before(join, node);
      placed =
          before == nullptr ? nullptr : placed_for(*before, join.rank, std::max(before->deadline_ns, now_ns) - now_ns);
    }
    if (error.status.is_ok() && placed == nullptr) {
      error = make_room(join, node, &epoch, &answers);
    }
    if (error.status.is_ok() && placed == nullptr) {
      error = check_waiting(join, node, &answers);
    }
    if (error.status.is_ok() && placed == nullptr) {
      Waiting& waiting = waiting_[join.group];
      waiting.epoch = std::max(waiting.epoch, epoch);
      waiting.ranks[join.rank] = {join, node, now_ns + join.timeout_ns, call, std::move(done), now_ns};
      calls_[call] = {join.group, join.rank};
      if (waiting.ranks.size() == join.config.expert_parallel_size) {
        place(join.group, now_ns, &answers);
      } else {
        rejoin(join.group, now_ns, &answers);
      }
    }
  }
  for (const std::function<void()>& answer : answers) {
    answer();
  }
  if (!error.status.is_ok() || placed != nullptr) {
    done(error, placed);
  }
  return call;
}

// A group that this very join was placed in already: its answer got lost on the way.
const Rendezvous::Group* Rendezvous::placed_before(const RankJoin& join, const NodeIdentity& node) const {
  for (const auto& [key, group] : groups_) {
    if (group.name == join.group && group.phase == Phase::kForming && join.rank < group.holders.size() &&
        group.holders[join.rank].node_id == node.id && group.holders[join.rank].attempt == join.attempt) {
      return &group;
    }
  }
  return nullptr;
}

session::ErrorDetail Rendezvous::admit_node(const NodeIdentity& node, uint64_t now_ns, Answers* answers) {
  if (std::ranges::find(replaced_, node.id) != replaced_.end()) {
    return refused(EXPERTD_REASON_NODE_REPLACED, "a daemon that started later has the name " + quoted(node.name) +
                                                     " of this node; give each node its "
                                                     "own fabric.node_name");
  }
  if (const auto found = nodes_.find(node.id); found != nodes_.end()) {
    found->second.seen_ns = std::max(found->second.seen_ns, now_ns);
    found->second.lanes = node.lanes;
    return {};
  }
  const auto same = std::ranges::find_if(nodes_, [&](const auto& entry) { return entry.second.name == node.name; });
  if (same == nodes_.end() && nodes_.size() >= options_.max_nodes) {
    return refused(EXPERTD_REASON_NODE_LIMIT, "node " + quoted(node.name) + " would be one more than the " +
                                                  std::to_string(options_.max_nodes) +
                                                  " nodes of fabric.max_nodes; all of them are there");
  }
  if (same != nodes_.end()) {
    replaced_.push_back(same->first);
    if (replaced_.size() > kMaxReplaced) {
      replaced_.erase(replaced_.begin());
    }
    node_gone(same->first, "was started again", answers);
  }
  nodes_[node.id] = {node.name, node.address, now_ns, node.lanes};
  return {};
}

// Looks at the groups that have or had the name.
session::ErrorDetail Rendezvous::make_room(const RankJoin& join, const NodeIdentity& node, uint64_t* epoch,
                                           Answers* answers) {
  const auto rank = static_cast<int32_t>(join.rank);
  for (auto& [key, group] : groups_) {
    if (group.name != join.group) {
      continue;
    }
    *epoch = std::max(*epoch, group.placed.epoch + 1);
    if (group.phase == Phase::kFailed || group.followed) {
      continue;
    }
    Holder* const holder = join.rank < group.holders.size() ? &group.holders[join.rank] : nullptr;
    if (holder != nullptr && holder->node_id == node.id) {
      // The node knows its own sessions: the earlier holder of the rank is not there any more.
      holder->gone = true;
      if (group.phase == Phase::kForming) {
        fail_group(&group,
                   refused(EXPERTD_REASON_CANCELLED,
                           "rank " + std::to_string(join.rank) + " of node " + quoted(node.name) +
                               " joined anew while the group was being formed",
                           rank),
                   answers);
      }
      continue;
    }
    if (holder != nullptr && group.placed.nodes[group.placed.ranks[join.rank].node].name == node.name) {
      holder->gone = true;  // of an earlier daemon of this node
    }
    const bool whole = std::ranges::none_of(group.holders, [](const Holder& other) { return other.gone; });
    const bool free = holder != nullptr && holder->gone;
    if (takes_back(group) ? !free : group.phase == Phase::kForming || whole) {
      const std::string who = holder == nullptr ? ""
                                                : "rank " + std::to_string(join.rank) + " is on node " +
                                                      quoted(name_of(holder->node_id)) + "; ";
      return refused(EXPERTD_REASON_DUPLICATE_RANK,
                     "group " + quoted(join.group) + ": " + who + (whole ? "the group is complete" : "it is running"),
                     rank);
    }
  }
  forget_gone(answers);
  return {};
}

// Looks at the ranks that wait under the name.
session::ErrorDetail Rendezvous::check_waiting(const RankJoin& join, const NodeIdentity& node, Answers* answers) {
  const auto rank = static_cast<int32_t>(join.rank);
  const auto found = waiting_.find(join.group);
  if (found != waiting_.end()) {
    std::map<uint32_t, Waiter>& ranks = found->second.ranks;
    if (const auto earlier = ranks.find(join.rank); earlier != ranks.end()) {
      if (earlier->second.node.id != node.id) {
        return refused(EXPERTD_REASON_DUPLICATE_RANK,
                       "group " + quoted(join.group) + ": rank " + std::to_string(join.rank) + " is taken by node " +
                           quoted(earlier->second.node.name),
                       rank);
      }
      answers->push_back([done = std::move(earlier->second.done), rank] {
        done(refused(EXPERTD_REASON_CANCELLED, "a later join of the same rank took the place of this one", rank), {});
      });
      calls_.erase(earlier->second.call);
      ranks.erase(earlier);
    }
    if (!ranks.empty()) {
      session::ErrorDetail error = compare_configs(ranks.begin()->second.join.config, join.config);
      if (!error.status.is_ok()) {
        error.rank = rank;
        error.status = error.status.with_context("group " + quoted(join.group) + ", rank " + std::to_string(join.rank) +
                                                 " of node " + quoted(node.name));
        return error;
      }
    } else {
      waiting_.erase(found);
    }
  }
  if (calls_.size() >= options_.max_joins) {
    return refused(EXPERTD_REASON_GROUP_LIMIT, std::to_string(options_.max_joins) + " joins wait at the rendezvous");
  }
  if (groups_.size() >= options_.max_groups) {
    return refused(EXPERTD_REASON_GROUP_LIMIT,
                   "the rendezvous keeps " + std::to_string(options_.max_groups) + " groups; let some leave");
  }
  return {};
}

void Rendezvous::place(const std::string& name, uint64_t now_ns, Answers* answers) {
  Waiting waiting = std::move(waiting_[name]);
  waiting_.erase(name);
  const uint64_t key = new_key();
  Group& group = groups_[key];
  group.name = name;
  group.config = waiting.ranks.begin()->second.join.config;
  group.deadline_ns = now_ns + options_.form_timeout_ns;
  group.placed.key = key;
  group.placed.epoch = waiting.epoch;
  group.placed.form_timeout_ns = options_.form_timeout_ns;
  std::map<uint64_t, uint32_t> indices;
  for (const auto& [rank, waiter] : waiting.ranks) {
    const auto [index, first] = indices.emplace(waiter.node.id, static_cast<uint32_t>(group.placed.nodes.size()));
    if (first) {
      group.placed.nodes.push_back(waiter.node);
      group.reports[waiter.node.id];
    }
    group.placed.ranks.push_back(
        {index->second, waiter.join.facts, waiter.join.config.copy_kernels, waiter.join.config.copies});
    group.holders.push_back({waiter.node.id, waiter.join.attempt, false});
    calls_.erase(waiter.call);
  }
  for (auto& [rank, waiter] : waiting.ranks) {
    answers->push_back([done = std::move(waiter.done), placed = placed_for(group, rank, options_.form_timeout_ns)] {
      done({}, placed);
    });
  }
}

uint64_t Rendezvous::new_key() {
  uint64_t key = random_();
  while (key == 0 || groups_.contains(key)) {
    key = random_() + 1;
  }
  return key;
}

std::shared_ptr<const Placed> Rendezvous::placed_for(const Group& group, uint32_t rank, uint64_t left_ns) {
  auto out = std::make_shared<Placed>();
  const Placed& placed = group.placed;
  out->key = placed.key;
  out->epoch = placed.epoch;
  out->ranks = placed.ranks;
  out->form_timeout_ns = left_ns;
  out->predecessor = placed.predecessor;
  out->returning = placed.returning;
  out->lost = placed.lost;
  const uint32_t node = placed.ranks[rank].node;
  const auto lowest =
      std::ranges::find_if(placed.ranks, [node](const PlacedRank& other) { return other.node == node; });
  const bool with_lanes = placed.predecessor != 0 || lowest - placed.ranks.begin() == rank;
  for (const NodeIdentity& identity : placed.nodes) {
    out->nodes.push_back({identity.id, identity.name, identity.address, {}});
    if (with_lanes) {
      out->nodes.back().lanes = identity.lanes;
    }
  }
  return out;
}

void Rendezvous::dropped(CallId call) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (const auto await = awaits_.find(call); await != awaits_.end()) {
    if (const auto group = groups_.find(await->second.first); group != groups_.end()) {
      group->second.awaits.erase(await->second.second);
    }
    awaits_.erase(await);
    return;
  }
  const auto found = calls_.find(call);
  if (found == calls_.end()) {
    return;
  }
  const auto waiting = waiting_.find(found->second.first);
  waiting->second.ranks.erase(found->second.second);
  if (waiting->second.ranks.empty()) {
    waiting_.erase(waiting);
  }
  calls_.erase(found);
}

void Rendezvous::withdraw(const std::string& group, uint32_t rank, uint64_t node_id, uint64_t attempt) {
  Answers answers;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (const auto waiting = waiting_.find(group); waiting != waiting_.end()) {
      const auto waiter = waiting->second.ranks.find(rank);
      if (waiter != waiting->second.ranks.end() && waiter->second.node.id == node_id &&
          waiter->second.join.attempt == attempt) {
        answers.push_back([done = std::move(waiter->second.done), rank] {
          done(refused(EXPERTD_REASON_CANCELLED, "the join was withdrawn", static_cast<int32_t>(rank)), {});
        });
        calls_.erase(waiter->second.call);
        waiting->second.ranks.erase(waiter);
        if (waiting->second.ranks.empty()) {
          waiting_.erase(waiting);
        }
      }
    }
    for (auto& [key, other] : groups_) {
      if (other.name != group || rank >= other.holders.size() || other.holders[rank].node_id != node_id ||
          other.holders[rank].attempt != attempt) {
        continue;
      }
      other.holders[rank].gone = true;
      if (other.phase == Phase::kForming) {
        fail_group(&other,
                   refused(EXPERTD_REASON_CANCELLED,
                           "rank " + std::to_string(rank) + " of node " + quoted(name_of(node_id)) + " was withdrawn",
                           static_cast<int32_t>(rank)),
                   &answers);
      }
    }
    forget_gone(&answers);
  }
  for (const std::function<void()>& answer : answers) {
    answer();
  }
}

void Rendezvous::report_formed(const FormedReport& report, uint64_t node_id, uint64_t now_ns, FormedCallback done) {
  Answers answers;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (const auto node = nodes_.find(node_id); node != nodes_.end()) {
      node->second.seen_ns = std::max(node->second.seen_ns, now_ns);
    }
    const auto found = groups_.find(report.key);
    const bool known = found != groups_.end() && found->second.reports.contains(node_id);
    if (!known) {
      answers.push_back([done = std::move(done)] {
        done(refused(
            EXPERTD_REASON_NO_SUCH_GROUP,
            "the rendezvous does not know this formation (it was started again, or all ranks left); join anew"));
      });
    } else if (Group& group = found->second; group.phase != Phase::kForming) {
      const session::ErrorDetail failure = group.phase == Phase::kFailed ? group.failure : session::ErrorDetail{};
      answers.push_back([done = std::move(done), failure] { done(failure); });
    } else {
      Report& own = group.reports[node_id];
      if (own.done) {
        answers.push_back([earlier = std::move(own.done)] {
          earlier(refused(EXPERTD_REASON_CANCELLED, "a later report of the same node took the place of this one"));
        });
      }
      own = {report.status.is_ok(), std::move(done)};
      if (!report.status.is_ok()) {
        const std::string rank = report.rank < 0 ? "" : ", rank " + std::to_string(report.rank);
        fail_group(&group,
                   refused(report.status.reason(),
                           "node " + quoted(name_of(node_id)) + rank + ": " + report.status.message(), report.rank),
                   &answers);
      } else if (std::ranges::all_of(group.reports, [](const auto& entry) { return entry.second.formed; })) {
        group.phase = Phase::kFormed;
        for (auto& [id, other] : group.reports) {
          answers.push_back([formed = std::move(other.done)] { formed({}); });
          other.done = nullptr;
        }
        for (NodeIdentity& identity : group.placed.nodes) {
          identity.lanes.clear();  // nobody asks for them any more
        }
        if (const auto before = groups_.find(group.placed.predecessor); before != groups_.end()) {
          before->second.followed = true;
        }
      }
    }
  }
  for (const std::function<void()>& answer : answers) {
    answer();
  }
}

void Rendezvous::report_gone(uint64_t key, uint64_t node_id, const std::vector<uint32_t>& ranks, uint64_t now_ns) {
  Answers answers;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = groups_.find(key);
    if (found == groups_.end() || !found->second.reports.contains(node_id)) {
      return;
    }
    Group& group = found->second;
    for (const uint32_t rank : ranks) {
      if (rank < group.holders.size()) {
        group.holders[rank].gone = true;
      }
    }
    if (group.phase == Phase::kForming && !ranks.empty()) {
      fail_group(&group,
                 refused(EXPERTD_REASON_PEER_LOST,
                         "node " + quoted(name_of(node_id)) + " reports rank(s) " + list_ranks(ranks) + " gone",
                         static_cast<int32_t>(ranks.front())),
                 &answers);
    }
    fail_successor_without(group, ranks, &answers);
    const std::string name = group.name;
    forget_gone(&answers);
    rejoin(name, now_ns, &answers);
  }
  for (const std::function<void()>& answer : answers) {
    answer();
  }
}

}  // namespace expertd::group
