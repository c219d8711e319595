// SPDX-License-Identifier: Apache-2.0
// Mesh: how fast the fabric is between any two nodes. For operators it passes the wish on to the node that shall
// measure; for peers it measures, or lets itself be measured. A thread for each of the two, one job at a time; the
// fabric's thread does the measuring itself. Owned by Nodes, whose fabric outlives it.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "daemon/app/one_job.h"
#include "daemon/fabric/bootstrap/probe_calls.h"
#include "daemon/fabric/bootstrap/probe_port.h"
#include "daemon/fabric/fabric.h"
#include "daemon/session/api.h"

namespace expertd::app {

/// What the mesh uses of its surroundings; all outlive it, but for what it is told to do without by stop().
struct MeshSurroundings {
  fabric::Fabric* fabric = nullptr;
  std::string cluster_key;
  /// Connects the node on the fabric and waits until it is up; an error at the deadline, or when the daemon stops.
  std::function<base::Status(const group::NodeIdentity& node, uint64_t deadline_ns)> connect;
  /// Address of the daemon that hosts the rendezvous; empty, with the cause, when none is known.
  std::function<std::string(std::string* cause)> rendezvous;
};

class Mesh final : public session::MeshApi, public fabric::ProbePort {
 public:
  explicit Mesh(MeshSurroundings surroundings);
  ~Mesh() override { stop(); }

  /// Before anybody calls; the identity that other nodes connect to.
  void introduce(const group::NodeIdentity& own);
  /// Cancels what is on; nothing is called back after it.
  void stop();

  /// What this daemon measured last, by the name of the other node; at most group::kMaxNodes of them.
  std::map<std::string, std::vector<fabric::LaneSpeed>> measured() const;

  std::string node() const override;
  void list_nodes(Listed done) override;
  void measure_pair(uint64_t source_id, uint64_t destination_id, uint64_t timeout_ns,
                    session::MeshApi::Measured done) override;

  void open(const fabric::ProbeOpening& opening, Opened done) override;
  void measure(const group::NodeIdentity& to, uint64_t timeout_ns, fabric::ProbePort::Measured done) override;

 private:
  using Speeds = base::Result<std::vector<fabric::LaneSpeed>>;

  group::NodeIdentity own() const;
  base::Status fetch_nodes(uint64_t deadline_ns);
  base::Result<group::NodeIdentity> known(uint64_t node_id, uint64_t deadline_ns);
  base::Result<std::vector<session::PairLaneSnapshot>> relay(uint64_t source_id, uint64_t destination_id,
                                                             uint64_t timeout_ns);
  base::Status let_ask(const fabric::ProbeOpening& opening);
  Speeds ask(const group::NodeIdentity& to, uint64_t timeout_ns);
  base::Result<std::vector<fabric::ProbeFigures>> run_probe(const fabric::ProbePlan& plan) const;
  /// Names of the rails of the latency lane and of the throughput lane; one that is empty where there is one rail.
  using Devices = std::pair<std::vector<std::string>, std::vector<std::string>>;
  base::Result<Devices> rails() const;
  void keep(const std::string& node, const std::vector<fabric::LaneSpeed>& speeds);

  const MeshSurroundings surroundings_;
  mutable std::mutex mutex_;  // what follows
  group::NodeIdentity own_;   // without an id: not introduced yet
  std::map<std::string, std::vector<fabric::LaneSpeed>> measured_;
  std::map<uint64_t, group::NodeIdentity> nodes_;  // as last listed; at most group::kMaxNodes
  std::atomic<bool> stopping_{false};              // looked at by who waits; orders nothing
  fabric::ProbeCalls operator_calls_;
  fabric::ProbeCalls peer_calls_;
  OneJob for_operators_;
  OneJob for_peers_;
};

}  // namespace expertd::app
