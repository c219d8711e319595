// SPDX-License-Identifier: Apache-2.0
// An operation is one kernel on the caller's stream (local_kernels/exchange_flow.cuh), which rings the doorbell, waits
// for the other ranks in its place and writes the ends:
//
//   dispatch: pack, doorbell                     combine: weights, doorbell
//             until arrived[0] of all ranks               until arrived[0] of all ranks
//                                                         reduce, rung
//                                                         until arrived[1] of the others
//             expand, ended and completion                add, ended and completion
//
// The daemon's chain (daemon/device/cuda/copy_chain.cc) has its copies between them. Beside work that fills the GPU
// each kernel waits for a place, up to as long as that work's kernels take, so there is one.
//
// It is two, up to the doorbell and from there on, with a wait of the stream for arrived[0] between them:
// - with EXPERTD_ASYNC, where the second one goes to a stream of the library, so that it holds no place while the
//   caller computes. That stream waits for the doorbell first: operations of a session are issued in one order, so a
//   receive half that waits there holds back none that could come before it.
// - where the doorbell's word cannot be relied on, and the host stands between them.
// - of one rank alone: its chain has no copy in front of the words, and words alone wait for the time slice of a GPU on
//   which a kernel of another process waits for them.
#include "client/src/copy_engine.h"

#include <algorithm>

#include "client/src/clock.h"
#include "client/src/session.h"

namespace expertd::client {
namespace {

/// Bytes beside a row in the exchange.
uint64_t side_bytes(const ExchangeParams& params) {
  switch (params.payload) {
    case ExchangePayload::kPlain:
      return uint64_t{params.side_elements} * params.side_element_bytes;
    case ExchangePayload::kUe8m0:
      return params.hidden / EXPERTD_LL_SCALE_CHANNELS;
    default:
      return uint64_t{params.hidden / EXPERTD_LL_SCALE_CHANNELS} * 4;
  }
}

ExchangePayload payload_of(const expertd_slot& slot) {
  if (slot.op != EXPERTD_OP_LL_DISPATCH || (slot.flags & EXPERTD_SLOT_QUANTISE_FP8) == 0) {
    return ExchangePayload::kPlain;
  }
  if ((slot.flags & EXPERTD_SLOT_UE8M0) != 0) {
    return ExchangePayload::kUe8m0;
  }
  return (slot.flags & EXPERTD_SLOT_ROUND_SCALE) != 0 ? ExchangePayload::kFp8Rounded : ExchangePayload::kFp8;
}

void fill_sizes(const GroupConfig& config, const expertd_slot& slot, ExchangeParams* params) {
  params->layout = config.exchange_layout();
  params->ranks = config.ranks;
  params->rank = config.rank;
  params->experts = config.num_experts;
  params->local_experts = config.local_experts();
  params->hidden = config.hidden;
  params->max_tokens = config.max_tokens;
  params->table_top_k = config.top_k;
  params->tokens = slot.tokens;
  params->top_k = slot.top_k;
  params->idx_bytes = slot.topk_idx_bytes;
  params->payload = payload_of(slot);
  params->row_bytes = slot.row_bytes;
  params->out_row_bytes = params->payload == ExchangePayload::kPlain ? slot.row_bytes : config.hidden;
  const bool bytes = slot.op == EXPERTD_OP_LL_DISPATCH && slot.dtype == EXPERTD_DTYPE_BYTES;
  params->side_elements = bytes ? slot.side_elements : 0;
  params->side_element_bytes = bytes ? slot.side_element_bytes : 1;
  params->side_row_stride = slot.side_row_stride;
  params->side_element_stride = slot.side_element_stride;
  params->row_stride = expertd_exchange_row_stride(params->out_row_bytes, side_bytes(*params));
}

void fill_tensors(const OpRequest& request, ExchangeParams* params) {
  params->x = tensor_of<const void>(request, EXPERTD_IN_X);
  params->topk_idx = tensor_of<const void>(request, EXPERTD_IN_TOPK_IDX);
  params->topk_weights = tensor_of<const float>(request, EXPERTD_IN_TOPK_WEIGHTS);
  params->side = tensor_of<const void>(request, EXPERTD_IN_SIDE);
  params->out_x = tensor_of<void>(request, EXPERTD_OUT_X);
  params->out_side = tensor_of<void>(request, EXPERTD_OUT_SIDE);
  params->expert_counts = tensor_of<int32_t>(request, EXPERTD_OUT_EXPERT_COUNTS);
  params->src_info = tensor_of<int32_t>(request, EXPERTD_OUT_SRC_INFO);
  params->layout_range = tensor_of<int64_t>(request, EXPERTD_OUT_LAYOUT_RANGE);
  params->stats = tensor_of<int32_t>(request, EXPERTD_OUT_STATS);
}

/// Whether the kernels may be given this: nothing that a kernel would read or write out of bounds for.
bool is_sound(const OpRequest& request, const ExchangeParams& p) {
  const bool dispatch = request.slot.op == EXPERTD_OP_LL_DISPATCH;
  if (!are_aligned(request)) {
    return false;
  }
  const bool sized = p.tokens <= p.max_tokens && p.top_k >= 1 && p.top_k <= p.table_top_k && p.row_bytes >= 16 &&
                     p.row_bytes % 16 == 0 && p.row_stride <= p.layout.row_stride;
  const bool side_fits =
      p.side_elements == 0 || p.side_element_bytes == 1 || p.side_element_bytes == 2 || p.side_element_bytes == 4;
  const bool ue8m0_fits = p.payload != ExchangePayload::kUe8m0 || p.hidden % 512 == 0;
  const bool inputs = (p.tokens == 0 || (p.topk_idx != nullptr && (p.x != nullptr || !dispatch)));
  if (!sized || !side_fits || !ue8m0_fits || !inputs) {
    return false;
  }
  const bool wants_side = p.payload != ExchangePayload::kPlain || p.side_elements != 0;
  return dispatch ? p.out_x != nullptr && p.expert_counts != nullptr && (!wants_side || p.out_side != nullptr)
                  : p.x != nullptr && (p.tokens == 0 || (p.topk_weights != nullptr && p.out_x != nullptr)) &&
                        p.row_bytes == 2 * p.hidden;
}

}  // namespace

bool takes_copies(const Group& group, const OpRequest& request) {
  const expertd_slot& slot = request.slot;
  if (group.exchange() == nullptr || request.captured) {
    return false;
  }
  if (expertd_executor_follows(slot.op, slot.flags) != 0) {
    return group.session()->handles()->is_of_copies({slot.handle_index, slot.handle_generation});
  }
  const uint32_t bound = expertd_executor_bound(slot.token_bound, group.config().max_tokens);
  const int split = (request.flags & EXPERTD_ASYNC) != 0 ? 1 : 0;
  return expertd_executor_of(&group.executor_rule(), slot.op, 0, split, bound) ==
         EXPERTD_COMPLETION_EXECUTOR_COPY_ENGINE;
}

Status use_exchange(const Group& group, uint32_t place, OpRequest* request, ExchangeParams* params) {
  if (!takes_copies(group, *request)) {
    return {};
  }
  fill_sizes(group.config(), request->slot, params);
  fill_tensors(*request, params);
  if (place >= EXPERTD_EXCHANGE_HANDLES || !is_sound(*request, *params)) {
    return {};
  }
  const uint32_t buffer = group.exchange_buffer();
  char* window = static_cast<char*>(group.exchange()->data);
  params->buffer = window + buffer * params->layout.buffer_bytes;
  params->handle = window + params->layout.handles + place * params->layout.handle_bytes;
  request->slot.flags |= EXPERTD_SLOT_COPY_ENGINE;
  request->slot.exchange_buffer = buffer;
  request->exchange = params;
  return {};
}

// Under the submit lock; the descriptor is stamped and its record kept. `rung`: the doorbell's word cannot be relied on
// (rings_late), so this waits for what is in front of it and tells the daemon not to.
Status Session::issue_exchange(OpRequest* request, uint32_t index, bool rung, expertd_stream_t stream) {
  ExchangeParams& params = *request->exchange;
  char* page = device_->flag_page();
  params.steps = reinterpret_cast<uint64_t*>(page + EXPERTD_STEP_OFFSET(index));
  params.doorbell = rung ? nullptr : reinterpret_cast<uint64_t*>(page + EXPERTD_DOORBELL_OFFSET(index));
  params.completion = reinterpret_cast<uint64_t*>(page + EXPERTD_COMPLETION_WORD_OFFSET(index));
  params.result = reinterpret_cast<uint64_t*>(page + EXPERTD_RESULT_WORD_OFFSET(index));
  params.seq = request->slot.seq;
  params.limit_ns = request->timeout_ns + std::min(kExchangeGraceNs, UINT64_MAX - request->timeout_ns);
  const bool async = (request->flags & EXPERTD_ASYNC) != 0;
  const bool halves = async || rung || params.ranks == 1;
  params.stages = halves ? kExchangeSend : kExchangeSend | kExchangeReceive;
  LocalKernels* kernels = device_->local_kernels();
  kernels->begin_exchange(&params);
  const ExchangeKernel kernel =
      request->slot.op == EXPERTD_OP_LL_DISPATCH ? ExchangeKernel::kDispatch : ExchangeKernel::kCombine;
  Status status;
  if (rung) {
    status = kernels->launch_exchange(kernel, params, stream);
    if (status.ok()) {
      status = device_->synchronize(stream, deadline_after(request->timeout_ns));
    }
    request->slot.flags |= EXPERTD_SLOT_RUNG;
  }
  // Published whatever failed: the sequence is used up. Nothing of it runs then, and it ends at its deadline.
  connection_->ring()->submit(request->slot);
  request->submitted = true;
  if (!rung) {
    status = kernels->launch_exchange(kernel, params, stream);
    doorbells_[index] = status.ok() ? Doorbell{params.seq, stream} : doorbells_[index];
  }
  if (!status.ok() || !halves) {
    return status;
  }
  params.stages = kExchangeReceive;
  const expertd_stream_t receiving = async ? device_->receive_stream() : stream;
  status = wait_for_arrivals(params, index, async && !rung, receiving);
  return status.ok() ? kernels->launch_exchange(kernel, params, receiving) : status;
}

/// Of the first step. What comes later the kernel waits for itself.
Status Session::wait_for_arrivals(const ExchangeParams& params, uint32_t index, bool doorbell,
                                  expertd_stream_t stream) {
  const char* page = device_->flag_page();
  StreamWord words[kStreamWordsMax];
  uint32_t count = 0;
  if (doorbell) {
    words[count++] = {page + EXPERTD_DOORBELL_OFFSET(index), params.seq, false};
  }
  for (uint32_t rank = 0; rank < params.ranks; ++rank) {
    words[count++] = {page + EXPERTD_STEP_ARRIVED_OFFSET(index, 0, rank), params.seq, false};
  }
  return device_->stream_words(words, count, stream);
}

}  // namespace expertd::client
