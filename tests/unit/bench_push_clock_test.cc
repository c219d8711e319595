// SPDX-License-Identifier: Apache-2.0
// The clocks of a GPU and its host, of which only round trips are known.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "tests/bench/push_clock.h"

namespace expertd::bench {
namespace {

/// Trips of two clocks that drift by `drift`, and how long each command was under way.
struct Made {
  std::vector<PushTrip> trips;
  std::vector<double> ways_ns;
};

Made make_trips(uint64_t seed, double drift, double there_ns, double back_ns) {
  constexpr uint64_t kGpuZero = 1'700'000'000'000'000'000;
  constexpr uint64_t kHostZero = 5'000'000'000;
  std::mt19937_64 random(seed);
  const auto unit = [&random] { return static_cast<double>(random() >> 11) * 0x1p-53; };
  Made made;
  double now = 0;  // of the GPU
  const auto to_host = [&](double gpu) { return kHostZero + static_cast<uint64_t>(std::llround(gpu * (1 + drift))); };
  for (int i = 0; i < 5'000; ++i) {
    const double there = there_ns + unit() * 200 + (random() % 100 == 0 ? 20'000 : 0);
    const double back = back_ns + unit() * 400;
    PushTrip trip;
    trip.sent_ns = kGpuZero + static_cast<uint64_t>(now);
    trip.observed_ns = to_host(now + there);
    trip.seen_ns = kGpuZero + static_cast<uint64_t>(now + there + back);
    made.trips.push_back(trip);
    made.ways_ns.push_back(there);
    now += there + back + 20'000;
  }
  return made;
}

TEST(BenchPushClock, TheWayThereLiesWithinTheErrorOfWhatItSays) {
  for (const double drift : {0.0, 40e-6, -40e-6}) {
    SCOPED_TRACE(drift);
    const Made made = make_trips(3, drift, 600, 1'100);
    const PushClock clock(made.trips);
    EXPECT_NEAR(clock.drift_ns_per_s(), drift * 1e9, 2'000);
    EXPECT_LT(clock.error_ns(), 1'000);  // half of the shortest trip, and a little
    EXPECT_GT(clock.error_ns(), 700);
    for (size_t i = 0; i < made.trips.size(); ++i) {
      const double found = clock.between(made.trips[i].sent_ns, made.trips[i].observed_ns);
      ASSERT_NEAR(found, made.ways_ns[i], clock.error_ns() + 100) << "trip " << i;
    }
  }
}

TEST(BenchPushClock, EqualWaysAreFoundAsTheyAre) {
  const Made made = make_trips(4, 15e-6, 800, 700);  // with the random part the shortest are 800 and 700
  const PushClock clock(made.trips);
  double worst = 0;
  for (size_t i = 0; i < made.trips.size(); ++i) {
    worst =
        std::max(worst, std::abs(clock.between(made.trips[i].sent_ns, made.trips[i].observed_ns) - made.ways_ns[i]));
  }
  EXPECT_LT(worst, 150);
}

}  // namespace
}  // namespace expertd::bench
