// SPDX-License-Identifier: Apache-2.0
// The gRPC services behind PeerServer. gRPC's threads call them; they never wait. Used inside daemon/fabric/bootstrap.
#pragma once

#include <grpcpp/impl/service_type.h>

#include <atomic>
#include <functional>
#include <memory>
#include <string>

#include "daemon/fabric/bootstrap/probe_port.h"
#include "daemon/group/rendezvous.h"

namespace expertd::fabric {

inline constexpr const char* kClusterKeyMetadata = "expertd-cluster-key";

struct PeerContext {
  std::string cluster_key;
  group::NodeIdentity identity;
  std::atomic<bool> hosting{false};
  group::Rendezvous* rendezvous = nullptr;
  ProbePort* probes = nullptr;             // null: this daemon does not measure
  std::function<void()> deadline_changed;  // the rendezvous may have an earlier one
};

/// `context` must outlive them.
std::unique_ptr<grpc::Service> make_peer_service(PeerContext* context);
std::unique_ptr<grpc::Service> make_rendezvous_service(PeerContext* context);

}  // namespace expertd::fabric
