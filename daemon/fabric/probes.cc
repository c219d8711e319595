// SPDX-License-Identifier: Apache-2.0
// Which probe a message is of, how long probes live, and what LaneCore has to do with them.
#include <algorithm>
#include <cstring>
#include <utility>

#include "daemon/base/clock.h"
#include "daemon/fabric/lane_core.h"
#include "daemon/fabric/probe.h"

namespace expertd::fabric {

bool Probes::run_once(uint64_t now_ns) {
  bool moved = false;
  if (asker_ != nullptr) {
    moved |= asker_->run_once(now_ns);
  }
  if (answerer_ != nullptr) {
    moved |= answerer_->run_once();
    if (!answerer_->ended() && now_ns >= answerer_->deadline_ns()) {
      answerer_->end();
      moved = true;
    }
  }
  return retire() || moved;
}

bool Probes::retire() {
  bool moved = false;
  if (asker_ != nullptr && asker_->ended()) {
    ending_.push_back(std::move(asker_));
    moved = true;
  }
  if (answerer_ != nullptr && answerer_->ended()) {
    ending_.push_back(std::move(answerer_));
    moved = true;
  }
  const size_t before = ending_.size();
  std::erase_if(ending_, [](const std::unique_ptr<ProbeSide>& side) { return side->drained(); });
  return moved || ending_.size() != before;
}

bool Probes::incoming(const WireProbe& header, const Incoming& message, const LanePeer* from, bool* kept,
                      DropCause* cause, const char** detail) {
  *kept = false;
  *detail = nullptr;
  *cause = DropCause::kBadField;
  if (header.signal < kProbeAsk || header.signal > kProbeEnd) {
    *detail = "the signal of a probe";
    return false;
  }
  if (header.lane >= engine::kFabricLanes || lane_of(static_cast<engine::FabricLane>(header.lane)) != message.lane) {
    *detail = "the lane of a probe";
    return false;
  }
  const bool is_answer = header.signal == kProbeAnswer;
  const ProbeSide* side = is_answer ? static_cast<const ProbeSide*>(asker_.get()) : answerer_.get();
  if (side == nullptr || side->ended() || side->peer() != from || side->probe() != header.probe) {
    *cause = DropCause::kUnknownGroup;  // of somebody who has not heard that it ended
    return false;
  }
  if (is_answer) {
    if (message.bytes != 0 || header.bytes != 0 || !asker_->answered(header, base::now_ns())) {
      *detail = "an answer to a probe that was not asked";
      return false;
    }
    return true;
  }
  if (!answerer_->asked(header, message, kept)) {
    *cause = DropCause::kOverrun;
    *detail = "more, or larger, probe messages than agreed";
    return false;
  }
  return true;
}

void Probes::lose(const LanePeer* peer) {
  if (asker_ != nullptr && asker_->peer() == peer) {
    asker_->end(base::Status(EXPERTD_REASON_PEER_LOST, "node \"" + peer->name() + "\" was lost while it was measured"));
  }
  if (answerer_ != nullptr && answerer_->peer() == peer) {
    answerer_->end();
  }
  (void)retire();  // who was told of the end may begin the next one at once
}

void Probes::close(uint64_t probe) {
  if (answerer_ != nullptr && answerer_->probe() == probe) {
    answerer_->end();
  }
  (void)retire();
}

void Probes::end_all() {
  if (asker_ != nullptr) {
    asker_->end(base::Status(EXPERTD_REASON_CANCELLED, "this daemon stops"));
  }
  if (answerer_ != nullptr) {
    answerer_->end();
  }
}

uint64_t Probes::next_ns() const {
  uint64_t next_ns = UINT64_MAX;
  if (asker_ != nullptr) {
    next_ns = std::min(next_ns, asker_->deadline_ns());
  }
  if (answerer_ != nullptr) {
    next_ns = std::min(next_ns, answerer_->deadline_ns());
  }
  return next_ns;
}

base::Result<LanePeer*> LaneCore::peer_to_probe(uint64_t node_id) const {
  if (stopping_) {
    return base::Status(EXPERTD_REASON_CANCELLED, "this daemon stops");
  }
  if (probes_.busy()) {
    return base::Status(EXPERTD_REASON_BAD_STATE,
                        "another measurement is on at this node; try again when it has ended");
  }
  LanePeer* peer = find_peer(node_id);
  if (peer == nullptr || peer->lost() || peer->failed()) {
    return base::Status(EXPERTD_REASON_PEER_LOST, "the node to measure is not connected");
  }
  return peer;
}

base::Status LaneCore::open_probe(const ProbeOffer& offer, ProbeMemory memory) {
  const base::Result<LanePeer*> peer = peer_to_probe(offer.node_id);
  if (peer.is_ok()) {
    probes_.open(
        std::make_unique<ProbeAnswerer>(setting_.node_id, setting_.lane, peer.value(), offer, std::move(memory)));
  }
  return peer.status();
}

base::Status LaneCore::begin_probe(const ProbePlan& plan, ProbeMemory payload, ProbeDone done) {
  const bool has_rails =
      std::all_of(plan.runs.begin(), plan.runs.end(), [this](const ProbeRun& run) { return run.rail < rails_.size(); });
  if (!has_rails) {
    return base::Status(EXPERTD_REASON_ARGUMENT_RANGE, std::string("lane ") + kLaneNames[static_cast<size_t>(kind())] +
                                                           " has no such rail to measure, only " +
                                                           std::to_string(rails_.size()));
  }
  const base::Result<LanePeer*> peer = peer_to_probe(plan.node_id);
  if (peer.is_ok()) {
    probes_.begin(std::make_unique<ProbeAsker>(setting_.node_id, setting_.lane, peer.value(), plan, std::move(payload),
                                               std::move(done)));
  }
  return peer.status();
}

bool LaneCore::take_probe(const Incoming& message, LanePeer* from) {
  WireProbe header;
  if (!read_header(message, &header)) {
    return drop(DropCause::kMalformed, from, "the header's size");
  }
  if (header.destination_node != setting_.node_id) {
    return drop(DropCause::kUnknownNode);
  }
  Incoming by_rail = message;
  const auto rail = std::find_if(rails_.begin(), rails_.end(),
                                 [&](const std::unique_ptr<Lane>& each) { return each->worker() == message.worker; });
  by_rail.rail = rail == rails_.end() ? 0 : static_cast<uint32_t>(rail - rails_.begin());
  bool kept = false;
  DropCause cause = DropCause::kBadField;
  const char* detail = nullptr;
  if (!probes_.incoming(header, by_rail, from, &kept, &cause, &detail)) {
    return detail == nullptr ? drop(cause) : drop(cause, from, detail);
  }
  return kept;
}

}  // namespace expertd::fabric
