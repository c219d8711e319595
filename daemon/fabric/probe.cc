// SPDX-License-Identifier: Apache-2.0
#include "daemon/fabric/probe.h"

#include <algorithm>
#include <string>
#include <utility>

#include "daemon/base/clock.h"

namespace expertd::fabric {

namespace {
constexpr uint32_t kLeastMessages = 2;  // with fewer there is no figure, whatever a run's time is
}  // namespace

ProbeSide::ProbeSide(uint64_t own_node, engine::FabricLane lane, LanePeer* peer, uint64_t probe, uint64_t deadline_ns)
    : lane_(lane), peer_(peer), own_node_(own_node), probe_(probe), deadline_ns_(deadline_ns) {
  ++peer_->users;  // the peer stays as long as this
}

bool ProbeSide::send(Sending* sending, const std::byte* payload) {
  WireProbe& header = sending->header;
  header.prefix.source_node = own_node_;
  header.destination_node = peer_->node_id();
  header.probe = probe_;
  header.lane = static_cast<uint32_t>(lane_);
  const ucp_ep_h ep = peer_->endpoint(sending->rail);
  if (ep == nullptr || peer_->failed()) {
    return false;
  }
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS |
                       UCP_OP_ATTR_FIELD_MEMORY_TYPE;
  param.flags = header.bytes <= kProbeEagerBytes ? UCP_AM_SEND_FLAG_EAGER : UCP_AM_SEND_FLAG_RNDV;
  param.memory_type = UCS_MEMORY_TYPE_HOST;
  param.cb.send = on_sent;
  param.user_data = sending;
  sending->under_way = true;
  const ucs_status_ptr_t sent = ucp_am_send_nbx(ep, kWireProbe, &header, sizeof(header), payload, header.bytes, &param);
  sending->under_way = UCS_PTR_IS_PTR(sent);
  if (UCS_PTR_IS_ERR(sent)) {
    fail_peer("a probe could not be sent", UCS_PTR_STATUS(sent));
    return false;
  }
  return true;
}

void ProbeSide::on_sent(void* request, ucs_status_t /*status*/, void* sending) {
  // One that failed has no answer, and its endpoint says why.
  static_cast<Sending*>(sending)->under_way = false;
  ucp_request_free(request);
}

void ProbeSide::fail_peer(const char* what, ucs_status_t status) {
  peer_->fail(LossCause::kTransport, std::string(what) + ": " + ucs_status_string(status));
}

ProbeAsker::ProbeAsker(uint64_t own_node, engine::FabricLane lane, LanePeer* peer, const ProbePlan& plan,
                       ProbeMemory payload, ProbeDone done)
    : ProbeSide(own_node, lane, peer, plan.probe, plan.deadline_ns),
      plan_(plan),
      payload_(std::move(payload)),
      done_(std::move(done)) {
  round_trips_ns_.reserve(kProbeMessagesMax);
  figures_.reserve(plan_.runs.size());
}

bool ProbeAsker::run_once(uint64_t now_ns) {
  if (ended_) {
    return false;
  }
  if (now_ns >= deadline_ns()) {
    (void)ask(kProbeEnd, 0);  // whose answer nobody waits for: the other side is free for the next one
    end(base::Status(EXPERTD_REASON_TIMEOUT,
                     "node \"" + peer_->name() + "\" did not answer every probe message in time"));
    return true;
  }
  bool moved = false;
  if (waiting_ == 0 && run_ < plan_.runs.size() && begun_ >= kLeastMessages &&
      (begun_ == run().messages || now_ns - begin_ns_ > run().limit_ns)) {
    finish_run();
    moved = true;
  }
  if (run_ == plan_.runs.size()) {
    if (begun_ == 0) {
      moved |= ask(kProbeEnd, 0);
    } else if (waiting_ == 0) {
      end(base::Status::ok());
      moved = true;
    }
    return moved;
  }
  return start_asks(now_ns) || moved;
}

bool ProbeAsker::start_asks(uint64_t now_ns) {
  if (begun_ == 0) {
    begin_ns_ = now_ns;
  }
  bool moved = false;
  while (begun_ < run().messages && waiting_ < run().window &&
         (begun_ < kLeastMessages || now_ns - begin_ns_ <= run().limit_ns) && ask(kProbeAsk, run().bytes)) {
    moved = true;
  }
  return moved;
}

bool ProbeAsker::ask(WireProbeSignal signal, uint32_t bytes) {
  for (Ask& each : asks_) {
    if (each.waits || each.sending.under_way) {
      continue;
    }
    WireProbe& header = each.sending.header;
    header.signal = signal;
    header.sequence = ++sequence_;
    header.bytes = bytes;
    each.sending.rail = signal == kProbeAsk ? run().rail : 0;
    each.sent_ns = base::now_ns();  // not the turn's: several asks of a turn begin one after the other
    if (!send(&each.sending, payload_.data())) {
      return false;
    }
    each.waits = true;
    ++waiting_;
    ++begun_;
    return true;
  }
  return false;
}

bool ProbeAsker::answered(const WireProbe& header, uint64_t now_ns) {
  for (Ask& each : asks_) {
    if (!each.waits || each.sending.header.sequence != header.sequence) {
      continue;
    }
    each.waits = false;
    --waiting_;
    if (first_ns_ == 0) {
      first_ns_ = now_ns;
    } else if (round_trips_ns_.size() < kProbeMessagesMax) {
      round_trips_ns_.push_back(now_ns - each.sent_ns);
    }
    last_ns_ = now_ns;
    return true;
  }
  return false;
}

void ProbeAsker::finish_run() {
  std::sort(round_trips_ns_.begin(), round_trips_ns_.end());
  const size_t count = round_trips_ns_.size();
  ProbeFigures figures{.lane = run().lane, .bytes = run().bytes, .rail = run().rail};
  if (count != 0) {
    figures.messages = static_cast<uint32_t>(count);
    figures.elapsed_ns = last_ns_ - first_ns_;
    figures.p50_ns = round_trips_ns_[count / 2];
    figures.p99_ns = round_trips_ns_[count * 99 / 100];
  }
  figures_.push_back(figures);
  round_trips_ns_.clear();
  first_ns_ = 0;
  begun_ = 0;
  ++run_;
}

void ProbeAsker::end(const base::Status& status) {
  if (!std::exchange(ended_, true)) {
    done_(status, figures_);
  }
}

bool ProbeAsker::drained() const {
  return ended_ && std::none_of(asks_.begin(), asks_.end(), [](const Ask& ask) { return ask.sending.under_way; });
}

ProbeAnswerer::ProbeAnswerer(uint64_t own_node, engine::FabricLane lane, LanePeer* peer, const ProbeOffer& offer,
                             ProbeMemory memory)
    : ProbeSide(own_node, lane, peer, offer.probe, offer.deadline_ns),
      bytes_max_(offer.bytes_max),
      memory_(std::move(memory)) {
  for (Slot& slot : slots_) {
    slot.of = this;
  }
}

bool ProbeAnswerer::asked(const WireProbe& header, const Incoming& message, bool* kept) {
  const bool right_size = header.signal == kProbeEnd ? header.bytes == 0 : header.bytes <= bytes_max_;
  if (!right_size || header.bytes != message.bytes || message.rendezvous != (header.bytes > kProbeEagerBytes)) {
    return false;
  }
  uint32_t unanswered = 0;
  Slot* free = nullptr;
  for (Slot& slot : slots_) {
    const bool waits = slot.stage != Stage::kFree && slot.stage != Stage::kAnswering;
    unanswered += waits && slot.sending.header.signal == kProbeAsk ? 1 : 0;
    free = slot.stage == Stage::kFree ? &slot : free;
  }
  if ((header.signal == kProbeAsk && unanswered >= kProbeWindow) || free == nullptr) {
    return false;
  }
  *kept = message.rendezvous;
  free->descriptor = message.rendezvous ? message.data : nullptr;
  free->stage = message.rendezvous ? Stage::kOffered : Stage::kReceived;
  free->worker = message.worker;
  free->status = UCS_OK;
  free->sending.header = header;
  free->sending.rail = message.rail;
  end_asked_ |= header.signal == kProbeEnd;
  return true;
}

bool ProbeAnswerer::run_once() {
  bool moved = false;
  for (Slot& slot : slots_) {
    if (slot.stage == Stage::kOffered) {
      receive(&slot);
      moved = true;
    }
    if (slot.stage == Stage::kReceived) {
      answer(&slot);
      moved = true;
    }
    if (slot.stage == Stage::kAnswering && !slot.sending.under_way) {
      slot.stage = Stage::kFree;
    }
  }
  if (end_asked_ && !ended_) {
    end();
    moved = true;
  }
  return moved;
}

void ProbeAnswerer::receive(Slot* slot) {
  if (ended_ || peer_->lost()) {
    let_go(slot);
    return;
  }
  const auto place = static_cast<size_t>(slot - slots_.data()) % kProbeWindow;
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_MEMORY_TYPE;
  param.memory_type = UCS_MEMORY_TYPE_HOST;
  param.cb.recv_am = on_received;
  param.user_data = slot;
  slot->stage = Stage::kReceiving;
  // Of two slots with one place the bytes may mix; nobody reads them.
  const ucs_status_ptr_t received = ucp_am_recv_data_nbx(
      slot->worker, slot->descriptor, memory_.data() + place * bytes_max_, slot->sending.header.bytes, &param);
  slot->descriptor = nullptr;
  if (!UCS_PTR_IS_PTR(received)) {
    slot->status = UCS_PTR_RAW_STATUS(received);
    slot->stage = Stage::kReceived;
  }
}

void ProbeAnswerer::on_received(void* request, ucs_status_t status, size_t /*bytes*/, void* slot) {
  Slot& of = *static_cast<Slot*>(slot);
  of.status = status;
  of.stage = Stage::kReceived;
  ucp_request_free(request);
}

void ProbeAnswerer::answer(Slot* slot) {
  slot->stage = Stage::kFree;
  if (slot->status != UCS_OK) {
    fail_peer("a probe of it could not be received", slot->status);
    return;
  }
  slot->sending.header = {.signal = kProbeAnswer, .sequence = slot->sending.header.sequence};
  if (!ended_ && !peer_->lost() && send(&slot->sending, nullptr)) {
    slot->stage = Stage::kAnswering;
  }
}

void ProbeAnswerer::let_go(Slot* slot) {
  ucp_am_data_release(slot->worker, slot->descriptor);
  slot->descriptor = nullptr;
  slot->stage = Stage::kFree;
}

void ProbeAnswerer::end() {
  ended_ = true;
  for (Slot& slot : slots_) {
    if (slot.stage == Stage::kOffered) {
      let_go(&slot);
    }
  }
}

bool ProbeAnswerer::drained() const {
  return ended_ && std::all_of(slots_.begin(), slots_.end(), [](const Slot& slot) {
           return slot.stage != Stage::kReceiving && slot.stage != Stage::kOffered && !slot.sending.under_way;
         });
}

}  // namespace expertd::fabric
