// SPDX-License-Identifier: Apache-2.0
// ReceiveShare: which group's rendezvous is received next of those that wait on one lane of one peer. It is the
// receiver who decides when the bytes of a rendezvous move, and who knows whether there is a buffer for them, so a
// share holds what is moving to a window and gives groups turns by their weights in bytes, without ever waiting for a
// group that has nothing to move or no buffer. Pure, of the lane's thread. Owned by the LanePeer; members leave
// before they go.
#pragma once

#include <cstdint>
#include <vector>

#include "daemon/base/limits.h"

namespace expertd::fabric {

/// What waits of one group.
class ShareMember {
 public:
  virtual ~ShareMember() = default;
  /// Bytes of the oldest message that waits and has a buffer; 0: there is none, or no buffer.
  virtual uint64_t waiting_bytes() const = 0;
  /// Starts that one. Its end is told to the share.
  virtual void start_waiting() = 0;

  uint32_t weight = 1;  // 1..kMaxBandwidthRatio

 private:
  friend class ReceiveShare;
  uint64_t due_ = 0;  // when its next message is due, in bytes of weight kMaxBandwidthRatio
};

class ReceiveShare {
 public:
  /// At most `window_bytes` are under way, but always one message.
  explicit ReceiveShare(uint64_t window_bytes) : window_bytes_(window_bytes) {}

  void join(ShareMember* member) { members_.push_back(member); }
  void leave(ShareMember* member) { std::erase(members_, member); }
  /// Bytes of the group came without having waited.
  void charge(ShareMember& member, uint64_t bytes) { member.due_ = due_of(member) + cost(member, bytes); }
  /// Starts what the window has room for; true when that was anything.
  bool run();
  /// What was started has ended, well or not.
  void ended(uint64_t bytes) { in_flight_bytes_ -= bytes; }
  uint64_t in_flight_bytes() const { return in_flight_bytes_; }

 private:
  static uint64_t cost(const ShareMember& member, uint64_t bytes) {
    return bytes * base::kMaxBandwidthRatio / member.weight;
  }
  /// A group that had nothing for a moment keeps its claim on what it missed, up to a window for a weight of 1; one
  /// that had nothing for long has none on the time before.
  uint64_t due_of(const ShareMember& member) const {
    const uint64_t claim = window_bytes_ == UINT64_MAX ? 0 : window_bytes_ * base::kMaxBandwidthRatio;
    const uint64_t oldest = now_ > claim ? now_ - claim : 0;
    return member.due_ > oldest ? member.due_ : oldest;
  }

  const uint64_t window_bytes_;
  std::vector<ShareMember*> members_;
  uint64_t in_flight_bytes_ = 0;
  uint64_t now_ = 0;  // when the message that was started last was due
};

}  // namespace expertd::fabric
