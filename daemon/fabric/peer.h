// SPDX-License-Identifier: Apache-2.0
// Peer: one other daemon, with an endpoint per lane and rail that all groups share, its heartbeat, and its state:
// connecting -> up
// -> lost; a lost one never comes back, the same daemon connected anew is another Peer. Fabric thread only. Owned by
// Core, and outlives the groups that use it and every callback of UCX that may name it.
#pragma once

#include <ucp/api/ucp.h>

#include <array>
#include <memory>
#include <string>

#include "daemon/fabric/lane.h"
#include "daemon/fabric/options.h"
#include "daemon/fabric/receive_share.h"

namespace expertd::fabric {

class Peer {
 public:
  struct Setting {
    uint64_t own_node_id = 0;
    HeartbeatOptions heartbeat;
    uint64_t window_bytes = 0;  // of the throughput lane, per rail
    bool* attention = nullptr;  // set when a peer failed, so that the thread need not look at each
  };

  /// Opens the endpoints; nothing is known of the other side until it gives a sign of life.
  static base::Result<std::unique_ptr<Peer>> create(const NodeIdentity& identity, const Lanes& lanes,
                                                    const Setting& setting, uint64_t now_ns);
  ~Peer() = default;
  Peer(const Peer&) = delete;
  Peer& operator=(const Peer&) = delete;

  uint64_t node_id() const { return node_id_; }
  const std::string& name() const { return name_; }
  PeerState state() const { return state_; }
  bool lost() const { return state_ == PeerState::kLost; }
  ucp_ep_h endpoint(LaneKind lane, uint32_t rail = 0) const { return endpoints_[static_cast<uint32_t>(lane)][rail].ep; }
  ReceiveShare& share(engine::FabricLane lane) { return shares_[static_cast<uint32_t>(lane)]; }
  uint64_t rtt_ns() const { return heartbeat_.rtt_ns(); }
  const std::array<LaneTraffic, engine::kFabricLanes>& traffic() const { return traffic_; }
  LaneTraffic& traffic(engine::FabricLane lane) { return traffic_[static_cast<uint32_t>(lane)]; }

  /// Records that it cannot be used any more; the first cause stays. Also called within progress().
  void fail(LossCause cause, std::string detail);
  bool failed() const { return failed_; }
  LossCause cause() const { return cause_; }
  const std::string& detail() const { return detail_; }

  /// Its endpoints close at once, what was under way on them ends with an error. After fail().
  void lose();
  /// Whether nothing of UCX names it any more.
  bool closed();

  /// A heartbeat of it; true when it was its first.
  bool heard(const WireHeartbeat& heartbeat, uint64_t now_ns);
  /// Sends what is due and fails it when it was silent too long.
  void tend(uint64_t now_ns);
  void forgive(uint64_t gap_ns) { heartbeat_.forgive(gap_ns); }
  uint64_t next_ns() const { return pong_due_ ? 0 : heartbeat_.next_ns(); }
  void say_bye() { (void)send(kSignalBye, 0); }
  bool signals_under_way() const { return signals_under_way_ != 0; }

  void count_failed_send() { ++sends_failed_; }
  PeerSnapshot snapshot() const;

  uint32_t groups = 0;  // how many groups use it

 private:
  struct Endpoint {
    Peer* peer = nullptr;
    LaneKind lane = LaneKind::kControl;
    ucp_ep_h ep = nullptr;
    void* closing = nullptr;  // request of its close
  };
  /// A heartbeat under way; UCX reads the header until it has gone.
  struct Signal {
    Peer* peer = nullptr;
    bool under_way = false;
    WireHeartbeat header;
  };
  static constexpr uint32_t kSignals = 8;  // more than that under way, and another would tell nothing new

  Peer(const NodeIdentity& identity, const Lanes& lanes, const Setting& setting, uint64_t now_ns);
  base::Status open(const NodeIdentity& identity, const Lanes& lanes);
  static base::Status open(const std::string& address, const Lane& lane, Endpoint* endpoint);
  void close_endpoints();
  bool send(WireSignal signal, uint64_t sent_ns);
  static void on_error(void* endpoint, ucp_ep_h ep, ucs_status_t status);
  static void on_signal_sent(void* request, ucs_status_t status, void* signal);

  const uint64_t node_id_;
  const std::string name_;
  const Setting setting_;
  PeerState state_ = PeerState::kConnecting;
  Heartbeat heartbeat_;
  std::array<std::vector<Endpoint>, kLanes> endpoints_;  // by lane and own rail; they stay where they are
  std::array<Signal, kSignals> signals_{};
  uint32_t signals_under_way_ = 0;
  bool pong_due_ = false;
  uint64_t pong_sent_ns_ = 0;
  bool failed_ = false;
  LossCause cause_ = LossCause::kTransport;
  std::string detail_;
  uint64_t sends_failed_ = 0;
  std::array<LaneTraffic, engine::kFabricLanes> traffic_{};
  std::array<ReceiveShare, engine::kFabricLanes> shares_;
};

}  // namespace expertd::fabric
