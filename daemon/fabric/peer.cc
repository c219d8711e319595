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

Peer::Peer(const NodeIdentity& identity, const Setting& setting, uint64_t now_ns)
    : node_id_(identity.node_id), name_(identity.name), setting_(setting), heartbeat_(setting.heartbeat, now_ns) {
  for (Signal& signal : signals_) {
    signal.peer = this;
  }
}

base::Result<std::unique_ptr<Peer>> Peer::create(const NodeIdentity& identity, const Lanes& lanes,
                                                 const Setting& setting, uint64_t now_ns) {
  std::unique_ptr<Peer> peer(new Peer(identity, setting, now_ns));
  const base::Status opened = peer->open(identity, lanes);
  if (!opened.is_ok()) {
    // Endpoints that did open close by themselves; nothing was sent on them that names this object.
    for (Endpoint& endpoint : peer->endpoints_) {
      if (endpoint.ep != nullptr) {
        ucp_request_param_t param{};
        param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
        param.flags = UCP_EP_CLOSE_FLAG_FORCE;
        const ucs_status_ptr_t closing = ucp_ep_close_nbx(endpoint.ep, &param);
        if (UCS_PTR_IS_PTR(closing)) {
          ucp_request_free(closing);
        }
      }
    }
    return opened.with_context("connecting to node \"" + identity.name + "\"");
  }
  return peer;
}

base::Status Peer::open(const NodeIdentity& identity, const Lanes& lanes) {
  for (uint32_t i = 0; i < kLanes; ++i) {
    Endpoint& endpoint = endpoints_[i];
    endpoint.peer = this;
    endpoint.lane = static_cast<LaneKind>(i);
    ucp_ep_params_t params{};
    params.field_mask =
        UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE | UCP_EP_PARAM_FIELD_ERR_HANDLER;
    params.address = reinterpret_cast<const ucp_address_t*>(identity.addresses[i].data());
    params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
    params.err_handler.cb = on_error;
    params.err_handler.arg = &endpoint;
    EXPERTD_RETURN_IF_ERROR(ucx_status(std::string("opening its ") + kLaneNames[i] +
                                           " lane (both sides need a transport in common that notices a dead peer)",
                                       ucp_ep_create(lanes[i]->worker(), &params, &endpoint.ep)));
  }
  return base::Status::ok();
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
  for (Endpoint& endpoint : endpoints_) {
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

bool Peer::closed() {
  bool all = lost() && signals_under_way_ == 0;
  for (Endpoint& endpoint : endpoints_) {
    if (endpoint.closing != nullptr && ucp_request_check_status(endpoint.closing) != UCS_INPROGRESS) {
      ucp_request_free(endpoint.closing);
      endpoint.closing = nullptr;
    }
    all = all && endpoint.ep == nullptr && endpoint.closing == nullptr;
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
