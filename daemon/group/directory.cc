// SPDX-License-Identifier: Apache-2.0
#include "daemon/group/directory.h"

#include <algorithm>

namespace expertd::group {

namespace {

session::ErrorDetail refused(base::Reason reason, const std::string& message, int32_t rank) {
  session::ErrorDetail error;
  error.status = base::Status(reason, message);
  error.rank = rank;
  return error;
}

std::string missing_ranks(const std::map<uint32_t, Member>& members, uint32_t ranks) {
  std::string text;
  for (uint32_t rank = 0; rank < ranks; ++rank) {
    if (members.count(rank) == 0) {
      text += (text.empty() ? "" : ", ") + std::to_string(rank);
    }
  }
  return text;
}

}  // namespace

engine::GroupShape shape_of(const session::GroupConfig& config) {
  engine::GroupShape shape;
  shape.ranks = config.expert_parallel_size;
  shape.experts = config.num_experts;
  shape.hidden = config.hidden;
  shape.top_k = config.top_k;
  shape.max_tokens = config.max_tokens;
  shape.low_latency = config.mode != session::GroupMode::kNormal;
  shape.capture_lanes = config.capture_lanes;
  shape.peer_access = config.communication.use_nvlink;
  return shape;
}

session::ErrorDetail Directory::check_place(const session::JoinRequest& request, const Member& member,
                                            const Pending* pending) {
  const int32_t rank = static_cast<int32_t>(request.rank);
  for (const auto& [id, formed] : formed_) {
    const std::shared_ptr<engine::GroupShared> shared = formed.shared.lock();
    const bool whole = shared != nullptr && shared->lost().empty() && formed.present == shared->local_ranks();
    const bool runs = whole || (&formed == running(request.name) && formed.present.contains(request.rank));
    if (formed.name == request.name && runs && shared->moved_from() == 0) {
      const Placed* placed = formed.placed.get();
      const bool elsewhere = placed != nullptr && request.rank < placed->ranks.size();
      const std::string where =
          elsewhere ? " by node \"" + placed->nodes[placed->ranks[request.rank].node].name + "\"" : "";
      return refused(EXPERTD_REASON_DUPLICATE_RANK,
                     "rank " + std::to_string(request.rank) + " of group \"" + request.name + "\" is taken" + where +
                         (whole ? "; the group is complete" : "; the group is running"),
                     rank);
    }
  }
  if (pending == nullptr) {
    return {};
  }
  for (const auto& [other_rank, other] : pending->members) {
    if (other_rank == request.rank && other.session != member.session) {
      return refused(EXPERTD_REASON_DUPLICATE_RANK,
                     "rank " + std::to_string(request.rank) + " of group \"" + request.name +
                         "\" is taken by session " + std::to_string(other.session.value),
                     rank);
    }
    if (other_rank != request.rank && other.device == member.device) {
      return refused(EXPERTD_REASON_DEVICE_TAKEN,
                     "rank " + std::to_string(other_rank) + " of group \"" + request.name + "\" is already on device " +
                         std::to_string(member.device.value),
                     static_cast<int32_t>(other_rank));
    }
  }
  return {};
}

session::ErrorDetail Directory::join(const session::JoinRequest& request, Member member,
                                     std::unique_ptr<Formation>* formation) {
  session::ErrorDetail error = check_config(request.config, request.rank);
  if (!error.status.is_ok()) {
    return error;
  }
  // Where a rendezvous places the ranks, no node has more of them than devices.
  if (member.attempt == 0 && request.config.expert_parallel_size > base::kMaxLocalRanks) {
    error = refused(EXPERTD_REASON_ARGUMENT_RANGE,
                    "expert_parallel_size = " + std::to_string(request.config.expert_parallel_size) + ", allowed 1.." +
                        std::to_string(base::kMaxLocalRanks) + " on one node; for more set fabric.enabled on several",
                    -1);
    error.field = "expert_parallel_size";
    return error;
  }
  if (request.name.empty() || request.name.size() > 64) {
    return refused(EXPERTD_REASON_ARGUMENT_RANGE,
                   "group name of " + std::to_string(request.name.size()) + " characters, allowed 1..64", -1);
  }
  std::vector<EndedJoin> ended;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    error = place(request, std::move(member), formation, &ended);
  }
  for (const EndedJoin& join : ended) {
    join.member.done(refused(join.status.reason(), join.status.message(), static_cast<int32_t>(join.member.rank)), {});
  }
  return error;
}

void Directory::take_cancelled(std::map<uint32_t, Member>* members, std::vector<EndedJoin>* ended) {
  for (auto member = members->begin(); member != members->end();) {
    if (!member->second.is_cancelled()) {
      ++member;
      continue;
    }
    ended->push_back({std::move(member->second), base::Status(EXPERTD_REASON_CANCELLED, "the join was cancelled")});
    member = members->erase(member);
  }
}

// Under the lock; `ended` are answered without it.
session::ErrorDetail Directory::place(const session::JoinRequest& request, Member&& member,
                                      std::unique_ptr<Formation>* formation, std::vector<EndedJoin>* ended) {
  auto found = pending_.find(request.name);
  if (found != pending_.end()) {
    take_cancelled(&found->second.members, ended);
    if (found->second.members.empty()) {
      pending_.erase(found);
      found = pending_.end();
    }
  }
  Pending* pending = found == pending_.end() ? nullptr : &found->second;
  session::ErrorDetail error;
  if (pending != nullptr) {
    error = compare_configs(pending->config, request.config);
    error.rank = error.status.is_ok() ? -1 : static_cast<int32_t>(request.rank);
    if (!error.status.is_ok()) {
      return error;
    }
  }
  error = check_place(request, member, pending);
  if (!error.status.is_ok()) {
    return error;
  }
  if (pending == nullptr) {
    pending = &pending_[request.name];
    pending->config = request.config;
  }
  member.rank = request.rank;
  member.group = request.name;
  const bool waits_for_placement = member.attempt != 0;
  if (const auto earlier = pending->members.find(request.rank); earlier != pending->members.end()) {
    ended->push_back(
        {std::move(earlier->second),
         base::Status(EXPERTD_REASON_CANCELLED, "a later join of the same rank took the place of this one")});
  }
  pending->members[request.rank] = std::move(member);
  if (!waits_for_placement && pending->members.size() == request.config.expert_parallel_size) {
    Pending complete = std::move(*pending);
    pending_.erase(request.name);
    *formation = form(request.name, std::move(complete));
  }
  return {};
}

void Directory::placed(const std::string& name, uint32_t rank, uint64_t attempt, uint64_t node_id,
                       const std::shared_ptr<const Placed>& placed, std::unique_ptr<Formation>* formation) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = pending_.find(name);
  if (found == pending_.end()) {
    return;
  }
  std::map<uint32_t, Member>& members = found->second.members;
  if (const auto member = members.find(rank); member != members.end() && member->second.attempt == attempt) {
    member->second.placed = placed;
  }
  (void)complete(name, placed, node_id, formation);
}

std::vector<Member> Directory::take(const std::string& name, uint32_t rank, uint64_t attempt) {
  std::vector<Member> taken;
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = pending_.find(name);
  if (found == pending_.end()) {
    return taken;
  }
  const auto member = found->second.members.find(rank);
  if (member != found->second.members.end() && member->second.attempt == attempt) {
    taken.push_back(std::move(member->second));
    found->second.members.erase(member);
  }
  if (found->second.members.empty()) {
    pending_.erase(found);
  }
  return taken;
}

std::vector<std::pair<std::shared_ptr<engine::GroupShared>, std::shared_ptr<const Placed>>> Directory::spanning()
    const {
  std::vector<std::pair<std::shared_ptr<engine::GroupShared>, std::shared_ptr<const Placed>>> groups;
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& [id, formed] : formed_) {
    if (std::shared_ptr<engine::GroupShared> shared = formed.shared.lock();
        shared != nullptr && shared->spans_nodes()) {
      groups.emplace_back(std::move(shared), formed.placed);
    }
  }
  return groups;
}

std::unique_ptr<Formation> Directory::form(const std::string& name, Pending&& pending,
                                           std::shared_ptr<const engine::Placement> placement,
                                           std::shared_ptr<const Placed> placed, const Formed* predecessor) {
  auto formation = std::make_unique<Formation>();
  formation->name = name;
  formation->placed = placed;
  formation->config = pending.config;
  session::GroupConfig& config = formation->config;
  engine::GroupSettings settings;
  settings.shape = shape_of(config);
  settings.shape.id = base::GroupId{next_group_++};
  settings.mask_on_loss = config.on_rank_loss == session::OnRankLoss::kMask;
  settings.op_timeout_ns = config.op_timeout_ns != 0 ? config.op_timeout_ns : defaults_.op_timeout_ns;
  settings.first_op_timeout_ns = config.first_op_timeout_ns != 0 ? config.first_op_timeout_ns
                                 : config.op_timeout_ns != 0     ? config.op_timeout_ns
                                                                 : defaults_.first_op_timeout_ns;
  settings.normal = config.mode != session::GroupMode::kInference;
  settings.inference = config.mode != session::GroupMode::kNormal;
  settings.dispatch_dtypes = config.dispatch_dtypes;
  settings.dynamic_ll_tokens = config.dynamic_ll_tokens;
  if (predecessor != nullptr || (placed != nullptr && placed->predecessor != 0)) {
    settings.epoch_base = (placed != nullptr ? placed->epoch : settings.shape.id.value) << 32;
  }
  if (placed != nullptr) {
    for (const uint32_t rank : placed->lost) {
      settings.born_lost.add(rank);
    }
    for (const uint32_t rank : placed->returning) {
      settings.returning.add(rank);
    }
  } else if (predecessor != nullptr) {
    for (uint32_t rank = 0; rank < settings.shape.ranks; ++rank) {
      const auto member = pending.members.find(rank);
      if (member == pending.members.end()) {
        settings.born_lost.add(rank);
      } else if (member->second.done) {
        settings.returning.add(rank);
      }
    }
  }
  settings.group_key = placed == nullptr ? 0 : placed->key;
  settings.placement = std::move(placement);
  settings.fabric_lanes = config.communication.virtual_lanes;
  settings.fabric_weight = config.communication.bandwidth_ratio;
  for (auto& [rank, member] : pending.members) {
    settings.shape.devices[engine::place_of_rank(settings.placement.get(), rank)] = member.device;
    by_session_[member.session.value].emplace_back(settings.shape.id.value, rank);
    formation->members.push_back(std::move(member));
  }
  formation->shared = std::make_shared<engine::GroupShared>(settings);
  formation->predecessor = predecessor == nullptr ? nullptr : predecessor->shared.lock();
  std::erase_if(formed_, [](const auto& entry) { return entry.second.shared.expired(); });
  formed_[settings.shape.id.value] = {
      name, config, formation->shared, formation->shared->local_ranks() - settings.born_lost, std::move(placed), {}};
  return formation;
}

void Directory::left(base::GroupId group, uint32_t rank) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = formed_.find(group.value);
  if (found == formed_.end()) {
    return;
  }
  found->second.present.remove(rank);
  if (const std::shared_ptr<engine::GroupShared> shared = found->second.shared.lock()) {
    shared->set_lost(rank);
  }
  if (found->second.present.empty()) {
    formed_.erase(found);
  }
  for (auto entry = by_session_.begin(); entry != by_session_.end();) {
    std::erase(entry->second, std::pair<uint64_t, uint32_t>(group.value, rank));
    entry = entry->second.empty() ? by_session_.erase(entry) : std::next(entry);
  }
}

std::vector<Member> Directory::session_ended(base::SessionId session) {
  std::vector<Member> dropped;
  std::vector<std::pair<uint64_t, uint32_t>> memberships;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto entry = pending_.begin(); entry != pending_.end();) {
      std::erase_if(entry->second.members, [&](auto& member) {
        const bool drop = member.second.session == session;
        if (drop) {
          dropped.push_back(std::move(member.second));
        }
        return drop;
      });
      entry = entry->second.members.empty() ? pending_.erase(entry) : std::next(entry);
    }
    if (const auto found = by_session_.find(session.value); found != by_session_.end()) {
      memberships = std::move(found->second);
      by_session_.erase(found);
    }
  }
  for (const auto& [group, rank] : memberships) {
    left(base::GroupId{group}, rank);
  }
  return dropped;
}

std::vector<EndedJoin> Directory::expire(uint64_t now_ns) {
  std::vector<EndedJoin> ended;
  const std::lock_guard<std::mutex> lock(mutex_);
  for (auto entry = pending_.begin(); entry != pending_.end();) {
    std::map<uint32_t, Member>& members = entry->second.members;
    take_cancelled(&members, &ended);
    const std::string missing = missing_ranks(members, entry->second.config.expert_parallel_size);
    for (auto member = members.begin(); member != members.end();) {
      if (member->second.deadline_ns > now_ns) {
        ++member;
        continue;
      }
      ended.push_back({std::move(member->second),
                       base::Status(EXPERTD_REASON_JOIN_TIMEOUT, "group \"" + entry->first + "\": rank(s) " + missing +
                                                                     " had not joined at the deadline")});
      member = members.erase(member);
    }
    entry = members.empty() ? pending_.erase(entry) : std::next(entry);
  }
  return ended;
}

void Directory::describe(base::GroupId group, const std::string& executor) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (const auto found = formed_.find(group.value); found != formed_.end()) {
    found->second.executor = executor;
  }
}

std::vector<session::GroupSnapshot> Directory::snapshot() const {
  std::vector<session::GroupSnapshot> groups;
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& [id, formed] : formed_) {
    const std::shared_ptr<engine::GroupShared> shared = formed.shared.lock();
    if (shared == nullptr) {
      continue;
    }
    groups.push_back({.name = formed.name,
                      .id = base::GroupId{id},
                      .config = formed.config,
                      .epoch = shared->settings().epoch_base + shared->epoch(),
                      .joined = formed.present,
                      .lost = shared->has_views() ? shared->view().lost : shared->lost(),
                      .excluded = shared->excluded(),
                      .ops = shared->launched_ops(),
                      .executor = formed.executor,
                      .rank_nodes = {}});
    for (size_t rank = 0; formed.placed != nullptr && rank < formed.placed->ranks.size(); ++rank) {
      groups.back().rank_nodes.push_back(formed.placed->nodes[formed.placed->ranks[rank].node].name);
    }
  }
  return groups;
}

}  // namespace expertd::group
