// SPDX-License-Identifier: Apache-2.0
// The chain of one part, all of it enqueued by launch() on the session's armed stream:
//
//   wait doorbell[slot] >= seq                          (unless the doorbell has rung; under MPS by a kernel of one
//                                                        thread where one kernel does the operation: doorbell.cu)
//   dispatch: route_count, route_scan, signal(routed), route_number      others: signal(routed)
//     with a relay the signal comes last, behind route_number (combine: relay_plan) and relay_publish
//   wait routed[s] >= n for every other active rank s   (own device's page)
//   plan, dispatch_move (and relay_move) or combine_pull, signal(moved)  (not for a barrier)
//   wait moved[s] >= n for every other active rank s
//   finish: tails, report, result word, completion word, `done`
//
// Where the link kernels serve the operation, one kernel does all of that and waits for the flags itself as long as the
// ranks are together (exchange_steps.cuh); what stands behind the stream's waits is there for ranks that are late:
//
//   wait doorbell
//   link_dispatch or link_combine       (announces and waits for routed, moves, announces and waits for moved, ends)
//   wait routed; the same kernel        (only if the first one did not wait that long)
//   wait moved; finish                  (the end if nobody wrote it yet; `done` in any case)
//
// Where the low latency kernels serve the operation, one kernel does all of it, standing there once per wait:
//
//   wait doorbell
//   link_ll_dispatch      (routes, sends, announces and waits for moved, expands, ends)
//   wait moved; the same  (what blocks of the first one left; `done` in any case)
// or
//   link_ll_combine       (routed, sums for the others, moved, sums its own, adds, ends)
//   wait routed; the same
//   wait moved; the same  (the same for the last exchange; `done` in any case)
//
// A barrier is one kernel, wait routed, finish; of a rank alone, the kernel.
//
// Order and visibility. (1) Inputs: a rank signals routed behind its doorbell, so a peer that saw the flag may read
// that rank's inputs and write its outputs. (2) Rows and count rows: in the generic chain the storing kernels end with
// a system-scope fence in every thread and the signal kernel, later in the stream, stores its flag with release at
// system scope; a link kernel fences once per block, behind a barrier, and its last block stores the flag. NVLink
// stores are acknowledged by the peer's L2 before the fence passes, so the flag cannot overtake the data. (3) A stream
// wait is no acquire by itself; it orders by starting later kernels only after the word was seen in the waiting GPU's
// own memory, and a kernel starts with an invalid L1. Where the device can flush remote writes (stores that arrive over
// PCIe without acknowledgement) the exchange waits ask for it. (4) All parts of one group on a device run on one
// session's stream, so scratch and handles need no pages; count rows and flags, which peers write, have kExchangePages.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <limits>

#include "daemon/device/cuda/cuda_device.h"
#include "daemon/kernels/cuda/launch.h"
#include "proto/abi/ring_v1.h"

namespace expertd::device::cuda {
namespace {

using engine::LaunchSpec;
using engine::Request;
using engine::TensorView;
using kernels::OpKind;
using kernels::OpShape;
using kernels::cuda::PartParams;
using kernels::cuda::SignalStep;

/// The tensors of one request as one device sees them. A tensor that was given but has no address there clears `ok`:
/// its null base plus an offset would be a pointer that faults.
struct TensorReader {
  const Request& request;
  base::DeviceIndex device;
  bool ok = true;

  template <typename T>
  T* at(uint32_t tensor) {
    const TensorView& view = request.tensors[tensor];
    if (view.mapping == nullptr) {
      return nullptr;
    }
    if (view.mapping->base[device.value] == nullptr) {
      ok = false;
      return nullptr;
    }
    return static_cast<T*>(view.on(device));
  }

  /// Bytes from the tensor's start to the end of its mapping.
  uint64_t bytes_behind(uint32_t tensor) const {
    const TensorView& view = request.tensors[tensor];
    return view.mapping == nullptr || view.offset > view.mapping->bytes ? 0 : view.mapping->bytes - view.offset;
  }
};

bool is_low_latency(const OpShape& shape) {
  return shape.kind == OpKind::kLlDispatch || shape.kind == OpKind::kLlCombine;
}

bool is_dispatch(const OpShape& shape) {
  return shape.kind == OpKind::kDispatch || shape.kind == OpKind::kLlDispatch;
}

uint32_t usable_rows(uint64_t rows) {
  return static_cast<uint32_t>(std::min<uint64_t>(rows, std::numeric_limits<int32_t>::max()));
}

void fill_inputs(TensorReader* tensors, kernels::OpInputs* in) {
  in->x = tensors->at<const void>(EXPERTD_IN_X);
  in->topk_idx = tensors->at<const void>(EXPERTD_IN_TOPK_IDX);
  in->topk_weights = tensors->at<const float>(EXPERTD_IN_TOPK_WEIGHTS);
  in->side = tensors->at<const void>(EXPERTD_IN_SIDE);
  in->bias0 = tensors->at<const void>(EXPERTD_IN_BIAS0);
  in->bias1 = tensors->at<const void>(EXPERTD_IN_BIAS1);
  in->token_rank_mask = tensors->at<const uint8_t>(EXPERTD_IN_TOKEN_RANK_MASK);
}

void fill_outputs(TensorReader* tensors, kernels::OpOutputs* out) {
  out->x = tensors->at<void>(EXPERTD_OUT_X);
  out->side = tensors->at<void>(EXPERTD_OUT_SIDE);
  out->topk_idx = tensors->at<void>(EXPERTD_OUT_TOPK_IDX);
  out->topk_weights = tensors->at<float>(EXPERTD_OUT_TOPK_WEIGHTS);
  out->expert_counts = tensors->at<int32_t>(EXPERTD_OUT_EXPERT_COUNTS);
  out->rank_prefix = tensors->at<int32_t>(EXPERTD_OUT_RANK_PREFIX);
  out->src_info = tensors->at<int32_t>(EXPERTD_OUT_SRC_INFO);
  out->layout_range = tensors->at<int64_t>(EXPERTD_OUT_LAYOUT_RANGE);
  out->stats = tensors->at<int32_t>(EXPERTD_OUT_STATS);
  out->wait_stats = tensors->at<int64_t>(EXPERTD_OUT_WAIT_STATS);
  out->token_rank_mask = tensors->at<uint8_t>(EXPERTD_OUT_TOKEN_RANK_MASK);
}

/// What a peer published in its relay, by the kind of the operation.
void fill_relay(const OpShape& shape, const Request& request, kernels::cuda::RelayPeer* relay) {
  const bool dispatch = is_dispatch(shape);
  relay->tokens = dispatch ? request.shape.tokens : 0;
  relay->side_elements =
      dispatch && request.tensors[EXPERTD_IN_SIDE].mapping != nullptr ? request.shape.side_elements : 0;
  relay->has_weights = shape.kind != OpKind::kLlCombine && request.tensors[EXPERTD_IN_TOPK_WEIGHTS].mapping != nullptr;
}

/// Rows of a combine that a rank gave: what it states, and no more than its mapping holds.
uint32_t rows_given(const OpShape& shape, const TensorReader& tensors) {
  const uint64_t stated = is_low_latency(shape) ? uint64_t{shape.local_experts} * shape.slots_per_expert
                                                : tensors.request.shape.capacity_rows;
  const uint64_t mapped = shape.hidden == 0 ? 0 : tensors.bytes_behind(EXPERTD_IN_X) / (2ull * shape.hidden);
  return usable_rows(std::min(stated, mapped));
}

bool is_combine(const OpShape& shape) {
  return shape.kind == OpKind::kCombine || shape.kind == OpKind::kLlCombine;
}

/// What a peer lets this device touch, by the kind of the operation.
void fill_view(const OpShape& shape, TensorReader* tensors, kernels::PeerView* view) {
  if (is_combine(shape)) {
    view->in_x = tensors->at<const void>(EXPERTD_IN_X);
    view->in_topk_weights =
        shape.kind == OpKind::kCombine ? tensors->at<const float>(EXPERTD_IN_TOPK_WEIGHTS) : nullptr;
    view->in_rows = rows_given(shape, *tensors);
  } else if (is_dispatch(shape)) {
    view->out_x = tensors->at<void>(EXPERTD_OUT_X);
    view->out_side = tensors->at<void>(EXPERTD_OUT_SIDE);
    view->out_topk_idx = tensors->at<void>(EXPERTD_OUT_TOPK_IDX);
    view->out_topk_weights = tensors->at<float>(EXPERTD_OUT_TOPK_WEIGHTS);
    view->out_src_info = tensors->at<int32_t>(EXPERTD_OUT_SRC_INFO);
    view->capacity_rows = usable_rows(tensors->request.shape.capacity_rows);
  }
}

uint64_t* word_at(void* flag_page, uint64_t offset) {
  return flag_page == nullptr ? nullptr : reinterpret_cast<uint64_t*>(static_cast<char*>(flag_page) + offset);
}

bool is_active(uint64_t mask, uint32_t rank) {
  return ((mask >> rank) & 1) != 0;
}

}  // namespace

const GroupEntry* CudaDevice::find_peer(const LaunchSpec& spec, uint32_t rank) const {
  if (!spec.is_local(rank)) {
    return nullptr;
  }
  const uint32_t device = spec.devices[spec.place_of(rank)].value;
  // Pairs with the release in start(): the peer's tables are complete.
  const Registry::GroupTable* table =
      device < base::kMaxDevices ? registry_->groups[device].load(std::memory_order_acquire) : nullptr;
  return table == nullptr ? nullptr : table->find(spec.group.value);
}

bool CudaDevice::fill_peers(const LaunchSpec& spec, const Part& part, PartParams* params) const {
  for (uint32_t j = 0; j < spec.ranks; ++j) {
    if (!is_active(part.flag_ranks, j)) {
      continue;  // takes no part, or has no memory on this node
    }
    const GroupEntry* group = find_peer(spec, j);
    if (group == nullptr || spec.request_of(j) == nullptr || group->shape.rank != j) {
      return false;
    }
    if (is_active(part.group->relay_ranks, j)) {
      params->relay.ranks |= uint64_t{1} << j;
      params->relay.peers[j].base = group->relay();
      fill_relay(params->op.shape, *spec.request_of(j), &params->relay.peers[j]);
      params->peers.views[j].capacity_rows = usable_rows(spec.request_of(j)->shape.capacity_rows);
      if (is_combine(params->op.shape)) {
        params->peers.views[j].in_rows = rows_given(params->op.shape, {*spec.request_of(j), gpu_.view.index});
      }
    } else {
      TensorReader tensors{*spec.request_of(j), gpu_.view.index};
      fill_view(params->op.shape, &tensors, &params->peers.views[j]);
      if (!tensors.ok) {
        return false;
      }
    }
    params->peers.views[j].counts = group->counts(spec.page);
    params->peers.pages[j] = group->sync_page(spec.page);
  }
  params->op.counts = part.group->counts(spec.page);
  return true;
}

/// Whether the low latency kernels serve the operation, and what they need of the peers. Every active rank comes to the
/// same answer: all have the same requests before them, and the same active ranks took part in the operation before.
bool CudaDevice::fill_low_latency(const LaunchSpec& spec, const Part& part, PartParams* params) const {
  const OpShape& shape = params->op.shape;
  const bool followed =
      part.group->last_op + 1 == spec.group_op && (spec.active_ranks.low() & ~part.group->last_active) == 0;
  if (!part.group->linked || !is_low_latency(shape) || (!followed && !spec.own->captured)) {
    return false;
  }
  kernels::cuda::LowLatencyTable table{};
  table.layout = kernels::cuda::low_latency_layout(shape, params->table_top_k);
  for (uint32_t j = 0; j < spec.ranks; ++j) {
    if (!is_active(spec.active_ranks.low(), j)) {
      continue;
    }
    const GroupEntry* group = find_peer(spec, j);
    table.staging[j] = group == nullptr ? nullptr : group->low_latency(spec.page);
    if (table.staging[j] == nullptr || spec.request_of(j) == nullptr ||
        !kernels::cuda::fits_low_latency(spec.request_of(j)->shape, table.layout)) {
      return false;
    }
    table.tokens[j] = std::min(spec.request_of(j)->shape.tokens, shape.max_tokens);
  }
  params->low_latency = table;
  return true;
}

/// What this rank, as an owner, reads of every active rank's low latency combine. False when it cannot, which ends the
/// operation: the other ranks count on the low latency kernels.
bool CudaDevice::fill_lanes(const LaunchSpec& spec, PartParams* params) const {
  for (uint32_t j = 0; j < spec.ranks; ++j) {
    if (!is_active(spec.active_ranks.low(), j)) {
      continue;
    }
    const GroupEntry* group = find_peer(spec, j);
    const Request* request = spec.request_of(j);
    if (group == nullptr || request == nullptr || request->handle_index >= group->layout.handle_count) {
      return false;
    }
    const kernels::Routing routing = group->routing(request->handle_index);
    TensorReader tensors{*request, gpu_.view.index};
    kernels::cuda::LaneTables& lanes = params->low_latency.lanes[j];
    lanes.topk = routing.topk;
    lanes.token_expert = routing.token_expert;
    lanes.topk_idx = tensors.at<const uint32_t>(EXPERTD_IN_TOPK_IDX);
    lanes.topk_weights = tensors.at<const float>(EXPERTD_IN_TOPK_WEIGHTS);
    lanes.top_k = request->shape.top_k;
    lanes.id_words = request->shape.topk_idx_bytes / 4;
    if (!tensors.ok) {
      return false;
    }
  }
  return true;
}

bool CudaDevice::fill_params(const LaunchSpec& spec, Part* taken, PartParams* params) const {
  const Part& part = *taken;
  OpShape& shape = params->op.shape;
  shape = spec.own->shape;
  shape.capacity_rows = usable_rows(shape.capacity_rows);
  TensorReader tensors{*spec.own, gpu_.view.index};
  fill_inputs(&tensors, &params->op.in);
  fill_outputs(&tensors, &params->op.out);
  params->multiprocessors = gpu_.multiprocessors;
  params->bulk_copies = bulk_copies_ ? 1 : 0;
  params->link_sms = link_sms_;
  params->words.part = part.id;
  params->words.seq = part.words.seq;
  params->words.state = part_state(part.id);
  params->words.facts = device_facts(part.id);
  params->words.completion = word_at(part.words.flag_page, EXPERTD_COMPLETION_WORD_OFFSET(part.words.slot));
  params->words.result = word_at(part.words.flag_page, EXPERTD_RESULT_WORD_OFFSET(part.words.slot));
  if (part.group == nullptr) {
    return tensors.ok && shape.kind == OpKind::kLayout && kernels::cuda::validate(*params) == nullptr;
  }
  const engine::GroupShape& group = part.group->shape;
  shape.ranks = group.ranks;
  shape.rank = group.rank;
  shape.experts = group.experts;
  shape.local_experts = group.experts / group.ranks;
  shape.hidden = group.hidden;
  shape.max_tokens = group.max_tokens;
  shape.slots_per_expert = group.ranks * group.max_tokens;
  shape.active_ranks = spec.active_ranks;
  params->table_top_k = group.top_k;
  params->words.group_op = spec.group_op;
  params->words.progress = part.group->device_progress;
  params->scratch = part.group->scratch(spec.own->captured ? 1 + spec.own->capture_lane : 0);
  if (shape.kind != OpKind::kBarrier) {
    if (spec.own->handle_index >= part.group->layout.handle_count) {
      return false;
    }
    params->op.routing = part.group->routing(spec.own->handle_index);
  }
  if (part.group->relay_ranks != 0 && shape.kind != OpKind::kBarrier) {
    params->relay.own = part.group->relay();
    params->relay.layout = kernels::cuda::relay_layout(shape, group.top_k);
    if (params->relay.layout.bytes > part.group->layout.relay_bytes) {
      return false;  // rows of bytes far longer than the group's hidden
    }
  }
  taken->links = part.group->linked && kernels::cuda::serves_link(*params);
  taken->low_latency = fill_low_latency(spec, part, params);
  const bool one_kernel = taken->links || taken->low_latency || shape.kind == OpKind::kBarrier;
  params->after_doorbell = awaits_by_kernel() && part.waits_doorbell && one_kernel ? 1 : 0;
  const bool alone = spec.active_ranks == base::RankSet::one(spec.rank);  // nothing stands between its kernels
  params->after_flags = awaits_by_kernel() && taken->low_latency && !alone ? 1 : 0;
  if (taken->low_latency && is_combine(shape) && !fill_lanes(spec, params)) {
    return false;
  }
  return tensors.ok && fill_peers(spec, part, params) && kernels::cuda::validate(*params) == nullptr;
}

bool CudaDevice::enqueue_exchange_wait(const Part& part, CUstream stream, bool moved) const {
  std::array<CUstreamBatchMemOpParams, base::kMaxGpuRanks> waits{};
  uint32_t count = 0;
  for (uint32_t s = 0; s < part.ranks; ++s) {
    if (s == part.rank || !is_active(part.flag_ranks, s)) {
      continue;
    }
    CUstreamBatchMemOpParams& wait = waits[count++];
    wait.waitValue.operation = CU_STREAM_MEM_OP_WAIT_VALUE_64;
    wait.waitValue.address = reinterpret_cast<CUdeviceptr>(moved ? &part.page->moved[s] : &part.page->routed[s]);
    wait.waitValue.value64 = part.group_op;
    wait.waitValue.flags = CU_STREAM_WAIT_VALUE_GEQ;
    if (gpu_.can_flush_remote_writes) {
      wait.waitValue.flags |= CU_STREAM_WAIT_VALUE_FLUSH;
    }
  }
  return count == 0 || driver_.cuStreamBatchMemOp(stream, count, waits.data(), 0) == CUDA_SUCCESS;
}

/// The same for the low latency kernels.
bool CudaDevice::enqueue_flags(const Part& part, const PartParams& params, bool moved) {
  if (params.after_flags == 0) {
    return enqueue_exchange_wait(part, part.session->stream, moved);
  }
  const uint64_t others = part.active_ranks & ~(uint64_t{1} << part.rank);
  return kernels::cuda::launch_await_flags({moved ? part.page->moved : part.page->routed, others, part.group_op},
                                           part.session->stream) == cudaSuccess;
}

bool CudaDevice::enqueue_move(const Part& part, const PartParams& params) {
  using namespace kernels::cuda;
  CUstream stream = part.session->stream;
  const OpShape& shape = params.op.shape;
  if (!enqueue_exchange_wait(part, stream, false) || launch_plan(params, stream) != cudaSuccess ||
      (is_dispatch(shape) ? launch_dispatch_move(params, stream) : launch_combine_pull(params, stream)) !=
          cudaSuccess) {
    return false;
  }
  if (is_dispatch(shape) && params.relay.ranks != 0 && launch_relay_move(params, stream) != cudaSuccess) {
    return false;
  }
  return launch_signal(params, SignalStep::kMoved, stream) == cudaSuccess && enqueue_exchange_wait(part, stream, true);
}

/// Up to the routed flag. Numbering the rows hides behind the flag, unless other ranks read the numbers in the relay.
bool CudaDevice::enqueue_route(const Part& part, const PartParams& params) {
  using namespace kernels::cuda;
  CUstream stream = part.session->stream;
  const OpShape& shape = params.op.shape;
  const bool routes = is_dispatch(shape) && shape.cached == 0;
  const bool publishes = params.relay.ranks != 0 && shape.kind != OpKind::kBarrier;
  if (routes &&
      (launch_route_count(params, stream) != cudaSuccess || launch_route_scan(params, stream) != cudaSuccess)) {
    return false;
  }
  if (!publishes) {
    return launch_signal(params, SignalStep::kRouted, stream) == cudaSuccess &&
           (!routes || launch_route_number(params, stream) == cudaSuccess);
  }
  const cudaError_t prepared = is_dispatch(shape) ? (routes ? launch_route_number(params, stream) : cudaSuccess)
                                                  : launch_relay_plan(params, stream);
  return prepared == cudaSuccess && launch_relay_publish(params, stream) == cudaSuccess &&
         launch_signal(params, SignalStep::kRouted, stream) == cudaSuccess;
}

/// The chain of the link kernels.
bool CudaDevice::enqueue_link(const Part& part, const PartParams& params) {
  using namespace kernels::cuda;
  CUstream stream = part.session->stream;
  const OpShape& shape = params.op.shape;
  const auto move = is_dispatch(shape) ? launch_link_dispatch : launch_link_combine;
  return move(params, Entry::kWaits, stream) == cudaSuccess && enqueue_exchange_wait(part, stream, false) &&
         move(params, Entry::kBehindWait, stream) == cudaSuccess && enqueue_exchange_wait(part, stream, true) &&
         launch_finish(params, stream) == cudaSuccess;
}

/// The chain of the low latency kernels.
bool CudaDevice::enqueue_low_latency(const Part& part, const PartParams& params) {
  using namespace kernels::cuda;
  CUstream stream = part.session->stream;
  if (is_dispatch(params.op.shape)) {
    return launch_link_ll_dispatch(params, Entry::kWaits, stream) == cudaSuccess && enqueue_flags(part, params, true) &&
           launch_link_ll_dispatch(params, Entry::kBehindWait, stream) == cudaSuccess;
  }
  return launch_link_ll_combine(params, LowLatencyEntry::kWaits, stream) == cudaSuccess &&
         enqueue_flags(part, params, false) &&
         launch_link_ll_combine(params, LowLatencyEntry::kBehindRouted, stream) == cudaSuccess &&
         enqueue_flags(part, params, true) &&
         launch_link_ll_combine(params, LowLatencyEntry::kBehindMoved, stream) == cudaSuccess;
}

/// A barrier: one exchange, none for a rank alone.
bool CudaDevice::enqueue_barrier(const Part& part, const PartParams& params) {
  using namespace kernels::cuda;
  CUstream stream = part.session->stream;
  if (launch_meet(params, stream) != cudaSuccess) {
    return false;
  }
  const bool alone = part.active_ranks == uint64_t{1} << part.rank;
  return alone || (enqueue_exchange_wait(part, stream, false) && launch_finish(params, stream) == cudaSuccess);
}

/// Multiprocessors that the largest kernel of the part's chain takes. A link or low latency chain has one that counts;
/// of the others any may be the largest: few tokens beside large outputs leave most to finish.
uint32_t CudaDevice::sms_of(const Part& part, const PartParams& params) {
  using namespace kernels::cuda;
  const OpShape& shape = params.op.shape;
  uint32_t blocks = 1;  // of a barrier
  if (part.low_latency) {
    blocks = is_dispatch(shape) ? link_ll_dispatch_blocks(params) : link_ll_combine_blocks(params);
  } else if (part.links) {
    blocks = is_dispatch(shape) ? link_dispatch_blocks(params) : link_combine_blocks(params);
  } else if (shape.kind == OpKind::kLayout) {
    blocks = layout_count_blocks(params);
  } else if (shape.kind != OpKind::kBarrier) {
    const bool relays = params.relay.ranks != 0;
    blocks = std::max({is_dispatch(shape) ? dispatch_move_blocks(params) : combine_pull_blocks(params),
                       relays ? relay_publish_blocks(params) : 1u,
                       relays && is_dispatch(shape) ? relay_move_blocks(params) : 1u, finish_blocks(params)});
  }
  return std::clamp(blocks, 1u, std::max(params.multiprocessors, 1u));
}

bool CudaDevice::enqueue_doorbell(const Part& part, const PartParams& params) const {
  const uint64_t* word = word_at(part.words.flag_page, EXPERTD_DOORBELL_OFFSET(part.words.slot));
  if (params.after_doorbell != 0) {
    return kernels::cuda::launch_await_doorbell(word, part.words.seq, part.session->stream) == cudaSuccess;
  }
  return driver_.cuStreamWaitValue64(part.session->stream, reinterpret_cast<CUdeviceptr>(word), part.words.seq,
                                     CU_STREAM_WAIT_VALUE_GEQ) == CUDA_SUCCESS;
}

bool CudaDevice::enqueue_chain(const Part& part, const PartParams& params) {
  using namespace kernels::cuda;
  CUstream stream = part.session->stream;
  if (part.waits_doorbell && !enqueue_doorbell(part, params)) {
    return false;
  }
  const OpShape& shape = params.op.shape;
  if (shape.kind == OpKind::kLayout) {
    return launch_layout_clear(params, stream) == cudaSuccess && launch_layout_count(params, stream) == cudaSuccess &&
           launch_finish(params, stream) == cudaSuccess;
  }
  if (shape.kind == OpKind::kBarrier) {
    return enqueue_barrier(part, params);
  }
  if (part.low_latency) {
    return enqueue_low_latency(part, params);
  }
  if (part.links) {
    return enqueue_link(part, params);
  }
  return enqueue_route(part, params) && enqueue_move(part, params) && launch_finish(params, stream) == cudaSuccess;
}

}  // namespace expertd::device::cuda
