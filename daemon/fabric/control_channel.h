// SPDX-License-Identifier: Apache-2.0
// ControlChannel: what one group says by the control lane: which of this node's ranks are gone, and what nodes say to
// agree on views. Of the control lane's thread. Owned by GroupChannel.
#pragma once

#include <ucp/api/ucp.h>

#include <array>
#include <vector>

#include "daemon/engine/view_message.h"
#include "daemon/fabric/options.h"
#include "daemon/fabric/peer.h"
#include "daemon/fabric/wire.h"

namespace expertd::fabric {

class ControlChannel {
 public:
  /// `link` outlives it.
  ControlChannel(const GroupLink& link, uint64_t own_node_id) : link_(link), own_node_id_(own_node_id) {}
  ControlChannel(const ControlChannel&) = delete;
  ControlChannel& operator=(const ControlChannel&) = delete;

  /// Before the first turn; a peer per node, null for the own one.
  void use_peers(std::vector<Peer*> peers);
  const std::vector<Peer*>& peers() const { return peers_; }
  /// It is drained and goes.
  void let_peers_go();
  /// Tells every other node that a local rank is gone, as soon as there is room; once per rank.
  void tell_gone(uint32_t rank, uint64_t through);
  /// A rank of `node` is gone. False: it is no rank of it, or was gone already.
  bool hear_gone(uint32_t node, const WireGone& header);
  /// Sends a message about views, behind those that wait for the node; the oldest of too many is dropped.
  void tell_view(uint32_t node, const engine::ViewMessage& message);
  /// True when something moved.
  bool run_once() {
    const bool gone = send_gone();
    return send_views() || gone;
  }
  void begin_close() { closing_ = true; }
  /// Closed, and all of it was said.
  bool drained() const { return closing_ && gone_told() && !views_under_way(); }

 private:
  /// What one other node is still to be told of local ranks that are gone; one message at a time is under way.
  struct GoneLink {
    Peer* peer = nullptr;
    uint64_t waiting = 0;  // bit per local rank, by its place
    bool under_way = false;
    WireGone header;
  };
  /// Messages about views that wait for a node; one at a time is under way.
  struct ViewLink {
    static constexpr uint32_t kMost = 8;  // whoever waits for an answer asks again
    Peer* peer = nullptr;
    std::array<engine::ViewMessage, kMost> waiting{};  // a ring: `count` from `first` on
    uint32_t first = 0;
    uint32_t count = 0;
    bool under_way = false;
    WireView header;
  };

  bool send_gone();
  void send_gone(GoneLink& to);
  bool gone_told() const;
  bool send_views();
  void send_view(ViewLink& to);
  bool views_under_way() const;
  static void on_gone_sent(void* request, ucs_status_t status, void* link);
  static void on_view_sent(void* request, ucs_status_t status, void* link);

  const GroupLink& link_;
  const uint64_t own_node_id_;
  std::vector<Peer*> peers_;
  std::vector<GoneLink> gone_links_;                      // per node, without a peer for the own one
  std::array<uint64_t, base::kMaxLocalRanks> through_{};  // of local ranks that are gone, by their place
  uint64_t gone_ = 0;                                     // local ranks, by their place
  std::vector<bool> gone_elsewhere_;                      // by rank: of other nodes
  std::vector<ViewLink> view_links_;                      // per node, without a peer for the own one
  bool closing_ = false;
};

}  // namespace expertd::fabric
