// SPDX-License-Identifier: Apache-2.0
// What operators and the metrics collector are shown, gathered from sessions, devices and counters. Control threads and
// scrape threads; owned by main through the Daemon.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <string>

#include "daemon/app/node_view.h"
#include "daemon/metrics/blocks.h"
#include "daemon/metrics/collector.h"
#include "daemon/session/service.h"

namespace expertd::app {

enum class State : uint32_t { kStarting = 0, kReady = 1, kDegraded = 2, kDraining = 3 };

struct ViewFacts {
  std::string version;
  uint64_t generation = 0;
  uint32_t sessions_max = 0;
  uint32_t ring_slots = 0;
  uint64_t pool_max_bytes = 0;
  std::string schedule;
  std::string cuda_build;
  std::string cuda_driver;
};

class OperatorView final : public session::OperatorApi, public metrics::GaugeSource {
 public:
  OperatorView(ViewFacts facts, session::SessionService* sessions, std::shared_ptr<metrics::Blocks> blocks,
               std::function<void(uint64_t timeout_ns)> start_drain, std::function<NodeFacts()> nodes,
               session::MeshApi* mesh)
      : facts_(std::move(facts)),
        sessions_(sessions),
        blocks_(std::move(blocks)),
        start_drain_(std::move(start_drain)),
        nodes_(std::move(nodes)),
        mesh_(mesh) {}

  void set_state(State state) { state_.store(state, std::memory_order_release); }
  State state() const { return state_.load(std::memory_order_acquire); }
  /// Whether the configuration could be read when it was last asked to be.
  void set_config_loaded(bool loaded) { config_loaded_.store(loaded, std::memory_order_relaxed); }
  void set_metrics_address(const std::string& address) { metrics_address_ = address; }

  session::StatusSnapshot status() override;
  std::vector<session::SessionSnapshot> sessions() override;
  std::vector<session::OpCounterSnapshot> counters() override;
  base::Result<session::PeersSnapshot> peers() override;
  session::WaitsSnapshot waits(uint32_t last) override;
  session::MeshApi* mesh() override { return mesh_; }
  uint32_t drain(uint64_t timeout_ns) override;
  base::Result<std::string> set_log_level(const std::string& level) override;
  metrics::Gauges gauges() override;

 private:
  ViewFacts facts_;
  session::SessionService* sessions_;
  std::shared_ptr<metrics::Blocks> blocks_;
  std::function<void(uint64_t timeout_ns)> start_drain_;
  std::function<NodeFacts()> nodes_;
  session::MeshApi* const mesh_;  // null: the fabric is off
  std::string metrics_address_;
  std::atomic<State> state_{State::kStarting};
  std::atomic<bool> config_loaded_{true};  // without a configuration there is no view
};

}  // namespace expertd::app
