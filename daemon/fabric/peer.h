// SPDX-License-Identifier: Apache-2.0
// Peer: one other daemon, as the control lane knows it: its heartbeat, and its state: connecting -> up -> lost; a lost
// one never comes back, the same daemon connected anew is another Peer. What goes by the data lanes is in lane_peer.h.
// Of the control lane's thread. Owned by Core, and outlives the groups that use it and every callback of UCX that may
// name it.
#pragma once

#include <ucp/api/ucp.h>

#include <array>
#include <memory>
#include <string>

#include "daemon/fabric/crossing.h"
#include "daemon/fabric/endpoints.h"
#include "daemon/fabric/wire.h"

namespace expertd::fabric {

/// A node's id as logs and messages have it.
std::string hex(uint64_t value);

class Peer final : public ConnectionOwner {
 public:
  struct Setting {
    uint64_t own_node_id = 0;
    HeartbeatOptions heartbeat;
    bool* attention = nullptr;  // set when a peer failed, so that the thread need not look at each
  };

  /// Opens the endpoint; nothing is known of the other side until it gives a sign of life.
  static base::Result<std::unique_ptr<Peer>> create(const NodeIdentity& identity, ConnectionId connection,
                                                    const Rails& rails, const Setting& setting, uint64_t now_ns);

  uint64_t node_id() const { return node_id_; }
  const std::string& name() const { return name_; }
  ConnectionId connection() const { return connection_; }
  PeerState state() const { return state_; }
  bool lost() const { return state_ == PeerState::kLost; }
  ucp_ep_h endpoint() const { return endpoints_.at(); }
  uint64_t rtt_ns() const { return heartbeat_.rtt_ns(); }

  /// Records that it cannot be used any more; the first cause stays. Also called within progress().
  void fail(LossCause cause, std::string detail) override;
  bool failed() const { return failed_; }
  LossCause cause() const { return cause_; }
  const std::string& detail() const { return detail_; }

  /// Its endpoint closes at once, what was under way on it ends with an error. After fail().
  void lose();
  /// Whether nothing of UCX names it any more.
  bool closed() { return lost() && signals_under_way_ == 0 && endpoints_.closed(); }

  /// A heartbeat of it; true when it was its first.
  bool heard(const WireHeartbeat& heartbeat, uint64_t now_ns);
  /// Sends what is due and fails it when it was silent too long.
  void tend(uint64_t now_ns);
  void forgive(uint64_t gap_ns) { heartbeat_.forgive(gap_ns); }
  uint64_t next_ns() const { return pong_due_ ? 0 : heartbeat_.next_ns(); }
  void say_bye() { (void)send(kSignalBye, 0); }
  bool signals_under_way() const { return signals_under_way_ != 0; }

  /// What the data lanes add is left open.
  PeerSnapshot snapshot() const;

  uint32_t users = 0;            // groups
  uint32_t lanes_to_let_go = 0;  // data lanes that have not let the lost one go

 private:
  /// A heartbeat under way; UCX reads the header until it has gone.
  struct Signal {
    Peer* peer = nullptr;
    bool under_way = false;
    WireHeartbeat header;
  };
  static constexpr uint32_t kSignals = 8;  // more than that under way, and another would tell nothing new

  Peer(const NodeIdentity& identity, ConnectionId connection, const Rails& rails, const Setting& setting,
       uint64_t now_ns);
  bool send(WireSignal signal, uint64_t sent_ns);
  static void on_signal_sent(void* request, ucs_status_t status, void* signal);

  const uint64_t node_id_;
  const std::string name_;
  const ConnectionId connection_;
  const Setting setting_;
  PeerState state_ = PeerState::kConnecting;
  Heartbeat heartbeat_;
  Endpoints endpoints_;
  std::array<Signal, kSignals> signals_{};
  uint32_t signals_under_way_ = 0;
  bool pong_due_ = false;
  uint64_t pong_sent_ns_ = 0;
  bool failed_ = false;
  LossCause cause_ = LossCause::kTransport;
  std::string detail_;
};

}  // namespace expertd::fabric
