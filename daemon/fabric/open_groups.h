// SPDX-License-Identifier: Apache-2.0
// OpenGroups: the groups that a lane lets messages in for, by their keys. Of the lane's thread; owned by Core and
// LaneCore.
#pragma once

#include <algorithm>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "daemon/fabric/group_channel.h"
#include "daemon/fabric/options.h"

namespace expertd::fabric {

class OpenGroups {
 public:
  bool contains(uint64_t key) const { return by_key_.contains(key); }
  void add(GroupChannel* channel) { by_key_.emplace(channel->link().key, channel); }
  /// False: it is not open.
  bool remove(const GroupChannel* channel) {
    const auto open = by_key_.find(channel->link().key);
    if (open == by_key_.end() || open->second != channel) {
      return false;
    }
    by_key_.erase(open);
    return true;
  }
  void clear() { by_key_.clear(); }

  /// The group of a message from `from`, and its node there; null: dropped for `cause`. `peers_of` gives a group's
  /// peers on the lane, by node.
  template <typename AnyPeer, typename PeersOf>
  GroupChannel* find(uint64_t key, uint32_t epoch, const AnyPeer* from, const PeersOf& peers_of, uint32_t* node,
                     DropCause* cause) const {
    *cause = DropCause::kUnknownGroup;
    const auto found = by_key_.find(key);
    if (found == by_key_.end()) {
      return nullptr;
    }
    GroupChannel* group = found->second;
    *cause = DropCause::kEpoch;
    if (group->link().epoch != epoch) {
      return nullptr;
    }
    // A group of this key that the sender is no member of is unknown to it as well.
    *cause = DropCause::kUnknownGroup;
    const auto& peers = peers_of(*group);
    const auto member = std::find(peers.begin(), peers.end(), from);
    *node = static_cast<uint32_t>(member - peers.begin());
    return member == peers.end() ? nullptr : group;
  }

 private:
  std::unordered_map<uint64_t, GroupChannel*> by_key_;
};

}  // namespace expertd::fabric
