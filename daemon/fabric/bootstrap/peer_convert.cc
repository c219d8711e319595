// SPDX-License-Identifier: Apache-2.0
#include "daemon/fabric/bootstrap/peer_convert.h"

#include <algorithm>
#include <string>
#include <utility>

namespace expertd::fabric {

namespace {

constexpr size_t kMessageBytesMax = 1024;
constexpr size_t kFieldBytesMax = 256;

/// Fit for a protocol string, which must be UTF-8: what is not printable ASCII becomes '?'.
std::string shown(const std::string& text, size_t bytes_max) {
  std::string out = text.substr(0, bytes_max);
  std::ranges::replace_if(
      out, [](char c) { return c < ' ' || c > '~'; }, '?');
  return out;
}

group::RankFacts from_proto(const peer::v1::RankFacts& message) {
  return {message.cuda(), message.mps_active(), message.bulk_kernels()};
}

void to_proto(const group::RankFacts& facts, peer::v1::RankFacts* message) {
  message->set_cuda(facts.cuda);
  message->set_mps_active(facts.mps_active);
  message->set_bulk_kernels(facts.bulk_kernels);
}

}  // namespace

group::NodeIdentity from_proto(const peer::v1::NodeIdentity& message) {
  group::NodeIdentity node{message.id(), message.name(), message.address(), {}};
  for (const peer::v1::LaneAddress& lane : message.lanes()) {
    node.lanes.push_back({lane.lane(), lane.address()});
  }
  return node;
}

void to_proto(const group::NodeIdentity& node, peer::v1::NodeIdentity* message) {
  message->set_id(node.id);
  message->set_name(shown(node.name, group::kMaxNameBytes));
  message->set_address(shown(node.address, group::kMaxAddressBytes));
  for (const group::LaneAddress& lane : node.lanes) {
    peer::v1::LaneAddress* const out = message->add_lanes();
    out->set_lane(lane.lane);
    out->set_address(lane.bytes);
  }
}

namespace {

session::CommunicationPattern from_proto(const expertd::v1::CommunicationPattern& message) {
  session::CommunicationPattern pattern;
  pattern.use_nvlink = !message.has_use_nvlink() || message.use_nvlink();
  pattern.use_rdma = !message.has_use_rdma() || message.use_rdma();
  pattern.virtual_lanes = message.virtual_lanes() != 0 ? message.virtual_lanes() : pattern.virtual_lanes;
  pattern.bandwidth_ratio = message.bandwidth_ratio() != 0 ? message.bandwidth_ratio() : pattern.bandwidth_ratio;
  return pattern;
}

void to_proto(const session::CommunicationPattern& pattern, expertd::v1::CommunicationPattern* message) {
  message->set_use_nvlink(pattern.use_nvlink);
  message->set_use_rdma(pattern.use_rdma);
  message->set_virtual_lanes(pattern.virtual_lanes);
  message->set_bandwidth_ratio(pattern.bandwidth_ratio);
}

}  // namespace

session::GroupConfig from_proto(const expertd::v1::GroupConfig& message) {
  session::GroupConfig config;
  config.expert_parallel_size = message.expert_parallel_size();
  config.num_experts = message.num_experts();
  config.hidden = message.hidden();
  config.top_k = message.top_k();
  config.max_tokens = message.max_tokens();
  config.mode = static_cast<session::GroupMode>(message.mode());
  config.on_rank_loss = static_cast<session::OnRankLoss>(message.on_rank_loss());
  config.op_timeout_ns = message.op_timeout_ns();
  config.first_op_timeout_ns = message.first_op_timeout_ns();
  config.dispatch_dtypes = message.dispatch_dtypes();
  config.dynamic_ll_tokens = message.dynamic_ll_tokens();
  config.capture_lanes = message.capture_lanes();
  config.executor = static_cast<session::Executor>(message.executor());
  config.copy_kernels = message.copy_kernels();
  config.copies = message.copies();
  config.communication = from_proto(message.communication());
  return config;
}

void to_proto(const session::GroupConfig& config, expertd::v1::GroupConfig* message) {
  message->set_expert_parallel_size(config.expert_parallel_size);
  message->set_num_experts(config.num_experts);
  message->set_hidden(config.hidden);
  message->set_top_k(config.top_k);
  message->set_max_tokens(config.max_tokens);
  message->set_mode(static_cast<expertd::v1::GroupMode>(config.mode));
  message->set_on_rank_loss(static_cast<expertd::v1::OnRankLoss>(config.on_rank_loss));
  message->set_op_timeout_ns(config.op_timeout_ns);
  message->set_first_op_timeout_ns(config.first_op_timeout_ns);
  message->set_dispatch_dtypes(config.dispatch_dtypes);
  message->set_dynamic_ll_tokens(config.dynamic_ll_tokens);
  message->set_capture_lanes(config.capture_lanes);
  message->set_executor(static_cast<expertd::v1::GroupExecutor>(config.executor));
  message->set_copy_kernels(config.copy_kernels);
  message->set_copies(config.copies);
  to_proto(config.communication, message->mutable_communication());
}

group::RankJoin from_proto(const peer::v1::JoinRankRequest& message) {
  return {message.group(),   message.rank(),      from_proto(message.config()), from_proto(message.facts()),
          message.attempt(), message.timeout_ns()};
}

void to_proto(const group::RankJoin& join, const group::NodeIdentity& node, peer::v1::JoinRankRequest* message) {
  message->set_protocol_version(kPeerProtocolVersion);
  message->set_group(shown(join.group, group::kMaxNameBytes + 1));
  message->set_rank(join.rank);
  to_proto(join.config, message->mutable_config());
  to_proto(join.facts, message->mutable_facts());
  to_proto(node, message->mutable_node());
  message->set_attempt(join.attempt);
  message->set_timeout_ns(join.timeout_ns);
}

void to_proto(const group::Placed& placed, peer::v1::JoinRankResponse* message) {
  message->set_group_key(placed.key);
  message->set_epoch(placed.epoch);
  message->set_form_timeout_ns(placed.form_timeout_ns);
  for (const group::NodeIdentity& node : placed.nodes) {
    to_proto(node, message->add_nodes());
  }
  for (const group::PlacedRank& rank : placed.ranks) {
    peer::v1::PlacedRank* const out = message->add_ranks();
    out->set_node(rank.node);
    to_proto(rank.facts, out->mutable_facts());
    out->set_copy_kernels(rank.copy_kernels);
    out->set_copies(rank.copies);
  }
  message->set_predecessor(placed.predecessor);
  message->mutable_returning()->Add(placed.returning.begin(), placed.returning.end());
  message->mutable_lost()->Add(placed.lost.begin(), placed.lost.end());
}

void to_proto(const group::KeptGroup& group, const group::NodeIdentity& node,
              peer::v1::AwaitSuccessorRequest* message) {
  message->set_protocol_version(kPeerProtocolVersion);
  to_proto(node, message->mutable_node());
  message->set_group(shown(group.name, group::kMaxNameBytes + 1));
  to_proto(group.config, message->mutable_config());
  to_proto(group.placed, message->mutable_placed());
  message->mutable_gone()->Add(group.gone.begin(), group.gone.end());
}

base::Result<group::KeptGroup> from_proto(const peer::v1::AwaitSuccessorRequest& message) {
  base::Result<std::shared_ptr<const group::Placed>> placed = from_proto(message.placed());
  if (!placed.is_ok()) {
    return placed.status();
  }
  group::KeptGroup group{message.group(), from_proto(message.config()), *placed.value(), {}};
  group.gone.assign(message.gone().begin(), message.gone().end());
  return group;
}

base::Result<std::shared_ptr<const group::Placed>> from_proto(const peer::v1::JoinRankResponse& message) {
  const auto nodes = static_cast<uint32_t>(message.nodes_size());
  const auto ranks = static_cast<uint32_t>(message.ranks_size());
  if (message.group_key() == 0 || nodes == 0 || nodes > group::kMaxNodes || ranks < nodes ||
      ranks > group::kMaxGroupRanks) {
    return base::Status(EXPERTD_REASON_BAD_MESSAGE, "the rendezvous placed " + std::to_string(ranks) + " ranks on " +
                                                        std::to_string(nodes) + " nodes");
  }
  auto placed = std::make_shared<group::Placed>();
  placed->key = message.group_key();
  placed->epoch = message.epoch();
  placed->form_timeout_ns = message.form_timeout_ns();
  for (const peer::v1::NodeIdentity& node : message.nodes()) {
    placed->nodes.push_back(from_proto(node));
  }
  for (const peer::v1::PlacedRank& rank : message.ranks()) {
    if (rank.node() >= nodes) {
      return base::Status(EXPERTD_REASON_BAD_MESSAGE, "the rendezvous placed a rank on node " +
                                                          std::to_string(rank.node()) + " of " + std::to_string(nodes));
    }
    placed->ranks.push_back({rank.node(), from_proto(rank.facts()), rank.copy_kernels(), rank.copies()});
  }
  placed->predecessor = message.predecessor();
  placed->returning.assign(message.returning().begin(), message.returning().end());
  placed->lost.assign(message.lost().begin(), message.lost().end());
  const auto is_rank = [ranks](uint32_t rank) { return rank < ranks; };
  if (!std::ranges::all_of(placed->returning, is_rank) || !std::ranges::all_of(placed->lost, is_rank)) {
    return base::Status(EXPERTD_REASON_BAD_MESSAGE,
                        "the rendezvous names a rank beyond the " + std::to_string(ranks) + " of the group");
  }
  return std::shared_ptr<const group::Placed>(std::move(placed));
}

void to_proto(const session::ErrorDetail& error, peer::v1::Refusal* message) {
  const base::Reason reason = error.status.reason();
  message->set_message(shown(error.status.message(), kMessageBytesMax));
  expertd::v1::ErrorInfo* const info = message->mutable_info();
  info->set_reason(static_cast<uint32_t>(reason));
  info->set_reason_name(std::string(base::reason_name(reason)));
  info->set_retryable(base::reason_retryable(reason));
  info->set_rank(error.rank);
  info->set_field(shown(error.field, kFieldBytesMax));
  info->set_value(shown(error.value, kFieldBytesMax));
  info->set_other_value(shown(error.other_value, kFieldBytesMax));
}

session::ErrorDetail from_proto(const peer::v1::Refusal& message) {
  const expertd::v1::ErrorInfo& info = message.info();
  const auto number = static_cast<int>(info.reason());
  const bool known = info.reason() != 0 && base::reason_known(number);
  session::ErrorDetail error;
  const std::string text = shown(message.message(), kMessageBytesMax);
  error.status = known
                     ? base::Status(static_cast<base::Reason>(number), text)
                     : base::Status(EXPERTD_REASON_INTERNAL, shown(info.reason_name(), kFieldBytesMax) + " (" +
                                                                 std::to_string(number) + ", not known here): " + text);
  error.rank = info.rank();
  error.field = shown(info.field(), kFieldBytesMax);
  error.value = shown(info.value(), kFieldBytesMax);
  error.other_value = shown(info.other_value(), kFieldBytesMax);
  return error;
}

}  // namespace expertd::fabric
