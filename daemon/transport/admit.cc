// SPDX-License-Identifier: Apache-2.0
#include "daemon/transport/admit.h"

#include <algorithm>

#include "daemon/transport/begin_check.h"
#include "daemon/transport/capture_check.h"
#include "daemon/transport/client_refusal.h"
#include "daemon/transport/executor_check.h"
#include "daemon/transport/payload_check.h"
#include "daemon/transport/tensor_check.h"
#include "daemon/transport/token_bound.h"

namespace expertd::transport {

namespace {

using engine::Request;
using kernels::OpKind;
using kernels::Payload;

constexpr uint32_t kMaxAlignment = 65536;
constexpr uint32_t kMaxCapacityRows = 1U << 26;
constexpr uint32_t kMaxSideElements = 1U << 16;
constexpr uint32_t kMaxLayoutRanks = 512;

/// The admission of one slot: what is known so far and the first refusal. Every check returns false once refused.
class Admission {
 public:
  Admission(const expertd_slot& slot, session::SessionTables* tables, Request* request)
      : slot_(slot), tables_(tables), request_(request), check_(slot, *tables, request) {}

  engine::RankState* rank();
  bool frame(const AdmitContext& context);
  bool group(const engine::RankState* rank);
  bool operation(const engine::GroupShared* group);

 private:
  bool arguments(const engine::GroupShared* group);
  bool layout();
  bool dispatch(const engine::GroupShared& group);
  bool combine(const engine::GroupShared& group);
  bool ll_dispatch(const engine::GroupShared& group);
  bool ll_combine(const engine::GroupShared& group);
  bool common(const engine::GroupShared& group);
  bool carried(const engine::GroupShared& group);
  bool side_input();
  bool routing_inputs();
  bool new_handle(bool low_latency);
  bool known_handle(bool low_latency, session::HandleState** handle);
  bool still_there(const session::HandleState& handle) const;
  bool cached_alignment(const session::HandleState& handle);
  bool dispatch_outputs();

  const expertd_slot& slot_;
  session::SessionTables* tables_;
  Request* request_;
  TensorCheck check_;
  uint64_t number_ = 0;  // of the group's operation
};

// Whose operation the slot is, looked up before anything else is known to be right: a refused slot that names a group
// takes its place among the rank's operations as well. Otherwise the rank's next one would pair with the operation that
// the others already posted, and they would wait for one that never comes.
engine::RankState* Admission::rank() {
  session::JoinedGroup* joined = slot_.op == EXPERTD_OP_LAYOUT ? nullptr : tables_->find_group(slot_.group);
  number_ = joined == nullptr ? 0 : joined->rank.next_number;
  return joined == nullptr ? nullptr : &joined->rank;
}

bool Admission::frame(const AdmitContext& context) {
  if (slot_.seq != context.seq) {
    return check_.refuse(EXPERTD_REASON_DESCRIPTOR_MALFORMED, EXPERTD_ARGUMENT_SEQ, slot_.seq, context.seq,
                         context.seq);
  }
  if (slot_.op == EXPERTD_OP_NONE || slot_.op >= EXPERTD_OP_COUNT) {
    return check_.refuse(EXPERTD_REASON_DESCRIPTOR_MALFORMED, EXPERTD_ARGUMENT_OP, slot_.op, 1, EXPERTD_OP_COUNT - 1);
  }
  if ((slot_.flags & ~static_cast<uint32_t>(EXPERTD_SLOT_FLAGS_ALL)) != 0) {
    return check_.refuse(EXPERTD_REASON_DESCRIPTOR_MALFORMED, EXPERTD_ARGUMENT_FLAGS, slot_.flags, 0,
                         EXPERTD_SLOT_FLAGS_ALL);
  }
  const bool zero = std::all_of(std::begin(slot_.reserved), std::end(slot_.reserved), [](uint8_t b) { return b == 0; });
  if (!zero || (!refused_by_client(slot_) && has_client_refusal(slot_))) {
    return check_.refuse(EXPERTD_REASON_DESCRIPTOR_MALFORMED, EXPERTD_ARGUMENT_RESERVED, 1, 0, 0);
  }
  for (uint32_t i = 0; i < EXPERTD_TENSOR_COUNT; ++i) {
    if (slot_.tensors[i].reserved != 0) {
      return check_.refuse(EXPERTD_REASON_DESCRIPTOR_MALFORMED, EXPERTD_ARGUMENT_OF_TENSOR(i), 1, 0, 0);
    }
  }
  return true;
}

bool Admission::group(const engine::RankState* rank) {
  return slot_.op == EXPERTD_OP_LAYOUT || rank != nullptr ||
         check_.refuse(EXPERTD_REASON_NO_SUCH_GROUP, EXPERTD_ARGUMENT_GROUP, slot_.group, 0, 0);
}

bool Admission::operation(const engine::GroupShared* group) {
  // What is wrong with the arguments is said first: a client with such has nothing for copy engines either.
  return arguments(group) && (refused_by_client(slot_) || take_executor(slot_, group, number_, &check_, request_));
}

bool Admission::arguments(const engine::GroupShared* group) {
  request_->with_weights = (slot_.tensors[EXPERTD_IN_TOPK_WEIGHTS].buffer != 0);
  request_->handle_index = slot_.handle_index;
  request_->handle_generation = slot_.handle_generation;
  request_->doorbell_rung = (slot_.flags & EXPERTD_SLOT_RUNG) != 0;
  if (refused_by_client(slot_)) {
    request_->without_words = true;
    return take_client_refusal(slot_, &check_);
  }
  if (!take_capture(slot_, group == nullptr ? 0 : group->settings().shape.capture_lanes, &check_, request_)) {
    return false;
  }
  if (group == nullptr) {
    return layout();
  }
  switch (slot_.op) {
    case EXPERTD_OP_BARRIER:
      return common(*group);
    case EXPERTD_OP_DISPATCH:
      return common(*group) && dispatch(*group);
    case EXPERTD_OP_COMBINE:
      return common(*group) && combine(*group);
    case EXPERTD_OP_LL_DISPATCH:
      return common(*group) && ll_dispatch(*group);
    case EXPERTD_OP_LL_COMBINE:
      return common(*group) && ll_combine(*group);
    default:
      return check_.refuse(EXPERTD_REASON_DESCRIPTOR_MALFORMED, EXPERTD_ARGUMENT_OP, slot_.op, 1, EXPERTD_OP_COUNT - 1);
  }
}

bool Admission::common(const engine::GroupShared& group) {
  const engine::GroupSettings& settings = group.settings();
  kernels::OpShape& shape = request_->shape;
  shape.ranks = settings.shape.ranks;
  shape.experts = settings.shape.experts;
  shape.local_experts = settings.shape.experts / settings.shape.ranks;
  shape.hidden = settings.shape.hidden;
  shape.max_tokens = settings.shape.max_tokens;
  shape.tokens = slot_.tokens;
  shape.topk_idx_bytes = 8;
  const bool low_latency = slot_.op == EXPERTD_OP_LL_DISPATCH || slot_.op == EXPERTD_OP_LL_COMBINE;
  const bool allowed = slot_.op == EXPERTD_OP_BARRIER || (low_latency ? settings.inference : settings.normal);
  if (!allowed) {
    return check_.refuse(EXPERTD_REASON_MODE_MISMATCH, EXPERTD_ARGUMENT_OP, slot_.op, 0, 0);
  }
  if (slot_.op == EXPERTD_OP_BARRIER) {
    shape.tokens = 0;
    request_->traffic = engine::Traffic::kLatency;
    return true;
  }
  if (slot_.tokens > settings.shape.max_tokens) {
    return check_.refuse(EXPERTD_REASON_TOKENS_EXCEED_MAX, EXPERTD_ARGUMENT_TOKENS, slot_.tokens, 0,
                         settings.shape.max_tokens);
  }
  if (!take_token_bound(slot_, settings, &check_, request_)) {
    return false;
  }
  if (slot_.hidden != settings.shape.hidden && slot_.hidden != 0) {
    return check_.refuse(EXPERTD_REASON_ARGUMENT_RANGE, EXPERTD_ARGUMENT_HIDDEN, slot_.hidden, settings.shape.hidden,
                         settings.shape.hidden);
  }
  return check_.output(EXPERTD_OUT_WAIT_STATS, uint64_t{shape.ranks} * 8, false);
}

// Of a dispatch, whose payload is known: the group may have been joined for others only.
bool Admission::carried(const engine::GroupShared& group) {
  const uint32_t allowed = group.settings().dispatch_dtypes;
  const Payload payload = request_->shape.payload;
  const uint32_t own = payload == Payload::kFp8     ? EXPERTD_PAYLOAD_FP8
                       : payload == Payload::kBytes ? EXPERTD_PAYLOAD_BYTES
                                                    : EXPERTD_PAYLOAD_BF16;
  return allowed == 0 || (allowed & own) != 0 ||
         check_.refuse(EXPERTD_REASON_WRONG_DTYPE, EXPERTD_ARGUMENT_DISPATCH_DTYPE, own, 0, allowed);
}

bool Admission::side_input() {
  kernels::OpShape& shape = request_->shape;
  if (slot_.side_elements == 0) {
    return true;
  }
  if (slot_.dtype != EXPERTD_DTYPE_BYTES) {
    return check_.refuse(EXPERTD_REASON_WRONG_DTYPE, EXPERTD_ARGUMENT_SIDE_ELEMENTS, slot_.side_elements, 0, 0);
  }
  if (slot_.side_elements > kMaxSideElements) {
    return check_.refuse(EXPERTD_REASON_ARGUMENT_RANGE, EXPERTD_ARGUMENT_SIDE_ELEMENTS, slot_.side_elements, 0,
                         kMaxSideElements);
  }
  const uint32_t bytes = slot_.side_element_bytes;
  if (bytes != 1 && bytes != 2 && bytes != 4) {
    return check_.refuse(EXPERTD_REASON_ARGUMENT_RANGE, EXPERTD_ARGUMENT_SIDE_ELEMENT_BYTES, bytes, 1, 4);
  }
  const int64_t limit = int64_t{1} << 40;
  for (const int64_t stride : {slot_.side_row_stride, slot_.side_element_stride}) {
    if (stride < 0 || stride > limit || stride % bytes != 0) {
      return check_.refuse(EXPERTD_REASON_ARGUMENT_RANGE, EXPERTD_ARGUMENT_SIDE_STRIDE, stride, 0, limit);
    }
  }
  shape.side_elements = slot_.side_elements;
  shape.side_element_bytes = bytes;
  shape.side_row_stride = slot_.side_row_stride;
  shape.side_element_stride = slot_.side_element_stride;
  if (slot_.tokens == 0) {
    return true;
  }
  const uint64_t reach = uint64_t{slot_.tokens - 1} * static_cast<uint64_t>(slot_.side_row_stride) +
                         uint64_t{slot_.side_elements - 1} * static_cast<uint64_t>(slot_.side_element_stride) + bytes;
  return check_.input(EXPERTD_IN_SIDE, reach, true);
}

bool Admission::routing_inputs() {
  kernels::OpShape& shape = request_->shape;
  if (slot_.topk_idx_bytes != 4 && slot_.topk_idx_bytes != 8) {
    return check_.refuse(EXPERTD_REASON_WRONG_DTYPE, EXPERTD_ARGUMENT_TOPK_IDX_BYTES, slot_.topk_idx_bytes, 4, 8);
  }
  shape.topk_idx_bytes = slot_.topk_idx_bytes;
  shape.top_k = slot_.top_k;
  const uint64_t lanes = uint64_t{slot_.tokens} * slot_.top_k;
  return check_.input(EXPERTD_IN_TOPK_IDX, lanes * slot_.topk_idx_bytes, true) &&
         check_.input(EXPERTD_IN_TOPK_WEIGHTS, lanes * 4, false);
}

bool Admission::new_handle(bool low_latency) {
  const size_t limit = std::min<size_t>(tables_->handles.size(), tables_->find_group(slot_.group)->handle_limit);
  if (slot_.handle_index >= limit) {
    return check_.refuse(EXPERTD_REASON_HANDLE_LIMIT, EXPERTD_ARGUMENT_HANDLE, slot_.handle_index, 0,
                         static_cast<int64_t>(limit) - 1);
  }
  if (slot_.handle_generation == 0) {
    return check_.refuse(EXPERTD_REASON_STALE_HANDLE, EXPERTD_ARGUMENT_HANDLE, 0, 1, UINT32_MAX);
  }
  engine::RankState& rank = tables_->find_group(slot_.group)->rank;
  tables_->close_handle(&tables_->handles[slot_.handle_index]);
  ++rank.open_handles;
  rank.has_dispatched = true;
  tables_->handles[slot_.handle_index] = {.generation = slot_.handle_generation,
                                          .group = base::GroupId{slot_.group},
                                          .low_latency = low_latency,
                                          .expanded = (slot_.flags & EXPERTD_SLOT_EXPANDED) != 0,
                                          .copy_engine = (slot_.flags & EXPERTD_SLOT_COPY_ENGINE) != 0,
                                          .expert_alignment = request_->shape.expert_alignment,
                                          .tokens = slot_.tokens,
                                          .top_k = slot_.top_k,
                                          .made_in = rank.group->settings().shape.id,
                                          .made = number_,
                                          .open = true};
  return true;
}

// What a dispatch left in a group that has gone over to its successor stayed there; those that went along did not run
// before.
bool Admission::still_there(const session::HandleState& handle) const {
  const engine::RankState& rank = tables_->find_group(slot_.group)->rank;
  return handle.made_in == rank.group->settings().shape.id ||
         (handle.made_in == rank.before && handle.made >= rank.before_from);
}

bool Admission::known_handle(bool low_latency, session::HandleState** handle) {
  if (slot_.handle_index >= tables_->handles.size()) {
    return check_.refuse(EXPERTD_REASON_HANDLE_LIMIT, EXPERTD_ARGUMENT_HANDLE, slot_.handle_index, 0,
                         tables_->handles.size() - 1);
  }
  session::HandleState& known = tables_->handles[slot_.handle_index];
  const bool matches = known.generation != 0 && known.generation == slot_.handle_generation &&
                       known.group.value == slot_.group && known.low_latency == low_latency && still_there(known);
  if (!matches) {
    return check_.refuse(EXPERTD_REASON_STALE_HANDLE, EXPERTD_ARGUMENT_HANDLE, slot_.handle_generation,
                         known.generation, known.generation);
  }
  if (known.tokens != slot_.tokens) {
    return check_.refuse(EXPERTD_REASON_ARGUMENT_RANGE, EXPERTD_ARGUMENT_TOKENS, slot_.tokens, known.tokens,
                         known.tokens);
  }
  // Routing is where the executor of the dispatch left it: a captured combine, which is by the daemon's kernels, needs
  // the handle of a dispatch by those.
  if (known.expanded != ((slot_.flags & EXPERTD_SLOT_EXPANDED) != 0) ||
      known.copy_engine != ((slot_.flags & EXPERTD_SLOT_COPY_ENGINE) != 0)) {
    return check_.refuse(EXPERTD_REASON_STALE_HANDLE, EXPERTD_ARGUMENT_FLAGS, slot_.flags, 0, EXPERTD_SLOT_FLAGS_ALL);
  }
  request_->shape.top_k = known.top_k;
  // In the numbers of the group that the operation is posted to.
  const engine::RankState& rank = tables_->find_group(slot_.group)->rank;
  request_->handle_made = known.made_in == rank.before ? known.made - rank.before_from + 1 : known.made;
  if (slot_.op == EXPERTD_OP_COMBINE || slot_.op == EXPERTD_OP_LL_COMBINE) {
    tables_->close_handle(&known);
  }
  *handle = &known;
  return true;
}

// The rows of an expanded handle were numbered with its alignment, so a cached dispatch has that one or none.
bool Admission::cached_alignment(const session::HandleState& handle) {
  kernels::OpShape& shape = request_->shape;
  if (shape.expanded == 0) {
    return true;  // only the reported counts are rounded
  }
  if (shape.expert_alignment > 1 && shape.expert_alignment != handle.expert_alignment) {
    return check_.refuse(EXPERTD_REASON_ARGUMENT_RANGE, EXPERTD_ARGUMENT_EXPERT_ALIGNMENT, shape.expert_alignment,
                         handle.expert_alignment, handle.expert_alignment);
  }
  shape.expert_alignment = handle.expert_alignment;
  return true;
}

bool Admission::dispatch_outputs() {
  const kernels::OpShape& shape = request_->shape;
  const uint64_t rows = slot_.capacity_rows;
  const uint64_t per_row = shape.expanded != 0 ? 1 : shape.top_k;
  const uint64_t side_bytes = rows * shape.side_elements * shape.side_element_bytes;
  bool fits = check_.output(EXPERTD_OUT_X, rows * shape.out_row_bytes, true) &&
              check_.output(EXPERTD_OUT_SIDE, side_bytes, shape.side_elements != 0) &&
              check_.output(EXPERTD_OUT_SRC_INFO, rows * 4, false) &&
              check_.output(EXPERTD_OUT_EXPERT_COUNTS, uint64_t{shape.local_experts} * 4, false) &&
              check_.output(EXPERTD_OUT_RANK_PREFIX, uint64_t{shape.ranks} * shape.ranks * 4, false);
  if (shape.cached != 0) {
    return fits;
  }
  return fits && check_.output(EXPERTD_OUT_TOPK_IDX, rows * per_row * shape.topk_idx_bytes, false) &&
         check_.output(EXPERTD_OUT_TOPK_WEIGHTS, rows * per_row * 4, false);
}

bool Admission::dispatch(const engine::GroupShared& group) {
  kernels::OpShape& shape = request_->shape;
  shape.cached = (slot_.flags & EXPERTD_SLOT_CACHED) != 0 ? 1 : 0;
  shape.expanded = (slot_.flags & EXPERTD_SLOT_EXPANDED) != 0 ? 1 : 0;
  shape.worst_tokens = (slot_.flags & EXPERTD_SLOT_WORST_TOKENS) != 0 ? 1 : 0;
  shape.zero_foreign_weights = (slot_.flags & EXPERTD_SLOT_ZERO_FOREIGN_WEIGHTS) != 0 ? 1 : 0;
  shape.expert_alignment = std::max(1U, slot_.expert_alignment);
  shape.capacity_rows = slot_.capacity_rows;
  if (shape.expert_alignment > kMaxAlignment) {
    return check_.refuse(EXPERTD_REASON_ARGUMENT_RANGE, EXPERTD_ARGUMENT_EXPERT_ALIGNMENT, shape.expert_alignment, 0,
                         kMaxAlignment);
  }
  if (slot_.capacity_rows > kMaxCapacityRows) {
    return check_.refuse(EXPERTD_REASON_ARGUMENT_RANGE, EXPERTD_ARGUMENT_CAPACITY_ROWS, slot_.capacity_rows, 0,
                         kMaxCapacityRows);
  }
  if (shape.expanded != 0 && slot_.tensors[EXPERTD_IN_TOKEN_RANK_MASK].buffer != 0) {
    return check_.refuse(EXPERTD_REASON_UNSUPPORTED, EXPERTD_ARGUMENT_IN_TOKEN_RANK_MASK, 1, 0, 0);
  }
  if (!take_payload(slot_, false, &check_, request_) || !carried(group) || !side_input() ||
      !check_.input(EXPERTD_IN_X, uint64_t{slot_.tokens} * shape.row_bytes, true)) {
    return false;
  }
  if (shape.cached != 0) {
    session::HandleState* handle = nullptr;
    request_->with_weights = false;
    return known_handle(false, &handle) && cached_alignment(*handle) && dispatch_outputs();
  }
  if (slot_.top_k == 0 || slot_.top_k > group.settings().shape.top_k) {
    return check_.refuse(EXPERTD_REASON_ARGUMENT_RANGE, EXPERTD_ARGUMENT_TOP_K, slot_.top_k, 1,
                         group.settings().shape.top_k);
  }
  return routing_inputs() && check_.input(EXPERTD_IN_TOKEN_RANK_MASK, uint64_t{slot_.tokens} * shape.ranks, false) &&
         dispatch_outputs() && new_handle(false);
}

bool Admission::combine(const engine::GroupShared& /*group*/) {
  kernels::OpShape& shape = request_->shape;
  shape.expanded = (slot_.flags & EXPERTD_SLOT_EXPANDED) != 0 ? 1 : 0;
  shape.order_last_lane = (slot_.flags & EXPERTD_SLOT_ORDER_LAST_LANE) != 0 ? 1 : 0;
  shape.capacity_rows = slot_.capacity_rows;
  if (slot_.capacity_rows > kMaxCapacityRows) {
    return check_.refuse(EXPERTD_REASON_ARGUMENT_RANGE, EXPERTD_ARGUMENT_CAPACITY_ROWS, slot_.capacity_rows, 0,
                         kMaxCapacityRows);
  }
  if (slot_.dtype != EXPERTD_DTYPE_BF16) {
    return check_.refuse(EXPERTD_REASON_WRONG_DTYPE, EXPERTD_ARGUMENT_DTYPE, slot_.dtype, EXPERTD_DTYPE_BF16,
                         EXPERTD_DTYPE_BF16);
  }
  session::HandleState* handle = nullptr;
  if (!take_payload(slot_, false, &check_, request_) || !known_handle(false, &handle)) {
    return false;
  }
  const uint64_t rows = slot_.capacity_rows;
  const uint64_t out_bytes = uint64_t{slot_.tokens} * shape.row_bytes;
  const uint64_t per_row = shape.expanded != 0 ? 1 : shape.top_k;
  const bool weights = slot_.tensors[EXPERTD_OUT_TOPK_WEIGHTS].buffer != 0;
  return check_.input(EXPERTD_IN_X, rows * shape.row_bytes, true) &&
         check_.input(EXPERTD_IN_TOPK_WEIGHTS, rows * per_row * 4, weights) &&
         check_.input(EXPERTD_IN_BIAS0, out_bytes, false) && check_.input(EXPERTD_IN_BIAS1, out_bytes, false) &&
         check_.output(EXPERTD_OUT_X, out_bytes, true) &&
         check_.output(EXPERTD_OUT_TOPK_WEIGHTS, uint64_t{slot_.tokens} * shape.top_k * 4, false);
}

bool Admission::ll_dispatch(const engine::GroupShared& group) {
  kernels::OpShape& shape = request_->shape;
  const uint64_t per_expert = uint64_t{shape.ranks} * shape.max_tokens;
  const uint64_t rows = per_expert * shape.local_experts;
  shape.slots_per_expert = static_cast<uint32_t>(per_expert);
  if (!take_payload(slot_, true, &check_, request_) || !carried(group) || !side_input() ||
      !check_.input(EXPERTD_IN_X, uint64_t{slot_.tokens} * shape.row_bytes, true)) {
    return false;
  }
  if (slot_.top_k == 0 || slot_.top_k > group.settings().shape.top_k) {
    return check_.refuse(EXPERTD_REASON_ARGUMENT_RANGE, EXPERTD_ARGUMENT_TOP_K, slot_.top_k, 1,
                         group.settings().shape.top_k);
  }
  uint64_t side_bytes = rows * shape.side_elements * shape.side_element_bytes;
  if (shape.payload == Payload::kFp8) {
    const uint32_t groups = shape.scale == kernels::ScaleForm::kUe8m0 ? shape.hidden / 512 : shape.hidden / 128;
    side_bytes = rows * groups * 4;
  }
  request_->with_weights = false;
  return routing_inputs() && check_.output(EXPERTD_OUT_X, rows * shape.out_row_bytes, true) &&
         check_.output(EXPERTD_OUT_SIDE, side_bytes, side_bytes != 0) &&
         check_.output(EXPERTD_OUT_EXPERT_COUNTS, uint64_t{shape.local_experts} * 4, true) &&
         check_.output(EXPERTD_OUT_SRC_INFO, rows * 4, false) &&
         check_.output(EXPERTD_OUT_LAYOUT_RANGE, uint64_t{shape.local_experts} * shape.ranks * 8, false) &&
         check_.output(EXPERTD_OUT_STATS, uint64_t{shape.local_experts} * 4, false) && new_handle(true);
}

bool Admission::ll_combine(const engine::GroupShared& /*group*/) {
  kernels::OpShape& shape = request_->shape;
  const uint64_t per_expert = uint64_t{shape.ranks} * shape.max_tokens;
  const uint64_t rows = per_expert * shape.local_experts;
  shape.slots_per_expert = static_cast<uint32_t>(per_expert);
  shape.capacity_rows = static_cast<uint32_t>(std::min<uint64_t>(rows, UINT32_MAX));
  if (slot_.dtype != EXPERTD_DTYPE_BF16) {
    return check_.refuse(EXPERTD_REASON_WRONG_DTYPE, EXPERTD_ARGUMENT_DTYPE, slot_.dtype, EXPERTD_DTYPE_BF16,
                         EXPERTD_DTYPE_BF16);
  }
  session::HandleState* handle = nullptr;
  if (!take_payload(slot_, false, &check_, request_) || !known_handle(true, &handle)) {
    return false;
  }
  if (slot_.top_k != handle->top_k) {
    return check_.refuse(EXPERTD_REASON_ARGUMENT_RANGE, EXPERTD_ARGUMENT_TOP_K, slot_.top_k, handle->top_k,
                         handle->top_k);
  }
  const uint64_t lanes = uint64_t{slot_.tokens} * slot_.top_k;
  return routing_inputs() && check_.input(EXPERTD_IN_TOPK_WEIGHTS, lanes * 4, true) &&
         check_.input(EXPERTD_IN_X, rows * shape.row_bytes, true) &&
         check_.output(EXPERTD_OUT_X, uint64_t{slot_.tokens} * shape.row_bytes, true);
}

bool Admission::layout() {
  kernels::OpShape& shape = request_->shape;
  const auto range = [&](uint32_t argument, uint64_t value, uint64_t minimum, uint64_t maximum) {
    return (value >= minimum && value <= maximum) ||
           check_.refuse(EXPERTD_REASON_ARGUMENT_RANGE, argument, value, minimum, maximum);
  };
  if (!range(EXPERTD_ARGUMENT_TOKENS, slot_.tokens, 0, base::kMaxTokens) ||
      !range(EXPERTD_ARGUMENT_TOP_K, slot_.top_k, 1, base::kMaxTopK) ||
      !range(EXPERTD_ARGUMENT_NUM_RANKS, slot_.num_ranks, 1, kMaxLayoutRanks) ||
      !range(EXPERTD_ARGUMENT_NUM_EXPERTS, slot_.num_experts, slot_.num_ranks, base::kMaxExperts)) {
    return false;
  }
  if (slot_.num_experts % slot_.num_ranks != 0) {
    return check_.refuse(EXPERTD_REASON_ARGUMENT_RANGE, EXPERTD_ARGUMENT_NUM_EXPERTS, slot_.num_experts,
                         slot_.num_ranks, base::kMaxExperts);
  }
  shape.ranks = slot_.num_ranks;
  shape.experts = slot_.num_experts;
  shape.local_experts = slot_.num_experts / slot_.num_ranks;
  shape.tokens = slot_.tokens;
  request_->with_weights = false;
  return routing_inputs() && check_.output(EXPERTD_OUT_RANK_PREFIX, uint64_t{shape.ranks} * 4, false) &&
         check_.output(EXPERTD_OUT_LAYOUT_RANGE, 4, false) &&
         check_.output(EXPERTD_OUT_EXPERT_COUNTS, uint64_t{shape.experts} * 4, false) &&
         check_.output(EXPERTD_OUT_TOKEN_RANK_MASK, uint64_t{slot_.tokens} * shape.ranks, false);
}

}  // namespace

engine::RankState* admit(const expertd_slot& slot, const AdmitContext& context, session::SessionTables* tables,
                         engine::Request* request) {
  *request = engine::Request{};  // nothing of the operation that was in the slot before
  request->session = tables->id;
  request->slot = context.slot_index;
  request->seq = context.seq;
  request->shape.kind = static_cast<OpKind>(slot.op < EXPERTD_OP_COUNT ? slot.op : 0);
  request->submit_ns = slot.submit_ns <= context.now_ns ? slot.submit_ns : context.now_ns;
  request->admit_ns = context.now_ns;
  Admission admission(slot, tables, request);
  engine::RankState* const rank = admission.rank();
  const bool outstanding = rank != nullptr && rank->open_handles != 0;
  uint64_t timeout_ns = context.default_timeout_ns;
  if (rank != nullptr) {
    const engine::GroupSettings& settings = rank->group->settings();
    timeout_ns = rank->next_number == 1 ? settings.first_op_timeout_ns : settings.op_timeout_ns;
    request->shape.rank = rank->rank;
  }
  if (admission.frame(context) && admission.group(rank)) {
    (void)admission.operation(rank != nullptr ? rank->group : nullptr);
  }
  request->begins = rank != nullptr && !outstanding && request->rejected_reason == 0 && may_begin(slot, *rank);
  constexpr uint64_t kLongest = 24ULL * 3600 * 1'000'000'000;
  const uint64_t asked_ns = slot.timeout_ns != 0 ? slot.timeout_ns : timeout_ns;
  request->deadline_ns = context.now_ns + std::min(asked_ns, kLongest);
  return rank;
}

}  // namespace expertd::transport
