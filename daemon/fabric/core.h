// SPDX-License-Identifier: Apache-2.0
// Core: everything the fabric thread owns: lanes, peers, groups, and which message belongs to which. Control threads
// build it and, once the thread has ended, destroy it; in between only the fabric thread touches it. Owned by Fabric.
#pragma once

#include <algorithm>
#include <array>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "daemon/fabric/group_channel.h"
#include "daemon/fabric/lane.h"
#include "daemon/fabric/options.h"
#include "daemon/fabric/peer.h"
#include "daemon/fabric/probe.h"
#include "daemon/fabric/progress_thread.h"
#include "daemon/fabric/rail_loads.h"

namespace expertd::fabric {

/// A node's id as logs and messages have it.
std::string hex(uint64_t value);

class Core final : public Progressed, public IncomingSink {
 public:
  struct Setting {
    uint64_t node_id = 0;
    HeartbeatOptions heartbeat;
    Route route = Route::kAuto;
    uint64_t window_bytes = 0;             // FabricOptions
    FabricObserver* observer = nullptr;    // may be null
    uint64_t stop_flush_ns = 500'000'000;  // how much of the time to stop may go to what is still to be sent
  };

  explicit Core(const Setting& setting)
      : setting_(setting), loads_{RailLoads(setting.route), RailLoads(setting.route)} {}

  /// Before the thread starts.
  base::Status open_lanes(const std::array<LaneOptionList, kLanes>& options);
  const Lanes& lanes() const { return lanes_; }
  RailLoads* loads() { return loads_.data(); }  // by engine::FabricLane

  // Fabric thread.
  base::Status connect(const NodeIdentity& identity);
  base::Status disconnect(uint64_t node_id);
  base::Status open(std::unique_ptr<GroupChannel>* channel);
  void close(GroupChannel* channel);
  void tell_gone(GroupChannel* channel, uint32_t rank, uint64_t through) { channel->tell_gone(rank, through); }
  void forget(GroupChannel* channel, uint32_t rank) { channel->forget(rank); }
  void tell_view(GroupChannel* channel, uint32_t node, const engine::ViewMessage& message) {
    channel->tell_view(node, message);
  }
  /// BAD_STATE while another probe is on, PEER_LOST for a node that is not connected.
  base::Status open_probe(const ProbeOffer& offer, ProbeMemory memory);
  base::Status begin_probe(const ProbePlan& plan, ProbeMemory payload, ProbeDone done);
  FabricSnapshot snapshot() const;

  bool run_once(uint64_t now_ns) override;
  bool prepare_sleep() override;
  uint64_t next_ns() override { return attention_ ? 0 : std::min(next_ns_, probes_.next_ns()); }
  void was_late(uint64_t gap_ns) override;
  void beat(uint64_t now_ns) override;
  void begin_stop() override;
  bool quiet(uint64_t now_ns) override;

  bool incoming(const Incoming& message) override;

 private:
  bool progress(LaneKind lane);
  bool start_receives();
  bool drop(DropCause cause, Peer* from = nullptr, const std::string& detail = {});
  Peer* sender(const Incoming& message, const WirePrefix& prefix, DropCause* cause);
  GroupChannel* group_of(uint64_t key, uint32_t epoch, const Peer* from, uint32_t* node, DropCause* cause);
  bool take_message(const Incoming& message, Peer* from);
  bool take_credit(const Incoming& message, Peer* from);
  bool take_gone(const Incoming& message, Peer* from);
  bool take_view(const Incoming& message, Peer* from);
  bool take_heartbeat(const Incoming& message, Peer* from);
  bool take_probe(const Incoming& message, Peer* from);
  base::Result<Peer*> peer_to_probe(uint64_t node_id) const;
  Peer* find_peer(uint64_t node_id) const;
  void tend_peers(uint64_t now_ns);
  bool lose_failed();
  void lose(Peer& peer);
  bool forget_closed();

  const Setting setting_;
  // In this order: lanes go first, since destroying a worker may end what still names groups and peers.
  std::vector<std::unique_ptr<Peer>> peers_;           // of each node id the last one, and older ones still in use
  std::vector<std::unique_ptr<GroupChannel>> groups_;  // open and closing ones
  Probes probes_;
  Lanes lanes_;
  std::array<RailLoads, engine::kFabricLanes> loads_;
  std::unordered_map<uint64_t, GroupChannel*> open_groups_;  // by key
  bool attention_ = false;                                   // a peer failed or waits for an answer
  uint64_t next_ns_ = 0;                                     // when a peer wants tending
  std::array<uint64_t, kDropCauses> dropped_{};
  std::array<uint64_t, kLossCauses> lost_{};
  std::array<LaneTraffic, engine::kFabricLanes> forgotten_{};  // with peers that are in the list no more
  RttHistogram rtt_;
  uint64_t turns_ = 0;
  bool stopping_ = false;
  bool said_bye_ = false;
  uint64_t stop_flush_until_ns_ = 0;
};

}  // namespace expertd::fabric
