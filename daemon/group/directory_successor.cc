// SPDX-License-Identifier: Apache-2.0
// The directory and ranks that come back to a running group: its successor is formed of them and of those that are
// left, for whom nobody joins.
#include <algorithm>
#include <utility>

#include "daemon/group/directory.h"

namespace expertd::group {

/// The rank goes over without a join of its session; false when it is gone.
bool Directory::add_carried(const Formed& group, uint32_t rank, const std::string& name, Pending* pending) const {
  const std::shared_ptr<engine::GroupShared> shared = group.shared.lock();
  if (shared == nullptr || !group.present.contains(rank)) {
    return false;
  }
  const std::pair<uint64_t, uint32_t> membership(shared->settings().shape.id.value, rank);
  const auto owner = std::ranges::find_if(by_session_, [&membership](const auto& entry) {
    return std::ranges::find(entry.second, membership) != entry.second.end();
  });
  if (owner == by_session_.end()) {
    return false;
  }
  Member member;
  member.group = name;
  member.session = base::SessionId{owner->first};
  member.device = shared->settings().shape.device_of(rank);
  member.rank = rank;
  pending->members[rank] = std::move(member);
  return true;
}

// Under the lock. Every rank of this node is there: it was placed, or goes over, or nobody has it.
session::ErrorDetail Directory::complete(const std::string& name, const std::shared_ptr<const Placed>& placed,
                                         uint64_t node_id, std::unique_ptr<Formation>* formation) {
  auto placement = std::make_shared<const engine::Placement>(placement_of(*placed, node_id));
  const auto has = [](const std::vector<uint32_t>& ranks, uint32_t rank) {
    return std::ranges::find(ranks, rank) != ranks.end();
  };
  const auto found = pending_.find(name);
  const auto before = std::ranges::find_if(formed_, [&placed](const auto& entry) {
    return placed->predecessor != 0 && entry.second.placed != nullptr &&
           entry.second.placed->key == placed->predecessor;
  });
  const Formed* const predecessor = before == formed_.end() ? nullptr : &before->second;
  Pending taken;
  std::shared_ptr<const Placed> whole;  // the addresses of the nodes come with the placement of the lowest rank
  std::vector<uint32_t> joined;
  for (const uint32_t local : placement->ranks_of[placement->own_node]) {
    if (has(placed->lost, local)) {
      continue;
    }
    if (placed->predecessor != 0 && !has(placed->returning, local)) {
      const auto told = successors_.find(placed->predecessor);
      if (told == successors_.end() || told->second->key != placed->key) {
        return {};
      }
      if (predecessor == nullptr || !add_carried(*predecessor, local, name, &taken)) {
        session::ErrorDetail error;
        error.rank = static_cast<int32_t>(local);
        error.status = base::Status(EXPERTD_REASON_PEER_LOST,
                                    "rank " + std::to_string(local) + " left before the group could take others back");
        return error;
      }
      taken.config = predecessor->config;
      continue;
    }
    if (found == pending_.end()) {
      return {};
    }
    const auto member = found->second.members.find(local);
    if (member == found->second.members.end() || member->second.placed == nullptr ||
        member->second.placed->key != placed->key) {
      return {};
    }
    whole = whole == nullptr ? member->second.placed : whole;
    taken.config = found->second.config;
    joined.push_back(local);
  }
  for (const uint32_t local : joined) {
    taken.members.insert(found->second.members.extract(local));
  }
  if (found != pending_.end() && found->second.members.empty()) {
    pending_.erase(found);
  }
  successors_.erase(placed->predecessor);
  const bool alone = placement->nodes() == 1;
  *formation = form(name, std::move(taken), alone ? nullptr : std::move(placement),
                    placed->predecessor != 0 ? placed : std::move(whole), predecessor);
  return {};
}

session::ErrorDetail Directory::succeed(const std::shared_ptr<const Placed>& placed, uint64_t node_id,
                                        std::unique_ptr<Formation>* formation) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = std::ranges::find_if(formed_, [&placed](const auto& entry) {
    return entry.second.placed != nullptr && entry.second.placed->key == placed->predecessor;
  });
  if (found == formed_.end()) {
    session::ErrorDetail error;
    error.status = base::Status(EXPERTD_REASON_PEER_LOST, "all ranks of this node have left the group");
    return error;
  }
  successors_[placed->predecessor] = placed;
  const std::string name = found->second.name;
  return complete(name, placed, node_id, formation);
}

const Directory::Formed* Directory::running(const std::string& name) const {
  for (auto entry = formed_.rbegin(); entry != formed_.rend(); ++entry) {
    const Formed& formed = entry->second;
    const std::shared_ptr<engine::GroupShared> shared = formed.shared.lock();
    if (formed.name == name && shared != nullptr && formed.present.any()) {
      const bool here_alone = formed.placed == nullptr && formed.executor == "host";
      return here_alone && shared->settings().mask_on_loss ? &formed : nullptr;
    }
  }
  return nullptr;
}

// Under the lock.
bool Directory::may_rejoin(const Formed& group, const Pending& pending) const {
  const std::shared_ptr<engine::GroupShared> shared = group.shared.lock();
  if (shared == nullptr || !compare_configs(group.config, pending.config).status.is_ok()) {
    return false;
  }
  return std::ranges::all_of(pending.members, [&](const auto& entry) {
    const Member& member = entry.second;
    bool device_free = true;
    for (uint32_t rank = 0; rank < shared->ranks(); ++rank) {
      device_free =
          device_free && (!group.present.contains(rank) || shared->settings().shape.device_of(rank) != member.device);
    }
    return member.attempt == 0 && !member.is_cancelled() && !group.present.contains(entry.first) && device_free;
  });
}

std::vector<std::unique_ptr<Formation>> Directory::rejoins() {
  std::vector<std::unique_ptr<Formation>> formations;
  const std::lock_guard<std::mutex> lock(mutex_);
  for (auto entry = pending_.begin(); entry != pending_.end();) {
    const Formed* const group = running(entry->first);
    if (group == nullptr || !may_rejoin(*group, entry->second)) {
      ++entry;
      continue;
    }
    Pending taken = std::move(entry->second);
    const std::string name = entry->first;
    entry = pending_.erase(entry);
    for (uint32_t rank = 0; rank < taken.config.expert_parallel_size; ++rank) {
      (void)add_carried(*group, rank, name, &taken);
    }
    formations.push_back(form(name, std::move(taken), nullptr, nullptr, group));
  }
  return formations;
}

}  // namespace expertd::group
