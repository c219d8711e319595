// SPDX-License-Identifier: Apache-2.0
// GroupChannel: what one group has of the fabric on this node: its memory, and between each local rank and the fabric
// thread one queue per direction and purpose. The functions of FabricPort are called by the loop thread of their rank;
// everything under "fabric thread" by that one. Owned by Core, which frees it when it is drained: closed, and nothing
// in flight may touch its memory. README.md has the picture.
#pragma once

#include <ucp/api/ucp.h>

#include <array>
#include <atomic>
#include <memory>
#include <vector>

#include "daemon/engine/fabric_port.h"
#include "daemon/engine/ports.h"
#include "daemon/fabric/lane.h"
#include "daemon/fabric/options.h"
#include "daemon/fabric/peer.h"
#include "daemon/fabric/rail_loads.h"
#include "daemon/fabric/receive_share.h"
#include "daemon/fabric/spsc_queue.h"
#include "daemon/fabric/waker.h"
#include "daemon/fabric/wire.h"

namespace expertd::fabric {

/// What the channel uses of its surroundings; all outlive it.
struct ChannelSurroundings {
  uint64_t own_node_id = 0;
  RailLoads* loads = nullptr;  // by engine::FabricLane
  MemoryPort* memory = nullptr;
  engine::WakePort* wake = nullptr;
  Waker* waker = nullptr;  // of the fabric thread
};

class GroupChannel final : public engine::FabricPort {
 public:
  /// Takes all memory that the group will ever use. Control thread. ARGUMENT_RANGE names a field of the link.
  static base::Result<std::unique_ptr<GroupChannel>> create(GroupLink link, const ChannelSurroundings& surroundings);
  ~GroupChannel() override;
  GroupChannel(const GroupChannel&) = delete;
  GroupChannel& operator=(const GroupChannel&) = delete;

  uint64_t message_bytes() const override { return link_.message_bytes; }
  engine::SendBuffer take(uint32_t rank, engine::FabricLane lane) override;
  void send(uint32_t rank, const engine::SendBuffer& buffer, const engine::MessageHeader& header,
            uint64_t bytes) override;
  void drop(uint32_t rank, const engine::SendBuffer& buffer) override;
  bool receive(uint32_t rank, engine::Arrival* arrival) override;
  void release(uint32_t rank, const engine::Arrival& arrival) override;

  const GroupLink& link() const { return link_; }
  uint64_t memory_bytes() const { return memory_bytes_; }

  // Fabric thread, from here on.

  /// Before the first turn; a peer per node, null for the own one.
  void use_peers(std::vector<Peer*> peers);
  const std::vector<Peer*>& peers() const { return peers_; }
  /// A message of `node`'s daemon, whose key and epoch are this group's. False: not taken, for `cause`, described by
  /// `detail` when only a broken daemon does that. `kept` says that a rendezvous's descriptor is kept.
  bool accept(uint32_t node, const WireMessage& header, const Incoming& incoming, bool* kept, DropCause* cause,
              const char** detail);
  /// False: more credits than were ever given out, or no such lane.
  bool credit(uint32_t node, const WireCredit& header);
  /// Tells every other node that a local rank is gone, as soon as there is room; once per rank.
  void tell_gone(uint32_t rank, uint64_t through);
  /// A rank of `node` is gone. False: it is no rank of it, or was gone already.
  bool hear_gone(uint32_t node, const WireGone& header);
  /// No loop calls for a local rank any more: its arrivals are let go, also those to come.
  void forget(uint32_t rank);
  /// Sends a message about views, behind those that wait for the node; the oldest of too many is dropped.
  void tell_view(uint32_t node, const engine::ViewMessage& message);
  /// The parts of a turn before and after rendezvous are received, which the peers' shares start; true when something
  /// moved.
  bool begin_turn();
  bool end_turn();
  /// Whether a rendezvous waits.
  bool is_waiting() const { return deferred_ != 0; }
  /// It is drained and goes.
  void let_peers_go();
  /// Whether a rank has left something that a turn would take.
  bool has_work() const;
  /// The peer is lost and its endpoints are about to close.
  void lose(const Peer* peer);
  /// No rank uses it any more. What was submitted still goes out, nothing is taken in.
  void begin_close();
  bool closing() const { return closing_; }
  bool drained() const;

 private:
  /// The queues of one local rank. The first named thread pushes, the second pops.
  struct RankQueues {
    RankQueues(uint32_t send_buffers, uint32_t receive_slots)
        : free{{SpscQueue<uint32_t>(send_buffers), SpscQueue<uint32_t>(send_buffers)}},
          submitted{{SpscQueue<uint32_t>(send_buffers), SpscQueue<uint32_t>(send_buffers)}},
          arrived(receive_slots),
          released(receive_slots) {}

    std::array<SpscQueue<uint32_t>, engine::kFabricLanes> free;       // fabric -> rank: send slots
    std::array<SpscQueue<uint32_t>, engine::kFabricLanes> submitted;  // rank -> fabric: send slots
    SpscQueue<uint32_t> arrived;                                      // fabric -> rank: receive slots
    SpscQueue<uint32_t> released;                                     // rank -> fabric: receive slots
    std::array<std::vector<uint32_t>, engine::kFabricLanes> dropped;  // the rank's own: send slots it did not need
    bool forgotten = false;                                           // fabric thread
  };
  /// A send buffer. Filled by the rank between take() and send(), by the fabric thread after that.
  struct SendSlot {
    GroupChannel* channel = nullptr;
    uint32_t id = 0;
    uint32_t rank_index = 0;
    engine::FabricLane lane = engine::FabricLane::kLatency;
    std::byte* data = nullptr;
    uint32_t node = 0;
    uint32_t rail = 0;
    ucs_status_t status = UCS_OK;
    WireMessage header;  // UCX reads it until the send has ended
  };
  struct PeerLink;
  /// A receive buffer and what lies in it. Written by the fabric thread before it is queued to ranks, read by them.
  struct ReceiveSlot {
    GroupChannel* channel = nullptr;
    uint32_t id = 0;
    PeerLink* from = nullptr;
    bool eager = false;
    std::byte* data = nullptr;
    uint32_t holders = 0;  // ranks that have not released it; fabric thread
    ucs_status_t status = UCS_OK;
    uint64_t arrived_ns = 0;
    WireMessage header;
  };
  struct Deferred {
    WireMessage header;
    void* descriptor = nullptr;
    ucp_worker_h worker = nullptr;  // of the rail it came by
  };
  struct CreditSlot {
    PeerLink* from = nullptr;
    bool under_way = false;
    WireCredit header;
  };
  /// What one other node is still to be told of local ranks that are gone; one message at a time is under way.
  struct GoneLink {
    GroupChannel* channel = nullptr;
    Peer* peer = nullptr;
    uint64_t waiting = 0;  // bit per local rank, by its place
    bool under_way = false;
    WireGone header;
  };
  /// Messages about views that wait for a node; one at a time is under way.
  struct ViewLink {
    static constexpr uint32_t kMost = 8;  // whoever waits for an answer asks again
    GroupChannel* channel = nullptr;
    Peer* peer = nullptr;
    std::array<engine::ViewMessage, kMost> waiting{};  // a ring: `count` from `first` on
    uint32_t first = 0;
    uint32_t count = 0;
    bool under_way = false;
    WireView header;
  };
  /// One lane between this group's parts on two nodes. Fabric thread.
  struct PeerLink final : public ShareMember {
    explicit PeerLink(uint32_t most_deferred) : deferred(most_deferred), deferred_max(most_deferred) {}
    uint64_t waiting_bytes() const override;
    void start_waiting() override;

    GroupChannel* channel = nullptr;
    uint32_t node = 0;
    engine::FabricLane lane = engine::FabricLane::kLatency;
    Peer* peer = nullptr;
    uint32_t credits = 0;                  // eager messages that the other side has room for
    uint32_t credits_owed = 0;             // slots of this side that came free and that it was not told of
    std::vector<uint32_t> free;            // receive slots
    std::vector<uint32_t> free_eager;      // receive slots
    mutable SpscQueue<Deferred> deferred;  // rendezvous that found no free slot, oldest first
    uint32_t deferred_count = 0;
    const uint32_t deferred_max;  // all send buffers of the other side: more cannot be under way
    std::array<CreditSlot, 2> credit_slots;
  };

  GroupChannel(GroupLink link, const ChannelSurroundings& surroundings);
  base::Status check() const;
  base::Status check_placement() const;
  base::Status take_memory();
  void make_send_slots(std::byte** memory);
  void make_receive_slots(std::byte** memory);
  uint64_t bytes_needed() const;
  bool uses(engine::FabricLane lane) const {
    return lane == engine::FabricLane::kThroughput || link_.lanes == engine::kFabricLanes;
  }
  uint32_t own_ranks() const { return link_.placement.ranks_on(link_.placement.own_node); }
  RankQueues& queues(uint32_t rank) { return *ranks_[link_.placement.index_of[rank]]; }
  PeerLink& link_to(uint32_t node, engine::FabricLane lane) {
    return *links_[node * engine::kFabricLanes + static_cast<uint32_t>(lane)];
  }

  const char* bad_field(uint32_t node, const WireMessage& header, const Incoming& incoming) const;
  bool pump_released();
  bool pump_submitted(engine::FabricLane lane);
  bool end_sends();
  bool end_receives();
  bool send_credits();
  void start_send(SendSlot& slot);
  void end_send(SendSlot& slot, ucs_status_t status);
  void start_receive(PeerLink& from, const Deferred& deferred);
  void end_receive(ReceiveSlot& slot, ucs_status_t status);
  void deliver(ReceiveSlot& slot);
  void give_back(ReceiveSlot& slot);
  void send_credit(PeerLink& to, CreditSlot& slot);
  bool send_gone();
  void send_gone(GoneLink& to);
  bool gone_told() const;
  bool send_views();
  void send_view(ViewLink& to);
  bool views_under_way() const;
  void wake_rank(uint32_t rank_index) { wake_ |= uint64_t{1} << rank_index; }
  void wake_ranks();
  static void on_sent(void* request, ucs_status_t status, void* slot);
  static void on_received(void* request, ucs_status_t status, size_t bytes, void* slot);
  static void on_gone_sent(void* request, ucs_status_t status, void* link);
  static void on_view_sent(void* request, ucs_status_t status, void* link);
  static void on_credit_sent(void* request, ucs_status_t status, void* slot);

  const GroupLink link_;
  const ChannelSurroundings surroundings_;
  std::byte* memory_ = nullptr;
  uint64_t memory_bytes_ = 0;
  std::vector<std::unique_ptr<RankQueues>> ranks_;
  std::vector<SendSlot> send_slots_;
  std::vector<ReceiveSlot> receive_slots_;
  std::atomic<uint32_t> wanted_{0};  // deferred arrivals: a released buffer is then worth waking the fabric thread

  // Fabric thread.
  std::vector<std::unique_ptr<PeerLink>> links_;  // per (node, lane); null for the own node
  std::vector<Peer*> peers_;
  std::vector<SendSlot*> sends_ended_;        // by callbacks, not yet looked at
  std::vector<ReceiveSlot*> receives_ended_;  // likewise
  uint32_t sends_in_flight_ = 0;
  uint32_t receives_in_flight_ = 0;
  uint32_t credits_in_flight_ = 0;
  uint32_t deferred_ = 0;
  std::vector<GoneLink> gone_links_;                      // per node, without a peer for the own one
  std::array<uint64_t, base::kMaxLocalRanks> through_{};  // of local ranks that are gone, by their place
  uint64_t gone_ = 0;                                     // local ranks, by their place
  std::vector<ViewLink> view_links_;                      // per node, without a peer for the own one
  std::vector<bool> gone_elsewhere_;                      // by rank: of other nodes
  uint64_t wake_ = 0;                                     // local ranks to wake at the end of the turn
  bool closing_ = false;
};

}  // namespace expertd::fabric
