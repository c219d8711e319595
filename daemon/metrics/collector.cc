// SPDX-License-Identifier: Apache-2.0
#include "daemon/metrics/collector.h"

#include <prometheus/collectable.h>
#include <prometheus/exposer.h>
#include <prometheus/metric_family.h>
#include <prometheus/text_serializer.h>

#include <algorithm>
#include <exception>
#include <map>
#include <mutex>
#include <utility>

#include "daemon/metrics/label_sums.h"
#include "daemon/metrics/process_facts.h"

namespace expertd::metrics {

namespace {

using prometheus::ClientMetric;
using prometheus::MetricFamily;

constexpr double kSecondsPerNs = 1e-9;
constexpr size_t kHttpThreads = 2;

/// One family under construction; label values are given in the catalogue's order.
class FamilyWriter {
 public:
  explicit FamilyWriter(Metric metric) : metric_(metric) {
    const MetricInfo& info = info_of(metric);
    family_.name = info.name;
    family_.help = info.help;
    family_.type = info.type == MetricType::kCounter ? prometheus::MetricType::Counter
                   : info.type == MetricType::kGauge ? prometheus::MetricType::Gauge
                                                     : prometheus::MetricType::Histogram;
    for (std::string_view rest = info.labels; !rest.empty();) {
      const size_t comma = std::min(rest.find(','), rest.size());
      labels_.emplace_back(rest.substr(0, comma));
      rest.remove_prefix(std::min(comma + 1, rest.size()));
    }
  }

  void put(const std::vector<std::string_view>& values, double value) {
    ClientMetric& metric = add(values);
    metric.counter.value = value;
    metric.gauge.value = value;
  }
  void put(const std::vector<std::string_view>& values, uint64_t value) { put(values, static_cast<double>(value)); }

  void put(const std::vector<std::string_view>& values, const HistogramSum& sum) {
    ClientMetric& metric = add(values);
    const std::span<const uint64_t> bounds_ns = bounds_of(metric_);
    uint64_t cumulative = 0;
    for (size_t i = 0; i < bounds_ns.size(); ++i) {
      cumulative += i < sum.buckets.size() ? sum.buckets[i] : 0;
      // A quotient is the nearest double of the decimal bound; a product with 1e-9 is not.
      metric.histogram.bucket.push_back({cumulative, static_cast<double>(bounds_ns[i]) / 1e9});
    }
    cumulative += sum.buckets.empty() ? 0 : sum.buckets.back();
    metric.histogram.sample_count = cumulative;
    metric.histogram.sample_sum = static_cast<double>(sum.sum_ns) * kSecondsPerNs;
  }

  MetricFamily take() { return std::move(family_); }

 private:
  ClientMetric& add(const std::vector<std::string_view>& values) {
    ClientMetric& metric = family_.metric.emplace_back();
    for (size_t i = 0; i < labels_.size() && i < values.size(); ++i) {
      metric.label.push_back({labels_[i], std::string(values[i])});
    }
    return metric;
  }

  const Metric metric_;
  std::vector<std::string> labels_;
  MetricFamily family_;
};

/// The whole page of one scrape.
class Page {
 public:
  Page(const Blocks& blocks, const Gauges& gauges, const BuildInfo& build)
      : blocks_(blocks),
        gauges_(gauges),
        build_(build),
        devices_(devices_by_label(blocks)),
        device_gauges_(gauges_by_label(devices_, gauges)) {}

  std::vector<MetricFamily> write() {
    write_state();
    write_op_counts();
    write_op_executors();
    write_op_durations();
    write_rings();
    write_sessions();
    write_devices();
    write_fabric();
    write_peers();
    write_threads();
    write_process();
    return std::move(families_);
  }

 private:
  FamilyWriter start(Metric metric) { return FamilyWriter(metric); }
  void end(FamilyWriter& writer) { families_.push_back(writer.take()); }
  void put_single(Metric metric, double value) {
    FamilyWriter writer(metric);
    writer.put({}, value);
    end(writer);
  }
  void put_single(Metric metric, uint64_t value) { put_single(metric, static_cast<double>(value)); }

  void write_state() {
    FamilyWriter build = start(Metric::kBuildInfo);
    build.put({build_.version, build_.commit, build_.cuda, build_.ucx, build_.abi}, 1.0);
    end(build);
    FamilyWriter state = start(Metric::kState);
    for (const std::string_view name : kStateNames) {
      state.put({name}, uint64_t{name == gauges_.state});
    }
    end(state);
    put_single(Metric::kConfigLastLoadSuccess, uint64_t{gauges_.config_last_load_success});
    put_single(Metric::kDrainInProgress, uint64_t{gauges_.drain_in_progress});
    put_single(Metric::kDrainRemainingSessions, uint64_t{gauges_.drain_remaining_sessions});
    put_single(Metric::kLogDropped, gauges_.log_dropped);
  }

  void write_op_counts() {
    FamilyWriter ops = start(Metric::kOps);
    FamilyWriter failed = start(Metric::kOpFailed);
    FamilyWriter tokens = start(Metric::kOpTokens);
    FamilyWriter bytes = start(Metric::kOpBytes);
    FamilyWriter late = start(Metric::kOpDeadlineExceeded);
    for (uint32_t op = 1; op < EXPERTD_OP_COUNT; ++op) {
      const std::string_view name = kOpNames[op];
      for (const auto& [gpu, devices] : devices_) {
        ops.put({name, gpu, "ok"}, sum_over(devices, [op](const auto& d) { return d.ops.totals(op).ok; }));
        ops.put({name, gpu, "failed"}, sum_over(devices, [op](const auto& d) { return d.ops.totals(op).failed; }));
        tokens.put({name, gpu}, sum_over(devices, [op](const auto& d) { return read(d.ops.block(op).tokens); }));
        bytes.put({name, gpu, "local"},
                  sum_over(devices, [op](const auto& d) { return read(d.ops.block(op).local_bytes); }));
        bytes.put({name, gpu, "remote"},
                  sum_over(devices, [op](const auto& d) { return read(d.ops.block(op).remote_bytes); }));
        bytes.put({name, gpu, "fabric"},
                  sum_over(devices, [op](const auto& d) { return read(d.ops.block(op).fabric_bytes); }));
      }
      for (size_t i = 1; i < kReasonCount; ++i) {
        failed.put({name, kReasons.name[i]},
                   over_all([op, i](const auto& d) { return read(d.ops.block(op).ended[i]); }));
      }
      for (size_t i = 0; i < kMissingNames.size(); ++i) {
        late.put({name, kMissingNames[i]},
                 over_all([op, i](const auto& d) { return read(d.ops.block(op).deadline_exceeded[i]); }));
      }
    }
    for (FamilyWriter* writer : {&ops, &failed, &tokens, &bytes, &late}) {
      end(*writer);
    }
  }

  /// Of the executors, those that a device of the label can have.
  void write_op_executors() {
    FamilyWriter executed = start(Metric::kOpExecuted);
    FamilyWriter sm_seconds = start(Metric::kOpSmSeconds);
    FamilyWriter overtakes = start(Metric::kOpOvertakes);
    for (const auto& [gpu, devices] : devices_) {
      overtakes.put({gpu}, sum_over(devices, [](const auto& d) { return d.ops.overtakes(); }));
    }
    for (uint32_t op = 1; op < EXPERTD_OP_COUNT; ++op) {
      for (const auto& [gpu, devices] : devices_) {
        for (size_t i = EXPERTD_COMPLETION_EXECUTOR_HOST; i < kExecutorNames.size(); ++i) {
          if ((gpu == kHostLabel) == (i == EXPERTD_COMPLETION_EXECUTOR_HOST)) {
            executed.put({kOpNames[op], gpu, kExecutorNames[i]},
                         sum_over(devices, [op, i](const auto& d) { return read(d.ops.block(op).executed[i]); }));
          }
        }
        const uint64_t sm_ns = sum_over(devices, [op](const auto& d) { return read(d.ops.block(op).sm_ns); });
        sm_seconds.put({kOpNames[op], gpu}, static_cast<double>(sm_ns) * kSecondsPerNs);
      }
    }
    end(executed);
    end(sm_seconds);
    end(overtakes);
  }

  void write_op_durations() {
    FamilyWriter by_phase = start(Metric::kOpDuration);
    for (uint32_t op = 1; op < EXPERTD_OP_COUNT; ++op) {
      for (size_t phase = 0; phase < kPhaseNames.size(); ++phase) {
        HistogramSum sum;
        for (const auto& device : blocks_.devices()) {
          sum.add(device->ops.block(op).phases[phase]);
        }
        by_phase.put({kOpNames[op], kPhaseNames[phase]}, sum);
      }
    }
    end(by_phase);
    FamilyWriter total = start(Metric::kOpTotalDuration);
    for (const auto& [gpu, devices] : devices_) {
      total.put({"ht", gpu}, total_of(devices, {EXPERTD_OP_DISPATCH, EXPERTD_OP_COMBINE}));
      total.put({"ll", gpu}, total_of(devices, {EXPERTD_OP_LL_DISPATCH, EXPERTD_OP_LL_COMBINE}));
    }
    end(total);
  }

  void write_rings() {
    FamilyWriter rejected = start(Metric::kOpRejected);
    FamilyWriter used = start(Metric::kRingSlotsUsed);
    FamilyWriter capacity = start(Metric::kRingSlotsCapacity);
    FamilyWriter full = start(Metric::kRingFull);
    for (const auto& [gpu, devices] : devices_) {
      for (size_t i = 1; i < kReasonCount; ++i) {
        rejected.put({gpu, kReasons.name[i]}, sum_over(devices, [i](const auto& d) { return d.ops.rejected(i); }));
      }
      uint64_t most = 0;
      for (const Blocks::Device* device : devices) {
        most = std::max(most, device->ops.take_ring_used_max());
      }
      used.put({gpu}, most);
      capacity.put({gpu}, uint64_t{device_gauges_.at(gpu).ring_slots_capacity});
      full.put({gpu}, sum_over(devices, [](const auto& d) { return d.ops.ring_full_count(); }));
    }
    FamilyWriter invalid = start(Metric::kDescriptorInvalid);
    for (size_t i = 1; i < kReasonCount; ++i) {
      invalid.put({kReasons.name[i]}, over_all([i](const auto& d) { return d.ops.invalid(i); }));
    }
    for (FamilyWriter* writer : {&rejected, &used, &capacity, &full, &invalid}) {
      end(*writer);
    }
  }

  void write_sessions() {
    const ProcessCounters& process = blocks_.process();
    put_single(Metric::kSessions, uint64_t{gauges_.sessions});
    put_single(Metric::kSessionsOpened, process.opened());
    FamilyWriter closed = start(Metric::kSessionsClosed);
    for (size_t cause = 0; cause < kCloseCauseNames.size(); ++cause) {
      closed.put({kCloseCauseNames[cause]}, process.closed(cause));
    }
    end(closed);
    FamilyWriter reap = start(Metric::kLeaseReapDuration);
    HistogramSum sum;
    sum.add(process.reap());
    reap.put({}, sum);
    end(reap);
  }

  void write_devices() {
    FamilyWriter pool = start(Metric::kPoolBytes);
    FamilyWriter context = start(Metric::kGpuContextBytes);
    FamilyWriter lost = start(Metric::kGpuContextLost);
    FamilyWriter mps = start(Metric::kGpuMpsActive);
    FamilyWriter healthy = start(Metric::kGpuHealthy);
    for (const auto& [gpu, devices] : devices_) {
      const DeviceGauges& gauges = device_gauges_.at(gpu);
      pool.put({gpu, "free"}, gauges.pool_free_bytes);
      pool.put({gpu, "used"}, gauges.pool_used_bytes);
      pool.put({gpu, "registered"}, gauges.pool_registered_bytes);
      pool.put({gpu, "quarantined"}, gauges.pool_quarantined_bytes);
      context.put({gpu}, gauges.context_bytes);
      lost.put({gpu}, sum_over(devices, [](const auto& d) { return read(d.context_lost); }));
      mps.put({gpu}, uint64_t{gauges.mps_active});
      healthy.put({gpu}, uint64_t{gauges.healthy});
    }
    for (FamilyWriter* writer : {&pool, &context, &lost, &mps, &healthy}) {
      end(*writer);
    }
  }

  void write_fabric() {
    const FabricGauges& fabric = gauges_.fabric;
    FamilyWriter backend = start(Metric::kFabricBackendInfo);
    backend.put({fabric.backend, fabric.transports}, uint64_t{fabric.enabled});
    end(backend);
    FamilyWriter messages = start(Metric::kFabricMessages);
    FamilyWriter bytes = start(Metric::kFabricBytes);
    FamilyWriter in_flight = start(Metric::kFabricInflight);
    FamilyWriter deferred = start(Metric::kFabricDeferred);
    for (size_t i = 0; i < kLaneNames.size(); ++i) {
      const FabricGauges::Lane& lane = fabric.lanes[i];
      messages.put({kLaneNames[i], "sent"}, lane.sent_messages);
      messages.put({kLaneNames[i], "received"}, lane.received_messages);
      bytes.put({kLaneNames[i], "sent"}, lane.sent_bytes);
      bytes.put({kLaneNames[i], "received"}, lane.received_bytes);
      in_flight.put({kLaneNames[i]}, lane.in_flight);
      deferred.put({kLaneNames[i]}, lane.deferred);
    }
    for (FamilyWriter* writer : {&messages, &bytes, &in_flight, &deferred}) {
      end(*writer);
    }
    FamilyWriter latency = start(Metric::kFabricMeshLatency);
    FamilyWriter bandwidth = start(Metric::kFabricMeshBandwidth);
    for (const FabricGauges::Way& way : fabric.mesh) {
      latency.put({way.node, way.lane, way.device, "0.5"}, static_cast<double>(way.latency_p50_ns) / 1e9);
      latency.put({way.node, way.lane, way.device, "0.99"}, static_cast<double>(way.latency_p99_ns) / 1e9);
      bandwidth.put({way.node, way.lane, way.device}, way.bytes_per_second);
    }
    end(latency);
    end(bandwidth);
    put_single(Metric::kGroupsSpanning, uint64_t{fabric.groups});
    put_single(Metric::kRendezvousUp, uint64_t{fabric.rendezvous_up});
  }

  void write_peers() {
    const FabricGauges& fabric = gauges_.fabric;
    const auto put_each = [this](Metric metric, const auto& names, const auto& values) {
      FamilyWriter writer = start(metric);
      for (size_t i = 0; i < names.size(); ++i) {
        writer.put({names[i]}, values[i]);
      }
      end(writer);
    };
    put_each(Metric::kFabricPeers, kPeerStateNames, fabric.peers);
    put_each(Metric::kFabricPeerFailures, kPeerFailureNames, fabric.failures);
    put_each(Metric::kFabricDropped, kDropNames, fabric.dropped);
    FamilyWriter rtt = start(Metric::kFabricHeartbeatRtt);
    HistogramSum sum;
    sum.buckets.assign(fabric.rtt.begin(), fabric.rtt.end());
    sum.sum_ns = fabric.rtt_sum_ns;
    rtt.put({}, sum);
    end(rtt);
  }

  void write_threads() {
    struct Sum {
      uint64_t lag_max_ns = 0;
      uint64_t missed_beats = 0;
    };
    std::map<std::string, Sum, std::less<>> threads;
    for (const auto& thread : blocks_.threads()) {
      Sum& sum = threads[thread->name];
      sum.lag_max_ns = std::max(sum.lag_max_ns, thread->counters.take_lag_max_ns());
      sum.missed_beats += thread->counters.missed_beats();
    }
    FamilyWriter lag = start(Metric::kThreadLoopLag);
    FamilyWriter missed = start(Metric::kWatchdogMissedBeats);
    for (const auto& [name, sum] : threads) {
      lag.put({name}, static_cast<double>(sum.lag_max_ns) * kSecondsPerNs);
      missed.put({name}, sum.missed_beats);
    }
    end(lag);
    end(missed);
  }

  void write_process() {
    const ProcessFacts facts = read_process_facts();
    put_single(Metric::kProcessCpu, facts.cpu_seconds);
    put_single(Metric::kProcessResident, facts.resident_bytes);
    put_single(Metric::kProcessVirtual, facts.virtual_bytes);
    put_single(Metric::kProcessOpenFds, facts.open_fds);
    put_single(Metric::kProcessMaxFds, facts.max_fds);
    put_single(Metric::kProcessStartTime, facts.start_time_seconds);
  }

  uint64_t over_all(const auto& value) const {
    uint64_t sum = 0;
    for (const auto& device : blocks_.devices()) {
      sum += value(*device);
    }
    return sum;
  }
  static HistogramSum total_of(const std::vector<const Blocks::Device*>& devices, std::initializer_list<uint32_t> ops) {
    HistogramSum sum;
    for (const Blocks::Device* device : devices) {
      for (const uint32_t op : ops) {
        sum.add(device->ops.block(op).phases[static_cast<size_t>(Phase::kTotal)]);
      }
    }
    return sum;
  }

  const Blocks& blocks_;
  const Gauges& gauges_;
  const BuildInfo& build_;
  const DevicesByLabel devices_;
  const GaugesByLabel device_gauges_;
  std::vector<MetricFamily> families_;
};

/// What the HTTP server asks. Parked together with it, so it can be cut off from what it reads.
class BlocksCollectable final : public prometheus::Collectable {
 public:
  BlocksCollectable(std::shared_ptr<const Blocks> blocks, GaugeSource* source, BuildInfo build)
      : blocks_(std::move(blocks)), source_(source), build_(std::move(build)) {}

  std::vector<MetricFamily> Collect() const override {
    const std::lock_guard lock(mutex_);
    if (source_ == nullptr) {
      return {};
    }
    const Gauges gauges = source_->gauges();
    return Page(*blocks_, gauges, build_).write();
  }
  void cut_off() {
    const std::lock_guard lock(mutex_);
    source_ = nullptr;
  }

 private:
  mutable std::mutex mutex_;  // source_: a scrape in progress keeps it alive
  const std::shared_ptr<const Blocks> blocks_;
  GaugeSource* source_;
  const BuildInfo build_;
};

std::string with_port(const std::string& address, int port) {
  const bool is_v6 = address.find(':') != std::string::npos && !address.starts_with('[');
  return (is_v6 ? "[" + address + "]" : address) + ":" + std::to_string(port);
}

}  // namespace

struct MetricsServer::Parts {
  std::string address;
  std::shared_ptr<BlocksCollectable> collectable;  // the exposer holds it weakly
  std::unique_ptr<prometheus::Exposer> exposer;
  uint16_t port = 0;
};

base::Result<std::unique_ptr<MetricsServer>> MetricsServer::create(const CollectorOptions& options,
                                                                   std::shared_ptr<const Blocks> blocks,
                                                                   GaugeSource& source) {
  auto parts = std::make_unique<Parts>();
  const std::string wanted = with_port(options.address, options.port);
  parts->collectable = std::make_shared<BlocksCollectable>(std::move(blocks), &source, options.build);
  try {
    parts->exposer = std::make_unique<prometheus::Exposer>(wanted, kHttpThreads);
    const std::vector<int> ports = parts->exposer->GetListeningPorts();
    if (ports.empty()) {
      return base::Status(EXPERTD_REASON_SYSTEM, "the metrics server listens on no port");
    }
    parts->port = static_cast<uint16_t>(ports.front());
    parts->address = with_port(options.address, ports.front());
    parts->exposer->RegisterCollectable(parts->collectable);
  } catch (const std::exception& error) {
    return base::Status(EXPERTD_REASON_ADDRESS_IN_USE,
                        "metrics cannot listen on " + wanted + "; choose another metrics.port (" + error.what() + ")");
  }
  return std::unique_ptr<MetricsServer>(new MetricsServer(std::move(parts)));
}

MetricsServer::MetricsServer(std::unique_ptr<Parts> parts) : parts_(std::move(parts)) {}

MetricsServer::~MetricsServer() {
  if (parts_->collectable != nullptr) {
    parts_->collectable->cut_off();
  }
}

std::string MetricsServer::address() const {
  return parts_->address;
}

uint16_t MetricsServer::port() const {
  return parts_->port;
}

std::string MetricsServer::render() const {
  return prometheus::TextSerializer().Serialize(parts_->collectable->Collect());
}

void MetricsServer::detach() {
  parts_->collectable->cut_off();
  // Reachable for ever, so that leak checkers know it is meant.
  static std::mutex mutex;
  static std::vector<Parts*>* parked = nullptr;
  const std::lock_guard lock(mutex);
  if (parked == nullptr) {
    parked = new std::vector<Parts*>();
  }
  auto* const rest = new Parts();
  rest->address = parts_->address;
  rest->port = parts_->port;
  rest->collectable = parts_->collectable;
  rest->exposer = std::move(parts_->exposer);
  parked->push_back(rest);
}

}  // namespace expertd::metrics
