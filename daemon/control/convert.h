// SPDX-License-Identifier: Apache-2.0
// Between protocol messages and the domain types of session/api.h. Pure functions, any thread. Requests are checked for
// what the message format leaves open (enum values, lengths, presence); what values mean is judged by the domain.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "daemon/session/api.h"
#include "expertd/v1/control.pb.h"
#include "expertd/v1/session.pb.h"

namespace expertd::control {

inline constexpr size_t kNameBytesMax = 64;
inline constexpr size_t kTraceparentBytesMax = 128;
inline constexpr size_t kIpcHandleBytes = 64;

/// A request of the client in domain terms, or the error that names the field.
template <typename T>
struct Converted {
  T value{};
  session::ErrorDetail error;  // ok: value is valid
};

struct OpenRequest {
  std::string client_id;
  std::string traceparent;
};

struct MaskRequest {
  base::GroupId group;
  base::RankSet exclude;
  base::RankSet readmit;
};

/// Where a buffer comes from: exactly one of handle (64 bytes) and token (> 0).
struct RegisterRequest {
  std::string ipc_handle;
  uint64_t fd_token = 0;
  uint64_t offset = 0;
  uint64_t size = 0;
  uint64_t allocation_size = 0;
};

Converted<OpenRequest> from_proto(const v1::OpenSessionRequest& message);
Converted<RegisterRequest> from_proto(const v1::RegisterBufferRequest& message);
Converted<session::GroupConfig> from_proto(const v1::GroupConfig& message);
Converted<session::GroupConfig> from_proto(const v1::PlanGroupRequest& message);
/// `timeout_ns` is left as the message has it, 0 included.
Converted<session::JoinRequest> from_proto(const v1::JoinGroupRequest& message);
Converted<MaskRequest> from_proto(const v1::GroupMaskRequest& message);

void to_proto(const session::BufferGrant& grant, v1::CreateWindowResponse* message);
void to_proto(const session::JoinGrant& grant, v1::JoinGroupResponse* message);
void to_proto(const session::MaskReply& reply, v1::GroupMaskResponse* message);
void to_proto(const session::GroupPlan& plan, v1::PlanGroupResponse* message);

/// What the process knows about itself beside the domain's snapshot.
struct ProcessFacts {
  uint32_t pid = 0;
  uint64_t resident_bytes = 0;
};
void to_proto(const session::StatusSnapshot& snapshot, const ProcessFacts& process, v1::GetStatusResponse* message);
void to_proto(const std::vector<session::SessionSnapshot>& sessions, v1::ListSessionsResponse* message);
void to_proto(const std::vector<session::OpCounterSnapshot>& counters, uint64_t now_ns,
              v1::GetCountersResponse* message);

void to_proto(const session::PeersSnapshot& peers, v1::ListPeersResponse* message);
void to_proto(const session::WaitsSnapshot& waits, v1::ListWaitsResponse* message);

/// "normal", "inference", "auto" or "unspecified".
std::string group_mode_name(session::GroupMode mode);

void to_proto(const std::string& node, const std::vector<session::NodePlace>& nodes, v1::ListNodesResponse* out);
void to_proto(const std::vector<session::PairLaneSnapshot>& lanes, v1::MeasurePairResponse* out);
/// Of 1..16 hexadecimal digits; 0, which no node has, for anything else.
uint64_t node_id_of(const std::string& text);

}  // namespace expertd::control
