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
// The address sanitizer makes several instructions of one.
#if defined(__SANITIZE_ADDRESS__)
constexpr uint64_t kStride = 5;
#else
constexpr uint64_t kStride = 1;
#endif

engine::Failure failure_of(uint64_t number) {
  return {.reason = EXPERTD_REASON_TIMEOUT, .value = static_cast<int64_t>(number)};
}

/// A group whose rank 0 is through with the first kEntries operations while rank 1, excluded, has posted none.
struct LateByAWrap {
  LateByAWrap() : shared(group_settings(2, true)) {
    shared.change_excluded(base::RankSet(2), {});
    for (uint64_t number = 1; number <= GroupShared::kEntries; ++number) {
      shared.post(number, 0, &request);
      EXPECT_TRUE(fail(number));
      (void)shared.release(number, 0);
    }
  }

  bool fail(uint64_t number) {
    bool changed = false;
    return shared.fail(number, {}, failure_of(number), &changed);
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

/// Calls `scenario`, which makes everything anew, for one instruction after the other until it returns false.
void at_every_instruction(const std::function<bool(uint64_t at)>& scenario) {
  for (uint64_t at = 1; at < kInstructionsMax; at += kStride) {
    if (!scenario(at)) {
      ASSERT_GT(at, 10U) << "nothing was interleaved";
      return;
    }
    ASSERT_FALSE(testing::Test::HasFailure()) << "at instruction " << at;
  }
  FAIL() << "the call does not end";
}

TEST(GroupInterleaving, KeepsAnEntryThatALateRankBeganToRead) {
  at_every_instruction([](uint64_t at) {
    LateByAWrap group;
    group.shared.post(LateByAWrap::kNext, 0, &group.request);
    bool reused = false;
    if (!EveryInstruction::run(
            at, [&] { reused = group.fail(LateByAWrap::kNext); }, [&] { group.late_rank(); })) {
      return false;
    }
    EXPECT_NE(group.verdict, Verdict::kOpen);
    EXPECT_FALSE(reused && group.verdict == Verdict::kFailed) << "reused while it is read";
    (void)group.shared.release(1, 1);
    EXPECT_EQ(group.fail(LateByAWrap::kNext), !reused);
    return true;
  });
}

TEST(GroupInterleaving, ReadsNothingOfAnEntryThatWasTakenMeanwhile) {
  at_every_instruction([](uint64_t at) {
    LateByAWrap group;
    group.shared.post(LateByAWrap::kNext, 0, &group.request);
    const bool ran = EveryInstruction::run(
        at, [&] { group.late_rank(); }, [&] { (void)group.fail(LateByAWrap::kNext); });
    EXPECT_NE(group.verdict, Verdict::kOpen);
    EXPECT_TRUE(group.verdict == Verdict::kGone || group.read.value == 1);
    return ran;
  });
}

TEST(GroupInterleaving, WakesWhoeverWaitsForTheEntryThatARankReleases) {
  for (const bool release_first : {false, true}) {
    at_every_instruction([&](uint64_t at) {
      LateByAWrap group;
      group.late_rank();
      bool awaited = false;
      const std::function<void()> release = [&] { awaited = group.shared.release(1, 1); };
      const std::function<void()> next = [&] { group.next_rank(); };
      const bool ran = EveryInstruction::run(at, release_first ? release : next, release_first ? next : release);
      EXPECT_TRUE(!ran || awaited || group.next_verdict == Verdict::kLaunch);
      return ran;
    });
  }
}

/// Two ranks that submitted operation 1; rank 1 leaves it in one way or another while somebody decides it.
struct Leaving {
  explicit Leaving(uint64_t excluded) : shared(group_settings(2, true)) {
    shared.change_excluded(base::RankSet(excluded), {});
    refused.rejected_reason = EXPERTD_REASON_NO_SUCH_BUFFER;
    shared.post(1, 0, &refused);
    shared.post(1, 1, &request);
  }

  void decide() { (void)shared.try_decide(1, &changed); }
  /// Rank 1 takes part exactly when it was not told that it may go.
  void expect_to_agree() {
    decide();
    const base::RankSet active = shared.entry(1).active.load(std::memory_order_acquire);
    EXPECT_EQ(shared.try_decide(1, &changed), Verdict::kFailed);
    EXPECT_FALSE(left && active.contains(1)) << "counted on after it left";
  }

  const engine::Request request = plain_request();
  engine::Request refused = plain_request();  // the quickest to decide, so the fewest instructions
  GroupShared shared;
  bool changed = false;
  bool left = false;
};

TEST(GroupInterleaving, CountsOnNoRankThatWithdrewWhateverTheMaskBecomes) {
  for (const bool readmitted_before : {false, true}) {
    for (const bool decided_first : {false, true}) {
      at_every_instruction([&](uint64_t at) {
        Leaving group(2);
        const std::function<void()> decide = [&] { group.decide(); };
        const std::function<void()> leave = [&] {
          if (readmitted_before) {
            group.shared.change_excluded({}, base::RankSet(~0ULL));
          }
          group.left = group.shared.withdraw(1, 1);
          group.shared.change_excluded({}, base::RankSet(~0ULL));
        };
        const bool ran = EveryInstruction::run(at, decided_first ? decide : leave, decided_first ? leave : decide);
        group.expect_to_agree();
        return ran;
      });
    }
  }
}

TEST(GroupInterleaving, CountsOnNoRankThatWasLostAndFoundTheOperationUndecided) {
  for (const bool decided_first : {false, true}) {
    at_every_instruction([&](uint64_t at) {
      Leaving group(0);
      const std::function<void()> decide = [&] { group.decide(); };
      const std::function<void()> leave = [&] {
        group.shared.set_lost(1);
        group.left = group.shared.undecided(1);
      };
      const bool ran = EveryInstruction::run(at, decided_first ? decide : leave, decided_first ? leave : decide);
      group.expect_to_agree();
      return ran;
    });
  }
}

TEST(GroupInterleaving, EndsNothingForARankOnceItsExclusionWasAnswered) {
  at_every_instruction([](uint64_t at) {
    const engine::Request request = plain_request();
    GroupShared shared(group_settings(2, true));
    shared.post(1, 1, &request);
    bool failed = false;
    bool changed = false;
    bool undecided = false;
    const bool ran = EveryInstruction::run(
        at, [&] { failed = shared.fail(1, base::RankSet(2), failure_of(1), &changed); },
        [&] {
          shared.change_excluded(base::RankSet(2), {});
          undecided = shared.undecided(1);
        });
    EXPECT_FALSE(undecided && failed);
    EXPECT_TRUE(failed || shared.undecided(1));
    return ran;
  });
}

// Control calls of several ranks come on several threads.
TEST(GroupInterleaving, LetsTwoChangeTheMaskAtATime) {
  at_every_instruction([](uint64_t at) {
    GroupShared shared(group_settings(3, true));
    shared.change_excluded(base::RankSet(4), {});
    const bool ran = EveryInstruction::run(
        at, [&] { shared.change_excluded(base::RankSet(1), {}); },
        [&] { shared.change_excluded(base::RankSet(2), base::RankSet(4)); });
    EXPECT_TRUE(!ran || shared.excluded() == base::RankSet(3));
    EXPECT_TRUE(!ran || shared.epoch() == 4U);
    return ran;
  });
}

}  // namespace
}  // namespace expertd::test
