// SPDX-License-Identifier: Apache-2.0
// NodeWorld: a group whose ranks sit on several nodes, each with host devices of its own, in one process. Runs the
// operations of random cases through them, polling ranks and delivering messages in a random order. One thread.
#pragma once

#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "daemon/device/host/host_device.h"
#include "tests/support/fake_fabric.h"
#include "tests/support/fake_ports.h"
#include "tests/support/random_case_buffers.h"

namespace expertd::test {

/// `ranks` ranks on `nodes` nodes, each with one at least; one placement per node.
std::vector<engine::Placement> random_placements(support::Random* random, uint32_t ranks, uint32_t nodes);

struct NodeOpSettings {
  uint32_t generation = 1;
  bool with_weights = false;
  bool low_latency = false;
};

class NodeWorld {
 public:
  static constexpr uint32_t kView = 3;  // the epoch of all operations
  /// `message_bytes`: 0 for little more than the case needs.
  NodeWorld(const support::RandomCase& random_case, uint32_t nodes, uint64_t seed);

  /// One operation on all active ranks, which finish() runs with all others that were started; in_rows as for
  /// make_combine, null for a dispatch. The reports go into `memory`, which outlives it.
  void start(const support::RandomCase& random_case, const NodeOpSettings& settings,
             const std::vector<uint32_t>* in_rows, support::GroupMemory* memory);
  /// Empty, or what went wrong.
  std::string finish();
  /// Both.
  std::string run(const support::RandomCase& random_case, const NodeOpSettings& settings,
                  const std::vector<uint32_t>* in_rows, support::GroupMemory* memory) {
    start(random_case, settings, in_rows, memory);
    return finish();
  }

  const engine::Placement& placement() const { return network->placement(0); }
  /// The rank's end of the last operation.
  const engine::Outcome& outcome(uint32_t rank) const { return running_.back().ranks[rank].outcome; }
  /// Called with every request before it is launched.
  std::function<void(uint32_t rank, engine::Request*)> change;
  /// Instead of the case's active ranks, those that a rank's node takes for active.
  std::function<base::RankSet(uint32_t rank)> active_of;
  /// Ranks that did not end by themselves and were aborted; and what each missed.
  base::RankSet aborted;
  std::vector<std::pair<uint32_t, base::RankSet>> missed;
  std::unique_ptr<FakeNetwork> network;

 private:
  /// Wakes loops of one node.
  struct Wake final : engine::WakePort {
    void wake(base::DeviceIndex device) override {
      world->awake_[world->placement().ranks_of[node][device.value]] = true;
    }
    NodeWorld* world = nullptr;
    uint32_t node = 0;
  };
  struct RankOp {
    engine::Request request;
    std::deque<engine::Mapping> mappings;
    engine::PartId part = 0;  // 0: not launched
    bool ended = true;
    engine::Outcome outcome{};
  };
  struct Op {
    uint64_t number = 0;
    base::RankSet active;
    std::deque<RankOp> ranks;
    std::deque<engine::ExchangeFlags> flags;  // per node
    support::GroupMemory* memory = nullptr;
  };
  static void give(RankOp* op, uint32_t tensor, const void* data);
  static void fill_request(const kernels::OpParams& params, RankOp* op);
  bool launch(Op* op, uint32_t rank);
  bool launch_next(uint32_t rank);
  void poll(uint32_t rank);
  std::vector<uint32_t> ready_ranks() const;
  std::string abort_rest();

  support::Random random_;
  engine::GroupShape shape_;
  std::vector<std::unique_ptr<device::HostGroupDirectory>> directories_;  // per node
  std::vector<std::unique_ptr<device::HostDevice>> devices_;              // per rank
  std::vector<Wake> wakes_;                                               // per node
  std::vector<bool> awake_;                                               // per rank: its loop looks at its part again
  std::deque<Op> running_;                                                // and those that ended since the last start
  uint64_t number_ = 0;
  bool finished_ = false;
};

}  // namespace expertd::test
