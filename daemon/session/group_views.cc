// SPDX-License-Identifier: Apache-2.0
#include "daemon/session/group_views.h"

#include <algorithm>
#include <chrono>
#include <string>
#include <vector>

#include "daemon/base/clock.h"
#include "daemon/base/log.h"

namespace expertd::session {

namespace {

constexpr std::chrono::milliseconds kLook(5);
constexpr uint64_t kTellReturnedNs = 20'000'000;  // ranks that came back are told of so often, until they are in
constexpr uint64_t kGoesOverNs = 500'000;         // one that is to go over, so often
constexpr uint64_t kMovedNs = 10'000'000'000;  // one that went over answers nodes that have not heard so, for so long
constexpr uint64_t kReleaseNs = 50'000'000;    // a group whose ranks have left is looked at so often

std::string ranks_text(const base::RankSet& ranks) {
  std::string text;
  for (const uint32_t rank : ranks) {
    text += (text.empty() ? "" : ",") + std::to_string(rank);
  }
  return text.empty() ? "none" : text;
}

}  // namespace

/// One group here. What it has to send is sent when the state machine is through with what made it send.
class GroupViews::Member final : public engine::ViewHost {
 public:
  Member(std::shared_ptr<engine::GroupShared> group, std::vector<uint64_t> node_ids, const engine::ViewOptions& options,
         const Wake* wake)
      : group_(std::move(group)),
        node_ids_(std::move(node_ids)),
        change_(*group_->settings().placement, options, this, group_->settings().born_lost),
        wake_(wake) {}

  engine::GroupShared& group() { return *group_; }
  engine::ViewChange& change() { return change_; }
  const engine::ViewChange& change() const { return change_; }
  const engine::GroupShared& group() const { return *group_; }
  const std::vector<uint64_t>& node_ids() const { return node_ids_; }
  bool is_used() const { return group_.use_count() > 1; }

  uint64_t hold() override { return group_->hold(); }
  void install(const engine::View& view, bool held) override {
    if (change_.has_moved()) {
      moved_ns_ = base::now_ns();
      if (group_->successor() == nullptr) {
        return;  // no rank of this node is left
      }
      group_->move_over(view.from);
      base::log_info("a group goes on with ranks that came back",
                     {{"group", std::to_string(group_->settings().shape.id.value)},
                      {"successor", std::to_string(group_->successor()->settings().shape.id.value)},
                      {"last_operation", std::to_string(view.from - 1)}});
      (*wake_)(*group_);
      return;
    }
    group_->install(view, held);
    base::log_info("a group's view", {{"group", std::to_string(group_->settings().shape.id.value)},
                                      {"epoch", std::to_string(view.epoch)},
                                      {"from_operation", std::to_string(view.from)},
                                      {"lost", ranks_text(view.lost)},
                                      {"excluded", ranks_text(view.excluded)}});
    (*wake_)(*group_);
  }
  void end(engine::ViewEnd end) override {
    group_->end_views();
    base::log_error(
        "this node's part of a group ends; leave the group and join again",
        {{"group", std::to_string(group_->settings().shape.id.value)}, {"cause", engine::view_end_text(end)}});
    (*wake_)(*group_);
  }
  void send(uint32_t node, const engine::ViewMessage& message) override { to_send_.emplace_back(node, message); }

  bool stay() {
    const bool stays = !change_.has_moved() && change_.stay();
    if (stays) {
      group_->stay();
    }
    return stays;
  }
  /// When to look again; UINT64_MAX: it does not go over.
  uint64_t tend_successor(uint64_t now_ns) {
    if (!group_->goes_over() || change_.has_moved() || change_.ended() != engine::ViewEnd::kNone) {
      return UINT64_MAX;
    }
    change_.ready(group_->held_at(), group_->last_decided(), now_ns);
    return now_ns + kGoesOverNs;
  }
  /// Tells the others of ranks that came back to this node, until an operation of theirs has ended: then all are in.
  /// When to look again.
  uint64_t tend_returned(uint64_t now_ns) {
    const base::RankSet here = (group_->settings().returning & group_->local_ranks()) - group_->lost();
    bool submitted = true;
    bool in = true;
    for (const uint32_t rank : here) {
      submitted = submitted && group_->has_submitted(rank);
      in = in && group_->released_through(rank) != 0;
    }
    if (here.empty() || in) {
      return UINT64_MAX;
    }
    if (submitted && now_ns >= tell_returned_ns_) {
      tell_returned_ns_ = now_ns + kTellReturnedNs;
      change_.tell_returned();
    }
    return now_ns + kGoesOverNs;
  }
  bool have_returned() const {
    for (const uint32_t rank : group_->settings().returning - group_->lost()) {
      const engine::Placement& placement = *group_->settings().placement;
      const bool told =
          placement.is_local(rank) ? group_->has_submitted(rank) : change_.heard_ready(placement.node_of[rank]);
      if (!told) {
        return false;
      }
    }
    return true;
  }
  /// When it was moved over; 0: not yet.
  uint64_t moved_ns() const { return moved_ns_; }

  void send_all() {
    for (const auto& [node, message] : to_send_) {
      group_->settings().fabric->tell_view(node, message);
    }
    to_send_.clear();
  }

 private:
  std::shared_ptr<engine::GroupShared> group_;
  std::vector<uint64_t> node_ids_;  // by node of the group
  engine::ViewChange change_;
  const Wake* wake_;
  uint64_t moved_ns_ = 0;
  uint64_t tell_returned_ns_ = 0;
  std::vector<std::pair<uint32_t, engine::ViewMessage>> to_send_;
};

GroupViews::GroupViews(Wake wake, const engine::ViewOptions& options) : wake_(std::move(wake)), options_(options) {}

GroupViews::~GroupViews() = default;

void GroupViews::add(const std::shared_ptr<engine::GroupShared>& group, std::vector<uint64_t> node_ids) {
  if (!group->has_views()) {
    return;
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  std::unique_ptr<Member>& member = members_[group->settings().group_key];
  member = std::make_unique<Member>(group, std::move(node_ids), options_, &wake_);
  // Who was lost since the fabric was opened is told to the group alone.
  const engine::Placement& placement = *group->settings().placement;
  for (uint32_t node = 0; node < placement.nodes(); ++node) {
    base::RankSet ranks;
    for (const uint32_t rank : placement.ranks_of[node]) {
      ranks.add(rank);
    }
    const base::RankSet lost = ranks & group->lost();
    if (node != placement.own_node && lost == ranks) {
      member->change().node_lost(node, base::now_ns());
    }
    for (const uint32_t rank : lost) {
      member->change().rank_gone(rank, base::now_ns());
    }
  }
  moved(member.get());
}

GroupViews::Member* GroupViews::find(uint64_t group_key) {
  const auto found = members_.find(group_key);
  return found == members_.end() ? nullptr : found->second.get();
}

void GroupViews::moved(Member* member) {
  member->send_all();
  changed_.notify_all();
  if (stir_) {
    stir_();
  }
}

void GroupViews::rank_gone(uint64_t group_key, uint32_t rank) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (Member* member = find(group_key)) {
    member->change().rank_gone(rank, base::now_ns());
    moved(member);
  }
}

void GroupViews::node_lost(uint64_t node_id) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& [key, member] : members_) {
    const std::vector<uint64_t>& ids = member->node_ids();
    const auto found = std::find(ids.begin(), ids.end(), node_id);
    if (found != ids.end()) {
      member->change().node_lost(static_cast<uint32_t>(found - ids.begin()), base::now_ns());
      moved(member.get());
    }
  }
}

void GroupViews::goes_over(uint64_t group_key) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (Member* member = find(group_key)) {
    (void)member->tend_successor(base::now_ns());
    moved(member);
  }
}

bool GroupViews::stays(uint64_t group_key) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Member* const member = find(group_key);
  return member == nullptr || member->stay();
}

bool GroupViews::have_returned(const engine::GroupShared& group) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const Member* const member = find(group.settings().group_key);
  return member != nullptr && member->have_returned();
}

void GroupViews::receive(uint64_t group_key, uint32_t node, const engine::ViewMessage& message) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Member* member = find(group_key);
  if (member == nullptr) {
    return;  // this node has no rank in it any more
  }
  if (!member->change().receive(node, message, base::now_ns())) {
    base::log_warn("a message about a group's views makes no sense and is dropped",
                   {{"node", std::to_string(node)}, {"kind", std::to_string(static_cast<uint32_t>(message.kind))}});
  }
  moved(member);
}

base::Status GroupViews::change_mask(const engine::GroupShared& group, const base::RankSet& exclude,
                                     const base::RankSet& readmit, uint64_t deadline_ns) {
  const uint64_t key = group.settings().group_key;
  std::unique_lock<std::mutex> lock(mutex_);
  Member* member = find(key);
  if (member != nullptr && ((group.excluded() | exclude) - readmit) == group.excluded()) {
    return base::Status::ok();
  }
  uint64_t wish = 0;
  if (member != nullptr) {
    wish = member->change().ask(exclude, readmit, base::now_ns());
    moved(member);
  }
  while (member != nullptr && member->change().ended() == engine::ViewEnd::kNone) {
    if (member->change().granted() >= wish) {
      return base::Status::ok();
    }
    if (base::now_ns() >= deadline_ns) {
      return base::Status(EXPERTD_REASON_TIMEOUT, "the nodes of the group have not agreed on the mask yet");
    }
    changed_.wait_for(lock, kLook);
    member = find(key);
  }
  return base::Status(
      EXPERTD_REASON_PEER_LOST,
      std::string("this node takes no part in the group any more: ") +
          (member == nullptr ? "its ranks have left" : engine::view_end_text(member->change().ended())) +
          "; leave the group and join again");
}

// The last user's end closes the group on the fabric; until the others have a view without this node's ranks they ask
// it, and it has to answer.
bool GroupViews::is_over(const Member& member) {
  const bool answers = member.moved_ns() != 0 && base::now_ns() < member.moved_ns() + kMovedNs;
  return !member.is_used() && member.change().next_ns() == UINT64_MAX && !answers;
}

uint64_t GroupViews::tend(uint64_t now_ns) {
  uint64_t next_ns = UINT64_MAX;
  std::vector<std::unique_ptr<Member>> over;  // destroyed behind the lock: that waits for the fabric
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto entry = members_.begin(); entry != members_.end();) {
      Member& member = *entry->second;
      member.change().tend(now_ns);
      next_ns = std::min({next_ns, member.tend_successor(now_ns), member.tend_returned(now_ns)});
      member.send_all();
      next_ns = std::min(next_ns, member.change().next_ns());
      if ((member.group().local_ranks() - member.group().lost()).empty()) {
        next_ns = std::min(next_ns, now_ns + kReleaseNs);
      }
      if (is_over(member)) {
        over.push_back(std::move(entry->second));
        entry = members_.erase(entry);
      } else {
        ++entry;
      }
    }
    changed_.notify_all();
  }
  return next_ns;
}

void GroupViews::clear() {
  Members members;  // destroyed behind the lock
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    members.swap(members_);
  }
}

void GroupViews::settle(uint64_t deadline_ns) {
  std::unique_lock<std::mutex> lock(mutex_);
  const auto settled = [](const auto& entry) { return !entry.second->change().is_changing(); };
  while (!std::all_of(members_.begin(), members_.end(), settled) && base::now_ns() < deadline_ns) {
    changed_.wait_for(lock, kLook);
  }
}

}  // namespace expertd::session
