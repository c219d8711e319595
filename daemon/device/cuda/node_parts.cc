// SPDX-License-Identifier: Apache-2.0
// Parts of groups over several nodes as the loop drives them (node_chain.h has the chain).
#include <algorithm>
#include <string>

#include "daemon/base/clock.h"
#include "daemon/device/cuda/host_word.h"
#include "daemon/device/cuda/node_chain.h"
#include "daemon/engine/fabric_port.h"
#include "proto/abi/expertd_reason.h"

namespace expertd::device::cuda {

namespace {

/// A part that exchanges with other nodes is looked at without naps for so long: what it waits for is the loop's work.
constexpr uint64_t kSpinNs = 100'000'000;

bool routes(const kernels::OpShape& shape) {
  return (shape.kind == kernels::OpKind::kDispatch || shape.kind == kernels::OpKind::kLlDispatch) && shape.cached == 0;
}

}  // namespace

base::Status CudaDevice::allocate_nodes(const engine::GroupShape& shape, GroupEntry* entry) {
  if (shape.placement == nullptr) {
    return base::Status::ok();
  }
  if (entry->relay_ranks != 0) {
    return base::Status(EXPERTD_REASON_UNSUPPORTED,
                        std::string(shape.peer_access ? "" : "communication.use_nvlink = false: ") +
                            "a group over several nodes needs GPUs that reach each other on each of them");
  }
  auto nodes = NodeGroup::create(reach(false), &pool_, shape);
  if (!nodes.is_ok()) {
    return nodes.status();
  }
  entry->nodes = std::move(nodes).value();
  return base::Status::ok();
}

/// Takes the operation up: what the chain needs of it, and this node's notices. A rank whose request was refused, or
/// that is beside one, only tells the others.
bool CudaDevice::open_nodes(const engine::LaunchSpec& spec, Part* part) {
  NodeGroup& nodes = *part->group->nodes;
  nodes.spec = spec;
  nodes.notice_only = false;
  uint64_t local = 0;
  for (uint32_t rank = 0; rank < spec.ranks; ++rank) {
    const bool here = spec.placement->is_local(rank) && spec.active_ranks.contains(rank);
    local |= uint64_t{here ? 1U : 0U} << rank;
    nodes.notice_only = nodes.notice_only || (here && spec.request_of(rank)->rejected_reason != 0);
  }
  part->flag_ranks = local;
  if (spec.own->captured) {
    if (!nodes.notice_only && !open_capture(spec, part)) {
      return false;
    }
    nodes.notice_only = true;
    part->waits_doorbell = false;
    part->words.flag_page = nullptr;
  }
  engine::Request barrier = *spec.own;
  if (nodes.notice_only) {
    barrier.shape = {};
    barrier.shape.kind = kernels::OpKind::kBarrier;
    barrier.tensors = {};
    nodes.spec.own = &barrier;
  }
  nodes.params = {};
  const bool filled = fill_params(nodes.spec, part, &nodes.params);
  nodes.spec.own = spec.own;
  if (!filled) {
    return false;
  }
  kernels::OpShape& shape = nodes.params.op.shape;
  nodes.params.words.progress = &nodes.device_facts()->progress;
  nodes.op = NodeOp{};
  nodes.op.fabric = spec.fabric;
  nodes.op.placement = spec.placement;
  nodes.op.number = spec.group_op;
  nodes.op.rank = spec.rank;
  nodes.op.active = spec.active_ranks;
  nodes.op.view = spec.epoch;
  nodes.op.lane =
      spec.own->traffic == engine::Traffic::kLatency ? engine::FabricLane::kLatency : engine::FabricLane::kThroughput;
  nodes.op.message_bytes = nodes.message_bytes;
  nodes.op.params = &nodes.params.op;
  for (uint32_t rank = 0; rank < spec.ranks; ++rank) {
    if ((local >> rank & 1) != 0) {
      const uint32_t ints = routes(shape) ? nodes.row_ints : kernels::kCountRowErrorInts;
      nodes.notices[rank] = make_notice(*spec.request_of(rank), spec.active_ranks, ints);
    }
  }
  std::fill_n(nodes.row(spec.rank), nodes.row_ints, 0);
  nodes.restart();
  return true;
}

base::Status CudaDevice::share_host_memory(void* data, uint64_t bytes) {
  const ScopedContext context(driver_, gpu_.view.context);
  const CUresult registered =
      driver_.cuMemHostRegister(data, bytes, CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP);
  if (registered == CUDA_ERROR_OUT_OF_MEMORY) {
    return base::Status(EXPERTD_REASON_POOL_EXHAUSTED, "the host has no more memory to pin (see ulimit -l)");
  }
  EXPERTD_RETURN_IF_ERROR(driver_.check(registered, "cuMemHostRegister"));
  CUdeviceptr address = 0;
  EXPERTD_DRIVER_CALL(driver_, cuMemHostGetDevicePointer(&address, data, 0));
  if (address != reinterpret_cast<CUdeviceptr>(data)) {
    return base::Status(EXPERTD_REASON_UNSUPPORTED,
                        "GPU " + gpu_.uuid + " sees registered memory of the host at another address");
  }
  return base::Status::ok();
}

base::Result<std::unique_ptr<HeldMemory>> CudaDevice::create_fabric_memory(uint64_t bytes) {
  const std::lock_guard<std::mutex> lock(control_mutex_);
  const ScopedContext context(driver_, gpu_.view.context);
  Reach everybody = reach(true);
  everybody.adapters = true;
  auto memory = VmmMemory::create(everybody, bytes, &pool_);
  if (!memory.is_ok()) {
    return memory.status();
  }
  EXPERTD_RETURN_IF_ERROR(zero(*memory.value()));
  return std::unique_ptr<HeldMemory>(std::move(memory).value());
}

base::Status CudaDevice::copy_and_wait(void* to, const void* from, uint64_t bytes) {
  const std::lock_guard<std::mutex> lock(control_mutex_);
  const ScopedContext context(driver_, gpu_.view.context);
  EXPERTD_DRIVER_CALL(driver_, cuMemcpyAsync(reinterpret_cast<CUdeviceptr>(to), reinterpret_cast<CUdeviceptr>(from),
                                             bytes, control_stream_));
  EXPERTD_DRIVER_CALL(driver_, cuStreamSynchronize(control_stream_));
  return base::Status::ok();
}

/// One rank has one queue of messages and operations in several orders.
void CudaDevice::share_inboxes(GroupEntry* entry) {
  if (entry->nodes == nullptr) {
    return;
  }
  std::vector<NodeInbox*> inboxes{&entry->nodes->inbox};
  for (const std::unique_ptr<NodeLane>& lane : entry->node_lanes) {
    if (lane != nullptr) {
      inboxes.push_back(&lane->nodes->inbox);
    }
  }
  for (NodeInbox* inbox : inboxes) {
    inbox->share(inboxes, entry->shape.fabric, entry->shape.rank);
  }
}

bool CudaDevice::launch_nodes(const engine::LaunchSpec& spec, Part* part) {
  NodeGroup* nodes = part->group->nodes.get();
  part->page = part->group->sync_page(spec.page);
  if (nodes == nullptr || spec.fabric == nullptr || !open_nodes(spec, part)) {
    part->page = nullptr;
    fail_launch(part, EXPERTD_REASON_UNSUPPORTED);
    return true;
  }
  part->nodes = true;
  part->nodes_open = true;
  part->sms = sms_of(*part, nodes->params);
  part->entries = kEntriesPerPart;
  part->session->queued_entries += part->entries;
  part->session->open_part = part->id;
  ++ht_open_;
  ht_spin_until_ns_ = part->launch_ns + kSpinNs;
  const ScopedContext context(driver_, gpu_.view.context);
  if (!NodeChain(*this, *part, part->group->nodes.get(), part->session->stream).begin()) {
    part->chain_broken = true;
    fail_launch(part, EXPERTD_REASON_CUDA);
  }
  return true;
}

/// Goes on with the chain; a part that is not to run ends with the Reason that the notices gave.
void CudaDevice::advance_nodes(Part* part) {
  const ScopedContext context(driver_, gpu_.view.context);
  NodeChain chain(*this, *part, part->group->nodes.get(), part->session->stream);
  bool moved = false;
  const bool enqueued = chain.turn(&moved);
  if (moved) {
    ht_spin_until_ns_ = base::now_ns() + kSpinNs;
  }
  if (!enqueued) {
    part->chain_broken = true;
    fail_launch(part, EXPERTD_REASON_CUDA);
    return;
  }
  if (!chain.is_through()) {
    return;
  }
  const engine::Request& own = *part->group->nodes->spec.own;
  if (own.captured && part->group->nodes->report.reason == 0) {
    keep_capture(part, own.capture_lane);
  }
  if (part->group->nodes->report.reason != 0) {
    part->end_reason = part->group->nodes->report.reason;
    send_rescue(part);
    return;
  }
  part->session->open_part = 0;
  --ht_open_;
  part->nodes_open = false;
}

/// A part that ends before its chain is whole gets its end, once its kernels know of the abort: before that the end
/// would take it for a good one. True when it has it.
bool CudaDevice::close_nodes(Part* part) {
  if (!part->nodes_open) {
    return true;
  }
  if (!part->rescue_sent) {
    send_rescue(part);
  }
  if (load_word(host_facts(part->id)->rescued) != part->id) {
    return false;
  }
  const ScopedContext context(driver_, gpu_.view.context);
  part->nodes_open = false;
  part->session->open_part = 0;
  --ht_open_;
  part->chain_broken =
      !NodeChain(*this, *part, part->group->nodes.get(), part->session->stream).close() || part->chain_broken;
  return true;
}

/// Behind the last kernel of the part.
void CudaDevice::drop_nodes(const Part& part) {
  if (part.nodes && part.group->nodes->is_open()) {
    NodeChain(*this, part, part.group->nodes.get(), part.session->stream).drop();
  }
}

uint32_t CudaDevice::missing_nodes(const Part& part, uint64_t* ranks) const {
  const NodeChain chain(*this, part, part.group->nodes.get(), part.session->stream);
  if (part.group->nodes->stage == NodeGroup::Stage::kMoving) {
    *ranks = chain.missing_rows();
    *ranks |= *ranks == 0 ? chain.unmoved() : 0;
    return *ranks == 0 ? EXPERTD_MISSING_NONE : EXPERTD_MISSING_ROWS;
  }
  *ranks = part.group->nodes->is_open() ? chain.missing_counts() : 0;
  if (*ranks != 0) {
    return EXPERTD_MISSING_COUNTS;
  }
  *ranks = chain.unmoved();
  return *ranks == 0 ? EXPERTD_MISSING_NONE : EXPERTD_MISSING_ROWS;
}

}  // namespace expertd::device::cuda
