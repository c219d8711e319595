// SPDX-License-Identifier: Apache-2.0
// Nodes: what this daemon has to do with daemons of other nodes, put together: the fabric, the peer services and the
// way to the rendezvous. Created by the composition root when fabric.enabled; sessions see it as their GroupFabric.
// What the fabric tells of ranks and nodes that go is handed to the sessions by a thread of its own, because the
// fabric's may not block.
#pragma once

#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <variant>

#include "daemon/app/fabric_gpu_memory.h"
#include "daemon/app/fabric_memory.h"
#include "daemon/app/mesh.h"
#include "daemon/app/node_view.h"
#include "daemon/config/config.h"
#include "daemon/fabric/backend.h"
#include "daemon/fabric/bootstrap/peer_server.h"
#include "daemon/fabric/bootstrap/rendezvous_client.h"
#include "daemon/fabric/fabric.h"
#include "daemon/group/election.h"
#include "daemon/session/service.h"
#include "daemon/supervise/watchdog.h"

namespace expertd::app {

class Nodes final : public session::GroupFabric, private fabric::FabricObserver {
 public:
  /// Of the fabric's threads, by lane.
  using Beats = std::array<supervise::Beat*, fabric::kLanes>;

  /// Opens the fabric and the peer services; `wake` and the beats outlive it.
  /// `gpu`: one of the daemon's, which shares the fabric's buffers; null when it has none.
  static base::Result<std::unique_ptr<Nodes>> create(const config::FabricConfig& config, engine::WakePort* wake,
                                                     const Beats& beats, device::Device* gpu);
  ~Nodes() override;
  Nodes(const Nodes&) = delete;
  Nodes& operator=(const Nodes&) = delete;

  /// Gives the sessions this node's rendezvous and fabric and begins to tell them of losses. Before the sessions start.
  base::Status attach(session::SessionService* sessions);
  /// No join is outstanding and no loss is told any more; the sessions may end. Groups may still be open.
  void detach();

  const std::string& address() const { return identity_.address; }
  /// For status and metrics, any thread; waits for the fabric thread, not for long.
  NodeFacts facts();

  /// Measurements between nodes, for operators.
  session::MeshApi* mesh() { return mesh_.get(); }

  uint64_t node_id() const override { return identity_.id; }
  base::Result<std::shared_ptr<engine::FabricPort>> open(const group::Placed& placed,
                                                         const engine::GroupSettings& settings,
                                                         uint64_t deadline_ns) override;
  void views_changed() override;

 private:
  struct RankGone {
    uint64_t group_key = 0;
    uint32_t rank = 0;
    uint64_t through = 0;
  };
  struct NodeLost {
    uint64_t node_id = 0;
  };
  struct ViewSaid {
    uint64_t group_key = 0;
    uint32_t node = 0;
    engine::ViewMessage message;
  };
  using Event = std::variant<RankGone, NodeLost, ViewSaid>;

  Nodes(const config::FabricConfig& config, const Beats& beats) : config_(config), beats_(beats) {}
  base::Status choose_backend(device::Device* gpu);
  base::Status open_fabric(engine::WakePort* wake, device::Device* gpu);
  base::Status open_services();
  base::Status connect(const group::NodeIdentity& node);
  base::Status make_election();
  base::Status start_election();
  base::Status connect_all(const group::Placed& placed);
  base::Status wait_up(const group::NodeIdentity& node, uint64_t deadline_ns);
  void make_mesh();
  void keep_address(const group::NodeIdentity& node);
  void post(const Event& event);
  void tell(const Event& event);
  void teller_main();

  void node_up(uint64_t node_id, const std::string& name) override;
  void node_lost(uint64_t node_id, const std::string& name, fabric::LossCause cause,
                 const std::string& detail) override;
  void rank_gone(uint64_t group_key, uint32_t rank, uint64_t through) override {
    post(RankGone{group_key, rank, through});
  }
  void view_message(uint64_t group_key, uint32_t node, const engine::ViewMessage& message) override;
  void beat(fabric::LaneKind lane, uint64_t now_ns) override { beats_[static_cast<uint32_t>(lane)]->beat(now_ns); }

  const config::FabricConfig config_;
  const Beats beats_;
  group::NodeIdentity identity_;
  std::string cluster_key_;
  fabric::BackendChoice backend_;
  session::SessionService* sessions_ = nullptr;
  std::mutex mutex_;  // what follows, but for the parts themselves
  std::condition_variable changed_;
  std::deque<Event> events_;  // bounded by what is connected: one per lost node, one per rank that goes,
  size_t views_waiting_ = 0;  // and these, of which there are at most kViewsWaiting
  bool views_changed_ = false;
  std::map<uint64_t, bool> peers_;             // by node id: up, or lost
  std::map<uint64_t, std::string> addresses_;  // by node id; at most kAddresses
  fabric::FabricSnapshot last_;  // what the fabric last told: counters must not fall when it does not answer
  bool stop_ = false;
  std::thread teller_;
  std::unique_ptr<FabricMemory> memory_;         // null: the fabric's own
  std::unique_ptr<FabricGpuMemory> gpu_memory_;  // null: the backend is not `direct`
  std::unique_ptr<fabric::Fabric> fabric_;
  std::unique_ptr<Mesh> mesh_;
  std::unique_ptr<fabric::PeerServer> server_;
  std::unique_ptr<group::Election> election_;  // null: a list says who hosts. Tells server and client
  std::unique_ptr<fabric::RendezvousClient> client_;
};

}  // namespace expertd::app
