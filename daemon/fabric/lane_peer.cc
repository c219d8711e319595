// SPDX-License-Identifier: Apache-2.0
#include "daemon/fabric/lane_peer.h"

#include <utility>

namespace expertd::fabric {

// What goes by the latency lane is not many bytes, and waits for nobody's turn.
LanePeer::LanePeer(const NodeIdentity& identity, ConnectionId connection, const Rails& rails, const Setting& setting)
    : node_id_(identity.node_id),
      name_(identity.name),
      connection_(connection),
      setting_(setting),
      endpoints_(setting.kind, rails, this),
      share_(setting.kind == LaneKind::kLatency ? UINT64_MAX : setting.window_bytes) {}

base::Result<std::unique_ptr<LanePeer>> LanePeer::create(const NodeIdentity& identity, ConnectionId connection,
                                                         const Rails& rails, const Setting& setting) {
  std::unique_ptr<LanePeer> peer(new LanePeer(identity, connection, rails, setting));
  const base::Status opened = peer->endpoints_.open(identity.addresses[static_cast<uint32_t>(setting.kind)], rails);
  if (!opened.is_ok()) {
    return opened.with_context("connecting to node \"" + identity.name + "\"");
  }
  return peer;
}

void LanePeer::fail(LossCause cause, std::string detail) {
  if (failed_ || lost_) {
    return;
  }
  failed_ = true;
  cause_ = cause;
  detail_ = std::move(detail);
  fail_again();
}

void LanePeer::fail_again() const {
  setting_.crossing->report(
      {.kind = LaneReport::Kind::kFailed, .connection = connection_, .cause = cause_, .detail = detail_});
}

void LanePeer::let_go() {
  lost_ = true;
  endpoints_.close();
}

}  // namespace expertd::fabric
