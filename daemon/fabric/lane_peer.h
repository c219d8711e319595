// SPDX-License-Identifier: Apache-2.0
// LanePeer: one other daemon as a data lane has it: its endpoints by rail, whose messages are received next, and what
// went both ways. Whether the daemon lives is the control lane's to say (peer.h): this one only tells that it cannot go
// on with it. Of the lane's thread. Owned by LaneCore, and outlives the groups that use it and every callback of UCX
// that may name it.
#pragma once

#include <memory>
#include <string>

#include "daemon/fabric/crossing.h"
#include "daemon/fabric/endpoints.h"
#include "daemon/fabric/receive_share.h"

namespace expertd::fabric {

class LanePeer final : public ConnectionOwner {
 public:
  struct Setting {
    LaneKind kind = LaneKind::kThroughput;
    uint64_t window_bytes = 0;  // of all rails together
    Crossing* crossing = nullptr;
  };

  /// Opens the endpoints. `addresses` are those of the other daemon's lane by rail.
  static base::Result<std::unique_ptr<LanePeer>> create(const NodeIdentity& identity, ConnectionId connection,
                                                        const Rails& rails, const Setting& setting);

  uint64_t node_id() const { return node_id_; }
  const std::string& name() const { return name_; }
  ConnectionId connection() const { return connection_; }
  ucp_ep_h endpoint(uint32_t rail = 0) const { return endpoints_.at(rail); }
  ReceiveShare& share() { return share_; }
  LaneTraffic& traffic() { return traffic_; }
  const LaneTraffic& traffic() const { return traffic_; }

  /// Tells the control lane's thread that the connection is of no use; the first cause counts.
  void fail(LossCause cause, std::string detail) override;
  /// Nothing of it is taken any more, and its loss will come.
  bool failed() const { return failed_; }
  /// The control lane's thread did not know the connection yet when fail() told it.
  void fail_again() const;
  /// The daemon is lost: the endpoints close at once, what was under way on them ends with an error.
  void let_go();
  bool lost() const { return lost_; }
  /// Whether nothing of UCX names it any more. After let_go().
  bool closed() { return endpoints_.closed(); }

  void count_failed_send() { ++sends_failed_; }
  uint64_t sends_failed() const { return sends_failed_; }

  uint32_t users = 0;  // groups and probes

 private:
  LanePeer(const NodeIdentity& identity, ConnectionId connection, const Rails& rails, const Setting& setting);

  const uint64_t node_id_;
  const std::string name_;
  const ConnectionId connection_;
  const Setting setting_;
  Endpoints endpoints_;
  ReceiveShare share_;
  LaneTraffic traffic_;
  uint64_t sends_failed_ = 0;
  bool failed_ = false;
  bool lost_ = false;
  LossCause cause_ = LossCause::kTransport;
  std::string detail_;
};

}  // namespace expertd::fabric
