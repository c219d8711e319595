// SPDX-License-Identifier: Apache-2.0
// HostPart: one rank's part of an operation on a host device, as a machine that the loop thread turns: each turn takes
// one step, or one slice of a long one (some 50 us), so that an abort, the watchdog and other sessions never wait for a
// whole operation. The ranks of a group meet through the ExchangeFlags of the operation; nothing blocks and nothing
// spins. Loop thread only.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>

#include "daemon/device/host/host_group.h"
#include "daemon/engine/ports.h"
#include "daemon/kernels/host/host_ops.h"
#include "daemon/kernels/op_params.h"

namespace expertd::device {

class HostPart {
 public:
  enum class Step : uint32_t {
    kFree,
    kBehind,       // an earlier part of the session has not ended
    kReady,        // that part ended; this one starts when it is polled again
    kStart,        // takes one of the ways below
    kCheckIds,     // layout, in slices
    kCountIds,     // layout, in slices
    kRoute,        // in slices
    kAwaitRouted,  // until every rank's row of the matrix is there
    kMove,         // in slices
    kAwaitMoved,   // until every rank's rows are there
    kFinish,       // in slices
    kClear,        // failed: the outputs that could be mistaken for data, in slices
  };

  /// Takes the spec. `behind`: the session's previous part, 0 when none is in flight.
  void begin(const engine::LaunchSpec& spec, base::DeviceIndex device, HostGroupDirectory* groups, engine::PartId id,
             engine::PartId behind);
  /// Takes one step or slice; true when the part ended and its report is final.
  bool advance(engine::WakePort* wake);
  /// Ends the part with `reason`, as soon as its outputs are cleared.
  void fail(uint32_t reason);
  /// The part that this one waited for ended; `next` is the one which that part waited for, 0 for none.
  void follow(engine::PartId next);
  void free() { step_ = Step::kFree; }

  engine::PartId id() const { return id_; }
  engine::PartId behind() const { return behind_; }
  Step step() const { return step_; }
  /// Whether a step of that kind may take a whole slice's time.
  static bool takes_slices(Step step);
  /// No step of it takes more than one slice.
  bool small() const { return params_.shape.tokens <= route_tokens_ && params_.shape.tokens <= move_tokens_; }
  /// Whether it may advance without an event from outside.
  bool runs() const;
  /// What it waits for: expertd_missing and the ranks.
  uint32_t missing(base::RankSet* ranks) const;
  const base::RankSet& active() const { return params_.shape.active_ranks; }
  uint64_t start_ns() const { return start_ns_; }
  const kernels::OpReport& report() const { return report_; }
  uint32_t peer_reason() const { return peer_reason_; }
  const engine::Exchanged& exchanged() const { return exchanged_; }

 private:
  bool prepare(const engine::LaunchSpec& spec, base::DeviceIndex device, HostGroupDirectory* groups);
  bool prepare_exchange(const engine::LaunchSpec& spec, HostGroupTables* tables);
  void size_slices();
  void start(engine::WakePort* wake);
  bool check_ids();
  bool count_ids();
  void route(engine::WakePort* wake);
  bool await_routed(engine::WakePort* wake);
  void routed(engine::WakePort* wake);
  void turn_exchange(engine::WakePort* wake);
  void close_exchange();
  bool exchanges() const { return exchange_ != nullptr; }
  void move(engine::WakePort* wake);
  void await_moved(engine::WakePort* wake);
  bool finish();
  bool clear();
  void enter(Step step);
  void add_waits(const base::RankSet& routed);
  void note_last();
  /// Sets the flags of ranks, and wakes the other ranks of the node when those of all active ones are there.
  void set_routed(const base::RankSet& ranks, engine::WakePort* wake) const;
  /// The same of the own rank, and of those of the node.
  void set_moved(engine::WakePort* wake) const;
  void wake_others(engine::WakePort* wake) const;
  uint32_t slice_end(uint32_t tokens) const;

  engine::PartId id_ = 0;
  engine::PartId behind_ = 0;
  Step step_ = Step::kFree;
  bool broken_ = false;        // the device has no tables for it
  bool routes_ = false;        // has a route step of its own
  uint64_t progress_ = 0;      // of the step: tokens, rows or bytes done
  uint32_t route_tokens_ = 1;  // tokens of a slice: route, and checking the ids of a layout
  uint32_t count_tokens_ = 1;  // counting the ids of a layout
  uint32_t move_tokens_ = 1;
  engine::ExchangeFlags* flags_ = nullptr;
  uint64_t start_ns_ = 0;
  base::RankSet arrived_;      // ranks whose waiting time is known (wait_stats)
  HandleUse* kept_ = nullptr;  // of the handle that the part leaves or uses
  HandleUse use_;              // what it must be, or becomes
  const engine::Placement* placement_ = nullptr;
  std::array<base::DeviceIndex, base::kMaxLocalRanks> devices_{};  // by place
  uint32_t place_ = 0;                                             // of the own rank
  uint64_t local_ = 0;                                             // places of active ranks of this node
  NodeExchange* exchange_ = nullptr;  // of a group over several nodes; open from the start of the part to its end
  NodePart node_;
  bool refused_ = false;      // at admission, which all nodes are told
  bool stirred_ = false;      // the last turn of the exchange moved something
  uint32_t peer_reason_ = 0;  // with PEER_REJECTED
  engine::Exchanged exchanged_;
  kernels::OpParams params_;
  kernels::OpReport report_;
  kernels::PeerView* peers_ = nullptr;  // of all ranks of the group, in its tables
};

}  // namespace expertd::device
