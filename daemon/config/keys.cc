// SPDX-License-Identifier: Apache-2.0
#include "daemon/config/keys.h"

#include <algorithm>
#include <cctype>
#include <limits>
#include <numeric>

#include "daemon/base/limits.h"

namespace expertd::config {

namespace {

constexpr int64_t kMillisecond = 1'000'000;
constexpr int64_t kSecond = 1'000 * kMillisecond;
constexpr int64_t kHour = 3'600 * kSecond;
constexpr int64_t kMebibyte = 1 << 20;
constexpr int64_t kSizeMax = int64_t{1} << 48;  // 256 TiB: above any node, far below overflow
constexpr int64_t kUidMax = std::numeric_limits<uint32_t>::max() - int64_t{1};  // the last one means "no uid"

uint32_t to_u32(const Value& value) {
  return static_cast<uint32_t>(value.integer);
}
uint64_t to_u64(const Value& value) {
  return static_cast<uint64_t>(value.integer);
}

GpuSelection to_selection(const Value& value) {
  GpuSelection selection;
  if (value.text == "auto") {
    return selection;
  }
  if (value.text == "none") {
    selection.kind = GpuSelection::Kind::kNone;
    return selection;
  }
  selection.kind = GpuSelection::Kind::kList;
  for (size_t begin = 0; begin <= value.text.size();) {
    const size_t end = std::min(value.text.find(',', begin), value.text.size());
    selection.names.push_back(value.text.substr(begin, end - begin));
    begin = end + 1;
  }
  return selection;
}

constexpr Key kKeys[] = {
    {.name = "runtime_directory",
     .type = Type::kPath,
     .default_text = "/run/expertd",
     .sentence = "Directory of the sockets and of the lock file that keeps a second daemon out.",
     .set = [](Config& c, const Value& v) { c.runtime_directory = v.text; }},

    {.section = "control",
     .name = "socket",
     .type = Type::kPath,
     .default_text = "",
     .sentence = "Socket of the gRPC services; empty means control.sock in runtime_directory.",
     .set = [](Config& c, const Value& v) { c.control.socket = v.text; }},
    {.section = "control",
     .name = "attach_socket",
     .type = Type::kPath,
     .default_text = "",
     .sentence = "Socket at which clients attach; empty means attach.sock in runtime_directory.",
     .set = [](Config& c, const Value& v) { c.control.attach_socket = v.text; }},
    {.section = "control",
     .name = "socket_mode",
     .type = Type::kMode,
     .max = 0777,
     .default_text = "0660",
     .sentence = "Permission bits of both sockets; the first gate for clients.",
     .set = [](Config& c, const Value& v) { c.control.socket_mode = to_u32(v); }},
    {.section = "control",
     .name = "socket_group",
     .type = Type::kString,
     .default_text = "",
     .sentence = "Group that owns both sockets; empty keeps the group of the process.",
     .set = [](Config& c, const Value& v) { c.control.socket_group = v.text; }},
    {.section = "control",
     .name = "allowed_uids",
     .type = Type::kIntegerList,
     .max = kUidMax,
     .default_text = "",
     .sentence = "User ids that may attach and call; empty admits all whom socket_mode lets in.",
     .set = [](Config& c, const Value& v) { c.control.allowed_uids = v.list; }},
    {.section = "control",
     .name = "enable_reflection",
     .type = Type::kBool,
     .default_text = "false",
     .sentence = "Serve gRPC reflection, so that grpcurl can list and call the services.",
     .set = [](Config& c, const Value& v) { c.control.enable_reflection = v.integer != 0; }},
    {.section = "control",
     .name = "max_sessions",
     .type = Type::kInteger,
     .min = 1,
     .max = 1024,
     .default_text = "64",
     .sentence = "Sessions attached at the same time; one more is refused with SESSION_LIMIT.",
     .set = [](Config& c, const Value& v) { c.control.max_sessions = to_u32(v); }},
    {.section = "control",
     .name = "max_sessions_per_uid",
     .type = Type::kInteger,
     .min = 1,
     .max = 1024,
     .default_text = "64",
     .sentence = "Sessions of one user id at the same time.",
     .set = [](Config& c, const Value& v) { c.control.max_sessions_per_uid = to_u32(v); }},
    {.section = "control",
     .name = "call_deadline_max",
     .type = Type::kDuration,
     .min = kSecond,
     .max = 24 * kHour,
     .plain_unit = kSecond,
     .default_text = "1h",
     .sentence = "Longest deadline that a control call is granted.",
     .set = [](Config& c, const Value& v) { c.control.call_deadline_max_ns = to_u64(v); }},
    {.section = "control",
     .name = "drain_timeout",
     .type = Type::kDuration,
     .max = kHour,
     .plain_unit = kSecond,
     .default_text = "30s",
     .sentence = "Time that sessions get to finish after SIGTERM before they are closed. Keep it "
                 "below the stop timeout of the service manager.",
     .set = [](Config& c, const Value& v) { c.control.drain_timeout_ns = to_u64(v); }},

    {.section = "device",
     .name = "hosts",
     .type = Type::kInteger,
     .min = -1,
     .max = base::kMaxDevices,
     .default_text = "-1",
     .sentence = "Host devices, which do the work of a GPU in main memory. -1 means two when no "
                 "GPU is served and none otherwise.",
     .set = [](Config& c, const Value& v) { c.device.hosts = static_cast<int32_t>(v.integer); }},
    {.section = "device",
     .name = "gpus",
     .type = Type::kGpus,
     .default_text = "auto",
     .sentence = "GPUs to serve: \"auto\" for all that are visible, \"none\", or indices (in PCI "
                 "bus order) and UUIDs separated by commas.",
     .set = [](Config& c, const Value& v) { c.device.gpus = to_selection(v); }},
    {.section = "device",
     .name = "pool_bytes",
     .type = Type::kSize,
     .min = kMebibyte,
     .max = kSizeMax,
     .allow_auto = true,
     .default_text = "auto",
     .sentence = "Memory taken per device at start. Only \"auto\" is served: nothing at start, windows when they are "
                 "asked for.",
     .set =
         [](Config& c, const Value& v) {
           c.device.pool_bytes = v.automatic ? std::optional<uint64_t>() : std::optional<uint64_t>(to_u64(v));
         }},
    {.section = "device",
     .name = "pool_max_bytes",
     .type = Type::kSize,
     .max = kSizeMax,
     .default_text = "0",
     .sentence = "Most memory that the daemon takes per device; 0 means no cap.",
     .set = [](Config& c, const Value& v) { c.device.pool_max_bytes = to_u64(v); }},
    {.section = "device",
     .name = "peer_access",
     .type = Type::kBool,
     .default_text = "true",
     .sentence =
         "Let the GPUs of this node reach each other's memory directly where they can; pairs that cannot exchange "
         "through pinned host memory.",
     .set = [](Config& c, const Value& v) { c.device.peer_access = v.integer != 0; }},
    {.section = "device",
     .name = "kernels",
     .type = Type::kChoice,
     .default_text = "auto",
     .choices = "auto|generic",
     .sentence = "Kernels to launch: \"auto\" takes those that the GPU has special units for, \"generic\" never does.",
     .short_environment = "EXPERTD_KERNELS",
     .set = [](Config& c, const Value& v) { c.device.kernels = static_cast<Kernels>(v.integer); }},
    {.section = "device",
     .name = "link_sms",
     .type = Type::kInteger,
     .min = 1,
     .max = 256,
     .default_text = "24",
     .sentence = "Multiprocessors that the kernels moving rows over the links take on GPUs of compute capability 9 or "
                 "more.",
     .set = [](Config& c, const Value& v) { c.device.link_sms = static_cast<uint32_t>(v.integer); }},

    {.section = "engine",
     .name = "spin_us",
     .type = Type::kInteger,
     .max = 1'000'000,
     .default_text = "50",
     .sentence = "Microseconds that an idle engine thread polls before it sleeps; more costs CPU "
                 "time, less costs latency.",
     .set = [](Config& c, const Value& v) { c.engine.spin_us = to_u32(v); }},
    {.section = "engine",
     .name = "schedule",
     .type = Type::kChoice,
     .default_text = "latency",
     .choices = "latency|fair|fifo",
     .sentence = "Order between the sessions of a device: \"latency\" lets low latency overtake high throughput at its "
                 "next chunk, \"fair\" gives each session its turn by bytes, \"fifo\" keeps the order in which "
                 "operations became complete.",
     .set = [](Config& c, const Value& v) { c.engine.schedule = static_cast<Schedule>(v.integer); }},
    {.section = "engine",
     .name = "op_deadline",
     .type = Type::kDuration,
     .min = kMillisecond,
     .max = 24 * kHour,
     .plain_unit = kSecond,
     .default_text = "100s",
     .sentence = "Time after which an operation fails with TIMEOUT and names the late rank.",
     .set = [](Config& c, const Value& v) { c.engine.op_deadline_ns = to_u64(v); }},
    {.section = "engine",
     .name = "first_op_deadline",
     .type = Type::kDuration,
     .min = kMillisecond,
     .max = 24 * kHour,
     .plain_unit = kSecond,
     .default_text = "30min",
     .sentence = "The same for the first operation of a group, whose ranks may still be loading "
                 "or compiling.",
     .set = [](Config& c, const Value& v) { c.engine.first_op_deadline_ns = to_u64(v); }},
    {.section = "engine",
     .name = "handles_per_session",
     .type = Type::kInteger,
     .min = 1,
     .max = 4096,
     .default_text = "512",
     .sentence = "Live dispatch handles of one session; one more is refused with HANDLE_LIMIT.",
     .set = [](Config& c, const Value& v) { c.engine.handles_per_session = to_u32(v); }},
    {.section = "engine",
     .name = "ring_slots",
     .type = Type::kPowerOfTwo,
     .min = 8,
     .max = 64,
     .default_text = "64",
     .sentence = "Slots of a session's submission ring: its operations in flight.",
     .set = [](Config& c, const Value& v) { c.engine.ring_slots = to_u32(v); }},

    {.section = "session",
     .name = "max_buffers",
     .type = Type::kInteger,
     .min = 1,
     .max = base::kMaxBuffersPerSession,
     .default_text = "256",
     .sentence = "Buffers and windows of one session.",
     .set = [](Config& c, const Value& v) { c.session.max_buffers = to_u32(v); }},
    {.section = "session",
     .name = "max_groups",
     .type = Type::kInteger,
     .min = 1,
     .max = base::kMaxGroupsPerSession,
     .default_text = "8",
     .sentence = "Groups that one session may be a member of.",
     .set = [](Config& c, const Value& v) { c.session.max_groups = to_u32(v); }},
    {.section = "session",
     .name = "max_window_bytes",
     .type = Type::kSize,
     .max = kSizeMax,
     .default_text = "0",
     .sentence = "Bytes of all windows of one session; 0 means no limit but the pool's.",
     .set = [](Config& c, const Value& v) { c.session.max_window_bytes = to_u64(v); }},
    {.section = "session",
     .name = "max_registered_bytes",
     .type = Type::kSize,
     .max = kSizeMax,
     .default_text = "1TiB",
     .sentence = "Bytes of all memory that one session registers, whether its pages exist or not, since "
                 "each takes addresses of the daemon; 0 means no limit.",
     .set = [](Config& c, const Value& v) { c.session.max_registered_bytes = to_u64(v); }},

    {.section = "metrics",
     .name = "enabled",
     .type = Type::kBool,
     .default_text = "true",
     .sentence = "Serve Prometheus metrics over HTTP.",
     .set = [](Config& c, const Value& v) { c.metrics.enabled = v.integer != 0; }},
    {.section = "metrics",
     .name = "address",
     .type = Type::kAddress,
     .default_text = "127.0.0.1",
     .sentence = "Address that the metrics are served on; \"0.0.0.0\" for every interface.",
     .set = [](Config& c, const Value& v) { c.metrics.address = v.text; }},
    {.section = "metrics",
     .name = "port",
     .type = Type::kInteger,
     .max = 65535,
     .default_text = "9464",
     .sentence = "TCP port of the metrics; 0 takes any free one, which the log names.",
     .set = [](Config& c, const Value& v) { c.metrics.port = static_cast<uint16_t>(v.integer); }},

    {.section = "log",
     .name = "level",
     .type = Type::kChoice,
     .default_text = "info",
     .choices = "trace|debug|info|warn|error",
     .sentence = "Least severe level that is written.",
     .reloadable = true,
     .set = [](Config& c, const Value& v) { c.log.level = static_cast<base::LogLevel>(v.integer); }},
    {.section = "log",
     .name = "format",
     .type = Type::kChoice,
     .default_text = "logfmt",
     .choices = "logfmt|json",
     .sentence = "Form of a log line on stderr.",
     .set = [](Config& c, const Value& v) { c.log.format = static_cast<base::LogFormat>(v.integer); }},
};

std::string join(const Key& key, char separator) {
  std::string name(key.section);
  if (!name.empty()) {
    name += separator;
  }
  return name.append(key.name);
}

/// Levenshtein distance; both words are cut to 64 characters, longer than any key.
size_t distance(std::string_view a, std::string_view b) {
  a = a.substr(0, 64);
  b = b.substr(0, 64);
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t substituted = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({substituted, row[j] + 1, row[j - 1] + 1});
    }
  }
  return row[b.size()];
}

bool is_near(std::string_view given, std::string_view known, size_t steps) {
  return steps <= std::max<size_t>(1, std::min(given.size(), known.size()) / 3);
}

}  // namespace

std::span<const Key> keys() {
  return kKeys;
}

std::string full_name(const Key& key) {
  return join(key, '.');
}

std::string flag_name(const Key& key) {
  std::string name = "--" + join(key, '-');
  std::replace(name.begin(), name.end(), '_', '-');
  return name;
}

std::string environment_name(const Key& key) {
  std::string name = "EXPERTD_" + join(key, '_');
  std::transform(name.begin(), name.end(), name.begin(),
                 [](unsigned char c) { return static_cast<char>(std::toupper(c)); });
  return name;
}

const Key* find_key(std::string_view section, std::string_view name) {
  for (const Key& key : kKeys) {
    if (key.section == section && key.name == name) {
      return &key;
    }
  }
  return nullptr;
}

const Key* find_key(std::string_view full_name) {
  const size_t dot = full_name.find('.');
  return dot == std::string_view::npos ? find_key("", full_name)
                                       : find_key(full_name.substr(0, dot), full_name.substr(dot + 1));
}

bool is_section(std::string_view name) {
  return !name.empty() && std::any_of(keys().begin(), keys().end(), [&](const Key& k) { return k.section == name; });
}

std::string nearest_key(std::string_view section, std::string_view name) {
  const Key* best = nullptr;
  size_t best_steps = 0;
  // A key of another section counts as one step further, so that the section at hand wins a draw.
  for (const Key& key : kKeys) {
    const size_t steps = distance(name, key.name);
    const size_t cost = 2 * steps + (key.section == section ? 0 : 1);
    if (is_near(name, key.name, steps) && (best == nullptr || cost < best_steps)) {
      best = &key;
      best_steps = cost;
    }
  }
  return best != nullptr ? full_name(*best) : std::string();
}

std::string nearest_section(std::string_view name) {
  std::string best;
  size_t best_steps = 0;
  for (const Key& key : kKeys) {
    const size_t steps = distance(name, key.section);
    if (is_near(name, key.section, steps) && (best.empty() || steps < best_steps)) {
      best = key.section;
      best_steps = steps;
    }
  }
  return best;
}

}  // namespace expertd::config
