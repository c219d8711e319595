// SPDX-License-Identifier: Apache-2.0
#include "daemon/app/operator_view.h"

#include <algorithm>
#include <array>
#include <limits>

#include "daemon/base/clock.h"
#include "daemon/base/log.h"

namespace expertd::app {

namespace {

constexpr std::array<const char*, EXPERTD_OP_COUNT> kOpNames = {"none",    "barrier",     "layout",    "dispatch",
                                                                "combine", "ll_dispatch", "ll_combine"};

}  // namespace

session::StatusSnapshot OperatorView::status() {
  session::StatusSnapshot status;
  status.version = facts_.version;
  status.state = metrics::kStateNames[static_cast<size_t>(state())];
  status.generation = facts_.generation;
  status.uptime_ns = base::now_ns() - facts_.generation;
  status.devices = sessions_->devices();
  status.groups = sessions_->groups();
  for (const session::DeviceSnapshot& device : status.devices) {
    status.sessions += device.sessions;
  }
  status.sessions_max = facts_.sessions_max;
  status.metrics_address = metrics_address_;
  status.schedule = facts_.schedule;
  status.cuda_build = facts_.cuda_build;
  status.cuda_driver = facts_.cuda_driver;
  status.fabric = fabric_status(nodes_());
  return status;
}

std::vector<session::SessionSnapshot> OperatorView::sessions() {
  return sessions_->sessions();
}

std::vector<session::OpCounterSnapshot> OperatorView::counters() {
  std::vector<session::OpCounterSnapshot> rows;
  for (uint32_t device = 0; device < blocks_->devices().size(); ++device) {
    for (uint32_t op = EXPERTD_OP_BARRIER; op < EXPERTD_OP_COUNT; ++op) {
      const metrics::OpTotals totals = blocks_->devices()[device]->ops.totals(op);
      rows.push_back({kOpNames[op], device, totals.ok, totals.failed, totals.tokens, totals.local_bytes,
                      totals.remote_bytes, totals.duration_ns});
    }
  }
  return rows;
}

base::Result<session::PeersSnapshot> OperatorView::peers() {
  const NodeFacts facts = nodes_();
  if (!facts.answered.is_ok()) {
    return facts.answered;
  }
  return peers_snapshot(facts);
}

session::WaitsSnapshot OperatorView::waits(uint32_t last) {
  session::WaitsSnapshot out;
  out.node = nodes_().name;
  out.groups = sessions_->groups();
  const auto is_there = [&out](uint64_t id) {
    return std::any_of(out.groups.begin(), out.groups.end(), [id](const auto& group) { return group.id.value == id; });
  };
  const size_t most = last == 0 ? metrics::WaitLog::kRecords : last;
  for (const auto& device : blocks_->devices()) {
    for (const metrics::WaitRecord& wait : device->waits.last(most)) {
      if (is_there(wait.group) && wait.op < kOpNames.size()) {
        out.waits.push_back({base::GroupId{wait.group}, wait.number, kOpNames[wait.op], wait.rank, wait.last_rank,
                             wait.waited_ns, wait.counts});
      }
    }
  }
  return out;
}

uint32_t OperatorView::drain(uint64_t timeout_ns) {
  const uint32_t told = static_cast<uint32_t>(sessions_->sessions().size());
  start_drain_(timeout_ns);
  return told;
}

base::Result<std::string> OperatorView::set_log_level(const std::string& level) {
  const std::string previous(base::log_level_name(base::log_level()));
  for (int candidate = 0; candidate <= static_cast<int>(base::LogLevel::kError); ++candidate) {
    if (base::log_level_name(static_cast<base::LogLevel>(candidate)) == level) {
      base::set_log_level(static_cast<base::LogLevel>(candidate));
      return previous;
    }
  }
  return base::Status(EXPERTD_REASON_CONFIG_BAD_VALUE,
                      "log level \"" + level + "\", allowed trace, debug, info, warn, error");
}

metrics::Gauges OperatorView::gauges() {
  metrics::Gauges gauges;
  gauges.state = metrics::kStateNames[static_cast<size_t>(state())];
  gauges.drain_in_progress = state() == State::kDraining;
  gauges.config_last_load_success = config_loaded_.load(std::memory_order_relaxed);
  gauges.log_dropped = base::log_dropped_total();
  for (const session::DeviceSnapshot& device : sessions_->devices()) {
    metrics::DeviceGauges values;
    values.gpu = metrics::gpu_label(device.kind == "host", device.index);
    values.pool_used_bytes = device.window_bytes + device.table_bytes;
    values.pool_registered_bytes = device.registered_bytes;
    values.pool_quarantined_bytes = device.quarantined_bytes;
    values.pool_free_bytes = facts_.pool_max_bytes - std::min(facts_.pool_max_bytes, device.pool_used_bytes);
    const bool context_known = device.kind == "host" || !device.context_source.empty();
    values.context_bytes =
        context_known ? static_cast<double>(device.context_bytes) : std::numeric_limits<double>::quiet_NaN();
    values.ring_slots_capacity = facts_.ring_slots;
    values.healthy = device.healthy;
    values.mps_active = device.mps_active;
    gauges.sessions += device.sessions;
    gauges.devices.push_back(std::move(values));
  }
  gauges.fabric = fabric_gauges(nodes_());
  gauges.drain_remaining_sessions = gauges.drain_in_progress ? gauges.sessions : 0;
  return gauges;
}

}  // namespace expertd::app
