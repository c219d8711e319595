// SPDX-License-Identifier: Apache-2.0
// Refusals are left to the daemon wherever a descriptor can be written, so that there is one place that checks. Sizes
// are therefore computed from arguments clamped to the group's limits. What is refused here the daemon is told by a
// descriptor of its own (build_refusal).
#include "client/src/op_request.h"

#include <algorithm>
#include <cstddef>
#include <cstdlib>

#include "client/src/local_kernels/layout_params.h"

namespace expertd::client {
namespace {

constexpr uintptr_t kKernelAlignment = 16;

struct FlagPair {
  uint32_t caller;
  uint32_t slot;
};
constexpr FlagPair kFlags[] = {
    {EXPERTD_WORST_TOKENS, EXPERTD_SLOT_WORST_TOKENS},       {EXPERTD_EXPANDED, EXPERTD_SLOT_EXPANDED},
    {EXPERTD_ORDER_LAST_LANE, EXPERTD_SLOT_ORDER_LAST_LANE}, {EXPERTD_USE_FP8, EXPERTD_SLOT_QUANTISE_FP8},
    {EXPERTD_ROUND_SCALE, EXPERTD_SLOT_ROUND_SCALE},         {EXPERTD_UE8M0, EXPERTD_SLOT_UE8M0},
};
constexpr uint32_t kAllFlags = EXPERTD_ASYNC | EXPERTD_WORST_TOKENS | EXPERTD_EXPANDED | EXPERTD_KEEP_FOREIGN_WEIGHTS |
                               EXPERTD_ORDER_LAST_LANE | EXPERTD_USE_FP8 | EXPERTD_ROUND_SCALE | EXPERTD_UE8M0;

Status set_flags(uint32_t flags, OpRequest* request) {
  if ((flags & ~kAllFlags) != 0) {
    return range_error(EXPERTD_REASON_ARGUMENT_RANGE, "flags", flags, 0, kAllFlags);
  }
  request->flags = flags;
  for (const FlagPair& pair : kFlags) {
    request->slot.flags |= (flags & pair.caller) != 0 ? pair.slot : 0u;
  }
  return {};
}

// Of a dispatch, for the daemon: whether the caller computes meanwhile is among what its executor is chosen by.
void mark_split(const Group& group, OpRequest* request) {
  if (group.tells_split() && !request->captured && (request->flags & EXPERTD_ASYNC) != 0) {
    request->slot.flags |= EXPERTD_SLOT_SPLIT;
  }
}

void set_in(OpRequest* request, uint32_t index, const void* pointer, uint64_t bytes) {
  if (pointer != nullptr) {
    request->tensors[index] = {pointer, bytes, 0, Direction::kIn, CopyBack::kAll, 0};
  }
}

void set_out(OpRequest* request, uint32_t index, void* pointer, uint64_t bytes) {
  if (pointer != nullptr) {
    request->tensors[index] = {pointer, bytes, 0, Direction::kOut, CopyBack::kAll, 0};
  }
}

void set_out_rows(OpRequest* request, uint32_t index, void* pointer, uint64_t rows, uint64_t row_bytes, CopyBack kind) {
  if (pointer != nullptr) {
    request->tensors[index] = {pointer, rows * row_bytes, 0, Direction::kOut, kind, row_bytes};
  }
}

void set_added(OpRequest* request, uint32_t index, void* pointer, uint64_t bytes) {
  if (pointer != nullptr) {
    request->tensors[index] = {pointer, bytes, 0, Direction::kInOut, CopyBack::kAll, 0};
  }
}

// 8 stands for "not given" too: the field must be 4 or 8.
uint32_t idx_bytes(expertd_data_type_t type) {
  return type == EXPERTD_I32 ? 4 : 8;
}

Status check_idx_type(expertd_data_type_t type, bool given) {
  if (given && type != EXPERTD_I32 && type != EXPERTD_I64) {
    return about(error(EXPERTD_REASON_WRONG_DTYPE, "idx_type = %d, allowed EXPERTD_I32 (%d), EXPERTD_I64 (%d)",
                       static_cast<int>(type), EXPERTD_I32, EXPERTD_I64),
                 {EXPERTD_ARGUMENT_IN_TOPK_IDX, type, EXPERTD_I32, EXPERTD_I64});
  }
  return {};
}

void start(const Group& group, uint32_t op, uint32_t tokens, uint64_t timeout_ns, OpRequest* request) {
  expertd_slot& slot = request->slot;
  slot.op = op;
  slot.group = group.id();
  slot.timeout_ns = timeout_ns;
  slot.tokens = tokens;
  slot.top_k = group.config().top_k;
  slot.hidden = group.config().hidden;
  slot.dtype = EXPERTD_DTYPE_BF16;
  slot.row_bytes = 2 * group.config().hidden;
  slot.topk_idx_bytes = 8;
  request->timeout_ns = group.next_timeout_ns(timeout_ns);
  request->rows_per_expert = static_cast<uint32_t>(std::min<uint64_t>(group.config().worst_rows(), UINT32_MAX));
}

uint64_t clamped_tokens(const Group& group, uint32_t tokens) {
  return std::min<uint64_t>(tokens, group.config().max_tokens);
}

template <typename Args>
void set_payload(const Args& args, OpRequest* request) {
  if (args.dtype == EXPERTD_BF16) {
    return;
  }
  expertd_slot& slot = request->slot;
  slot.dtype = static_cast<uint32_t>(args.dtype);
  slot.row_bytes = args.row_bytes;
  slot.side_elements = args.side_elements;
  slot.side_element_bytes = args.side_element_bytes;
  const bool row_major = args.side_row_stride == 0 && args.side_element_stride == 0;
  slot.side_element_stride = row_major ? int64_t{args.side_element_bytes} : args.side_element_stride;
  slot.side_row_stride = row_major ? int64_t{args.side_elements} * args.side_element_bytes : args.side_row_stride;
}

// The member was added later: a caller's struct that ends before it gives none.
template <typename Args>
uint32_t token_bound_of(const Args& args) {
  return args.struct_size >= offsetof(Args, token_bound) + sizeof(args.token_bound) ? args.token_bound : 0;
}

// The bytes that a strided [tokens, S] tensor touches, which may begin in front of its pointer.
Status set_side(const void* side, uint64_t tokens, OpRequest* request) {
  const expertd_slot& slot = request->slot;
  if (side == nullptr || slot.side_elements == 0 || tokens == 0) {
    return {};
  }
  constexpr int64_t kMaxStride = int64_t{1} << 40;
  for (const int64_t stride : {slot.side_row_stride, slot.side_element_stride}) {
    if (stride > kMaxStride || stride < -kMaxStride) {
      return range_error(EXPERTD_REASON_ARGUMENT_RANGE, "side_stride", stride, -kMaxStride, kMaxStride);
    }
  }
  // At most 65536 * 2^40 + 2^20 * 2^40 in size.
  constexpr uint32_t kMaxSideElements = 1u << 20;
  if (slot.side_elements > kMaxSideElements) {
    return range_error(EXPERTD_REASON_ARGUMENT_RANGE, "side_elements", slot.side_elements, 0, kMaxSideElements);
  }
  const int64_t row_span = static_cast<int64_t>(tokens - 1) * slot.side_row_stride;
  const int64_t element_span = (int64_t{slot.side_elements} - 1) * slot.side_element_stride;
  const int64_t lowest = std::min<int64_t>(row_span, 0) + std::min<int64_t>(element_span, 0);
  const int64_t highest = std::max<int64_t>(row_span, 0) + std::max<int64_t>(element_span, 0);
  TensorArg& tensor = request->tensors[EXPERTD_IN_SIDE];
  tensor.pointer = side;
  tensor.lead = static_cast<uint64_t>(-lowest);
  tensor.bytes = static_cast<uint64_t>(highest - lowest) + slot.side_element_bytes;
  return {};
}

Status check_dtype(expertd_data_type_t dtype) {
  if (dtype != EXPERTD_BF16 && dtype != EXPERTD_BYTES) {
    return about(error(EXPERTD_REASON_WRONG_DTYPE, "dtype = %d, allowed EXPERTD_BF16 (%d), EXPERTD_BYTES (%d)",
                       static_cast<int>(dtype), EXPERTD_BF16, EXPERTD_BYTES),
                 {EXPERTD_ARGUMENT_DTYPE, dtype, EXPERTD_BF16, EXPERTD_BYTES});
  }
  return {};
}

Status no_window(const Group& group) {
  return error(EXPERTD_REASON_MODE_MISMATCH, "the group %s has no window: its mode is %u, low latency needs %d or %d",
               group.config().name.c_str(), group.config().mode, EXPERTD_MODE_INFERENCE, EXPERTD_MODE_AUTO);
}

}  // namespace

bool are_aligned(const OpRequest& request) {
  return std::all_of(request.tensors.begin(), request.tensors.end(), [](const TensorArg& tensor) {
    return reinterpret_cast<uintptr_t>(tensor.pointer) % kKernelAlignment == 0;
  });
}

void build_refusal(const Group& group, uint32_t op, uint64_t timeout_ns, const Status& why, OpRequest* request) {
  *request = OpRequest();
  request->timeout_ns = group.next_timeout_ns(timeout_ns);
  expertd_slot& slot = request->slot;
  slot.op = op;
  slot.flags = EXPERTD_SLOT_REFUSED;
  slot.group = group.id();
  slot.timeout_ns = timeout_ns;
  slot.refused_reason = static_cast<uint32_t>(why.reason);
  slot.refused_argument = why.subject.argument;
  slot.refused_value = why.subject.value;
  slot.refused_minimum = why.subject.minimum;
  slot.refused_maximum = why.subject.maximum;
}

Status build_barrier(const Group& group, uint32_t flags, uint64_t timeout_ns, OpRequest* request) {
  request->slot.op = EXPERTD_OP_BARRIER;
  request->slot.group = group.id();
  request->slot.timeout_ns = timeout_ns;
  request->timeout_ns = group.next_timeout_ns(timeout_ns);
  return set_flags(flags, request);
}

Status build_layout(const expertd_layout_args_t& args, uint64_t default_timeout_ns, OpRequest* request) {
  Status status = check_idx_type(args.idx_type, true);
  if (!status.ok()) {
    return status;
  }
  expertd_slot& slot = request->slot;
  slot.op = EXPERTD_OP_LAYOUT;
  slot.timeout_ns = args.timeout_ns;
  slot.tokens = args.tokens;
  slot.top_k = args.top_k;
  slot.topk_idx_bytes = idx_bytes(args.idx_type);
  slot.num_experts = args.num_experts;
  slot.num_ranks = args.num_ranks;
  request->timeout_ns = args.timeout_ns == 0 ? default_timeout_ns : args.timeout_ns;
  const uint64_t tokens = std::min<uint64_t>(args.tokens, kLayoutTokensMax);
  const uint64_t ranks = std::min(args.num_ranks, kLayoutRanksMax);
  set_in(request, EXPERTD_IN_TOPK_IDX, args.topk_idx,
         tokens * std::min(args.top_k, kLayoutTopKMax) * slot.topk_idx_bytes);
  set_out(request, EXPERTD_OUT_RANK_PREFIX, args.tokens_per_rank, ranks * 4);
  set_out(request, EXPERTD_OUT_LAYOUT_RANGE, args.tokens_per_node, 4);
  set_out(request, EXPERTD_OUT_EXPERT_COUNTS, args.tokens_per_expert,
          uint64_t{std::min(args.num_experts, kLayoutExpertsMax)} * 4);
  set_out(request, EXPERTD_OUT_TOKEN_RANK_MASK, args.token_rank_mask, tokens * ranks);
  return set_flags(args.flags, request);
}

Status build_dispatch(const Group& group, const expertd_dispatch_args_t& args, OpRequest* request) {
  const GroupConfig& config = group.config();
  start(group, EXPERTD_OP_DISPATCH, args.tokens, args.timeout_ns, request);
  request->slot.token_bound = token_bound_of(args);
  Status status = check_dtype(args.dtype);
  if (status.ok()) {
    status = check_idx_type(args.idx_type, args.topk_idx != nullptr);
  }
  if (status.ok()) {
    status = set_flags(args.flags, request);
  }
  if (!status.ok()) {
    return status;
  }
  expertd_slot& slot = request->slot;
  mark_split(group, request);
  set_payload(args, request);
  slot.topk_idx_bytes = idx_bytes(args.idx_type);
  slot.capacity_rows = args.capacity_rows;
  slot.expert_alignment = std::max(args.expert_alignment, 1u);
  if ((args.flags & EXPERTD_KEEP_FOREIGN_WEIGHTS) == 0) {
    slot.flags |= EXPERTD_SLOT_ZERO_FOREIGN_WEIGHTS;
  }
  if (args.cached.generation != 0) {
    slot.flags |= EXPERTD_SLOT_CACHED;
    slot.handle_index = args.cached.index;
    slot.handle_generation = args.cached.generation;
  }
  const uint64_t tokens = clamped_tokens(group, args.tokens);
  const uint64_t lanes = tokens * config.top_k;
  set_in(request, EXPERTD_IN_X, args.x, tokens * slot.row_bytes);
  set_in(request, EXPERTD_IN_TOPK_IDX, args.topk_idx, lanes * slot.topk_idx_bytes);
  set_in(request, EXPERTD_IN_TOPK_WEIGHTS, args.topk_weights, lanes * 4);
  set_in(request, EXPERTD_IN_TOKEN_RANK_MASK, args.token_rank_mask, tokens * config.ranks);
  const bool worst = (args.flags & EXPERTD_WORST_TOKENS) != 0;
  const CopyBack rows = worst ? CopyBack::kAll : CopyBack::kReceivedRows;
  const uint64_t lanes_out = (args.flags & EXPERTD_EXPANDED) != 0 ? 1 : config.top_k;
  const uint64_t capacity = args.capacity_rows;
  set_out_rows(request, EXPERTD_OUT_X, args.recv_x, capacity, slot.row_bytes, rows);
  set_out_rows(request, EXPERTD_OUT_SIDE, args.recv_side, capacity,
               uint64_t{slot.side_elements} * slot.side_element_bytes, rows);
  set_out_rows(request, EXPERTD_OUT_TOPK_IDX, args.recv_topk_idx, capacity, lanes_out * slot.topk_idx_bytes, rows);
  set_out_rows(request, EXPERTD_OUT_TOPK_WEIGHTS, args.recv_topk_weights, capacity, lanes_out * 4, rows);
  set_out_rows(request, EXPERTD_OUT_SRC_INFO, args.recv_src_info, capacity, 4, rows);
  set_out(request, EXPERTD_OUT_EXPERT_COUNTS, args.expert_counts, uint64_t{config.local_experts()} * 4);
  set_out(request, EXPERTD_OUT_RANK_PREFIX, args.rank_prefix, uint64_t{config.ranks} * config.ranks * 4);
  set_added(request, EXPERTD_OUT_WAIT_STATS, args.wait_stats, uint64_t{config.ranks} * 8);
  return set_side(args.side, tokens, request);
}

Status build_combine(const Group& group, const expertd_combine_args_t& args, OpRequest* request) {
  const GroupConfig& config = group.config();
  start(group, EXPERTD_OP_COMBINE, args.tokens, args.timeout_ns, request);
  request->slot.token_bound = token_bound_of(args);
  expertd_slot& slot = request->slot;
  slot.capacity_rows = args.rows;
  slot.handle_index = args.handle.index;
  slot.handle_generation = args.handle.generation;
  const uint64_t tokens = clamped_tokens(group, args.tokens);
  const uint64_t lanes_in = (args.flags & EXPERTD_EXPANDED) != 0 ? 1 : config.top_k;
  set_in(request, EXPERTD_IN_X, args.x, uint64_t{args.rows} * slot.row_bytes);
  set_in(request, EXPERTD_IN_TOPK_WEIGHTS, args.topk_weights, uint64_t{args.rows} * lanes_in * 4);
  set_in(request, EXPERTD_IN_BIAS0, args.bias0, tokens * slot.row_bytes);
  set_in(request, EXPERTD_IN_BIAS1, args.bias1, tokens * slot.row_bytes);
  set_out(request, EXPERTD_OUT_X, args.combined_x, tokens * slot.row_bytes);
  set_out(request, EXPERTD_OUT_TOPK_WEIGHTS, args.combined_topk_weights, tokens * config.top_k * 4);
  set_added(request, EXPERTD_OUT_WAIT_STATS, args.wait_stats, uint64_t{config.ranks} * 8);
  return set_flags(args.flags, request);
}

Status ll_outputs(const Group& group, uint32_t set, expertd_ll_outputs_t* outputs) {
  if (group.window() == nullptr) {
    return no_window(group);
  }
  const GroupConfig& config = group.config();
  const LlWindowLayout layout = config.window_layout(set);
  char* base = static_cast<char*>(group.window()->data);
  outputs->recv_x = base + layout.recv_x;
  outputs->recv_scales =
      expertd_ll_window_scale_bytes(config.hidden, config.dispatch_dtypes) == 0 ? nullptr : base + layout.recv_scales;
  outputs->expert_counts = reinterpret_cast<int32_t*>(base + layout.expert_counts);
  outputs->recv_src_info = reinterpret_cast<int32_t*>(base + layout.src_info);
  outputs->layout_range = reinterpret_cast<int64_t*>(base + layout.layout_range);
  outputs->combine_x = base + layout.combine_x;
  outputs->rows_per_expert = static_cast<uint32_t>(config.worst_rows());
  return {};
}

namespace {

uint32_t payload_of(const expertd_slot& slot) {
  if (slot.dtype == EXPERTD_DTYPE_BYTES) {
    return EXPERTD_PAYLOAD_BYTES;
  }
  return (slot.flags & EXPERTD_SLOT_QUANTISE_FP8) != 0 ? EXPERTD_PAYLOAD_FP8 : EXPERTD_PAYLOAD_BF16;
}

// Null outputs become places in the window; what cannot fit there is refused, because it would overrun its region.
Status fill_ll_outputs(const Group& group, uint32_t set, uint64_t side_row, expertd_ll_dispatch_args_t* args) {
  const bool wants_side = side_row != 0;
  const bool from_window = args->recv_x == nullptr || args->expert_counts == nullptr ||
                           args->recv_src_info == nullptr || args->layout_range == nullptr ||
                           (wants_side && args->recv_scales == nullptr);
  if (!from_window || group.window() == nullptr) {
    // Without a window the daemon says what is missing.
    return {};
  }
  const uint32_t hidden = group.config().hidden;
  if (args->recv_x == nullptr && args->dtype == EXPERTD_BYTES && args->row_bytes > 2 * hidden) {
    return range_error(EXPERTD_REASON_ARGUMENT_RANGE, "row_bytes", args->row_bytes, 16, int64_t{2} * hidden);
  }
  const uint64_t scale_row = hidden / EXPERTD_LL_SCALE_CHANNELS * 4;
  if (wants_side && args->recv_scales == nullptr && side_row > scale_row) {
    return range_error(EXPERTD_REASON_ARGUMENT_RANGE, "side_elements * side_element_bytes",
                       static_cast<int64_t>(side_row), 0, static_cast<int64_t>(scale_row));
  }
  expertd_ll_outputs_t places{};
  Status status = ll_outputs(group, set, &places);
  if (!status.ok()) {
    return status;
  }
  args->recv_x = args->recv_x == nullptr ? places.recv_x : args->recv_x;
  args->recv_scales = wants_side && args->recv_scales == nullptr ? places.recv_scales : args->recv_scales;
  args->expert_counts = args->expert_counts == nullptr ? places.expert_counts : args->expert_counts;
  args->recv_src_info = args->recv_src_info == nullptr ? places.recv_src_info : args->recv_src_info;
  args->layout_range = args->layout_range == nullptr ? places.layout_range : args->layout_range;
  return {};
}

// Bytes of a row's scales or side elements in the output; 0 when none travel.
uint64_t ll_side_row_bytes(const expertd_slot& slot) {
  if (slot.dtype == EXPERTD_DTYPE_BYTES) {
    return uint64_t{slot.side_elements} * slot.side_element_bytes;
  }
  if ((slot.flags & EXPERTD_SLOT_QUANTISE_FP8) == 0) {
    return 0;
  }
  const uint64_t groups = slot.hidden / EXPERTD_LL_SCALE_CHANNELS;
  return (slot.flags & EXPERTD_SLOT_UE8M0) != 0 ? groups : groups * 4;
}

}  // namespace

Status build_ll_dispatch(const Group& group, const expertd_ll_dispatch_args_t& given, uint32_t set,
                         OpRequest* request) {
  const GroupConfig& config = group.config();
  expertd_ll_dispatch_args_t args = given;
  start(group, EXPERTD_OP_LL_DISPATCH, args.tokens, args.timeout_ns, request);
  request->slot.token_bound = token_bound_of(args);
  Status status = check_dtype(args.dtype);
  if (status.ok()) {
    status = check_idx_type(args.idx_type, args.topk_idx != nullptr);
  }
  if (status.ok()) {
    status = set_flags(args.flags, request);
  }
  if (!status.ok()) {
    return status;
  }
  expertd_slot& slot = request->slot;
  mark_split(group, request);
  set_payload(args, request);
  slot.topk_idx_bytes = idx_bytes(args.idx_type);
  const uint64_t side_row = ll_side_row_bytes(slot);
  if (config.carries(payload_of(slot))) {  // others have no room in the window, and the daemon refuses them
    status = fill_ll_outputs(group, set, side_row, &args);
  }
  if (!status.ok()) {
    return status;
  }
  const uint64_t tokens = clamped_tokens(group, args.tokens);
  const uint64_t experts = config.local_experts();
  const uint64_t rows = experts * config.worst_rows();
  const bool fp8 = (slot.flags & EXPERTD_SLOT_QUANTISE_FP8) != 0 && slot.dtype == EXPERTD_DTYPE_BF16;
  const uint64_t out_row = fp8 ? config.hidden : slot.row_bytes;
  // f32 scales lie column-major, so that only side elements of byte rows are whole rows.
  const CopyBack side_rows = slot.dtype == EXPERTD_DTYPE_BYTES ? CopyBack::kExpertRows : CopyBack::kAll;
  set_in(request, EXPERTD_IN_X, args.x, tokens * slot.row_bytes);
  set_in(request, EXPERTD_IN_TOPK_IDX, args.topk_idx, tokens * config.top_k * slot.topk_idx_bytes);
  set_out_rows(request, EXPERTD_OUT_X, args.recv_x, rows, out_row, CopyBack::kExpertRows);
  set_out_rows(request, EXPERTD_OUT_SIDE, side_row == 0 ? nullptr : args.recv_scales, rows, side_row, side_rows);
  set_out_rows(request, EXPERTD_OUT_SRC_INFO, args.recv_src_info, rows, 4, CopyBack::kExpertRows);
  set_out(request, EXPERTD_OUT_EXPERT_COUNTS, args.expert_counts, experts * 4);
  set_out(request, EXPERTD_OUT_LAYOUT_RANGE, args.layout_range, experts * config.ranks * 8);
  set_added(request, EXPERTD_OUT_STATS, args.stats, experts * 4);
  set_added(request, EXPERTD_OUT_WAIT_STATS, args.wait_stats, uint64_t{config.ranks} * 8);
  return set_side(args.side, tokens, request);
}

Status build_ll_combine(const Group& group, const expertd_ll_combine_args_t& args, OpRequest* request) {
  const GroupConfig& config = group.config();
  start(group, EXPERTD_OP_LL_COMBINE, args.tokens, args.timeout_ns, request);
  request->slot.token_bound = token_bound_of(args);
  Status status = check_idx_type(args.idx_type, args.topk_idx != nullptr);
  if (!status.ok()) {
    return status;
  }
  expertd_slot& slot = request->slot;
  slot.topk_idx_bytes = idx_bytes(args.idx_type);
  slot.handle_index = args.handle.index;
  slot.handle_generation = args.handle.generation;
  const void* x = args.x;
  if (x == nullptr) {
    uint32_t set = 0;
    expertd_ll_outputs_t places{};
    status = group.ll_set_of(args.handle, &set);
    if (status.ok()) {
      status = ll_outputs(group, set, &places);
    }
    if (!status.ok()) {
      return status;
    }
    x = places.combine_x;
  }
  const uint64_t tokens = clamped_tokens(group, args.tokens);
  set_in(request, EXPERTD_IN_X, x, config.local_experts() * config.worst_rows() * slot.row_bytes);
  set_in(request, EXPERTD_IN_TOPK_IDX, args.topk_idx, tokens * config.top_k * slot.topk_idx_bytes);
  set_in(request, EXPERTD_IN_TOPK_WEIGHTS, args.topk_weights, tokens * config.top_k * 4);
  set_out(request, EXPERTD_OUT_X, args.combined_x, tokens * slot.row_bytes);
  set_added(request, EXPERTD_OUT_WAIT_STATS, args.wait_stats, uint64_t{config.ranks} * 8);
  return set_flags(args.flags, request);
}

}  // namespace expertd::client
