// SPDX-License-Identifier: Apache-2.0
// The capture lanes of a GPU's groups (capture_lane.h): who makes them, keeps operations in them, advances and ends
// them. create_lanes() and give_back_words() are of control threads under the device's mutex, the rest is the loop's.
#include <algorithm>
#include <atomic>
#include <bit>
#include <string>

#include "daemon/device/cuda/cuda_device.h"
#include "daemon/kernels/cuda/launch.h"
#include "proto/abi/ring_v1.h"

namespace expertd::device::cuda {

base::Status CudaDevice::create_lanes(GroupEntry* entry) {
  const uint32_t wanted = entry->shape.capture_lanes;
  if (wanted == 0) {
    return base::Status::ok();
  }
  const auto session = sessions_owned_.find(entry->shape.session.value);
  if (session == sessions_owned_.end()) {
    return base::Status(EXPERTD_REASON_NO_SUCH_SESSION, "the session of the rank is not open on the GPU");
  }
  uint32_t parked = static_cast<uint32_t>(sessions_owned_.size());
  for (const auto& [key, group] : groups_owned_) {
    parked += 2 * group->shape.capture_lanes;
  }
  if (parked + 2 * wanted > kMaxParkedStreams) {
    return base::Status(EXPERTD_REASON_GROUP_LIMIT, "capture_lanes = " + std::to_string(wanted) + ": GPU " + gpu_.uuid +
                                                        " has " + std::to_string(parked) + " of at most " +
                                                        std::to_string(kMaxParkedStreams) +
                                                        " armed streams (one per session, two per lane)");
  }
  for (uint32_t lane = 0; lane < wanted; ++lane) {
    const uint32_t words = static_cast<uint32_t>(std::countr_one(session->second->capture_words));
    if (words >= EXPERTD_CAPTURE_LANES_MAX) {
      give_back_words(*entry);
      return base::Status(EXPERTD_REASON_GROUP_LIMIT,
                          "the session has " + std::to_string(EXPERTD_CAPTURE_LANES_MAX) + " capture lanes already");
    }
    if (entry->shape.placement != nullptr) {
      if (const base::Status made = create_node_lane(session->second.get(), lane, words, entry); !made.is_ok()) {
        give_back_words(*entry);
        return made;
      }
      session->second->capture_words |= 1u << words;
      continue;
    }
    CaptureLane::Setup setup;
    setup.driver = &driver_;
    setup.view = gpu_.view;
    setup.group = entry;
    setup.lane = lane;
    setup.words = words;
    setup.flag_page = reinterpret_cast<void*>(session->second->flag_page->address());
    setup.rescue = rescue_stream_;
    setup.multiprocessors = gpu_.multiprocessors;
    setup.flushes = gpu_.can_flush_remote_writes;
    setup.awaits_by_kernel = awaits_by_kernel();
    auto created = CaptureLane::create(setup, &registry_->closer);
    if (!created.is_ok()) {
      give_back_words(*entry);
      return created.status();
    }
    entry->lanes[lane] = std::move(created).value();
    session->second->capture_words |= 1u << words;
  }
  return base::Status::ok();
}

void CudaDevice::give_back_words(const GroupEntry& entry) {
  const auto session = sessions_owned_.find(entry.shape.session.value);
  for (uint32_t lane = 0; lane < kMaxGroupLanes && session != sessions_owned_.end(); ++lane) {
    if (entry.lanes[lane] != nullptr) {
      session->second->capture_words &= ~(1u << entry.lanes[lane]->words());
    }
    if (entry.node_lanes[lane] != nullptr) {
      session->second->capture_words &= ~(1u << entry.node_lanes[lane]->words);
    }
  }
}

void CudaDevice::capture(const engine::LaunchSpec& spec, Part* part) {
  CaptureLane* lane = part->group != nullptr && spec.own->capture_lane < kMaxGroupLanes
                          ? part->group->lanes[spec.own->capture_lane].get()
                          : nullptr;
  // The parameters are those of an operation in the lane's pages; whose turn it is then, the arm knows.
  part->waits_doorbell = false;
  std::array<kernels::cuda::PartParams, kLanePages> params{};
  bool filled = lane != nullptr && spec.active_ranks == base::RankSet::first(spec.ranks);
  for (uint32_t page = 0; filled && page < kLanePages; ++page) {
    engine::LaunchSpec in_lane = spec;
    in_lane.page = lane_page(spec.own->capture_lane, page);
    filled = fill_params(in_lane, part, &params[page]) && part->low_latency;
    params[page].captured.number = spec.group_op;
    params[page].captured.blocks = spec.own->shape.kind == kernels::OpKind::kLlDispatch
                                       ? kernels::cuda::link_ll_dispatch_blocks(params[page])
                                       : kernels::cuda::link_ll_combine_blocks(params[page]);
  }
  if (!filled || lane->full()) {
    fail_launch(part, filled ? EXPERTD_REASON_HANDLE_LIMIT : EXPERTD_REASON_UNSUPPORTED);
    return;
  }
  part->page = nullptr;
  const ScopedContext context(driver_, gpu_.view.context);
  part->capture_entry = lane->add(*spec.own, params, &device_facts(part->id)->done, part->id);
  if (part->capture_entry == 0) {
    fail_launch(part, EXPERTD_REASON_CUDA);
    return;
  }
  part->capture_words = lane->words();
  host_facts(part->id)->verdict = kernels::cuda::kVerdictGo;
  host_facts(part->id)->report.rank = -1;
}

uint32_t CudaDevice::peers_broken(const GroupEntry& group, uint32_t lane, bool* all_detached) const {
  uint32_t reason = 0;
  *all_detached = true;
  for (uint32_t rank = 0; rank < group.shape.ranks; ++rank) {
    const bool elsewhere = group.shape.placement != nullptr && !group.shape.placement->is_local(rank);
    const Registry::GroupTable* table =
        rank == group.shape.rank || elsewhere
            ? nullptr
            : registry_->groups[group.shape.device_of(rank).value].load(std::memory_order_acquire);
    const GroupEntry* peer = table == nullptr ? nullptr : table->find(group.shape.id.value);
    if (peer == nullptr || (peer->lanes[lane] == nullptr && peer->node_lanes[lane] == nullptr)) {
      continue;
    }
    const CaptureLane::Shared& shared =
        peer->lanes[lane] != nullptr ? peer->lanes[lane]->shared() : peer->node_lanes[lane]->shared;
    const uint32_t broken = shared.broken.load(std::memory_order_acquire);
    reason = reason != 0 ? reason : broken;
    *all_detached = *all_detached && shared.detached.load(std::memory_order_acquire);
  }
  return reason;
}

bool CudaDevice::tend(uint64_t now_ns) {
  bool moved = false;
  bool capturing = false;
  node_lanes_ = false;
  groups_.for_each([&](GroupEntry* group) {
    for (uint32_t lane = 0; lane < kMaxGroupLanes && group->node_lanes[lane] != nullptr; ++lane) {
      capturing = true;
      node_lanes_ = true;
      bool detached = false;
      if (!healthy_.load(std::memory_order_relaxed)) {
        forget_node_lane(group->node_lanes[lane].get());
        continue;
      }
      moved |= tend_node_lane(group, group->node_lanes[lane].get(), now_ns, peers_broken(*group, lane, &detached));
    }
    for (uint32_t lane = 0; lane < kMaxGroupLanes && group->lanes[lane] != nullptr; ++lane) {
      capturing = true;
      bool detached = false;
      if (!healthy_.load(std::memory_order_relaxed)) {
        group->lanes[lane]->forget();
        continue;
      }
      moved |= group->lanes[lane]->tend(now_ns, peers_broken(*group, lane, &detached));
    }
  });
  capturing_ = capturing;
  if (capturing) {
    check_health();
  }
  return moved;
}

bool CudaDevice::next_replay(const engine::Request** request, engine::Outcome* outcome) {
  bool found = false;
  if (!capturing_) {
    return false;
  }
  groups_.for_each([&](GroupEntry* group) {
    for (uint32_t i = 0; !found && i < kMaxGroupLanes && group->node_lanes[i] != nullptr; ++i) {
      NodeLane& lane = *group->node_lanes[i];
      found = lane.ended_head != lane.ended_tail;
      if (found) {
        const EndedReplay& ended = lane.ended[lane.ended_head++ % lane.ended.size()];
        *request = ended.request;
        *outcome = ended.outcome;
      }
    }
    for (uint32_t lane = 0; !found && lane < kMaxGroupLanes && group->lanes[lane] != nullptr; ++lane) {
      EndedReplay ended;
      found = group->lanes[lane]->next_ended(&ended);
      if (found) {
        *request = ended.request;
        *outcome = ended.outcome;
      }
    }
  });
  return found;
}

bool CudaDevice::captured(const engine::Mapping* mapping) const {
  bool uses = false;
  groups_.for_each([&](const GroupEntry* group) {
    for (const std::unique_ptr<CaptureLane>& lane : group->lanes) {
      uses = uses || (lane != nullptr && lane->uses(mapping));
    }
    for (const std::unique_ptr<NodeLane>& lane : group->node_lanes) {
      uses = uses || (lane != nullptr && lane->uses(mapping));
    }
  });
  return uses;
}

bool CudaDevice::end_captures(base::SessionId session, base::GroupId id) {
  bool ended = true;
  groups_.for_each([&](GroupEntry* group) {
    if (!(group->shape.session == session) || (id.value != 0 && !(group->shape.id == id))) {
      return;
    }
    for (uint32_t lane = 0; lane < kMaxGroupLanes && group->node_lanes[lane] != nullptr; ++lane) {
      if (!healthy_.load(std::memory_order_relaxed)) {
        forget_node_lane(group->node_lanes[lane].get());
        continue;
      }
      bool detached = false;
      const bool rests = end_node_lane(group->node_lanes[lane].get());
      (void)peers_broken(*group, lane, &detached);
      ended = ended && rests && detached;
    }
    for (uint32_t lane = 0; lane < kMaxGroupLanes && group->lanes[lane] != nullptr; ++lane) {
      if (!healthy_.load(std::memory_order_relaxed)) {
        group->lanes[lane]->forget();
        continue;
      }
      bool detached = false;
      group->lanes[lane]->end();
      (void)peers_broken(*group, lane, &detached);
      ended = ended && group->lanes[lane]->ended() && detached;
    }
  });
  return ended;
}

}  // namespace expertd::device::cuda
