// SPDX-License-Identifier: Apache-2.0
// Seeded simulation of engines, groups and clients. EXPERTD_SEED=n runs one seed, EXPERTD_SEEDS=n that many.
#include <gtest/gtest.h>

#include <cstdlib>
#include <string>

#include "tests/sim/engine_world.h"

namespace expertd::test {
namespace {

constexpr uint64_t kSeeds = 3'000;

uint64_t environment_or(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::strtoull(text, nullptr, 10);
}

TEST(EngineSim, KeepsItsPromisesUnderEverySeed) {
  const uint64_t first = environment_or("EXPERTD_SEED", 1);
  const uint64_t seeds = std::getenv("EXPERTD_SEED") != nullptr ? 1 : environment_or("EXPERTD_SEEDS", kSeeds);
  uint64_t operations = 0;
  for (uint64_t seed = first; seed < first + seeds; ++seed) {
    EngineWorld world(seed);
    const std::string breach = world.run();
    operations += world.operations();
    ASSERT_TRUE(breach.empty()) << breach << "\nEXPERTD_SEED=" << seed << " engine_sim_test --gtest_filter=EngineSim.*";
  }
  RecordProperty("operations", std::to_string(operations));
}

}  // namespace
}  // namespace expertd::test
