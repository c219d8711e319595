// SPDX-License-Identifier: Apache-2.0
#include "daemon/fabric/peer.h"

#include <cstdio>
#include <utility>

namespace expertd::fabric {

std::string hex(uint64_t value) {
  std::array<char, 17> text{};
  std::snprintf(text.data(), text.size(), "%016llx", static_cast<unsigned long long>(value));
  return text.data();
}

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

Peer::Peer(const NodeIdentity& identity, ConnectionId connection, const Rails& rails, const Setting& setting,
           uint64_t now_ns)
    : node_id_(identity.node_id),
      name_(identity.name),
      connection_(connection),
      setting_(setting),
      heartbeat_(setting.heartbeat, now_ns),
      endpoints_(LaneKind::kControl, rails, this) {
  for (Signal& signal : signals_) {
    signal.peer = this;
  }
}

base::Result<std::unique_ptr<Peer>> Peer::create(const NodeIdentity& identity, ConnectionId connection,
                                                 const Rails& rails, const Setting& setting, uint64_t now_ns) {
  std::unique_ptr<Peer> peer(new Peer(identity, connection, rails, setting, now_ns));
  const base::Status opened =
      peer->endpoints_.open(identity.addresses[static_cast<uint32_t>(LaneKind::kControl)], rails);
  if (!opened.is_ok()) {
    return opened.with_context("connecting to node \"" + identity.name + "\"");
  }
  return peer;
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
  endpoints_.close();
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
    const bool unanswered = heartbeat_.only_unanswered(now_ns);
    const uint64_t since_ns = unanswered ? heartbeat_.asked_ns() : heartbeat_.heard_ns();
    fail(heartbeat_.up() ? LossCause::kSilent : LossCause::kNeverAnswered,
         std::string(unanswered ? "no answer to pings" : "no sign of life") + " for " +
             std::to_string((now_ns - since_ns) / 1'000'000) + " ms");
  }
}

bool Peer::send(WireSignal signal, uint64_t sent_ns) {
  const ucp_ep_h ep = endpoint();
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
          .heard_ns = heartbeat_.heard_ns()};
}

}  // namespace expertd::fabric
