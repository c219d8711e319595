// SPDX-License-Identifier: Apache-2.0
// NodeExchange: what one rank of a group exchanges with other nodes, one operation at a time. A host part that has such
// an exchange opens it when it starts and turns it in each of its turns until it has ended:
//   counts   to every other node; those that arrive become rows of the count matrix, which the ranks of a node share
//   rows     of a dispatch: packed while the own tokens are moved, spread into the own outputs as they arrive
//   pulls    of a combine: sent in windows, served where they arrive
//   sums     of a combine: added to the own node's rows
// An arrival that no honest node sends spoils the operation of this rank alone, which goes on for the sake of the
// others and ends with INTERNAL, naming the rank. Loop thread of the rank; all memory is taken when the rank joins.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "daemon/device/host/node_pulls.h"
#include "daemon/device/host/node_server.h"
#include "daemon/device/nodes/node_inbox.h"
#include "daemon/device/nodes/node_notice.h"
#include "daemon/device/nodes/node_outbox.h"

namespace expertd::device {

/// The part of an operation that exchanges. All that it points to outlives the operation.
struct NodePart {
  engine::FabricPort* fabric = nullptr;
  const engine::Placement* placement = nullptr;
  const engine::Request* own = nullptr;
  uint64_t number = 0;
  uint32_t rank = 0;
  base::RankSet active;
  uint32_t view = 0;
  kernels::OpParams* params = nullptr;  // of the own rank; counts is the matrix of the operation's page
  kernels::PeerView* peers = nullptr;   // of all ranks; what is known of those elsewhere is entered by decide()
  std::span<NodeNotice> notices;        // of the operation's page, one per rank
  engine::ExchangeFlags* flags = nullptr;
  bool routes = false;  // the whole row of the matrix goes with the notice
};

class NodeExchange {
 public:
  NodeExchange(uint32_t ranks, uint32_t experts);
  /// False: there was no memory for what it keeps.
  bool ok() const { return inbox_.ok() && pulls_.ok() && server_.ok(); }

  /// Takes the operation up and puts the own notice beside the matrix; false: the group's messages are too small for
  /// it.
  bool open(const NodePart& part);
  /// Lets go of whatever is not sent or not looked at. Nothing of the operation is touched any more.
  void close();
  bool is_open() const { return op_.fabric != nullptr; }

  /// From now on the own row of the matrix is final: it goes to the other nodes.
  void announce();
  /// One turn of everything that needs no turn of the own tokens. False: nothing moved.
  bool turn();
  /// Takes the ranks whose counts arrived since the last call: they are for the flag of all ranks of the node.
  base::RankSet take_counted();
  bool announced() const { return counts_for_ == 0; }

  /// All counts are there: whether the operation runs, as far as the notices say. False: the Reason is in the report.
  bool decide(const Verdict& verdict);
  /// The operation runs: what arrives is known from now on, and the own tokens may be moved.
  void begin_moving();
  /// Moves own tokens in slices of `tokens`, beginning with *progress; false: nothing moved.
  bool move(uint64_t* progress, uint32_t tokens, kernels::OpReport* report);
  /// The own tokens are moved, and other nodes have had what they pull from here.
  bool moved(uint64_t progress) const;
  /// Nothing is to come for this rank.
  bool complete();
  /// Ranks of other nodes that this one waits for once all counts are there.
  base::RankSet missing() const;
  /// Rows of the own tokens for ranks of other nodes, or pulled from there.
  uint64_t fabric_bytes() const { return landed_bytes_ + pulls_.pulled_bytes(); }
  /// The rank that sent something bad; -1: none.
  int32_t bad_rank() const { return bad_rank_; }

 private:
  bool messages_suffice() const;
  bool send_counts();
  void handle(const engine::Arrival& arrival);
  bool from_a_member(const engine::MessageHeader& header) const;
  bool take_counts(const engine::Arrival& arrival);
  bool read_counts(const engine::Arrival& arrival, int32_t* row, NodeNotice* notice) const;
  bool take_rows(const engine::Arrival& arrival);
  void expect_rows();
  void spoil(uint32_t source);
  bool spoiled(uint32_t source) const { return spoiled_.contains(source); }
  bool dispatches() const;
  bool combines() const;

  NodeOp op_;
  kernels::OpParams* params_ = nullptr;
  kernels::PeerView* peers_ = nullptr;
  std::span<NodeNotice> notices_;
  engine::ExchangeFlags* flags_ = nullptr;
  NodeInbox inbox_;
  NodeOutbox outbox_;
  NodePulls pulls_;
  NodeServer server_;
  uint64_t counts_for_ = 0;  // nodes that have not been sent the counts
  bool announcing_ = false;
  bool moving_ = false;
  bool flushed_ = false;
  base::RankSet counted_;  // ranks whose counts arrived and were not taken yet
  uint64_t landed_bytes_ = 0;
  int32_t bad_rank_ = -1;
  base::RankSet spoiled_;
  std::vector<uint64_t> spread_;      // rows that arrived, per rank
  std::vector<uint64_t> expected_;    // and that are to come
  std::vector<uint32_t> capacities_;  // per rank, of its notice
};

}  // namespace expertd::device
