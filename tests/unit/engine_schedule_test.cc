// SPDX-License-Identifier: Apache-2.0
// The schedule by itself, and an engine that asks it: who is launched first, who works first, and that nobody waits for
// ever. EXPERTD_TEST_SEED moves the seeds of the random interleavings.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "tests/support/fake_engine_group.h"

namespace expertd::test {
namespace {

using engine::Candidate;
using engine::Policy;
using engine::Schedule;
using engine::SessionShare;
using engine::Traffic;

constexpr std::array kPolicies = {Policy::kLatency, Policy::kFair, Policy::kFifo};

uint64_t seed_from_environment() {
  const char* text = std::getenv("EXPERTD_TEST_SEED");
  return text == nullptr ? 1 : std::strtoull(text, nullptr, 10);
}

TEST(Schedule, LatencyPutsLowLatencyInFrontAndKeepsTheOrderOtherwise) {
  SessionShare a;
  SessionShare b;
  const Schedule schedule({Policy::kLatency});
  const Candidate old_ht{Traffic::kThroughput, 1, 100, &a};
  const Candidate new_ht{Traffic::kThroughput, 2, 100, &b};
  const Candidate ll{Traffic::kLatency, 3, 1, &b};
  EXPECT_TRUE(schedule.before(ll, old_ht));
  EXPECT_FALSE(schedule.before(old_ht, ll));
  EXPECT_TRUE(schedule.before(old_ht, new_ht));
}

TEST(Schedule, FifoKnowsNoTraffic) {
  SessionShare a;
  SessionShare b;
  const Schedule schedule({Policy::kFifo});
  EXPECT_TRUE(schedule.before({Traffic::kThroughput, 1, 100, &a}, {Traffic::kLatency, 2, 1, &b}));
  EXPECT_TRUE(schedule.may_launch({Traffic::kThroughput, 1, 100, &a}));
}

TEST(Schedule, WhoWasPassedOverOftenEnoughGoesFirst) {
  SessionShare a;
  SessionShare b;
  Schedule schedule({Policy::kLatency});
  const Candidate waiting{Traffic::kThroughput, 1, 100, &a};
  for (uint64_t i = 0; i < engine::kOvertakesMax; ++i) {
    const Candidate ll{Traffic::kLatency, 2 + i, 1, &b};
    ASSERT_TRUE(schedule.before(ll, waiting)) << i;
    schedule.launched(ll);
    schedule.passed_over(ll, waiting);
  }
  const Candidate next{Traffic::kLatency, 100, 1, &b};
  EXPECT_TRUE(schedule.before(waiting, next));
  schedule.launched(waiting);
  EXPECT_TRUE(schedule.before(next, waiting)) << "its next operation waits anew";
}

TEST(Schedule, FairBoundsWhatASessionHasInFlight) {
  SessionShare share;
  Schedule schedule({Policy::kFair});
  const Candidate ht{Traffic::kThroughput, 1, 100, &share};
  for (uint32_t i = 0; i < engine::kFairPartsMax; ++i) {
    ASSERT_TRUE(schedule.may_launch(ht));
    schedule.launched(ht);
  }
  EXPECT_FALSE(schedule.may_launch(ht));
  EXPECT_TRUE(schedule.may_launch({Traffic::kLatency, 2, 1, &share}));
  schedule.ended(Traffic::kThroughput, &share);
  EXPECT_TRUE(schedule.may_launch(ht));
}

TEST(Schedule, FairGivesEverySessionTheSameBytesWhateverItsOperationsAre) {
  std::mt19937_64 random(seed_from_environment());
  SCOPED_TRACE("EXPERTD_TEST_SEED=" + std::to_string(seed_from_environment()));
  Schedule schedule({Policy::kFair});
  std::array<SessionShare, 3> shares;
  constexpr std::array<uint64_t, 3> kLargest = {1'000, 50'000, 1'000'000};
  std::array<uint64_t, 3> bytes{};
  std::array<uint64_t, 3> next{};
  uint64_t ticket = 0;
  for (uint64_t& size : next) {
    size = 1;
  }
  for (int launches = 0; launches < 20'000; ++launches) {
    std::array<Candidate, 3> waiting;
    for (size_t i = 0; i < waiting.size(); ++i) {
      waiting[i] = {Traffic::kThroughput, ++ticket, next[i], &shares[i]};
    }
    const auto best = std::min_element(waiting.begin(), waiting.end(),
                                       [&](const Candidate& a, const Candidate& b) { return schedule.before(a, b); });
    const size_t chosen = static_cast<size_t>(best - waiting.begin());
    schedule.launched(*best);
    schedule.ended(Traffic::kThroughput, best->share);
    bytes[chosen] += next[chosen];
    next[chosen] = 1 + random() % kLargest[chosen];
  }
  const auto [least, most] = std::minmax_element(bytes.begin(), bytes.end());
  EXPECT_LE(*most - *least, 2 * kLargest.back());
}

TEST(Schedule, ASessionThatWasIdleGetsNoCreditForIt) {
  Schedule schedule({Policy::kFair});
  SessionShare busy;
  SessionShare late;
  for (uint64_t i = 0; i < 1'000; ++i) {
    schedule.launched({Traffic::kThroughput, i + 1, 1'000, &busy});
    schedule.ended(Traffic::kThroughput, &busy);
  }
  uint32_t in_a_row = 0;
  while (schedule.before({Traffic::kThroughput, 5'001, 1'000, &late}, {Traffic::kThroughput, 5'000, 1'000, &busy})) {
    schedule.launched({Traffic::kThroughput, 5'001, 1'000, &late});
    ASSERT_LE(++in_a_row, 2U);
  }
}

TEST(Schedule, HoldsHighThroughputForABoundedTime) {
  Schedule schedule({Policy::kLatency});
  EXPECT_FALSE(schedule.hold(1'000, false, true));
  EXPECT_FALSE(schedule.hold(1'000, true, false));
  EXPECT_TRUE(schedule.hold(2'000, true, true));
  EXPECT_TRUE(schedule.hold(2'000 + engine::kHoldMaxNs - 1, true, true));
  EXPECT_FALSE(schedule.hold(2'000 + engine::kHoldMaxNs, true, true)) << "one turn";
  EXPECT_TRUE(schedule.hold(2'001 + engine::kHoldMaxNs, true, true));
}

TEST(Schedule, HoldsHighThroughputForABoundedNumberOfOvertakings) {
  Schedule schedule({Policy::kLatency});
  EXPECT_TRUE(schedule.hold(1, true, true));
  for (uint32_t i = 0; i < engine::kOvertakesMax; ++i) {
    ASSERT_TRUE(schedule.hold(1, true, true));
    schedule.overtaken();
  }
  EXPECT_FALSE(schedule.hold(1, true, true));
  EXPECT_TRUE(schedule.hold(1, true, true));
}

TEST(Schedule, HoldsNothingUnderTheOtherPolicies) {
  for (const Policy policy : {Policy::kFair, Policy::kFifo}) {
    Schedule schedule({policy});
    EXPECT_FALSE(schedule.hold(1, true, true));
  }
}

/// A device whose parts take a number of chunks, done one per poll by the thread that polls.
class ChunkDevice final : public engine::DevicePort {
 public:
  bool launch(const engine::LaunchSpec& spec, const engine::SlotWords& /*words*/, engine::PartId* part) override {
    if (parts_.size() >= parts_max) {
      return false;
    }
    *part = ++next_;
    parts_[*part] = {spec.own->session.value, spec.own->shape.tokens};
    launched.push_back(spec.own->session.value);
    return true;
  }
  bool poll(engine::PartId part, engine::Outcome* outcome) override {
    Part& polled = parts_.at(part);
    for (const auto& [id, other] : parts_) {
      if (id < part && other.session == polled.session) {
        return false;  // the parts of a session run in order
      }
    }
    worked.push_back(polled.session);
    if (--polled.chunks != 0) {
      return false;
    }
    *outcome = {};
    parts_.erase(part);
    return true;
  }
  bool works_in_poll() const override { return true; }
  bool works(engine::PartId part) const override { return parts_.count(part) != 0; }
  void abort(engine::PartId /*part*/, uint32_t /*reason*/) override {}
  bool settle(engine::PartId /*part*/) override { return true; }
  uint32_t missing(engine::PartId /*part*/, base::RankSet* /*ranks*/) override { return 0; }
  bool busy() const override { return !parts_.empty(); }
  void release_words(const engine::SlotWords& /*words*/, uint32_t /*reason*/) override {}

  size_t parts_max = 256;
  std::vector<uint64_t> launched;  // sessions
  std::vector<uint64_t> worked;    // of each chunk

 private:
  struct Part {
    uint64_t session = 0;
    uint32_t chunks = 1;
  };
  std::map<engine::PartId, Part> parts_;
  engine::PartId next_ = 0;
};

struct OvertakeObserver final : engine::OpObserver {
  void completed(base::DeviceIndex /*device*/, const engine::Request& /*request*/,
                 const expertd_completion& /*completion*/, const engine::HeldUp& /*held_up*/) override {}
  void overtook(base::DeviceIndex /*device*/) override { ++count; }
  uint32_t count = 0;
};

/// One device, and sessions whose local operations take chunks.
struct ChunkWorld {
  explicit ChunkWorld(Policy policy, uint32_t sessions_count = 2)
      : engine(base::DeviceIndex{0}, &port, &wake, &observer, {policy}) {
    for (uint32_t i = 0; i < sessions_count; ++i) {
      sessions.push_back(std::make_unique<engine::EngineSession>(base::SessionId{i + 1}, &completions[i], nullptr));
      engine.add_session(sessions.back().get());
    }
  }
  ~ChunkWorld() {
    for (int turn = 0; turn < 1'000'000 && !engine.idle(); ++turn) {
      (void)engine.run_once(now_ns += 1'000);
    }
    EXPECT_TRUE(engine.idle());
  }
  void submit(uint32_t session, Traffic traffic, uint32_t chunks) {
    engine::Request request = plain_request();
    request.session = sessions[session]->id();
    request.traffic = traffic;
    request.shape.tokens = chunks;
    request.seq = ++submitted[session];
    request.slot = static_cast<uint32_t>((request.seq - 1) % EXPERTD_RING_SLOTS_MAX);
    request.deadline_ns = ~0ULL;
    sessions[session]->request(request.slot) = request;
    engine.submit(sessions[session].get(), request.slot, nullptr);
  }
  size_t completed(uint32_t session) const { return completions.at(session).order.size(); }
  void turn() { (void)engine.run_once(now_ns += 1'000); }

  ChunkDevice port;
  FakeWakePort wake;
  OvertakeObserver observer;
  std::array<FakeCompletionPort, 8> completions;
  std::array<uint64_t, 8> submitted{};
  std::vector<std::unique_ptr<engine::EngineSession>> sessions;
  engine::Engine engine;
  uint64_t now_ns = 0;
};

TEST(EngineSchedule, LowLatencyOvertakesARunningOperationAtItsNextChunk) {
  ChunkWorld world(Policy::kLatency);
  world.submit(0, Traffic::kThroughput, 100);
  world.turn();
  world.turn();
  const size_t chunks = world.port.worked.size();
  world.submit(1, Traffic::kLatency, 3);
  for (int i = 0; i < 3; ++i) {
    world.turn();
  }
  EXPECT_EQ(world.completed(1), 1U);
  EXPECT_EQ(world.completed(0), 0U);
  EXPECT_EQ(std::count(world.port.worked.begin() + static_cast<std::ptrdiff_t>(chunks), world.port.worked.end(), 1U),
            0);
  EXPECT_EQ(world.observer.count, 1U);
}

TEST(EngineSchedule, FifoLetsNobodyOvertake) {
  ChunkWorld world(Policy::kFifo);
  world.submit(0, Traffic::kThroughput, 20);
  world.turn();
  world.submit(1, Traffic::kLatency, 1);
  for (int i = 0; i < 18; ++i) {
    world.turn();
    ASSERT_EQ(world.completed(1), 0U);
  }
  world.turn();
  world.turn();
  EXPECT_EQ(world.completed(0), 1U);
  EXPECT_EQ(world.completed(1), 1U);
  EXPECT_EQ(world.observer.count, 0U);
}

TEST(EngineSchedule, FairGivesEachSessionAChunkInTurn) {
  ChunkWorld world(Policy::kFair, 3);
  for (uint32_t session = 0; session < 3; ++session) {
    world.submit(session, Traffic::kThroughput, 50 * (session + 1));
  }
  for (int i = 0; i < 40; ++i) {
    world.turn();
  }
  for (uint64_t session = 1; session <= 3; ++session) {
    EXPECT_EQ(std::count(world.port.worked.begin(), world.port.worked.end(), session), 40);
  }
}

TEST(EngineSchedule, HighThroughputGoesOnBesideLowLatencyThatNeverEnds) {
  ChunkWorld world(Policy::kLatency, 3);
  world.submit(0, Traffic::kThroughput, 30);
  world.turn();
  uint64_t turns = 0;
  while (world.completed(0) == 0) {
    for (const uint32_t session : {1U, 2U}) {
      if (world.sessions[session]->outstanding() < 2) {
        world.submit(session, Traffic::kLatency, 2);
      }
    }
    world.turn();
    ASSERT_LT(++turns, 30 * (engine::kHoldMaxNs / 1'000 + 1)) << "a chunk waited longer than the bound";
  }
  EXPECT_GT(world.observer.count, 30U);
}

TEST(EngineSchedule, LowLatencyCarriesWhatIsInFrontOfItInItsSession) {
  ChunkWorld world(Policy::kLatency);
  world.submit(0, Traffic::kThroughput, 50);
  world.submit(1, Traffic::kThroughput, 5);
  world.submit(1, Traffic::kLatency, 1);
  for (int i = 0; i < 5; ++i) {
    world.turn();
  }
  EXPECT_EQ(world.completed(1), 2U);
  EXPECT_EQ(std::count(world.port.worked.begin(), world.port.worked.end(), 1U), 0);
}

TEST(EngineSchedule, EveryOperationEndsOnceInItsSessionsOrderUnderEveryPolicyAndSeed) {
  for (uint64_t seed = seed_from_environment(); seed < seed_from_environment() + 300; ++seed) {
    SCOPED_TRACE("EXPERTD_TEST_SEED=" + std::to_string(seed));
    std::mt19937_64 random(seed);
    const uint32_t count = static_cast<uint32_t>(1 + random() % 8);
    ChunkWorld world(kPolicies[random() % kPolicies.size()], count);
    world.port.parts_max = 1 + random() % 12;
    for (int i = 0; i < 400; ++i) {
      const uint32_t session = static_cast<uint32_t>(random() % count);
      if (world.sessions[session]->outstanding() < 20) {
        const bool latency = random() % 2 == 0;
        world.submit(session, latency ? Traffic::kLatency : Traffic::kThroughput,
                     static_cast<uint32_t>(1 + random() % (latency ? 3 : 40)));
      }
      if (random() % 3 != 0) {
        world.turn();
      }
    }
    for (int turn = 0; turn < 1'000'000 && !world.engine.idle(); ++turn) {
      world.turn();
    }
    for (uint32_t session = 0; session < count; ++session) {
      ASSERT_EQ(world.completed(session), world.submitted[session]);
      ASSERT_TRUE(std::is_sorted(world.completions[session].order.begin(), world.completions[session].order.end()));
    }
  }
}

}  // namespace
}  // namespace expertd::test
