// SPDX-License-Identifier: Apache-2.0
#include "client/ctl/render.h"

#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "client/ctl/format.h"
#include "client/ctl/render_nodes.h"
#include "proto/abi/ring_v1.h"

namespace expertd::ctl {

namespace {

using nlohmann::json;

std::string or_dash(const std::string& text) {
  return text.empty() ? "-" : text;
}

/// "3/24"; "-" where there is no limit, because there is nothing of the kind or the daemon is older.
std::string of_limit(uint32_t value, uint32_t limit) {
  return limit == 0 ? "-" : std::to_string(value) + "/" + std::to_string(limit);
}

std::string devices_text(const v1::GetStatusResponse& status) {
  Table table({{"DEVICE", Align::kRight},
               {"KIND"},
               {"UUID"},
               {"NAME"},
               {"HEALTH"},
               {"SESSIONS", Align::kRight},
               {"STREAMS", Align::kRight},
               {"PARKED", Align::kRight},
               {"MPS"},
               {"DOORBELL"},
               {"KERNELS"},
               {"PEERS"}});
  for (const v1::DeviceStatus& device : status.devices()) {
    table.add({std::to_string(device.index()), device.kind(), device.uuid(), or_dash(device.name()),
               device.healthy() ? "ok" : "LOST", std::to_string(device.sessions()),
               of_limit(device.armed_streams(), device.armed_streams_max()),
               of_limit(device.armed_streams() + device.lane_streams(), device.parked_streams_max()),
               device.mps_active() ? "yes" : "no", or_dash(device.doorbell_form()), or_dash(device.kernels()),
               mask_text(device.peer_access_mask())});
  }
  return table.text();
}

bool has_context(const v1::DeviceStatus& device) {
  return device.kind() != "host";
}

/// What the daemon itself takes of a device, clients aside; empty when the context's part is not known.
std::optional<uint64_t> held_bytes(const v1::DeviceStatus& device) {
  if (has_context(device) && device.context_source().empty()) {
    return std::nullopt;
  }
  return device.context_bytes() + device.table_bytes();
}

std::string context_text(const v1::DeviceStatus& device) {
  if (!has_context(device)) {
    return "-";
  }
  if (device.context_source().empty()) {
    return "unknown";
  }
  // What others allocated meanwhile is in the growth of the whole GPU.
  return (device.context_source() == "process" ? "" : "~") + size_text(device.context_bytes());
}

std::string memory_text(const v1::GetStatusResponse& status) {
  Table table({{"DEVICE", Align::kRight},
               {"HELD", Align::kRight},
               {"CONTEXT", Align::kRight},
               {"TABLES", Align::kRight},
               {"WINDOWS", Align::kRight},
               {"REGISTERED", Align::kRight},
               {"QUARANTINED", Align::kRight}});
  for (const v1::DeviceStatus& device : status.devices()) {
    const std::optional<uint64_t> held = held_bytes(device);
    table.add({std::to_string(device.index()), held.has_value() ? size_text(*held) : "unknown", context_text(device),
               size_text(device.table_bytes()), size_text(device.window_bytes()), size_text(device.registered_bytes()),
               size_text(device.quarantined_bytes())});
  }
  return table.text();
}

std::vector<std::string> dtype_names(const v1::GroupStatus& group) {
  if (group.dispatch_dtypes() == 0) {
    return {"any"};
  }
  std::vector<std::string> names;
#define EXPERTD_PAYLOAD_NAMED(name, bit, text)  \
  if ((group.dispatch_dtypes() & (bit)) != 0) { \
    names.emplace_back(text);                   \
  }
  EXPERTD_PAYLOADS(EXPERTD_PAYLOAD_NAMED)
#undef EXPERTD_PAYLOAD_NAMED
  return names;
}

std::string dtypes_text(const v1::GroupStatus& group) {
  std::string text;
  for (const std::string& name : dtype_names(group)) {
    text += (text.empty() ? "" : ",") + name;
  }
  return text;
}

// A dynamic group has the output format of its mode, and a number of tokens up to which it counts as low latency.
std::string mode_text(const v1::GroupStatus& group) {
  std::string text = group.mode();
  if (group.dynamic_ll_tokens() != 0) {
    text += ", dynamic ll<=" + std::to_string(group.dynamic_ll_tokens());
  }
  if (group.capture_lanes() != 0) {
    text += ", capture " + std::to_string(group.capture_lanes());
  }
  return text;
}

std::span<const uint64_t> words(const google::protobuf::RepeatedField<uint64_t>& field) {
  return {field.data(), static_cast<size_t>(field.size())};
}

std::string groups_text(const v1::GetStatusResponse& status) {
  Table table({{"GROUP"},
               {"MODE"},
               {"RANKS", Align::kRight},
               {"EXPERTS", Align::kRight},
               {"HIDDEN", Align::kRight},
               {"TOP-K", Align::kRight},
               {"TOKENS", Align::kRight},
               {"DTYPES"},
               {"EXECUTOR"},
               {"EPOCH", Align::kRight},
               {"OPS", Align::kRight},
               {"JOINED"},
               {"LOST"},
               {"EXCLUDED"}});
  for (const v1::GroupStatus& group : status.groups()) {
    table.add({group.name(), mode_text(group), std::to_string(group.expert_parallel_size()),
               std::to_string(group.num_experts()), std::to_string(group.hidden()), std::to_string(group.top_k()),
               std::to_string(group.max_tokens()), dtypes_text(group), or_dash(group.executor()),
               std::to_string(group.epoch()), std::to_string(group.ops()),
               mask_text(group.joined(), words(group.joined_more())), mask_text(group.lost(), words(group.lost_more())),
               mask_text(group.excluded(), words(group.excluded_more()))});
  }
  return table.text();
}

json device_json(const v1::DeviceStatus& device) {
  const bool context_known = !device.context_source().empty();
  const std::optional<uint64_t> held = held_bytes(device);
  return {{"index", device.index()},
          {"kind", device.kind()},
          {"uuid", device.uuid()},
          {"name", device.name()},
          {"healthy", device.healthy()},
          {"mps_active", device.mps_active()},
          {"doorbell_form", device.doorbell_form()},
          {"kernels", device.kernels()},
          {"sessions", device.sessions()},
          {"held_bytes", held.has_value() ? json(*held) : json()},
          {"context_bytes", context_known ? json(device.context_bytes()) : json()},
          {"context_source", context_known ? json(device.context_source()) : json()},
          {"table_bytes", device.table_bytes()},
          {"window_bytes", device.window_bytes()},
          {"registered_bytes", device.registered_bytes()},
          {"quarantined_bytes", device.quarantined_bytes()},
          {"armed_streams", device.armed_streams()},
          {"armed_streams_max", device.armed_streams_max()},
          {"lane_streams", device.lane_streams()},
          {"parked_streams_max", device.parked_streams_max()},
          {"peer_access_mask", device.peer_access_mask()}};
}

json group_json(const v1::GroupStatus& group) {
  return {{"name", group.name()},
          {"id", group.id()},
          {"expert_parallel_size", group.expert_parallel_size()},
          {"num_experts", group.num_experts()},
          {"hidden", group.hidden()},
          {"top_k", group.top_k()},
          {"max_tokens", group.max_tokens()},
          {"dispatch_dtypes", dtype_names(group)},
          {"dynamic_ll_tokens", group.dynamic_ll_tokens()},
          {"capture_lanes", group.capture_lanes()},
          {"executor", group.executor()},
          {"mode", group.mode()},
          {"epoch", group.epoch()},
          {"joined_mask", group.joined()},
          {"lost_mask", group.lost()},
          {"excluded_mask", group.excluded()},
          {"joined", ranks_of_mask(group.joined(), words(group.joined_more()))},
          {"lost", ranks_of_mask(group.lost(), words(group.lost_more()))},
          {"excluded", ranks_of_mask(group.excluded(), words(group.excluded_more()))},
          {"ops", group.ops()}};
}

}  // namespace

std::string status_text(const v1::GetStatusResponse& status) {
  std::string out = "expertd " + or_dash(status.version()) + "  " + status.state() + "  up " +
                    duration_text(status.uptime_ns()) + "\n";
  out += "  sessions " + std::to_string(status.sessions()) + " of " + std::to_string(status.sessions_max()) + ", pid " +
         std::to_string(status.pid()) + ", " + size_text(status.resident_bytes()) + " resident, protocol " +
         std::to_string(status.abi_major()) + "." + std::to_string(status.abi_minor()) + ", generation " +
         std::to_string(status.generation()) + "\n";
  out += "  metrics " + (status.metrics_address().empty() ? "off" : "http://" + status.metrics_address() + "/metrics");
  if (!status.cuda_build().empty() || !status.cuda_driver().empty()) {
    out += ", CUDA " + or_dash(status.cuda_build()) + ", driver " + or_dash(status.cuda_driver());
  }
  if (!status.schedule().empty()) {
    out += ", schedule " + status.schedule();
  }
  out += "\n  " + fabric_line(status.fabric());
  out += "\n\n" + (status.devices().empty() ? "no devices\n" : devices_text(status) + "\n" + memory_text(status));
  out += "\n" + (status.groups().empty() ? "no groups\n" : groups_text(status));
  return out;
}

json status_json(const v1::GetStatusResponse& status) {
  json devices = json::array();
  for (const v1::DeviceStatus& device : status.devices()) {
    devices.push_back(device_json(device));
  }
  json groups = json::array();
  for (const v1::GroupStatus& group : status.groups()) {
    groups.push_back(group_json(group));
  }
  return {{"version", status.version()},
          {"state", status.state()},
          {"abi_major", status.abi_major()},
          {"abi_minor", status.abi_minor()},
          {"generation", status.generation()},
          {"uptime_ns", status.uptime_ns()},
          {"pid", status.pid()},
          {"resident_bytes", status.resident_bytes()},
          {"sessions", status.sessions()},
          {"sessions_max", status.sessions_max()},
          {"metrics_address", status.metrics_address()},
          {"schedule", status.schedule()},
          {"cuda_build", status.cuda_build()},
          {"cuda_driver", status.cuda_driver()},
          {"devices", std::move(devices)},
          {"groups", std::move(groups)},
          {"fabric", fabric_json(status.fabric())}};
}

std::string sessions_text(const v1::ListSessionsResponse& sessions) {
  if (sessions.sessions().empty()) {
    return "no sessions\n";
  }
  Table table({{"SESSION", Align::kRight},
               {"NAME"},
               {"DEVICE"},
               {"STATE"},
               {"UID", Align::kRight},
               {"PID", Align::kRight},
               {"AGE", Align::kRight},
               {"GROUPS", Align::kRight},
               {"BUFFERS", Align::kRight},
               {"MEMORY", Align::kRight},
               {"SLOTS", Align::kRight},
               {"OPS", Align::kRight},
               {"REJECTED", Align::kRight},
               {"MOVED", Align::kRight},
               {"P50", Align::kRight},
               {"P99", Align::kRight}});
  for (const v1::SessionStatus& session : sessions.sessions()) {
    table.add({std::to_string(session.id()), or_dash(session.name()), session.device(), session.state(),
               std::to_string(session.uid()), session.pid() == 0 ? "-" : std::to_string(session.pid()),
               duration_text(session.age_ns()), std::to_string(session.groups()), std::to_string(session.buffers()),
               size_text(session.buffer_bytes()),
               std::to_string(session.slots_used()) + "/" + std::to_string(session.slots()),
               std::to_string(session.ops_completed()), std::to_string(session.ops_rejected()),
               size_text(session.bytes_moved()), session.p50_ns() == 0 ? "-" : duration_text(session.p50_ns()),
               session.p99_ns() == 0 ? "-" : duration_text(session.p99_ns())});
  }
  return table.text();
}

json sessions_json(const v1::ListSessionsResponse& sessions) {
  json list = json::array();
  for (const v1::SessionStatus& session : sessions.sessions()) {
    list.push_back({{"id", session.id()},
                    {"name", session.name()},
                    {"state", session.state()},
                    {"uid", session.uid()},
                    {"pid", session.pid()},
                    {"device", session.device()},
                    {"age_ns", session.age_ns()},
                    {"groups", session.groups()},
                    {"buffers", session.buffers()},
                    {"buffer_bytes", session.buffer_bytes()},
                    {"slots_used", session.slots_used()},
                    {"slots", session.slots()},
                    {"ops_completed", session.ops_completed()},
                    {"ops_rejected", session.ops_rejected()},
                    {"moved_bytes", session.bytes_moved()},
                    {"p50_ns", session.p50_ns()},
                    {"p99_ns", session.p99_ns()}});
  }
  return {{"sessions", std::move(list)}};
}

std::string json_text(const json& value) {
  return value.dump(2, ' ', false, json::error_handler_t::replace) + "\n";
}

}  // namespace expertd::ctl
