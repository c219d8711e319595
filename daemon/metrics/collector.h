// SPDX-License-Identifier: Apache-2.0
// Serves the metrics over HTTP: at each scrape it sums the counter blocks and asks the GaugeSource. `main` creates it
// before READY and ends it; scrapes run on its own threads. The only part that knows prometheus (collector.cc). It
// never writes a counter, except that maxima since the last scrape start anew.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "daemon/base/status.h"
#include "daemon/metrics/blocks.h"

namespace expertd::metrics {

struct DeviceGauges {
  std::string gpu;  // as given to Blocks::add_device; values of the same label are taken together
  uint64_t pool_free_bytes = 0;
  uint64_t pool_used_bytes = 0;
  uint64_t pool_registered_bytes = 0;
  uint64_t pool_quarantined_bytes = 0;
  double context_bytes = 0;  // NaN: not known
  uint32_t ring_slots_capacity = 0;
  bool healthy = true;
  bool mps_active = false;
};

/// Of the fabric, with counters since the start; as it is where there is none.
struct FabricGauges {
  struct Lane {
    uint64_t sent_messages = 0;
    uint64_t sent_bytes = 0;
    uint64_t received_messages = 0;
    uint64_t received_bytes = 0;
    uint64_t in_flight = 0;
    uint64_t deferred = 0;
  };
  /// To another node as last measured from here, by lane and device; at most a cluster's nodes and a lane's rails.
  struct Way {
    std::string node;
    std::string lane;
    std::string device;
    uint64_t latency_p50_ns = 0;
    uint64_t latency_p99_ns = 0;
    uint64_t bytes_per_second = 0;
  };
  bool enabled = false;
  std::vector<Way> mesh;
  std::string backend = "staged";
  std::string transports;
  bool rendezvous_up = false;
  uint32_t groups = 0;
  std::array<uint64_t, kPeerStateNames.size()> peers{};
  std::array<uint64_t, kPeerFailureNames.size()> failures{};
  std::array<uint64_t, kDropNames.size()> dropped{};
  std::array<Lane, kLaneNames.size()> lanes{};
  std::array<uint64_t, kRttBoundsNs.size() + 1> rtt{};  // heartbeats by bound; the last is beyond all
  uint64_t rtt_sum_ns = 0;
};

struct Gauges {
  std::string state;  // one of kStateNames
  uint32_t sessions = 0;
  bool config_last_load_success = true;
  bool drain_in_progress = false;
  uint32_t drain_remaining_sessions = 0;
  uint64_t log_dropped = 0;
  std::vector<DeviceGauges> devices;
  FabricGauges fabric;
};

/// Asked at every scrape, on a thread of the HTTP server; must not wait for a device loop.
class GaugeSource {
 public:
  virtual ~GaugeSource() = default;
  virtual Gauges gauges() = 0;
};

struct BuildInfo {
  std::string version;
  std::string commit;
  std::string cuda;  // empty: built without
  std::string ucx;   // empty: built without
  std::string abi;   // "1.2"
};

struct CollectorOptions {
  std::string address = "127.0.0.1";
  uint16_t port = 0;  // 0: any free port
  BuildInfo build;
};

class MetricsServer {
 public:
  /// Serves from here on. ADDRESS_IN_USE, naming the address, when it cannot be bound. `source` must live until the
  /// destructor or detach().
  static base::Result<std::unique_ptr<MetricsServer>> create(const CollectorOptions& options,
                                                             std::shared_ptr<const Blocks> blocks, GaugeSource& source);
  /// Takes 2 s, which the HTTP library needs to stop its threads.
  ~MetricsServer();
  MetricsServer(const MetricsServer&) = delete;
  MetricsServer& operator=(const MetricsServer&) = delete;

  /// "127.0.0.1:9464", with the port that was chosen.
  std::string address() const;
  uint16_t port() const;
  /// What a scrape would get.
  std::string render() const;
  /// For a fast exit: stops asking blocks and source (scrapes get nothing from here on) and leaves the HTTP threads to
  /// the end of the process, so that the destructor returns at once.
  void detach();

 private:
  struct Parts;  // what needs prometheus' headers

  explicit MetricsServer(std::unique_ptr<Parts> parts);

  std::unique_ptr<Parts> parts_;
};

}  // namespace expertd::metrics
