// SPDX-License-Identifier: Apache-2.0
// The rows of the table. To add a key, add its row here and its field in config.h.
#include <algorithm>
#include <limits>

#include "daemon/base/limits.h"
#include "daemon/config/endpoint.h"
#include "daemon/config/keys.h"

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

    {.section = "fabric",
     .name = "enabled",
     .type = Type::kBool,
     .default_text = "false",
     .sentence = "Form groups with the daemons of other nodes, over UCX; needs fabric.rendezvous or fabric.etcd.",
     .set = [](Config& c, const Value& v) { c.fabric.enabled = v.integer != 0; }},
    {.section = "fabric",
     .name = "listen",
     .type = Type::kString,
     .default_text = "0.0.0.0:9465",
     .sentence = "Where other daemons connect to exchange addresses and form groups; not encrypted, so keep it inside "
                 "of the cluster's network. Port 0 takes any free one, which the log names.",
     .accepts = is_listen_endpoint,
     .form = "\"ADDRESS:PORT\" with an IPv4 or, in brackets, an IPv6 address",
     .set = [](Config& c, const Value& v) { c.fabric.listen = v.text; }},
    {.section = "fabric",
     .name = "advertise",
     .type = Type::kString,
     .default_text = "",
     .sentence = "Host name or address at which the other daemons reach this one; empty means the address of "
                 "fabric.listen, or the name of the host where that stands for every interface.",
     .accepts = is_host,
     .form = "a host name or an address without a port, or empty",
     .set = [](Config& c, const Value& v) { c.fabric.advertise = v.text; }},
    {.section = "fabric",
     .name = "rendezvous",
     .type = Type::kTextList,
     .default_text = "",
     .sentence = "Daemons at which the ranks of a group find each other, the same list on every node. The first one "
                 "hosts; with one entry \"dns:NAME:PORT\" it is the daemon at the lowest address of the name.",
     .accepts = is_peer_endpoint,
     .form = "\"HOST:PORT\", \"[IPV6]:PORT\" or \"dns:NAME:PORT\"",
     .set = [](Config& c, const Value& v) { c.fabric.rendezvous = v.texts; }},
    {.section = "fabric",
     .name = "etcd",
     .type = Type::kTextList,
     .default_text = "",
     .sentence = "Members of an etcd cluster (v3, without TLS) at which the daemons elect the one that hosts the "
                 "rendezvous, in place of fabric.rendezvous; the same on every node. Another takes over when it dies.",
     .accepts = is_etcd_endpoint,
     .form = "\"http://HOST:PORT\" or \"http://[IPV6]:PORT\"",
     .set = [](Config& c, const Value& v) { c.fabric.etcd = v.texts; }},
    {.section = "fabric",
     .name = "etcd_prefix",
     .type = Type::kString,
     .default_text = "/expertd",
     .sentence =
         "What the keys of this cluster of daemons begin with in the etcd; clusters that share an etcd need one "
         "each.",
     .accepts = is_key_prefix,
     .form = "2 to 200 letters, digits and \"_./-\", the first a \"/\" and the last none",
     .set = [](Config& c, const Value& v) { c.fabric.etcd_prefix = v.text; }},
    {.section = "fabric",
     .name = "etcd_lease",
     .type = Type::kDuration,
     .min = 2'000'000'000,
     .max = 60'000'000'000,
     .default_text = "5s",
     .sentence = "After so long without a sign of the daemon that hosts the rendezvous another one hosts; it stops by "
                 "itself when it has not reached the etcd for as long. Rounded up to whole seconds.",
     .set = [](Config& c, const Value& v) { c.fabric.etcd_lease_ns = to_u64(v); }},
    {.section = "fabric",
     .name = "node_name",
     .type = Type::kString,
     .default_text = "",
     .sentence =
         "Name of this node in messages and tables, of its own on every node; empty means the name of the host.",
     .accepts = is_node_name,
     .form = "a text of at most 64 printable ASCII characters",
     .set = [](Config& c, const Value& v) { c.fabric.node_name = v.text; }},
    {.section = "fabric",
     .name = "cluster_key_file",
     .type = Type::kPath,
     .default_text = "",
     .sentence =
         "File with a text of 16 to 256 characters that all daemons of the cluster share; a daemon with another "
         "one is refused. Empty: none, and any daemon that reaches fabric.listen may join groups.",
     .set = [](Config& c, const Value& v) { c.fabric.cluster_key_file = v.text; }},
    {.section = "fabric",
     .name = "transports",
     .type = Type::kTextList,
     .default_text = "",
     .sentence = "Transports that UCX may use, by its names; empty leaves the choice to it.",
     .accepts = is_word,
     .form = "names such as \"tcp\", \"shm\" or \"rc\"",
     .set = [](Config& c, const Value& v) { c.fabric.transports = v.texts; }},
    {.section = "fabric",
     .name = "devices",
     .type = Type::kTextList,
     .default_text = "",
     .sentence = "Network devices of the lanes that name none of their own, by UCX's names; several are a rail each. "
                 "Empty leaves the choice to UCX.",
     .accepts = is_word,
     .form = "names such as \"mlx5_0:1\" or \"eth0\"",
     .set = [](Config& c, const Value& v) { c.fabric.devices = v.texts; }},
    {.section = "fabric",
     .name = "route",
     .type = Type::kChoice,
     .default_text = "auto",
     .choices = "auto|rail|spread",
     .sentence = "Rail by which a message leaves, where a lane has several devices: \"rail\" that of the GPU's number, "
                 "\"spread\" the one with the least to carry, \"auto\" the former until it has more to carry than "
                 "another.",
     .set = [](Config& c, const Value& v) { c.fabric.route = static_cast<FabricRoute>(v.integer); }},
    {.section = "fabric",
     .name = "heartbeat_ms",
     .type = Type::kInteger,
     .min = 10,
     .max = 60'000,
     .default_text = "100",
     .sentence = "Milliseconds between signs of life to every other daemon.",
     .set = [](Config& c, const Value& v) { c.fabric.heartbeat_ms = to_u32(v); }},
    {.section = "fabric",
     .name = "heartbeat_misses",
     .type = Type::kInteger,
     .min = 2,
     .max = 100,
     .default_text = "5",
     .sentence = "Signs of life in a row that may be missing before a node and its ranks count as lost.",
     .set = [](Config& c, const Value& v) { c.fabric.heartbeat_misses = to_u32(v); }},
    {.section = "fabric",
     .name = "require",
     .type = Type::kChoice,
     .default_text = "any",
     .choices = "any|direct",
     .sentence = "\"direct\" refuses to start where the fabric cannot reach GPU memory itself; \"any\" goes through "
                 "host memory there.",
     .set = [](Config& c, const Value& v) { c.fabric.require_direct = v.integer == 1; }},
    {.section = "fabric",
     .name = "message_bytes",
     .type = Type::kSize,
     .min = 4096,
     .max = 16 * kMebibyte,
     .default_text = "256KiB",
     .sentence =
         "Largest message to another node. Each peer of a group takes fabric.messages_per_peer of them per lane.",
     .set = [](Config& c, const Value& v) { c.fabric.message_bytes = to_u64(v); }},
    {.section = "fabric",
     .name = "messages_per_peer",
     .type = Type::kInteger,
     .min = 1,
     .max = 64,
     .default_text = "4",
     .sentence =
         "Messages under way at once, per lane, from a rank and to a node; fewer to a node on host devices over "
         "more than 13 nodes.",
     .set = [](Config& c, const Value& v) { c.fabric.messages_per_peer = to_u32(v); }},
    {.section = "fabric",
     .name = "max_nodes",
     .type = Type::kInteger,
     .min = 2,
     .max = 64,
     .default_text = "64",
     .sentence = "Nodes that the rendezvous takes where this daemon hosts it; one more is refused with NODE_LIMIT.",
     .set = [](Config& c, const Value& v) { c.fabric.max_nodes = to_u32(v); }},

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

}  // namespace

std::span<const Key> keys() {
  // Each section in one piece: the lanes' rows come behind the last one of the fabric.
  static const std::vector<Key> kAll = [] {
    std::vector<Key> all(std::begin(kKeys), std::end(kKeys));
    const auto last = std::find_if(all.rbegin(), all.rend(), [](const Key& key) { return key.section == "fabric"; });
    const std::vector<Key> lanes = fabric_lane_keys();
    all.insert(last.base(), lanes.begin(), lanes.end());
    return all;
  }();
  return kAll;
}

}  // namespace expertd::config
