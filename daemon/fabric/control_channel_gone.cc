// SPDX-License-Identifier: Apache-2.0
// Whom a group tells what, and ranks that are gone: what other nodes are told of this node's, and what is heard of
// theirs. Of the control lane's thread.
#include <algorithm>
#include <bit>
#include <string>
#include <utility>

#include "daemon/fabric/control_channel.h"

namespace expertd::fabric {

void ControlChannel::use_peers(std::vector<Peer*> peers) {
  peers_ = std::move(peers);
  gone_elsewhere_.resize(link_.placement.ranks());
  gone_links_.resize(peers_.size());
  view_links_.resize(peers_.size());
  for (size_t node = 0; node < peers_.size(); ++node) {
    gone_links_[node].peer = peers_[node];
    view_links_[node].peer = peers_[node];
    if (peers_[node] != nullptr) {
      ++peers_[node]->users;
    }
  }
}

void ControlChannel::let_peers_go() {
  for (Peer* peer : peers_) {
    if (peer != nullptr) {
      --peer->users;
    }
  }
}

void ControlChannel::tell_gone(uint32_t rank, uint64_t through) {
  const uint32_t place = link_.placement.index_of[rank];
  const uint64_t bit = uint64_t{1} << place;
  if ((gone_ & bit) != 0) {
    return;  // it left and then its session ended
  }
  gone_ |= bit;
  through_[place] = through;
  for (GoneLink& link : gone_links_) {
    link.waiting |= link.peer != nullptr ? bit : 0;
  }
}

bool ControlChannel::hear_gone(uint32_t node, const WireGone& header) {
  const engine::Placement& placement = link_.placement;
  if (header.rank >= placement.ranks() || placement.node_of[header.rank] != node || gone_elsewhere_[header.rank]) {
    return false;
  }
  gone_elsewhere_[header.rank] = true;
  return true;
}

bool ControlChannel::send_gone() {
  bool moved = false;
  for (GoneLink& link : gone_links_) {
    if (link.peer == nullptr || link.peer->lost()) {
      link.waiting = 0;  // who is lost hears nothing
    }
    while (link.waiting != 0 && !link.under_way && !link.peer->failed()) {
      send_gone(link);
      moved = true;
    }
  }
  return moved;
}

void ControlChannel::send_gone(GoneLink& to) {
  const auto place = static_cast<uint32_t>(std::countr_zero(to.waiting));
  to.waiting &= to.waiting - 1;
  to.header = WireGone{};
  to.header.prefix.source_node = own_node_id_;
  to.header.group_key = link_.key;
  to.header.epoch = link_.epoch;
  to.header.rank = link_.placement.ranks_of[link_.placement.own_node][place];
  to.header.through = through_[place];
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS;
  param.flags = UCP_AM_SEND_FLAG_EAGER;
  param.cb.send = on_gone_sent;
  param.user_data = &to;
  const ucs_status_ptr_t sent =
      ucp_am_send_nbx(to.peer->endpoint(), kWireGone, &to.header, sizeof(to.header), nullptr, 0, &param);
  if (UCS_PTR_IS_PTR(sent)) {
    to.under_way = true;
  } else if (UCS_PTR_IS_ERR(sent)) {
    // The other side would wait for the rank until its deadlines.
    to.peer->fail(LossCause::kTransport,
                  std::string("a rank's end could not be sent to it: ") + ucs_status_string(UCS_PTR_STATUS(sent)));
  }
}

void ControlChannel::on_gone_sent(void* request, ucs_status_t status, void* link) {
  GoneLink& of = *static_cast<GoneLink*>(link);
  of.under_way = false;
  if (status != UCS_OK) {
    of.peer->fail(LossCause::kTransport,
                  std::string("a rank's end could not be sent to it: ") + ucs_status_string(status));
  }
  ucp_request_free(request);
}

bool ControlChannel::gone_told() const {
  return std::none_of(gone_links_.begin(), gone_links_.end(),
                      [](const GoneLink& link) { return link.under_way || link.waiting != 0; });
}

}  // namespace expertd::fabric
