// SPDX-License-Identifier: Apache-2.0
// What both gRPC services share: who calls, until when, and where the work is done. Private to this folder.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "daemon/control/call_pool.h"
#include "daemon/control/peer_table.h"
#include "daemon/session/api.h"

namespace grpc {
class CallbackServerContext;
class Service;
}  // namespace grpc

namespace expertd::control {

/// Set up before the server starts, constant afterwards; outlives every call.
struct ServiceContext {
  PeerTable* peers = nullptr;
  CallPool* session_calls = nullptr;
  CallPool* operator_calls = nullptr;
  session::SessionApi* session_api = nullptr;
  session::OperatorApi* operator_api = nullptr;
  std::string version;
  uint64_t call_deadline_max_ns = 0;
  uint32_t owner_uid = 0;  // the daemon's
};

/// An admitted call: its peer and its deadline on the base::now_ns clock, capped.
struct Caller {
  Peer peer;
  uint64_t deadline_ns = 0;
};

struct Admission {
  Caller caller;
  session::ErrorDetail error;  // ok: caller is valid
};

/// Checks the deadline and looks the peer up; only `kind` may call.
Admission admit_call(const ServiceContext& services, const grpc::CallbackServerContext& context, PeerKind kind);

std::unique_ptr<grpc::Service> make_session_service(const ServiceContext& services);
std::unique_ptr<grpc::Service> make_operator_service(const ServiceContext& services);

}  // namespace expertd::control
