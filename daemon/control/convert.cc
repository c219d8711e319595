// SPDX-License-Identifier: Apache-2.0
#include "daemon/control/convert.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdio>
#include <string_view>
#include <utility>

#include "proto/abi/ring_v1.h"

namespace expertd::control {

namespace {

session::ErrorDetail field_error(base::Reason reason, std::string field, std::string value, const std::string& wanted) {
  session::ErrorDetail error;
  error.status = base::Status(reason, field + ": " + wanted);
  error.field = std::move(field);
  error.value = std::move(value);
  return error;
}

bool printable(std::string_view text) {
  return std::ranges::all_of(text, [](char c) { return c >= ' ' && c <= '~'; });
}

/// Texts from elsewhere, fit for a protocol string: one byte that is not UTF-8 would spoil the whole answer.
std::string shown(const std::string& text) {
  std::string out = text;
  std::ranges::replace_if(
      out, [](char c) { return c < ' ' || c > '~'; }, '?');
  return out;
}

/// Names go into logs and tables: short and printable.
session::ErrorDetail check_name(const char* field, const std::string& name) {
  if (name.empty() || name.size() > kNameBytesMax || !printable(name)) {
    return field_error(EXPERTD_REASON_ARGUMENT_RANGE, field, std::to_string(name.size()) + " bytes",
                       "must have 1 to 64 printable ASCII characters");
  }
  return {};
}

session::ErrorDetail check_enum(const char* field, int value, bool known) {
  if (!known) {
    return field_error(EXPERTD_REASON_ARGUMENT_RANGE, field, std::to_string(value), "is not given or not known");
  }
  return {};
}

void put_device(const session::DeviceSnapshot& device, v1::DeviceStatus* message) {
  message->set_index(device.index);
  message->set_kind(device.kind);
  message->set_uuid(device.uuid);
  message->set_name(shown(device.name));
  message->set_healthy(device.healthy);
  message->set_mps_active(device.mps_active);
  message->set_doorbell_form(device.doorbell_form);
  message->set_context_bytes(device.context_bytes);
  message->set_context_source(device.context_source);
  message->set_table_bytes(device.table_bytes);
  message->set_registered_bytes(device.registered_bytes);
  message->set_window_bytes(device.window_bytes);
  message->set_quarantined_bytes(device.quarantined_bytes);
  message->set_sessions(device.sessions);
  message->set_armed_streams(device.armed_streams);
  message->set_armed_streams_max(device.armed_streams_max);
  message->set_lane_streams(device.lane_streams);
  message->set_parked_streams_max(device.parked_streams_max);
  message->set_peer_access_mask(device.peer_access_mask);
  message->set_kernels(device.kernels);
}

/// The words behind the first, up to the last with a rank.
void put_more(const base::RankSet& ranks, google::protobuf::RepeatedField<uint64_t>* words) {
  uint32_t used = base::RankSet::kWords;
  while (used > 1 && ranks.words[used - 1] == 0) {
    --used;
  }
  words->Add(ranks.words + 1, ranks.words + used);
}

void put_group(const session::GroupSnapshot& group, v1::GroupStatus* message) {
  message->set_name(shown(group.name));
  message->set_id(group.id.value);
  message->set_expert_parallel_size(group.config.expert_parallel_size);
  message->set_num_experts(group.config.num_experts);
  message->set_hidden(group.config.hidden);
  message->set_top_k(group.config.top_k);
  message->set_max_tokens(group.config.max_tokens);
  message->set_mode(group_mode_name(group.config.mode));
  message->set_epoch(group.epoch);
  message->set_joined(group.joined.low());
  put_more(group.joined, message->mutable_joined_more());
  message->set_lost(group.lost.low());
  put_more(group.lost, message->mutable_lost_more());
  message->set_excluded(group.excluded.low());
  put_more(group.excluded, message->mutable_excluded_more());
  message->set_ops(group.ops);
  message->set_dispatch_dtypes(group.config.dispatch_dtypes);
  message->set_dynamic_ll_tokens(group.config.dynamic_ll_tokens);
  message->set_capture_lanes(group.config.capture_lanes);
  message->set_executor(group.executor);
}

void put_session(const session::SessionSnapshot& session, v1::SessionStatus* message) {
  message->set_id(session.id.value);
  message->set_name(shown(session.name));
  message->set_uid(session.uid);
  message->set_pid(session.pid);
  message->set_device(session.device);
  message->set_age_ns(session.age_ns);
  message->set_buffers(session.buffers);
  message->set_buffer_bytes(session.buffer_bytes);
  message->set_groups(session.groups);
  message->set_ops_completed(session.ops_completed);
  message->set_ops_rejected(session.ops_rejected);
  message->set_slots_used(session.slots_used);
  message->set_slots(session.slots);
  message->set_bytes_moved(session.bytes_moved);
  message->set_p50_ns(session.p50_ns);
  message->set_p99_ns(session.p99_ns);
  message->set_state(session.state);
}

std::string hex(uint64_t value) {
  std::array<char, 17> text{};
  std::snprintf(text.data(), text.size(), "%016llx", static_cast<unsigned long long>(value));
  return text.data();
}

void put_fabric(const session::FabricStatusSnapshot& fabric, v1::FabricStatus* message) {
  message->set_enabled(fabric.enabled);
  if (!fabric.enabled) {
    return;
  }
  message->set_backend(fabric.backend);
  message->set_transports(shown(fabric.transports));
  message->set_node(shown(fabric.node));
  message->set_node_id(hex(fabric.node_id));
  message->set_address(shown(fabric.address));
  message->set_rendezvous_address(shown(fabric.rendezvous_address));
  message->set_rendezvous_node(shown(fabric.rendezvous_node));
  message->set_rendezvous_cause(shown(fabric.rendezvous_cause));
  message->set_rendezvous_hosting(fabric.rendezvous_hosting);
  message->set_rendezvous_source(fabric.rendezvous_source);
  message->set_rendezvous_term(fabric.rendezvous_term);
  message->set_etcd_cause(shown(fabric.etcd_cause));
  message->set_peers_connecting(fabric.peers_connecting);
  message->set_peers_up(fabric.peers_up);
  message->set_peers_lost(fabric.peers_lost);
  message->set_groups(fabric.groups);
  message->set_memory_bytes(fabric.memory_bytes);
  message->set_cause(shown(fabric.cause));
  message->set_backend_cause(shown(fabric.backend_cause));
  message->set_route(fabric.route);
  for (const session::FabricLaneSnapshot& lane : fabric.lanes) {
    v1::FabricLane* const out = message->add_lanes();
    out->set_name(lane.name);
    for (const std::string& option : lane.options) {
      out->add_options(shown(option));
    }
    for (const session::FabricRailSnapshot& rail : lane.rails) {
      v1::FabricRail* const to = out->add_rails();
      to->set_device(shown(rail.device));
      to->set_sent_messages(rail.sent_messages);
      to->set_sent_bytes(rail.sent_bytes);
      to->set_under_way_bytes(rail.under_way_bytes);
    }
  }
}

void put_peer(const session::PeerSnapshot& peer, v1::PeerStatus* message) {
  message->set_name(shown(peer.name));
  message->set_node_id(hex(peer.node_id));
  message->set_address(shown(peer.address));
  message->set_state(peer.state);
  message->set_cause(peer.cause);
  message->set_detail(shown(peer.detail));
  message->set_rtt_ns(peer.rtt_ns);
  message->set_heard_ago_ns(peer.heard_ago_ns);
  message->set_sends_failed(peer.sends_failed);
  for (const session::PeerLaneSnapshot& from : peer.lanes) {
    v1::PeerLane* const lane = message->add_lanes();
    lane->set_lane(from.lane);
    lane->set_sent_messages(from.sent_messages);
    lane->set_sent_bytes(from.sent_bytes);
    lane->set_received_messages(from.received_messages);
    lane->set_received_bytes(from.received_bytes);
    lane->set_in_flight(from.in_flight);
    lane->set_deferred(from.deferred);
  }
}

}  // namespace

Converted<OpenRequest> from_proto(const v1::OpenSessionRequest& message) {
  Converted<OpenRequest> out;
  out.error = check_name("client_id", message.client_id());
  if (out.error.status.is_ok() &&
      (message.traceparent().size() > kTraceparentBytesMax || !printable(message.traceparent()))) {
    out.error = field_error(EXPERTD_REASON_ARGUMENT_RANGE, "traceparent",
                            std::to_string(message.traceparent().size()) + " bytes",
                            "must have at most 128 printable ASCII characters");
  }
  out.value = OpenRequest{message.client_id(), message.traceparent()};
  return out;
}

Converted<RegisterRequest> from_proto(const v1::RegisterBufferRequest& message) {
  Converted<RegisterRequest> out;
  out.value.offset = message.offset();
  out.value.size = message.size();
  out.value.allocation_size = message.allocation_size();
  switch (message.source_case()) {
    case v1::RegisterBufferRequest::kCudaIpcHandle:
      if (message.cuda_ipc_handle().size() != kIpcHandleBytes) {
        out.error = field_error(EXPERTD_REASON_ARGUMENT_RANGE, "cuda_ipc_handle",
                                std::to_string(message.cuda_ipc_handle().size()) + " bytes", "must have 64 bytes");
      }
      out.value.ipc_handle = message.cuda_ipc_handle();
      break;
    case v1::RegisterBufferRequest::kFdToken:
      if (message.fd_token() == 0) {
        out.error = field_error(EXPERTD_REASON_NO_SUCH_TOKEN, "fd_token", "0", "tokens start at 1");
      }
      out.value.fd_token = message.fd_token();
      break;
    default:
      out.error = field_error(EXPERTD_REASON_MISSING_ARGUMENT, "source", "", "give cuda_ipc_handle or fd_token");
  }
  return out;
}

namespace {

session::CommunicationPattern from_proto(const v1::CommunicationPattern& message) {
  session::CommunicationPattern pattern;
  pattern.use_nvlink = !message.has_use_nvlink() || message.use_nvlink();
  pattern.use_rdma = !message.has_use_rdma() || message.use_rdma();
  pattern.virtual_lanes = message.virtual_lanes() != 0 ? message.virtual_lanes() : pattern.virtual_lanes;
  pattern.bandwidth_ratio = message.bandwidth_ratio() != 0 ? message.bandwidth_ratio() : pattern.bandwidth_ratio;
  return pattern;
}

}  // namespace

Converted<session::GroupConfig> from_proto(const v1::GroupConfig& message) {
  Converted<session::GroupConfig> out;
  out.error = check_enum("mode", message.mode(),
                         v1::GroupMode_IsValid(message.mode()) && message.mode() != v1::GROUP_MODE_UNSPECIFIED);
  if (out.error.status.is_ok()) {
    // Unspecified passes here: the domain refuses it with the allowed range, as any number out of range.
    out.error = check_enum("on_rank_loss", message.on_rank_loss(), v1::OnRankLoss_IsValid(message.on_rank_loss()));
  }
  if (!out.error.status.is_ok()) {
    return out;
  }
  out.value.expert_parallel_size = message.expert_parallel_size();
  out.value.num_experts = message.num_experts();
  out.value.hidden = message.hidden();
  out.value.top_k = message.top_k();
  out.value.max_tokens = message.max_tokens();
  out.value.mode = static_cast<session::GroupMode>(message.mode());
  out.value.on_rank_loss = static_cast<session::OnRankLoss>(message.on_rank_loss());
  out.value.op_timeout_ns = message.op_timeout_ns();
  out.value.first_op_timeout_ns = message.first_op_timeout_ns();
  out.value.dispatch_dtypes = message.dispatch_dtypes();
  out.value.dynamic_ll_tokens = message.dynamic_ll_tokens();
  out.value.capture_lanes = message.capture_lanes();
  out.value.executor = static_cast<session::Executor>(message.executor());
  out.value.copy_kernels = message.copy_kernels();
  out.value.copies = message.copies();
  out.value.communication = from_proto(message.communication());
  return out;
}

Converted<session::GroupConfig> from_proto(const v1::PlanGroupRequest& message) {
  if (!message.has_config()) {
    return {{}, field_error(EXPERTD_REASON_MISSING_ARGUMENT, "config", "", "must be given")};
  }
  return from_proto(message.config());
}

Converted<session::JoinRequest> from_proto(const v1::JoinGroupRequest& message) {
  Converted<session::JoinRequest> out;
  out.error = check_name("name", message.name());
  if (!out.error.status.is_ok()) {
    return out;
  }
  if (!message.has_config()) {
    out.error = field_error(EXPERTD_REASON_MISSING_ARGUMENT, "config", "", "must be given");
    return out;
  }
  Converted<session::GroupConfig> config = from_proto(message.config());
  out.error = std::move(config.error);
  out.value = session::JoinRequest{message.name(), message.rank(), config.value, message.join_timeout_ns(), nullptr};
  return out;
}

void to_proto(const session::BufferGrant& grant, v1::CreateWindowResponse* message) {
  message->set_buffer_id(grant.buffer_id);
  message->set_fd_token(grant.fd_token);
  message->set_size(grant.size);
}

void to_proto(const session::JoinGrant& grant, v1::JoinGroupResponse* message) {
  message->set_group_id(grant.group.value);
  message->set_epoch(grant.epoch);
  message->set_window_buffer_id(grant.window.buffer_id);
  message->set_window_fd_token(grant.window.fd_token);
  message->set_window_size(grant.window.size);
  message->set_op_timeout_ns(grant.op_timeout_ns);
  message->set_first_op_timeout_ns(grant.first_op_timeout_ns);
  message->set_executor(static_cast<v1::GroupExecutor>(grant.executor));
  message->set_exchange_fd_token(grant.exchange.fd_token);
  message->set_exchange_size(grant.exchange.size);
  message->mutable_rule()->set_copies(grant.rule.copies);
  message->mutable_rule()->set_ht_split_tokens(grant.rule.ht_split_tokens);
}

Converted<MaskRequest> from_proto(const v1::GroupMaskRequest& message) {
  Converted<MaskRequest> converted;
  converted.value.group = base::GroupId{message.group_id()};
  const struct {
    const char* field;
    uint64_t low;
    const google::protobuf::RepeatedField<uint64_t>& more;
    base::RankSet* ranks;
  } masks[] = {{"exclude_more", message.exclude(), message.exclude_more(), &converted.value.exclude},
               {"readmit_more", message.readmit(), message.readmit_more(), &converted.value.readmit}};
  for (const auto& mask : masks) {
    if (mask.more.size() >= static_cast<int>(base::RankSet::kWords)) {
      converted.error =
          field_error(EXPERTD_REASON_ARGUMENT_RANGE, mask.field, std::to_string(mask.more.size()) + " words",
                      "at most " + std::to_string(base::RankSet::kWords - 1) + " words name ranks");
      return converted;
    }
    *mask.ranks = base::RankSet(mask.low);
    std::copy(mask.more.begin(), mask.more.end(), mask.ranks->words + 1);
  }
  return converted;
}

void to_proto(const session::MaskReply& reply, v1::GroupMaskResponse* message) {
  message->set_epoch(reply.epoch);
  message->set_lost(reply.lost.low());
  put_more(reply.lost, message->mutable_lost_more());
  message->set_excluded(reply.excluded.low());
  put_more(reply.excluded, message->mutable_excluded_more());
}

void to_proto(const session::GroupPlan& plan, v1::PlanGroupResponse* message) {
  message->set_window_bytes(plan.window_bytes);
  message->set_table_bytes(plan.table_bytes);
  message->set_handle_bytes(plan.handle_bytes);
  message->set_worst_rows(plan.worst_rows);
  message->set_handles(plan.handles);
  message->set_pinned_bytes(plan.pinned_bytes);
}

void to_proto(const session::StatusSnapshot& snapshot, const ProcessFacts& process, v1::GetStatusResponse* message) {
  message->set_version(snapshot.version);
  message->set_state(snapshot.state);
  message->set_abi_major(EXPERTD_ABI_MAJOR);
  message->set_abi_minor(EXPERTD_ABI_MINOR);
  message->set_generation(snapshot.generation);
  message->set_uptime_ns(snapshot.uptime_ns);
  message->set_pid(process.pid);
  for (const session::DeviceSnapshot& device : snapshot.devices) {
    put_device(device, message->add_devices());
  }
  for (const session::GroupSnapshot& group : snapshot.groups) {
    put_group(group, message->add_groups());
  }
  message->set_sessions(snapshot.sessions);
  message->set_sessions_max(snapshot.sessions_max);
  message->set_metrics_address(snapshot.metrics_address);
  message->set_schedule(snapshot.schedule);
  message->set_cuda_build(snapshot.cuda_build);
  message->set_cuda_driver(snapshot.cuda_driver);
  message->set_resident_bytes(process.resident_bytes);
  put_fabric(snapshot.fabric, message->mutable_fabric());
}

void to_proto(const std::vector<session::SessionSnapshot>& sessions, v1::ListSessionsResponse* message) {
  for (const session::SessionSnapshot& session : sessions) {
    put_session(session, message->add_sessions());
  }
}

void to_proto(const std::vector<session::OpCounterSnapshot>& counters, uint64_t now_ns,
              v1::GetCountersResponse* message) {
  message->set_now_ns(now_ns);
  for (const session::OpCounterSnapshot& counter : counters) {
    v1::OpCounters* const op = message->add_ops();
    op->set_op(counter.op);
    op->set_device(counter.device);
    op->set_ok(counter.ok);
    op->set_failed(counter.failed);
    op->set_tokens(counter.tokens);
    op->set_local_bytes(counter.local_bytes);
    op->set_remote_bytes(counter.remote_bytes);
    op->set_duration_ns(counter.duration_ns);
  }
}

void to_proto(const session::PeersSnapshot& peers, v1::ListPeersResponse* message) {
  message->set_enabled(peers.enabled);
  message->set_node(shown(peers.node));
  for (const session::PeerSnapshot& peer : peers.peers) {
    put_peer(peer, message->add_peers());
  }
}

void to_proto(const session::WaitsSnapshot& waits, v1::ListWaitsResponse* message) {
  message->set_node(shown(waits.node));
  for (const session::GroupSnapshot& from : waits.groups) {
    v1::GroupRanks* const group = message->add_groups();
    group->set_id(from.id.value);
    group->set_name(shown(from.name));
    for (const std::string& node : from.rank_nodes) {
      group->add_rank_nodes(shown(node));
    }
  }
  for (const session::WaitSnapshot& from : waits.waits) {
    v1::OperationWait* const wait = message->add_waits();
    wait->set_group_id(from.group.value);
    wait->set_number(from.number);
    wait->set_op(from.op);
    wait->set_rank(from.rank);
    wait->set_last_rank(from.last_rank);
    wait->set_waited_ns(from.waited_ns);
    wait->set_counts(from.counts);
  }
}

std::string group_mode_name(session::GroupMode mode) {
  switch (mode) {
    case session::GroupMode::kNormal:
      return "normal";
    case session::GroupMode::kInference:
      return "inference";
    case session::GroupMode::kAuto:
      return "auto";
    case session::GroupMode::kUnspecified:
      break;
  }
  return "unspecified";
}

void to_proto(const std::string& node, const std::vector<session::NodePlace>& nodes, v1::ListNodesResponse* out) {
  out->set_node(node);
  for (const session::NodePlace& place : nodes) {
    v1::NodePlace* const shown = out->add_nodes();
    shown->set_name(place.name);
    shown->set_node_id(hex(place.id));
    shown->set_address(place.address);
  }
}

void to_proto(const std::vector<session::PairLaneSnapshot>& lanes, v1::MeasurePairResponse* out) {
  for (const session::PairLaneSnapshot& lane : lanes) {
    v1::PairLane* const shown = out->add_lanes();
    shown->set_lane(lane.lane);
    shown->set_device(lane.device);
    shown->set_latency_p50_ns(lane.latency_p50_ns);
    shown->set_latency_p99_ns(lane.latency_p99_ns);
    shown->set_bytes_per_second(lane.bytes_per_second);
  }
}

uint64_t node_id_of(const std::string& text) {
  uint64_t id = 0;
  const char* const end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, id, 16);
  return error == std::errc() && rest == end && text.size() <= 16 ? id : 0;
}

}  // namespace expertd::control
