// SPDX-License-Identifier: Apache-2.0
// Goal: a group carries what it was joined to carry, in a window of that size, and nothing else; the ranks stay in step
// over what it refuses. Method: two ranks on a real daemon.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>

#include "tests/integration/moe_case.h"
#include "tests/support/daemon_process.h"

namespace expertd::support {
namespace {

using kernels::OpKind;
using kernels::Payload;

class Dtypes : public ::testing::Test {
 protected:
  void SetUp() override { ASSERT_TRUE(daemon_.start()); }
  nlohmann::json group_status() {
    const RunResult result =
        run_program("expertctl", {"status", "--socket", daemon_.control_socket(), "--json"}, std::chrono::seconds(60));
    return nlohmann::json::parse(result.output, nullptr, false)["groups"][0];
  }
  DaemonProcess daemon_{2};
};

struct Carried {
  const char* name;
  uint32_t dtypes;
  Payload payload;
};

class DtypesCarried : public Dtypes, public ::testing::WithParamInterface<Carried> {};

TEST_P(DtypesCarried, RunThroughTheWindowOfTheGroup) {
  Wish wish;
  wish.payload = GetParam().payload;
  wish.hidden = 512;  // the side of byte rows fits where scales do
  const RandomCase next = make_case(OpKind::kLlDispatch, wish);
  RankGroup group(daemon_.attach_socket(), "carried", 2, [&](expertd_group_options_t* options) {
    configure(next, options);
    options->dispatch_dtypes = GetParam().dtypes;
  });
  ASSERT_TRUE(group.ok()) << group.failure();
  EXPECT_EQ(run_low_latency(&group, next, Place::kWindow, 3), "");
  EXPECT_EQ(run_low_latency(&group, next, Place::kRegistered), "");
  EXPECT_EQ(run_low_latency(&group, next, Place::kStaged), "");
}

INSTANTIATE_TEST_SUITE_P(
    Sets, DtypesCarried,
    ::testing::Values(Carried{"bf16", EXPERTD_DISPATCH_BF16, Payload::kBf16},
                      Carried{"fp8", EXPERTD_DISPATCH_FP8, Payload::kFp8},
                      Carried{"bytes", EXPERTD_DISPATCH_BYTES, Payload::kBytes},
                      Carried{"bf16_of_two", EXPERTD_DISPATCH_BF16 | EXPERTD_DISPATCH_FP8, Payload::kBf16},
                      Carried{"fp8_of_two", EXPERTD_DISPATCH_BF16 | EXPERTD_DISPATCH_FP8, Payload::kFp8}),
    [](const auto& test) { return std::string(test.param.name); });

TEST_F(Dtypes, SetTheSizeOfTheWindow) {
  const ClientSession session(daemon_.attach_socket(), "host:0");
  expertd_group_options_t options = small_group("sizes", 0, 2);
  options.hidden = 7168;
  const auto window_bytes = [&](uint32_t dtypes) {
    options.dispatch_dtypes = dtypes;
    expertd_group_plan_t plan = EXPERTD_INIT(expertd_group_plan_t);
    EXPECT_TRUE(outcome_of(expertd_group_plan(session.get(), &options, &plan)).ok()) << expertd_last_message();
    return plan.window_bytes;
  };
  const uint64_t any = window_bytes(0);
  EXPECT_LT(window_bytes(EXPERTD_DISPATCH_FP8), any * 4 / 5);
  EXPECT_LT(window_bytes(EXPERTD_DISPATCH_BF16), any);
  EXPECT_EQ(window_bytes(EXPERTD_DISPATCH_BYTES), any);
}

/// Issued by both ranks, of which one asks for what the group does not carry.
void expect_refused(RankGroup* group, uint32_t wrong, const std::string& sentence,
                    const std::function<expertd_status_t(Rank&, bool, expertd_event_t*)>& issue) {
  group->run([&](Rank& rank) {
    ASSERT_TRUE(barrier(rank.group).outcome.ok());
    expertd_event_t event{};
    const Outcome issued = outcome_of(issue(rank, rank.rank == wrong, &event));
    ASSERT_TRUE(issued.ok()) << describe(issued);
    const OpEnd end = finish(event);
    if (rank.rank == wrong) {
      EXPECT_EQ(end.outcome.status.reason, EXPERTD_REASON_WRONG_DTYPE) << describe(end.outcome);
      EXPECT_EQ(end.outcome.message, sentence);
    } else {
      EXPECT_EQ(end.outcome.status.reason, EXPERTD_REASON_PEER_REJECTED) << describe(end.outcome);
      EXPECT_NE(end.outcome.message.find("rank " + std::to_string(wrong)), std::string::npos) << end.outcome.message;
      EXPECT_NE(end.outcome.message.find("WRONG_DTYPE"), std::string::npos) << end.outcome.message;
    }
    EXPECT_TRUE(barrier(rank.group).outcome.ok()) << "it counted on both, so the next operation is the same one";
  });
}

TEST_F(Dtypes, RefuseADispatchOfAnotherOne) {
  RankGroup group(daemon_.attach_socket(), "plain", 2,
                  [](expertd_group_options_t* options) { options->dispatch_dtypes = EXPERTD_DISPATCH_BF16; });
  ASSERT_TRUE(group.ok()) << group.failure();
  const auto dispatch = [](Rank& rank, bool wrong, expertd_event_t* event) {
    expertd_dispatch_args_t args = EXPERTD_INIT(expertd_dispatch_args_t);
    args.dtype = wrong ? EXPERTD_BYTES : EXPERTD_BF16;
    args.row_bytes = 256;
    args.idx_type = EXPERTD_I64;
    expertd_handle_t handle{};
    return expertd_dispatch(rank.group, &args, nullptr, &handle, event);
  };
  expect_refused(&group, 1, "WRONG_DTYPE: dispatch dtype = bytes, allowed bf16 (dispatch_dtypes of the group)",
                 dispatch);
  const auto ll_dispatch = [](Rank& rank, bool wrong, expertd_event_t* event) {
    expertd_ll_dispatch_args_t args = EXPERTD_INIT(expertd_ll_dispatch_args_t);
    args.dtype = EXPERTD_BF16;
    args.idx_type = EXPERTD_I64;
    args.flags = wrong ? EXPERTD_USE_FP8 : 0;
    expertd_handle_t handle{};
    return expertd_ll_dispatch(rank.group, &args, nullptr, &handle, event);
  };
  expect_refused(&group, 0, "WRONG_DTYPE: dispatch dtype = fp8, allowed bf16 (dispatch_dtypes of the group)",
                 ll_dispatch);
  EXPECT_TRUE(daemon_.metric_becomes("expertd_op_rejected_total{gpu=\"host\",reason=\"WRONG_DTYPE\"}", 2));
}

TEST_F(Dtypes, AreShownToOperators) {
  RankGroup group(daemon_.attach_socket(), "shown", 2, [](expertd_group_options_t* options) {
    options->dispatch_dtypes = EXPERTD_DISPATCH_BYTES | EXPERTD_DISPATCH_FP8;
  });
  ASSERT_TRUE(group.ok()) << group.failure();
  EXPECT_EQ(group_status()["dispatch_dtypes"], nlohmann::json({"bytes", "fp8"}));
}

}  // namespace
}  // namespace expertd::support
