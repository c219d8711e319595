// SPDX-License-Identifier: Apache-2.0
// The rule by which operations get their executor: which one a group is granted, and what it says about each operation.
#include <gtest/gtest.h>

#include "daemon/session/executor_choice.h"
#include "proto/abi/expertd_reason.h"

namespace expertd::session {
namespace {

constexpr uint32_t kSm = EXPERTD_COMPLETION_EXECUTOR_SM;
constexpr uint32_t kCopy = EXPERTD_COMPLETION_EXECUTOR_COPY_ENGINE;
constexpr uint32_t kLlSplit = EXPERTD_COPIES_LL_SPLIT;
constexpr uint32_t kHtSplit = EXPERTD_COPIES_HT_SPLIT;
constexpr uint32_t kLl = EXPERTD_COPIES_LL;
constexpr uint32_t kHt = EXPERTD_COPIES_HT;
constexpr uint32_t kAll = EXPERTD_COPIES_ALL;

const ExecutorFacts kGood{
    .is_cuda = true, .mps = false, .reaches_all = true, .link_kernels = true, .has_kernels = true, .copies = kAll};

GroupConfig config_of(Executor executor, GroupMode mode = GroupMode::kInference) {
  GroupConfig config;
  config.executor = executor;
  config.mode = mode;
  config.expert_parallel_size = 2;
  config.num_experts = 256;
  config.hidden = 7168;
  config.top_k = 8;
  config.max_tokens = 128;
  return config;
}

ExecutorFacts but(void (*change)(ExecutorFacts*)) {
  ExecutorFacts facts = kGood;
  change(&facts);
  return facts;
}

const ExecutorFacts kMps = but([](ExecutorFacts* f) { f->mps = true; });
const ExecutorFacts kOld = but([](ExecutorFacts* f) { f->copies = 0; });
const ExecutorFacts kOldMps = but([](ExecutorFacts* f) {
  f->copies = 0;
  f->mps = true;
});
const ExecutorFacts kLlOnly = but([](ExecutorFacts* f) { f->copies = EXPERTD_COPIES_LL; });

TEST(ExecutorRule, SaysForEachKindOfOperation) {
  const struct {
    uint32_t copies;
    uint32_t op;
    int captured;
    int split;
    uint32_t bound;
    uint32_t executor;
  } rows[] = {
      {kLl, EXPERTD_OP_LL_DISPATCH, 0, 0, 1, kCopy},
      {kLl, EXPERTD_OP_LL_DISPATCH, 0, 1, 1, kCopy},
      {kLl, EXPERTD_OP_LL_DISPATCH, 1, 0, 1, kSm},
      {kLl, EXPERTD_OP_LL_DISPATCH, 1, 1, 1, kSm},
      {kLl, EXPERTD_OP_DISPATCH, 0, 1, 4096, kSm},
      {kLl, EXPERTD_OP_BARRIER, 0, 0, 1, kSm},
      {kLlSplit, EXPERTD_OP_LL_DISPATCH, 0, 0, 1, kSm},
      {kLlSplit, EXPERTD_OP_LL_DISPATCH, 0, 1, 1, kCopy},
      {kHtSplit, EXPERTD_OP_DISPATCH, 0, 1, 1000, kCopy},
      {kHtSplit, EXPERTD_OP_DISPATCH, 0, 1, 999, kSm},
      {kHtSplit, EXPERTD_OP_DISPATCH, 0, 0, 4096, kSm},
      {kHtSplit, EXPERTD_OP_LL_DISPATCH, 0, 1, 4096, kSm},
      {kHt, EXPERTD_OP_DISPATCH, 0, 0, 1, kCopy},
      {kHt, EXPERTD_OP_DISPATCH, 0, 1, 1, kSm},
      {kAll, EXPERTD_OP_DISPATCH, 0, 1, 1000, kCopy},
      {kAll, EXPERTD_OP_DISPATCH, 1, 1, 1000, kSm},
      {kAll, EXPERTD_OP_LAYOUT, 0, 0, 1, kSm},
      {0, EXPERTD_OP_LL_DISPATCH, 0, 1, 1, kSm},
      {0, EXPERTD_OP_DISPATCH, 0, 0, 65536, kSm},
      {kAll, EXPERTD_OP_LL_DISPATCH, 0, 0, 128, kCopy},
  };
  for (const auto& row : rows) {
    const expertd_executor_rule rule = {row.copies, 1000};
    EXPECT_EQ(expertd_executor_of(&rule, row.op, row.captured, row.split, row.bound), row.executor)
        << "copies " << row.copies << " op " << row.op << " captured " << row.captured << " split " << row.split
        << " bound " << row.bound;
  }
}

TEST(ExecutorRule, IsNotAskedAboutWhatUsesAHandle) {
  EXPECT_TRUE(expertd_executor_follows(EXPERTD_OP_COMBINE, 0));
  EXPECT_TRUE(expertd_executor_follows(EXPERTD_OP_LL_COMBINE, 0));
  EXPECT_TRUE(expertd_executor_follows(EXPERTD_OP_DISPATCH, EXPERTD_SLOT_CACHED));
  EXPECT_FALSE(expertd_executor_follows(EXPERTD_OP_DISPATCH, EXPERTD_SLOT_SPLIT));
  EXPECT_FALSE(expertd_executor_follows(EXPERTD_OP_LL_DISPATCH, 0));
  EXPECT_FALSE(expertd_executor_follows(EXPERTD_OP_BARRIER, 0));
  EXPECT_EQ(expertd_executor_bound(0, 4096), 4096U);
  EXPECT_EQ(expertd_executor_bound(7, 4096), 7U);
}

TEST(ExecutorChoice, AutoGrantsByWhatTheRanksHaveInCommon) {
  const struct {
    const char* name;
    GroupMode mode;
    std::vector<ExecutorFacts> ranks;
    uint32_t built;
    uint32_t copies;
    Executor executor;
  } rows[] = {
      {"low latency without MPS", GroupMode::kInference, {kGood, kGood}, kAll, kLl, Executor::kCopyEngine},
      {"both without MPS", GroupMode::kAuto, {kGood, kGood}, kAll, kAll, Executor::kCopyEngine},
      {"high throughput without MPS", GroupMode::kNormal, {kGood, kGood}, kAll, kHt, Executor::kSm},
      {"what is not built", GroupMode::kAuto, {kGood, kGood}, kLl, kLl, Executor::kCopyEngine},
      {"what is not built alone", GroupMode::kNormal, {kGood, kGood}, kLl, 0, Executor::kSm},
      {"low latency under MPS", GroupMode::kInference, {kMps, kMps}, kAll, kLlSplit, Executor::kAuto},
      {"both under MPS, none large", GroupMode::kAuto, {kMps, kMps}, kAll, kLlSplit, Executor::kAuto},
      {"MPS somewhere", GroupMode::kInference, {kGood, kMps}, kAll, kLlSplit, Executor::kAuto},
      {"what one does not know", GroupMode::kAuto, {kGood, kLlOnly}, kAll, kLl, Executor::kCopyEngine},
      {"one without rules", GroupMode::kAuto, {kGood, kOld}, kAll, kLl, Executor::kCopyEngine},
      {"one without rules under MPS", GroupMode::kAuto, {kMps, kOldMps}, kAll, 0, Executor::kSm},
  };
  for (const auto& row : rows) {
    const ExecutorChoice choice = choose_executor(config_of(Executor::kAuto, row.mode), row.ranks, row.built);
    EXPECT_EQ(choice.rule.copies, row.copies) << row.name;
    EXPECT_EQ(choice.executor, row.executor) << row.name;
    EXPECT_TRUE(choice.error.status.is_ok()) << row.name;
  }
}

TEST(ExecutorChoice, AutoGrantsNothingWhereOneRankCannot) {
  for (const ExecutorFacts& other :
       {but([](ExecutorFacts* f) { f->is_cuda = false; }), but([](ExecutorFacts* f) { f->reaches_all = false; }),
        but([](ExecutorFacts* f) { f->link_kernels = false; }),
        but([](ExecutorFacts* f) { f->has_kernels = false; })}) {
    const ExecutorChoice choice = choose_executor(config_of(Executor::kAuto, GroupMode::kAuto), {kGood, other}, kAll);
    EXPECT_EQ(choice.rule.copies, 0U);
    EXPECT_EQ(choice.executor, Executor::kSm);
    EXPECT_TRUE(choice.error.status.is_ok());
  }
}

TEST(ExecutorChoice, TheThresholdIsInTokensOfTheGroup) {
  const ExecutorChoice choice = choose_executor(config_of(Executor::kAuto, GroupMode::kNormal), {kMps, kMps}, kAll);
  EXPECT_EQ(choice.rule.ht_split_tokens, 1171U);
  EXPECT_GE(choice.rule.ht_split_tokens * 2ULL * 7168, kHtSplitBytesMin);
  EXPECT_EQ(choose_executor(config_of(Executor::kAuto, GroupMode::kNormal), {kGood}, kAll).rule.ht_split_tokens, 0U);
}

TEST(ExecutorChoice, AutoTakesNoLargeWindowForWhatMayNotCome) {
  GroupConfig config = config_of(Executor::kAuto);
  config.expert_parallel_size = 8;
  config.max_tokens = 1024;
  EXPECT_EQ(choose_executor(config, {kMps, kMps}).rule.copies, kLlSplit);
  config.max_tokens = 4096;
  EXPECT_EQ(choose_executor(config, {kMps, kMps}).rule.copies, 0U);
  EXPECT_EQ(choose_executor(config, {kGood, kGood}).rule.copies, kLl);
  config.mode = GroupMode::kAuto;  // high throughput fits, low latency does not
  EXPECT_EQ(choose_executor(config, {kMps, kMps}).rule.copies, kHtSplit);
  config.max_tokens = 8192;
  EXPECT_EQ(choose_executor(config, {kMps, kMps}).rule.copies, 0U);
  EXPECT_EQ(choose_executor(config, {kGood, kGood}).rule.copies, kHt) << "low latency has no window for so many";
  config.max_tokens = 4096;
  EXPECT_EQ(choose_executor(config, {kGood, kGood}).rule.copies, kAll);
  config.executor = Executor::kCopyEngine;
  EXPECT_EQ(choose_executor(config, {kMps, kMps}).rule.copies, kAll);
}

TEST(ExecutorChoice, BothAreGrantedWhereBothFit) {
  GroupConfig config = config_of(Executor::kAuto, GroupMode::kAuto);
  config.max_tokens = 1280;
  const ExecutorChoice choice = choose_executor(config, {kMps, kMps});
  EXPECT_EQ(choice.rule.copies, kLlSplit | kHtSplit);
  EXPECT_EQ(choice.rule.ht_split_tokens, 1171U);
  EXPECT_EQ(choice.executor, Executor::kAuto);
}

TEST(ExecutorChoice, SmIsTakenAsAskedFor) {
  const ExecutorChoice choice = choose_executor(config_of(Executor::kSm, GroupMode::kAuto), {kGood, kGood}, kAll);
  EXPECT_EQ(choice.rule.copies, 0U);
  EXPECT_EQ(choice.executor, Executor::kSm);
}

TEST(ExecutorChoice, CopyEnginesWorkUnderMpsAndWithGenericKernels) {
  const ExecutorFacts other = but([](ExecutorFacts* f) {
    f->mps = true;
    f->link_kernels = false;
  });
  const ExecutorChoice choice = choose_executor(config_of(Executor::kCopyEngine), {other, other});
  EXPECT_EQ(choice.rule.copies, kLl);
  EXPECT_EQ(choice.executor, Executor::kCopyEngine);
  EXPECT_TRUE(choice.error.status.is_ok());
}

TEST(ExecutorChoice, CopyEnginesAreRefusedByName) {
  const struct {
    ExecutorFacts facts;
    const char* sentence;
  } rows[] = {
      {but([](ExecutorFacts* f) { f->is_cuda = false; }), "rank 1 is on a host device"},
      {but([](ExecutorFacts* f) { f->reaches_all = false; }), "rank 1 is on a GPU that does not reach"},
      {but([](ExecutorFacts* f) { f->has_kernels = false; }), "rank 1 has a client library without kernels"},
  };
  for (const auto& row : rows) {
    const ExecutorChoice choice = choose_executor(config_of(Executor::kCopyEngine), {kGood, row.facts});
    EXPECT_EQ(choice.error.status.reason(), EXPERTD_REASON_UNSUPPORTED);
    EXPECT_NE(choice.error.status.message().find(row.sentence), std::string::npos) << choice.error.status.message();
    EXPECT_EQ(choice.error.rank, 1);
    EXPECT_EQ(choice.error.field, "executor");
  }
  const GroupConfig normal = config_of(Executor::kCopyEngine, GroupMode::kNormal);
  EXPECT_EQ(choose_executor(normal, {kGood, kGood}, kLl).error.status.reason(), EXPERTD_REASON_UNSUPPORTED);
  EXPECT_TRUE(choose_executor(normal, {kGood, kGood}, kAll).error.status.is_ok());
}

TEST(ExecutorChoice, IsToldToPeople) {
  const struct {
    GroupMode mode;
    expertd_executor_rule rule;
    const char* text;
  } rows[] = {
      {GroupMode::kInference, {0, 0}, "ll sm"},
      {GroupMode::kInference, {kLl, 0}, "ll copy_engine"},
      {GroupMode::kInference, {kLlSplit, 9}, "ll sm, split copy_engine"},
      {GroupMode::kNormal, {kHt, 0}, "ht copy_engine"},
      {GroupMode::kNormal, {kHtSplit, 9}, "ht sm, split copy_engine from 9 tokens"},
      {GroupMode::kAuto, {kLl, 0}, "ll copy_engine; ht sm"},
  };
  for (const auto& row : rows) {
    EXPECT_EQ(rule_text(row.mode, row.rule), row.text);
  }
}

}  // namespace
}  // namespace expertd::session
