// SPDX-License-Identifier: Apache-2.0
// Measurements between two fabrics of one process: figures come, one at a time, and within bounds that also hold for
// who does not keep to them. Node 0 answers; where a bare UCX program plays node 1, it says so.
#include <gtest/gtest.h>

#include <atomic>
#include <mutex>

#include "daemon/base/clock.h"
#include "daemon/fabric/probe.h"
#include "daemon/fabric/wire.h"
#include "tests/fabric/fabric_pair.h"
#include "tests/fabric/raw_sender.h"

namespace expertd::fabric_test {
namespace {

using fabric::DropCause;
using fabric::WireProbe;

constexpr uint64_t kProbe = 77;
constexpr uint32_t kBytes = 64 * 1024;
constexpr uint64_t kSecondNs = 1'000'000'000;

/// What came of a probe.
struct Outcome {
  std::mutex mutex;
  bool done = false;
  base::Status status;
  std::vector<fabric::ProbeFigures> figures;

  fabric::ProbeDone told() {
    return [this](const base::Status& ended, const std::vector<fabric::ProbeFigures>& all) {
      const std::lock_guard<std::mutex> lock(mutex);
      status = ended;
      figures = all;
      done = true;
    };
  }
  bool is_done() {
    const std::lock_guard<std::mutex> lock(mutex);
    return done;
  }
};

class FabricProbe : public testing::Test {
 protected:
  void SetUp() override {
    world_.create([](uint32_t node) { return options_for("tcp", "node" + std::to_string(node)); });
    ASSERT_NO_FATAL_FAILURE(world_.connect());
    ASSERT_NO_FATAL_FAILURE(world_.wait_up());
  }

  uint64_t id(uint32_t node) { return world_.node(node).fabric->identity().node_id; }
  base::Status open(uint32_t bytes = kBytes, uint64_t for_ns = 5 * kSecondNs) {
    return world_.node(0).fabric->open_probe({id(1), kProbe, bytes, base::now_ns() + for_ns});
  }
  fabric::ProbePlan plan(uint64_t for_ns = 5 * kSecondNs) {
    fabric::ProbePlan plan{.node_id = id(0), .probe = kProbe, .runs = {}, .deadline_ns = base::now_ns() + for_ns};
    for (const engine::FabricLane lane : {engine::FabricLane::kLatency, engine::FabricLane::kThroughput}) {
      plan.runs.push_back({lane, 8, 1, 50, kSecondNs});
      plan.runs.push_back({lane, kBytes, 8, 40, kSecondNs});
    }
    return plan;
  }
  base::Status begin(const fabric::ProbePlan& wanted) {
    return world_.node(1).fabric->begin_probe(wanted, outcome_.told());
  }
  bool ended() {
    return world_.node(1).bell->wait([this] { return outcome_.is_done(); });
  }
  bool counted(DropCause cause, uint64_t count) {
    return world_.node(0).bell->wait([&] { return world_.snapshot(0).dropped[static_cast<uint32_t>(cause)] == count; });
  }
  /// An ask that node 1 could send.
  WireProbe ask() {
    WireProbe header;
    header.prefix.source_node = id(1);
    header.destination_node = id(0);
    header.probe = kProbe;
    header.signal = fabric::kProbeAsk;
    header.sequence = 1;
    header.bytes = 8;
    return header;
  }
  /// Sent by the bare program over the latency lane.
  bool send(const WireProbe& header, uint32_t bytes, uint32_t flags = UCP_AM_SEND_FLAG_EAGER) {
    if (raw_ == nullptr) {
      raw_ = std::make_unique<RawSender>(world_.node(0).fabric->identity().addresses[1].front());
    }
    return raw_->ready() && raw_->send(fabric::kWireProbe, &header, sizeof(header), payload_.data(), bytes, flags);
  }

  bool send_message(const engine::MessageHeader& header, uint64_t bytes) {
    return fabric_test::send(world_.node(1), 1, header, bytes);
  }

  World world_{{1, 1}};
  Outcome outcome_;
  std::unique_ptr<RawSender> raw_;
  std::vector<char> payload_ = std::vector<char>(2 * kBytes);
};

TEST_F(FabricProbe, MeasuresEveryRunAndLeavesRoomForTheNext) {
  for (int round = 0; round < 3; ++round) {
    outcome_.done = false;
    ASSERT_TRUE(open().is_ok());
    ASSERT_TRUE(begin(plan()).is_ok());
    ASSERT_TRUE(ended());
    ASSERT_TRUE(outcome_.status.is_ok()) << outcome_.status.message();
    ASSERT_EQ(outcome_.figures.size(), 4U);
    for (const fabric::ProbeFigures& figures : outcome_.figures) {
      EXPECT_EQ(figures.messages, figures.bytes == 8 ? 49U : 39U);
      EXPECT_GT(figures.p50_ns, 0U);
      EXPECT_GE(figures.p99_ns, figures.p50_ns);
      EXPECT_GT(figures.elapsed_ns, 0U);
    }
    // The answer to the end comes when the other side has ended it, so there is nothing to wait for.
  }
  EXPECT_TRUE(world_.node(0).bell->lost().empty() && world_.node(1).bell->lost().empty());
}

TEST_F(FabricProbe, MessagesOfGroupsArriveBesideIt) {
  ASSERT_NO_FATAL_FAILURE(world_.open());
  ASSERT_TRUE(open().is_ok());
  ASSERT_TRUE(begin(plan()).is_ok());
  for (uint32_t sequence = 0; sequence < 20; ++sequence) {
    const engine::MessageHeader header{.kind = engine::MessageKind::kPulls,
                                       .lane = engine::FabricLane::kThroughput,
                                       .op = 7,
                                       .source_rank = 1,
                                       .node = 0,
                                       .targets = 1,
                                       .entries = 3,
                                       .sequence = sequence};
    ASSERT_TRUE(send_message(header, kBytes));
    engine::Arrival arrival;
    ASSERT_TRUE(receive(world_.node(0), 0, &arrival));
    EXPECT_EQ(wrong_bytes(arrival), 0U);
    world_.node(0).port->release(0, arrival);
  }
  ASSERT_TRUE(ended());
  EXPECT_TRUE(outcome_.status.is_ok()) << outcome_.status.message();
}

TEST_F(FabricProbe, OneAtATime) {
  ASSERT_TRUE(open().is_ok());
  EXPECT_EQ(open().reason(), EXPERTD_REASON_BAD_STATE);
  fabric::ProbePlan back = plan();
  back.node_id = id(1);
  EXPECT_EQ(world_.node(0).fabric->begin_probe(back, outcome_.told()).reason(), EXPERTD_REASON_BAD_STATE);
}

TEST_F(FabricProbe, AProbeNobodyEndsIsClosedInTime) {
  ASSERT_TRUE(open(kBytes, kSecondNs / 20).is_ok());
  EXPECT_TRUE(world_.node(0).bell->wait([this] { return open().is_ok(); }));
}

TEST_F(FabricProbe, WithoutAnAnswerItEndsAtItsDeadline) {
  ASSERT_TRUE(begin(plan(kSecondNs / 10)).is_ok());  // which nobody has opened
  ASSERT_TRUE(ended());
  EXPECT_EQ(outcome_.status.reason(), EXPERTD_REASON_TIMEOUT);
  EXPECT_NE(outcome_.status.message().find("node0"), std::string::npos) << outcome_.status.message();
  EXPECT_TRUE(counted(DropCause::kUnknownGroup, 2)) << "the ask and the end";
  EXPECT_TRUE(world_.node(0).bell->lost().empty());
}

TEST_F(FabricProbe, ALostNodeEndsIt) {
  ASSERT_TRUE(begin(plan()).is_ok());
  ASSERT_TRUE(world_.node(1).fabric->disconnect(id(0)).is_ok());
  ASSERT_TRUE(ended());
  EXPECT_EQ(outcome_.status.reason(), EXPERTD_REASON_PEER_LOST);
  EXPECT_EQ(begin(plan()).reason(), EXPERTD_REASON_PEER_LOST);
}

TEST_F(FabricProbe, PlansBeyondTheBoundsAreRefused) {
  EXPECT_EQ(open(fabric::kProbeBytesMax + 1).reason(), EXPERTD_REASON_ARGUMENT_RANGE);
  EXPECT_EQ(open(8, fabric::kProbeNsMax + kSecondNs).reason(), EXPERTD_REASON_ARGUMENT_RANGE);
  fabric::ProbePlan wide = plan();
  wide.runs[1].window = fabric::kProbeWindow + 1;
  fabric::ProbePlan many = plan();
  many.runs[0].messages = fabric::kProbeMessagesMax + 1;
  fabric::ProbePlan single = plan();
  single.runs[0].messages = 1;
  fabric::ProbePlan nameless = plan();
  nameless.probe = 0;
  for (const fabric::ProbePlan& bad : {wide, many, single, nameless}) {
    EXPECT_EQ(begin(bad).reason(), EXPERTD_REASON_ARGUMENT_RANGE);
  }
}

TEST_F(FabricProbe, WhatIsOfNoOpenProbeIsCountedAndHurtsNobody) {
  ASSERT_TRUE(send(ask(), 8));
  EXPECT_TRUE(counted(DropCause::kUnknownGroup, 1));
  ASSERT_TRUE(open().is_ok());
  WireProbe other = ask();
  ++other.probe;
  ASSERT_TRUE(send(other, 8));
  EXPECT_TRUE(counted(DropCause::kUnknownGroup, 2));
  other = ask();
  ++other.destination_node;
  ASSERT_TRUE(send(other, 8));
  EXPECT_TRUE(counted(DropCause::kUnknownNode, 1));
  WireProbe large = ask();
  ++large.probe;
  large.bytes = kBytes;
  ASSERT_TRUE(send(large, kBytes, UCP_AM_SEND_FLAG_RNDV)) << "it ends at the sender too";
  EXPECT_TRUE(counted(DropCause::kUnknownGroup, 3));
  EXPECT_TRUE(world_.node(0).bell->lost().empty());
}

/// Everything that only a broken daemon sends, one per run of the test.
struct Bad {
  const char* name;
  void (*spoil)(WireProbe*);
  uint32_t bytes;
  DropCause cause;
};
const Bad kBad[] = {
    {"Signal", [](WireProbe* header) { header->signal = 9; }, 8, DropCause::kBadField},
    {"Lane", [](WireProbe* header) { header->lane = 1; }, 8, DropCause::kBadField},
    {"NoLane", [](WireProbe* header) { header->lane = 7; }, 8, DropCause::kBadField},
    {"OtherSize", [](WireProbe* header) { header->bytes = 9; }, 8, DropCause::kOverrun},
    {"TooLarge", [](WireProbe* header) { header->bytes = 2 * kBytes; }, 2 * kBytes, DropCause::kOverrun},
    {"EndWithBytes", [](WireProbe* header) { header->signal = fabric::kProbeEnd; }, 8, DropCause::kOverrun},
};

class FabricProbeGarbage : public FabricProbe, public testing::WithParamInterface<Bad> {};

TEST_P(FabricProbeGarbage, CostsTheConnection) {
  ASSERT_TRUE(open().is_ok());
  WireProbe header = ask();
  GetParam().spoil(&header);
  ASSERT_TRUE(send(header, GetParam().bytes, header.bytes > 1024 ? UCP_AM_SEND_FLAG_RNDV : UCP_AM_SEND_FLAG_EAGER));
  EXPECT_TRUE(counted(GetParam().cause, 1));
  ASSERT_TRUE(world_.node(0).bell->wait([this] { return !world_.node(0).bell->lost().empty(); }));
  EXPECT_EQ(world_.node(0).bell->lost()[0].cause, fabric::LossCause::kGarbage);
}

INSTANTIATE_TEST_SUITE_P(Kinds, FabricProbeGarbage, testing::ValuesIn(kBad),
                         [](const testing::TestParamInfo<Bad>& bad) { return bad.param.name; });

TEST_F(FabricProbe, AnAnswerToWhatWasNotAskedCostsTheConnection) {
  // Node 0 asks here, and waits since node 1 has opened nothing.
  fabric::ProbePlan asks = plan();
  asks.node_id = id(1);
  ASSERT_TRUE(world_.node(0).fabric->begin_probe(asks, outcome_.told()).is_ok());
  WireProbe answer = ask();
  answer.signal = fabric::kProbeAnswer;
  answer.sequence = 99;
  answer.bytes = 0;
  ASSERT_TRUE(send(answer, 0));
  EXPECT_TRUE(counted(DropCause::kBadField, 1));
  ASSERT_TRUE(world_.node(0).bell->wait([this] { return outcome_.is_done(); }));
  EXPECT_EQ(outcome_.status.reason(), EXPERTD_REASON_PEER_LOST);
}

TEST_F(FabricProbe, NoiseOfItsSizeNeverGetsThrough) {
  ASSERT_TRUE(open().is_ok());
  uint64_t state = 20261126;  // of the sequence below; a failure shows the round
  for (int round = 0; round < 200; ++round) {
    WireProbe noise = ask();
    auto* const bytes = reinterpret_cast<unsigned char*>(&noise);
    for (size_t i = 0; i < sizeof(noise); ++i) {
      state = state * 6364136223846793005 + 1442695040888963407;
      bytes[i] = static_cast<unsigned char>(state >> 56);
    }
    ASSERT_TRUE(send(noise, 8)) << "round " << round;
  }
  EXPECT_TRUE(counted(DropCause::kMalformed, 200));
  EXPECT_TRUE(world_.node(0).bell->lost().empty());
}

// The answering side by hand, so that nothing is answered between two asks.
TEST(FabricProbeAnswerer, TakesAWindowOfAsksAndThenOnlyTheEnd) {
  const fabric::FabricOptions options = options_for("tcp", "self");
  constexpr auto kKind = fabric::LaneKind::kLatency;
  constexpr auto kPlace = static_cast<uint32_t>(kKind);
  auto rail = fabric::Lane::create(kKind, options.lanes[kPlace]);
  ASSERT_TRUE(rail.is_ok()) << rail.status().message();
  fabric::Rails rails;
  rails.push_back(std::move(rail).value());
  fabric::NodeIdentity identity{.node_id = 2, .name = "self", .addresses = {}};
  identity.addresses[kPlace].push_back(rails.front()->address());
  fabric::Crossing crossing;
  auto peer = fabric::LanePeer::create(identity, 1, rails,
                                       {.kind = kKind, .window_bytes = options.window_bytes, .crossing = &crossing});
  ASSERT_TRUE(peer.is_ok()) << peer.status().message();
  {
    fabric::ProbeAnswerer answerer(1, engine::FabricLane::kLatency, peer.value().get(), {2, kProbe, 64, UINT64_MAX},
                                   fabric::ProbeMemory(size_t{64} * fabric::kProbeWindow));
    WireProbe header;
    header.probe = kProbe;
    header.signal = fabric::kProbeAsk;
    header.bytes = 8;
    fabric::Incoming message{.lane = fabric::LaneKind::kLatency, .type = fabric::kWireProbe, .bytes = 8};
    bool kept = false;
    for (uint32_t i = 0; i < fabric::kProbeWindow; ++i) {
      EXPECT_TRUE(answerer.asked(header, message, &kept)) << i;
    }
    EXPECT_FALSE(answerer.asked(header, message, &kept));
    header.signal = fabric::kProbeEnd;
    header.bytes = 0;
    message.bytes = 0;
    EXPECT_TRUE(answerer.asked(header, message, &kept));
    EXPECT_FALSE(kept);
    answerer.end();
    EXPECT_TRUE(answerer.drained());
    EXPECT_EQ(peer.value()->users, 1U);
  }
  EXPECT_EQ(peer.value()->users, 0U);
  peer.value()->let_go();
  const uint64_t deadline_ns = base::now_ns() + 10 * kSecondNs;
  while (!peer.value()->closed() && base::now_ns() < deadline_ns) {
    (void)rails.front()->progress();
  }
  EXPECT_TRUE(peer.value()->closed());
}

}  // namespace
}  // namespace expertd::fabric_test
