// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "daemon/session/executor_choice.h"
#include "proto/abi/expertd_reason.h"

namespace expertd::session {
namespace {

const ExecutorFacts kGood{
    .is_cuda = true, .mps = false, .reaches_all = true, .link_kernels = true, .has_kernels = true};

GroupConfig config_of(Executor executor, GroupMode mode = GroupMode::kInference) {
  GroupConfig config;
  config.executor = executor;
  config.mode = mode;
  return config;
}

ExecutorFacts but(void (*change)(ExecutorFacts*)) {
  ExecutorFacts facts = kGood;
  change(&facts);
  return facts;
}

TEST(ExecutorChoice, AutoTakesCopyEnginesWhereEveryRankCan) {
  const GroupConfig config = config_of(Executor::kAuto);
  EXPECT_EQ(choose_executor(config, {kGood, kGood}).executor, Executor::kCopyEngine);
  for (const ExecutorFacts& other :
       {but([](ExecutorFacts* f) { f->is_cuda = false; }), but([](ExecutorFacts* f) { f->mps = true; }),
        but([](ExecutorFacts* f) { f->reaches_all = false; }), but([](ExecutorFacts* f) { f->link_kernels = false; }),
        but([](ExecutorFacts* f) { f->has_kernels = false; })}) {
    const ExecutorChoice choice = choose_executor(config, {kGood, other});
    EXPECT_EQ(choice.executor, Executor::kSm);
    EXPECT_TRUE(choice.error.status.is_ok());
  }
  EXPECT_EQ(choose_executor(config_of(Executor::kAuto, GroupMode::kNormal), {kGood, kGood}).executor,
            Executor::kCopyEngine);
}

TEST(ExecutorChoice, SmIsTakenAsAskedFor) {
  EXPECT_EQ(choose_executor(config_of(Executor::kSm), {kGood, kGood}).executor, Executor::kSm);
}

TEST(ExecutorChoice, CopyEnginesWorkUnderMpsAndWithGenericKernels) {
  const ExecutorFacts other = but([](ExecutorFacts* f) {
    f->mps = true;
    f->link_kernels = false;
  });
  const ExecutorChoice choice = choose_executor(config_of(Executor::kCopyEngine), {other, other});
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
}

}  // namespace
}  // namespace expertd::session
