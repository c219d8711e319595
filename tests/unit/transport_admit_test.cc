// SPDX-License-Identifier: Apache-2.0
// What admission lets through: exact sizes, boundary values, deadlines, and slots of random bytes.
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <random>
#include <string>

#include "daemon/transport/tensor_check.h"
#include "tests/support/fake_admission.h"

namespace expertd::test {
namespace {

struct Size {
  const char* name;
  uint32_t op;
  uint32_t tensor;
  uint64_t bytes;
  uint32_t flags = 0;
  bool as_bytes = false;
};

class AdmitSize : public testing::TestWithParam<Size> {};

TEST_P(AdmitSize, TakesATensorOfExactlyItsBytesAndNotOneLess) {
  const Size& size = GetParam();
  AdmissionWorld world;
  if (size.op == EXPERTD_OP_COMBINE || size.op == EXPERTD_OP_LL_COMBINE) {
    world.leave_handle(size.op == EXPERTD_OP_LL_COMBINE, size.flags & EXPERTD_SLOT_EXPANDED);
  }
  expertd_slot slot = size.as_bytes ? AdmissionWorld::slot_of_bytes(size.op) : AdmissionWorld::slot(size.op);
  slot.flags = size.flags;
  if ((size.flags & EXPERTD_SLOT_QUANTISE_FP8) != 0) {
    slot.tensors[EXPERTD_OUT_SIDE].buffer = AdmissionWorld::kBuffer;
  }
  slot.tensors[size.tensor] = {AdmissionWorld::kExact, 0, 32};
  world.exact.bytes = size.bytes + 32;
  EXPECT_TRUE(world.admits(slot)) << world.request.rejected_reason << " about " << world.request.rejected_argument
                                  << " value " << world.request.rejected_value;
  EXPECT_EQ(world.request.tensors[size.tensor].mapping, &world.exact);
  EXPECT_EQ(world.request.tensors[size.tensor].offset, 32U);
  world.exact.bytes -= 1;
  EXPECT_FALSE(world.admits(slot));
  EXPECT_EQ(world.request.rejected_reason, static_cast<uint32_t>(EXPERTD_REASON_OUT_OF_BOUNDS));
  EXPECT_EQ(world.request.rejected_argument, EXPERTD_ARGUMENT_OF_TENSOR(size.tensor));
  EXPECT_EQ(world.request.rejected_value, static_cast<int64_t>(size.bytes + 32));
  EXPECT_EQ(world.request.rejected_maximum, static_cast<int64_t>(world.exact.bytes));
}

// T = 64, K = 4, H = 512, R = 2, E = 8, L = 4, C = 100, N = 128, rows of bytes 272, S = 3 elements of 2 bytes.
INSTANTIATE_TEST_SUITE_P(
    EveryTensor, AdmitSize,
    testing::Values(
        Size{"dispatch_x", EXPERTD_OP_DISPATCH, EXPERTD_IN_X, 64 * 1024},
        Size{"dispatch_x_of_bytes", EXPERTD_OP_DISPATCH, EXPERTD_IN_X, 64 * 272, 0, true},
        Size{"dispatch_idx", EXPERTD_OP_DISPATCH, EXPERTD_IN_TOPK_IDX, 64 * 4 * 8},
        Size{"dispatch_weights", EXPERTD_OP_DISPATCH, EXPERTD_IN_TOPK_WEIGHTS, 64 * 4 * 4},
        Size{"dispatch_side", EXPERTD_OP_DISPATCH, EXPERTD_IN_SIDE, 63 * 16 + 2 * 2 + 2, 0, true},
        Size{"dispatch_mask", EXPERTD_OP_DISPATCH, EXPERTD_IN_TOKEN_RANK_MASK, 64 * 2},
        Size{"dispatch_out", EXPERTD_OP_DISPATCH, EXPERTD_OUT_X, 100 * 1024},
        Size{"dispatch_out_side", EXPERTD_OP_DISPATCH, EXPERTD_OUT_SIDE, 100 * 6, 0, true},
        Size{"dispatch_out_idx", EXPERTD_OP_DISPATCH, EXPERTD_OUT_TOPK_IDX, 100 * 4 * 8},
        Size{"dispatch_out_idx_expanded", EXPERTD_OP_DISPATCH, EXPERTD_OUT_TOPK_IDX, 100 * 8, EXPERTD_SLOT_EXPANDED},
        Size{"dispatch_out_weights", EXPERTD_OP_DISPATCH, EXPERTD_OUT_TOPK_WEIGHTS, 100 * 4 * 4},
        Size{"dispatch_counts", EXPERTD_OP_DISPATCH, EXPERTD_OUT_EXPERT_COUNTS, 4 * 4},
        Size{"dispatch_prefix", EXPERTD_OP_DISPATCH, EXPERTD_OUT_RANK_PREFIX, 2 * 2 * 4},
        Size{"dispatch_src", EXPERTD_OP_DISPATCH, EXPERTD_OUT_SRC_INFO, 100 * 4},
        Size{"dispatch_wait", EXPERTD_OP_DISPATCH, EXPERTD_OUT_WAIT_STATS, 2 * 8},
        Size{"combine_x", EXPERTD_OP_COMBINE, EXPERTD_IN_X, 100 * 1024},
        Size{"combine_weights", EXPERTD_OP_COMBINE, EXPERTD_IN_TOPK_WEIGHTS, 100 * 4 * 4},
        Size{"combine_weights_expanded", EXPERTD_OP_COMBINE, EXPERTD_IN_TOPK_WEIGHTS, 100 * 4, EXPERTD_SLOT_EXPANDED},
        Size{"combine_bias0", EXPERTD_OP_COMBINE, EXPERTD_IN_BIAS0, 64 * 1024},
        Size{"combine_bias1", EXPERTD_OP_COMBINE, EXPERTD_IN_BIAS1, 64 * 1024},
        Size{"combine_out", EXPERTD_OP_COMBINE, EXPERTD_OUT_X, 64 * 1024},
        Size{"combine_out_weights", EXPERTD_OP_COMBINE, EXPERTD_OUT_TOPK_WEIGHTS, 64 * 4 * 4},
        Size{"ll_x", EXPERTD_OP_LL_DISPATCH, EXPERTD_IN_X, 64 * 1024},
        Size{"ll_out", EXPERTD_OP_LL_DISPATCH, EXPERTD_OUT_X, 4 * 128 * 1024},
        Size{"ll_out_fp8", EXPERTD_OP_LL_DISPATCH, EXPERTD_OUT_X, 4 * 128 * 512, EXPERTD_SLOT_QUANTISE_FP8},
        Size{"ll_scales", EXPERTD_OP_LL_DISPATCH, EXPERTD_OUT_SIDE, 4 * 128 * 4 * 4, EXPERTD_SLOT_QUANTISE_FP8},
        Size{"ll_scales_ue8m0", EXPERTD_OP_LL_DISPATCH, EXPERTD_OUT_SIDE, 4 * 128 * 4,
             EXPERTD_SLOT_QUANTISE_FP8 | EXPERTD_SLOT_ROUND_SCALE | EXPERTD_SLOT_UE8M0},
        Size{"ll_side", EXPERTD_OP_LL_DISPATCH, EXPERTD_OUT_SIDE, 4 * 128 * 6, 0, true},
        Size{"ll_counts", EXPERTD_OP_LL_DISPATCH, EXPERTD_OUT_EXPERT_COUNTS, 4 * 4},
        Size{"ll_src", EXPERTD_OP_LL_DISPATCH, EXPERTD_OUT_SRC_INFO, 4 * 128 * 4},
        Size{"ll_range", EXPERTD_OP_LL_DISPATCH, EXPERTD_OUT_LAYOUT_RANGE, 4 * 2 * 8},
        Size{"ll_stats", EXPERTD_OP_LL_DISPATCH, EXPERTD_OUT_STATS, 4 * 4},
        Size{"ll_combine_x", EXPERTD_OP_LL_COMBINE, EXPERTD_IN_X, 4 * 128 * 1024},
        Size{"ll_combine_idx", EXPERTD_OP_LL_COMBINE, EXPERTD_IN_TOPK_IDX, 64 * 4 * 8},
        Size{"ll_combine_weights", EXPERTD_OP_LL_COMBINE, EXPERTD_IN_TOPK_WEIGHTS, 64 * 4 * 4},
        Size{"ll_combine_out", EXPERTD_OP_LL_COMBINE, EXPERTD_OUT_X, 64 * 1024},
        Size{"layout_idx", EXPERTD_OP_LAYOUT, EXPERTD_IN_TOPK_IDX, 64 * 4 * 8},
        Size{"layout_ranks", EXPERTD_OP_LAYOUT, EXPERTD_OUT_RANK_PREFIX, 2 * 4},
        Size{"layout_nodes", EXPERTD_OP_LAYOUT, EXPERTD_OUT_LAYOUT_RANGE, 4},
        Size{"layout_experts", EXPERTD_OP_LAYOUT, EXPERTD_OUT_EXPERT_COUNTS, 8 * 4},
        Size{"layout_mask", EXPERTD_OP_LAYOUT, EXPERTD_OUT_TOKEN_RANK_MASK, 64 * 2}),
    [](const auto& row) { return std::string(row.param.name); });

TEST(Admit, TakesEveryOperationAtTheLimitsOfItsArguments) {
  AdmissionWorld world;
  expertd_slot slot = AdmissionWorld::slot(EXPERTD_OP_DISPATCH);
  slot.expert_alignment = 65536;
  slot.handle_index = 7;
  slot.handle_generation = 0xffffffff;
  slot.hidden = 0;
  EXPECT_TRUE(world.admits(slot));
  slot.tokens = 0;
  slot.capacity_rows = 0;
  for (expertd_tensor_ref& tensor : slot.tensors) {
    tensor.buffer = 0;
  }
  EXPECT_TRUE(world.admits(slot)) << "a rank without tokens and rows needs no tensors";
}

TEST(Admit, RefusesAnOffsetThatWouldOverflow) {
  AdmissionWorld world;
  expertd_slot slot = AdmissionWorld::slot(EXPERTD_OP_DISPATCH);
  slot.tensors[EXPERTD_IN_X].offset = ~0ULL - 15;
  EXPECT_FALSE(world.admits(slot));
  EXPECT_EQ(world.request.rejected_reason, static_cast<uint32_t>(EXPERTD_REASON_OUT_OF_BOUNDS));
}

TEST(Admit, CountsARefusalAsAnOperationOfItsGroup) {
  AdmissionWorld world;
  expertd_slot slot = AdmissionWorld::slot(EXPERTD_OP_DISPATCH);
  slot.tokens = 65;
  EXPECT_EQ(world.admit(slot), &world.tables.groups[0].rank);
}

// Also of slots whose frame is wrong: the peers must hear of them, and the next slot must be the next operation.
TEST(Admit, CountsARefusedFrameAsAnOperationOfItsGroup) {
  AdmissionWorld world;
  void (*const breaks[])(expertd_slot&) = {
      [](expertd_slot& slot) { slot.seq = 9; },
      [](expertd_slot& slot) { slot.op = 77; },
      [](expertd_slot& slot) { slot.flags = 1U << 20; },
      [](expertd_slot& slot) { slot.reserved[3] = 1; },
      [](expertd_slot& slot) { slot.tensors[2].reserved = 1; },
  };
  for (const auto& change : breaks) {
    expertd_slot slot = AdmissionWorld::slot(EXPERTD_OP_DISPATCH);
    change(slot);
    EXPECT_EQ(world.admit(slot), &world.tables.groups[0].rank);
    EXPECT_EQ(world.request.rejected_reason, static_cast<uint32_t>(EXPERTD_REASON_DESCRIPTOR_MALFORMED));
    EXPECT_EQ(world.request.deadline_ns, AdmissionWorld::kNow + 90);
    slot.group = 8;
    EXPECT_EQ(world.admit(slot), nullptr);
    EXPECT_EQ(world.request.rejected_reason, static_cast<uint32_t>(EXPERTD_REASON_DESCRIPTOR_MALFORMED));
  }
}

TEST(Admit, LeavesNothingOfTheOperationBeforeInARefusedRequest) {
  AdmissionWorld world;
  expertd_slot slot = AdmissionWorld::slot(EXPERTD_OP_COMBINE);
  world.request.shape.kind = kernels::OpKind::kLlDispatch;
  world.request.shape.tokens = 5;
  world.request.with_weights = true;
  slot.flags = 1U << 20;
  (void)transport::admit(slot, {3, 1, AdmissionWorld::kNow, 700}, &world.tables, &world.request);
  EXPECT_EQ(world.request.shape.kind, kernels::OpKind::kCombine);
  EXPECT_EQ(world.request.shape.tokens, 0U);
  EXPECT_FALSE(world.request.with_weights);
  slot.op = 77;
  (void)transport::admit(slot, {3, 1, AdmissionWorld::kNow, 700}, &world.tables, &world.request);
  EXPECT_EQ(static_cast<uint32_t>(world.request.shape.kind), static_cast<uint32_t>(EXPERTD_OP_NONE));
}

TEST(Admit, GivesACachedDispatchTheAlignmentOfItsHandle) {
  AdmissionWorld world;
  expertd_slot slot = AdmissionWorld::slot(EXPERTD_OP_DISPATCH);
  slot.flags = EXPERTD_SLOT_EXPANDED;
  slot.expert_alignment = 32;
  ASSERT_TRUE(world.admits(slot));
  slot.flags |= EXPERTD_SLOT_CACHED;
  for (const uint32_t given : {0U, 1U, 32U}) {
    slot.expert_alignment = given;
    EXPECT_TRUE(world.admits(slot)) << given;
    EXPECT_EQ(world.request.shape.expert_alignment, 32U) << given;
  }
  slot.expert_alignment = 16;
  EXPECT_FALSE(world.admits(slot));
  EXPECT_EQ(world.request.rejected_reason, static_cast<uint32_t>(EXPERTD_REASON_ARGUMENT_RANGE));
  EXPECT_EQ(world.request.rejected_argument, static_cast<uint32_t>(EXPERTD_ARGUMENT_EXPERT_ALIGNMENT));
  EXPECT_EQ(world.request.rejected_value, 16);
  EXPECT_EQ(world.request.rejected_minimum, 32);
  EXPECT_EQ(world.request.rejected_maximum, 32);
}

TEST(Admit, KeepsNothingOfARefusedDispatchUnderItsHandle) {
  AdmissionWorld world;
  expertd_slot slot = AdmissionWorld::slot(EXPERTD_OP_DISPATCH);
  slot.tensors[EXPERTD_OUT_X].buffer = 99;
  EXPECT_FALSE(world.admits(slot));
  EXPECT_EQ(world.tables.handles[0].generation, 0U);
}

TEST(Admit, GivesTheFirstOperationOfAGroupItsOwnDeadline) {
  AdmissionWorld world;
  const expertd_slot slot = AdmissionWorld::slot(EXPERTD_OP_BARRIER);
  (void)world.admit(slot);
  EXPECT_EQ(world.request.deadline_ns, AdmissionWorld::kNow + 90);
  world.tables.groups[0].rank.next_number = 2;
  (void)world.admit(slot);
  EXPECT_EQ(world.request.deadline_ns, AdmissionWorld::kNow + 50);
}

TEST(Admit, TakesTheDeadlineOfTheSlotUpToADay) {
  AdmissionWorld world;
  expertd_slot slot = AdmissionWorld::slot(EXPERTD_OP_LAYOUT);
  (void)world.admit(slot);
  EXPECT_EQ(world.request.deadline_ns, AdmissionWorld::kNow + 700);
  slot.timeout_ns = 3;
  (void)world.admit(slot);
  EXPECT_EQ(world.request.deadline_ns, AdmissionWorld::kNow + 3);
  slot.timeout_ns = ~0ULL;
  (void)world.admit(slot);
  EXPECT_EQ(world.request.deadline_ns, AdmissionWorld::kNow + 86'400'000'000'000ULL);
}

TEST(Admit, BelievesNoSubmissionInTheFuture) {
  AdmissionWorld world;
  expertd_slot slot = AdmissionWorld::slot(EXPERTD_OP_BARRIER);
  slot.submit_ns = ~0ULL;
  (void)world.admit(slot);
  EXPECT_EQ(world.request.submit_ns, AdmissionWorld::kNow);
}

// Random bytes, and valid slots with a few of their fields made random.
TEST(Admit, NeverYieldsATensorBeyondItsMappingWhateverTheBytes) {
  const char* given = std::getenv("EXPERTD_SEED");
  const uint64_t first = given == nullptr ? 1 : std::strtoull(given, nullptr, 10);
  AdmissionWorld world;
  world.exact.bytes = 4'096;
  uint64_t admitted = 0;
  for (uint64_t seed = first; seed < first + (given == nullptr ? 150'000 : 1); ++seed) {
    std::mt19937_64 random(seed);
    expertd_slot slot = AdmissionWorld::slot_of_bytes(static_cast<uint32_t>(random() % 8));
    if (seed % 2 == 0) {
      slot = AdmissionWorld::slot(static_cast<uint32_t>(random() % 8));
    }
    auto* words = reinterpret_cast<uint32_t*>(&slot);
    const uint64_t changes = seed % 16 == 0 ? 128 : random() % 4;
    for (uint64_t i = 0; i < changes; ++i) {
      const uint64_t place = changes == 128 ? i : 3 + random() % 125;
      words[place] = static_cast<uint32_t>(random() >> (random() % 64));
    }
    (void)world.admit(slot);
    const engine::Request& request = world.request;
    admitted += request.rejected_reason == 0 ? 1 : 0;
    ASSERT_GE(request.deadline_ns, AdmissionWorld::kNow) << "EXPERTD_SEED=" << seed;
    for (const engine::TensorView& tensor : request.tensors) {
      if (tensor.mapping != nullptr) {
        ASSERT_LE(tensor.offset, tensor.mapping->bytes) << "EXPERTD_SEED=" << seed;
        ASSERT_EQ(tensor.offset % 16, 0U) << "EXPERTD_SEED=" << seed;
      }
    }
    const kernels::OpShape& shape = request.shape;
    const engine::TensorView& out = request.tensors[EXPERTD_OUT_X];
    if (request.rejected_reason == 0 && shape.kind == kernels::OpKind::kDispatch && out.mapping != nullptr) {
      ASSERT_LE(uint64_t{shape.capacity_rows} * shape.out_row_bytes, out.mapping->bytes - out.offset)
          << "EXPERTD_SEED=" << seed;
    }
    if (request.rejected_reason == 0) {
      ASSERT_LE(shape.top_k, base::kMaxTopK) << "EXPERTD_SEED=" << seed;
      ASSERT_LE(shape.tokens, base::kMaxTokens) << "EXPERTD_SEED=" << seed;
    }
  }
  EXPECT_TRUE(given != nullptr || admitted > 1'000) << admitted << ": the seeds reach too little";
}

TEST(TensorCheck, TakesAMissingTensorThatHasNoBytes) {
  AdmissionWorld world;
  expertd_slot slot{};
  transport::TensorCheck check(slot, world.tables, &world.request);
  EXPECT_TRUE(check.input(EXPERTD_IN_X, 0, true));
  EXPECT_TRUE(check.output(EXPERTD_OUT_X, 5, false));
  EXPECT_FALSE(check.input(EXPERTD_IN_X, 1, true));
  EXPECT_EQ(world.request.rejected_reason, static_cast<uint32_t>(EXPERTD_REASON_MISSING_ARGUMENT));
}

TEST(TensorCheck, ResolvesATensorAtTheLastByteOfItsBuffer) {
  AdmissionWorld world;
  world.exact.bytes = 48;
  expertd_slot slot{};
  slot.tensors[EXPERTD_IN_X] = {AdmissionWorld::kExact, 0, 32};
  transport::TensorCheck check(slot, world.tables, &world.request);
  EXPECT_TRUE(check.input(EXPERTD_IN_X, 16, true));
  EXPECT_FALSE(check.input(EXPERTD_IN_X, 17, true));
  EXPECT_FALSE(check.input(EXPERTD_IN_X, ~0ULL, true));
}

}  // namespace
}  // namespace expertd::test
