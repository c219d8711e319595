// SPDX-License-Identifier: Apache-2.0
// The rendezvous and time: who is there, who is late, who is gone.
#include <algorithm>
#include <limits>
#include <utility>

#include "daemon/group/rendezvous.h"

namespace expertd::group {

namespace {

constexpr size_t kMaxNamedRanks = 16;  // in one message

session::ErrorDetail ended(base::Reason reason, const std::string& message, int32_t rank) {
  session::ErrorDetail error;
  error.status = base::Status(reason, message);
  error.rank = rank;
  return error;
}

std::string quoted(const std::string& text) {
  return "\"" + text + "\"";
}

}  // namespace

session::ErrorDetail Rendezvous::seen(const NodeIdentity& node, uint64_t now_ns) {
  session::ErrorDetail error = check_identity(node);
  Answers answers;
  if (error.status.is_ok()) {
    const std::lock_guard<std::mutex> lock(mutex_);
    error = admit_node(node, now_ns, &answers);
  }
  for (const std::function<void()>& answer : answers) {
    answer();
  }
  return error;
}

std::string Rendezvous::name_of(uint64_t node_id) const {
  const auto found = nodes_.find(node_id);
  return found == nodes_.end() ? "that is gone" : found->second.name;
}

void Rendezvous::fail_group(Group* group, const session::ErrorDetail& failure, Answers* answers) {
  group->phase = Phase::kFailed;
  group->failure = failure;
  group->failure.status = failure.status.with_context("forming group " + quoted(group->name));
  for (auto& [id, report] : group->reports) {
    if (report.done) {
      answers->push_back([done = std::move(report.done), error = group->failure] { done(error); });
      report.done = nullptr;
    }
  }
}

void Rendezvous::node_gone(uint64_t node_id, const std::string& why, Answers* answers) {
  const std::string who = "node " + quoted(name_of(node_id)) + " " + why;
  for (auto entry = waiting_.begin(); entry != waiting_.end();) {
    std::erase_if(entry->second.ranks, [&](const auto& place) {
      const Waiter& waiter = place.second;
      if (waiter.node.id != node_id) {
        return false;
      }
      calls_.erase(waiter.call);
      answers->push_back([done = waiter.done, who, rank = place.first] {
        done(ended(EXPERTD_REASON_PEER_LOST, who, static_cast<int32_t>(rank)), {});
      });
      return true;
    });
    entry = entry->second.ranks.empty() ? waiting_.erase(entry) : std::next(entry);
  }
  for (auto& [key, group] : groups_) {
    if (!group.reports.contains(node_id) || group.phase == Phase::kFailed) {
      continue;
    }
    int32_t lowest = -1;
    for (uint32_t rank = 0; rank < group.holders.size(); ++rank) {
      if (group.holders[rank].node_id == node_id) {
        group.holders[rank].gone = true;
        lowest = lowest < 0 ? static_cast<int32_t>(rank) : lowest;
      }
    }
    if (group.phase == Phase::kForming) {
      fail_group(&group, ended(EXPERTD_REASON_PEER_LOST, who, lowest), answers);
    }
  }
  for (auto& [key, group] : groups_) {
    if (const auto await = group.awaits.find(node_id); await != group.awaits.end()) {
      answers->push_back(
          [done = std::move(await->second.done), who] { done(ended(EXPERTD_REASON_PEER_LOST, who, -1), {}); });
      awaits_.erase(await->second.call);
      group.awaits.erase(await);
    }
  }
  nodes_.erase(node_id);
  forget_gone(answers);
}

// Who awaits a successor of a group that nobody is in, or in which it has no rank, awaits nothing.
void Rendezvous::forget_gone(Answers* answers) {
  for (auto entry = groups_.begin(); entry != groups_.end();) {
    Group& group = entry->second;
    std::erase_if(group.awaits, [&](auto& await) {
      const bool there = std::ranges::any_of(
          group.holders, [&await](const Holder& holder) { return holder.node_id == await.first && !holder.gone; });
      if (!there) {
        awaits_.erase(await.second.call);
        answers->push_back([done = std::move(await.second.done)] {
          done(ended(EXPERTD_REASON_NO_SUCH_GROUP, "all ranks of this node have left the group", -1), {});
        });
      }
      return !there;
    });
    const bool over = group.phase == Phase::kFormed &&
                      std::ranges::all_of(group.holders, [](const Holder& holder) { return holder.gone; });
    if (const auto before = groups_.find(group.placed.predecessor); over && before != groups_.end()) {
      before->second.followed = false;  // it was let go: the group that runs is that one
    }
    entry = over ? groups_.erase(entry) : std::next(entry);
  }
}

void Rendezvous::expire_waiting(const std::string& name, Waiting* waiting, uint64_t now_ns, Answers* answers) {
  const uint32_t ranks = waiting->ranks.begin()->second.join.config.expert_parallel_size;
  std::string missing;
  int32_t first = -1;
  size_t count = 0;
  for (uint32_t rank = 0; rank < ranks; ++rank) {
    if (waiting->ranks.contains(rank)) {
      continue;
    }
    first = first < 0 ? static_cast<int32_t>(rank) : first;
    if (count++ < kMaxNamedRanks) {
      missing += (missing.empty() ? "" : ", ") + std::to_string(rank);
    }
  }
  missing += count > kMaxNamedRanks ? " and " + std::to_string(count - kMaxNamedRanks) + " more" : "";
  const Group* const group = running(name);
  const std::string cause = group == nullptr
                                ? "rank(s) " + missing + " had not joined at the deadline"
                                : "it runs without this rank, and at the deadline " + what_is_missing(*group, *waiting);
  std::erase_if(waiting->ranks, [&](const auto& place) {
    const Waiter& waiter = place.second;
    if (waiter.deadline_ns > now_ns) {
      return false;
    }
    calls_.erase(waiter.call);
    answers->push_back([done = waiter.done, name, cause, first] {
      done(ended(EXPERTD_REASON_JOIN_TIMEOUT, "group " + quoted(name) + ": " + cause, first), {});
    });
    return true;
  });
}

void Rendezvous::expire(uint64_t now_ns) {
  Answers answers;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto entry = waiting_.begin(); entry != waiting_.end();) {
      expire_waiting(entry->first, &entry->second, now_ns, &answers);
      entry = entry->second.ranks.empty() ? waiting_.erase(entry) : std::next(entry);
    }
    std::vector<std::string> names;
    for (const auto& [name, waiting] : waiting_) {
      names.push_back(name);
    }
    for (const std::string& name : names) {
      rejoin(name, now_ns, &answers);
    }
    std::erase_if(groups_, [now_ns](const auto& entry) {
      return entry.second.phase == Phase::kFailed && entry.second.deadline_ns <= now_ns;
    });
    for (auto& [key, group] : groups_) {
      if (group.phase != Phase::kForming || group.deadline_ns > now_ns) {
        continue;
      }
      const auto late = std::ranges::find_if(
          group.placed.nodes, [&group = group](const NodeIdentity& node) { return !group.reports.at(node.id).formed; });
      const auto index = static_cast<uint32_t>(late - group.placed.nodes.begin());
      const auto rank =
          std::ranges::find_if(group.placed.ranks, [index](const PlacedRank& placed) { return placed.node == index; });
      fail_group(
          &group,
          ended(EXPERTD_REASON_JOIN_TIMEOUT, "node " + quoted(late->name) + " had not formed its part at the deadline",
                static_cast<int32_t>(rank - group.placed.ranks.begin())),
          &answers);
      group.deadline_ns = now_ns + options_.form_timeout_ns;  // late reports are told
    }
    std::vector<uint64_t> unseen;
    for (const auto& [id, node] : nodes_) {
      if (node.seen_ns + options_.node_timeout_ns <= now_ns) {
        unseen.push_back(id);
      }
    }
    for (const uint64_t id : unseen) {
      node_gone(id, "was not seen any more", &answers);
    }
  }
  for (const std::function<void()>& answer : answers) {
    answer();
  }
}

uint64_t Rendezvous::next_deadline_ns() const {
  uint64_t next = std::numeric_limits<uint64_t>::max();
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& [name, waiting] : waiting_) {
    for (const auto& [rank, waiter] : waiting.ranks) {
      next = std::min(next, waiter.deadline_ns);
    }
    const Group* const group = running(name);
    if (group != nullptr && groups_.size() < options_.max_groups && what_is_missing(*group, waiting).empty()) {
      next = std::min(next, collected_ns(*group, waiting));
    }
  }
  for (const auto& [key, group] : groups_) {
    next = group.phase == Phase::kFormed ? next : std::min(next, group.deadline_ns);
  }
  for (const auto& [id, node] : nodes_) {
    next = std::min(next, node.seen_ns + options_.node_timeout_ns);
  }
  return next;
}

void Rendezvous::close(const base::Status& status) {
  Answers answers;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& [name, waiting] : waiting_) {
      for (auto& [rank, waiter] : waiting.ranks) {
        answers.push_back([done = std::move(waiter.done), status, rank = rank] {
          done(ended(status.reason(), status.message(), static_cast<int32_t>(rank)), {});
        });
      }
    }
    for (auto& [key, group] : groups_) {
      for (auto& [id, report] : group.reports) {
        if (report.done) {
          answers.push_back(
              [done = std::move(report.done), status] { done(ended(status.reason(), status.message(), -1)); });
        }
      }
      for (auto& [id, await] : group.awaits) {
        answers.push_back(
            [done = std::move(await.done), status] { done(ended(status.reason(), status.message(), -1), {}); });
      }
    }
    waiting_.clear();
    calls_.clear();
    awaits_.clear();
    groups_.clear();
    nodes_.clear();
    replaced_.clear();
  }
  for (const std::function<void()>& answer : answers) {
    answer();
  }
}

std::vector<Rendezvous::NodeSnapshot> Rendezvous::nodes() const {
  std::vector<NodeSnapshot> out;
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& [id, node] : nodes_) {
    out.push_back({node.name, node.address, id, node.seen_ns});
  }
  return out;
}

}  // namespace expertd::group
