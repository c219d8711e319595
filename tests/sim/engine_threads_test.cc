// SPDX-License-Identifier: Apache-2.0
// One real thread per rank over one GroupShared: for the thread sanitizer. Threads hand over the processor instead of
// sleeping; their ticks are counted turns. Nothing here links gRPC.
#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "daemon/device/host/host_device.h"
#include "tests/support/fake_engine_group.h"
#include "tests/support/fake_sim_device.h"

namespace expertd::test {
namespace {

constexpr uint64_t kTurnsMax = 50'000'000;

class NoWake final : public engine::WakePort {
 public:
  void wake(base::DeviceIndex /*device*/) override {}
};

/// A rank with everything its thread touches; the ranks share the group alone.
struct ThreadRank {
  ThreadRank(engine::GroupShared* shared, uint32_t index, engine::DevicePort* port, engine::WakePort* wake)
      : group(shared),
        rank(index),
        engine(base::DeviceIndex{index}, port, wake, &observer),
        session(base::SessionId{index + 1}, &completions, nullptr),
        state{shared, index, 1},
        random(index + 1) {
    engine.add_session(&session);
  }

  /// Submits what fits; requests say which operation they are, so that devices can check what they read.
  void submit(uint64_t last, kernels::OpKind kind, uint32_t refusals_percent) {
    while (seq < last && session.slot_free(static_cast<uint32_t>(seq % EXPERTD_RING_SLOTS_MAX))) {
      const uint32_t slot = static_cast<uint32_t>(seq % EXPERTD_RING_SLOTS_MAX);
      engine::Request request = plain_request();
      request.shape.kind = kind;
      request.slot = slot;
      request.seq = ++seq;
      request.submit_ns = state.next_number;
      request.session = session.id();
      request.deadline_ns = patience == 0 ? ~0ULL : turn + random() % patience;
      request.rejected_reason = random() % 100 < refusals_percent ? EXPERTD_REASON_NO_SUCH_BUFFER : 0;
      request.without_words = request.rejected_reason != 0 && seq % 2 == 0;
      session.request(slot) = request;
      engine.submit(&session, slot, &state);
    }
  }

  engine::GroupShared* group;
  uint32_t rank;
  FakeCompletionPort completions;
  FakeObserver observer;
  engine::Engine engine;
  engine::EngineSession session;
  engine::RankState state;
  std::mt19937_64 random;
  uint64_t seq = 0;
  uint64_t turn = 0;
  uint64_t patience = 0;  // turns until the deadline of a request, at most; 0 = none
};

/// Turns a rank until all its operations completed; `dies_at` > 0: until it has submitted that many, then it is lost.
void run_rank(ThreadRank& rank, SimDevice* device, uint64_t operations, uint64_t dies_at, kernels::OpKind kind) {
  uint64_t& turn = rank.turn;
  while (turn < kTurnsMax && (rank.seq < operations || rank.session.outstanding() != 0)) {
    rank.submit(operations, kind, device == nullptr ? 0 : 3);
    if (device != nullptr) {
      device->now_ns = turn;
    }
    (void)rank.engine.run_once(++turn);
    if (dies_at != 0 && rank.seq >= dies_at) {
      rank.group->set_lost(rank.rank);
      rank.engine.close_session(&rank.session, turn);
      dies_at = 0;
      operations = 0;
    }
    std::this_thread::yield();
  }
  while (device != nullptr && turn < kTurnsMax && device->parts() != 0) {
    device->now_ns = turn;
    (void)rank.engine.run_once(++turn);
  }
}

struct Case {
  bool mask;
  uint64_t dies_at;   // of rank 1; 0 = lives
  bool exclusions;    // a control thread excludes and readmits ranks 2 and 3
  uint64_t patience;  // of those ranks, in turns; 0 = endless
};

class EngineThreads : public testing::TestWithParam<Case> {};

TEST_P(EngineThreads, CompletesEveryOperationOnceAndAlike) {
  constexpr uint32_t kRanks = 4;
  constexpr uint64_t kOperations = 400;
  NoWake wake;
  engine::GroupShared group(group_settings(kRanks, GetParam().mask));
  std::vector<std::unique_ptr<SimDevice>> devices;
  std::vector<std::unique_ptr<ThreadRank>> ranks;
  for (uint32_t rank = 0; rank < kRanks; ++rank) {
    devices.push_back(std::make_unique<SimDevice>(rank + 1, rank, &wake));
    devices.back()->ticks_max = 5;
    ranks.push_back(std::make_unique<ThreadRank>(&group, rank, devices.back().get(), &wake));
    ranks.back()->patience = rank >= 2 ? GetParam().patience : 0;
  }
  std::atomic<bool> done{false};
  std::vector<std::thread> threads;
  for (uint32_t rank = 0; rank < kRanks; ++rank) {
    threads.emplace_back([&, rank] {
      run_rank(*ranks[rank], devices[rank].get(), kOperations, rank == 1 ? GetParam().dies_at : 0,
               kernels::OpKind::kBarrier);
    });
  }
  std::thread control([&] {
    for (uint64_t turn = 0; !done.load(); ++turn) {
      (void)group.quiet(turn % kRanks);
      (void)group.epoch();
      if (GetParam().exclusions && turn % 16 == 0) {
        const uint64_t mask = turn % 32 == 0 ? 0 : 1ULL << (2 + turn / 32 % 2);
        group.change_excluded(base::RankSet(mask), base::RankSet(~mask));
      }
      std::this_thread::yield();
    }
    group.change_excluded({}, base::RankSet(~0ULL));
  });
  for (std::thread& thread : threads) {
    thread.join();
  }
  done.store(true);
  control.join();
  for (uint32_t rank = 0; rank < kRanks; ++rank) {
    EXPECT_EQ(devices[rank]->first_breach(), "");
    EXPECT_EQ(devices[rank]->parts(), 0U);
    EXPECT_EQ(ranks[rank]->session.outstanding(), 0U);
    EXPECT_TRUE(group.quiet(rank));
    if (rank == 1 && GetParam().dies_at != 0) {
      continue;
    }
    ASSERT_EQ(ranks[rank]->completions.count.size(), kOperations);
    for (const auto& [seq, times] : ranks[rank]->completions.count) {
      ASSERT_EQ(times, 1U);
      const expertd_completion& ours = ranks[rank]->completions.by_seq[seq];
      const expertd_completion& first = ranks[0]->completions.by_seq[seq];
      if (ours.reason == 0 && first.reason == 0) {
        ASSERT_EQ(ours.rank_mask, first.rank_mask) << "operation " << seq;
        ASSERT_EQ(ours.epoch, first.epoch) << "operation " << seq;
      }
      if (GetParam().dies_at == 0 && !GetParam().exclusions) {
        ASSERT_EQ(ours.reason == 0, first.reason == 0) << "operation " << seq;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Modes, EngineThreads,
                         testing::Values(Case{false, 0, false, 0}, Case{false, 150, false, 0},
                                         Case{true, 150, false, 0}, Case{true, 0, true, 0}, Case{true, 0, true, 20}),
                         [](const auto& row) {
                           return std::string(row.param.mask ? "mask" : "fail") +
                                  (row.param.dies_at != 0 ? "_loss" : "") + (row.param.exclusions ? "_excluding" : "") +
                                  (row.param.patience != 0 ? "_late" : "");
                         });

/// Holds a thread back for up to about a microsecond, so that two threads meet at ever other points.
void linger(std::mt19937_64& random) {
  const uint64_t turns = random() % 1024;
  for (uint64_t turn = 0; turn < turns; ++turn) {
    std::atomic_signal_fence(std::memory_order_seq_cst);
  }
}

void await(const std::atomic<uint64_t>& word, uint64_t value) {
  for (uint64_t turn = 1; word.load(std::memory_order_acquire) < value; ++turn) {
    if (turn % 1024 == 0) {
      std::this_thread::yield();
    }
  }
}

/// Ends operations one by one as the only active rank; from the first reuse of an entry on it waits before each until
/// the late rank is about to post into the same entry.
void end_operations(engine::GroupShared& group, uint64_t last, const std::atomic<uint64_t>& late_at,
                    std::atomic<uint64_t>& ended) {
  const engine::Request request = plain_request();
  std::mt19937_64 random(1);
  for (uint64_t number = 1; number <= last; ++number) {
    group.post(number, 0, &request);
    if (number > engine::GroupShared::kEntries) {
      await(late_at, number - engine::GroupShared::kEntries);
      linger(random);
    }
    bool changed = false;
    while (
        !group.fail(number, {}, {.reason = EXPERTD_REASON_TIMEOUT, .value = static_cast<int64_t>(number)}, &changed)) {
      std::this_thread::yield();
    }
    (void)group.release(number, 0);
    ended.store(number, std::memory_order_release);
  }
}

// The engine reads the failure of an operation after its verdict; a rank that is late by exactly the number of entries
// does so while the others may take the entry for their next operation.
TEST(GroupSharedThreads, KeepAnEntryWhileARankAWholeWrapLateReadsIt) {
  constexpr uint64_t kOperations = 60'000;
  engine::GroupShared group(group_settings(2, true));
  group.change_excluded(base::RankSet(2), {});
  std::atomic<uint64_t> late_at{0};
  std::atomic<uint64_t> ended{0};
  std::thread first([&] { end_operations(group, kOperations, late_at, ended); });
  const engine::Request request = plain_request();
  std::mt19937_64 random(2);
  uint64_t read = 0;
  uint64_t wrong = 0;
  for (uint64_t number = 1; number <= kOperations - engine::GroupShared::kEntries; ++number) {
    await(ended, number + engine::GroupShared::kEntries - 1);
    late_at.store(number, std::memory_order_release);
    linger(random);
    group.post(number, 1, &request);
    bool decided = false;
    if (group.try_decide(number, &decided) == engine::Verdict::kFailed) {
      ++read;
      linger(random);
      wrong += group.entry(number).failure.value != static_cast<int64_t>(number) ? 1 : 0;
    }
    (void)group.release(number, 1);
  }
  first.join();
  RecordProperty("read", std::to_string(read));
  EXPECT_EQ(wrong, 0U) << "of " << read << " failures were those of a newer operation";
}

TEST(HostDeviceThreads, MeetInBarriersWithoutARace) {
  constexpr uint32_t kRanks = 3;
  constexpr uint64_t kOperations = 300;
  NoWake wake;
  engine::GroupShared group(group_settings(kRanks, false));
  device::HostGroupDirectory tables;
  std::vector<std::unique_ptr<device::HostDevice>> devices;
  std::vector<std::unique_ptr<ThreadRank>> ranks;
  for (uint32_t rank = 0; rank < kRanks; ++rank) {
    devices.push_back(std::make_unique<device::HostDevice>(base::DeviceIndex{rank}, rank, &tables, &wake, 0));
    engine::GroupShape shape = group.settings().shape;
    shape.rank = rank;
    ASSERT_TRUE(devices.back()->create_group(shape, 4).is_ok());
    ranks.push_back(std::make_unique<ThreadRank>(&group, rank, &devices.back()->port(), &wake));
  }
  std::vector<std::thread> threads;
  for (uint32_t rank = 0; rank < kRanks; ++rank) {
    threads.emplace_back([&, rank] { run_rank(*ranks[rank], nullptr, kOperations, 0, kernels::OpKind::kBarrier); });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  for (const std::unique_ptr<ThreadRank>& rank : ranks) {
    ASSERT_EQ(rank->completions.count.size(), kOperations);
    for (const auto& [seq, completion] : rank->completions.by_seq) {
      ASSERT_EQ(completion.reason, 0U) << "operation " << seq;
    }
  }
}

}  // namespace
}  // namespace expertd::test
