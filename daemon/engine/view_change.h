// SPDX-License-Identifier: Apache-2.0
// ViewChange: how the nodes of a group agree on who takes part from which operation on. One per group and node; pure:
// values in, messages out, times are arguments; whoever drives it does so from one thread at a time.
//
// The views of a group have one order: epoch 1 has all ranks, and each later one is decided once. A change begins when
// a node learns that ranks are gone, that it has lost another node, or that a mask is asked for:
//   prepare   the lowest node that is not lost asks all others; who promises decides no operation with a mask any more
//   promise   what the node knows of losses and wishes, and the last operation that was decided there
//   accept    the next view: its ranks, and its first operation, one behind the last of all nodes that promised
//   accepted  by nodes that together are the majority, so that there is no other view of this epoch
//   commit    installs it; operations from there on are decided again
// Operations before it keep the older view, which is the same on all nodes. This is one round of Paxos per epoch, whose
// votes are the ranks of the view before that are not lost: of two halves that have lost each other one goes on, the
// one with more of them, or with the lowest of them where both have as many. The other half ends, by name. Messages
// may be lost, repeated and reordered: what is not answered is sent again with the next tend().
//
// The last view of a group may be that all go over to its successor (a group with the same ranks, which lost ones have
// joined anew). Each node then holds at an operation that begins something, and says which; when all that live hold at
// the same, a change begins, and that operation is the view's first. Nodes that came to hold at different ones, because
// an operation failed on some of them, agree on an ordinary view, behind which they hold anew.
#pragma once

#include <array>
#include <cstdint>

#include "daemon/base/limits.h"
#include "daemon/engine/fabric_port.h"
#include "daemon/engine/view_message.h"

namespace expertd::engine {

/// Why a node takes no part in its group any more.
enum class ViewEnd : uint32_t {
  kNone = 0,
  kMinority = 1,  // the nodes that it has not lost have no majority of the ranks
  kLeftOut = 2,   // the others go on without it
  kDeadline = 3,  // the nodes did not agree in time
};
const char* view_end_text(ViewEnd end);

/// What a change does here. Called from within the functions of ViewChange, and calls none of them.
class ViewHost {
 public:
  virtual ~ViewHost() = default;
  /// From now on no operation is decided with a mask. Returns the last one that was; the same until install().
  virtual uint64_t hold() = 0;
  /// The view holds; operations are decided again, unless `held`: then the next change has begun.
  virtual void install(const View& view, bool held) = 0;
  /// Nothing is decided any more.
  virtual void end(ViewEnd end) = 0;
  virtual void send(uint32_t node, const ViewMessage& message) = 0;
};

struct ViewOptions {
  uint64_t retry_ns = 50'000'000;      // what is not answered for so long is sent again
  uint64_t limit_ns = 10'000'000'000;  // a change that takes longer ends the node's part of the group
};

class ViewChange {
 public:
  /// The placement and the host outlive it; at most kViewNodes nodes.
  ViewChange(const Placement& placement, const ViewOptions& options, ViewHost* host,
             const base::RankSet& lost = {});

  /// A rank of a living node is gone: told by its own daemon, or by this one. Operations that it was through with are
  /// not touched by that, so all nodes must have been told before a view leaves it out.
  void rank_gone(uint32_t rank, uint64_t now_ns);
  /// This node has lost another, once and for good.
  void node_lost(uint32_t node, uint64_t now_ns);
  /// Asks for a mask: `exclude`, and then `readmit`. The wish is granted when granted() is at least the number
  /// returned.
  uint64_t ask(const base::RankSet& exclude, const base::RankSet& readmit, uint64_t now_ns);
  uint64_t granted() const { return granted_; }
  /// All nodes have formed the group's successor. This one holds at operation `at`, 0: at none yet, and has decided
  /// `last`. To be called whenever one of them changes.
  void ready(uint64_t at, uint64_t last, uint64_t now_ns);
  /// The ranks that came back to this node have submitted their first operations: all others are told, who wait for
  /// that before they call ready() for the group that this one succeeds.
  void tell_returned();
  bool heard_ready(uint32_t node) const { return (heard_ready_ >> node & 1) != 0; }
  /// It does not go over. False while a change is under way, whose view may be that of the successor: to be called
  /// again.
  bool stay() {
    ready_ = ready_ && promised_ != 0;
    return !ready_;
  }
  /// The view is that of the successor.
  bool has_moved() const { return committed_.view.is_of_successor(all_ranks()); }
  /// False: nothing that a daemon sends.
  bool receive(uint32_t node, const ViewMessage& message, uint64_t now_ns);
  void tend(uint64_t now_ns);
  /// When tend() has something to do; UINT64_MAX: nothing.
  uint64_t next_ns() const;

  /// Something is being agreed on.
  bool is_changing() const { return ended_ == ViewEnd::kNone && since_ns_ != 0; }

  const View& view() const { return committed_.view; }
  ViewEnd ended() const { return ended_; }
  /// Nodes with ranks that are not lost.
  uint64_t members() const { return members_of(view().lost); }

 private:
  enum class Phase { kIdle, kPreparing, kAccepting };
  struct Promise {
    ViewReport report;
    uint64_t accepted = 0;  // ballot; 0: nothing was accepted
    ViewValue value;
  };

  struct Readiness {
    bool told = false;
    uint64_t at = 0;
    uint64_t last = 0;
  };

  base::RankSet all_ranks() const { return ranks_of(~uint64_t{0}); }
  bool needs_change() const;
  void tend_ready(uint64_t now_ns);
  bool all_hold_at(uint64_t nodes, uint64_t at) const;
  bool hold_apart() const;
  bool wants_change() const { return needs_change() || asked_ || promised_ != 0; }
  bool is_lost(uint32_t node) const { return (report_.lost_nodes >> node & 1) != 0; }
  uint64_t members_of(const base::RankSet& lost_ranks) const;
  uint64_t living() const { return members() & ~report_.lost_nodes; }
  uint32_t coordinator() const;
  base::RankSet ranks_of(uint64_t nodes) const;
  bool is_majority(uint64_t nodes) const;
  bool is_sane(const ViewMessage& message) const;

  void advance(uint64_t now_ns);
  void changed(uint64_t now_ns);
  void begin(uint64_t now_ns);
  void propose_if_complete(uint64_t now_ns);
  uint64_t mutual_nodes() const;
  bool told_alike(uint64_t nodes) const;
  ViewValue next_value(uint64_t nodes) const;
  ViewValue promised_value() const;
  bool promised_to_move(uint64_t nodes, uint64_t from) const;
  void accepted_by(uint32_t node, uint64_t now_ns);
  bool leaves_out(const View& next) const;
  void step_back(uint64_t ballot, uint64_t now_ns);
  void install(const ViewValue& value, uint64_t now_ns);
  void end(ViewEnd end);
  void note_promise();

  void take_prepare(uint32_t node, const ViewMessage& message, uint64_t now_ns);
  void take_promise(uint32_t node, const ViewMessage& message, uint64_t now_ns);
  void take_accept(uint32_t node, const ViewMessage& message, uint64_t now_ns);
  void take_commit(const ViewMessage& message, uint64_t now_ns);
  ViewMessage message_of(ViewKind kind) const;
  void send_promise(uint32_t node);
  void send_commit(uint32_t node);
  void send_to(uint64_t nodes, const ViewMessage& message);

  const Placement& placement_;
  const ViewOptions options_;
  ViewHost* host_;
  ViewValue committed_;
  ViewEnd ended_ = ViewEnd::kNone;
  ViewReport report_;         // what this node knows and wishes
  uint64_t wishes_ = 0;       // how often a mask was asked for
  uint64_t granted_ = 0;      // of them
  uint64_t told_ballot_ = 0;  // the ballot whose promise told of told_wishes_
  uint64_t told_wishes_ = 0;

  uint64_t promised_ = 0;  // the highest ballot, of this epoch; 0: none, and operations are decided
  uint64_t accepted_ = 0;  // the ballot of accepted_value_
  ViewValue accepted_value_;

  Phase phase_ = Phase::kIdle;
  uint64_t ballot_ = 0;  // the own one
  uint64_t top_ballot_ = 0;
  uint64_t promises_ = 0;  // nodes
  uint64_t accepts_ = 0;   // nodes
  std::array<Promise, kViewNodes> promise_of_{};
  bool asked_ = false;  // another node wants a change
  bool ready_ = false;
  uint64_t heard_ready_ = 0;                      // nodes that ever told
  std::array<Readiness, kViewNodes> ready_of_{};  // told since the last view
  uint64_t tell_ready_ns_ = 0;
  uint64_t since_ns_ = 0;
  uint64_t retry_at_ns_ = 0;
};

}  // namespace expertd::engine
