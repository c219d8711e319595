// SPDX-License-Identifier: Apache-2.0
// Many operations in flight: order, events, the ring's wrap, buffer pairs, groups side by side and in two processes.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "tests/integration/moe_case.h"
#include "tests/support/daemon_process.h"
#include "tests/support/fault_client.h"

namespace expertd::support {
namespace {

using std::chrono::seconds;

class Stream : public ::testing::Test {
 protected:
  void SetUp() override { ASSERT_TRUE(daemon_.start()); }
  DaemonProcess daemon_{3, {"--engine-op-deadline=10s"}};
};

expertd_event_t issue_barrier(expertd_group_t* group, uint32_t flags = 0) {
  expertd_event_t event{};
  const Outcome issued = outcome_of(expertd_barrier(group, nullptr, flags, 0, &event));
  EXPECT_TRUE(issued.ok()) << describe(issued);
  return event;
}

TEST_F(Stream, AThousandOperationsBackToBackWrapTheRing) {
  RankGroup group(daemon_.attach_socket(), "thousand", 2);
  ASSERT_TRUE(group.ok()) << group.failure();
  group.run([](Rank& rank) {
    std::vector<expertd_event_t> events;
    for (int i = 0; i < 1000; ++i) {
      events.push_back(issue_barrier(rank.group));
    }
    const OpEnd last = finish(events.back());
    EXPECT_TRUE(last.outcome.ok()) << describe(last.outcome);
    for (const expertd_event_t& event : events) {
      int done = 0;
      EXPECT_TRUE(outcome_of(expertd_event_query(event, &done)).ok());
      EXPECT_EQ(done, 1);
    }
  });
  EXPECT_TRUE(daemon_.metric_becomes("expertd_ops_total{op=\"barrier\",gpu=\"host\",result=\"ok\"}", 2000));
  EXPECT_TRUE(daemon_.metric_becomes("expertd_op_executed_total{op=\"barrier\",gpu=\"host\",executor=\"host\"}", 2000));
}

TEST_F(Stream, AnEventKeepsItsResultAfterItsSlotWasUsedAgain) {
  RankGroup group(daemon_.attach_socket(), "kept", 1);
  ASSERT_TRUE(group.ok()) << group.failure();
  expertd_group_t* lone = group.rank(0).group;
  const expertd_event_t first = issue_barrier(lone);
  for (int i = 0; i < 500; ++i) {
    EXPECT_TRUE(barrier(lone).outcome.ok());
  }
  const OpEnd kept = finish(first);
  EXPECT_TRUE(kept.outcome.ok()) << describe(kept.outcome);
  EXPECT_EQ(kept.result.rank_mask, 1u);
  // Results are kept for a long time, not for ever; then the wait says so instead of waiting.
  for (int i = 0; i < 1100; ++i) {
    EXPECT_TRUE(barrier(lone).outcome.ok());
  }
  EXPECT_EQ(finish(first).outcome.status.reason, EXPERTD_REASON_BAD_STATE);
}

TEST_F(Stream, AnEventThatWasNeverIssuedIsRefused) {
  RankGroup group(daemon_.attach_socket(), "never", 1);
  ASSERT_TRUE(group.ok()) << group.failure();
  expertd_event_t event = issue_barrier(group.rank(0).group);
  EXPECT_TRUE(finish(event).outcome.ok());
  event.seq += 5;
  EXPECT_NE(finish(event).outcome.status.reason, EXPERTD_REASON_NONE);
}

TEST_F(Stream, AsynchronousOperationsAreAskedAndWaitedFor) {
  RankGroup group(daemon_.attach_socket(), "async", 2);
  ASSERT_TRUE(group.ok()) << group.failure();
  const expertd_event_t early = issue_barrier(group.rank(0).group, EXPERTD_ASYNC);
  int done = 1;
  EXPECT_TRUE(outcome_of(expertd_event_query(early, &done)).ok());
  EXPECT_EQ(done, 0) << "the other rank has not come";
  OpEnd waited = finish(early, 20'000'000);
  EXPECT_EQ(waited.outcome.status.reason, EXPERTD_REASON_TIMEOUT) << "a wait may end before the operation";
  EXPECT_TRUE(outcome_of(expertd_event_stream_wait(early, nullptr)).ok());
  EXPECT_TRUE(barrier(group.rank(1).group).outcome.ok());
  waited = finish(early);
  EXPECT_TRUE(waited.outcome.ok()) << describe(waited.outcome);
  EXPECT_TRUE(outcome_of(expertd_event_query(early, &done)).ok());
  EXPECT_EQ(done, 1);
}

struct Hooked {
  std::vector<uint64_t> order;
  std::vector<int32_t> reasons;
};
struct Note {
  Hooked* hooked;
  uint64_t number;
};
void note_end(expertd_status_t status, const expertd_op_result_t*, void* user) {
  const Note* note = static_cast<const Note*>(user);
  note->hooked->order.push_back(note->number);
  note->hooked->reasons.push_back(status.reason);
}

TEST_F(Stream, ABufferPairRunsItsHooksOnceAndInOrder) {
  RankGroup group(daemon_.attach_socket(), "pair", 1);
  ASSERT_TRUE(group.ok()) << group.failure();
  Rank& rank = group.rank(0);
  expertd_buffer_pair_t* pair = nullptr;
  ASSERT_TRUE(outcome_of(expertd_buffer_create(rank.session.get(), 1000, EXPERTD_BF16, &pair)).ok());
  ASSERT_NE(expertd_buffer_send(pair), nullptr);
  ASSERT_NE(expertd_buffer_send(pair), expertd_buffer_receive(pair));
  Hooked hooked;
  std::vector<Note> notes;
  for (uint64_t i = 0; i < 20; ++i) {
    notes.push_back({&hooked, i});
  }
  for (Note& note : notes) {
    ASSERT_TRUE(outcome_of(expertd_queue_record(pair, issue_barrier(rank.group), note_end, &note)).ok());
  }
  uint32_t pending = 0;
  EXPECT_TRUE(outcome_of(expertd_queue_query(pair, &pending)).ok());
  EXPECT_EQ(pending, 20u);
  uint32_t total = 0;
  EXPECT_TRUE(wait_until(
      [&] {
        uint32_t taken = 0;
        EXPECT_TRUE(outcome_of(expertd_queue_poll(pair, &taken)).ok());
        total += taken;
        return total >= 10;
      },
      seconds(5)));
  EXPECT_TRUE(outcome_of(expertd_queue_stream_wait(pair, nullptr)).ok());
  EXPECT_TRUE(outcome_of(expertd_queue_synchronize(pair, 0)).ok());
  ASSERT_EQ(hooked.order.size(), 20u);
  EXPECT_TRUE(std::is_sorted(hooked.order.begin(), hooked.order.end()));
  EXPECT_EQ(std::count(hooked.reasons.begin(), hooked.reasons.end(), EXPERTD_REASON_NONE), 20);
  EXPECT_TRUE(outcome_of(expertd_buffer_pair_destroy(pair)).ok());
}

TEST_F(Stream, ABufferPairReportsTheFirstFailure) {
  RankGroup group(daemon_.attach_socket(), "failing", 2);
  ASSERT_TRUE(group.ok()) << group.failure();
  Rank& rank = group.rank(0);
  expertd_buffer_pair_t* pair = nullptr;
  ASSERT_TRUE(outcome_of(expertd_buffer_create(rank.session.get(), 8, EXPERTD_F32, &pair)).ok());
  expertd_event_t event{};
  ASSERT_TRUE(outcome_of(expertd_barrier(rank.group, nullptr, 0, 100'000'000, &event)).ok());
  Hooked hooked;
  Note note{&hooked, 1};
  ASSERT_TRUE(outcome_of(expertd_queue_record(pair, event, note_end, &note)).ok());
  EXPECT_EQ(expertd_queue_synchronize(pair, 5'000'000'000).reason, EXPERTD_REASON_TIMEOUT);
  EXPECT_EQ(hooked.reasons, std::vector<int32_t>{EXPERTD_REASON_TIMEOUT});
}

TEST_F(Stream, ABufferPairTakesSixtyFourEvents) {
  RankGroup group(daemon_.attach_socket(), "full", 1);
  ASSERT_TRUE(group.ok()) << group.failure();
  expertd_buffer_pair_t* pair = nullptr;
  ASSERT_TRUE(outcome_of(expertd_buffer_create(group.rank(0).session.get(), 8, EXPERTD_F32, &pair)).ok());
  const expertd_event_t event = issue_barrier(group.rank(0).group);
  for (int i = 0; i < 64; ++i) {
    ASSERT_TRUE(outcome_of(expertd_queue_record(pair, event, nullptr, nullptr)).ok());
  }
  EXPECT_EQ(expertd_queue_record(pair, event, nullptr, nullptr).reason, EXPERTD_REASON_RING_OVERFLOW);
}

TEST_F(Stream, TwoLowLatencyDispatchesMayBeOutstanding) {
  RankGroup group(daemon_.attach_socket(), "double", 2);
  ASSERT_TRUE(group.ok()) << group.failure();
  group.run([](Rank& rank) {
    std::vector<uint16_t> x[2] = {std::vector<uint16_t>(4 * 128, 0x3f80), std::vector<uint16_t>(4 * 128, 0x4000)};
    const std::vector<int64_t> ids = {0, 1, 2, 3, 0, 2, 1, 3};
    for (int round = 0; round < 50; ++round) {
      expertd_handle_t handles[2];
      expertd_event_t events[2];
      for (int set = 0; set < 2; ++set) {
        expertd_ll_dispatch_args_t args = EXPERTD_INIT(expertd_ll_dispatch_args_t);
        args.x = x[set].data();
        args.dtype = EXPERTD_BF16;
        args.topk_idx = ids.data();
        args.idx_type = EXPERTD_I64;
        args.tokens = 4;
        args.flags = EXPERTD_ASYNC;
        ASSERT_TRUE(outcome_of(expertd_ll_dispatch(rank.group, &args, nullptr, &handles[set], &events[set])).ok());
      }
      for (int set = 0; set < 2; ++set) {
        const OpEnd end = finish(events[set]);
        ASSERT_TRUE(end.outcome.ok()) << describe(end.outcome);
        expertd_ll_outputs_t places = EXPERTD_INIT(expertd_ll_outputs_t);
        ASSERT_TRUE(outcome_of(expertd_ll_handle_outputs(rank.group, handles[set], &places)).ok());
        EXPECT_EQ(places.expert_counts[0], 4);
        EXPECT_EQ(static_cast<const uint16_t*>(places.recv_x)[0], x[set][0]);
      }
      // Both ranks must have read a set before it is written again.
      ASSERT_TRUE(barrier(rank.group).outcome.ok());
    }
  });
}

TEST_F(Stream, LowLatencyTakesNoMemoryAfterTheJoin) {
  RankGroup group(daemon_.attach_socket(), "fixed", 1);
  ASSERT_TRUE(group.ok()) << group.failure();
  Rank& rank = group.rank(0);
  void* memory[4] = {};  // x, indices, weights, output
  for (void*& data : memory) {
    ASSERT_TRUE(outcome_of(expertd_alloc(rank.session.get(), 4 * 128 * 2, &data)).ok());
  }
  const int64_t ids[8] = {0, 1, 1, 0, 0, 1, 1, 0};
  std::copy_n(ids, 8, static_cast<int64_t*>(memory[1]));
  const std::string held = "expertd_pool_bytes{gpu=\"host\",";
  const double before = daemon_.metric(held);
  const size_t descriptors = daemon_.open_descriptors();
  for (int round = 0; round < 100; ++round) {
    expertd_ll_dispatch_args_t out = EXPERTD_INIT(expertd_ll_dispatch_args_t);
    out.x = memory[0];
    out.dtype = EXPERTD_BF16;
    out.topk_idx = memory[1];
    out.idx_type = EXPERTD_I64;
    out.tokens = 4;
    expertd_handle_t handle{};
    expertd_event_t events[2] = {};
    ASSERT_TRUE(outcome_of(expertd_ll_dispatch(rank.group, &out, nullptr, &handle, &events[0])).ok());
    expertd_ll_combine_args_t back = EXPERTD_INIT(expertd_ll_combine_args_t);
    back.topk_idx = memory[1];
    back.idx_type = EXPERTD_I64;
    back.topk_weights = static_cast<const float*>(memory[2]);
    back.handle = handle;
    back.tokens = 4;
    back.combined_x = memory[3];
    ASSERT_TRUE(outcome_of(expertd_ll_combine(rank.group, &back, nullptr, &events[1])).ok()) << expertd_last_message();
    for (const expertd_event_t& event : events) {
      const OpEnd end = finish(event);
      ASSERT_TRUE(end.outcome.ok()) << round << ": " << describe(end.outcome);
    }
  }
  EXPECT_EQ(daemon_.metric(held), before);
  // The connection of a scrape may take a moment to go.
  EXPECT_TRUE(wait_until([&] { return daemon_.open_descriptors() <= descriptors; }, seconds(5)));
}

TEST_F(Stream, TheOutputsOfAnOldLowLatencyDispatchAreStale) {
  RankGroup group(daemon_.attach_socket(), "stale", 1);
  ASSERT_TRUE(group.ok()) << group.failure();
  expertd_handle_t handles[3];
  for (expertd_handle_t& handle : handles) {
    expertd_ll_dispatch_args_t args = EXPERTD_INIT(expertd_ll_dispatch_args_t);
    args.dtype = EXPERTD_BF16;
    args.idx_type = EXPERTD_I64;
    expertd_event_t event{};
    ASSERT_TRUE(outcome_of(expertd_ll_dispatch(group.rank(0).group, &args, nullptr, &handle, &event)).ok());
    EXPECT_TRUE(finish(event).outcome.ok());
  }
  expertd_ll_outputs_t places = EXPERTD_INIT(expertd_ll_outputs_t);
  EXPECT_EQ(expertd_ll_handle_outputs(group.rank(0).group, handles[0], &places).reason, EXPERTD_REASON_STALE_HANDLE);
  EXPECT_TRUE(outcome_of(expertd_ll_handle_outputs(group.rank(0).group, handles[2], &places)).ok());
}

TEST_F(Stream, HandlesAreLimitedAndUsableAgainWhenFreed) {
  DaemonProcess small(1, {"--engine-handles-per-session=4"});
  ASSERT_TRUE(small.start());
  RankGroup group(small.attach_socket(), "handles", 1,
                  [](expertd_group_options_t* options) { options->mode = EXPERTD_MODE_NORMAL; });
  ASSERT_TRUE(group.ok()) << group.failure();
  std::vector<expertd_handle_t> handles;
  const auto dispatch = [&] {
    expertd_dispatch_args_t args = EXPERTD_INIT(expertd_dispatch_args_t);
    args.dtype = EXPERTD_BF16;
    args.idx_type = EXPERTD_I64;
    expertd_handle_t handle{};
    expertd_event_t event{};
    const Outcome issued = outcome_of(expertd_dispatch(group.rank(0).group, &args, nullptr, &handle, &event));
    if (issued.ok()) {
      handles.push_back(handle);
      EXPECT_TRUE(finish(event).outcome.ok());
    }
    return issued.status.reason;
  };
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(dispatch(), EXPERTD_REASON_NONE);
  }
  EXPECT_EQ(dispatch(), EXPERTD_REASON_HANDLE_LIMIT);
  EXPECT_TRUE(outcome_of(expertd_handle_free(group.rank(0).group, handles[1])).ok());
  EXPECT_EQ(expertd_handle_free(group.rank(0).group, handles[1]).reason, EXPERTD_REASON_STALE_HANDLE);
  EXPECT_EQ(dispatch(), EXPERTD_REASON_NONE);
}

/// Runs a layout of these ids and compares all outputs.
void expect_layout(const ClientSession& session, const kernels::OpShape& shape, const std::vector<int64_t>& ids) {
  const LayoutResult wanted = reference_layout(shape, ids);
  expertd_layout_args_t args = EXPERTD_INIT(expertd_layout_args_t);
  std::vector<int32_t> ranks(shape.ranks);
  std::vector<int32_t> nodes(1);
  std::vector<int32_t> experts(shape.experts);
  std::vector<uint8_t> mask(size_t{shape.tokens} * shape.ranks);
  args.topk_idx = ids.data();
  args.idx_type = EXPERTD_I64;
  args.tokens = shape.tokens;
  args.top_k = shape.top_k;
  args.num_experts = shape.experts;
  args.num_ranks = shape.ranks;
  args.tokens_per_rank = ranks.data();
  args.tokens_per_node = nodes.data();
  args.tokens_per_expert = experts.data();
  args.token_rank_mask = mask.empty() ? nullptr : mask.data();
  expertd_event_t event{};
  ASSERT_TRUE(outcome_of(expertd_layout(session.get(), &args, nullptr, &event)).ok()) << expertd_last_message();
  const OpEnd end = finish(event);
  ASSERT_TRUE(end.outcome.ok()) << describe(end.outcome);
  EXPECT_EQ(ranks, wanted.tokens_per_rank);
  EXPECT_EQ(nodes, wanted.tokens_per_node);
  EXPECT_EQ(experts, wanted.tokens_per_expert);
  EXPECT_EQ(mask, wanted.token_rank_mask);
}

TEST_F(Stream, LayoutEqualsTheReference) {
  const ClientSession session(daemon_.attach_socket(), "host:0");
  for (const uint64_t seed : seeds_to_run(30)) {
    const RandomCase random_case = make_random_case(seed, kernels::OpKind::kLayout);
    kernels::OpShape shape = random_case.shape;
    shape.tokens = random_case.inputs[0].tokens;
    shape.ranks_per_node = 0;
    SCOPED_TRACE(repro_line(random_case));
    expect_layout(session, shape, random_case.inputs[0].topk_idx);
  }
}

TEST_F(Stream, LayoutOfMoreRanksThanOneNodeHas) {
  const ClientSession session(daemon_.attach_socket(), "host:0");
  kernels::OpShape shape;
  shape.ranks = 512;
  shape.experts = 1024;
  shape.local_experts = 2;
  shape.top_k = 4;
  shape.tokens = 32;
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < 128; ++i) {
    ids.push_back(i * 37 % 1024);
  }
  expect_layout(session, shape, ids);
}

TEST_F(Stream, GroupsOfOneSessionWorkInTurn) {
  const RandomCase high = make_case(kernels::OpKind::kDispatch, {.ranks = 2});
  const RandomCase low = make_case(kernels::OpKind::kLlDispatch, {.seed = 2, .ranks = 2});
  RankGroup first(daemon_.attach_socket(), "first", 2, [&](auto* options) { configure(high, options); });
  ASSERT_TRUE(first.ok()) << first.failure();
  expertd_group_t* high_groups[2] = {first.rank(0).group, first.rank(1).group};
  expertd_group_t* low_groups[2] = {};
  first.run([&](Rank& rank) {
    expertd_group_options_t options = small_group("second", rank.rank, 2);
    configure(low, &options);
    rank.joined = outcome_of(expertd_group_join(rank.session.get(), &options, &low_groups[rank.rank]));
  });
  ASSERT_TRUE(first.ok()) << first.failure();
  for (int round = 0; round < 10; ++round) {
    first.run([&](Rank& rank) { rank.group = high_groups[rank.rank]; });
    ASSERT_EQ(run_high_throughput(&first, high, Place::kRegistered), "");
    first.run([&](Rank& rank) { rank.group = low_groups[rank.rank]; });
    ASSERT_EQ(run_low_latency(&first, low, Place::kWindow), "");
  }
}

TEST_F(Stream, SynchronizeWaitsForEverythingAndFillsWhatWasCopied) {
  const ClientSession session(daemon_.attach_socket(), "host:0");
  const std::vector<int64_t> ids = {0, 1, 2, 3};
  std::vector<std::vector<int32_t>> counts(100, std::vector<int32_t>(4, -1));
  for (std::vector<int32_t>& experts : counts) {
    expertd_layout_args_t args = EXPERTD_INIT(expertd_layout_args_t);
    args.topk_idx = ids.data();
    args.idx_type = EXPERTD_I64;
    args.tokens = 2;
    args.top_k = 2;
    args.num_experts = 4;
    args.num_ranks = 2;
    args.tokens_per_expert = experts.data();
    expertd_event_t event{};
    ASSERT_TRUE(outcome_of(expertd_layout(session.get(), &args, nullptr, &event)).ok()) << expertd_last_message();
  }
  ASSERT_TRUE(outcome_of(expertd_stream_synchronize(session.get(), nullptr, 0)).ok());
  EXPECT_EQ(counts, std::vector<std::vector<int32_t>>(100, std::vector<int32_t>(4, 1)));
}

TEST_F(Stream, ABufferInUseIsReleasedOnlyAfterwards) {
  RankGroup group(daemon_.attach_socket(), "busy", 2);
  ASSERT_TRUE(group.ok()) << group.failure();
  std::atomic<bool> released{false};
  group.run([&](Rank& rank) {
    std::vector<uint16_t> received(32 * 128);
    auto* x = rank.session.alloc<uint16_t>(16 * 128);
    const std::vector<int64_t> ids(16 * 2, 1);
    expertd_dispatch_args_t args = EXPERTD_INIT(expertd_dispatch_args_t);
    args.x = x;
    args.dtype = EXPERTD_BF16;
    args.topk_idx = ids.data();
    args.idx_type = EXPERTD_I64;
    args.tokens = 16;
    args.capacity_rows = 32;
    args.recv_x = received.data();
    expertd_handle_t handle{};
    expertd_event_t event{};
    if (rank.rank == 1) {  // rank 0's release must still be waiting when this one comes
      EXPECT_FALSE(wait_until([&] { return released.load(); }, std::chrono::milliseconds(300)));
    }
    ASSERT_TRUE(outcome_of(expertd_dispatch(rank.group, &args, nullptr, &handle, &event)).ok());
    if (rank.rank == 0) {
      EXPECT_TRUE(outcome_of(expertd_free(rank.session.get(), x)).ok()) << expertd_last_message();
      released = true;
    }
    EXPECT_TRUE(finish(event).outcome.ok());
  });
}

TEST_F(Stream, RanksInProcessesOfTheirOwn) {
  FaultClient clients[3];
  for (uint32_t rank = 0; rank < 3; ++rank) {
    ASSERT_TRUE(clients[rank].attach(daemon_.attach_socket(), rank));
    clients[rank].send("join processes " + std::to_string(rank) + " 3");
  }
  for (FaultClient& client : clients) {
    ASSERT_TRUE(is_ok(client.answer().value_or("")));
    client.send("rounds 300");
  }
  for (FaultClient& client : clients) {
    const std::string end = client.answer().value_or("nothing");
    EXPECT_EQ(number_in(end, "rounds"), 300) << end;
  }
}

}  // namespace
}  // namespace expertd::support
