// SPDX-License-Identifier: Apache-2.0
// A high throughput operation on the caller's stream:
//
//   dispatch: route (not cached), doorbell                combine: doorbell
//             for both pieces: move, packed                        wait plan
//             wait plan, records of the others;                    for every chunk: wait progress of the others, reduce
//             move the rows that stay, spread the records          wait the own progress
//             wait progress of all ranks
//             ended and completion                                 ended and completion
//
// The daemon's chain (daemon/device/cuda/ht_chain.cc) has its copies between them. With EXPERTD_ASYNC what begins with
// the first wait goes to a stream of the library, as with low latency.
#include "client/src/clock.h"
#include "client/src/copy_engine.h"
#include "client/src/session.h"

namespace expertd::client {
namespace {

constexpr uintptr_t kPerThreadStream = 2;  // CU_STREAM_PER_THREAD: one name for a stream of each thread

void fill_sizes(const GroupConfig& config, const expertd_slot& slot, HtParams* params) {
  params->layout = config.ht_layout();
  params->ranks = config.ranks;
  params->rank = config.rank;
  params->experts = config.num_experts;
  params->local_experts = config.local_experts();
  params->hidden = config.hidden;
  params->max_tokens = config.max_tokens;
  params->top_k = config.top_k;
  params->tokens = slot.tokens;
  params->capacity_rows = slot.capacity_rows;
  params->idx_bytes = slot.topk_idx_bytes;
  params->row_bytes = slot.row_bytes;
  const bool bytes = slot.op == EXPERTD_OP_DISPATCH && slot.dtype == EXPERTD_DTYPE_BYTES;
  params->side_elements = bytes ? slot.side_elements : 0;
  params->side_element_bytes = bytes ? slot.side_element_bytes : 1;
  params->record_bytes = static_cast<uint32_t>(
      expertd_exchange_ht_record_bytes(uint64_t{params->side_elements} * params->side_element_bytes, config.top_k,
                                       (slot.flags & EXPERTD_SLOT_CACHED) != 0 ? 1 : 0));
  params->side_row_stride = slot.side_row_stride;
  params->side_element_stride = slot.side_element_stride;
  params->cached = (slot.flags & EXPERTD_SLOT_CACHED) != 0;
  params->zero_foreign = (slot.flags & EXPERTD_SLOT_ZERO_FOREIGN_WEIGHTS) != 0;
  params->worst_tokens = (slot.flags & EXPERTD_SLOT_WORST_TOKENS) != 0;
  params->last_lane = (slot.flags & EXPERTD_SLOT_ORDER_LAST_LANE) != 0;
}

void fill_tensors(const OpRequest& request, HtParams* params) {
  params->x = tensor_of<const void>(request, EXPERTD_IN_X);
  params->topk_idx = tensor_of<const void>(request, EXPERTD_IN_TOPK_IDX);
  params->topk_weights = tensor_of<const float>(request, EXPERTD_IN_TOPK_WEIGHTS);
  params->side = params->side_elements == 0 ? nullptr : tensor_of<const void>(request, EXPERTD_IN_SIDE);
  params->token_rank_mask = tensor_of<const uint8_t>(request, EXPERTD_IN_TOKEN_RANK_MASK);
  params->bias0 = tensor_of<const void>(request, EXPERTD_IN_BIAS0);
  params->bias1 = tensor_of<const void>(request, EXPERTD_IN_BIAS1);
  params->out_x = tensor_of<void>(request, EXPERTD_OUT_X);
  params->out_side = tensor_of<void>(request, EXPERTD_OUT_SIDE);
  params->out_topk_idx = tensor_of<void>(request, EXPERTD_OUT_TOPK_IDX);
  params->out_topk_weights = tensor_of<float>(request, EXPERTD_OUT_TOPK_WEIGHTS);
  params->expert_counts = tensor_of<int32_t>(request, EXPERTD_OUT_EXPERT_COUNTS);
  params->rank_prefix = tensor_of<int32_t>(request, EXPERTD_OUT_RANK_PREFIX);
  params->src_info = tensor_of<int32_t>(request, EXPERTD_OUT_SRC_INFO);
}

/// Whether the kernels may be given this: nothing that a kernel would read or write out of bounds for.
bool is_sound(const OpRequest& request, const HtParams& p) {
  if (!are_aligned(request)) {
    return false;
  }
  const bool dispatch = request.slot.op == EXPERTD_OP_DISPATCH;
  const bool rows = p.capacity_rows == 0 || (dispatch ? p.out_x : p.x) != nullptr;
  if (p.tokens > p.max_tokens || request.slot.handle_index >= p.layout.handle_count || !rows) {
    return false;
  }
  if (!dispatch) {
    const bool weights = p.out_topk_weights == nullptr || p.topk_weights != nullptr || p.capacity_rows == 0;
    return weights && p.row_bytes == 2 * p.hidden && (p.tokens == 0 || p.out_x != nullptr);
  }
  const bool side =
      p.side_elements == 0 || ((p.side_element_bytes == 1 || p.side_element_bytes == 2 || p.side_element_bytes == 4) &&
                               (p.side != nullptr || p.tokens == 0) && (p.out_side != nullptr || p.capacity_rows == 0));
  return side && (p.tokens == 0 || (p.x != nullptr && (p.cached || p.topk_idx != nullptr)));
}

}  // namespace

void use_ht(Group* group, OpRequest* request, HtRequest* ht) {
  if (!takes_copies(*group, *request)) {
    return;
  }
  fill_sizes(group->config(), request->slot, &ht->params);
  if (expertd_exchange_ht_serves(&ht->params.layout, &request->slot) == 0) {
    return;
  }
  fill_tensors(*request, &ht->params);
  if (!is_sound(*request, ht->params)) {
    return;
  }
  const uint32_t buffer = group->exchange_buffer();
  const expertd_exchange_ht_layout& layout = ht->params.layout;
  char* window = static_cast<char*>(group->exchange()->data) + group->ht_offset();
  ht->params.buffer = window + buffer % EXPERTD_HT_BUFFERS * layout.buffer_bytes;
  ht->params.handle = window + layout.handles + request->slot.handle_index * layout.handle_bytes;
  ht->last = group->ht_use(buffer % EXPERTD_HT_BUFFERS);
  request->slot.flags |= EXPERTD_SLOT_COPY_ENGINE;
  request->slot.exchange_buffer = buffer;
  request->ht = ht;
}

/// The buffer's last operation is over before this one writes into it: behind it on one stream it is so anyway.
Status Session::follow_ht(HtUse* last, uint32_t index, uint64_t seq, bool async, expertd_stream_t stream) {
  Status status;
  const bool ordered =
      !last->async && last->stream == stream && reinterpret_cast<uintptr_t>(stream) != kPerThreadStream;
  if (last->seq != 0 && !ordered) {
    status = device_->wait_word(device_->flag_page() + EXPERTD_COMPLETION_WORD_OFFSET(last->slot), last->seq, stream);
  }
  *last = {index, seq, stream, async};
  return status;
}

// Under the submit lock, as issue_exchange(). `rung`: the doorbell's word cannot be relied on (rings_late), so this
// waits for what is in front of it and tells the daemon not to.
Status Session::issue_ht(OpRequest* request, uint32_t index, bool rung, expertd_stream_t stream) {
  HtParams& params = request->ht->params;
  char* page = device_->flag_page();
  params.steps = reinterpret_cast<const uint64_t*>(page + EXPERTD_HT_STEP_OFFSET(index));
  params.completion = reinterpret_cast<const uint64_t*>(page + EXPERTD_COMPLETION_WORD_OFFSET(index));
  params.result = reinterpret_cast<uint64_t*>(page + EXPERTD_RESULT_WORD_OFFSET(index));
  params.seq = request->slot.seq;
  const bool async = (request->flags & EXPERTD_ASYNC) != 0;
  const bool dispatch = request->slot.op == EXPERTD_OP_DISPATCH;
  const bool routes = dispatch && !params.cached;
  LocalKernels* kernels = device_->local_kernels();
  Status status = follow_ht(request->ht->last, index, params.seq, async, stream);
  if (status.ok() && routes) {
    status = kernels->launch_ht(HtKernel::kRoute, params, stream);
  }
  if (rung) {
    if (status.ok()) {
      status = device_->synchronize(stream, deadline_after(request->timeout_ns));
    }
    request->slot.flags |= EXPERTD_SLOT_RUNG;
  }
  // Published whatever failed: the sequence is used up. Nothing of it runs then, and it ends at its deadline.
  connection_->ring()->submit(request->slot);
  request->submitted = true;
  if (status.ok() && !rung) {
    status = device_->ring_doorbell(index, params.seq, stream);
    doorbells_[index] = status.ok() ? Doorbell{params.seq, stream} : doorbells_[index];
  }
  for (uint32_t piece = 0; dispatch && piece < EXPERTD_HT_PIECES && status.ok(); ++piece) {
    set_ht_step(HtKernel::kMove, piece, &params);
    status = kernels->launch_ht(HtKernel::kMove, params, stream);
    const StreamWord packed = {page + EXPERTD_HT_STEP_OFFSET(index) + EXPERTD_HT_STEP_PACKED + piece * 8, params.seq,
                               true};
    status = status.ok() ? device_->stream_words(&packed, 1, stream) : status;
  }
  if (!status.ok()) {
    return status;
  }
  expertd_stream_t behind = async ? device_->receive_stream() : stream;
  const StreamWord begin[] = {{page + EXPERTD_DOORBELL_OFFSET(index), params.seq, false},
                              {page + EXPERTD_HT_STEP_OFFSET(index) + EXPERTD_HT_STEP_PLAN, params.seq, false}};
  const bool doorbell = async && !rung;
  status = device_->stream_words(doorbell ? begin : begin + 1, doorbell ? 2 : 1, behind);
  return status.ok() ? receive_ht(request, index, behind) : status;
}

/// Behind the plan.
Status Session::receive_ht(OpRequest* request, uint32_t index, expertd_stream_t stream) {
  HtParams& params = request->ht->params;
  char* page = device_->flag_page();
  const char* progress = page + EXPERTD_HT_STEP_OFFSET(index) + EXPERTD_HT_STEP_PROGRESS;
  const bool dispatch = request->slot.op == EXPERTD_OP_DISPATCH;
  LocalKernels* kernels = device_->local_kernels();
  Status status;
  StreamWord words[kStreamWordsMax];
  for (uint32_t chunk = 0; !dispatch && chunk < EXPERTD_HT_CHUNKS && status.ok(); ++chunk) {
    uint32_t count = 0;
    for (uint32_t rank = 0; rank < params.ranks; ++rank) {
      if (rank != params.rank) {
        words[count++] = {progress + rank * 8, EXPERTD_HT_PROGRESS(params.seq, chunk + 1), false};
      }
    }
    set_ht_step(HtKernel::kReduce, chunk, &params);
    status = count == 0 ? status : device_->stream_words(words, count, stream);
    status = status.ok() ? kernels->launch_ht(HtKernel::kReduce, params, stream) : status;
  }
  if (dispatch) {
    uint32_t count = 0;
    for (uint32_t rank = 0; params.record_bytes != 0 && rank < params.ranks; ++rank) {
      if (rank != params.rank) {
        words[count++] = {progress + rank * 8, EXPERTD_HT_PROGRESS(params.seq, EXPERTD_HT_BESIDE), false};
      }
    }
    set_ht_step(HtKernel::kMove, kHtPlace, &params);
    status = count == 0 ? status : device_->stream_words(words, count, stream);
    status = !status.ok() ? status : kernels->launch_ht(HtKernel::kMove, params, stream);
  }
  if (!status.ok()) {
    return status;
  }
  uint32_t count = 0;
  for (uint32_t rank = 0; rank < params.ranks; ++rank) {
    if (dispatch || rank == params.rank) {
      words[count++] = {progress + rank * 8, EXPERTD_HT_PROGRESS(params.seq, EXPERTD_HT_ALL), false};
    }
  }
  words[count++] = {page + EXPERTD_HT_STEP_OFFSET(index) + EXPERTD_HT_STEP_ENDED, params.seq, true};
  words[count++] = {page + EXPERTD_COMPLETION_WORD_OFFSET(index), params.seq, true};
  return device_->stream_words(words, count, stream);
}

}  // namespace expertd::client
