// SPDX-License-Identifier: Apache-2.0
// One group for decode and prefill: both kinds of operations in any order, and dynamic groups, whose operations give a
// bound for the tokens of all ranks. EXPERTD_TEST_SEED moves the order.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <string>

#include "tests/integration/moe_case.h"
#include "tests/support/daemon_process.h"

namespace expertd::support {
namespace {

using kernels::OpKind;

constexpr uint32_t kMaxTokens = 48;

class Dynamic : public ::testing::Test {
 protected:
  void SetUp() override { ASSERT_TRUE(daemon_.start()); }
  static uint64_t seed() {
    const char* text = std::getenv("EXPERTD_TEST_SEED");
    return text == nullptr ? 1 : std::strtoull(text, nullptr, 10);
  }
  static RandomCase random_round(OpKind kind, Random* random, bool bounded) {
    Wish wish;
    wish.seed = random->next();
    wish.max_tokens = kMaxTokens;
    wish.tokens = random->between(3, kMaxTokens);
    wish.token_bound = bounded ? random->between(wish.tokens, kMaxTokens) : 0;
    return make_case(kind, wish);
  }
  static void shape_options(expertd_group_options_t* options) {
    Wish wish;
    wish.max_tokens = kMaxTokens;
    configure(make_case(OpKind::kDispatch, wish), options);
    options->mode = EXPERTD_MODE_AUTO;
  }
  static RankGroup::Configure dynamic(expertd_output_format_t format, uint32_t ll_tokens) {
    return [=](expertd_group_options_t* options) {
      shape_options(options);
      options->output_format = static_cast<uint32_t>(format);
      options->dynamic_ll_tokens = ll_tokens;
    };
  }
  DaemonProcess daemon_{2};
};

TEST_F(Dynamic, OneGroupRunsBothKindsInAnyOrderWithoutJoiningAnew) {
  SCOPED_TRACE("EXPERTD_TEST_SEED=" + std::to_string(seed()));
  RankGroup group(daemon_.attach_socket(), "both", 2, shape_options);
  ASSERT_TRUE(group.ok()) << group.failure();
  Random random(seed());
  for (int round = 0; round < 24; ++round) {
    const bool low_latency = random.chance(50);
    const RandomCase next =
        random_round(low_latency ? OpKind::kLlDispatch : OpKind::kDispatch, &random, random.chance(50));
    const std::string found = low_latency ? run_low_latency(&group, next, Place::kWindow)
                                          : run_high_throughput(&group, next, Place::kRegistered);
    ASSERT_EQ(found, "") << "round " << round << ", low latency " << low_latency;
  }
}

TEST_F(Dynamic, OneCallServesDecodeAndPrefillInEitherFormat) {
  SCOPED_TRACE("EXPERTD_TEST_SEED=" + std::to_string(seed()));
  for (const expertd_output_format_t format : {EXPERTD_FORMAT_LL, EXPERTD_FORMAT_HT}) {
    const bool low_latency = format == EXPERTD_FORMAT_LL;
    RankGroup group(daemon_.attach_socket(), "dynamic", 2, dynamic(format, 16));
    ASSERT_TRUE(group.ok()) << group.failure();
    Random random(seed() + static_cast<uint64_t>(format));
    for (int round = 0; round < 12; ++round) {
      const RandomCase next = random_round(low_latency ? OpKind::kLlDispatch : OpKind::kDispatch, &random, true);
      const std::string found = low_latency ? run_low_latency(&group, next, Place::kWindow)
                                            : run_high_throughput(&group, next, Place::kRegistered);
      ASSERT_EQ(found, "") << "format " << format << ", round " << round << ", bound " << next.token_bound;
    }
  }
}

Outcome dispatch_nothing(Rank& rank, uint32_t bound, uint32_t tokens = 0) {
  expertd_dispatch_args_t args = EXPERTD_INIT(expertd_dispatch_args_t);
  args.dtype = EXPERTD_BF16;
  args.idx_type = EXPERTD_I64;
  args.tokens = tokens;
  args.token_bound = bound;
  expertd_handle_t handle{};
  expertd_event_t event{};
  const Outcome issued = outcome_of(expertd_dispatch(rank.group, &args, nullptr, &handle, &event));
  return issued.ok() ? finish(event).outcome : issued;
}

Outcome ll_dispatch_nothing(Rank& rank, uint32_t bound) {
  expertd_ll_dispatch_args_t args = EXPERTD_INIT(expertd_ll_dispatch_args_t);
  args.dtype = EXPERTD_BF16;
  args.idx_type = EXPERTD_I64;
  args.token_bound = bound;
  expertd_handle_t handle{};
  expertd_event_t event{};
  const Outcome issued = outcome_of(expertd_ll_dispatch(rank.group, &args, nullptr, &handle, &event));
  return issued.ok() ? finish(event).outcome : issued;
}

TEST_F(Dynamic, UnequalBoundsEndTheOperationOnAllRanksByName) {
  RankGroup group(daemon_.attach_socket(), "unequal", 2, dynamic(EXPERTD_FORMAT_HT, 16));
  ASSERT_TRUE(group.ok()) << group.failure();
  group.run([](Rank& rank) {
    const Outcome end = dispatch_nothing(rank, rank.rank == 0 ? 16 : 32);
    EXPECT_EQ(end.status.reason, EXPERTD_REASON_OP_MISMATCH) << describe(end);
    EXPECT_NE(end.message.find("token_bound = 32, allowed 16..16 (rank 1)"), std::string::npos) << end.message;
    const Outcome next = barrier(rank.group).outcome;
    EXPECT_TRUE(next.ok()) << describe(next);
  });
}

TEST_F(Dynamic, ABoundOutOfRangeIsRefusedByName) {
  RankGroup group(daemon_.attach_socket(), "range", 1, dynamic(EXPERTD_FORMAT_HT, 16));
  ASSERT_TRUE(group.ok()) << group.failure();
  const Outcome missing = dispatch_nothing(group.rank(0), 0);
  EXPECT_EQ(missing.message, "ARGUMENT_RANGE: token_bound = 0, allowed 1..48");
  const Outcome large = dispatch_nothing(group.rank(0), kMaxTokens + 1);
  EXPECT_EQ(large.message, "ARGUMENT_RANGE: token_bound = 49, allowed 1..48");
  const Outcome small = dispatch_nothing(group.rank(0), 7, 8);
  EXPECT_EQ(small.message, "ARGUMENT_RANGE: token_bound = 7, allowed 8..48");
}

TEST_F(Dynamic, CallsOfTheOtherFormatAreRefused) {
  RankGroup rows(daemon_.attach_socket(), "rows", 1, dynamic(EXPERTD_FORMAT_HT, 16));
  ASSERT_TRUE(rows.ok()) << rows.failure();
  EXPECT_EQ(ll_dispatch_nothing(rows.rank(0), 16).status.reason, EXPERTD_REASON_MODE_MISMATCH);
  RankGroup packed(daemon_.attach_socket(), "packed", 1, dynamic(EXPERTD_FORMAT_LL, 16));
  ASSERT_TRUE(packed.ok()) << packed.failure();
  EXPECT_EQ(dispatch_nothing(packed.rank(0), 16).status.reason, EXPERTD_REASON_MODE_MISMATCH);
}

TEST_F(Dynamic, OptionsThatDoNotFitAreRefusedByName) {
  const auto refused = [&](const RankGroup::Configure& configure) {
    const RankGroup group(daemon_.attach_socket(), "wrong", 1, configure);
    return group.failure();
  };
  EXPECT_THAT(refused([](expertd_group_options_t* options) { options->output_format = 3; }),
              ::testing::HasSubstr("output_format = 3, allowed 0..2"));
  EXPECT_THAT(refused([](expertd_group_options_t* options) { options->dynamic_ll_tokens = 5; }),
              ::testing::HasSubstr("dynamic_ll_tokens without output_format = 5"));
  EXPECT_THAT(refused([](expertd_group_options_t* options) {
                options->mode = EXPERTD_MODE_NORMAL;
                options->output_format = EXPERTD_FORMAT_LL;
              }),
              ::testing::HasSubstr("mode = 1, allowed 0, 3 or 2 with output_format = 1"));
  EXPECT_THAT(refused([](expertd_group_options_t* options) {
                options->output_format = EXPERTD_FORMAT_HT;
                options->dynamic_ll_tokens = options->max_tokens + 1;
              }),
              ::testing::HasSubstr("dynamic_ll_tokens"));
}

}  // namespace
}  // namespace expertd::support
