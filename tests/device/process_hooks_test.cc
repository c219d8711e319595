// SPDX-License-Identifier: Apache-2.0
// Label gpu. Halves of low-latency operations: two dispatches and two combines outstanding, sent on one stream and
// received on others, with computation between them, in the order in which serving has them and in random ones.
//
// EXPERTD_TEST_SEED=1: of the random orders.
#include <cstdlib>

#include "tests/device/process_fixture.h"

namespace expertd::device_test {
namespace {

class ProcessHooks : public ProcessTest {
 protected:
  ProcessHooks() : ProcessTest(2, seconds(90)) {}
};

uint32_t first_seed() {
  const char* const given = std::getenv("EXPERTD_TEST_SEED");
  return given == nullptr ? 1 : static_cast<uint32_t>(std::strtoul(given, nullptr, 10));
}

TEST_F(ProcessHooks, OfTwoOutstandingPairsComeInAnyOrder) {
  constexpr uint32_t kOrders = 200;
  ASSERT_TRUE(start_daemon());
  std::unique_ptr<FaultClient> clients[2];
  for (uint32_t i = 0; i < 2; ++i) {
    clients[i] = make_client();
    ASSERT_TRUE(attach(*clients[i], i, "hooks-" + std::to_string(i)));
  }
  const std::vector<FaultClient*> both = {clients[0].get(), clients[1].get()};
  ASSERT_TRUE(all_ok(both, "join hooks # 2 ll"));
  const uint64_t begin = support::monotonic_ns();
  // Seed 0 is the order of serving.
  EXPECT_TRUE(all_ok(both, "hooks 0 20"));
  EXPECT_TRUE(all_ok(both, "hooks " + std::to_string(first_seed()) + " " + std::to_string(kOrders)));
  std::printf(
      "figure hooks: 20 double batches in the order of serving and %u in random orders from seed %u, all "
      "verified, %.1f s\n",
      kOrders, first_seed(), support::elapsed_ms(begin) / 1e3);
  // What a half leaves behind must not be in the way of whole operations.
  EXPECT_TRUE(all_ok(both, "rounds 10 4"));
}

}  // namespace
}  // namespace expertd::device_test
