// SPDX-License-Identifier: Apache-2.0
// The daemon's gRPC server for other daemons: their hello, and the rendezvous where this daemon hosts it. Owns the TCP
// listener, the state of the rendezvous and the thread that ends what is late. `main` creates and ends it; every other
// call may come from any thread. The connections are not encrypted; the cluster key keeps strangers out, not listeners.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "daemon/base/status.h"
#include "daemon/fabric/bootstrap/probe_port.h"
#include "daemon/group/rendezvous.h"

namespace expertd::fabric {

struct PeerServerOptions {
  std::string listen;       // "ADDRESS:PORT", literal; port 0: any free one
  std::string cluster_key;  // every call must carry the same; empty: calls must carry none
  group::NodeIdentity identity;
  group::RendezvousOptions rendezvous;
  ProbePort* probes = nullptr;  // measurements; outlives the server. Null: refused
  uint32_t connections_max = 256;
  uint64_t first_bytes_ns = 5'000'000'000;  // as in PeerListenerOptions
  uint64_t keepalive_ns = 10'000'000'000;   // a peer that answers no ping for this and half as long is cut off
};

class PeerServer {
 public:
  /// Serves from here on, as no host of the rendezvous. ADDRESS_IN_USE, CONFIG_BAD_VALUE or PERMISSION name
  /// fabric.listen.
  static base::Result<std::unique_ptr<PeerServer>> create(const PeerServerOptions& options);
  /// Shuts down at once if shutdown() was not called.
  ~PeerServer();
  PeerServer(const PeerServer&) = delete;
  PeerServer& operator=(const PeerServer&) = delete;

  uint16_t port() const;
  /// From false to true: an empty rendezvous. From true to false: whoever waits is sent elsewhere.
  void set_hosting(bool hosting);
  /// Hosts where an election says so, in its term and no longer than until then (base::now_ns clock); the same term
  /// again moves that time, another one begins with an empty rendezvous.
  void set_elected(uint64_t term, uint64_t until_ns);
  bool hosting() const;
  /// The nodes that the rendezvous knows; empty where it is not hosted.
  std::vector<group::Rendezvous::NodeSnapshot> nodes() const;
  /// Closes the port and sends whoever waits elsewhere; calls end until the deadline (absolute, base::now_ns clock).
  void shutdown(uint64_t deadline_ns);

 private:
  struct Parts;  // what needs gRPC's headers

  explicit PeerServer(std::unique_ptr<Parts> parts);

  std::unique_ptr<Parts> parts_;
};

}  // namespace expertd::fabric
