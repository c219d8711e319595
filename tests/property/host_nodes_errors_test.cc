// SPDX-License-Identifier: Apache-2.0
// Operations over several nodes that must not run, that lose messages, or that get messages which no honest node sends:
// all ranks end alike where they can, nothing is written where it does not belong, and the next operation runs.
#include <gtest/gtest.h>

#include <bit>
#include <cstdlib>

#include "proto/abi/expertd_reason.h"
#include "tests/support/nodes_case.h"

namespace expertd::support {
namespace {

using kernels::OpKind;
using kernels::OpReport;
using kernels::OpShape;
using nodes_case::active;
using nodes_case::describe;
using nodes_case::same_end;

constexpr uint32_t kErrorCases = 150;
constexpr uint32_t kTamperCases = 250;

OpKind kind_of(uint64_t seed) {
  return seed % 2 == 0 ? OpKind::kDispatch : OpKind::kLlDispatch;
}

/// The cases of these tests: all ranks take part.
std::vector<std::unique_ptr<NodesCase>> cases(uint32_t count) {
  std::vector<std::unique_ptr<NodesCase>> found;
  for (const uint64_t seed : seeds_to_run(count)) {
    auto run = std::make_unique<NodesCase>(seed, kind_of(seed));
    if (run->nodes != 0 && run->dispatch.shape.ranks <= 16) {
      found.push_back(std::move(run));
    }
  }
  return found;
}

uint32_t pick_active(Random* random, const OpShape& shape) {
  uint32_t rank = random->below(shape.ranks);
  while (!active(shape.active_ranks, rank)) {
    rank = (rank + 1) % shape.ranks;
  }
  return rank;
}

struct Ended {
  std::string stuck;
  GroupMemory memory;
};

Ended dispatch_of(NodesCase* run, const RandomCase& random_case) {
  auto handles = make_handles(random_case);
  Ended ended{"", make_dispatch(random_case, &handles)};
  ended.stuck = run->world->run(random_case, run->settings, nullptr, &ended.memory);
  return ended;
}

/// Every active rank's end is `own` for rank `odd`, and `others` for the rest.
std::string compare_ends(const RandomCase& random_case, const Ended& ended, uint32_t odd, const OpReport& own,
                         const OpReport& others) {
  for (uint32_t rank = 0; ended.stuck.empty() && rank < random_case.shape.ranks; ++rank) {
    const OpReport& got = ended.memory.reports[rank];
    const OpReport& wanted = rank == odd ? own : others;
    if (active(random_case.shape.active_ranks, rank) && !same_end(got, wanted)) {
      return "rank " + std::to_string(rank) + ": " + describe(got) + ", not " + describe(wanted);
    }
    if (!ended.memory.ranks[rank].x.untouched()) {
      return "rank " + std::to_string(rank) + " got rows";
    }
  }
  return !ended.stuck.empty() ? ended.stuck : guards_intact(ended.memory) ? "" : "memory around an output was written";
}

OpReport rejected_by(uint32_t rank) {
  OpReport report;
  report.reason = EXPERTD_REASON_PEER_REJECTED;
  report.rank = static_cast<int32_t>(rank);
  return report;
}

TEST(HostNodesErrors, BadIdsAndCapacitiesEndAllRanksAlike) {
  uint32_t refused = 0;
  uint32_t all = 0;
  for (auto& run : cases(kErrorCases)) {
    RandomCase broken = run->dispatch;
    const uint32_t rank = pick_active(&run->random, broken.shape);
    auto& ids = broken.inputs[rank].topk_idx;
    if (run->random.chance(50) && !ids.empty()) {
      ids[run->random.below(static_cast<uint32_t>(ids.size()))] = broken.shape.experts + run->random.below(9);
    } else if (broken.capacities[rank] != 0) {
      broken.capacities[rank] = run->random.below(broken.capacities[rank]);
      broken.shape.slots_per_expert /= 1 + run->random.below(8);
    }
    const auto ends = reference_end(broken.shape, broken.inputs, broken.capacities);
    const Ended ended = dispatch_of(run.get(), broken);
    ASSERT_EQ(ended.stuck, "") << repro_line(broken);
    ++all;
    for (uint32_t at = 0; at < broken.shape.ranks; ++at) {
      const OpReport& got = ended.memory.reports[at];
      const ExpectedEnd& end = ends[at];
      if (!active(broken.shape.active_ranks, at)) {
        continue;
      }
      ASSERT_TRUE(got.reason == end.reason && got.argument == end.argument && got.value == end.value &&
                  got.minimum == end.minimum && got.maximum == end.maximum && got.rank == end.rank)
          << "rank " << at << ": " << describe(got) << ", not reason " << end.reason << " " << repro_line(broken);
      refused += end.reason != 0 && at == rank ? 1 : 0;
    }
    ASSERT_EQ(run->run_dispatch(run->dispatch), "") << "the next one: " << repro_line(broken);
    ASSERT_TRUE(run->world->network->quiet()) << repro_line(broken);
  }
  EXPECT_TRUE(all < 2 || refused > all / 4) << refused << " of " << all;
}

TEST(HostNodesErrors, AStaleHandleIsNamedEverywhere) {
  for (auto& run : cases(kErrorCases)) {
    ASSERT_EQ(run->run_dispatch(run->dispatch), "") << repro_line(run->dispatch);
    const RandomCase combine = run->combine_case();
    const uint32_t rank = pick_active(&run->random, combine.shape);
    run->world->change = [&](uint32_t at, engine::Request* request) {
      request->handle_generation += at == rank ? 1 : 0;
    };
    std::vector<CombineInput> rows(combine.shape.ranks);
    const std::vector<uint32_t> in_rows(combine.shape.ranks, 0);
    Ended ended{"", make_combine(combine, &run->handles, rows, in_rows)};
    test::NodeOpSettings with = run->settings;
    with.with_weights = combine.combine_weights;
    ended.stuck = run->world->run(combine, with, &in_rows, &ended.memory);
    OpReport own;
    own.reason = EXPERTD_REASON_STALE_HANDLE;
    own.argument = EXPERTD_ARGUMENT_HANDLE;
    own.value = run->settings.generation + 1;
    ASSERT_EQ(compare_ends(combine, ended, rank, own, rejected_by(rank)), "") << repro_line(combine);
    ASSERT_TRUE(run->world->network->quiet()) << repro_line(combine);
  }
}

TEST(HostNodesErrors, ARefusedRankIsNamedEverywhere) {
  for (auto& run : cases(kErrorCases)) {
    const uint32_t rank = pick_active(&run->random, run->dispatch.shape);
    run->world->change = [&](uint32_t at, engine::Request* request) {
      if (at == rank) {
        const base::SessionId session = request->session;
        *request = engine::Request{};
        request->session = session;
        request->rejected_reason = EXPERTD_REASON_ARGUMENT_RANGE;
        request->rejected_argument = EXPERTD_ARGUMENT_TOKENS;
        request->rejected_value = 9;
        request->rejected_minimum = 1;
        request->rejected_maximum = 8;
      }
    };
    const Ended ended = dispatch_of(run.get(), run->dispatch);
    OpReport own;
    own.reason = EXPERTD_REASON_ARGUMENT_RANGE;
    own.argument = EXPERTD_ARGUMENT_TOKENS;
    own.value = 9;
    own.minimum = 1;
    own.maximum = 8;
    ASSERT_EQ(compare_ends(run->dispatch, ended, rank, own, rejected_by(rank)), "") << repro_line(run->dispatch);
    for (uint32_t at = 0; at < run->dispatch.shape.ranks; ++at) {
      const bool told = at != rank && active(run->dispatch.shape.active_ranks, at);
      ASSERT_EQ(run->world->outcome(at).peer_reason, told ? uint32_t{EXPERTD_REASON_ARGUMENT_RANGE} : 0U);
    }
    ASSERT_TRUE(run->world->network->quiet()) << repro_line(run->dispatch);
  }
}

TEST(HostNodesErrors, AMismatchIsNamedEverywhere) {
  for (auto& run : cases(kErrorCases)) {
    const OpShape& shape = run->dispatch.shape;
    const uint32_t rank = pick_active(&run->random, shape);
    if (shape.active_ranks.count() < 2) {
      continue;
    }
    const bool other_kind = run->random.chance(30);
    run->world->change = [&](uint32_t at, engine::Request* request) {
      if (at == rank && other_kind) {
        request->shape.kind = OpKind::kBarrier;
      } else if (at == rank) {
        request->shape.expert_alignment = 4096;
      }
    };
    const auto lowest = static_cast<uint32_t>(shape.active_ranks.lowest());
    const auto second = static_cast<uint32_t>((shape.active_ranks - base::RankSet::one(lowest)).lowest());
    const int64_t given = other_kind ? static_cast<int64_t>(OpKind::kBarrier) : 4096;
    const int64_t usual = other_kind ? static_cast<int64_t>(shape.kind) : int64_t{shape.expert_alignment};
    OpReport end;
    end.reason = EXPERTD_REASON_OP_MISMATCH;
    end.argument = other_kind ? EXPERTD_ARGUMENT_OP : EXPERTD_ARGUMENT_EXPERT_ALIGNMENT;
    end.rank = static_cast<int32_t>(rank == lowest ? second : rank);
    end.value = rank == lowest ? usual : given;
    end.minimum = rank == lowest ? given : usual;
    end.maximum = end.minimum;
    ASSERT_EQ(compare_ends(run->dispatch, dispatch_of(run.get(), run->dispatch), rank, end, end), "")
        << repro_line(run->dispatch);
    ASSERT_TRUE(run->world->network->quiet()) << repro_line(run->dispatch);
  }
}

TEST(HostNodesErrors, NodesWithDifferentMasksDoNotRun) {
  uint32_t ran = 0;
  for (auto& run : cases(kErrorCases)) {
    RandomCase all = run->dispatch;
    const OpShape& shape = all.shape;
    // One node believes that a rank of another is lost; that rank is the last of its node, so servers stay who they
    // are.
    const engine::Placement& placement = run->world->placement();
    const uint32_t lost = placement.ranks_of[1].back();
    if (all.shape.active_ranks != base::RankSet::first(shape.ranks) ||
        placement.ranks_of[1].size() < placement.ranks_of[0].size() + 1) {
      continue;
    }
    run->world->active_of = [&](uint32_t rank) {
      return placement.node_of[rank] == 0 ? shape.active_ranks - base::RankSet::one(lost) : shape.active_ranks;
    };
    const Ended ended = dispatch_of(run.get(), all);
    EXPECT_EQ(ended.stuck, "") << repro_line(all);
    for (uint32_t rank = 0; rank < shape.ranks; ++rank) {
      EXPECT_EQ(ended.memory.reports[rank].reason, uint32_t{EXPERTD_REASON_CANCELLED}) << repro_line(all);
    }
    ++ran;
  }
  EXPECT_TRUE(ran > 0 || std::getenv("EXPERTD_SEED") != nullptr);
}

/// What a node that is left out had still to say about an operation comes among the messages of those who are left.
TEST(HostNodesErrors, MessagesOfAnotherViewWriteNothing) {
  for (auto& run : cases(kErrorCases / 3)) {
    const engine::Placement& placement = run->world->placement();
    for (uint32_t i = 0; i < 8; ++i) {
      engine::MessageHeader header;
      header.kind = static_cast<engine::MessageKind>(run->random.between(1, 4));
      header.op = 1;
      header.source_rank = run->random.below(placement.ranks());
      header.node = (placement.node_of[header.source_rank] + 1) % placement.nodes();
      for (const uint32_t target : placement.ranks_of[header.node]) {
        header.targets |= uint64_t{active(run->dispatch.shape.active_ranks, target)} << placement.index_of[target];
      }
      if (header.targets == 0) {
        continue;
      }
      header.entries = 1;
      header.view = test::NodeWorld::kView - 1;
      run->world->network->inject(placement.node_of[header.source_rank], header,
                                  std::vector<std::byte>(run->random.below(400), std::byte{1}));
    }
    ASSERT_EQ(run->run_dispatch(run->dispatch), "") << repro_line(run->dispatch);
    ASSERT_EQ(run->run_combine(), "") << repro_line(run->dispatch);
    ASSERT_TRUE(run->world->network->quiet()) << repro_line(run->dispatch);
  }
}

/// Loses one message of a dispatch; whoever waited for it names the rank, and the next dispatch runs.
TEST(HostNodesErrors, WhoWaitsForALostMessageNamesItsSource) {
  uint32_t named = 0;
  uint32_t lost_messages = 0;
  for (auto& run : cases(kErrorCases)) {
    uint32_t countdown = run->random.below(12);
    int32_t source = -1;
    engine::MessageKind kind{};
    run->world->network->tamper = [&](engine::MessageHeader* header, std::vector<std::byte>*) {
      if (countdown-- != 0) {
        return true;
      }
      source = static_cast<int32_t>(header->source_rank);
      kind = header->kind;
      return false;
    };
    const Ended ended = dispatch_of(run.get(), run->dispatch);
    run->world->network->tamper = nullptr;
    ASSERT_TRUE(guards_intact(ended.memory)) << repro_line(run->dispatch);
    ASSERT_EQ(run->world->aborted.any(), source >= 0) << repro_line(run->dispatch);
    for (uint32_t rank = 0; source >= 0 && rank < run->dispatch.shape.ranks; ++rank) {
      const auto [what, ranks] = run->world->missed[rank];
      const uint32_t wanted = kind == engine::MessageKind::kCounts ? EXPERTD_MISSING_COUNTS : EXPERTD_MISSING_ROWS;
      named += what == wanted && ranks.contains(static_cast<uint32_t>(source)) ? 1 : 0;
    }
    lost_messages += source >= 0 ? 1 : 0;
    ASSERT_EQ(run->run_dispatch(run->dispatch), "") << "the next one: " << repro_line(run->dispatch);
  }
  EXPECT_GE(named, lost_messages);
}

/// Makes something of a message that no honest node sends.
void spoil(Random* random, engine::MessageHeader* header, std::vector<std::byte>* bytes) {
  switch (random->below(5)) {
    case 0:
      header->entries = random->chance(50) ? header->entries + 1 : static_cast<uint32_t>(random->next());
      break;
    case 1:
      bytes->resize(random->below(static_cast<uint32_t>(bytes->size())));
      break;
    case 2:
      header->source_rank = random->below(70);
      break;
    case 3:
      header->kind = static_cast<engine::MessageKind>(random->below(6));
      break;
    default:
      for (uint32_t i = random->between(1, 8); i > 0 && !bytes->empty(); --i) {
        // Most of it among the heads and tables at the front.
        const auto end = static_cast<uint32_t>(std::min<size_t>(bytes->size(), random->chance(70) ? 96 : SIZE_MAX));
        (*bytes)[random->below(end)] = static_cast<std::byte>(random->next());
      }
  }
}

TEST(HostNodesErrors, NothingThatArrivesIsTrusted) {
  uint32_t told = 0;
  for (auto& run : cases(kTamperCases)) {
    Random hostile(run->dispatch.seed + 5);
    const auto tamper = [&](engine::MessageHeader* header, std::vector<std::byte>* bytes) {
      if (hostile.chance(20)) {
        spoil(&hostile, header, bytes);
      }
      return true;
    };
    run->world->network->tamper = tamper;
    const Ended ended = dispatch_of(run.get(), run->dispatch);
    run->world->network->tamper = nullptr;
    ASSERT_TRUE(guards_intact(ended.memory)) << repro_line(run->dispatch);
    told += std::any_of(ended.memory.reports.begin(), ended.memory.reports.end(),
                        [](const OpReport& report) { return report.reason == EXPERTD_REASON_INTERNAL; });
    ASSERT_EQ(run->run_dispatch(run->dispatch), "") << "the next one: " << repro_line(run->dispatch);
    const RandomCase combine = run->combine_case();
    std::vector<CombineInput> rows(combine.shape.ranks);
    for (uint32_t rank = 0; rank < combine.shape.ranks; ++rank) {
      rows[rank].x = random_rows(&run->random, size_t{combine.capacities[rank]} * combine.shape.hidden);
    }
    GroupMemory memory = make_combine(combine, &run->handles, rows, combine.capacities);
    run->world->network->tamper = tamper;
    test::NodeOpSettings with = run->settings;
    with.with_weights = false;
    (void)run->world->run(combine, with, &combine.capacities, &memory);
    run->world->network->tamper = nullptr;
    ASSERT_TRUE(guards_intact(memory)) << repro_line(run->dispatch);
    ASSERT_EQ(run->run_dispatch(run->dispatch), "") << "after a combine: " << repro_line(run->dispatch);
  }
  EXPECT_GT(told, 0U);
}

}  // namespace
}  // namespace expertd::support
