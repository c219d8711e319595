// SPDX-License-Identifier: Apache-2.0
// LaneCore: everything that the thread of a data lane owns: its rails, peers, groups and probes, and which message
// belongs to which. Control threads build it and, once the thread has ended, destroy it; in between only the lane's
// thread touches it. Owned by Fabric. Whether a peer lives is Core's to say.
#pragma once

#include <array>
#include <memory>
#include <vector>

#include "daemon/fabric/crossing.h"
#include "daemon/fabric/group_channel.h"
#include "daemon/fabric/lane.h"
#include "daemon/fabric/lane_peer.h"
#include "daemon/fabric/open_groups.h"
#include "daemon/fabric/options.h"
#include "daemon/fabric/probe.h"
#include "daemon/fabric/progress_thread.h"
#include "daemon/fabric/rail_loads.h"
#include "daemon/fabric/settling.h"

namespace expertd::fabric {

/// What a lane adds to FabricSnapshot.
struct LaneSnapshot {
  struct Traffic {
    ConnectionId connection = 0;
    LaneTraffic traffic;
    uint64_t sends_failed = 0;
  };
  std::vector<Traffic> peers;
  LaneTraffic traffic;  // with all peers ever
  std::vector<RailSnapshot> rails;
  std::array<uint64_t, kDropCauses> dropped{};
  uint64_t turns = 0;
};

class LaneCore final : public Progressed, public IncomingSink {
 public:
  struct Setting {
    engine::FabricLane lane = engine::FabricLane::kThroughput;
    uint64_t node_id = 0;
    Route route = Route::kAuto;
    uint64_t rail_idle_ns = 0;  // FabricOptions, as the next
    uint64_t window_bytes = 0;
    FabricObserver* observer = nullptr;
    Crossing* crossing = nullptr;
    uint64_t stop_flush_ns = 500'000'000;  // how much of the time to stop may go to what is still to be sent
  };

  explicit LaneCore(const Setting& setting) : setting_(setting), loads_(setting.route, setting.rail_idle_ns) {}

  /// Before the thread starts.
  base::Status open_rails(const LaneOptionList& options);
  const Rails& rails() const { return rails_; }
  RailLoads* loads() { return &loads_; }

  // Lane's thread.
  base::Status connect(const NodeIdentity& identity, ConnectionId connection);
  /// The control lane's thread knows the connection now: what it was told of it before, it did not understand.
  void tell_again(ConnectionId connection);
  /// PEER_LOST when a node of the group is not connected.
  base::Status open(const std::shared_ptr<GroupChannel>& channel);
  void close(GroupChannel* channel);
  void forget(GroupChannel* channel, uint32_t rank) { channel->lane(setting_.lane).forget(rank); }
  /// BAD_STATE while another probe is on, PEER_LOST for a node that is not connected.
  base::Status open_probe(const ProbeOffer& offer, ProbeMemory memory);
  /// `plan` has runs of this lane alone.
  base::Status begin_probe(const ProbePlan& plan, ProbeMemory payload, ProbeDone done);
  /// An offer that nobody will come for.
  void close_probe(uint64_t probe) { probes_.close(probe); }
  LaneSnapshot snapshot() const;

  bool run_once(uint64_t now_ns) override;
  bool prepare_sleep() override;
  uint64_t next_ns() override;
  void was_late(uint64_t /*gap_ns*/) override {}
  void beat(uint64_t now_ns) override;
  void begin_stop() override;
  bool quiet(uint64_t now_ns) override;

  bool incoming(const Incoming& message) override;

 private:
  LaneKind kind() const { return lane_of(setting_.lane); }
  bool start_receives();
  bool drop(DropCause cause, LanePeer* from = nullptr, const std::string& detail = {});
  GroupChannel* group_of(uint64_t key, uint32_t epoch, const LanePeer* from, uint32_t* node, DropCause* cause);
  bool take_message(const Incoming& message, LanePeer* from);
  bool take_credit(const Incoming& message, LanePeer* from);
  bool take_probe(const Incoming& message, LanePeer* from);
  base::Result<LanePeer*> peer_to_probe(uint64_t node_id) const;
  LanePeer* find_peer(uint64_t node_id) const;
  bool let_lost_go();
  void let_go(LanePeer& peer);
  bool forget_closed();
  LaneChannel& part(const std::shared_ptr<GroupChannel>& group) const { return group->lane(setting_.lane); }

  const Setting setting_;
  // In this order: rails go first, since destroying a worker may end what still names groups and peers.
  std::vector<std::unique_ptr<LanePeer>> peers_;       // of each node id the last one, and older ones still in use
  std::vector<std::shared_ptr<GroupChannel>> groups_;  // open and closing ones
  Probes probes_;
  Rails rails_;
  RailLoads loads_;
  OpenGroups open_groups_;
  std::array<uint64_t, kDropCauses> dropped_{};
  LaneTraffic forgotten_;  // with peers that are in the list no more
  Settling settling_;
  uint64_t arrived_ = 0;  // messages, whatever became of them
  bool closing_ = false;  // an endpoint that was closed may not be gone yet
  uint64_t now_ns_ = 0;   // of the turn
  uint64_t turns_ = 0;
  bool stopping_ = false;
  bool flushed_ = false;
  uint64_t stop_flush_until_ns_ = 0;
};

}  // namespace expertd::fabric
