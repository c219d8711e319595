// SPDX-License-Identifier: Apache-2.0
// Label gpu. What one tenant does must not reach another: an operation whose doorbell never rings.
#include <map>

#include "tests/device/process_fixture.h"

namespace expertd::device_test {
namespace {

class ProcessNeighbour : public ProcessTest {
 protected:
  ProcessNeighbour() : ProcessTest(1, seconds(100)) {}

  using Times = std::vector<std::pair<std::string, double>>;  // ms of every step, in order

  /// The whole life of a session on GPU 0 with registered memory; killed at the end or detached.
  Times life(const std::string& name, bool killed) {
    SCOPED_TRACE(name);
    Times times;
    const auto client = make_client();
    if (!machine().host) {
      expect_ok(*client, "cuda 0", seconds(60));
    }
    const auto step = [&](const std::string& label, const std::string& command) {
      const uint64_t begin = support::monotonic_ns();
      expect_ok(*client, command);
      times.emplace_back(label, support::elapsed_ms(begin));
    };
    step("attach", "attach " + daemon_->attach_socket() + " " + device(0) + " " + name);
    step("register", "memory malloc");
    step("join", "join " + name + " 0 1 normal");
    step("100 rounds", "rounds 25 4");
    step("unregister", "release");
    step("window", "memory window");
    // Mappings that could not be closed yet may hold launches back.
    step("100 rounds after it", "rounds 25 4");
    if (killed) {
      step("register again", "memory malloc");  // so that it dies with something registered
    }
    const Gauges before = gauges(*daemon_);
    if (!killed) {
      step("leave", "leave");
      step("detach", "detach");
    }
    const uint64_t begin = support::monotonic_ns();
    client->signal_kill();
    times.emplace_back(killed ? "kill to reclaimed" : "end to reclaimed", reclaimed_ms(before, begin));
    return times;
  }

  double reclaimed_ms(const Gauges& before, uint64_t begin_ns) {
    Gauges now;
    const bool good = support::wait_until(
        [&] {
          now = gauges(*daemon_);
          return now.there && now.sessions < before.sessions && now.quarantined_bytes == 0 &&
                 now.reaped == before.reaped + 1;
        },
        seconds(10));
    EXPECT_TRUE(good) << now.sessions << " sessions, " << now.quarantined_bytes << " bytes quarantined, "
                      << now.reaped - before.reaped << " reclaimed";
    return support::elapsed_ms(begin_ns);
  }
};

/// MiB of GPU 0 that are free no more.
double gone_mib(const std::vector<double>& before, const std::vector<double>& now) {
  return before.empty() || now.empty() ? 0 : (before[0] - now[0]) / (1 << 20);
}

TEST_F(ProcessNeighbour, OfAnOperationWhoseDoorbellNeverRingsLivesAsAlone) {
  constexpr double kTimes = 3;
  constexpr double kExtraMs = 250;  // of a step that takes next to nothing alone
  constexpr double kSlackMib = 24;  // three blocks of 16 MiB were registered meanwhile
  ASSERT_TRUE(start_daemon());
  life("warm", false);
  std::map<bool, Times> alone;
  for (const bool killed : {false, true}) {
    alone[killed] = life(killed ? "alone-killed" : "alone", killed);
  }
  // Its deadline is far beyond this case: nothing may end by it.
  const auto silent = make_client();
  ASSERT_TRUE(attach(*silent, 0, "silent"));
  expect_ok(*silent, "join silent 0 1 normal 600000");
  expect_ok(*silent, "rounds 5 4");
  if (!machine().host) {
    ASSERT_TRUE(is_ok(expect_ok(*silent, "hold")));
  }
  ASSERT_TRUE(is_ok(expect_ok(*silent, "submit 600000")));
  const std::vector<double> free_before = free_bytes();
  for (const bool killed : {false, true}) {
    Series compared;
    const Times beside = life(killed ? "beside-killed" : "beside", killed);
    ASSERT_EQ(beside.size(), alone[killed].size());
    for (size_t i = 0; i < beside.size(); ++i) {
      const double before = alone[killed][i].second;
      std::printf("  %-20s alone %9.2f ms, beside an operation that never starts %9.2f ms\n", beside[i].first.c_str(),
                  before, beside[i].second);
      compared.push_back({beside[i].first, {before}});
      compared.push_back({"->", {beside[i].second}});
      EXPECT_LT(beside[i].second, kTimes * before + support::bound_ms(kExtraMs)) << beside[i].first;
    }
    figure("a life alone -> beside an operation that never starts, ms", compared);
  }
  // Host devices have no stream that could be held back.
  EXPECT_EQ(number_in(expect_ok(*silent, "query"), "done"), machine().host ? 1 : 0) << "it was to stay parked";
  const double parked_mib = gone_mib(free_before, free_bytes());
  expect_ok(*silent, "open");
  expect_ok(*silent, "wait 10000");
  expect_ok(*silent, "rounds 5 4");
  double left_mib = 0;
  const bool back = support::wait_until(
      [&] {
        left_mib = gone_mib(free_before, free_bytes());
        return left_mib <= kSlackMib;
      },
      seconds(10));
  std::printf("figure memory of ended sessions still held: %.0f MiB beside the operation, %.0f MiB after it\n",
              parked_mib, left_mib);
  EXPECT_TRUE(back);
}

}  // namespace
}  // namespace expertd::device_test
