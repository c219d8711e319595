// SPDX-License-Identifier: Apache-2.0
// The capture lanes of groups over several nodes (node_lane.h): how a replay is taken, run and ended.
#include <algorithm>
#include <atomic>
#include <bit>
#include <string>

#include "daemon/base/clock.h"
#include "daemon/base/log.h"
#include "daemon/device/cuda/host_word.h"
#include "daemon/device/cuda/node_chain.h"
#include "daemon/device/cuda/node_lane.h"
#include "daemon/device/cuda/word_batch.h"
#include "daemon/kernels/cuda/launch.h"
#include "proto/abi/expertd_reason.h"
#include "proto/abi/ring_v1.h"

namespace expertd::device::cuda {

namespace {

using Stage = NodeLane::Stage;

/// A doorbell that holds what no wait lets through is overwritten after this time.
constexpr uint64_t kDrainPatienceNs = 1'000'000'000;
/// While a graph replays, the next one comes soon: the loop looks without naps for so long.
constexpr uint64_t kSpinNs = 20'000'000;

bool swap_doorbell(NodeLane* lane, CUstream rescue, uint64_t expected, uint64_t desired) {
  kernels::cuda::SwapParams params;
  params.word = lane->word(EXPERTD_CAPTURE_DOORBELL_OFFSET(lane->words));
  params.expected = expected;
  params.desired = desired;
  params.done = &lane->device_facts()->swapped;
  params.mark = lane->swaps + 1;
  if (launch_swap_word(params, rescue) != cudaSuccess) {
    return false;
  }
  ++lane->swaps;
  return true;
}

bool swapped(const NodeLane& lane) {
  return load_word(lane.facts()->swapped) == lane.swaps;
}

}  // namespace

NodeLane::~NodeLane() {
  if (stream != nullptr) {
    const ScopedContext context(*driver, view.context);
    driver->cuStreamDestroy(stream);
  }
}

bool NodeLane::uses(const engine::Mapping* mapping) const {
  const auto names = [mapping](const engine::Request& request) {
    return std::any_of(request.tensors.begin(), request.tensors.end(),
                       [mapping](const engine::TensorView& tensor) { return tensor.mapping == mapping; });
  };
  return !ending && ((pending != nullptr && names(pending->request)) ||
                     std::any_of(entries.begin(), entries.end(),
                                 [&](const std::unique_ptr<Entry>& entry) { return names(entry->request); }));
}

base::Status CudaDevice::create_node_lane(SessionEntry* session, uint32_t index, uint32_t words, GroupEntry* entry) {
  // Replays with two ranks on a node ended the daemon on the one machine that ran them: ranks waited for each other on
  // the stream of a session, of which a replay has none. That is repaired and has not run since.
  const std::vector<std::vector<uint32_t>>& ranks_of = entry->shape.placement->ranks_of;
  if (std::any_of(ranks_of.begin(), ranks_of.end(), [](const auto& ranks) { return ranks.size() > 1; })) {
    return base::Status(EXPERTD_REASON_UNSUPPORTED,
                        "capture_lanes = " + std::to_string(entry->shape.capture_lanes) +
                            ": a group over several nodes captures with one rank on each node alone; leave it 0, or "
                            "use one GPU of each node");
  }
  auto lane = std::make_unique<NodeLane>();
  lane->driver = &driver_;
  lane->view = gpu_.view;
  lane->lane = index;
  lane->words = words;
  lane->flag_page = reinterpret_cast<void*>(session->flag_page->address());
  auto nodes = NodeGroup::create(reach(false), &pool_, entry->shape);
  if (!nodes.is_ok()) {
    return nodes.status();
  }
  lane->nodes = std::move(nodes).value();
  lane->nodes->lane = index + 1;
  auto pinned = PinnedMemory::create(driver_, gpu_.view.context, sizeof(NodeLane::Pinned), &registry_->closer);
  if (!pinned.is_ok()) {
    return pinned.status().with_context("words of a capture lane");
  }
  lane->pinned = std::move(pinned).value();
  lane->entries.reserve(kernels::cuda::kMostCapturedEntries);
  int low = 0;
  int high = 0;
  EXPERTD_DRIVER_CALL(driver_, cuCtxGetStreamPriorityRange(&low, &high));
  EXPERTD_DRIVER_CALL(driver_, cuStreamCreateWithPriority(&lane->stream, CU_STREAM_NON_BLOCKING, high));
  EXPERTD_RETURN_IF_ERROR(warm_up(lane->stream));
  entry->node_lanes[index] = std::move(lane);
  return base::Status::ok();
}

/// A capture runs nothing now: the ranks agree on it as on a barrier, and then it is kept.
bool CudaDevice::open_capture(const engine::LaunchSpec& spec, Part* part) {
  NodeLane* lane =
      spec.own->capture_lane < kMaxGroupLanes ? part->group->node_lanes[spec.own->capture_lane].get() : nullptr;
  const bool all = spec.active_ranks == base::RankSet::first(spec.ranks);
  if (lane == nullptr || !all || lane->entries.size() >= kernels::cuda::kMostCapturedEntries) {
    return false;
  }
  auto entry = std::make_unique<NodeLane::Entry>();
  entry->request = *spec.own;
  entry->spec = spec;
  entry->spec.requests = {};
  entry->number = spec.group_op;
  entry->timeout_ns = spec.own->deadline_ns - std::min(spec.own->deadline_ns, spec.own->admit_ns);
  entry->notices.resize(spec.ranks);
  for (uint32_t page = 0; page < kLanePages; ++page) {
    engine::LaunchSpec in_lane = spec;
    in_lane.page = lane_page(spec.own->capture_lane, page);
    if (!fill_params(in_lane, part, &entry->params[page])) {
      return false;
    }
    entry->params[page].words.progress = &lane->nodes->device_facts()->progress;
  }
  const bool routes = entry->request.shape.kind == kernels::OpKind::kLlDispatch && entry->request.shape.cached == 0;
  for (uint32_t rank = 0; rank < spec.ranks; ++rank) {
    if (spec.request_of(rank) != nullptr) {
      const uint32_t ints = routes ? lane->nodes->row_ints : kernels::kCountRowErrorInts;
      entry->notices[rank] = make_notice(*spec.request_of(rank), spec.active_ranks, ints);
      entry->notices[rank].value = static_cast<int64_t>(entry->number);
    }
  }
  lane->pending = std::move(entry);
  return true;
}

/// The ranks agreed.
void CudaDevice::keep_capture(Part* part, uint32_t lane_index) {
  NodeLane& lane = *part->group->node_lanes[lane_index];
  lane.entries.push_back(std::move(lane.pending));
  part->capture_entry = static_cast<uint32_t>(lane.entries.size());
  part->capture_words = lane.words;
}

void CudaDevice::break_node_lane(NodeLane* lane, uint32_t reason) {
  if (lane->broken != 0) {
    return;
  }
  lane->broken = reason;
  lane->shared.broken.store(reason, std::memory_order_release);  // acquired by the loops of the other ranks
  if (!lane->ending) {
    base::log_warn("captured operations of the group end with a failure until it is left", {{"reason", reason}});
  }
}

bool CudaDevice::arm_node_lane(NodeLane* lane) {
  ++lane->arms;
  lane->stage = Stage::kArmed;
  lane->cancelling = false;
  lane->drain_since_ns = 0;
  const auto* doorbell = lane->word(EXPERTD_CAPTURE_DOORBELL_OFFSET(lane->words));
  return driver_.cuStreamWaitValue64(lane->stream, reinterpret_cast<CUdeviceptr>(doorbell), 1,
                                     CU_STREAM_WAIT_VALUE_GEQ) == CUDA_SUCCESS &&
         kernels::cuda::launch_take_doorbell(lane->word(EXPERTD_CAPTURE_DOORBELL_OFFSET(lane->words)),
                                             &lane->device_facts()->taken, lane->arms, lane->stream) == cudaSuccess;
}

/// The part of the replay that runs, for its chain.
CudaDevice::Part CudaDevice::part_of(const GroupEntry& group, const NodeLane& lane) const {
  Part part;
  part.id = lane.part;
  part.nodes = true;
  part.group_op = lane.number;
  part.rank = group.shape.rank;
  part.ranks = group.shape.ranks;
  part.active_ranks = (uint64_t{2} << (group.shape.ranks - 1)) - 1;
  for (uint32_t rank = 0; rank < part.ranks; ++rank) {
    part.flag_ranks |= uint64_t{group.shape.placement->is_local(rank) ? 1U : 0U} << rank;
  }
  part.group = const_cast<GroupEntry*>(&group);
  part.page = group.sync_page(lane_page(lane.lane, lane.number % kLanePages));
  return part;
}

/// The doorbell named an operation.
bool CudaDevice::start_replay(GroupEntry* group, NodeLane* lane, uint64_t entry, uint64_t now_ns) {
  const bool known = entry >= 1 && entry <= lane->entries.size();
  if (!known && lane->broken == 0) {
    break_node_lane(lane, EXPERTD_REASON_DESCRIPTOR_MALFORMED);
  }
  lane->running = known ? lane->entries[entry - 1].get() : nullptr;
  lane->part += kArms;
  ++lane->number;
  lane->begin_ns = now_ns;
  lane->closed = false;
  lane->stage = Stage::kRunning;
  if (lane->running == nullptr) {
    return release_replay(group, lane, true);
  }
  const NodeLane::Entry& taken = *lane->running;
  NodeGroup& nodes = *lane->nodes;
  const Part part = part_of(*group, *lane);
  lane->facts()->facts = {};
  nodes.spec = taken.spec;
  nodes.spec.own = &taken.request;
  nodes.params = taken.params[lane->number % kLanePages];
  kernels::cuda::PartWords& words = nodes.params.words;
  words.part = lane->part;
  words.group_op = lane->number;
  words.seq = 1;
  words.state = group->arm_states(lane->lane);
  words.facts = &lane->device_facts()->facts;
  words.completion = lane->word(EXPERTD_CAPTURE_COMPLETION_OFFSET(lane->words));
  words.result = lane->word(EXPERTD_CAPTURE_RESULT_OFFSET(lane->words));
  nodes.notices = taken.notices;
  nodes.notice_only = false;
  nodes.capture_number = taken.number;
  nodes.replays[lane->number % 2].store(taken.number, std::memory_order_release);
  nodes.op = NodeOp{};
  nodes.op.fabric = group->shape.fabric;
  nodes.op.placement = group->shape.placement;
  nodes.op.number = NodeInbox::in_order(nodes.lane, lane->number);
  nodes.op.rank = part.rank;
  nodes.op.active = base::RankSet(part.active_ranks);
  nodes.op.view = taken.spec.epoch;
  nodes.op.lane = engine::FabricLane::kLatency;
  nodes.op.message_bytes = nodes.message_bytes;
  nodes.op.params = &nodes.params.op;
  std::fill_n(nodes.row(part.rank), nodes.row_ints, 0);
  nodes.restart();
  // Its caller has rung, so that even an operation that fails at once may write its outputs.
  const bool marked =
      driver_.cuStreamWriteValue64(lane->stream, reinterpret_cast<CUdeviceptr>(&words.state->started_part), lane->part,
                                   CU_STREAM_WRITE_VALUE_DEFAULT) == CUDA_SUCCESS;
  if (lane->broken != 0) {
    return marked && abort_replay(group, lane);
  }
  return marked && NodeChain(*this, part, &nodes, lane->stream).begin();
}

/// What is under way ends without moving anything more; the outputs become those of a failure.
bool CudaDevice::abort_replay(GroupEntry* group, NodeLane* lane) {
  const Part part = part_of(*group, *lane);
  lane->stage = Stage::kAborting;
  WordBatch batch;
  batch.write(&lane->nodes->params.words.state->aborted_part, lane->part);
  for (uint32_t s = 0; s < part.ranks; ++s) {
    if (s != part.rank) {
      batch.write(&part.page->routed[s], EXPERTD_ABORT_WORD);
      batch.write(&part.page->moved[s], EXPERTD_ABORT_WORD);
    }
  }
  batch.write(&lane->device_facts()->aborted, lane->part);
  return batch.send(driver_, rescue_stream_);
}

/// Lets the graph of an operation that failed go on, and puts the words of the exchange as a normal end leaves them.
/// `tells`: its end has not done so.
bool CudaDevice::release_replay(GroupEntry* group, NodeLane* lane, bool tells) {
  const Part part = part_of(*group, *lane);
  lane->stage = Stage::kReleasing;
  WordBatch batch;
  for (uint32_t s = 0; s < part.ranks; ++s) {
    if (s != part.rank) {
      batch.write(&part.page->routed[s], lane->number);
      batch.write(&part.page->moved[s], lane->number);
    }
  }
  if (tells) {
    batch.write(lane->word(EXPERTD_CAPTURE_RESULT_OFFSET(lane->words)), lane->broken);
    batch.write(lane->word(EXPERTD_CAPTURE_COMPLETION_OFFSET(lane->words)), 1);
  }
  batch.write(&lane->device_facts()->released, lane->part);
  return batch.send(driver_, rescue_stream_);
}

void CudaDevice::note_replay(NodeLane* lane, uint64_t now_ns) const {
  if (lane->running == nullptr || lane->ended_tail - lane->ended_head >= lane->ended.size()) {
    return;
  }
  const kernels::cuda::PartFacts& facts = lane->facts()->facts;
  EndedReplay& replay = lane->ended[lane->ended_tail++ % lane->ended.size()];
  replay = {};
  replay.request = &lane->running->request;
  replay.outcome.launch_ns = lane->begin_ns;
  replay.outcome.start_ns = lane->begin_ns;
  replay.outcome.end_ns = now_ns;
  replay.outcome.executor = EXPERTD_COMPLETION_EXECUTOR_SM;
  replay.outcome.sms = gpu_.multiprocessors;
  if (lane->broken == 0) {
    replay.outcome.report = facts.report;
  } else {
    replay.outcome.report.reason = lane->broken;
  }
}

/// The replay that runs. False: the driver refused something.
bool CudaDevice::turn_replay(GroupEntry* group, NodeLane* lane, uint64_t now_ns, bool* moved) {
  const Part part = part_of(*group, *lane);
  NodeChain chain(*this, part, lane->nodes.get(), lane->stream);
  const bool done = load_word(lane->facts()->facts.done) == lane->part;
  if (lane->stage == Stage::kReleasing) {
    if (load_word(lane->facts()->released) == lane->part) {
      *moved = true;
      note_replay(lane, now_ns);
      return arm_node_lane(lane);
    }
    return true;
  }
  if (lane->stage == Stage::kAborting) {
    if (!lane->closed && load_word(lane->facts()->aborted) == lane->part) {
      *moved = true;
      lane->closed = true;
      return chain.close();  // not before, or the end would take the part for a good one
    }
    if (done) {
      *moved = true;
      chain.drop();
      // With that verdict its end had come before, and let the graph go on.
      return release_replay(group, lane, lane->facts()->facts.verdict != kernels::cuda::kVerdictGo);
    }
    return true;
  }
  if (done) {
    *moved = true;
    chain.drop();
    note_replay(lane, now_ns);
    return arm_node_lane(lane);
  }
  if (!lane->closed) {
    if (!chain.turn(moved)) {
      return false;
    }
    if (chain.is_through()) {
      const uint32_t reason = lane->nodes->report.reason;
      lane->closed = reason == 0;
      if (reason != 0) {
        break_node_lane(lane, reason);
      }
    }
  }
  if (lane->broken == 0 && now_ns - lane->begin_ns > lane->running->timeout_ns) {
    break_node_lane(lane, EXPERTD_REASON_TIMEOUT);
  }
  return lane->broken == 0 || abort_replay(group, lane);
}

/// The arm has been taken, or is to be taken back.
bool CudaDevice::turn_arm(GroupEntry* group, NodeLane* lane, uint64_t now_ns, bool* moved) {
  const uint64_t taken = load_word(lane->facts()->taken);
  if (taken >> 32 == lane->arms) {
    *moved = true;
    const uint64_t value = taken & 0xffffffffu;
    if (value != kernels::cuda::kTakenCancel) {
      ht_spin_until_ns_ = now_ns + kSpinNs;
      return start_replay(group, lane, value, now_ns);
    }
    lane->stage = Stage::kIdle;
    lane->gated = false;
    gpu_.view.gate->leave();
    return true;
  }
  if (!gpu_.view.gate->held() && !lane->ending) {
    return true;
  }
  lane->drain_since_ns = lane->drain_since_ns == 0 ? now_ns : lane->drain_since_ns;
  if (!lane->cancelling) {
    lane->cancelling = true;
    return swap_doorbell(lane, rescue_stream_, 0, EXPERTD_CAPTURE_CANCEL);
  }
  if (swapped(*lane) && now_ns - lane->drain_since_ns > kDrainPatienceNs) {
    lane->drain_since_ns = now_ns;
    WordBatch batch;
    batch.write(lane->word(EXPERTD_CAPTURE_DOORBELL_OFFSET(lane->words)), EXPERTD_CAPTURE_CANCEL);
    return batch.send(driver_, rescue_stream_);
  }
  return true;
}

bool CudaDevice::tend_node_lane(GroupEntry* group, NodeLane* lane, uint64_t now_ns, uint32_t peers_broken) {
  bool moved = false;
  bool good = true;
  const bool rests = lane->stage == Stage::kIdle;
  if (rests && (lane->entries.empty() || lane->ending)) {
    lane->shared.detached.store(lane->ending || lane->broken != 0, std::memory_order_release);
    return false;
  }
  const ScopedContext context(driver_, gpu_.view.context);
  const bool lost = group->shape.lost != nullptr && group->shape.lost->load(std::memory_order_seq_cst).any();
  if (peers_broken != 0 || lost) {
    break_node_lane(lane, peers_broken != 0 ? peers_broken : static_cast<uint32_t>(EXPERTD_REASON_PEER_LOST));
  }
  if (rests) {
    if (!gpu_.view.gate->held() && gpu_.view.gate->try_enter()) {
      lane->gated = true;
      lane->stage = Stage::kClearing;
      good = swap_doorbell(lane, rescue_stream_, EXPERTD_CAPTURE_CANCEL, 0);
      moved = true;
    }
  } else if (lane->stage == Stage::kClearing) {
    if (swapped(*lane)) {
      good = arm_node_lane(lane);
      moved = true;
    }
  } else if (lane->stage == Stage::kArmed) {
    good = turn_arm(group, lane, now_ns, &moved);
  } else {
    good = turn_replay(group, lane, now_ns, &moved);
  }
  if (!good) {
    break_node_lane(lane, EXPERTD_REASON_CUDA);
  }
  const bool detached = lane->broken != 0 && lane->stage != Stage::kRunning && lane->stage != Stage::kAborting;
  lane->shared.detached.store(detached, std::memory_order_release);  // acquired by the loops of the other ranks
  return moved;
}

/// The rank leaves; true when nothing of the lane is under way.
bool CudaDevice::end_node_lane(NodeLane* lane) {
  lane->ending = true;
  break_node_lane(lane, EXPERTD_REASON_PEER_LOST);
  return lane->stage == Stage::kIdle;
}

/// The context is lost: whatever there was is gone.
void CudaDevice::forget_node_lane(NodeLane* lane) {
  lane->ending = true;
  lane->stage = Stage::kIdle;
  if (lane->gated) {
    lane->gated = false;
    gpu_.view.gate->leave();
  }
  lane->shared.detached.store(true, std::memory_order_release);
}

}  // namespace expertd::device::cuda
