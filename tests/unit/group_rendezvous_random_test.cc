// SPDX-License-Identifier: Apache-2.0
// The rendezvous under random calls of random nodes; a failing seed is named as the call that repeats it.
#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "tests/unit/group_rendezvous_fixture.h"

namespace expertd::group {
namespace {

/// Random nodes join, repeat, withdraw, report, vanish and come back under random names of groups. Whatever happens:
/// every call is answered at most once, and after the last deadline exactly once; a key is placed with the same ranks
/// for all.
void run_random(uint32_t seed) {
  std::mt19937 random(seed);
  const auto below = [&random](uint32_t bound) { return static_cast<uint32_t>(random() % bound); };
  uint64_t key = 0;
  Rendezvous rendezvous(
      {.max_nodes = 5, .max_joins = 12, .max_groups = 8, .form_timeout_ns = 40, .node_timeout_ns = 90},
      [&key] { return ++key; });
  uint64_t now = 1;
  std::vector<std::shared_ptr<Answer>> answers;
  std::vector<CallId> calls;
  std::map<uint64_t, std::vector<uint32_t>> places;  // key -> node of each rank
  const auto any_node = [&] { return node_of(1 + below(9), "n" + std::to_string(below(6))); };
  for (int step = 0; step < 400; ++step) {
    now += below(6);
    auto answer = std::make_shared<Answer>();
    const auto placed = [&places, answer](const session::ErrorDetail& error,
                                          const std::shared_ptr<const Placed>& where) {
      ++answer->count;
      answer->error = error;
      ASSERT_EQ(error.status.is_ok(), where != nullptr);
      if (where != nullptr) {
        std::vector<uint32_t> nodes;
        for (const PlacedRank& rank : where->ranks) {
          nodes.push_back(rank.node);
        }
        const auto [known, first] = places.emplace(where->key, nodes);
        EXPECT_EQ(known->second, nodes);
      }
    };
    switch (below(8)) {
      case 0:
      case 1:
      case 2: {
        const uint32_t ranks = 1 + below(3);
        const RankJoin join{
            "g" + std::to_string(below(2)), below(ranks), config_of(ranks), {}, 1 + below(40), 1 + below(50)};
        answers.push_back(answer);
        calls.push_back(rendezvous.join(join, any_node(), now, placed));
        break;
      }
      case 3:
        rendezvous.withdraw("g" + std::to_string(below(2)), below(3), 1 + below(9), 1 + below(40));
        break;
      case 4:
        answers.push_back(answer);
        rendezvous.report_formed({1 + below(static_cast<uint32_t>(key) + 1),
                                  below(4) == 0 ? base::Status(EXPERTD_REASON_SYSTEM) : base::Status::ok(), -1},
                                 1 + below(9), now, [answer](const session::ErrorDetail&) { ++answer->count; });
        break;
      case 5:
        rendezvous.report_gone(1 + below(static_cast<uint32_t>(key) + 1), 1 + below(9), {below(3)}, now);
        break;
      case 6:
        (void)rendezvous.seen(any_node(), now).status.is_ok();
        break;
      default:
        rendezvous.expire(now);
        EXPECT_GT(rendezvous.next_deadline_ns(), now);
    }
    EXPECT_LE(rendezvous.nodes().size(), 5U);
  }
  for (int i = 0; i < 3; ++i) {
    now += 1000;
    rendezvous.expire(now);
  }
  for (const auto& answer : answers) {
    EXPECT_EQ(answer->count, 1);
  }
  EXPECT_TRUE(rendezvous.nodes().empty());
}

TEST(RendezvousRandom, AnswersEveryCallOnceWhateverHappens) {
  for (uint32_t seed = 1; seed <= 300 && !testing::Test::HasFailure(); ++seed) {
    SCOPED_TRACE("run_random(" + std::to_string(seed) + ")");
    run_random(seed);
  }
}

}  // namespace
}  // namespace expertd::group
