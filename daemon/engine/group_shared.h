// SPDX-License-Identifier: Apache-2.0
// GroupShared: the state of one group that the engines of its ranks share on a node: who has submitted operation n,
// what was decided about it, and how many parts still run. Created by the group directory, used by every loop thread of
// its ranks without locks: each word has one kind of writer, and the verdict of an operation is decided once by
// compare-and-swap. Of a group over several nodes it gathers the ranks of this one; whether they agree with the others,
// and what those refused, their parts find out with the counts (device/host/node_exchange.h). With mask_on_loss such a
// group has views (view_change.h, group_views.cc), which say for every operation who takes part in it; while the nodes
// agree on the next one, none is decided. Entries are reused every
// kEntries operations; a rank has at most EXPERTD_RING_SLOTS_MAX outstanding, so entry n is decided and released long
// before n + kEntries is posted, except beside ranks that the others do not wait for (excluded, lost, or late beyond a
// deadline): those may still read it, or come to it then. Functions name ranks of the group; what is kept of ranks of
// this node is kept by their place among them, of which there are at most 64 however many ranks the group has.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "daemon/base/atomic_rank_set.h"
#include "daemon/base/rank_set.h"
#include "daemon/engine/ports.h"
#include "daemon/engine/view_message.h"
#include "proto/abi/executor_v1.h"

namespace expertd::engine {

/// Why an operation failed for the whole group; every rank reports it, except a rank whose own request was refused.
struct Failure {
  uint32_t reason = 0;
  uint32_t missing = 0;
  uint32_t argument = 0;
  uint32_t peer_reason = 0;
  int32_t rank = -1;
  int64_t value = 0;
  int64_t minimum = 0;
  int64_t maximum = 0;
};

enum class Verdict : uint32_t {
  kOpen = 0,    // still gathering (or the entry serves an older operation)
  kLaunch = 1,  // every active rank submitted and they agree
  kFailed = 2,  // ended before launch
  kGone = 3,    // the entry already serves a newer operation: this rank is far too late
};

struct OpEntry {
  /// (number << 2) | kDeciding/kLaunchTag/kFailedTag; CAS decides, then a release store publishes.
  std::atomic<uint64_t> verdict{0};
  /// By place, as all tables here. 2n: the rank submitted operation n; its request was written before (release/acquire
  /// pair). 2n + 1: it withdrew from operation n since. Grows only, so a rank whose word is beyond 2n takes no part in
  /// n, whoever decides about it.
  std::array<std::atomic<uint64_t>, base::kMaxLocalRanks> posted{};
  /// Who submitted last, (number << 8) | place: for people, and for nothing that is decided.
  std::atomic<uint64_t> last_posted{0};
  std::atomic<uint64_t> last_posted_ns{0};  // when, base::now_ns clock; likewise
  /// n: the rank will not read this entry for operation n again.
  std::array<std::atomic<uint64_t>, base::kMaxLocalRanks> released{};
  std::array<const Request*, base::kMaxLocalRanks> requests{};
  /// Parts of this operation not yet ended on their devices; set by the decider, counted down by each engine.
  std::atomic<uint32_t> unfinished{0};
  /// Operation number whose launched parts must be aborted; `abort_failure` was written before by the CAS winner.
  std::atomic<uint64_t> abort_claim{0};
  std::atomic<uint64_t> abort_number{0};
  Failure abort_failure;
  Failure failure;             // of a kFailed verdict
  base::AtomicRankSet active;  // ranks that take part; written by the decider before the verdict, also read by quiet()
  uint64_t epoch = 0;
  ExchangeFlags flags;
};

struct GroupSettings {
  GroupShape shape;  // rank and session are those of nobody: per-rank data is in the vectors below
  bool mask_on_loss = false;
  uint64_t op_timeout_ns = 0;
  uint64_t first_op_timeout_ns = 0;
  bool normal = true;            // HT operations allowed
  bool inference = true;         // LL operations allowed
  uint32_t dispatch_dtypes = 0;  // set of expertd_payload that dispatches may carry; 0: any
  /// Not 0: every dispatch and combine gives a token bound; one of at most this counts as low latency.
  uint32_t dynamic_ll_tokens = 0;
  /// How many operations may be launched at once. 1 where ranks exchange through memory that the next operation writes
  /// again (the relay of GPUs without peer access): a rank whose part was aborted would write under a late reader.
  uint32_t exchange_pages = kExchangePages;
  expertd_executor_rule executor_rule{};  // which dispatches are those of copy engines
  /// Of a group over several nodes: who sits where, and what carries its messages. Null: all ranks are on this node.
  uint64_t group_key = 0;  // not 0: the name by which a rendezvous and other nodes know the group
  std::shared_ptr<const Placement> placement;
  uint32_t fabric_lanes = kFabricLanes;  // 1: everything goes by the throughput lane
  uint32_t fabric_weight = 1;            // beside other groups on the throughput lane
  std::shared_ptr<FabricPort> fabric;
  /// Of the successor of a group: ranks that are lost from the start, and what its epochs are counted from.
  base::RankSet born_lost{};
  base::RankSet returning{};  // ranks that joined anew
  uint64_t epoch_base = 0;
};

class GroupShared {
 public:
  static constexpr uint32_t kEntries = 128;

  explicit GroupShared(const GroupSettings& settings);

  const GroupSettings& settings() const { return settings_; }
  /// For whoever knows how the devices of the ranks reach each other. Only before the first operation, while no loop
  /// has the group: they read the settings without locks.
  void set_exchange_pages(uint32_t pages) { settings_.exchange_pages = pages; }
  /// Operations of the group are those of copy engines by a rule, all of low latency if none is given, with a buffer
  /// for each that may be launched.
  void set_copy_engine(uint32_t buffers, const expertd_executor_rule& rule = {EXPERTD_COPIES_LL, 0}) {
    settings_.shape.copies = rule.copies;
    settings_.executor_rule = rule;
    settings_.exchange_pages = buffers;
  }
  uint32_t ranks() const { return settings_.shape.ranks; }
  const base::RankSet& all_ranks() const { return all_ranks_; }
  /// Those on this node: they alone submit here.
  const base::RankSet& local_ranks() const { return local_ranks_; }
  bool is_local(uint32_t rank) const { return settings_.shape.is_local(rank); }
  /// How many those are, and the place of one of them among them.
  uint32_t places() const { return settings_.shape.local_ranks(); }
  uint32_t place_of(uint32_t rank) const { return settings_.shape.place_of(rank); }
  uint32_t rank_at(uint32_t place) const { return settings_.shape.rank_at(place); }
  bool spans_nodes() const { return settings_.placement != nullptr; }
  /// How the messages of a group over several nodes travel. Only before the first operation, as above.
  void set_fabric(std::shared_ptr<FabricPort> fabric) { settings_.fabric = std::move(fabric); }
  /// The same for who may not know the group.
  const base::AtomicRankSet* lost_set() const { return &lost_; }
  base::RankSet lost() const { return lost_.load(std::memory_order_seq_cst); }
  bool is_lost(uint32_t rank) const { return lost_.contains(rank, std::memory_order_seq_cst); }
  base::RankSet excluded() const {
    return has_views() ? view().excluded : base::RankSet(excluded_.load(std::memory_order_seq_cst));
  }
  uint64_t epoch() const { return epoch_.load(std::memory_order_acquire); }
  uint64_t launched_ops() const { return launched_ops_.load(std::memory_order_relaxed); }

  /// Masks are agreed on with other nodes: lost ranks are left out from the view on that says so, not at once.
  bool has_views() const { return spans_nodes() && settings_.mask_on_loss; }
  /// The latest view; and the one that operation `number` belongs to, which is final once a later one is there. Any
  /// thread.
  View view() const;
  View view_of(uint64_t number) const;
  /// From now on no operation is decided with a mask. Returns the last one that was, or is being decided. Any thread,
  /// one at a time with install().
  uint64_t hold();
  /// The view holds, for ranks that it does not name as well; operations are decided again unless `held`, or another
  /// rank is lost meanwhile. The loops must be woken afterwards.
  void install(const View& view, bool held);
  /// This node takes no part in its group any more: all others are lost to it. The loops must be woken afterwards.
  void end_views();
  /// Ranks of which an operation that is not decided yet will never have what it needs, so that it fails.
  base::RankSet doomed_by(uint64_t number) const;
  /// Ranks that are excluded from an operation by request.
  base::RankSet excluded_from(uint64_t number) const { return has_views() ? view_of(number).excluded : excluded(); }

  /// A rank's session ended, or its node is lost. `through`, of a rank of another node: the last operation whose
  /// messages it had all sent. Any thread; the loops of the other ranks must be woken afterwards.
  void set_lost(uint32_t rank, uint64_t through = 0);
  /// Mask by request: `exclude` and then `readmit`, none to leave it; only with mask_on_loss and of a group on one
  /// node. Any thread; two at a time both count.
  void change_excluded(const base::RankSet& exclude, const base::RankSet& readmit);

  /// The group is to go on as `successor`, which all its nodes have formed: at an operation that begins something, with
  /// no handle outstanding on any rank, it decides nothing any more until it was moved over (or, where all ranks are on
  /// this node, is moved over at once). stay() takes that back. Any thread, one at a time.
  void go_over_to(std::shared_ptr<GroupShared> successor);
  void stay();
  bool has_ended() const { return views_ended_.load(std::memory_order_acquire); }
  bool goes_over() const { return goes_over_.load(std::memory_order_acquire); }
  /// The operation that it holds at, 0 while there is none; and the last one that was decided or is being decided.
  uint64_t held_at() const { return goes_over() ? at_.load(std::memory_order_acquire) : 0; }
  uint64_t last_decided() const;
  /// Operations from `from` on are those of the successor, there numbered from 1. The loops must be woken afterwards.
  void move_over(uint64_t from);
  uint64_t moved_from() const { return moved_from_.load(std::memory_order_acquire); }
  /// Once it was moved over. Kept as long as this.
  GroupShared* successor() const { return successor_.get(); }
  /// The rank's operation was posted here and is the successor's. Only by that rank's loop thread.
  void take_back(uint32_t rank);
  /// The rank, of this node, has submitted an operation. Any thread.
  bool has_submitted(uint32_t rank) const {
    return outstanding_[place_of(rank)].load(std::memory_order_acquire) != 0 || released_through(rank) != 0;
  }
  /// The rank has gone over, and none of its operations is outstanding here. Any thread.
  bool has_gone_over(uint32_t rank) const;

  /// Rank `rank` submits operation `number`. Only by that rank's loop thread, in order.
  void post(uint64_t number, uint32_t rank, const Request* request);
  /// Of the ranks of this node the one that submitted `number` last; -1: not known, since one that ran ahead has the
  /// entry. Before the caller releases the operation.
  int32_t last_to_post(uint64_t number) const;
  /// When that was, as far as admission knows; of two that submit at once it may be the other's.
  uint64_t last_posted_ns(uint64_t number) const;
  /// Decides what can be decided about `number`; returns the verdict. `changed` is set when the loops of the other
  /// ranks must be woken: for the one caller that decided, and for one that seemed to be deciding for a moment.
  Verdict try_decide(uint64_t number, bool* changed);
  /// Nobody has begun to decide `number`; asked after set_lost(rank) this means the rank will not take part in it.
  bool undecided(uint64_t number) const;
  /// Ends `number` before launch, on behalf of `ranks` (none: of the group); false when something else was decided
  /// first, all of `ranks` are excluded, or the entry still serves an older operation. `changed` as above.
  bool fail(uint64_t number, const base::RankSet& ranks, const Failure& failure, bool* changed);
  /// Rank `rank`, which submitted `number`, takes no part in it whatever the mask becomes: the rank may end it on its
  /// own. False when it is being decided or was: then that counts. Only by the rank's loop thread, with mask_on_loss.
  bool withdraw(uint64_t number, uint32_t rank);
  /// The entry of `number` still owes a verdict to an operation before it, so nothing can be decided about `number`.
  bool ahead(uint64_t number) const;
  /// Ranks of this node that have not submitted `number` and are not lost.
  base::RankSet not_posted(uint64_t number) const;
  /// Ranks of a launched operation that were lost before they were through with it; one that finished its part and
  /// left afterwards delivered everything.
  base::RankSet lost_before_release(uint64_t number) const;
  /// Asks every rank's engine to abort its part of a launched operation; the first caller's failure is reported.
  bool request_abort(uint64_t number, const Failure& failure);
  bool abort_requested(uint64_t number, Failure* failure) const;
  /// True when the exchange page of `number` is free: all parts of the operations that used it before ended. Decides
  /// those that nobody else may come back to. `changed` as above.
  bool page_free(uint64_t number, bool* changed);
  void part_finished(uint64_t number);
  /// The rank will not look at operation `number` again. True when a rank has submitted an operation that needs the
  /// entry: it may have found this rank in its way, so the loops of the other ranks must be woken.
  bool release(uint64_t number, uint32_t rank);
  /// The latest operation that a rank of this node released. Any thread.
  uint64_t released_through(uint32_t rank) const {
    return released_through_[place_of(rank)].load(std::memory_order_acquire);
  }
  OpEntry& entry(uint64_t number) { return entries_[number % kEntries]; }
  const OpEntry& entry(uint64_t number) const { return entries_[number % kEntries]; }
  /// No part of an operation in which `rank` takes part is still running. Any thread.
  bool quiet(uint32_t rank) const;

 private:
  Verdict verdict_of(uint64_t number) const;
  bool claim(uint64_t number, uint64_t* before, bool* changed);
  bool stops_at(uint64_t number);
  bool begins(uint64_t number) const;
  base::RankSet participants(uint64_t number, const base::RankSet& lost_ranks) const;
  bool reusable(const OpEntry& entry, uint64_t decided_word) const;
  bool agree(uint64_t number, const base::RankSet& active, Failure* failure) const;
  Verdict decide_in_view(uint64_t number, uint64_t before);
  void publish(OpEntry* op, uint64_t number, const base::RankSet& active, uint64_t epoch);
  Verdict publish_failure(OpEntry* op, uint64_t number, const base::RankSet& active, const Failure& failure);
  base::RankSet lost_behind(uint64_t number, const base::RankSet& ranks) const;

  /// A view as it is kept; its fields are those of View.
  struct KeptView {
    std::atomic<uint64_t> epoch{1};
    std::atomic<uint64_t> from{1};
    base::AtomicRankSet lost;
    base::AtomicRankSet excluded;
  };
  static View read(const KeptView& kept);
  static constexpr uint64_t kViewsKept = 64;  // an operation of an older one fails

  GroupSettings settings_;
  base::RankSet all_ranks_;
  base::RankSet local_ranks_;
  std::vector<std::atomic<uint64_t>> lost_through_;                             // by rank; of those of other nodes
  std::array<std::atomic<uint64_t>, base::kMaxLocalRanks> released_through_{};  // by place
  base::AtomicRankSet lost_;                                                    // grows only
  std::atomic<uint64_t> excluded_{0};  // without views: of ranks on one node, one bit each
  std::atomic<uint64_t> epoch_{1};
  std::atomic<uint64_t> launched_ops_{0};
  std::array<KeptView, kViewsKept> views_;
  std::atomic<uint64_t> views_begun_{1};  // before its place is written
  std::atomic<uint64_t> views_there_{1};  // after that
  std::atomic<bool> held_{false};
  std::atomic<bool> views_ended_{false};
  std::shared_ptr<GroupShared> successor_;  // set before goes_over_
  std::atomic<bool> goes_over_{false};
  std::atomic<uint64_t> at_{0};
  std::atomic<uint64_t> not_before_{0};  // an operation that it may hold at
  std::atomic<uint64_t> moved_from_{0};
  std::array<std::atomic<uint32_t>, base::kMaxLocalRanks> outstanding_{};  // operations of a rank of this node
  std::array<std::atomic<bool>, base::kMaxLocalRanks> gone_over_{};
  std::vector<OpEntry> entries_;
};

}  // namespace expertd::engine
