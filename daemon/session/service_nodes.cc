// SPDX-License-Identifier: Apache-2.0
// Groups over several nodes: what joins ask of the rendezvous, forming this node's part, and ranks and nodes that go.
// Answers of the rendezvous come from threads of others, which only leave them for the housekeeper.
#include <algorithm>
#include <random>

#include "daemon/base/clock.h"
#include "daemon/session/service.h"
#include "daemon/session/session.h"

namespace expertd::session {

namespace {

constexpr uint64_t kDefaultJoinNs = 60'000'000'000ULL;

const char* kind_of(const group::PlacedRank& rank) {
  return rank.facts.cuda ? "a GPU" : "a host device";
}

// The parts of a group tell each other's nodes their counts in ways of their own.
base::Status check_devices(const group::Placed& placed) {
  for (size_t rank = 1; rank < placed.ranks.size(); ++rank) {
    if (placed.ranks[rank].facts.cuda != placed.ranks[0].facts.cuda) {
      return base::Status(EXPERTD_REASON_UNSUPPORTED,
                          "rank " + std::to_string(rank) + " is on " + kind_of(placed.ranks[rank]) + " of node " +
                              placed.nodes[placed.ranks[rank].node].name + " and rank 0 on " +
                              kind_of(placed.ranks[0]) + ": a group has one kind of device");
    }
  }
  return base::Status::ok();
}

ErrorDetail check_rdma(const group::Formation& formation) {
  ErrorDetail error;
  if (!formation.config.communication.use_rdma) {
    error.field = "communication.use_rdma";
    error.value = "false";
    error.other_value = "true for ranks on " + std::to_string(formation.placed->nodes.size()) + " nodes";
    error.status = base::Status(EXPERTD_REASON_UNSUPPORTED,
                                "communication.use_rdma = false, but the ranks of group \"" + formation.name +
                                    "\" are on " + std::to_string(formation.placed->nodes.size()) +
                                    " nodes; join them on one node, or leave use_rdma at its default");
  }
  return error;
}

}  // namespace

void SessionService::use_nodes(group::RendezvousPort* rendezvous, GroupFabric* fabric) {
  rendezvous_ = rendezvous;
  fabric_ = fabric;
  views_.on_change([fabric] { fabric->views_changed(); });
}

uint64_t SessionService::random_attempt() {
  std::random_device device;
  const uint64_t attempt = uint64_t{device()} << 32 | device();
  return attempt == 0 ? 1 : attempt;
}

uint64_t SessionService::join_timeout_ns(const JoinRequest& request) {
  return request.timeout_ns != 0 ? request.timeout_ns : kDefaultJoinNs;
}

// Of this node; another node's are another configuration.
GroupConfig SessionService::with_defaults(GroupConfig config) const {
  if (config.first_op_timeout_ns == 0) {
    config.first_op_timeout_ns = config.op_timeout_ns != 0 ? config.op_timeout_ns : options_.first_op_timeout_ns;
  }
  config.op_timeout_ns = config.op_timeout_ns != 0 ? config.op_timeout_ns : options_.op_timeout_ns;
  return config;
}

void SessionService::ask_rendezvous(const JoinRequest& request, uint64_t attempt, const device::DeviceInfo& info) {
  group::RankJoin join;
  join.group = request.name;
  join.rank = request.rank;
  join.config = with_defaults(request.config);
  join.facts = {info.is_cuda, info.mps_active, info.kernels == "bulk"};
  join.attempt = attempt;
  join.timeout_ns = std::min(join_timeout_ns(request), group::kMaxJoinNs);
  rendezvous_->join_rank(join, [this, name = request.name, rank = request.rank, attempt](
                                   const ErrorDetail& error, const std::shared_ptr<const group::Placed>& placed) {
    join_placed(name, rank, attempt, error, placed);
  });
}

void SessionService::join_placed(const std::string& name, uint32_t rank, uint64_t attempt, const ErrorDetail& error,
                                 const std::shared_ptr<const group::Placed>& placed) {
  if (!error.status.is_ok()) {
    for (const group::Member& member : directory_.take(name, rank, attempt)) {
      member.done(error, {});
    }
    return;
  }
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!housekeeper_ended_) {
      placements_.push_back({name, rank, attempt, placed});
      housekeeper_signal_.notify_all();
      return;
    }
  }
  refuse_placed({name, rank, attempt, placed});
}

// The daemon ends: nothing is formed any more.
void SessionService::refuse_placed(const Placement& placement) {
  ErrorDetail error;
  error.status = base::Status(EXPERTD_REASON_DRAINING);
  for (const group::Member& member : directory_.take(placement.name, placement.rank, placement.attempt)) {
    member.done(error, {});
  }
}

void SessionService::answer_rest() {
  std::deque<Placement> placements;
  std::deque<Formed> formed;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    housekeeper_ended_ = true;
    placements.swap(placements_);
    formed.swap(formed_);
  }
  std::for_each(placements.begin(), placements.end(), [this](const Placement& placement) { refuse_placed(placement); });
  for (Formed& done : formed) {
    answer_formation(std::move(done));
  }
}

void SessionService::place(const Placement& placement) {
  if (placement.attempt == 0) {
    place_successor(placement.placed);
    return;
  }
  std::unique_ptr<group::Formation> formation;
  directory_.placed(placement.name, placement.rank, placement.attempt, fabric_->node_id(), placement.placed,
                    &formation);
  if (formation != nullptr) {
    form_group(std::move(formation));
  }
}

ErrorDetail SessionService::open_fabric(const group::Formation& formation) {
  ErrorDetail error = check_rdma(formation);
  if (error.status.is_ok()) {
    error.status = open_port(formation);
  }
  return error;
}

base::Status SessionService::open_port(const group::Formation& formation) {
  EXPERTD_RETURN_IF_ERROR(check_devices(*formation.placed));
  const uint64_t deadline_ns = base::now_ns() + formation.placed->form_timeout_ns;
  base::Result<std::shared_ptr<engine::FabricPort>> port =
      fabric_->open(*formation.placed, formation.shared->settings(), deadline_ns);
  if (!port.is_ok()) {
    return port.status();
  }
  formation.shared->set_fabric(std::move(port).value());
  std::vector<uint64_t> node_ids;
  for (const group::NodeIdentity& node : formation.placed->nodes) {
    node_ids.push_back(node.id);
  }
  views_.add(formation.shared, std::move(node_ids));
  return base::Status::ok();
}

// The members are answered when all nodes have formed their parts, for until then no operation may begin.
void SessionService::report_formed(Formed formed) {
  group::FormedReport report;
  report.key = formed.formation->placed->key;
  report.status = formed.error.status;
  report.rank = formed.error.rank;
  auto shared = std::make_shared<Formed>(std::move(formed));
  rendezvous_->report_formed(report, [this, shared](const ErrorDetail& error) {
    if (shared->error.status.is_ok()) {
      shared->error = error;
    }
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!housekeeper_ended_) {
        formed_.push_back(std::move(*shared));
        housekeeper_signal_.notify_all();
        return;
      }
    }
    answer_formation(std::move(*shared));
  });
}

void SessionService::tell_gone(const engine::GroupShared& group, uint32_t rank) {
  if (group.settings().fabric != nullptr) {
    group.settings().fabric->tell_gone(rank, group.released_through(rank));
  }
  if (group.settings().group_key != 0) {
    rendezvous_->report_gone(group.settings().group_key, {rank});
    views_.rank_gone(group.settings().group_key, rank);
    note_gone(group.settings().group_key, {rank});
  }
}

// Others of the group go on: nothing may wait for a rank that takes nothing any more.
void SessionService::forget(const engine::GroupShared& group, uint32_t rank) {
  if (group.settings().fabric != nullptr) {
    group.settings().fabric->forget(rank);
  }
}

void SessionService::remote_rank_gone(uint64_t group_key, uint32_t rank, uint64_t through) {
  for (const auto& [shared, placed] : directory_.spanning()) {
    if (shared->settings().group_key == group_key && rank < shared->ranks() && !shared->is_local(rank)) {
      shared->set_lost(rank, through);
      wake_group(*shared);
    }
  }
  note_gone(group_key, {rank});
  views_.rank_gone(group_key, rank);  // also of one whose ranks of this node have all left
}

void SessionService::node_lost(uint64_t node_id) {
  for (const auto& [shared, placed] : directory_.spanning()) {
    std::vector<uint32_t> gone;
    for (uint32_t rank = 0; rank < shared->ranks(); ++rank) {
      if (placed->nodes[placed->ranks[rank].node].id == node_id && !shared->is_local(rank)) {
        shared->set_lost(rank);
        gone.push_back(rank);
      }
    }
    wake_group(*shared);
    if (!gone.empty()) {
      rendezvous_->report_gone(shared->settings().group_key, gone);
      note_gone(shared->settings().group_key, gone);
    }
  }
  views_.node_lost(node_id);
}

}  // namespace expertd::session
