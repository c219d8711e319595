// SPDX-License-Identifier: Apache-2.0
// Every refusal of admission: Reason, argument, value and allowed range, one row per rule.
#include <gtest/gtest.h>

#include <limits>
#include <string>

#include "tests/support/fake_admission.h"

namespace expertd::test {
namespace {

struct Rule {
  const char* name;
  uint32_t op;
  void (*change)(expertd_slot& slot, AdmissionWorld& world);
  uint32_t reason;
  uint32_t argument;
  int64_t value;
  int64_t minimum;
  int64_t maximum;
};

class AdmitRule : public testing::TestWithParam<Rule> {};

TEST_P(AdmitRule, NamesReasonArgumentValueAndRange) {
  const Rule& rule = GetParam();
  AdmissionWorld world;
  if (rule.op == EXPERTD_OP_COMBINE || rule.op == EXPERTD_OP_LL_COMBINE) {
    world.leave_handle(rule.op == EXPERTD_OP_LL_COMBINE);
  }
  expertd_slot slot = AdmissionWorld::slot(rule.op);
  ASSERT_TRUE(world.admits(slot)) << "the unchanged slot: reason " << world.request.rejected_reason << " argument "
                                  << world.request.rejected_argument;
  rule.change(slot, world);
  (void)world.admit(slot);
  EXPECT_EQ(world.request.rejected_reason, rule.reason);
  EXPECT_EQ(world.request.rejected_argument, rule.argument);
  EXPECT_EQ(world.request.rejected_value, rule.value);
  EXPECT_EQ(world.request.rejected_minimum, rule.minimum);
  EXPECT_EQ(world.request.rejected_maximum, rule.maximum);
}

#define RULE_CHANGE [](expertd_slot & slot, AdmissionWorld & world)
#define RULE_END (void)slot, (void)world

void make_bytes(expertd_slot& slot, uint32_t op) {
  slot = AdmissionWorld::slot_of_bytes(op);
}

INSTANTIATE_TEST_SUITE_P(
    Frame, AdmitRule,
    testing::Values(
        Rule{"seq", EXPERTD_OP_BARRIER, RULE_CHANGE { slot.seq = 9; RULE_END;
}  // namespace
, EXPERTD_REASON_DESCRIPTOR_MALFORMED, EXPERTD_ARGUMENT_SEQ, 9, 1, 1
}  // namespace expertd::test
, Rule{"op_none", EXPERTD_OP_BARRIER, RULE_CHANGE{slot.op = 0;
RULE_END;
}
, EXPERTD_REASON_DESCRIPTOR_MALFORMED, EXPERTD_ARGUMENT_OP, 0, 1, 6
}
, Rule{"op_beyond", EXPERTD_OP_BARRIER, RULE_CHANGE{slot.op = 7;
RULE_END;
}
, EXPERTD_REASON_DESCRIPTOR_MALFORMED, EXPERTD_ARGUMENT_OP, 7, 1, 6
}
, Rule{"flags", EXPERTD_OP_BARRIER, RULE_CHANGE{slot.flags = 8192;
RULE_END;
}
, EXPERTD_REASON_DESCRIPTOR_MALFORMED, EXPERTD_ARGUMENT_FLAGS, 8192, 0, 8191
}
, Rule{"copy_engine_without_a_group_for_it", EXPERTD_OP_BARRIER, RULE_CHANGE{slot.flags = EXPERTD_SLOT_COPY_ENGINE;
RULE_END;
}
, EXPERTD_REASON_UNSUPPORTED, EXPERTD_ARGUMENT_FLAGS, 2048, 0, 8191
}
, Rule{"exchange_buffer_without_copy_engine", EXPERTD_OP_BARRIER, RULE_CHANGE{slot.exchange_buffer = 1;
RULE_END;
}
, EXPERTD_REASON_DESCRIPTOR_MALFORMED, EXPERTD_ARGUMENT_EXCHANGE_BUFFER, 1, 0, 0
}
, Rule{"reserved_first", EXPERTD_OP_BARRIER, RULE_CHANGE{slot.reserved[0] = 1;
RULE_END;
}
, EXPERTD_REASON_DESCRIPTOR_MALFORMED, EXPERTD_ARGUMENT_RESERVED, 1, 0, 0
}
, Rule{"reserved_last", EXPERTD_OP_BARRIER, RULE_CHANGE{slot.reserved[sizeof(slot.reserved) - 1] = 1;
RULE_END;
}
, EXPERTD_REASON_DESCRIPTOR_MALFORMED, EXPERTD_ARGUMENT_RESERVED, 1, 0, 0
}
, Rule{"reserved_of_tensor", EXPERTD_OP_BARRIER, RULE_CHANGE{slot.tensors[17].reserved = 1;
RULE_END;
}
, EXPERTD_REASON_DESCRIPTOR_MALFORMED, EXPERTD_ARGUMENT_OUT_TOKEN_RANK_MASK, 1, 0, 0
}
, Rule{"group", EXPERTD_OP_BARRIER, RULE_CHANGE{slot.group = 8;
RULE_END;
}
, EXPERTD_REASON_NO_SUCH_GROUP, EXPERTD_ARGUMENT_GROUP, 8, 0, 0
}
, Rule{"no_group", EXPERTD_OP_DISPATCH, RULE_CHANGE{slot.group = 0;
RULE_END;
}
, EXPERTD_REASON_NO_SUCH_GROUP, EXPERTD_ARGUMENT_GROUP, 0, 0, 0
}),
    [](const auto& row) {
  return std::string(row.param.name); });

INSTANTIATE_TEST_SUITE_P(
    Dispatch, AdmitRule,
    testing::Values(
        Rule{"tokens", EXPERTD_OP_DISPATCH, RULE_CHANGE { slot.tokens = 65; RULE_END;
}
, EXPERTD_REASON_TOKENS_EXCEED_MAX, EXPERTD_ARGUMENT_TOKENS, 65, 0, 64
}
, Rule{"hidden", EXPERTD_OP_DISPATCH, RULE_CHANGE{slot.hidden = 640;
RULE_END;
}
, EXPERTD_REASON_ARGUMENT_RANGE, EXPERTD_ARGUMENT_HIDDEN, 640, 512, 512
}
, Rule{"alignment", EXPERTD_OP_DISPATCH, RULE_CHANGE{slot.expert_alignment = 65537;
RULE_END;
}
, EXPERTD_REASON_ARGUMENT_RANGE, EXPERTD_ARGUMENT_EXPERT_ALIGNMENT, 65537, 0, 65536
}
, Rule{"capacity", EXPERTD_OP_DISPATCH, RULE_CHANGE{slot.capacity_rows = (1U << 26) + 1;
RULE_END;
}
, EXPERTD_REASON_ARGUMENT_RANGE, EXPERTD_ARGUMENT_CAPACITY_ROWS, (1 << 26) + 1, 0, 1 << 26
}
, Rule{"expanded_mask", EXPERTD_OP_DISPATCH, RULE_CHANGE{slot.flags = EXPERTD_SLOT_EXPANDED;
slot.tensors[EXPERTD_IN_TOKEN_RANK_MASK].buffer = 1;
RULE_END;
}
, EXPERTD_REASON_UNSUPPORTED, EXPERTD_ARGUMENT_IN_TOKEN_RANK_MASK, 1, 0, 0
}
, Rule{"dtype", EXPERTD_OP_DISPATCH, RULE_CHANGE{slot.dtype = EXPERTD_DTYPE_F32;
RULE_END;
}
, EXPERTD_REASON_WRONG_DTYPE, EXPERTD_ARGUMENT_DTYPE, 4, 1, 2
}
, Rule{"row_bytes_zero", EXPERTD_OP_DISPATCH, RULE_CHANGE{make_bytes(slot, EXPERTD_OP_DISPATCH), slot.row_bytes = 0;
RULE_END;
}
, EXPERTD_REASON_ARGUMENT_RANGE, EXPERTD_ARGUMENT_ROW_BYTES, 0, 16, 32768
}
, Rule{"row_bytes_large", EXPERTD_OP_DISPATCH,
       RULE_CHANGE{make_bytes(slot, EXPERTD_OP_DISPATCH), slot.row_bytes = 32784;
RULE_END;
}
, EXPERTD_REASON_ARGUMENT_RANGE, EXPERTD_ARGUMENT_ROW_BYTES, 32784, 16, 32768
}
, Rule{"row_bytes_odd", EXPERTD_OP_DISPATCH, RULE_CHANGE{make_bytes(slot, EXPERTD_OP_DISPATCH), slot.row_bytes = 24;
RULE_END;
}
, EXPERTD_REASON_UNALIGNED, EXPERTD_ARGUMENT_ROW_BYTES, 24, 16, 32768
}
, Rule{"fp8", EXPERTD_OP_DISPATCH, RULE_CHANGE{slot.flags = EXPERTD_SLOT_QUANTISE_FP8;
RULE_END;
}
, EXPERTD_REASON_WRONG_DTYPE, EXPERTD_ARGUMENT_FLAGS, 32, 0, 8191
}
, Rule{"side_of_bf16", EXPERTD_OP_DISPATCH, RULE_CHANGE{slot.side_elements = 3;
RULE_END;
}
, EXPERTD_REASON_WRONG_DTYPE, EXPERTD_ARGUMENT_SIDE_ELEMENTS, 3, 0, 0
}
, Rule{"side_many", EXPERTD_OP_DISPATCH, RULE_CHANGE{make_bytes(slot, EXPERTD_OP_DISPATCH), slot.side_elements = 65537;
RULE_END;
}
, EXPERTD_REASON_ARGUMENT_RANGE, EXPERTD_ARGUMENT_SIDE_ELEMENTS, 65537, 0, 65536
}
, Rule{"side_bytes", EXPERTD_OP_DISPATCH,
       RULE_CHANGE{make_bytes(slot, EXPERTD_OP_DISPATCH), slot.side_element_bytes = 3;
RULE_END;
}
, EXPERTD_REASON_ARGUMENT_RANGE, EXPERTD_ARGUMENT_SIDE_ELEMENT_BYTES, 3, 1, 4
}
, Rule{"side_negative", EXPERTD_OP_DISPATCH,
       RULE_CHANGE{make_bytes(slot, EXPERTD_OP_DISPATCH), slot.side_row_stride = -16;
RULE_END;
}
, EXPERTD_REASON_ARGUMENT_RANGE, EXPERTD_ARGUMENT_SIDE_STRIDE, -16, 0, int64_t{1} << 40
}
, Rule{"side_far", EXPERTD_OP_DISPATCH,
       RULE_CHANGE{make_bytes(slot, EXPERTD_OP_DISPATCH), slot.side_row_stride = (int64_t{1} << 40) + 2;
RULE_END;
}
, EXPERTD_REASON_ARGUMENT_RANGE, EXPERTD_ARGUMENT_SIDE_STRIDE, (int64_t{1} << 40) + 2, 0, int64_t{1} << 40
}
, Rule{"side_odd", EXPERTD_OP_DISPATCH, RULE_CHANGE{make_bytes(slot, EXPERTD_OP_DISPATCH), slot.side_element_stride = 3;
RULE_END;
}
, EXPERTD_REASON_ARGUMENT_RANGE, EXPERTD_ARGUMENT_SIDE_STRIDE, 3, 0, int64_t{1} << 40
}
, Rule{"top_k_zero", EXPERTD_OP_DISPATCH, RULE_CHANGE{slot.top_k = 0;
RULE_END;
}
, EXPERTD_REASON_ARGUMENT_RANGE, EXPERTD_ARGUMENT_TOP_K, 0, 1, 4
}
, Rule{"top_k_large", EXPERTD_OP_DISPATCH, RULE_CHANGE{slot.top_k = 5;
RULE_END;
}
, EXPERTD_REASON_ARGUMENT_RANGE, EXPERTD_ARGUMENT_TOP_K, 5, 1, 4
}
, Rule{"idx_bytes", EXPERTD_OP_DISPATCH, RULE_CHANGE{slot.topk_idx_bytes = 6;
RULE_END;
}
, EXPERTD_REASON_WRONG_DTYPE, EXPERTD_ARGUMENT_TOPK_IDX_BYTES, 6, 4, 8
}
, Rule{"handle_limit", EXPERTD_OP_DISPATCH, RULE_CHANGE{slot.handle_index = 8;
RULE_END;
}
, EXPERTD_REASON_HANDLE_LIMIT, EXPERTD_ARGUMENT_HANDLE, 8, 0, 7
}
, Rule{"handle_limit_of_group", EXPERTD_OP_DISPATCH,
       RULE_CHANGE{slot.handle_index = 4, world.tables.groups[0].handle_limit = 4;
}
, EXPERTD_REASON_HANDLE_LIMIT, EXPERTD_ARGUMENT_HANDLE, 4, 0, 3
}
, Rule{"generation_zero", EXPERTD_OP_DISPATCH, RULE_CHANGE{slot.handle_generation = 0;
RULE_END;
}
, EXPERTD_REASON_STALE_HANDLE, EXPERTD_ARGUMENT_HANDLE, 0, 1, std::numeric_limits<uint32_t>::max()
}
, Rule{"cached_unknown", EXPERTD_OP_DISPATCH, RULE_CHANGE{slot.flags = EXPERTD_SLOT_CACHED, slot.handle_index = 2;
RULE_END;
}
, EXPERTD_REASON_STALE_HANDLE, EXPERTD_ARGUMENT_HANDLE, 1, 0, 0
}
, Rule{"missing_x", EXPERTD_OP_DISPATCH, RULE_CHANGE{slot.tensors[EXPERTD_IN_X].buffer = 0;
RULE_END;
}
, EXPERTD_REASON_MISSING_ARGUMENT, EXPERTD_ARGUMENT_IN_X, 0, 0, 0
}
, Rule{"missing_idx", EXPERTD_OP_DISPATCH, RULE_CHANGE{slot.tensors[EXPERTD_IN_TOPK_IDX].buffer = 0;
RULE_END;
}
, EXPERTD_REASON_MISSING_ARGUMENT, EXPERTD_ARGUMENT_IN_TOPK_IDX, 0, 0, 0
}
, Rule{"missing_side_out", EXPERTD_OP_DISPATCH,
       RULE_CHANGE{make_bytes(slot, EXPERTD_OP_DISPATCH), slot.tensors[EXPERTD_OUT_SIDE].buffer = 0;
RULE_END;
}
, EXPERTD_REASON_MISSING_ARGUMENT, EXPERTD_ARGUMENT_OUT_SIDE, 0, 0, 0
}
, Rule{"no_such_buffer", EXPERTD_OP_DISPATCH, RULE_CHANGE{slot.tensors[EXPERTD_OUT_X].buffer = 3;
RULE_END;
}
, EXPERTD_REASON_NO_SUCH_BUFFER, EXPERTD_ARGUMENT_OUT_X, 3, 1, base::kMaxBuffersPerSession
}
, Rule{"buffer_beyond", EXPERTD_OP_DISPATCH, RULE_CHANGE{slot.tensors[EXPERTD_OUT_X].buffer = 0xffffffff;
RULE_END;
}
, EXPERTD_REASON_NO_SUCH_BUFFER, EXPERTD_ARGUMENT_OUT_X, 0xffffffff, 1, base::kMaxBuffersPerSession
}
, Rule{"unaligned", EXPERTD_OP_DISPATCH, RULE_CHANGE{slot.tensors[EXPERTD_OUT_X].offset = 8;
RULE_END;
}
, EXPERTD_REASON_UNALIGNED, EXPERTD_ARGUMENT_OUT_X, 8, 0, 1 << 24
}
, Rule{"offset_beyond", EXPERTD_OP_DISPATCH, RULE_CHANGE{slot.tensors[EXPERTD_IN_X].offset = (1U << 24) - 16;
RULE_END;
}
, EXPERTD_REASON_OUT_OF_BOUNDS, EXPERTD_ARGUMENT_IN_X, (1 << 24) - 16 + 64 * 1024, 0, 1 << 24
}
, Rule{"mode", EXPERTD_OP_DISPATCH, RULE_CHANGE{engine::GroupSettings other = AdmissionWorld::settings();
other.normal = false;
static engine::GroupShared inference(other);
world.tables.groups[0].rank.group = &inference;
RULE_END;
}
, EXPERTD_REASON_MODE_MISMATCH, EXPERTD_ARGUMENT_OP, EXPERTD_OP_DISPATCH, 0, 0
}),
    [](const auto& row) {
  return std::string(row.param.name); });

INSTANTIATE_TEST_SUITE_P(
    Combine, AdmitRule,
    testing::Values(
        Rule{"dtype", EXPERTD_OP_COMBINE, RULE_CHANGE { slot.dtype = EXPERTD_DTYPE_BYTES; RULE_END;
}
, EXPERTD_REASON_WRONG_DTYPE, EXPERTD_ARGUMENT_DTYPE, 2, 1, 1
}
, Rule{"capacity", EXPERTD_OP_COMBINE, RULE_CHANGE{slot.capacity_rows = (1U << 26) + 1;
RULE_END;
}
, EXPERTD_REASON_ARGUMENT_RANGE, EXPERTD_ARGUMENT_CAPACITY_ROWS, (1 << 26) + 1, 0, 1 << 26
}
, Rule{"stale", EXPERTD_OP_COMBINE, RULE_CHANGE{slot.handle_generation = 2;
RULE_END;
}
, EXPERTD_REASON_STALE_HANDLE, EXPERTD_ARGUMENT_HANDLE, 2, 1, 1
}
, Rule{"handle_limit", EXPERTD_OP_COMBINE, RULE_CHANGE{slot.handle_index = 0xffffffff;
RULE_END;
}
, EXPERTD_REASON_HANDLE_LIMIT, EXPERTD_ARGUMENT_HANDLE, 0xffffffff, 0, 7
}
, Rule{"low_latency_handle", EXPERTD_OP_COMBINE, RULE_CHANGE{world.leave_handle(true);
RULE_END;
}
, EXPERTD_REASON_STALE_HANDLE, EXPERTD_ARGUMENT_HANDLE, 1, 1, 1
}
, Rule{"tokens_of_handle", EXPERTD_OP_COMBINE, RULE_CHANGE{slot.tokens = 63;
RULE_END;
}
, EXPERTD_REASON_ARGUMENT_RANGE, EXPERTD_ARGUMENT_TOKENS, 63, 64, 64
}
, Rule{"expanded_unlike_handle", EXPERTD_OP_COMBINE, RULE_CHANGE{slot.flags = EXPERTD_SLOT_EXPANDED;
RULE_END;
}
, EXPERTD_REASON_STALE_HANDLE, EXPERTD_ARGUMENT_FLAGS, 2, 0, 8191
}
, Rule{"weights_out_without_in", EXPERTD_OP_COMBINE, RULE_CHANGE{slot.tensors[EXPERTD_IN_TOPK_WEIGHTS].buffer = 0;
slot.tensors[EXPERTD_OUT_TOPK_WEIGHTS].buffer = 1;
RULE_END;
}
, EXPERTD_REASON_MISSING_ARGUMENT, EXPERTD_ARGUMENT_IN_TOPK_WEIGHTS, 0, 0, 0
}),
    [](const auto& row) {
  return std::string(row.param.name); });

INSTANTIATE_TEST_SUITE_P(
    LowLatency, AdmitRule,
    testing::Values(
        Rule{"round_without_fp8", EXPERTD_OP_LL_DISPATCH, RULE_CHANGE { slot.flags = EXPERTD_SLOT_ROUND_SCALE; RULE_END;
}
, EXPERTD_REASON_WRONG_DTYPE, EXPERTD_ARGUMENT_FLAGS, 64, 0, 8191
}
, Rule{"ue8m0_without_round", EXPERTD_OP_LL_DISPATCH,
       RULE_CHANGE{slot.flags = EXPERTD_SLOT_QUANTISE_FP8 | EXPERTD_SLOT_UE8M0;
RULE_END;
}
, EXPERTD_REASON_WRONG_DTYPE, EXPERTD_ARGUMENT_FLAGS, 160, 0, 8191
}
, Rule{"fp8_of_bytes", EXPERTD_OP_LL_DISPATCH, RULE_CHANGE{make_bytes(slot, EXPERTD_OP_LL_DISPATCH);
slot.flags = EXPERTD_SLOT_QUANTISE_FP8;
RULE_END;
}
, EXPERTD_REASON_WRONG_DTYPE, EXPERTD_ARGUMENT_FLAGS, 32, 0, 8191
}
, Rule{"scales_missing", EXPERTD_OP_LL_DISPATCH, RULE_CHANGE{slot.flags = EXPERTD_SLOT_QUANTISE_FP8;
RULE_END;
}
, EXPERTD_REASON_MISSING_ARGUMENT, EXPERTD_ARGUMENT_OUT_SIDE, 0, 0, 0
}
, Rule{"counts_missing", EXPERTD_OP_LL_DISPATCH, RULE_CHANGE{slot.tensors[EXPERTD_OUT_EXPERT_COUNTS].buffer = 0;
RULE_END;
}
, EXPERTD_REASON_MISSING_ARGUMENT, EXPERTD_ARGUMENT_OUT_EXPERT_COUNTS, 0, 0, 0
}
, Rule{"top_k_of_handle", EXPERTD_OP_LL_COMBINE, RULE_CHANGE{slot.top_k = 3;
RULE_END;
}
, EXPERTD_REASON_ARGUMENT_RANGE, EXPERTD_ARGUMENT_TOP_K, 3, 4, 4
}
, Rule{"weights_missing", EXPERTD_OP_LL_COMBINE, RULE_CHANGE{slot.tensors[EXPERTD_IN_TOPK_WEIGHTS].buffer = 0;
RULE_END;
}
, EXPERTD_REASON_MISSING_ARGUMENT, EXPERTD_ARGUMENT_IN_TOPK_WEIGHTS, 0, 0, 0
}
, Rule{"combine_dtype", EXPERTD_OP_LL_COMBINE, RULE_CHANGE{slot.dtype = EXPERTD_DTYPE_FP8_E4M3;
RULE_END;
}
, EXPERTD_REASON_WRONG_DTYPE, EXPERTD_ARGUMENT_DTYPE, 3, 1, 1
}),
    [](const auto& row) {
  return std::string(row.param.name); });

INSTANTIATE_TEST_SUITE_P(
    Layout, AdmitRule,
    testing::Values(
        Rule{"tokens", EXPERTD_OP_LAYOUT, RULE_CHANGE { slot.tokens = 65537; RULE_END;
}
, EXPERTD_REASON_ARGUMENT_RANGE, EXPERTD_ARGUMENT_TOKENS, 65537, 0, 65536
}
, Rule{"top_k", EXPERTD_OP_LAYOUT, RULE_CHANGE{slot.top_k = 33;
RULE_END;
}
, EXPERTD_REASON_ARGUMENT_RANGE, EXPERTD_ARGUMENT_TOP_K, 33, 1, 32
}
, Rule{"ranks", EXPERTD_OP_LAYOUT, RULE_CHANGE{slot.num_ranks = 513;
RULE_END;
}
, EXPERTD_REASON_ARGUMENT_RANGE, EXPERTD_ARGUMENT_NUM_RANKS, 513, 1, 512
}
, Rule{"no_ranks", EXPERTD_OP_LAYOUT, RULE_CHANGE{slot.num_ranks = 0;
RULE_END;
}
, EXPERTD_REASON_ARGUMENT_RANGE, EXPERTD_ARGUMENT_NUM_RANKS, 0, 1, 512
}
, Rule{"experts", EXPERTD_OP_LAYOUT, RULE_CHANGE{slot.num_experts = 2050;
RULE_END;
}
, EXPERTD_REASON_ARGUMENT_RANGE, EXPERTD_ARGUMENT_NUM_EXPERTS, 2050, 2, 2048
}
, Rule{"experts_uneven", EXPERTD_OP_LAYOUT, RULE_CHANGE{slot.num_experts = 7;
RULE_END;
}
, EXPERTD_REASON_ARGUMENT_RANGE, EXPERTD_ARGUMENT_NUM_EXPERTS, 7, 2, 2048
}),
    [](const auto& row) {
  return std::string(row.param.name); });

}  // namespace
}  // namespace expertd::test
