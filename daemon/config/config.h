// SPDX-License-Identifier: Apache-2.0
// The effective configuration as typed values, where each came from, and the call that builds it.
// Value types: `main` calls load() before any thread starts and again on SIGHUP; everyone else gets
// a const Config&. Never logs, never exits. The defaults live in the table of keys (key_table.cc) alone:
// a default-constructed Config is zero, see defaults().
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "daemon/base/log.h"
#include "daemon/base/status.h"

namespace expertd::config {

inline constexpr std::string_view kDefaultConfigPath = "/etc/expertd/expertd.toml";

enum class Kernels { kAuto, kGeneric };
enum class Schedule { kLatency, kFair, kFifo };

/// device.gpus: every GPU, none, or the named ones (indices such as "0" or UUIDs such as
/// "GPU-...").
struct GpuSelection {
  enum class Kind { kAuto, kNone, kList };
  Kind kind = Kind::kAuto;
  std::vector<std::string> names;  // kList only, in the order given, without duplicates
};

struct ControlConfig {
  std::string socket;         // resolved: never empty after load()
  std::string attach_socket;  // resolved: never empty after load()
  uint32_t socket_mode = 0;
  std::string socket_group;            // empty: leave the group of the process
  std::vector<uint32_t> allowed_uids;  // empty: everyone whom the file mode lets in
  bool enable_reflection = false;
  uint32_t max_sessions = 0;
  uint32_t max_sessions_per_uid = 0;
  uint64_t call_deadline_max_ns = 0;
  uint64_t drain_timeout_ns = 0;
};

struct DeviceConfig {
  int32_t hosts = 0;  // -1: two when no GPU is served, else none
  GpuSelection gpus;
  std::optional<uint64_t> pool_bytes;  // empty: "auto"
  uint64_t pool_max_bytes = 0;         // 0: no cap
  bool peer_access = false;
  Kernels kernels = Kernels::kAuto;
  uint32_t link_sms = 0;
};

struct EngineConfig {
  uint32_t spin_us = 0;
  Schedule schedule = Schedule::kLatency;
  uint64_t op_deadline_ns = 0;
  uint64_t first_op_deadline_ns = 0;
  uint32_t handles_per_session = 0;
  uint32_t ring_slots = 0;  // a power of two
};

struct SessionConfig {
  uint32_t max_buffers = 0;
  uint32_t max_groups = 0;
  uint64_t max_window_bytes = 0;      // 0: no limit
  uint64_t max_registered_bytes = 0;  // 0: no limit
};

enum class FabricRoute { kAuto, kRail, kSpread };
enum class AdaptiveRouting { kDefault, kOff, kTry, kOn };

/// One lane's own; what is not given is left to UCX.
struct FabricLaneConfig {
  std::vector<std::string> devices;  // empty: fabric.devices
  int32_t service_level = -1;
  int32_t traffic_class = -1;
  AdaptiveRouting adaptive_routing = AdaptiveRouting::kDefault;
};

struct FabricConfig {
  bool enabled = false;
  std::string listen;                   // "ADDRESS:PORT", literal
  std::string advertise;                // host, without a port; empty: that of listen, or the name of the host
  std::vector<std::string> rendezvous;  // "HOST:PORT" in order, or one "dns:NAME:PORT"; this or etcd when enabled
  std::vector<std::string> etcd;        // "http://HOST:PORT"; in place of rendezvous
  std::string etcd_prefix;              // of the keys there
  uint64_t etcd_lease_ns = 0;
  std::string node_name;                  // empty: the name of the host
  std::string cluster_key_file;           // empty: no key
  std::vector<std::string> transports;    // empty: UCX's choice
  std::vector<std::string> devices;       // of lanes without their own; empty: UCX's choice
  std::array<FabricLaneConfig, 3> lanes;  // control, latency, throughput
  FabricRoute route = FabricRoute::kAuto;
  uint32_t heartbeat_ms = 0;
  uint32_t heartbeat_misses = 0;
  bool require_direct = false;
  uint64_t message_bytes = 0;
  uint32_t messages_per_peer = 0;
  uint32_t max_nodes = 0;
};

struct MetricsConfig {
  bool enabled = false;
  std::string address;  // an IPv4 or IPv6 literal
  uint16_t port = 0;    // 0: any free port
};

struct LogConfig {
  base::LogLevel level = base::LogLevel::kInfo;
  base::LogFormat format = base::LogFormat::kLogfmt;
};

struct Config {
  std::string runtime_directory;  // absolute, without a trailing slash
  ControlConfig control;
  DeviceConfig device;
  EngineConfig engine;
  SessionConfig session;
  FabricConfig fabric;
  MetricsConfig metrics;
  LogConfig log;
};

/// One key's effective value as a TOML literal (which is a JSON literal too) and where it came
/// from: "default", "file PATH:LINE", "environment NAME" or "flag --name".
struct KeyReport {
  std::string name;
  std::string value;
  std::string origin;
};

using EnvironmentLookup = std::function<std::optional<std::string>(const std::string& name)>;

struct LoadRequest {
  std::string path{kDefaultConfigPath};
  bool path_given = false;  // a missing file is an error only if it was asked for
  /// Full key name ("engine.spin_us") and text; a later pair wins over an earlier one.
  std::vector<std::pair<std::string, std::string>> flags;
  EnvironmentLookup environment;  // empty: no environment
};

struct LoadedConfig {
  Config config;
  std::vector<KeyReport> report;  // every key, in the order of the table
  std::string file;               // the file that was read; empty when there was none
};

/// Flag > environment > file > default. A failure's message has one line per mistake found, each
/// "PATH:LINE:COL: ...", "environment NAME: ..." or "flag --name: ...".
base::Result<LoadedConfig> load(const LoadRequest& request);

/// The configuration of an absent file, no environment and no flags.
Config defaults();

/// What a reload would change: `reloadable` takes effect while running, the rest needs a restart.
struct Difference {
  std::vector<std::string> reloadable;
  std::vector<std::string> restart_required;
};
Difference compare(const std::vector<KeyReport>& running, const std::vector<KeyReport>& fresh);

}  // namespace expertd::config
