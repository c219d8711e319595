// SPDX-License-Identifier: Apache-2.0
// Between the messages of expertd.peer.v1 and the domain types of daemon/group. Pure functions, any thread. Sizes are
// checked by the domain (check_identity, check_join); here only what the message format leaves open.
#pragma once

#include <cstdint>
#include <memory>

#include "daemon/group/rendezvous_port.h"
#include "expertd/peer/v1/peer.pb.h"

namespace expertd::fabric {

inline constexpr uint32_t kPeerProtocolVersion = peer::v1::PROTOCOL_VERSION_CURRENT;

group::NodeIdentity from_proto(const peer::v1::NodeIdentity& message);
void to_proto(const group::NodeIdentity& node, peer::v1::NodeIdentity* message);

/// Unknown modes and executors keep their numbers, so that two ranks that differ in them are told apart.
session::GroupConfig from_proto(const expertd::v1::GroupConfig& message);
void to_proto(const session::GroupConfig& config, expertd::v1::GroupConfig* message);

/// Without the version.
group::RankJoin from_proto(const peer::v1::JoinRankRequest& message);
void to_proto(const group::RankJoin& join, const group::NodeIdentity& node, peer::v1::JoinRankRequest* message);

void to_proto(const group::Placed& placed, peer::v1::JoinRankResponse* message);
/// BAD_MESSAGE for a placement that holds no such group: no node, too many, a rank on a node that is not there.
base::Result<std::shared_ptr<const group::Placed>> from_proto(const peer::v1::JoinRankResponse& message);
void to_proto(const group::KeptGroup& group, const group::NodeIdentity& node, peer::v1::AwaitSuccessorRequest* message);
base::Result<group::KeptGroup> from_proto(const peer::v1::AwaitSuccessorRequest& message);

/// Nothing for an ok status. Texts are cut to what a refusal may have.
void to_proto(const session::ErrorDetail& error, peer::v1::Refusal* message);
/// Reasons that this build does not know become INTERNAL, with their name in the message.
session::ErrorDetail from_proto(const peer::v1::Refusal& message);

}  // namespace expertd::fabric
