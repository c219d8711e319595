// SPDX-License-Identifier: Apache-2.0
// lane_latency [TRANSPORT] [ROUNDS]: how long a small message of the latency lane takes there and back between two
// processes, alone and while the throughput lane carries as much as it can both ways. Both in turns, so that what else
// the machine does meets both; on each side a thread polls as the loop of a rank, and does nothing else, so that what
// is measured is the fabric. Prints a line per round and the ratio of the p99 over all.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "daemon/base/clock.h"
#include "daemon/fabric/fabric.h"
#include "tests/fabric/identity_text.h"

namespace expertd::bench {
namespace {

using engine::FabricLane;
using engine::MessageHeader;
using engine::MessageKind;

constexpr uint64_t kSmallBytes = 4096;
constexpr uint64_t kPhaseNs = 400'000'000;
constexpr uint64_t kLimitNs = 10'000'000'000;

/// One side: its rank answers or measures small messages, and keeps large ones under way while `busy`.
class Side final : public engine::WakePort, public fabric::FabricObserver {
 public:
  Side(uint32_t own, const std::string& transport) : own_(own) {
    fabric::FabricOptions options;
    options.name = own == 0 ? "first" : "second";
    options.heartbeat.interval_ns = 1'000'000'000;  // a machine that is busy with others loses no peer
    for (fabric::LaneOptionList& lane : options.lanes) {
      lane = {{"transports", transport}};
      if (transport == "tcp") {
        lane.push_back({"devices", "lo"});
      }
    }
    auto made = fabric::Fabric::create(options, this, this);
    if (!made.is_ok()) {
      std::fprintf(stderr, "%s\n", made.status().message().c_str());
      std::exit(1);
    }
    fabric_ = std::move(made).value();
  }

  ~Side() override {
    stop_.store(true);
    if (rank_.joinable()) {
      rank_.join();
    }
  }
  Side(const Side&) = delete;
  Side& operator=(const Side&) = delete;

  void open(FILE* from, int to) {
    const std::string line = fabric_test::identity_to_text(fabric_->identity()) + "\n";
    (void)!::write(to, line.data(), line.size());
    std::vector<char> read(65536);
    if (std::fgets(read.data(), static_cast<int>(read.size()), from) == nullptr) {
      std::exit(1);
    }
    const fabric::NodeIdentity other = fabric_test::identity_from_text(read.data());
    require(fabric_->connect(other));
    const uint64_t deadline_ns = base::now_ns() + kLimitNs;
    while (!up_.load()) {
      if (base::now_ns() > deadline_ns) {
        std::fprintf(stderr, "the other side does not answer\n");
        std::exit(1);
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    fabric::GroupLink link;
    link.key = 1;
    link.epoch = 1;
    link.placement.own_node = own_;
    link.placement.ranks_of = {{0}, {1}};
    link.placement.node_of = {0, 1};
    link.placement.index_of = {0, 0};
    const uint64_t own_id = fabric_->identity().node_id;
    link.node_ids =
        own_ == 0 ? std::vector<uint64_t>{own_id, other.node_id} : std::vector<uint64_t>{other.node_id, own_id};
    link.devices = {{0}};
    auto opened = fabric_->open_group(link);
    require(opened.status());
    port_ = std::move(opened).value();
    // Nobody sends before both have opened it and look at what comes.
    rank_ = std::thread([this] { rank_main(); });
    (void)!::write(to, "o\n", 2);
    if (std::fgets(read.data(), static_cast<int>(read.size()), from) == nullptr) {
      std::exit(1);
    }
  }

  struct Phase {
    bool busy = false;
    std::vector<uint64_t> times;  // nanoseconds
    uint64_t large_bytes = 0;     // that came in
  };

  /// Small messages one after the other, phase by phase.
  const std::vector<Phase>& measure(uint32_t rounds) {
    phases_.resize(1 + 2 * rounds);  // the first is for warming up
    for (size_t i = 0; i < phases_.size(); ++i) {
      phases_[i].busy = i != 0 && i % 2 == 0;
      phases_[i].times.reserve(1'000'000);
    }
    end_ns_ = base::now_ns() + kPhaseNs;
    const uint64_t deadline_ns = base::now_ns() + 2 * phases_.size() * kPhaseNs + kLimitNs;
    begin_.store(true);
    while (!done_.load()) {
      if (lost_.load() || base::now_ns() > deadline_ns) {
        std::fprintf(stderr, "the other side does not answer\n");
        std::exit(1);
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    return phases_;
  }

  /// The rank's loop polls.
  void wake(base::DeviceIndex /*device*/) override {}
  void node_up(uint64_t /*node_id*/, const std::string& /*name*/) override { up_.store(true); }
  void node_lost(uint64_t /*id*/, const std::string& /*name*/, fabric::LossCause /*cause*/,
                 const std::string& /*detail*/) override {
    lost_.store(true);
  }
  void rank_gone(uint64_t /*key*/, uint32_t /*rank*/, uint64_t /*through*/) override {}
  void view_message(uint64_t /*key*/, uint32_t /*node*/, const engine::ViewMessage& /*message*/) override {}
  void beat(fabric::LaneKind /*lane*/, uint64_t /*now_ns*/) override {}
  bool lost() const { return lost_.load(); }

 private:
  static void require(const base::Status& status) {
    if (!status.is_ok()) {
      std::fprintf(stderr, "%s\n", status.message().c_str());
      std::exit(1);
    }
  }
  void rank_main() {
    while (!stop_.load(std::memory_order_relaxed)) {
      turn();
    }
  }
  void turn() {
    if (begin_.load(std::memory_order_relaxed) && begin_.exchange(false)) {
      send_small(0);
    }
    engine::Arrival arrival;
    while (port_->receive(own_, &arrival)) {
      const MessageHeader header = arrival.header;
      large_bytes_ += header.lane == FabricLane::kThroughput ? arrival.bytes : 0;
      port_->release(own_, arrival);
      if (header.lane == FabricLane::kLatency) {
        small_arrived(header);
      }
    }
    if (busy_) {
      send_large();
    }
  }
  void small_arrived(const MessageHeader& header) {
    if (own_ == 1) {
      busy_ = header.entries != 0;
      send_small(0);
      return;
    }
    const uint64_t now_ns = base::now_ns();
    phases_[phase_].times.push_back(now_ns - sent_ns_);
    if (now_ns >= end_ns_) {
      phases_[phase_].large_bytes = large_bytes_;
      large_bytes_ = 0;
      if (++phase_ == phases_.size()) {
        busy_ = false;
        done_.store(true);
        return;
      }
      busy_ = phases_[phase_].busy;
      end_ns_ = now_ns + kPhaseNs;
    }
    send_small(busy_ ? 1 : 0);
  }
  void send_small(uint32_t entries) {
    const engine::SendBuffer buffer = port_->take(own_, FabricLane::kLatency);
    sent_ns_ = base::now_ns();
    port_->send(own_, buffer,
                {.kind = MessageKind::kRows,
                 .lane = FabricLane::kLatency,
                 .op = 1,
                 .node = 1 - own_,
                 .targets = 1,
                 .entries = entries},
                kSmallBytes);
  }
  void send_large() {
    for (auto buffer = port_->take(own_, FabricLane::kThroughput); buffer.data != nullptr;
         buffer = port_->take(own_, FabricLane::kThroughput)) {
      port_->send(
          own_, buffer,
          {.kind = MessageKind::kRows, .lane = FabricLane::kThroughput, .op = 1, .node = 1 - own_, .targets = 1},
          buffer.capacity);
    }
  }

  const uint32_t own_;
  std::atomic<bool> up_{false};
  std::atomic<bool> lost_{false};
  std::atomic<bool> begin_{false};
  std::atomic<bool> stop_{false};
  std::atomic<bool> done_{false};
  bool busy_ = false;
  uint64_t large_bytes_ = 0;
  uint64_t sent_ns_ = 0;
  uint64_t end_ns_ = 0;
  std::vector<Phase> phases_;
  size_t phase_ = 0;
  std::unique_ptr<fabric::Fabric> fabric_;
  std::unique_ptr<engine::FabricPort> port_;
  std::thread rank_;
};

double percentile_us(std::vector<uint64_t> times, double share) {
  std::sort(times.begin(), times.end());
  return times.empty()
             ? 0
             : static_cast<double>(times[static_cast<size_t>(share * static_cast<double>(times.size() - 1))]) / 1e3;
}

int run(const std::string& transport, uint32_t rounds, int from, int to) {
  Side side(0, transport);
  side.open(::fdopen(from, "r"), to);
  std::vector<uint64_t> all[2];
  const std::vector<Side::Phase>& phases = side.measure(rounds);
  for (size_t i = 1; i < phases.size(); ++i) {
    const Side::Phase& phase = phases[i];
    all[phase.busy].insert(all[phase.busy].end(), phase.times.begin(), phase.times.end());
    std::printf("%s %-6s p50 %7.1f us  p99 %7.1f us  of %zu, large %.2f GB/s in\n", transport.c_str(),
                phase.busy ? "beside" : "alone", percentile_us(phase.times, 0.5), percentile_us(phase.times, 0.99),
                phase.times.size(), static_cast<double>(phase.large_bytes) / static_cast<double>(kPhaseNs));
  }
  std::printf("%s beside over alone: p50 %.2f  p99 %.2f\n", transport.c_str(),
              percentile_us(all[1], 0.5) / percentile_us(all[0], 0.5),
              percentile_us(all[1], 0.99) / percentile_us(all[0], 0.99));
  return 0;
}

}  // namespace
}  // namespace expertd::bench

int main(int argc, char** argv) {
  using namespace expertd::bench;
  const std::string transport = argc > 1 ? argv[1] : "tcp";
  const auto rounds = static_cast<uint32_t>(argc > 2 ? std::atoi(argv[2]) : 5);
  int there[2];
  int back[2];
  if (::pipe(there) != 0 || ::pipe(back) != 0) {
    return 1;
  }
  const pid_t child = ::fork();
  if (child == 0) {
    Side side(1, transport);
    side.open(::fdopen(there[0], "r"), back[1]);
    const pid_t parent = ::getppid();
    while (!side.lost() && ::getppid() == parent) {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
    ::_exit(0);
  }
  const int code = run(transport, rounds, back[0], there[1]);
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
  return code;
}
