// SPDX-License-Identifier: Apache-2.0
// Label gpu. Clients killed in the middle of operations with registered GPU memory: their peers hear of it by name, a
// neighbour pair under load notices nothing, and everything comes back. Each kill is counted as a hit only when the
// client had handed over an operation whose end it had not seen when it died.
//
// EXPERTD_TEST_KILLS=50: hits asked of each mode; more of them get more time.
#include <fcntl.h>
#include <gtest/gtest-spi.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <random>
#include <thread>

#include "tests/device/client_rounds.h"
#include "tests/device/process_fixture.h"

namespace expertd::device_test {
namespace {

constexpr uint32_t kHitsAsked = 50;
constexpr uint32_t kDepth = 8;           // rounds of a batch, two operations each
constexpr size_t kPrepared = 4;          // processes with a context that wait for their turn
constexpr double kReapedMs = 100;        // end of file to reclaimed
constexpr size_t kSpareDescriptors = 8;  // of connections that come and go; a leak would be one per kill
constexpr double kSlackMib = 64;         // what a driver may keep of a GPU for itself; a leaked block per kill is 800
constexpr double kRssSlackMib = 32;      // what the allocator keeps; the log and the tables of the process do not grow
constexpr seconds kCycleLimit(25);
constexpr double kLoopMsPerHit = 1'500;  // rather fewer kills with figures than a watchdog
constexpr uint32_t kSetUpSeconds = 35;

uint32_t hits_asked() {
  const char* const given = std::getenv("EXPERTD_TEST_KILLS");
  const int asked = given == nullptr ? 0 : std::atoi(given);
  return asked > 0 ? static_cast<uint32_t>(asked) : kHitsAsked;
}

/// Not every kill hits.
uint32_t most_kills() {
  return hits_asked() * 3 / 2;
}

double loop_ms() {
  return kLoopMsPerHit * hits_asked();
}

seconds case_limit() {
  return seconds(kSetUpSeconds + static_cast<uint32_t>(loop_ms() / 1e3));
}

/// Memory of the daemon's process that is resident.
double resident_mib(const support::DaemonProcess& daemon) {
  const std::string status = support::read_text("/proc/" + std::to_string(daemon.pid()) + "/status");
  const size_t at = status.find("VmRSS:");
  return at == std::string::npos ? 0 : std::strtod(status.c_str() + at + 6, nullptr) / 1024;
}

/// Counters that outlive the process that counts.
class SharedCounts {
 public:
  SharedCounts() {
    support::write_text(directory_.file("counts"), std::string(sizeof(OpCounts), '\0'));
    const int fd = ::open(path().c_str(), O_RDWR | O_CLOEXEC);
    memory_ = ::mmap(nullptr, sizeof(OpCounts), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    ::close(fd);
  }
  ~SharedCounts() { ::munmap(memory_, sizeof(OpCounts)); }
  SharedCounts(const SharedCounts&) = delete;
  SharedCounts& operator=(const SharedCounts&) = delete;
  std::string path() const { return directory_.file("counts"); }
  const OpCounts* operator->() const { return static_cast<const OpCounts*>(memory_); }

 private:
  support::TempDir directory_;
  void* memory_ = nullptr;
};

struct Victim {
  std::unique_ptr<SharedCounts> counts = std::make_unique<SharedCounts>();
  std::unique_ptr<FaultClient> client = make_client();
};

class ProcessDeath : public ProcessTest {
 protected:
  ProcessDeath() : ProcessTest(2, case_limit()) {}

  bool prepare(bool low_latency) {
    mode_ = low_latency ? "ll" : "normal";
    bool good = start_daemon();
    for (uint32_t i = 0; i < 2 && good; ++i) {
      neighbours_[i] = make_client();
      survivors_[i] = make_client();
      good = attach(*neighbours_[i], i, "neighbour-" + std::to_string(i)) &&
             attach(*survivors_[i], i, "survivor-" + std::to_string(i));
    }
    return good && all_ok(pair(neighbours_), "join neighbours # 2 normal") &&
           all_ok(pair(neighbours_), "loop " + std::to_string(kDepth));
  }
  static std::vector<FaultClient*> pair(const std::unique_ptr<FaultClient> (&two)[2]) {
    return {two[0].get(), two[1].get()};
  }

  /// Starts processes ahead, each with a context on the GPU of its turn: that takes longest.
  Victim next_victim() {
    while (waiting_.size() < kPrepared) {
      waiting_.emplace_back();
      if (!machine().host) {
        waiting_.back().client->send("cuda " + std::to_string(prepared_ % 2));
      }
      ++prepared_;
    }
    Victim victim = std::move(waiting_.front());
    waiting_.pop_front();
    if (!machine().host) {
      EXPECT_TRUE(is_ok(victim.client->answer(seconds(60)).value_or(""))) << "a context of a new process";
    }
    return victim;
  }

  /// A group of the victim and the survivor on the other GPU, both in batches; false when it did not come to that.
  bool start_group(FaultClient* const (&ranks)[2], const std::string& name) {
    return all_ok({ranks[0], ranks[1]}, "join " + name + " # 2 " + mode_) &&
           all_ok({ranks[0], ranks[1]}, "loop " + std::to_string(kDepth));
  }
  /// The neighbours and the survivors, with nothing of anybody else left.
  bool only_those_who_stay() {
    return support::wait_until(
        [this] {
          const Gauges now = gauges(*daemon_);
          return now.there && now.sessions == 4 && now.quarantined_bytes == 0;
        },
        seconds(15));
  }
  bool kill_one();
  bool kill_one_under_mps(bool* contexts_lost);
  bool ended_with_its_contexts();
  bool expect_reclaimed(const Gauges& before, uint64_t kill_ns);
  void run(bool low_latency);
  void report(const Ledger& before, const std::vector<double>& free_before);
  void expect_memory_back(const std::vector<double>& free_before);
  std::string title() const { return mode_ + (machine().mps ? " operations under MPS" : " operations"); }

  std::string mode_;
  std::unique_ptr<FaultClient> neighbours_[2];
  std::unique_ptr<FaultClient> survivors_[2];
  std::deque<Victim> waiting_;
  uint32_t prepared_ = 0;
  double rss_before_mib_ = 0;
  uint32_t cycle_ = 0;
  uint32_t hits_ = 0;
  uint32_t running_ = 0;  // of the hits, those whose peer's operation had begun on its GPU
  std::minstd_rand random_{17};
  std::vector<double> lost_ms_, closed_ms_, reclaimed_ms_, reaped_ms_;
};

bool ProcessDeath::expect_reclaimed(const Gauges& before, uint64_t kill_ns) {
  Gauges now;
  double closed_ms = 0;
  support::note_wait("the daemon to take back what a killed client had");
  const bool good = support::wait_until(
      [&] {
        now = gauges(*daemon_);
        const bool closed = now.there && now.sessions < before.sessions;
        closed_ms = closed && closed_ms == 0 ? support::elapsed_ms(kill_ns) : closed_ms;
        return closed && now.quarantined_bytes == 0 && now.reaped == before.reaped + 1;
      },
      seconds(10));
  EXPECT_TRUE(good) << "kill " << cycle_ << ": " << now.sessions << " sessions of " << before.sessions << ", "
                    << now.quarantined_bytes << " bytes quarantined, " << now.reaped - before.reaped << " reclaimed";
  if (good) {
    closed_ms_.push_back(closed_ms);
    reclaimed_ms_.push_back(support::elapsed_ms(kill_ns));
    reaped_ms_.push_back(1e3 * (now.reap_seconds - before.reap_seconds));
  }
  return good;
}

bool ProcessDeath::kill_one() {
  const uint32_t side = cycle_ % 2;  // the victim's GPU and rank
  Victim victim = next_victim();
  FaultClient& survivor = *survivors_[1 - side];
  FaultClient* ranks[2] = {side == 0 ? victim.client.get() : &survivor, side == 0 ? &survivor : victim.client.get()};
  if (!is_ok(expect_ok(*victim.client, "count " + victim.counts->path())) ||
      !attach(*victim.client, side, "victim-" + std::to_string(cycle_)) ||
      !start_group(ranks, "struck-" + std::to_string(cycle_))) {
    return false;
  }
  const Gauges before = gauges(*daemon_);
  // Not a synchronisation: the phase of the operations at which death comes.
  std::this_thread::sleep_for(std::chrono::microseconds(random_() % 20'000));
  const uint64_t kill_ns = support::monotonic_ns();
  victim.client->signal_kill();
  const std::string end = survivor.answer(kCycleLimit).value_or("no answer");
  const double lost_ms = support::elapsed_ms(kill_ns);
  const std::string expected = "failed PEER_LOST rank=" + std::to_string(side) + " ";
  EXPECT_EQ(end.rfind(expected, 0), 0u) << "kill " << cycle_ << ": " << end;
  const bool reclaimed = expect_reclaimed(before, kill_ns);
  const bool ended = victim.client->reap();
  EXPECT_TRUE(ended) << "kill " << cycle_ << ": the process does not end";
  const bool hit = ended && (*victim.counts)->issued.load() > (*victim.counts)->ended.load();
  hits_ += hit ? 1 : 0;
  running_ += hit && number_in(end, "ran") == 1 ? 1 : 0;
  lost_ms_.push_back(lost_ms);
  const bool left = is_ok(expect_ok(survivor, "leave"));
  for (const auto& neighbour : neighbours_) {
    const auto said = neighbour->answer(milliseconds(1));
    EXPECT_FALSE(said.has_value()) << "kill " << cycle_ << ", a neighbour: " << *said;
  }
  return end.rfind(expected, 0) == 0 && reclaimed && left;
}

// NVIDIA leaves undefined what a client that is killed with work on the GPU does to the others of its MPS server. What
// is promised under MPS is that the daemon notices and ends for a restart.
bool ProcessDeath::ended_with_its_contexts() {
  const int code = daemon_->wait_exit(seconds(5));
  if (code < 0 && daemon_->running()) {
    return false;
  }
  std::printf("figure %s: the kill number %u cost the daemon its contexts, %u kills had an operation in flight\n",
              title().c_str(), cycle_, hits_);
  EXPECT_EQ(code, 75);
  waiting_.clear();
  return true;
}

/// What fails after the daemon lost its contexts to the kill is no failure of its own.
bool ProcessDeath::kill_one_under_mps(bool* contexts_lost) {
  testing::TestPartResultArray failures;
  bool good = false;
  {
    const testing::ScopedFakeTestPartResultReporter reporter(
        testing::ScopedFakeTestPartResultReporter::INTERCEPT_ALL_THREADS, &failures);
    good = kill_one();
  }
  *contexts_lost = !good && ended_with_its_contexts();
  for (int i = 0; i < failures.size() && !*contexts_lost; ++i) {
    ADD_FAILURE() << failures.GetTestPartResult(i).message();
  }
  return good;
}

void ProcessDeath::run(bool low_latency) {
  ASSERT_TRUE(prepare(low_latency));
  {
    // What is made once for the first of its kind stays.
    Victim first = next_victim();
    FaultClient* ranks[2] = {first.client.get(), survivors_[1].get()};
    ASSERT_TRUE(attach(*first.client, 0, "first") && start_group(ranks, "first"));
    for (const std::string& end : stop_loops(*ranks[0], *ranks[1], "rounds 1 " + std::to_string(kDepth))) {
      EXPECT_TRUE(is_ok(end)) << end;
    }
    first.client->kill();
    survivors_[1] = make_client();
    ASSERT_TRUE(attach(*survivors_[1], 1, "survivor-1"));
    waiting_.clear();
    prepared_ = 0;
  }
  ASSERT_TRUE(only_those_who_stay());
  const Ledger before = ledger();
  const std::vector<double> free_before = free_bytes();
  rss_before_mib_ = resident_mib(*daemon_);
  const uint64_t begin = support::monotonic_ns();
  uint32_t failures = 0;
  while (hits_ < hits_asked() && cycle_ < most_kills() && failures < 3 && support::elapsed_ms(begin) < loop_ms()) {
    bool contexts_lost = false;
    const bool good = machine().mps ? kill_one_under_mps(&contexts_lost) : kill_one();
    ++cycle_;
    if (contexts_lost) {
      return;
    }
    if (good) {
      continue;
    }
    ++failures;
    for (uint32_t i = 0; i < 2; ++i) {
      survivors_[i] = make_client();
      attach(*survivors_[i], i, "survivor-" + std::to_string(i));
    }
    EXPECT_TRUE(only_those_who_stay());
  }
  std::printf("%u kills took %.1f s\n", cycle_, support::elapsed_ms(begin) / 1e3);
  waiting_.clear();
  EXPECT_GE(hits_, hits_asked()) << "of " << cycle_ << " kills";
  report(before, free_before);
}

void ProcessDeath::expect_memory_back(const std::vector<double>& free_before) {
  // The daemon's own account says nothing of mappings that were never closed: they hold the dead client's memory.
  std::vector<double> free_now;
  const auto taken_mib = [&](size_t gpu) { return (free_before[gpu] - free_now[gpu]) / (1 << 20); };
  const bool back = support::wait_until(
      [&] {
        free_now = free_bytes();
        bool all = true;
        for (size_t gpu = 0; gpu < free_now.size(); ++gpu) {
          all = all && taken_mib(gpu) <= kSlackMib;
        }
        return all;
      },
      seconds(10));
  Series taken;
  for (size_t gpu = 0; gpu < free_now.size(); ++gpu) {
    taken.push_back({"GPU " + std::to_string(gpu), {taken_mib(gpu)}});
  }
  figure(title() + ", MiB gone from the GPUs after all", taken);
  EXPECT_TRUE(back) << "memory of killed clients is still held";
  const double rss_mib = resident_mib(*daemon_);
  figure(title() + ", MiB of the daemon's process", {{"before", {rss_before_mib_}}, {"after", {rss_mib}}});
  EXPECT_LE(rss_mib, rss_before_mib_ + kRssSlackMib);
}

void ProcessDeath::report(const Ledger& before, const std::vector<double>& free_before) {
  std::printf("figure %s: %u kills, %u with an operation in flight, %u of these begun on the peer's device\n",
              title().c_str(), cycle_, hits_, running_);
  figure(title() + ", ms p50/max", {{"kill to PEER_LOST", lost_ms_},
                                    {"to the lease's end", closed_ms_},
                                    {"to nothing quarantined", reclaimed_ms_},
                                    {"lease's end to reclaimed, daemon's clock", reaped_ms_}});
  std::vector<double> sorted = reaped_ms_;
  std::sort(sorted.begin(), sorted.end());
  EXPECT_LT(sorted.empty() ? 0 : sorted[sorted.size() / 2], support::bound_ms(kReapedMs));
  Ledger now;
  EXPECT_TRUE(support::wait_until(
      [&] {
        now = ledger();
        return now.holds_as_much_as(before);
      },
      seconds(10)))
      << now.text() << " instead of " << before.text();
  EXPECT_LE(now.descriptors, before.descriptors + kSpareDescriptors);
  std::printf("before: %s\nafter:  %s\n", before.text().c_str(), now.text().c_str());
  expect_memory_back(free_before);
  Series neighbours;
  for (const std::string& end : stop_loops(*neighbours_[0], *neighbours_[1], "rounds 1 " + std::to_string(kDepth))) {
    EXPECT_TRUE(is_ok(end) && number_in(end, "batches") > 0) << "a neighbour: " << end;
    neighbours.push_back({text_in(end, "batches") + " verified batches of 8, us p50/max",
                          {number_in(end, "p50_us"), number_in(end, "p50_us"), number_in(end, "max_us")}});
  }
  figure(title() + ", neighbours", neighbours);
}

TEST_F(ProcessDeath, OfClientsInNormalOperations) {
  run(false);
}

TEST_F(ProcessDeath, OfClientsInLowLatencyOperations) {
  run(true);
}

}  // namespace
}  // namespace expertd::device_test
