// SPDX-License-Identifier: Apache-2.0
// Core: everything that the control lane's thread owns: the lane, the peers with their lives, and what groups say by
// it. It alone decides that a peer is lost; the data lanes (lane_core.h) tell it what they see and let lost ones go.
// Control threads build it and, once the thread has ended, destroy it; in between only the thread touches it. Owned by
// Fabric.
#pragma once

#include <algorithm>
#include <array>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "daemon/fabric/crossing.h"
#include "daemon/fabric/group_channel.h"
#include "daemon/fabric/lane.h"
#include "daemon/fabric/open_groups.h"
#include "daemon/fabric/options.h"
#include "daemon/fabric/peer.h"
#include "daemon/fabric/progress_thread.h"
#include "daemon/fabric/settling.h"

namespace expertd::fabric {

/// What the control lane has of FabricSnapshot.
struct ControlSnapshot {
  std::vector<std::pair<ConnectionId, PeerSnapshot>> peers;  // without what went by the data lanes
  std::array<uint64_t, kDropCauses> dropped{};
  std::array<uint64_t, kLossCauses> lost{};
  RttHistogram rtt;
  uint64_t turns = 0;
};

class Core final : public Progressed, public IncomingSink {
 public:
  struct Setting {
    uint64_t node_id = 0;
    HeartbeatOptions heartbeat;
    FabricObserver* observer = nullptr;  // may be null
    Crossing* crossing = nullptr;
    uint64_t stop_flush_ns = 500'000'000;  // how much of the time to stop may go to what is still to be sent
  };

  explicit Core(const Setting& setting) : setting_(setting) {}

  /// Before the thread starts.
  base::Status open_lane(const LaneOptionList& options);
  const Rails& rails() const { return rails_; }

  // The lane's thread.
  /// `known`: it is connected already, and lives.
  base::Status check_new(const NodeIdentity& identity, bool* known) const;
  /// After the data lanes.
  base::Status connect(const NodeIdentity& identity, ConnectionId connection);
  base::Status disconnect(uint64_t node_id);
  base::Status open(const std::shared_ptr<GroupChannel>& channel);
  void close(GroupChannel* channel);
  ControlSnapshot snapshot() const;

  bool run_once(uint64_t now_ns) override;
  bool prepare_sleep() override;
  uint64_t next_ns() override { return attention_ ? 0 : std::min(next_ns_, settling_.next_ns(now_ns_)); }
  void was_late(uint64_t gap_ns) override;
  void beat(uint64_t now_ns) override;
  void begin_stop() override;
  bool quiet(uint64_t now_ns) override;

  bool incoming(const Incoming& message) override;

 private:
  bool hear_lanes();
  void hear(const LaneReport& report);
  bool drop(DropCause cause, Peer* from = nullptr, const std::string& detail = {});
  GroupChannel* group_of(uint64_t key, uint32_t epoch, const Peer* from, uint32_t* node, DropCause* cause);
  bool take_gone(const Incoming& message, Peer* from);
  bool take_view(const Incoming& message, Peer* from);
  bool take_heartbeat(const Incoming& message, Peer* from);
  Peer* find_peer(uint64_t node_id) const;
  void tend_peers(uint64_t now_ns);
  bool lose_failed();
  void lose(Peer& peer);
  void tell_lost(const Peer& peer);
  bool forget_closed();

  const Setting setting_;
  // In this order: the lane goes first, since destroying a worker may end what still names groups and peers.
  std::vector<std::unique_ptr<Peer>> peers_;           // of each node id the last one, and older ones still in use
  std::vector<std::shared_ptr<GroupChannel>> groups_;  // open and closing ones
  Rails rails_;                                        // one
  OpenGroups open_groups_;
  bool attention_ = false;  // a peer failed or waits for an answer
  uint64_t next_ns_ = 0;    // when a peer wants tending
  std::array<uint64_t, kDropCauses> dropped_{};
  std::array<uint64_t, kLossCauses> lost_{};
  RttHistogram rtt_;
  Settling settling_;
  uint64_t arrived_ = 0;  // messages, whatever became of them
  uint64_t now_ns_ = 0;   // of the turn
  uint64_t turns_ = 0;
  bool stopping_ = false;
  bool said_bye_ = false;
  uint64_t stop_flush_until_ns_ = 0;
};

}  // namespace expertd::fabric
