// SPDX-License-Identifier: Apache-2.0
// What two ranks do to one operation, one of them between any two instructions of the other.
#include <gtest/gtest.h>

#include "tests/support/every_instruction.h"
#include "tests/support/fake_engine_group.h"

namespace expertd::test {
namespace {

using engine::GroupShared;
using engine::Verdict;

constexpr uint64_t kInstructionsMax = 100'000;

engine::Failure failure_of(uint64_t number) {
  return {.reason = EXPERTD_REASON_TIMEOUT, .value = static_cast<int64_t>(number)};
}

/// A group whose rank 0 is through with the first kEntries operations while rank 1, excluded, has posted none.
struct LateByAWrap {
  LateByAWrap() : shared(group_settings(2, true)) {
    shared.set_excluded(2);
    for (uint64_t number = 1; number <= GroupShared::kEntries; ++number) {
      shared.post(number, 0, &request);
      EXPECT_TRUE(fail(number));
      (void)shared.release(number, 0);
    }
  }

  bool fail(uint64_t number) {
    bool changed = false;
    return shared.fail(number, failure_of(number), &changed);
  }

  void next_rank() {
    shared.post(kNext, 0, &request);
    bool changed = false;
    next_verdict = shared.try_decide(kNext, &changed);
  }

  void late_rank() {
    shared.post(1, 1, &request);
    bool decided = false;
    verdict = shared.try_decide(1, &decided);
    if (verdict == Verdict::kFailed) {
      read = shared.entry(1).failure;
    }
  }

  static constexpr uint64_t kNext = GroupShared::kEntries + 1;
  const engine::Request request = plain_request();
  GroupShared shared;
  Verdict verdict = Verdict::kOpen;
  Verdict next_verdict = Verdict::kOpen;
  engine::Failure read;
};

TEST(GroupInterleaving, KeepsAnEntryThatALateRankBeganToRead) {
  for (uint64_t at = 1; at < kInstructionsMax; ++at) {
    LateByAWrap group;
    group.shared.post(LateByAWrap::kNext, 0, &group.request);
    bool reused = false;
    if (!EveryInstruction::run(
            at, [&] { reused = group.fail(LateByAWrap::kNext); }, [&] { group.late_rank(); })) {
      ASSERT_GT(at, 10U);
      return;
    }
    ASSERT_NE(group.verdict, Verdict::kOpen) << "instruction " << at;
    ASSERT_FALSE(reused && group.verdict == Verdict::kFailed) << "instruction " << at << ": reused while it is read";
    (void)group.shared.release(1, 1);
    ASSERT_EQ(group.fail(LateByAWrap::kNext), !reused) << "instruction " << at;
  }
  FAIL() << "the call does not end";
}

TEST(GroupInterleaving, ReadsNothingOfAnEntryThatWasTakenMeanwhile) {
  for (uint64_t at = 1; at < kInstructionsMax; ++at) {
    LateByAWrap group;
    group.shared.post(LateByAWrap::kNext, 0, &group.request);
    if (!EveryInstruction::run(
            at, [&] { group.late_rank(); }, [&] { (void)group.fail(LateByAWrap::kNext); })) {
      ASSERT_GT(at, 10U);
      return;
    }
    ASSERT_NE(group.verdict, Verdict::kOpen) << "instruction " << at;
    ASSERT_TRUE(group.verdict == Verdict::kGone || group.read.value == 1) << "instruction " << at;
  }
  FAIL() << "the call does not end";
}

TEST(GroupInterleaving, WakesWhoeverWaitsForTheEntryThatARankReleases) {
  for (const bool release_first : {false, true}) {
    bool ended = false;
    for (uint64_t at = 1; at < kInstructionsMax && !ended; ++at) {
      LateByAWrap group;
      group.late_rank();
      bool awaited = false;
      const std::function<void()> release = [&] { awaited = group.shared.release(1, 1); };
      const std::function<void()> next = [&] { group.next_rank(); };
      ended = !EveryInstruction::run(at, release_first ? release : next, release_first ? next : release);
      ASSERT_TRUE(ended || awaited || group.next_verdict == Verdict::kLaunch) << "instruction " << at;
    }
    ASSERT_TRUE(ended) << "the call does not end";
  }
}

}  // namespace
}  // namespace expertd::test
