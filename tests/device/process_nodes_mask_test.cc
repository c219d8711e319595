// SPDX-License-Identifier: Apache-2.0
// Label gpu. Groups of GPUs over several daemons with on_rank_loss = mask: a client or a daemon that is killed, or a
// rank that is left out by request. The others go on, no operation has two masks, and every result is the one of its
// mask. Daemons share GPUs where there are fewer; a group has one rank per GPU of a daemon. Each test prints what the
// change of masks took.
#include <map>
#include <sstream>

#include "tests/device/process_nodes_fixture.h"

namespace expertd::device_test {
namespace {

constexpr seconds kAnswer(20);
constexpr double kMostFailed = 20;  // operations of one rank, of those that a loss ends

class ProcessNodesMask : public NodesTest {
 protected:
  ProcessNodesMask() : NodesTest(1, 3) {}
  ProcessNodesMask(uint32_t ranks_each, uint32_t nodes) : NodesTest(ranks_each, nodes) {}

  /// Rounds that end behind the next loss; the answer says that the ranks are at work.
  void begin(const std::vector<uint32_t>& ranks) {
    uint64_t mask = 0;
    for (const uint32_t rank : ranks) {
      mask |= uint64_t{1} << rank;
    }
    ASSERT_TRUE(all_ok(some(ranks), "masked 20 " + std::to_string(mask), seconds(60)));
  }
  /// The rounds ended, the last under `mask`.
  void expect_masked(const std::vector<uint32_t>& ranks, uint64_t mask, const std::string& what) {
    std::map<uint64_t, uint64_t> mask_of;  // by operation
    std::vector<double> gaps;
    for (const uint32_t rank : ranks) {
      SCOPED_TRACE("rank " + std::to_string(rank));
      const std::string end = client(rank).answer(kAnswer).value_or("no answer");
      EXPECT_TRUE(is_ok(end)) << end;
      EXPECT_LT(number_in(end, "failed"), kMostFailed) << end;
      gaps.push_back(number_in(end, "gap"));
      EXPECT_EQ(mask, last_mask(end, &mask_of)) << end;
    }
    figure(what, {{"gap_ms", gaps}});
  }
  /// Reads "masks=FIRST-LAST:MASK,..." and holds it against what other ranks said.
  static uint64_t last_mask(const std::string& end, std::map<uint64_t, uint64_t>* mask_of) {
    std::istringstream spans(text_in(end, "masks"));
    uint64_t mask = 0;
    for (std::string span; std::getline(spans, span, ',');) {
      uint64_t first = 0;
      uint64_t last = 0;
      char separator = 0;
      std::istringstream(span) >> first >> separator >> last >> separator >> mask;
      for (uint64_t op = first; op <= last; ++op) {
        EXPECT_EQ(mask_of->emplace(op, mask).first->second, mask) << "operation " << op;
      }
    }
    return mask;
  }

  void lose_a_client(const std::string& mode);
};

void ProcessNodesMask::lose_a_client(const std::string& mode) {
  ASSERT_NO_FATAL_FAILURE(join(mode + " 3000"));
  ASSERT_NO_FATAL_FAILURE(begin({0, 1, 2}));
  client(1).signal_kill();
  expect_masked({0, 2}, 0b101, "a client of three nodes killed, " + mode);
}

TEST_F(ProcessNodesMask, AKilledClientIsLeftOutOfLowLatency) {
  lose_a_client("mask-ll");
}

TEST_F(ProcessNodesMask, AKilledClientIsLeftOutOfHighThroughput) {
  lose_a_client("mask-normal");
}

TEST_F(ProcessNodesMask, AKilledDaemonIsLeftOutAndTheNextClientToo) {
  ASSERT_NO_FATAL_FAILURE(join("mask-ll 3000"));
  ASSERT_NO_FATAL_FAILURE(begin({0, 1, 2}));
  cluster_->node(2).kill();
  expect_masked({0, 1}, 0b011, "a daemon of three killed");
  ASSERT_TRUE(all_ok(some({0, 1}), "masked 20", seconds(60)));
  EXPECT_TRUE(is_ok(client(0).answer(kAnswer).value_or("no answer")));
  EXPECT_TRUE(is_ok(client(1).answer(kAnswer).value_or("no answer")));
  EXPECT_TRUE(all_ok(some({0, 1}), "leave"));
}

TEST_F(ProcessNodesMask, AKilledHostOfTheRendezvousIsLeftOut) {
  ASSERT_NO_FATAL_FAILURE(join("mask-normal 3000"));
  ASSERT_NO_FATAL_FAILURE(begin({0, 1, 2}));
  cluster_->node(0).kill();
  expect_masked({1, 2}, 0b110, "the first daemon of three killed");
}

// A rank that is left out by request fails its own operations, and takes part again when it is let in.
TEST_F(ProcessNodesMask, ARankIsLeftOutByRequestAndComesBack) {
  ASSERT_NO_FATAL_FAILURE(join("mask-ll 3000"));
  const auto run = [&](uint64_t mask) {
    ASSERT_TRUE(all_ok(all(), "masked 20", seconds(60)));
    for (uint32_t rank = 0; rank < 3; ++rank) {
      const std::string end = client(rank).answer(kAnswer).value_or("no answer");
      EXPECT_TRUE(is_ok(end)) << end;
      const bool in = (mask >> rank & 1) != 0;
      EXPECT_EQ(in ? 0 : 40, number_in(end, "failed")) << "rank " << rank << ": " << end;
      EXPECT_EQ(in ? "NONE" : "BAD_STATE", text_in(end, "reason")) << "rank " << rank << ": " << end;
      std::map<uint64_t, uint64_t> unused;
      EXPECT_EQ(in ? mask : 0, last_mask(end, &unused)) << "rank " << rank << ": " << end;
    }
  };
  run(0b111);
  EXPECT_TRUE(is_ok(expect_ok(client(0), "mask 4 0")));
  run(0b011);
  EXPECT_TRUE(is_ok(expect_ok(client(1), "mask 0 4")));
  run(0b111);
}

// Captured operations are those of all ranks: with the first loss they end by name, and calls go on.
TEST_F(ProcessNodesMask, ALossEndsReplaysAndNotCalls) {
  if (machine().host) {
    GTEST_SKIP() << "host devices capture nothing";
  }
  ASSERT_NO_FATAL_FAILURE(join("mask-captured 3000"));
  ASSERT_TRUE(all_ok(all(), "capture", seconds(60)));
  ASSERT_TRUE(all_ok(all(), "replay 1 5", seconds(60)));
  ASSERT_NO_FATAL_FAILURE(begin({0, 1, 2}));
  client(2).signal_kill();
  expect_masked({0, 1}, 0b011, "a client with captures killed");
  EXPECT_TRUE(is_ok(expect_ok(client(0), "replay-alone")));
  EXPECT_NE(cluster_->node(0).log().find("captured operations of the group end"), std::string::npos)
      << cluster_->node(0).log();
  ASSERT_TRUE(all_ok(some({0, 1}), "masked 20", seconds(60)));
  EXPECT_TRUE(is_ok(client(0).answer(kAnswer).value_or("no answer")));
  EXPECT_TRUE(is_ok(client(1).answer(kAnswer).value_or("no answer")));
}

class ProcessNodePairsMask : public ProcessNodesMask {
 protected:
  ProcessNodePairsMask() : ProcessNodesMask(2, 2) {}
};

// First one of two ranks of a node, so that the other serves for both, then the rest of the node.
TEST_F(ProcessNodePairsMask, AKilledClientAndThenItsDaemon) {
  ASSERT_NO_FATAL_FAILURE(join("mask-normal 3000"));
  ASSERT_NO_FATAL_FAILURE(begin({0, 1, 2, 3}));
  client(3).signal_kill();
  expect_masked({0, 1, 2}, 0b0111, "one of two ranks of a node killed");
  ASSERT_NO_FATAL_FAILURE(begin({0, 1, 2}));
  cluster_->node(1).kill();
  expect_masked({0, 1}, 0b0011, "and then its daemon");
}

TEST_F(ProcessNodePairsMask, AKilledClientIsLeftOutOfLowLatency) {
  ASSERT_NO_FATAL_FAILURE(join("mask-ll 3000"));
  ASSERT_NO_FATAL_FAILURE(begin({0, 1, 2, 3}));
  client(0).signal_kill();
  expect_masked({1, 2, 3}, 0b1110, "one of two ranks of a node killed, low latency");
}

}  // namespace
}  // namespace expertd::device_test
