// SPDX-License-Identifier: Apache-2.0
#include "daemon/fabric/peer.h"

#include "daemon/fabric/ucx_status.h"

namespace expertd::fabric {

const char* loss_cause_name(LossCause cause) {
  switch (cause) {
    case LossCause::kTransport:
      return "transport";
    case LossCause::kSilent:
      return "silent";
    case LossCause::kNeverAnswered:
      return "never_answered";
    case LossCause::kGarbage:
      return "garbage";
    case LossCause::kLeft:
      return "left";
    case LossCause::kDisconnected:
      return "disconnected";
  }
  return "unknown";
}

// What goes by the latency lane is not many bytes, and waits for nobody's turn.
Peer::Peer(const NodeIdentity& identity, const Lanes& lanes, const Setting& setting, uint64_t now_ns)
    : node_id_(identity.node_id),
      name_(identity.name),
      setting_(setting),
      heartbeat_(setting.heartbeat, now_ns),
      shares_{ReceiveShare(UINT64_MAX),
              ReceiveShare(setting.window_bytes * lanes[static_cast<uint32_t>(LaneKind::kThroughput)].size())} {
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    endpoints_[lane].resize(lanes[lane].size());
  }
  for (Signal& signal : signals_) {
    signal.peer = this;
  }
}

base::Result<std::unique_ptr<Peer>> Peer::create(const NodeIdentity& identity, const Lanes& lanes,
                                                 const Setting& setting, uint64_t now_ns) {
  std::unique_ptr<Peer> peer(new Peer(identity, lanes, setting, now_ns));
  const base::Status opened = peer->open(identity, lanes);
  if (!opened.is_ok()) {
    // Endpoints that did open close by themselves; nothing was sent on them that names this object.
    peer->close_endpoints();
    for (std::vector<Endpoint>& rails : peer->endpoints_) {
      for (Endpoint& endpoint : rails) {
        if (endpoint.closing != nullptr) {
          ucp_request_free(endpoint.closing);
        }
      }
    }
    return opened.with_context("connecting to node \"" + identity.name + "\"");
  }
  return peer;
}

base::Status Peer::open(const NodeIdentity& identity, const Lanes& lanes) {
  for (uint32_t i = 0; i < kLanes; ++i) {
    for (uint32_t rail = 0; rail < endpoints_[i].size(); ++rail) {
      Endpoint& endpoint = endpoints_[i][rail];
      endpoint.peer = this;
      endpoint.lane = static_cast<LaneKind>(i);
      // Rail to rail where both sides have the same number of them, as nodes of one kind do.
      const std::vector<std::string>& addresses = identity.addresses[i];
      EXPERTD_RETURN_IF_ERROR(open(addresses[rail % addresses.size()], *lanes[i][rail], &endpoint));
    }
  }
  return base::Status::ok();
}

base::Status Peer::open(const std::string& address, const Lane& lane, Endpoint* endpoint) {
  ucp_ep_params_t params{};
  params.field_mask =
      UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE | UCP_EP_PARAM_FIELD_ERR_HANDLER;
  params.address = reinterpret_cast<const ucp_address_t*>(address.data());
  params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
  params.err_handler.cb = on_error;
  params.err_handler.arg = endpoint;
  return ucx_status(std::string("opening its ") + kLaneNames[static_cast<uint32_t>(endpoint->lane)] + " lane" +
                        (lane.devices().empty() ? "" : " by " + lane.devices()) +
                        " (both sides need a transport in common that notices a dead peer)",
                    ucp_ep_create(lane.worker(), &params, &endpoint->ep));
}

void Peer::on_error(void* endpoint, ucp_ep_h /*ep*/, ucs_status_t status) {
  const Endpoint& of = *static_cast<Endpoint*>(endpoint);
  of.peer->fail(LossCause::kTransport, std::string("its ") + kLaneNames[static_cast<uint32_t>(of.lane)] +
                                           " lane broke: " + ucs_status_string(status));
}

void Peer::fail(LossCause cause, std::string detail) {
  if (failed_) {
    return;
  }
  failed_ = true;
  cause_ = cause;
  detail_ = std::move(detail);
  *setting_.attention = true;
}

void Peer::lose() {
  state_ = PeerState::kLost;
  close_endpoints();
}

void Peer::close_endpoints() {
  for (std::vector<Endpoint>& rails : endpoints_) {
    for (Endpoint& endpoint : rails) {
      if (endpoint.ep == nullptr) {
        continue;
      }
      ucp_request_param_t param{};
      param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
      param.flags = UCP_EP_CLOSE_FLAG_FORCE;
      const ucs_status_ptr_t closing = ucp_ep_close_nbx(endpoint.ep, &param);
      endpoint.closing = UCS_PTR_IS_PTR(closing) ? closing : nullptr;
      endpoint.ep = nullptr;
    }
  }
}

bool Peer::closed() {
  bool all = lost() && signals_under_way_ == 0;
  for (std::vector<Endpoint>& rails : endpoints_) {
    for (Endpoint& endpoint : rails) {
      if (endpoint.closing != nullptr && ucp_request_check_status(endpoint.closing) != UCS_INPROGRESS) {
        ucp_request_free(endpoint.closing);
        endpoint.closing = nullptr;
      }
      all = all && endpoint.ep == nullptr && endpoint.closing == nullptr;
    }
  }
  return all;
}

bool Peer::heard(const WireHeartbeat& heartbeat, uint64_t now_ns) {
  if (lost() || failed_) {
    return false;
  }
  switch (static_cast<WireSignal>(heartbeat.signal)) {
    case kSignalPing:
      pong_due_ = true;
      pong_sent_ns_ = heartbeat.sent_ns;
      break;
    case kSignalPong:
      heartbeat_.answered(heartbeat.sent_ns, now_ns);
      break;
    case kSignalBye:
      fail(LossCause::kLeft, "it said that it stops");
      return false;
  }
  heartbeat_.heard(now_ns);
  const bool first = state_ == PeerState::kConnecting;
  state_ = PeerState::kUp;
  return first;
}

void Peer::tend(uint64_t now_ns) {
  if (lost() || failed_) {
    return;
  }
  if (pong_due_) {
    pong_due_ = false;
    (void)send(kSignalPong, pong_sent_ns_);
  }
  if (heartbeat_.take_due(now_ns)) {
    (void)send(kSignalPing, now_ns);
  }
  if (heartbeat_.silent_too_long(now_ns)) {
    const uint64_t silent_ms = (now_ns - heartbeat_.heard_ns()) / 1'000'000;
    fail(heartbeat_.up() ? LossCause::kSilent : LossCause::kNeverAnswered,
         "no sign of life for " + std::to_string(silent_ms) + " ms");
  }
}

bool Peer::send(WireSignal signal, uint64_t sent_ns) {
  const ucp_ep_h ep = endpoint(LaneKind::kControl);
  for (Signal& each : signals_) {
    if (each.under_way || ep == nullptr) {
      continue;
    }
    each.header.prefix.source_node = setting_.own_node_id;
    each.header.destination_node = node_id_;
    each.header.signal = signal;
    each.header.sent_ns = sent_ns;
    ucp_request_param_t param{};
    param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS;
    param.flags = UCP_AM_SEND_FLAG_EAGER;
    param.cb.send = on_signal_sent;
    param.user_data = &each;
    const ucs_status_ptr_t sent =
        ucp_am_send_nbx(ep, kWireHeartbeat, &each.header, sizeof(each.header), nullptr, 0, &param);
    if (UCS_PTR_IS_PTR(sent)) {
      each.under_way = true;
      ++signals_under_way_;
    }
    return !UCS_PTR_IS_ERR(sent);
  }
  return false;
}

// A heartbeat that could not be sent is missed by the other side; nothing else follows from it.
void Peer::on_signal_sent(void* request, ucs_status_t /*status*/, void* signal) {
  Signal& of = *static_cast<Signal*>(signal);
  of.under_way = false;
  --of.peer->signals_under_way_;
  ucp_request_free(request);
}

PeerSnapshot Peer::snapshot() const {
  return {.node_id = node_id_,
          .name = name_,
          .state = state_,
          .cause = cause_,
          .detail = detail_,
          .rtt_ns = heartbeat_.rtt_ns(),
          .heard_ns = heartbeat_.heard_ns(),
          .sends_failed = sends_failed_,
          .lanes = traffic_};
}

}  // namespace expertd::fabric
