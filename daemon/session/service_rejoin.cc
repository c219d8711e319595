// SPDX-License-Identifier: Apache-2.0
// Ranks that come back to a running group: its successor is formed beside it, for the ranks that are left without a
// call of their clients, and takes its place where all nodes hold at the same operation. All of it on the housekeeper,
// but for what the rendezvous answers and who goes.
#include <algorithm>

#include "daemon/base/clock.h"
#include "daemon/base/log.h"
#include "daemon/session/service.h"
#include "daemon/session/session.h"

namespace expertd::session {

namespace {

constexpr uint64_t kAwaitAgainNs = 500'000'000;  // after a call that ended without an answer
constexpr uint64_t kApartNs = 1'000'000'000;     // the losses of a group and its successor are told one after the other

group::KeptGroup kept_group(const group::Formation& formation, const GroupConfig& config) {
  group::KeptGroup kept{formation.name, config, *formation.placed, formation.placed->lost};
  for (group::NodeIdentity& node : kept.placed.nodes) {
    node.lanes.clear();  // each node says its own
  }
  return kept;
}

}  // namespace

std::vector<SessionService::Leaving> SessionService::parts_of(Session& session, base::GroupId named) {
  std::vector<Leaving> parts;
  const std::lock_guard<std::mutex> lock(session.mutex);
  for (const auto& [id, membership] : session.memberships) {
    if (membership.named == named) {
      parts.push_back({base::GroupId{id}, membership.group, membership.rank});
    }
  }
  return parts;
}

void SessionService::begin_leaving(const Leaving& part) {
  directory_.left(part.id, part.rank);
  part.group->set_lost(part.rank);
  tell_gone(*part.group, part.rank);
  wake_group(*part.group);
}

base::Status SessionService::add_coming(Session& session, const group::Formation& formation, uint32_t rank) {
  const std::lock_guard<std::mutex> lock(session.mutex);
  const auto before = session.memberships.find(formation.predecessor->settings().shape.id.value);
  if (before == session.memberships.end() || session.ended) {
    return base::Status(EXPERTD_REASON_PEER_LOST,
                        "rank " + std::to_string(rank) + " left before the group could take others back");
  }
  session.memberships[formation.shared->settings().shape.id.value] = {
      formation.shared, rank, 0, false, before->second.named, Session::Part::kComing};
  return base::Status::ok();
}

// No operation was ever posted to it.
void SessionService::drop_coming(base::SessionId id, base::GroupId group) {
  const base::Result<SessionRef> found = find(id);
  if (!found.is_ok()) {
    return;  // its reclaim gives the tables back
  }
  Session& session = *found.value();
  Leaving part{group, nullptr, 0};
  {
    const std::lock_guard<std::mutex> lock(session.mutex);
    const auto entry = session.memberships.find(group.value);
    if (entry == session.memberships.end() || entry->second.part != Session::Part::kComing || session.ended) {
      return;
    }
    part.group = entry->second.group;
    part.rank = entry->second.rank;
    session.memberships.erase(entry);
  }
  begin_leaving(part);
  session.place.device->destroy_group(group, base::Rank{part.rank});
  forget(*part.group, part.rank);
}

/// A rank that comes back, to a group whose others went meanwhile, waits on: for them to join as well, or to be lost.
bool SessionService::join_again(const group::Formation& formation, const group::Member& member,
                                const ErrorDetail& error) {
  const base::Reason reason = error.status.reason();
  const bool others = reason == EXPERTD_REASON_PEER_LOST || reason == EXPERTD_REASON_CANCELLED ||
                      reason == EXPERTD_REASON_NO_SUCH_GROUP;
  const base::Result<SessionRef> found = find(member.session);
  const uint64_t now_ns = base::now_ns();
  if (formation.placed == nullptr || formation.placed->predecessor == 0 || !others || !found.is_ok() ||
      member.is_cancelled() || member.deadline_ns <= now_ns + kAwaitAgainNs) {
    return false;
  }
  {
    const std::lock_guard<std::mutex> lock(found.value()->mutex);
    if (found.value()->ended) {
      return false;
    }
    found.value()->joins.insert(member.ticket);
  }
  base::log_info("a rank that comes back joins again",
                 {{"group", formation.name}, {"rank", std::to_string(member.rank)}, {"cause", error.status.message()}});
  const JoinRequest request{formation.name, member.rank, formation.config, member.deadline_ns - now_ns,
                            member.cancelled};
  group::Member again = member;
  again.placed = nullptr;
  again.attempt = random_attempt();
  *again.attempt_now = again.attempt;
  const uint64_t attempt = again.attempt;
  std::unique_ptr<group::Formation> unused;
  const ErrorDetail refused = directory_.join(request, std::move(again), &unused);
  if (!refused.status.is_ok()) {
    member.done(refused, {});
    return true;
  }
  ask_rendezvous(request, attempt, found.value()->place.device->info());
  return true;
}

// The members were answered.
void SessionService::after_formation(const group::Formation& formation, const ErrorDetail& error) {
  GoingOver going{formation.name, formation.predecessor, formation.shared, {}, false, 0};
  for (const group::Member& member : formation.members) {
    if (member.done == nullptr) {
      going.ranks.emplace_back(member.session, member.rank);
    }
  }
  if (!error.status.is_ok()) {
    for (const auto& [session, rank] : going.ranks) {
      drop_coming(session, formation.shared->settings().shape.id);
    }
    if (formation.placed != nullptr && formation.placed->predecessor != 0) {
      base::log_warn("a group does not take ranks back",
                     {{"group", formation.name}, {"cause", error.status.message()}});
      await_later(formation.placed->predecessor);
    }
    return;
  }
  if (formation.predecessor == nullptr) {
    keep(formation);
    return;
  }
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    going_over_.push_back(std::move(going));
    housekeeper_signal_.notify_all();
  }
  keep(formation);  // others may come back before these are in: a successor may have one
}

// Groups that mask losses on host devices take lost ranks back.
void SessionService::keep(const group::Formation& formation) {
  const bool on_gpus = devices_[formation.members.front().device.value].device->info().is_cuda;
  if (formation.placed == nullptr || on_gpus || !formation.shared->settings().mask_on_loss) {
    return;
  }
  const uint64_t key = formation.placed->key;
  {
    const std::lock_guard<std::mutex> lock(kept_mutex_);
    Kept& kept = kept_[key];
    kept.group = kept_group(formation, with_defaults(formation.config));
    kept.local_ranks = formation.shared->local_ranks();
  }
  await_successor(key);
}

void SessionService::await_successor(uint64_t key) {
  group::KeptGroup group;
  {
    const std::lock_guard<std::mutex> lock(kept_mutex_);
    const auto found = kept_.find(key);
    if (found == kept_.end()) {
      return;
    }
    found->second.again_ns = 0;
    group = found->second.group;
  }
  rendezvous_->await_successor(
      group, [this, key](const ErrorDetail& error, const std::shared_ptr<const group::Placed>& placed) {
        successor_answered(key, error, placed);
      });
}

// A thread of the rendezvous client's.
void SessionService::successor_answered(uint64_t key, const ErrorDetail& error,
                                        const std::shared_ptr<const group::Placed>& placed) {
  if (placed != nullptr) {
    {
      const std::lock_guard<std::mutex> lock(kept_mutex_);
      const auto found = kept_.find(key);
      if (found == kept_.end() || std::exchange(found->second.successor, placed->key) == placed->key) {
        found->second.again_ns = base::now_ns() + kAwaitAgainNs;  // told before: it may fail without this node's part
        return;
      }
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!housekeeper_ended_) {
      placements_.push_back({{}, 0, 0, placed});
      housekeeper_signal_.notify_all();
    }
    return;
  }
  const base::Reason reason = error.status.reason();
  if (reason != EXPERTD_REASON_CANCELLED && reason != EXPERTD_REASON_NO_SUCH_GROUP &&
      reason != EXPERTD_REASON_UNSUPPORTED) {
    await_later(key);
  }
}

void SessionService::await_later(uint64_t key) {
  const std::lock_guard<std::mutex> lock(kept_mutex_);
  if (const auto found = kept_.find(key); found != kept_.end()) {
    found->second.again_ns = base::now_ns() + kAwaitAgainNs;
  }
}

void SessionService::place_successor(const std::shared_ptr<const group::Placed>& placed) {
  std::unique_ptr<group::Formation> formation;
  const ErrorDetail error = directory_.succeed(placed, fabric_->node_id(), &formation);
  if (!error.status.is_ok()) {
    group::FormedReport report{placed->key, error.status, error.rank};
    rendezvous_->report_formed(report, [this, key = placed->predecessor](const ErrorDetail&) { await_later(key); });
  } else if (formation != nullptr) {
    form_group(std::move(formation));
  } else {
    await_later(placed->predecessor);  // a rank that comes back here is still to be placed, and may not be
  }
}

// A rendezvous that begins later learns of the group what is said here, so it is said anew.
void SessionService::note_gone(uint64_t key, const std::vector<uint32_t>& ranks) {
  {
    const std::lock_guard<std::mutex> lock(kept_mutex_);
    const auto found = kept_.find(key);
    if (found == kept_.end()) {
      return;
    }
    Kept& kept = found->second;
    const size_t before = kept.group.gone.size();
    base::RankSet gone;
    for (const uint32_t rank : ranks) {
      if (std::find(kept.group.gone.begin(), kept.group.gone.end(), rank) == kept.group.gone.end()) {
        kept.group.gone.push_back(rank);
      }
    }
    for (const uint32_t rank : kept.group.gone) {
      gone.add(rank);
    }
    if ((kept.local_ranks - gone).empty()) {
      kept_.erase(found);  // the rendezvous ends the call when it hears that
      return;
    }
    if (kept.group.gone.size() == before) {
      return;
    }
  }
  await_successor(key);
}

/// False when there is nothing to look at soon.
bool SessionService::tend_rejoins(uint64_t now_ns) {
  for (std::unique_ptr<group::Formation>& formation : directory_.rejoins()) {
    form_group(std::move(formation));
  }
  await_again(now_ns);
  std::vector<GoingOver> going;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    going.swap(going_over_);
  }
  for (GoingOver& one : going) {
    const bool chained =
        std::any_of(going.begin(), going.end(), [&one](const GoingOver& next) { return next.from == one.to; });
    if (!one.begun && chained && (one.to->settings().returning - one.to->lost()).empty()) {
      begin_going_over(&one);  // who came back is gone again, but others have followed
    }
  }
  std::erase_if(going, [this, now_ns](GoingOver& one) { return tend_going_over(&one, now_ns); });
  const std::lock_guard<std::mutex> lock(mutex_);
  going_over_.insert(going_over_.end(), std::make_move_iterator(going.begin()), std::make_move_iterator(going.end()));
  return !going_over_.empty();
}

void SessionService::await_again(uint64_t now_ns) {
  std::vector<uint64_t> keys;
  {
    const std::lock_guard<std::mutex> lock(kept_mutex_);
    for (const auto& [key, kept] : kept_) {
      if (kept.again_ns != 0 && kept.again_ns <= now_ns) {
        keys.push_back(key);
      }
    }
  }
  for (const uint64_t key : keys) {
    await_successor(key);
  }
}

bool SessionService::have_returned(const engine::GroupShared& group) {
  if (group.has_views()) {
    return views_.have_returned(group);
  }
  for (const uint32_t rank : group.settings().returning - group.lost()) {
    if (!group.has_submitted(rank)) {
      return false;
    }
  }
  return true;
}

/// False when that cannot be decided yet, or was decided otherwise.
bool SessionService::stay(const GoingOver& going, const std::string& cause) {
  if (going.from->has_views() && !going.from->has_ended() && !views_.stays(going.from->settings().group_key)) {
    return false;
  }
  going.from->stay();
  wake_group(*going.from);
  for (const auto& [session, rank] : going.ranks) {
    drop_coming(session, going.to->settings().shape.id);
  }
  base::log_warn("a group does not take ranks back", {{"group", going.name}, {"cause", cause}});
  await_later(going.from->settings().group_key);
  return true;
}

void SessionService::begin_going_over(GoingOver* going) {
  going->begun = true;
  going->from->go_over_to(going->to);
  views_.goes_over(going->from->settings().group_key);
  wake_group(*going->from);
}

/// True when it is over, one way or the other.
bool SessionService::tend_going_over(GoingOver* going, uint64_t now_ns) {
  const uint64_t key = going->from->settings().group_key;
  const bool nobody = (going->to->settings().returning - going->to->lost()).empty();
  if (!going->begun && nobody) {
    return stay(*going, "the ranks that came back are gone again");
  }
  if (!going->begun && have_returned(*going->to)) {
    begin_going_over(going);  // the others do not wait for one that still prepares what it will do
  }
  if (going->from->moved_from() == 0) {
    const bool apart = (going->to->lost() - going->from->lost()).any();
    going->apart_since_ns = apart ? (going->apart_since_ns == 0 ? now_ns : going->apart_since_ns) : 0;
    const bool left = going->from->has_ended() || (going->from->local_ranks() - going->from->lost()).empty();
    if (left || (apart && now_ns - going->apart_since_ns >= kApartNs)) {
      return stay(*going, left ? "its ranks of this node have left" : "a node has let the successor go");
    }
    return false;
  }
  std::erase_if(going->ranks, [&](const auto& rank) { return finish_going_over(*going, rank.first, rank.second); });
  if (!going->ranks.empty()) {
    return false;
  }
  const std::lock_guard<std::mutex> lock(kept_mutex_);
  kept_.erase(key);
  return true;
}

/// The rank's operations in the group that was have ended: it leaves that one, and only its successor is left.
bool SessionService::finish_going_over(const GoingOver& going, base::SessionId id, uint32_t rank) {
  const base::Result<SessionRef> found = find(id);
  if (!found.is_ok()) {
    return true;  // its reclaim sees to both
  }
  if (!going.from->has_gone_over(rank) || !going.from->quiet(rank)) {
    return going.from->is_lost(rank);  // who leaves, leaves both
  }
  Session& session = *found.value();
  const Leaving part{going.from->settings().shape.id, going.from, rank};
  {
    const std::lock_guard<std::mutex> lock(session.mutex);
    const auto before = session.memberships.find(part.id.value);
    const auto after = session.memberships.find(going.to->settings().shape.id.value);
    if (before == session.memberships.end() || after == session.memberships.end() || session.ended) {
      return true;
    }
    if (before->second.part != Session::Part::kNow) {
      return false;  // the one before that has operations yet
    }
    after->second.window_buffer = before->second.window_buffer;
    after->second.formed = true;
    after->second.part = Session::Part::kNow;
    session.memberships.erase(before);
  }
  begin_leaving(part);
  session.place.device->destroy_group(part.id, base::Rank{rank});
  forget(*part.group, rank);
  return true;
}

}  // namespace expertd::session
