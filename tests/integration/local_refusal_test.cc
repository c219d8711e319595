// SPDX-License-Identifier: Apache-2.0
// Goal: an operation that the client library of one rank refuses ends at once on its peers, and the ranks stay in step.
// Method: groups of two and three ranks on a real daemon, with deadlines far beyond what is waited for.
#include <gtest/gtest.h>

#include <iterator>
#include <string>
#include <vector>

#include "tests/integration/moe_case.h"
#include "tests/integration/raw_rpc.h"
#include "tests/support/daemon_process.h"
#include "tests/support/temp_dir.h"

namespace expertd::support {
namespace {

constexpr double kAtOnceMs = 100;
constexpr uint32_t kUnknownFlag = 1u << 30;

/// Issues an operation, wrongly when asked to; the status is the call's own.
using Issue = expertd_status_t (*)(expertd_group_t* group, bool wrong, expertd_event_t* event);

expertd_status_t issue_barrier(expertd_group_t* group, bool wrong, expertd_event_t* event) {
  return expertd_barrier(group, nullptr, wrong ? kUnknownFlag : uint32_t{EXPERTD_ASYNC}, 0, event);
}

// Nothing is read or written by a rank that has no tokens and expects no rows.
expertd_status_t issue_dispatch(expertd_group_t* group, bool wrong, expertd_event_t* event) {
  expertd_dispatch_args_t args = EXPERTD_INIT(expertd_dispatch_args_t);
  args.dtype = wrong ? EXPERTD_F32 : EXPERTD_BF16;
  args.idx_type = EXPERTD_I64;
  args.flags = EXPERTD_ASYNC;
  expertd_handle_t handle{};
  const expertd_status_t status = expertd_dispatch(group, &args, nullptr, &handle, event);
  if (status.reason == 0) {
    EXPECT_EQ(expertd_handle_free(group, handle).reason, 0);
  } else {
    EXPECT_EQ(handle.generation, 0u);
  }
  return status;
}

expertd_status_t issue_ll_dispatch(expertd_group_t* group, bool wrong, expertd_event_t* event) {
  expertd_ll_dispatch_args_t args = EXPERTD_INIT(expertd_ll_dispatch_args_t);
  args.dtype = wrong ? EXPERTD_BYTES : EXPERTD_BF16;
  args.row_bytes = 1u << 20;  // of BYTES: more than a row of the window
  args.idx_type = EXPERTD_I64;
  args.flags = EXPERTD_ASYNC;
  expertd_handle_t handle{};
  return expertd_ll_dispatch(group, &args, nullptr, &handle, event);
}

// A handle that was never given out is refused by the library, one that another operation left by the daemon.
expertd_status_t issue_combine(expertd_group_t* group, bool wrong, expertd_event_t* event) {
  expertd_combine_args_t args = EXPERTD_INIT(expertd_combine_args_t);
  args.flags = EXPERTD_ASYNC;
  args.handle = {400, 1};
  return wrong ? expertd_combine(group, &args, nullptr, event) : issue_barrier(group, false, event);
}

expertd_status_t issue_ll_combine(expertd_group_t* group, bool wrong, expertd_event_t* event) {
  expertd_ll_combine_args_t args = EXPERTD_INIT(expertd_ll_combine_args_t);
  args.idx_type = EXPERTD_I64;
  args.handle = {400, 1};
  return wrong ? expertd_ll_combine(group, &args, nullptr, event) : issue_barrier(group, false, event);
}

expertd_status_t issue_without_event(expertd_group_t* group, bool wrong, expertd_event_t* event) {
  return issue_barrier(group, false, wrong ? nullptr : event);
}

struct Form {
  const char* name;
  Issue issue;
  int32_t reason;
};
constexpr Form kForms[] = {
    {"barrier", issue_barrier, EXPERTD_REASON_ARGUMENT_RANGE},
    {"dispatch", issue_dispatch, EXPERTD_REASON_WRONG_DTYPE},
    {"ll_dispatch", issue_ll_dispatch, EXPERTD_REASON_ARGUMENT_RANGE},
    {"combine", issue_combine, EXPERTD_REASON_STALE_HANDLE},
    {"ll_combine", issue_ll_combine, EXPERTD_REASON_STALE_HANDLE},
    {"no_event", issue_without_event, EXPERTD_REASON_MISSING_ARGUMENT},
};

void expect_peer_rejected(const OpEnd& end, int32_t rank, int32_t reason) {
  EXPECT_EQ(end.outcome.status.reason, EXPERTD_REASON_PEER_REJECTED) << describe(end.outcome);
  EXPECT_EQ(end.result.rank, rank);
  const std::string sentence = "PEER_REJECTED: rank " + std::to_string(rank) +
                               "'s part of the operation was refused with " + expertd_reason_name(reason);
  EXPECT_EQ(end.outcome.message, sentence);
  EXPECT_LT(end.wait_ms, bound_ms(kAtOnceMs));
}

/// A group of the case's shape that runs all operations.
void configure_for_both(const RandomCase& random_case, expertd_group_options_t* options) {
  configure(random_case, options);
  options->mode = EXPERTD_MODE_AUTO;
}

/// One daemon with the deadlines of the defaults.
class LocalRefusal : public ::testing::Test {
 protected:
  void SetUp() override { ASSERT_TRUE(daemon_.start()); }
  DaemonProcess daemon_{3};
};

TEST_F(LocalRefusal, OfEveryOperationEndsThePeersAtOnceNamingRankAndReason) {
  const RandomCase high_throughput = make_case(kernels::OpKind::kDispatch, {.ranks = 3});
  const RandomCase low_latency = make_case(kernels::OpKind::kLlDispatch, {.ranks = 3});
  RankGroup group(daemon_.attach_socket(), "refusal", 3,
                  [&](expertd_group_options_t* options) { configure_for_both(high_throughput, options); });
  ASSERT_TRUE(group.ok()) << group.failure();
  uint32_t wrong = 0;
  for (const Form& form : kForms) {
    SCOPED_TRACE(form.name);
    wrong = (wrong + 1) % 3;
    group.run([&](Rank& rank) {
      ASSERT_TRUE(barrier(rank.group).outcome.ok()) << "all start together";
      expertd_event_t event{};
      const Outcome outcome = outcome_of(form.issue(rank.group, rank.rank == wrong, &event));
      if (rank.rank == wrong) {
        EXPECT_EQ(outcome.status.reason, form.reason) << describe(outcome);
        EXPECT_EQ(event.session, nullptr);
      } else {
        ASSERT_TRUE(outcome.ok()) << describe(outcome);
        EXPECT_EQ(expertd_event_stream_wait(event, nullptr).reason, 0);
        expect_peer_rejected(finish(event), static_cast<int32_t>(wrong), form.reason);
      }
      EXPECT_TRUE(barrier(rank.group).outcome.ok()) << "the next operation is the same one on every rank";
    });
  }
  EXPECT_EQ(run_high_throughput(&group, high_throughput, Place::kRegistered), "");
  EXPECT_EQ(run_low_latency(&group, low_latency, Place::kWindow, 3), "");
  EXPECT_TRUE(daemon_.metric_becomes("expertd_op_rejected_total{gpu=\"host\",reason=\"WRONG_DTYPE\"}", 1));
  EXPECT_TRUE(daemon_.metric_becomes("expertd_op_rejected_total{gpu=\"host\",reason=\"STALE_HANDLE\"}", 2));
}

TEST_F(LocalRefusal, OfATensorThatDoesNotFitItsBuffer) {
  const RandomCase next = make_case(kernels::OpKind::kDispatch, {.ranks = 2});
  RankGroup group(daemon_.attach_socket(), "tensor", 2,
                  [&](expertd_group_options_t* options) { configure_for_both(next, options); });
  ASSERT_TRUE(group.ok()) << group.failure();
  group.run([&](Rank& rank) {
    const uint32_t tokens = next.shape.max_tokens;
    const uint64_t bytes = uint64_t{tokens} * next.shape.hidden * 2;
    std::vector<int64_t> ids(uint64_t{tokens} * next.shape.top_k, 0);
    char* memory = rank.session.alloc<char>(bytes * 4);
    ASSERT_NE(memory, nullptr);
    ASSERT_TRUE(barrier(rank.group).outcome.ok());
    expertd_dispatch_args_t args = EXPERTD_INIT(expertd_dispatch_args_t);
    args.x = rank.rank == 1 ? memory + bytes * 4 - 256 : memory;
    args.dtype = EXPERTD_BF16;
    args.topk_idx = ids.data();
    args.idx_type = EXPERTD_I64;
    args.tokens = tokens;
    args.capacity_rows = 2 * tokens;
    args.recv_x = memory + bytes;
    expertd_handle_t handle{};
    expertd_event_t event{};
    const Outcome outcome = outcome_of(expertd_dispatch(rank.group, &args, nullptr, &handle, &event));
    if (rank.rank == 1) {
      EXPECT_EQ(outcome.status.reason, EXPERTD_REASON_OUT_OF_BOUNDS) << describe(outcome);
      EXPECT_NE(outcome.message.find("x = "), std::string::npos) << outcome.message;
      return;
    }
    ASSERT_TRUE(outcome.ok()) << describe(outcome);
    expect_peer_rejected(finish(event), 1, EXPERTD_REASON_OUT_OF_BOUNDS);
  });
  EXPECT_EQ(run_high_throughput(&group, next, Place::kStaged), "");
}

/// Which rank of two refuses operation `number`: none, either, or both.
uint32_t wrong_ranks(uint32_t number) {
  Random random(number + 1);
  return random.below(3) == 0 ? random.between(1, 3) : 0;
}

TEST_F(LocalRefusal, AmongManyInFlightEndsOnlyItsOwnOperation) {
  constexpr uint32_t kOperations = 400;  // several times around the ring
  const RandomCase next = make_case(kernels::OpKind::kDispatch, {.ranks = 2});
  RankGroup group(daemon_.attach_socket(), "flight", 2,
                  [&](expertd_group_options_t* options) { configure_for_both(next, options); });
  ASSERT_TRUE(group.ok()) << group.failure();
  group.run([](Rank& rank) {
    std::vector<expertd_event_t> events(kOperations);
    for (uint32_t i = 0; i < kOperations; ++i) {
      const bool wrong = (wrong_ranks(i) >> rank.rank & 1) != 0;
      const Form& form = kForms[i % std::size(kForms)];
      const Outcome outcome = outcome_of(form.issue(rank.group, wrong, &events[i]));
      ASSERT_EQ(outcome.status.reason, wrong ? form.reason : 0) << i << " " << describe(outcome);
    }
    for (uint32_t i = 0; i < kOperations; ++i) {
      SCOPED_TRACE("operation " + std::to_string(i) + " of rank " + std::to_string(rank.rank));
      const uint32_t other = 1 - rank.rank;
      if ((wrong_ranks(i) >> rank.rank & 1) != 0) {
        EXPECT_EQ(events[i].session, nullptr);
      } else if ((wrong_ranks(i) >> other & 1) != 0) {
        expect_peer_rejected(finish(events[i]), static_cast<int32_t>(other), kForms[i % std::size(kForms)].reason);
      } else {
        const OpEnd end = finish(events[i]);
        EXPECT_TRUE(end.outcome.ok()) << describe(end.outcome);
      }
    }
  });
  EXPECT_EQ(run_high_throughput(&group, next, Place::kRegistered), "");
}

TEST_F(LocalRefusal, HoldsNothingBackThatDoesNotNeedThePeers) {
  RankGroup group(daemon_.attach_socket(), "layout", 2);
  ASSERT_TRUE(group.ok()) << group.failure();
  expertd_event_t event{};
  ASSERT_EQ(issue_barrier(group.rank(0).group, true, &event).reason, EXPERTD_REASON_ARGUMENT_RANGE);
  const std::vector<int64_t> ids(8, 1);
  std::vector<int32_t> per_expert(4, -1);
  expertd_layout_args_t args = EXPERTD_INIT(expertd_layout_args_t);
  args.topk_idx = ids.data();
  args.idx_type = EXPERTD_I64;
  args.tokens = 4;
  args.top_k = 2;
  args.num_experts = 4;
  args.num_ranks = 2;
  args.tokens_per_expert = per_expert.data();
  ASSERT_EQ(expertd_layout(group.rank(0).session.get(), &args, nullptr, &event).reason, 0);
  const OpEnd end = finish(event);
  EXPECT_TRUE(end.outcome.ok()) << describe(end.outcome);
  EXPECT_EQ(per_expert[1], 8);
  expect_peer_rejected(barrier(group.rank(1).group), 0, EXPERTD_REASON_ARGUMENT_RANGE);
}

TEST_F(LocalRefusal, ThatThePeersNeverIssueEndsAtItsOwnDeadline) {
  constexpr uint64_t kShortNs = 50'000'000;
  RankGroup group(daemon_.attach_socket(), "alone", 2);
  ASSERT_TRUE(group.ok()) << group.failure();
  expertd_event_t event{};
  ASSERT_EQ(expertd_barrier(group.rank(0).group, nullptr, kUnknownFlag, kShortNs, &event).reason,
            EXPERTD_REASON_ARGUMENT_RANGE);
  EXPECT_EQ(barrier(group.rank(0).group, kShortNs).outcome.status.reason, EXPERTD_REASON_TIMEOUT);
  for (int i = 0; i < 2; ++i) {
    const OpEnd late = barrier(group.rank(1).group);
    EXPECT_EQ(late.outcome.status.reason, EXPERTD_REASON_TIMEOUT) << describe(late.outcome);
    EXPECT_EQ(late.result.rank, 1) << "it was the one that was waited for";
  }
  group.run([](Rank& rank) { EXPECT_TRUE(barrier(rank.group).outcome.ok()); });
}

/// Descriptors that no library writes, from a client alone in its group.
TEST_F(LocalRefusal, ClaimsNoReasonThatIsNone) {
  RawClient client;
  ASSERT_TRUE(client.attach(daemon_.attach_socket(), "host:0"));
  RawRpc rpc(&client);
  ASSERT_TRUE(rpc.open("raw").ok);
  v1::JoinGroupResponse joined;
  ASSERT_TRUE(rpc.join(lone_group("raw"), &joined).ok);
  expertd_slot slot{};
  slot.op = EXPERTD_OP_DISPATCH;
  slot.flags = EXPERTD_SLOT_REFUSED;
  slot.group = joined.group_id();
  for (const uint32_t reason : {0u, 9u, 1000u, UINT32_MAX}) {
    slot.refused_reason = reason;
    const auto completion = client.wait(client.submit(slot));
    ASSERT_TRUE(completion.has_value());
    EXPECT_EQ(completion->reason, static_cast<uint32_t>(EXPERTD_REASON_DESCRIPTOR_MALFORMED));
    EXPECT_EQ(completion->argument, static_cast<uint32_t>(EXPERTD_ARGUMENT_REFUSED_REASON));
    EXPECT_EQ(completion->value, reason);
  }
  slot.refused_reason = EXPERTD_REASON_UNALIGNED;
  slot.refused_argument = EXPERTD_ARGUMENT_OUT_X;
  slot.refused_value = -8;
  const auto told = client.wait(client.submit(slot));
  ASSERT_TRUE(told.has_value());
  EXPECT_EQ(told->reason, static_cast<uint32_t>(EXPERTD_REASON_UNALIGNED));
  EXPECT_EQ(told->argument, static_cast<uint32_t>(EXPERTD_ARGUMENT_OUT_X));
  EXPECT_EQ(told->value, -8);
  EXPECT_EQ(told->group_op, 5u) << "each of them counted";
  expertd_slot next{};
  next.op = EXPERTD_OP_BARRIER;
  next.group = joined.group_id();
  const auto done = client.wait(client.submit(next));
  ASSERT_TRUE(done.has_value());
  EXPECT_EQ(done->reason, 0u);
  EXPECT_EQ(done->group_op, 6u);
}

}  // namespace
}  // namespace expertd::support
