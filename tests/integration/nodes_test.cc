// SPDX-License-Identifier: Apache-2.0
// Operations of groups over several real daemons, over tcp: every form that matters by name, then random cases with
// ranks at random daemons. Dispatches are what one node makes of them bit for bit, combines within their bound.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>

#include "tests/integration/moe_case.h"
#include "tests/support/daemon_cluster.h"

namespace expertd::support {
namespace {

using kernels::OpKind;
using kernels::Payload;
using kernels::ScaleForm;

constexpr uint32_t kDevices = 8;

struct Layout {
  uint32_t nodes = 0;
  uint32_t ranks = 0;  // of each node
};

struct Form {
  const char* name;
  OpKind kind;
  Wish wish;
  Place place = Place::kRegistered;
};

const Form kForms[] = {
    {"bf16", OpKind::kDispatch, {}},
    {"bf16 through the library's copies", OpKind::kDispatch, {}, Place::kStaged},
    {"many tokens and channels", OpKind::kDispatch, {.hidden = 1024, .tokens = 300}},
    {"bytes with a side tensor", OpKind::kDispatch, {.payload = Payload::kBytes}},
    {"expanded", OpKind::kDispatch, {.top_k = 2, .expanded = true, .alignment = 8}},
    {"worst tokens", OpKind::kDispatch, {.worst_tokens = true}},
    {"by mask", OpKind::kDispatch, {.mask = true}},
    {"biases", OpKind::kDispatch, {.biases = true}},
    {"order of the last lane", OpKind::kDispatch, {.last_lane = true}},
    {"without weights", OpKind::kDispatch, {.weights = false}},
    {"foreign weights kept", OpKind::kDispatch, {.keep_foreign_weights = true}},
    {"narrow ids", OpKind::kDispatch, {.narrow_ids = true}},
    {"a rank without tokens", OpKind::kDispatch, {.empty_rank = 1}},
    {"nobody has tokens", OpKind::kDispatch, {.empty_rank = -2}},
    {"LL bf16", OpKind::kLlDispatch, {}},
    {"LL fp8", OpKind::kLlDispatch, {.hidden = 512, .payload = Payload::kFp8}},
    {"LL fp8 with rounded scales",
     OpKind::kLlDispatch,
     {.hidden = 512, .payload = Payload::kFp8, .scale = ScaleForm::kRounded}},
    {"LL fp8 with packed exponents",
     OpKind::kLlDispatch,
     {.hidden = 512, .payload = Payload::kFp8, .scale = ScaleForm::kUe8m0}},
    {"LL bytes", OpKind::kLlDispatch, {.payload = Payload::kBytes}},
    {"LL through the library's copies", OpKind::kLlDispatch, {.hidden = 256}, Place::kStaged},
    {"LL in the window", OpKind::kLlDispatch, {.hidden = 256}, Place::kWindow},
    {"LL fp8 in the window", OpKind::kLlDispatch, {.hidden = 512, .payload = Payload::kFp8}, Place::kWindow},
    {"LL with a rank without tokens", OpKind::kLlDispatch, {.empty_rank = 0}},
};

class Nodes : public ::testing::TestWithParam<Layout> {
 protected:
  void SetUp() override { ASSERT_TRUE(cluster_.start()); }

  void run_forms(OpKind kind) {
    const uint64_t begin = monotonic_ns();
    uint32_t count = 0;
    for (const Form& form : kForms) {
      if (form.kind == kind) {
        Wish wish = form.wish;
        wish.ranks = GetParam().nodes * GetParam().ranks;
        EXPECT_EQ(run_case(cluster_.seats(GetParam().ranks), make_case(kind, wish), form.place), "") << form.name;
        ++count;
      }
    }
    std::printf("%u forms on %u daemons: %.0f ms\n", count, GetParam().nodes, elapsed_ms(begin));
  }

  /// The ranks of a random case, each at a random daemon.
  std::vector<Seat> scattered(uint32_t ranks, uint64_t seed) {
    Random random(seed);
    std::vector<uint32_t> taken(cluster_.nodes());
    std::vector<Seat> seats;
    while (seats.size() < ranks) {
      const auto node = random.between(0, cluster_.nodes() - 1);
      if (taken[node] < kDevices) {
        seats.push_back({cluster_.node(node).attach_socket(), "host:" + std::to_string(taken[node]++)});
      }
    }
    return seats;
  }

  void run_random(OpKind kind, uint32_t cases);

  DaemonCluster cluster_{GetParam().nodes, kDevices, {"--engine-op-deadline=20s"}};
};

INSTANTIATE_TEST_SUITE_P(Of, Nodes, ::testing::Values(Layout{2, 1}, Layout{2, 2}, Layout{4, 2}), [](const auto& of) {
  return std::to_string(of.param.nodes) + "x" + std::to_string(of.param.ranks);
});

TEST_P(Nodes, HighThroughputInEveryForm) {
  run_forms(OpKind::kDispatch);
}
TEST_P(Nodes, LowLatencyInEveryForm) {
  run_forms(OpKind::kLlDispatch);
}

TEST_P(Nodes, LowLatencyRoundsFollowEachOther) {
  const uint32_t ranks = GetParam().nodes * GetParam().ranks;
  const RandomCase random_case = make_case(OpKind::kLlDispatch, {.ranks = ranks, .hidden = 256});
  RankGroup group(cluster_.seats(GetParam().ranks), "rounds",
                  [&](expertd_group_options_t* options) { configure(random_case, options); });
  ASSERT_TRUE(group.ok()) << group.failure();
  EXPECT_EQ(run_low_latency(&group, random_case, Place::kWindow, 10), "");
}

class NodesAtRandom : public Nodes {};
INSTANTIATE_TEST_SUITE_P(Of, NodesAtRandom, ::testing::Values(Layout{2, 0}, Layout{4, 0}),
                         [](const auto& of) { return std::to_string(of.param.nodes) + "Daemons"; });

void Nodes::run_random(OpKind kind, uint32_t cases) {
  uint32_t number = 0;
  for (const uint64_t seed : seeds_to_run(cases)) {
    RandomCase random_case = make_random_case(seed, kind);
    const uint32_t ranks = random_case.shape.ranks;
    const bool only_masks = std::any_of(random_case.inputs.begin(), random_case.inputs.end(),
                                        [](const RankInput& in) { return in.tokens > 0 && in.topk_idx.empty(); });
    if (only_masks || ranks < 2 || ranks > 16) {
      continue;  // the interface carries ids always
    }
    random_case.shape.active_ranks = base::RankSet::first(ranks);
    random_case.later_active = random_case.shape.active_ranks;
    const auto dispatched = reference_dispatch(random_case.shape, random_case.inputs);
    for (uint32_t rank = 0; rank < ranks && kind == OpKind::kDispatch; ++rank) {
      random_case.capacities[rank] = static_cast<uint32_t>(dispatched[rank].rows.size());
    }
    const bool in_window = kind == OpKind::kLlDispatch && random_case.shape.payload != Payload::kBytes;
    const Place places[] = {Place::kRegistered, Place::kStaged, in_window ? Place::kWindow : Place::kRegistered};
    if (kind == OpKind::kLlDispatch) {
      random_case.side_layout = 0;
    }
    ASSERT_EQ(run_case(scattered(ranks, seed), random_case, places[number++ % 3]), "") << repro_line(random_case);
  }
  std::printf("%u random cases on %u daemons\n", number, cluster_.nodes());
}

TEST_P(NodesAtRandom, HighThroughputCases) {
  run_random(OpKind::kDispatch, 30);
}
TEST_P(NodesAtRandom, LowLatencyCases) {
  run_random(OpKind::kLlDispatch, 30);
}

}  // namespace
}  // namespace expertd::support
