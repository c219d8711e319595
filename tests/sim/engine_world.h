// SPDX-License-Identifier: Apache-2.0
// The simulated node of engine_sim_test: devices with engines, one or two groups over them, clients that submit,
// refuse, leave and die. Everything random comes from one seed. A device's loop runs only when something woke it, as
// the real one does, so that a forgotten wake-up shows as an operation that never ends.
#pragma once

#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "daemon/engine/engine.h"
#include "tests/support/fake_engine_group.h"
#include "tests/support/fake_sim_device.h"

namespace expertd::test {

inline constexpr uint64_t kFarNs = 1'000'000'000'000ULL;

/// What one rank saw of one operation.
struct RankResult {
  uint32_t rank = 0;
  uint32_t own_refusal = 0;
  bool left = false;  // the rank was lost by then
  expertd_completion completion{};
};

class EngineWorld final : public engine::WakePort {
 public:
  explicit EngineWorld(uint64_t seed);
  /// Runs to the end; the first breach of an invariant, or empty.
  std::string run();
  uint64_t operations() const { return operations_; }

  void wake(base::DeviceIndex device) override { devices_[device.value]->woken = true; }

 private:
  struct Client;
  struct Device {
    std::unique_ptr<SimDevice> port;
    std::unique_ptr<engine::Engine> engine;
    bool woken = true;
    uint64_t last_run_ns = ~0ULL;
  };
  struct Membership {
    uint32_t group = 0;
    engine::RankState state;
    bool left = false;
  };
  struct Client final : engine::CompletionPort {
    EngineWorld* world = nullptr;
    uint32_t device = 0;
    std::unique_ptr<engine::EngineSession> session;
    std::vector<Membership> memberships;
    std::vector<uint32_t> plan;  // membership of each operation to submit; ~0: a local one
    size_t submitted = 0;
    uint32_t window = 1;
    std::vector<uint32_t> completed;  // times, by sequence
    uint64_t dies_ns = ~0ULL;         // its lease ends
    uint64_t closes_ns = ~0ULL;       // its loop hears of it
    bool closed = false;
    bool drained = false;
    void complete(const engine::Request& request, const expertd_completion& completion) override;
  };
  struct Refusal {
    uint32_t reason = 0;
    bool mismatch = false;
  };

  uint64_t pick(uint64_t count) { return random_() % count; }
  bool chance(uint32_t percent) { return pick(100) < percent; }
  void build_groups();
  void build_clients();
  void add_client(uint32_t group, uint32_t rank, bool both);
  engine::Request make_request(const Client& client, const Membership* membership);
  void submit_some(Client& client, uint64_t count);
  void end_sessions(Client& client);
  void change_masks();
  void wake_group(uint32_t group);
  bool step();
  bool advance_time();
  bool all_done() const;
  void breach(const std::string& text);
  std::string describe() const;
  void check_operation(uint32_t group, uint64_t number, const std::vector<RankResult>& results);
  void check_end();

  std::mt19937_64 random_;
  uint64_t now_ns_ = 1;
  uint32_t devices_count_ = 0;
  bool faults_ = false;     // sessions may end
  bool deadlines_ = false;  // deadlines may pass
  bool masks_ = false;      // ranks may be excluded by request
  bool strays_ = false;     // the excluded ones stay so, and theirs are the only deadlines that pass
  uint32_t refusals_percent_ = 0;
  uint64_t operations_ = 0;
  uint64_t mask_change_ns_ = ~0ULL;
  std::vector<std::unique_ptr<Device>> devices_;
  std::vector<std::unique_ptr<engine::GroupShared>> groups_;
  std::vector<std::unique_ptr<Client>> clients_;
  std::map<std::pair<uint32_t, uint64_t>, std::vector<RankResult>> results_;
  FakeObserver observer_;
  std::string breach_;
};

}  // namespace expertd::test
