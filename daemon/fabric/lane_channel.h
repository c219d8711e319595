// SPDX-License-Identifier: Apache-2.0
// LaneChannel: what one group has of one data lane on this node: buffers, and between each local rank and the lane's
// thread one queue per direction and purpose. The functions of the first part are called by the loop thread of their
// rank; everything under "lane's thread" by that one. Owned by GroupChannel, whose memory it uses. README.md has the
// picture.
#pragma once

#include <ucp/api/ucp.h>

#include <array>
#include <atomic>
#include <memory>
#include <vector>

#include "daemon/engine/fabric_port.h"
#include "daemon/engine/ports.h"
#include "daemon/fabric/lane_peer.h"
#include "daemon/fabric/options.h"
#include "daemon/fabric/rail_loads.h"
#include "daemon/fabric/receive_share.h"
#include "daemon/fabric/spsc_queue.h"
#include "daemon/fabric/waker.h"
#include "daemon/fabric/wire.h"

namespace expertd::fabric {

/// What the channel uses of its surroundings; all outlive it.
struct LaneSurroundings {
  uint64_t own_node_id = 0;
  RailLoads* loads = nullptr;
  engine::WakePort* wake = nullptr;
  Waker* waker = nullptr;  // of the lane's thread
};

class LaneChannel {
 public:
  struct Memory {
    std::byte* host = nullptr;
    std::byte* gpu = nullptr;  // null: entries lie behind their heads
    bool is_gpu = false;       // what `gpu` is: in tests it is the host's as well
  };
  /// `link` outlives it; `memory` has bytes_needed(link), and gpu_bytes_needed(link) if there is such.
  LaneChannel(const GroupLink& link, engine::FabricLane lane, const LaneSurroundings& surroundings, Memory memory);
  LaneChannel(const LaneChannel&) = delete;
  LaneChannel& operator=(const LaneChannel&) = delete;

  static uint64_t bytes_needed(const GroupLink& link);
  static uint64_t gpu_bytes_needed(const GroupLink& link);

  // As of engine::FabricPort.
  engine::SendBuffer take(uint32_t rank);
  void send(uint32_t rank, const engine::SendBuffer& buffer, const engine::MessageHeader& header, uint64_t bytes);
  void drop(uint32_t rank, const engine::SendBuffer& buffer) { queues(rank).dropped.push_back(buffer.id); }
  bool receive(uint32_t rank, engine::Arrival* arrival);
  void release(uint32_t rank, const engine::Arrival& arrival);

  // Lane's thread, from here on.

  /// Before the first turn; a peer per node, null for the own one.
  void use_peers(std::vector<LanePeer*> peers);
  const std::vector<LanePeer*>& peers() const { return peers_; }
  /// A message of `node`'s daemon, whose key and epoch are this group's. False: not taken, for `cause`, described by
  /// `detail` when only a broken daemon does that. `kept` says that a rendezvous's descriptor is kept.
  bool accept(uint32_t node, const WireHeadedMessage& header, const Incoming& incoming, bool* kept, DropCause* cause,
              const char** detail);
  /// False: more credits than were ever given out, or not of this lane.
  bool credit(uint32_t node, const WireCredit& header);
  /// No loop calls for a local rank any more: its arrivals are let go, also those to come.
  void forget(uint32_t rank);
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
  /// The peer is lost and its endpoints are about to close; null: all of them.
  void lose(const LanePeer* peer);
  /// No rank uses it any more. What was submitted still goes out, nothing is taken in.
  void begin_close();
  /// Closed, and nothing in flight may touch its memory.
  bool drained() const;

 private:
  /// The queues of one local rank. The first named thread pushes, the second pops.
  struct RankQueues {
    RankQueues(uint32_t send_buffers, uint32_t receive_slots)
        : free(send_buffers), submitted(send_buffers), arrived(receive_slots), released(receive_slots) {
      dropped.reserve(send_buffers);
    }

    SpscQueue<uint32_t> free;       // lane -> rank: send slots
    SpscQueue<uint32_t> submitted;  // rank -> lane: send slots
    SpscQueue<uint32_t> arrived;    // lane -> rank: receive slots
    SpscQueue<uint32_t> released;   // rank -> lane: receive slots
    std::vector<uint32_t> dropped;  // the rank's own: send slots it did not need
    bool forgotten = false;         // lane's thread
  };
  /// A send buffer. Filled by the rank between take() and send(), by the lane's thread after that.
  struct SendSlot {
    LaneChannel* channel = nullptr;
    uint32_t id = 0;
    uint32_t rank_index = 0;
    std::byte* data = nullptr;
    std::byte* entries = nullptr;  // of GroupLink::gpu_memory
    uint32_t node = 0;
    uint32_t rail = 0;
    ucs_status_t status = UCS_OK;
    WireHeadedMessage header;  // UCX reads it until the send has ended
  };
  struct PeerLink;
  /// A receive buffer and what lies in it. Written by the lane's thread before it is queued to ranks, read by them.
  struct ReceiveSlot {
    LaneChannel* channel = nullptr;
    uint32_t id = 0;
    PeerLink* from = nullptr;
    bool eager = false;
    std::byte* data = nullptr;
    std::byte* entries = nullptr;  // of GroupLink::gpu_memory; eager slots have none
    uint32_t holders = 0;          // ranks that have not released it; lane's thread
    ucs_status_t status = UCS_OK;
    uint64_t arrived_ns = 0;
    WireHeadedMessage header;
  };
  struct Deferred {
    WireHeadedMessage header;
    void* descriptor = nullptr;
    ucp_worker_h worker = nullptr;  // of the rail it came by
  };
  struct CreditSlot {
    PeerLink* from = nullptr;
    bool under_way = false;
    WireCredit header;
  };
  /// Between this group's parts on two nodes. Lane's thread.
  struct PeerLink final : public ShareMember {
    explicit PeerLink(uint32_t most_deferred) : deferred(most_deferred), deferred_max(most_deferred) {}
    uint64_t waiting_bytes() const override;
    void start_waiting() override;

    LaneChannel* channel = nullptr;
    uint32_t node = 0;
    LanePeer* peer = nullptr;
    uint32_t credits = 0;                  // eager messages that the other side has room for
    uint32_t credits_owed = 0;             // slots of this side that came free and that it was not told of
    std::vector<uint32_t> free;            // receive slots
    std::vector<uint32_t> free_eager;      // receive slots
    mutable SpscQueue<Deferred> deferred;  // rendezvous that found no free slot, oldest first
    uint32_t deferred_count = 0;
    const uint32_t deferred_max;  // all send buffers of the other side: more cannot be under way
    std::array<CreditSlot, 2> credit_slots;
  };

  std::byte* next_entries(Memory* memory) const;
  void make_send_slots(Memory* memory);
  void make_receive_slots(Memory* memory);
  uint32_t own_ranks() const { return link_.placement.ranks_on(link_.placement.own_node); }
  RankQueues& queues(uint32_t rank) { return *ranks_[link_.placement.index_of[rank]]; }

  const char* bad_field(uint32_t node, const WireHeadedMessage& header, const Incoming& incoming) const;
  bool pump_released();
  bool pump_submitted();
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
  void wake_rank(uint32_t rank_index) { wake_ |= uint64_t{1} << rank_index; }
  void wake_ranks();
  static void on_sent(void* request, ucs_status_t status, void* slot);
  static void on_received(void* request, ucs_status_t status, size_t bytes, void* slot);
  static void on_credit_sent(void* request, ucs_status_t status, void* slot);

  const GroupLink& link_;
  const engine::FabricLane lane_;
  const LaneSurroundings surroundings_;
  const ucs_memory_type_t entries_type_;  // of what slots have for entries
  std::vector<std::unique_ptr<RankQueues>> ranks_;
  std::vector<SendSlot> send_slots_;
  std::vector<ReceiveSlot> receive_slots_;
  std::atomic<uint32_t> wanted_{0};  // deferred arrivals: a released buffer is then worth waking the lane's thread

  // Lane's thread.
  std::vector<std::unique_ptr<PeerLink>> links_;  // per node; null for the own one
  std::vector<LanePeer*> peers_;
  std::vector<SendSlot*> sends_ended_;        // by callbacks, not yet looked at
  std::vector<ReceiveSlot*> receives_ended_;  // likewise
  uint32_t sends_in_flight_ = 0;
  uint32_t receives_in_flight_ = 0;
  uint32_t credits_in_flight_ = 0;
  uint32_t deferred_ = 0;
  uint64_t wake_ = 0;  // local ranks to wake at the end of the turn, by their place
  bool closing_ = false;
};

}  // namespace expertd::fabric
