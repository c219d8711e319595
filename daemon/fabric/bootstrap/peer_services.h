// SPDX-License-Identifier: Apache-2.0
// The gRPC services behind PeerServer. gRPC's threads call them; they never wait. Used inside daemon/fabric/bootstrap.
#pragma once

#include <grpcpp/impl/service_type.h>

#include <atomic>
#include <functional>
#include <limits>
#include <memory>
#include <string>

#include "daemon/fabric/bootstrap/probe_port.h"
#include "daemon/group/rendezvous.h"

namespace expertd::fabric {

inline constexpr const char* kClusterKeyMetadata = "expertd-cluster-key";
inline constexpr const char* kTermMetadata = "expertd-rendezvous-term";  // decimal; absent: the host is not elected

inline constexpr uint64_t kEver = std::numeric_limits<uint64_t>::max();

struct PeerContext {
  std::string cluster_key;
  group::NodeIdentity identity;
  std::atomic<bool> hosting{false};
  std::atomic<uint64_t> term{0};          // that it hosts in; 0: it is not elected
  std::atomic<uint64_t> until_ns{kEver};  // then it hosts no longer, whatever happens
  group::Rendezvous* rendezvous = nullptr;
  ProbePort* probes = nullptr;             // null: this daemon does not measure
  std::function<void()> deadline_changed;  // the rendezvous may have an earlier one

  bool hosts_at(uint64_t now_ns) const {
    return hosting.load(std::memory_order_acquire) && now_ns < until_ns.load(std::memory_order_acquire);
  }
};

/// `context` must outlive them.
std::unique_ptr<grpc::Service> make_peer_service(PeerContext* context);
std::unique_ptr<grpc::Service> make_rendezvous_service(PeerContext* context);

}  // namespace expertd::fabric
