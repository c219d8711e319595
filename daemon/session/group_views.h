// SPDX-License-Identifier: Apache-2.0
// GroupViews: the groups over several nodes whose masks are agreed on (engine/view_change.h), each with this node's
// part of that. Told of ranks and nodes that go, of wishes and of other nodes' messages by threads of control, never a
// loop's; it holds and lets go the operations of the groups, wakes their loops, and sends through their fabric ports.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "daemon/base/status.h"
#include "daemon/engine/group_shared.h"
#include "daemon/engine/view_change.h"

namespace expertd::session {

class GroupViews {
 public:
  using Wake = std::function<void(const engine::GroupShared& group)>;

  /// `wake` wakes the loops of a group; any thread.
  explicit GroupViews(Wake wake, const engine::ViewOptions& options = {});
  ~GroupViews();
  GroupViews(const GroupViews&) = delete;
  GroupViews& operator=(const GroupViews&) = delete;

  /// Called, under no lock but the own one, when tend() may have something to do earlier than it said. Before add().
  void on_change(std::function<void()> stir) { stir_ = std::move(stir); }

  /// A group that was formed, with its fabric; nothing is done for one without views. It is kept alive until the other
  /// nodes know that this one has no rank in it any more.
  void add(const std::shared_ptr<engine::GroupShared>& group, std::vector<uint64_t> node_ids);
  /// A rank is gone, one of this node or of another that lives. After its set_lost().
  void rank_gone(uint64_t group_key, uint32_t rank);
  void node_lost(uint64_t node_id);
  /// The group holds where it may go over to its successor (GroupShared::go_over_to), so that its nodes agree on where;
  /// or it does no more.
  void goes_over(uint64_t group_key);
  bool stays(uint64_t group_key);  // false while they are agreeing: to be called again
  /// Of a successor: all ranks that joined it anew, and are not lost again, have submitted something.
  bool have_returned(const engine::GroupShared& group);
  void receive(uint64_t group_key, uint32_t node, const engine::ViewMessage& message);
  /// Asks for a mask and waits until a view has it, until the deadline. PEER_LOST when this node's part has ended.
  base::Status change_mask(const engine::GroupShared& group, const base::RankSet& exclude, const base::RankSet& readmit,
                           uint64_t deadline_ns);
  /// Asks again what was not answered, and forgets groups; when to be called next, UINT64_MAX: when something changes.
  uint64_t tend(uint64_t now_ns);
  /// Forgets all groups: the fabric ends.
  void clear();
  /// Waits until nothing is being agreed on in which this node has a voice; at most until the deadline.
  void settle(uint64_t deadline_ns);

 private:
  class Member;
  using Members = std::map<uint64_t, std::unique_ptr<Member>>;  // by group key

  Member* find(uint64_t group_key);
  void moved(Member* member);
  static bool is_over(const Member& member);

  const Wake wake_;
  const engine::ViewOptions options_;
  std::function<void()> stir_;
  std::mutex mutex_;  // everything below
  std::condition_variable changed_;
  Members members_;
};

}  // namespace expertd::session
