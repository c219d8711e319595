// SPDX-License-Identifier: Apache-2.0
// Label gpu. Two daemons with two GPUs each as two nodes: ranks that reach each other and ranks that do not in one
// group, both modes; captured operations are refused there. And groups that ask for no links between GPUs, on one node
// and over several.
#include "tests/device/process_nodes_fixture.h"

namespace expertd::device_test {
namespace {

class ProcessNodePairs : public NodesTest {
 protected:
  ProcessNodePairs() : NodesTest(2, 2) {}
};

TEST_F(ProcessNodePairs, RoundsInFlightTogether) {
  ASSERT_NO_FATAL_FAILURE(join("ll"));
  EXPECT_TRUE(all_ok(all(), "rounds 50 1", seconds(60)));
  EXPECT_TRUE(all_ok(all(), "rounds 50 8", seconds(60)));
  EXPECT_TRUE(all_ok(all(), "leave"));
  ASSERT_NO_FATAL_FAILURE(join("normal"));
  EXPECT_TRUE(all_ok(all(), "rounds 50 1", seconds(60)));
  EXPECT_TRUE(all_ok(all(), "rounds 50 4", seconds(60)));
}

TEST_F(ProcessNodePairs, CapturesAreRefusedByName) {
  if (machine().host) {
    GTEST_SKIP() << "host devices capture nothing";
  }
  for (size_t rank = 0; rank < all().size(); ++rank) {
    all()[rank]->send("join captured " + std::to_string(rank) + " 4 captured");
  }
  for (FaultClient* client : all()) {
    const std::string answer = client->answer(seconds(60)).value_or("no answer");
    EXPECT_EQ(answer.rfind("failed UNSUPPORTED", 0), 0u) << answer;
    EXPECT_NE(answer.find("capture_lanes"), std::string::npos) << answer;
  }
}

TEST_F(ProcessNodePairs, NoLinksAreRefusedByName) {
  if (machine().host) {
    GTEST_SKIP() << "host devices have no links";
  }
  for (size_t rank = 0; rank < all().size(); ++rank) {
    all()[rank]->send("join unlinked " + std::to_string(rank) + " 4 no-nvlink-ll");
  }
  for (FaultClient* client : all()) {
    const std::string answer = client->answer(seconds(60)).value_or("no answer");
    EXPECT_EQ(answer.rfind("failed UNSUPPORTED", 0), 0u) << answer;
    EXPECT_NE(answer.find("use_nvlink"), std::string::npos) << answer;
  }
}

class ProcessNoNvlink : public NodesTest {
 protected:
  ProcessNoNvlink() : NodesTest(2, 1) {}
};

TEST_F(ProcessNoNvlink, RanksExchangeThroughTheHost) {
  for (const char* mode : {"no-nvlink-ll", "no-nvlink-normal"}) {
    SCOPED_TRACE(mode);
    ASSERT_NO_FATAL_FAILURE(join(mode));
    EXPECT_TRUE(all_ok(all(), "rounds 50 1", seconds(60)));
    EXPECT_TRUE(all_ok(all(), "rounds 50 4", seconds(60)));
    EXPECT_TRUE(all_ok(all(), "leave"));
  }
}

class ProcessNoNvlinkOfFour : public NodesTest {
 protected:
  ProcessNoNvlinkOfFour() : NodesTest(4, 1) {}
};

TEST_F(ProcessNoNvlinkOfFour, RanksExchangeThroughTheHost) {
  for (const char* mode : {"ll", "normal", "no-nvlink-ll", "no-nvlink-normal"}) {
    SCOPED_TRACE(mode);
    ASSERT_NO_FATAL_FAILURE(join(mode));
    EXPECT_TRUE(all_ok(all(), "rounds 50 1", seconds(60)));
    EXPECT_TRUE(all_ok(all(), "rounds 50 4", seconds(60)));
    EXPECT_TRUE(all_ok(all(), "leave"));
  }
}

}  // namespace
}  // namespace expertd::device_test
